"""What official SDKs see at a limit: an answer that ends in order, a refusal, a full queue."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from governance.errors import BudgetExhausted, Shortage
from governance.nulls import NullHold, NullLedger
from governance.types import Amount, BudgetAsk, Outcome, Reservation, Usage
from routing.types import ModelLoad
from tests.contract.conftest import Server
from tests.contract.node import NODE, install

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
WORDS = ("one", " two", " three", " four")
RESET_US = 4_000_000_000_000_000
SHORT = Shortage(
    "data-science", RESET_US, None, 40, "month", "tokens", 1000, 960, "ds-lead@example.org"
)
REFUSAL = BudgetExhausted("Not that much.", None, 360, (), SHORT)
STOPPED = {
    "code": "budget_exhausted",
    "account": "data-science",
    "window": "month",
    "reset": "2096-10-02T07:06:40Z",
    "reset_at": 4_000_000_000,
    "owner": "ds-lead@example.org",
}


class Hold(NullHold):
    """Lets ``left`` chunks of an answer through."""

    def __init__(self, left: int) -> None:
        super().__init__(Reservation("rsv_gw_1", "data-science"))
        self.left = left
        self.settled: list[tuple[Usage | None, int | None]] = []

    def consumed(self, tokens: int, gpu_us: int) -> bool:
        self.charged += Amount(2 * 1000, tokens)
        return True

    async def extend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise REFUSAL

    def settle(self, usage: Usage | None, gpu_us: int | None) -> None:
        self.settled.append((usage, gpu_us))


class Ledger(NullLedger):
    """An account that ends in mid-answer, or before it."""

    def __init__(self) -> None:
        self.left = 1
        self.refused: set[str] = set()
        self.holds: list[Hold] = []

    async def reserve(self, ask: BudgetAsk) -> NullHold:
        if ask.model in self.refused:
            raise REFUSAL
        self.holds.append(Hold(self.left))
        return self.holds[-1]

    def fits(self, ask: BudgetAsk) -> int | None:
        return 8 if ask.model == "large" else 30


@pytest.fixture
def ledger(server: Server) -> Ledger:
    found = Ledger()
    server.gateway.ledger = found
    server.engine.words = WORDS
    return found


@pytest.fixture
def client(server: Server, ledger: Ledger) -> Iterator[OpenAI]:
    with ExitStack() as opened:
        yield opened.enter_context(
            OpenAI(base_url=server.v1, api_key="data-scientist", max_retries=0)
        )


def test_a_stream_ends_with_length_the_reason_and_its_usage(
    client: OpenAI, server: Server, ledger: Ledger
) -> None:
    chunks = list(
        client.chat.completions.create(
            model="small", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    *texts, last, usage = chunks
    assert "".join(c.choices[0].delta.content or "" for c in texts) == "one two"
    assert last.choices[0].finish_reason == "length"
    assert last.id == texts[0].id
    assert last.model_extra is not None
    assert last.model_extra["gatehouse"]["stopped"] == STOPPED
    assert usage.choices == []
    assert usage.usage is not None
    assert (usage.usage.prompt_tokens, usage.usage.completion_tokens) == (3, 2)
    assert usage.model_extra is not None
    cost = usage.model_extra["gatehouse"]
    assert (cost["gpu_us"], cost["charged_us"], cost["stopped"]) == (None, 4000, STOPPED)
    assert cost["request_id"] == last.model_extra["gatehouse"]["request_id"]
    assert server.engine.closed == 1
    assert ledger.holds[0].settled == [(None, None)]
    turn = server.audit.entries[-1][1]
    assert (turn.outcome, turn.finish_reason) == (Outcome.COMPLETED, "length")


def test_a_stream_without_usage_just_ends(client: OpenAI) -> None:
    *_, last = client.chat.completions.create(model="small", messages=HELLO, stream=True)
    assert last.choices[0].finish_reason == "length"
    assert last.usage is None


def test_the_events_end_as_openais_do(server: Server, ledger: Ledger) -> None:
    with openai.OpenAI(base_url=server.v1, api_key="data-scientist", max_retries=0) as client:
        raw = client.chat.completions.with_raw_response.create(
            model="small", messages=HELLO, stream=True
        )
        lines = [line for line in raw.http_response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_an_answer_in_one_piece_is_what_there_was(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="small", messages=HELLO)
    assert raw.http_response.status_code == 200
    answer = raw.parse()
    assert answer.choices[0].message.content == "one two"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 5
    assert answer.model_extra is not None
    assert answer.model_extra["gatehouse"]["stopped"] == STOPPED
    assert raw.headers["x-gatehouse-charged-gpu-ms"] == "4.000"


def test_completions_too(client: OpenAI) -> None:
    answer = client.completions.create(model="small", prompt="count")
    assert answer.choices[0].text == "one two"
    assert answer.choices[0].finish_reason == "length"


def test_the_limit_at_the_last_token_is_no_limit(client: OpenAI, ledger: Ledger) -> None:
    ledger.left = len(WORDS) - 1
    answer = client.chat.completions.create(model="small", messages=HELLO)
    assert answer.choices[0].finish_reason == "stop"
    assert "stopped" not in (answer.model_extra or {})["gatehouse"]


def test_the_node_sdk_reads_it_too(server: Server, ledger: Ledger) -> None:
    directory = install(Path(__file__).with_name("openai_node"))
    done = subprocess.run(
        [NODE, "limits.mjs", server.v1, "data-scientist"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["whole"] == {"text": "one two", "reason": "length", "stopped": STOPPED}
    assert seen["streamed"] == {"text": "one two", "reason": "length", "stopped": STOPPED}


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_says_what_ran_out_whose_it_is_and_what_would_fit(
    client: OpenAI, ledger: Ledger, stream: bool
) -> None:
    ledger.refused.add("large")
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(model="large", messages=HELLO, stream=stream)
    error = refused.value
    assert error.code == "budget_exhausted"
    assert error.response.headers["retry-after"] == "360"
    assert isinstance(error.body, dict)
    shown = {name: error.body[name] for name in ("account", "window", "ran_out", "owner")}
    assert shown == {
        "account": "data-science",
        "window": "month",
        "ran_out": "tokens",
        "owner": "ds-lead@example.org",
    }
    assert (error.body["limit"], error.body["spent"]) == (1000, 960)
    assert error.body["reset_at"] == 4_000_000_000
    assert error.body["allowed"] == {
        "answer_tokens": 8,
        "instead": {"model": "small", "answer_tokens": 30},
    }
    assert "model small" in error.message


def test_a_full_queue_says_when_to_come_back(client: OpenAI, server: Server) -> None:
    def load(base_model: str) -> ModelLoad:
        return ModelLoad(replicas=1, slots=256, waiting=200)

    server.engine.load = load  # type: ignore[method-assign]
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(model="small", messages=HELLO)
    assert refused.value.code == "overloaded"
    assert int(refused.value.response.headers["retry-after"]) >= 1
    turn = server.audit.entries[-1][1]
    assert turn.shed is not None
    assert (turn.shed.reason, turn.shed.waiting) == ("queue", 200)
    assert server.engine.dispatched == []
