"""What requests cost on a real engine, as the replica is told by the meter in the core."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray

from tests.serve.test_engine_direct import ENGINE, cluster, host

__all__ = ["cluster"]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs"]


def chat(tokens: int = 12, content: str = "Hello", **fields: Any) -> dict[str, Any]:
    return {
        "model": "small",
        "messages": [{"role": "user", "content": content}],
        "max_completion_tokens": tokens,
        "ignore_eos": True,
        **fields,
    }


@pytest.fixture(scope="module")
def engine(cluster: None) -> Iterator[Any]:
    handle = host(engine=ENGINE)
    yield handle
    ray.kill(handle)


def ask(engine: Any, operation: str, body: dict[str, Any], **ticket: Any) -> dict[str, Any]:
    answer: dict[str, Any] = ray.get(engine.ask.remote(operation, body, **ticket), timeout=60)
    assert answer["error"] is None
    return answer


def meter(engine: Any, wait: int = 0) -> dict[str, Any]:
    told: dict[str, Any] = ray.get(engine.meter.remote(wait=wait), timeout=30)
    return told


def check_books(told: dict[str, Any]) -> None:
    """Rows add up to what was attributed, and that to busy time."""
    totals, rows = told["totals"], told["rows"].values()
    assert totals.busy_ns == totals.attributed_ns + totals.unattributed_ns
    assert all(row.ended for row in rows)
    spread = totals.attributed_ns // 1000 - sum(row.gpu_us for row in rows)
    assert 0 <= spread <= len(rows)  # each row is rounded down to a microsecond
    for row in rows:
        assert row.gpu_us == row.prefill_us + row.decode_us


def test_an_answer_carries_its_cost(engine: Any) -> None:
    answer = ask(engine, "chat", chat(20), request_id="r-cost", department="hr")

    tokens = [tokens for tokens, _ in answer["progress"]]
    costs = [cost for _, cost in answer["progress"]]
    assert sum(tokens) == answer["usage"].completion_tokens == 20
    assert answer["prompt_tokens"] == answer["usage"].prompt_tokens
    assert costs == sorted(costs)
    assert answer["gpu_us"] >= costs[-1]
    row = meter(engine, 1)["rows"]["r-cost"]
    assert row.gpu_us == answer["gpu_us"] > 0
    assert row.prefill_us > 0 < row.decode_us
    assert (row.account, row.model, row.base_model) == ("hr", "small", "small")
    assert row.prompt_tokens == row.prefill_tokens + row.cached_tokens
    assert (row.decode_tokens, row.ended, row.delivered) == (20, True, True)


def test_busy_time_is_exactly_what_was_attributed(engine: Any) -> None:
    bodies = [chat(10 + 3 * n, " ".join(WORDS[: n + 1] * 4)) for n in range(10)]
    answers = ray.get(engine.ask_all.remote([("chat", body) for body in bodies]), timeout=120)
    assert all(answer["gpu_us"] > 0 for answer in answers)

    told = meter(engine, 11)

    check_books(told)
    assert told["totals"].unattributed_ns == 0
    last = told["reports"][-1]
    assert (last.accelerator, last.devices, last.running, last.dead) == ("cpu", 1, 0, False)
    assert last.busy_us <= last.elapsed_us
    assert [report.seq for report in told["reports"]] == sorted(
        {report.seq for report in told["reports"]}
    )


def test_choices_and_prompts_are_charged_to_one_reservation(engine: Any) -> None:
    two = ask(engine, "chat", chat(8, n=2), request_id="r-two", reservation_id="v-two")
    assert two["usage"].completion_tokens == sum(tokens for tokens, _ in two["progress"]) == 16
    body = {"model": "small", "prompt": ["One, two", "Red, blue, green"], "max_tokens": 5, "n": 2}
    four = ask(engine, "completions", body, request_id="r-four")

    told = meter(engine)

    row = told["rows"]["r-two"]
    assert (row.reservation_id, row.decode_tokens, row.gpu_us) == ("v-two", 16, two["gpu_us"])
    assert told["rows"]["r-four"].gpu_us == four["gpu_us"]
    assert four["prompt_tokens"] == four["usage"].prompt_tokens
    check_books(told)


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_an_abandoned_answer_is_charged_for_what_was_done(engine: Any, how: str) -> None:
    before = meter(engine)["rows"]
    ray.get(engine.leave.remote(chat(900), how), timeout=60)

    told = meter(engine)

    (row,) = (row for name, row in told["rows"].items() if name not in before and not row.delivered)
    assert row.ended
    assert row.gpu_us > 0
    assert 3 <= row.decode_tokens < 900
    check_books(told)


def test_a_stop_string_ends_with_a_final_figure(engine: Any) -> None:
    """The frontend finds it and aborts the request in the core, perhaps within a step."""
    answer = ask(
        engine, "chat", {**chat(60, stop=["help"], temperature=0), "ignore_eos": False},
        request_id="r-stop",
    )  # fmt: skip
    row = meter(engine)["rows"]["r-stop"]
    assert row.gpu_us == answer["gpu_us"] > 0


def test_what_is_cached_is_not_prefilled_again(engine: Any) -> None:
    """That such a token weighs less is tested with the weights: times of a tiny model are noise."""
    text = " ".join(WORDS * 12)
    ask(engine, "chat", chat(1, "warm " + text))
    ask(engine, "chat", chat(1, text), request_id="r-fresh")
    again = ask(engine, "chat", chat(1, text), request_id="r-cached")

    rows = meter(engine)["rows"]

    fresh, cached = rows["r-fresh"], rows["r-cached"]
    assert again["usage"].cached_tokens == cached.cached_tokens > 0.7 * fresh.prompt_tokens
    assert cached.prefill_tokens < fresh.prefill_tokens


def test_what_the_ledger_did_not_take_is_told_later(engine: Any) -> None:
    ray.get(engine.ledger.remote(False))
    answer = ask(engine, "chat", chat(5), request_id="r-later")
    ray.get(engine.ledger.remote(True))

    told = meter(engine)

    assert told["rows"]["r-later"].gpu_us == answer["gpu_us"]
    check_books(told)


def test_a_refused_request_costs_nothing_and_is_not_reported(engine: Any) -> None:
    refused = ray.get(engine.ask.remote("chat", chat(5, "word " * 3000), request_id="r-refused"))
    assert refused["error"][0] == "context_length_exceeded"
    assert "r-refused" not in meter(engine)["rows"]


def test_metering_is_cheap(engine: Any) -> None:
    """Last but one: over all that ran. The benchmark has the figures; this is a tripwire."""
    totals = meter(engine)["totals"]
    assert totals.steps > 50
    assert totals.hooks_ns < 0.05 * totals.busy_ns


def test_a_dead_core_leaves_a_bound(engine: Any) -> None:
    """Last of those that share the engine: it is dead afterwards."""
    ray.get(engine.kill_engine.remote(chat(900)), timeout=60)
    ray.get(engine.engine_died.remote())

    told = meter(engine)

    last = told["reports"][-1]
    assert last.dead
    assert last.running == 0
    assert 0 < last.unattributed_us < 10_000_000
    killed = [row for row in told["rows"].values() if not row.delivered and row.ended]
    assert killed


def test_embeddings_are_charged(cluster: None) -> None:
    handle = host(engine=ENGINE, operations=["embeddings"])
    try:
        body = {"model": "small", "input": ["a desk", "a chair that is longer"]}
        answer = ask(handle, "embeddings", body, request_id="r-embed")
        told = meter(handle, 1)
        row = told["rows"]["r-embed"]
        assert answer["gpu_us"] == row.gpu_us == row.prefill_us > 0
        assert row.prompt_tokens == answer["usage"].prompt_tokens == answer["prompt_tokens"]
        assert row.decode_tokens == 0
        check_books(told)
    finally:
        ray.kill(handle)
