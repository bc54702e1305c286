"""What the running system exports and logs about a few requests."""

from __future__ import annotations

import json
import time
from collections import Counter

import openai
import pytest

from benchmarks.platform import Platform, Samples
from deployments.telemetry import names
from deployments.telemetry.names import EXPORTED, RAY_LABELS, REQUESTS

SECRET = "the word is rosebud"
DEADLINE_S = 40
"""Ray reports every ten seconds."""


@pytest.fixture(scope="module")
def exported(platform: Platform) -> Samples:
    """The endpoint's figures after four answers and two refusals."""
    client = platform.openai("data-scientist")
    messages = [{"role": "user", "content": SECRET}]
    for model in ("small", "large", "small", "auto"):
        client.chat.completions.create(model=model, messages=messages, max_tokens=4)  # type: ignore[arg-type]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=SECRET, messages=messages, max_tokens=4)  # type: ignore[arg-type]
    assert platform.http.post("/v1/chat/completions", json={}).status_code == 401
    until = time.monotonic() + DEADLINE_S
    while True:
        found = platform.metrics()
        counted = _requests(found)
        # Every process has been heard of, and the last requests, which are the last to be counted.
        if set(EXPORTED) <= set(found) and all(
            counted["none", "refused", status] for status in ("401", "404")
        ):
            return found
        assert time.monotonic() < until, set(EXPORTED) - set(found)
        time.sleep(1)


def _requests(found: Samples) -> Counter[tuple[str, str, str]]:
    """Requests by model, outcome and status; over all gateways, of which some may have died."""
    counted: Counter[tuple[str, str, str]] = Counter()
    for labels, value in found.get(f"ray_{REQUESTS}", []):
        counted[labels["model"], labels["outcome"], labels["status"]] += int(value)
    return counted


def test_every_declared_metric_is_exported_and_nothing_else(exported: Samples) -> None:
    assert set(exported) == set(EXPORTED)


def test_labels_are_the_declared_ones(exported: Samples) -> None:
    allowed = {*RAY_LABELS, "otel_scope_name", "otel_scope_version", "otel_scope_schema_url"}
    for name, series in exported.items():
        for labels, _ in series:
            assert set(labels) - allowed == set(EXPORTED[name]), name


def test_requests_are_counted_by_model_department_and_outcome(exported: Samples) -> None:
    counted = _requests(exported)
    assert counted["small", "completed", "200"] >= 2
    assert counted["large", "completed", "200"] >= 1
    assert counted["none", "refused", "404"] >= 1
    assert counted["none", "refused", "401"] >= 1


def test_histograms_are_whole(exported: Samples) -> None:
    name = f"ray_{names.FIRST_CHUNK}"
    buckets: Counter[str] = Counter()
    for labels, value in exported[f"{name}_bucket_total"]:
        if (labels["model"], labels["operation"]) == ("small", "chat"):
            buckets[labels["le"]] += int(value)
    bounds = [float(le.replace("+Inf", "inf")) for le in buckets]
    assert len(buckets) == len(names.SPECS[names.FIRST_CHUNK].bounds) + 1
    in_order = [value for _, value in sorted(zip(bounds, buckets.values(), strict=True))]
    assert in_order == sorted(in_order)
    count = sum(
        value
        for labels, value in exported[f"{name}_count_total"]
        if (labels["model"], labels["operation"]) == ("small", "chat")
    )
    assert buckets["+Inf"] == count >= 2


def test_no_content_and_no_person_is_a_label(exported: Samples) -> None:
    values = {v for series in exported.values() for labels, _ in series for v in labels.values()}
    assert not [value for value in values if "rosebud" in value or "scientist" in value]


def test_logs_carry_the_request_id_and_one_line_for_each_request(platform: Platform) -> None:
    raw = platform.openai("data-scientist").chat.completions.with_raw_response.create(
        model="small", messages=[{"role": "user", "content": SECRET}], max_tokens=4
    )
    request_id = raw.headers["x-gatehouse-request-id"]
    until = time.monotonic() + 10
    lines: list[dict[str, object]] = []
    while not lines:
        assert time.monotonic() < until
        time.sleep(0.5)
        for path in (platform.session() / "logs" / "serve").glob("replica_*.log"):
            text = path.read_text()
            assert "rosebud" not in text
            lines += [json.loads(line) for line in text.splitlines() if request_id in line]
    ended = [line for line in lines if line["message"] == "request completed"]
    assert len(ended) == 1
    assert (ended[0]["model"], ended[0]["status"]) == ("small", 200)
    assert all(line["request_id"] == request_id for line in lines)
    assert set(ended[0]["stage_us"]) >= {"identify", "decide", "stream"}  # type: ignore[call-overload]
    assert "replica" in ended[0]
