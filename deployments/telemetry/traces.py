"""A trace for each request, sent by OTLP/HTTP where an endpoint is set; else nothing is imported.

``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT``) turns it on;
OpenTelemetry's other variables hold too (headers, certificate, sampler). The attributes are those
of the semantic conventions for generative AI, and ``gatehouse.*``.

The ids are drawn when the request arrives, because the audit record names them; the spans are
made when it has ended, from the times that the request path took anyway. So the path itself pays
for two random numbers. A ``traceparent`` of the client (W3C Trace Context) makes its span
the parent of ours. It is a pointer that anybody may write: it decides nothing, neither who asks
nor whether the trace is kept.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from governance.types import Operation, Outcome, Turn

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROVIDER = "vllm"

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_OPERATIONS = {
    Operation.CHAT: "chat",
    Operation.COMPLETIONS: "text_completion",
    Operation.EMBEDDINGS: "embeddings",
}


def parent_of(traceparent: str | None) -> tuple[str, str] | None:
    """Trace id and span id of a ``traceparent`` header, or ``None`` if it is not well-formed."""
    found = _TRACEPARENT.fullmatch(traceparent or "")
    if found is None:
        return None
    version, trace_id, span_id, _, rest = found.groups()
    if version == "ff" or (version == "00" and rest):
        return None
    if not int(trace_id, 16) or not int(span_id, 16):
        return None
    return trace_id, span_id


class NoTracing:
    """Tracing is off: the caller's trace is noted where there is one, and nothing is sent."""

    def begin(self, traceparent: str | None) -> dict[str, str]:
        """Notes for ``Call.notes``; the span is the caller's, because there is none of ours."""
        parent = parent_of(traceparent) if traceparent else None
        return {} if parent is None else {"trace_id": parent[0], "span_id": parent[1]}

    def ended(self, turn: Turn) -> None:
        """There is nothing to send."""

    def close(self) -> None:
        """There is nothing to end."""


class Tracing:
    """Sends a span for each request, with one below it for each stage.

    Args:
        processor: Takes finished spans, such as a ``BatchSpanProcessor``.
        service_version: Version of Gatehouse.
        instance: Id of this gateway.
    """

    def __init__(self, processor: SpanProcessor, service_version: str, instance: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

        class Given(RandomIdGenerator):
            """Gives the ids that were drawn on arrival to the root, and draws those below it."""

            trace_id = 0
            span_id = 0

            def generate_trace_id(self) -> int:
                return self.trace_id or super().generate_trace_id()

            def generate_span_id(self) -> int:
                given, self.span_id = self.span_id, 0
                return given or super().generate_span_id()

        resource = Resource.create(
            {
                "service.name": os.environ.get("OTEL_SERVICE_NAME", "gatehouse"),
                "service.version": service_version,
                "service.instance.id": instance,
            }
        )
        self._ids = Given()
        self._provider = TracerProvider(
            resource=resource, id_generator=self._ids, shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("gatehouse", service_version)

    def begin(self, traceparent: str | None) -> dict[str, str]:
        """Notes for ``Call.notes``: where the request stands in a trace."""
        span_id = f"{_draw(64):016x}"
        if traceparent and (parent := parent_of(traceparent)):
            return {"trace_id": parent[0], "span_id": span_id, "parent_span_id": parent[1]}
        return {"trace_id": f"{_draw(128):032x}", "span_id": span_id}

    def ended(self, turn: Turn) -> None:
        """Make and queue the spans of a turn; a batch processor sends them from its own thread."""
        from opentelemetry import trace

        notes = turn.notes
        if "trace_id" not in notes:
            return
        context = trace.set_span_in_context(trace.INVALID_SPAN)
        if "parent_span_id" in notes:
            parent = trace.SpanContext(
                int(notes["trace_id"], 16),
                int(notes["parent_span_id"], 16),
                is_remote=True,
                # NOTE: not the caller's flag: what is sampled is up to the operator.
                trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
            )
            context = trace.set_span_in_context(trace.NonRecordingSpan(parent))
        self._ids.trace_id, self._ids.span_id = (
            int(notes["trace_id"], 16),
            int(notes["span_id"], 16),
        )
        start_ns = turn.started_us * 1000
        operation = _OPERATIONS[turn.operation]
        asked = turn.request.model if turn.request else None
        answered = turn.route.model.id if turn.route else None
        root = self._tracer.start_span(
            f"{operation} {answered}" if answered else operation,
            context=context,
            kind=trace.SpanKind.SERVER,
            attributes=_attributes(turn, operation, asked if answered else None, answered),
            start_time=start_ns,
        )
        if turn.outcome is Outcome.FAILED:
            root.set_status(trace.Status(trace.StatusCode.ERROR, turn.error_code))
        below = trace.set_span_in_context(root)
        at_ns = start_ns
        for stage, stage_us in turn.stage_us.items():
            span = self._tracer.start_span(f"gatehouse.{stage}", context=below, start_time=at_ns)
            at_ns += stage_us * 1000
            span.end(at_ns)
        root.end(at_ns)

    def close(self) -> None:
        """Send what is left; blocks for a few seconds at most."""
        self._provider.shutdown()


def from_environment(
    environ: Mapping[str, str], version: str, instance: str
) -> Tracing | NoTracing:
    """Tracing as the environment asks for it.

    Raises:
        ValueError: A protocol other than ``http/protobuf`` is asked for.
    """
    if not any(environ.get(name) for name in ENDPOINTS):
        return NoTracing()
    protocol = environ.get(
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    )
    if protocol not in (None, "http/protobuf"):
        raise ValueError("OTEL_EXPORTER_OTLP_PROTOCOL: only http/protobuf is spoken")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return Tracing(BatchSpanProcessor(OTLPSpanExporter()), version, instance)


def _draw(bits: int) -> int:
    """Random and never 0; an identifier, not a secret."""
    return random.getrandbits(bits) or 1


def _attributes(
    turn: Turn, operation: str, asked: str | None, answered: str | None
) -> dict[str, Any]:
    """Attributes of a request's span; never content, and no person."""
    given = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": asked,
        "gen_ai.response.model": answered,
        "gen_ai.response.finish_reasons": [turn.finish_reason] if turn.finish_reason else None,
        "gen_ai.request.max_tokens": turn.request.max_tokens if turn.request else None,
        "gen_ai.request.choice.count": (
            turn.request.choices if turn.request and turn.request.choices != 1 else None
        ),
        "gen_ai.usage.input_tokens": turn.usage.prompt_tokens if turn.usage else None,
        "gen_ai.usage.output_tokens": turn.usage.completion_tokens if turn.usage else None,
        "gen_ai.usage.cache_read.input_tokens": turn.usage.cached_tokens if turn.usage else None,
        "http.response.status_code": turn.status or None,
        "error.type": turn.error_code,
        "gatehouse.request_id": turn.request_id,
        "gatehouse.decision_id": turn.decision_id,
        "gatehouse.reservation_id": turn.reservation.id if turn.reservation else None,
        "gatehouse.department": turn.principal.department if turn.principal else None,
        "gatehouse.outcome": turn.outcome.value if turn.outcome else None,
        "gatehouse.rule_ids": list(turn.decision.rule_ids) if turn.decision else None,
        "gatehouse.route.reason": turn.route.reason if turn.route else None,
        "gatehouse.engine.replica": turn.replica_id,
        "gatehouse.model_version": turn.model_version,
        "gatehouse.gpu_us": turn.gpu_us,
        "gatehouse.charged_gpu_us": turn.charged.gpu_us if turn.charged else None,
    }
    return {name: value for name, value in given.items() if value is not None}
