"""Traces: what is sent, under whose ids, and what a client's header can and cannot do."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode

from deployments.telemetry.traces import NoTracing, Tracing, from_environment, parent_of
from governance.types import Outcome, Turn
from tests.unit.test_telemetry_turns import SECRET, STAGES, ended_turn

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADER = f"00-{TRACE}-{SPAN}-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Iterator[Tracing]:
    tracing = Tracing(SimpleSpanProcessor(exporter), "1.2", "gw-1")
    yield tracing
    tracing.close()


def traced(tracing: Tracing, traceparent: str | None = None, turn: Turn | None = None) -> Turn:
    turn = turn or ended_turn()
    turn.notes.update(tracing.begin(traceparent))
    tracing.ended(turn)
    return turn


def spans(exporter: InMemorySpanExporter) -> tuple[ReadableSpan, list[ReadableSpan]]:
    found = exporter.get_finished_spans()
    (root,) = [span for span in found if not span.name.startswith("gatehouse.")]
    return root, [span for span in found if span is not root]


def test_a_request_is_a_span_with_one_for_each_stage(
    tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    turn = traced(tracing)
    root, stages = spans(exporter)
    assert root.context is not None
    assert root.parent is None
    assert f"{root.context.trace_id:032x}" == turn.notes["trace_id"]
    assert f"{root.context.span_id:016x}" == turn.notes["span_id"]
    assert (root.name, root.kind) == ("chat small", SpanKind.SERVER)
    assert [span.name for span in stages] == [f"gatehouse.{stage}" for stage in STAGES]
    for span, stage_us in zip(stages, STAGES.values(), strict=True):
        assert span.parent is not None
        assert span.parent.span_id == root.context.span_id
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.end_time - span.start_time == stage_us * 1000
    assert root.start_time == turn.started_us * 1000
    assert root.end_time == stages[-1].end_time
    assert all(a.end_time == b.start_time for a, b in pairwise(stages))


def test_attributes_are_those_of_the_conventions_and_hold_no_content(
    tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    traced(tracing)
    root, _ = spans(exporter)
    given = dict(root.attributes or {})
    assert given["gen_ai.operation.name"] == "chat"
    assert given["gen_ai.provider.name"] == "vllm"
    assert given["gen_ai.request.model"] == given["gen_ai.response.model"] == "small"
    assert given["gen_ai.usage.input_tokens"] == 100
    assert given["gen_ai.usage.output_tokens"] == 7
    assert given["gatehouse.gpu_us"] == 120_000
    known = {v for v in vars(gen_ai_attributes).values() if isinstance(v, str)}
    assert not [name for name in given if name.startswith("gen_ai.") and name not in known]
    text = root.to_json()
    assert SECRET not in text
    assert "someone" not in text


def test_the_callers_span_becomes_the_parent(
    tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    turn = traced(tracing, HEADER)
    root, _ = spans(exporter)
    assert root.context is not None
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == SPAN
    assert f"{root.context.trace_id:032x}" == turn.notes["trace_id"] == TRACE
    assert turn.notes["span_id"] != SPAN


def test_a_caller_cannot_switch_its_trace_off(
    tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    traced(tracing, f"00-{TRACE}-{SPAN}-00")
    spans(exporter)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "x",
        HEADER.upper(),
        HEADER + "\n",
        HEADER + "-more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE[:-1]}\u0663-{SPAN}-01",
        "00-" + "a" * 100_000,
    ],
)
def test_a_header_that_is_no_traceparent_is_as_if_it_were_not_there(
    tracing: Tracing, exporter: InMemorySpanExporter, header: str | None
) -> None:
    assert parent_of(header) is None
    traced(tracing, header)
    root, _ = spans(exporter)
    assert root.parent is None


def test_ids_that_share_no_bit_are_ids_nevertheless() -> None:
    assert parent_of(f"00-{'0' * 31}1-{'0' * 15}2-01") == ("0" * 31 + "1", "0" * 15 + "2")


def test_a_later_version_may_say_more() -> None:
    assert parent_of(f"01-{TRACE}-{SPAN}-01-more") == (TRACE, SPAN)


def test_a_failure_is_an_error_and_a_refusal_is_not(
    tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    failed = ended_turn()
    failed.outcome, failed.status, failed.error_code = Outcome.FAILED, 500, "engine_failed"
    traced(tracing, turn=failed)
    root, _ = spans(exporter)
    assert root.status.status_code is StatusCode.ERROR
    exporter.clear()
    traced(tracing, turn=ended_turn(answered=False))
    root, stages = spans(exporter)
    assert root.status.status_code is StatusCode.UNSET
    assert (root.attributes or {})["error.type"] == "budget_exhausted"
    assert "gen_ai.response.model" not in (root.attributes or {})
    assert [span.name for span in stages] == ["gatehouse.identify", "gatehouse.unfinished"]


def test_what_a_client_calls_a_model_is_not_sent_where_none_answered(
    tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    traced(tracing, turn=ended_turn(model=SECRET, answered=False))
    root, _ = spans(exporter)
    assert SECRET not in root.to_json()


def test_off_costs_no_import_and_still_notes_the_callers_trace() -> None:
    off = from_environment({}, "1", "gw")
    assert isinstance(off, NoTracing)
    assert off.begin(None) == {}
    assert off.begin("nonsense") == {}
    assert off.begin(HEADER) == {"trace_id": TRACE, "span_id": SPAN}
    code = (
        "import sys, deployments.telemetry.traces as t; t.from_environment({}, '1', 'gw');"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_another_protocol_is_refused_at_start() -> None:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    with pytest.raises(ValueError, match="http/protobuf"):
        from_environment(environ, "1", "gw")


def test_spans_arrive_at_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        on = from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}, "1", "gw-1")
        assert isinstance(on, Tracing)
        turn = traced(on)
        on.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    ((path, body),) = received
    assert path == "/v1/traces"
    message = ExportTraceServiceRequest.FromString(body)
    (resource,) = message.resource_spans
    names = {a.key: a.value.string_value for a in resource.resource.attributes}
    assert (names["service.name"], names["service.instance.id"]) == ("gatehouse", "gw-1")
    sent = resource.scope_spans[0].spans
    assert len(sent) == 1 + len(STAGES)
    assert {span.trace_id.hex() for span in sent} == {turn.notes["trace_id"]}
    assert SECRET.encode() not in body
