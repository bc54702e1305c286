"""An answer that meets a hard limit ends in order; what may go wrong while it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import orjson
import pytest

from deployments.api.assemble import Assembler, events
from governance.audit.turn_record import ended_event
from governance.errors import (
    AuditUnavailable,
    BudgetExhausted,
    EngineFailed,
    GatehouseError,
    LedgerUnavailable,
    Shortage,
)
from governance.gateway import Accepted, Answer, GatewayEvent
from governance.nulls import NullInspector, NullOutputInspection
from governance.stopping import Ending, stop_object
from governance.types import (
    Dispatch,
    EngineChunk,
    EngineEvent,
    EngineFinished,
    EngineStarted,
    InferenceRequest,
    Inspection,
    Operation,
    Outcome,
    Stop,
    Turn,
    Usage,
)
from tests.doubles import VERSION, RecordingAudit, ScriptedEngine, sse
from tests.unit.test_gateway import Account, Setup

RESET_US = 1_800_000_000_000_000
LEFT = Shortage("hr", RESET_US, None, 0, "month", "tokens", 100, 100, "hr-lead@example.org")
STOPPED = {
    "code": "budget_exhausted",
    "account": "hr",
    "window": "month",
    "reset": "2027-01-15T08:00:00Z",
    "reset_at": 1_800_000_000,
    "owner": "hr-lead@example.org",
}


class Limited(Account):
    """Lets ``left`` chunks through; says what ran out."""

    error: GatehouseError = BudgetExhausted("", None, 5, (), LEFT)

    async def extend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error


class Playing(ScriptedEngine):
    """Gives exactly these pieces: text of an event and the tokens it stands for."""

    def __init__(self, pieces: Sequence[tuple[bytes, int]], *, ends: bool = True) -> None:
        super().__init__()
        self.pieces = pieces
        self.ends = ends
        self.given = 0

    async def stream(self, dispatch: Dispatch) -> AsyncGenerator[EngineEvent, None]:
        self.dispatched.append(dispatch)
        try:
            yield EngineStarted("replica-1", VERSION, "test", 3)
            done = 0
            for data, tokens in self.pieces:
                done += tokens
                self.given += 1
                yield EngineChunk(data, tokens, done * 1000)
            yield EngineFinished(Usage(3, done), b"", done * 1000)
        finally:
            self.closed += 1


class Limits(Setup):
    """A set-up whose account lets ``left`` chunks through."""

    def __init__(
        self,
        engine: ScriptedEngine,
        left: int,
        audit: RecordingAudit | None = None,
        error: GatehouseError | None = None,
    ) -> None:
        super().__init__(engine, audit)

        async def reserve(ask: Any) -> Account:
            hold = Limited(ask, left)
            if error is not None:
                hold.error = error
            self.ledger.holds.append(hold)
            return hold

        self.ledger.reserve = reserve  # type: ignore[method-assign]


def piece(index: int, text: str = "", finish: str | None = None, **delta: Any) -> bytes:
    """One event of a chat answer."""
    content = {"content": text, **delta}
    choice = {"index": index, "delta": content, "finish_reason": finish}
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 7, "model": "small"}
    return sse({**head, "choices": [choice]})


def released(seen: Sequence[GatewayEvent]) -> bytes:
    return b"".join(
        event.data if isinstance(event, EngineChunk) else event.tail
        for event in seen
        if not isinstance(event, Accepted)
    )


def text_of(data: bytes, index: int = 0) -> str:
    return "".join(
        choice["delta"].get("content") or ""
        for event in events(data)
        for choice in event["choices"]
        if choice["index"] == index
    )


def ends_of(data: bytes) -> list[tuple[int, str]]:
    return [
        (choice["index"], choice["finish_reason"])
        for event in events(data)
        for choice in event["choices"]
        if choice["finish_reason"]
    ]


async def test_the_last_chunk_says_length_and_why() -> None:
    setup = Limits(ScriptedEngine(("a", "b", "c", "d")), 2)
    seen = await setup.run(setup.call())
    answer = seen[-1]
    assert isinstance(answer, Answer)
    data = released(seen)
    assert text_of(data) == "abc", "what was generated is paid for, so it is released"
    *_, last = events(data)
    assert last == {
        "id": "chatcmpl-req_1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "small",
        "system_fingerprint": VERSION,
        "choices": [
            {
                "index": 0,
                "delta": {},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "gatehouse": {"request_id": "req_1", "stopped": STOPPED},
    }
    assert answer.finished.usage == Usage(3, 3)
    (usage,) = events(answer.finished.usage_event)
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 6
    assert usage["id"] == "chatcmpl-req_1"


async def test_the_engine_is_aborted_and_the_turn_settled_and_recorded() -> None:
    setup = Limits(ScriptedEngine(("a", "b", "c", "d")), 2)
    seen = await setup.run(setup.call())
    turn = setup.turn
    assert setup.engine.closed == 1
    assert setup.ledger.settled == [(None, None)], "the engine has not said all"
    assert (turn.outcome, turn.status) == (Outcome.COMPLETED, 200)
    assert (turn.finish_reason, turn.error_code) == ("length", "budget_exhausted")
    assert setup.audit.outputs == {"req_1": released(seen)}
    event = ended_event(turn, "e1")
    assert (event["input_tokens"], event["output_tokens"]) == (3, 3)
    assert (event["gpu_us"], event["gpu_us_method"]) == (None, "pending")
    assert orjson.loads(event["detail"]) == {
        "stopped": {
            "code": "budget_exhausted",
            "account": "hr",
            "window": "month",
            "reset_us": RESET_US,
        }
    }


async def test_the_end_is_released_after_it_is_recorded() -> None:
    setup = Limits(ScriptedEngine(("a", "b", "c", "d")), 1)
    async with aclosing(setup.gateway.exchange(setup.call())) as stream:
        async for event in stream:
            ended = b'"finish_reason":"' in (
                event.tail
                if isinstance(event, Answer)
                else event.data
                if isinstance(event, EngineChunk)
                else b""
            )
            assert ended == (setup.audit.kinds == ["decided", "completed"])


async def test_nothing_generated_is_a_refusal() -> None:
    """The first event of a chat answer says only who speaks."""
    engine = Playing([(piece(0, role="assistant"), 0), (piece(0, "a", "stop"), 1)])
    setup = Limits(engine, 0)
    with pytest.raises(BudgetExhausted):
        await setup.run(setup.call())
    assert (setup.turn.outcome, setup.turn.status) == (Outcome.REFUSED, 429)
    assert setup.turn.stopped is None
    assert engine.closed == 1


async def test_the_limit_at_the_first_token() -> None:
    setup = Limits(ScriptedEngine(("a", "b")), 0)
    seen = await setup.run(setup.call())
    assert [type(event) for event in seen] == [Accepted, EngineChunk, Answer]
    assert text_of(released(seen)) == "a"
    assert ends_of(released(seen)) == [(0, "length")]


async def test_the_limit_at_the_very_last_token_ends_nothing() -> None:
    setup = Limits(ScriptedEngine(("a", "b", "c")), 2)
    seen = await setup.run(setup.call())
    assert ends_of(released(seen)) == [(0, "stop")]
    assert b"stopped" not in released(seen)
    assert setup.turn.error_code is None
    assert setup.turn.usage is not None
    assert setup.ledger.settled == [(setup.turn.usage, 4000)], "the engine has said all"


async def test_every_choice_that_has_not_ended_ends_with_length() -> None:
    engine = Playing(
        [
            (piece(0, "a") + piece(2, "c"), 2),
            (piece(2, "c", "stop"), 1),
            (piece(0, "a"), 1),
            (piece(0, "a", "stop"), 1),
        ]
    )
    setup = Limits(engine, 2)
    seen = await setup.run(setup.call(n=4))
    data = released(seen)
    assert ends_of(data) == [(2, "stop"), (0, "length"), (1, "length"), (3, "length")]
    extended = [event["gatehouse"]["stopped"] for event in events(data) if "gatehouse" in event]
    assert extended == [STOPPED] * 3
    assert engine.given == 3
    assert setup.turn.finish_reason == "length"


async def test_a_tool_call_half_way_ends_as_it_is() -> None:
    call = {"index": 0, "id": "c1", "function": {"name": "look", "arguments": '{"who":'}}
    engine = Playing([(piece(0, tool_calls=[call]), 4), (piece(0, "", "tool_calls"), 4)])
    setup = Limits(engine, 0)
    seen = await setup.run(setup.call())
    assembler = Assembler(Operation.CHAT)
    assembler.feed(released(seen))
    answer = seen[-1]
    assert isinstance(answer, Answer)
    body = orjson.loads(assembler.finish(answer.finished.usage, {}))
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"who":'


async def test_completions_end_in_their_own_form() -> None:
    setup = Limits(ScriptedEngine(("a", "b", "c")), 1)
    seen = await setup.run(setup.call(operation=Operation.COMPLETIONS, prompt="x"))
    *_, last = events(released(seen))
    assert last["object"] == "text_completion"
    assert last["choices"] == [
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]


async def test_an_embedding_is_no_answer_that_could_be_cut() -> None:
    setup = Limits(ScriptedEngine(), 0)
    call = setup.call(operation=Operation.EMBEDDINGS, model="vectors", input="x")
    with pytest.raises(BudgetExhausted):
        await setup.run(call)
    assert setup.turn.status == 429


async def test_a_ledger_that_does_not_answer_is_no_limit() -> None:
    setup = Limits(ScriptedEngine(("a", "b", "c")), 1, error=LedgerUnavailable())
    with pytest.raises(LedgerUnavailable):
        await setup.run(setup.call())
    assert setup.turn.outcome is Outcome.FAILED


async def test_an_error_without_figures_still_names_the_account() -> None:
    setup = Limits(ScriptedEngine(("a", "b", "c")), 1, error=BudgetExhausted())
    await setup.run(setup.call())
    assert setup.turn.stopped == Stop("budget_exhausted", "hr")


class Buffering(NullInspector):
    """Releases nothing before it has seen all, and of that only what is harmless."""

    def open_output(self, turn: Turn) -> Any:
        return Buffer()


class Buffer(NullOutputInspection):
    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def feed(self, chunk: EngineChunk) -> EngineChunk | None:
        self.seen.append(chunk.data)
        return None

    def finish(self) -> tuple[EngineChunk | None, Inspection]:
        kept = b"".join(data for data in self.seen if b"secret" not in data)
        return EngineChunk(kept), Inspection("buffering")


async def test_what_inspection_holds_back_does_not_leak() -> None:
    setup = Limits(ScriptedEngine(("a", "secret", "c", "d")), 2)
    setup.gateway.inspector = Buffering()
    seen = await setup.run(setup.call())
    assert [type(event) for event in seen] == [Accepted, Answer]
    assert text_of(released(seen)) == "ac"
    assert ends_of(released(seen)) == [(0, "length")]


async def test_a_client_that_leaves_during_the_stop_is_recorded_once() -> None:
    class Slow(RecordingAudit):
        def __init__(self) -> None:
            super().__init__()
            self.started, self.release = asyncio.Event(), asyncio.Event()

        async def completed(self, turn: Turn) -> None:
            self.started.set()
            await self.release.wait()
            await super().completed(turn)

    audit = Slow()
    setup = Limits(ScriptedEngine(("a", "b", "c")), 1, audit)
    task = asyncio.create_task(setup.run(setup.call()))
    await audit.started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    audit.release.set()
    await setup.gateway.drain()
    assert setup.audit.kinds == ["decided", "completed"]
    assert setup.ledger.settled == [(None, None)]
    assert setup.engine.closed == 1
    assert setup.turn.finish_reason == "length"
    assert setup.observer.turns == [setup.turn]


async def test_a_client_that_leaves_before_the_end_is_made_is_an_abort() -> None:
    setup = Limits(ScriptedEngine(("a", "b", "c")), 1)
    async with aclosing(setup.gateway.exchange(setup.call())) as stream:
        async for event in stream:
            if isinstance(event, EngineChunk) and b'"b"' in event.data:
                break  # the chunk at which the limit was met
    await setup.gateway.drain()
    assert setup.turn.outcome is Outcome.ABORTED
    assert setup.turn.status == 499
    assert setup.ledger.settled == [(None, None)]


async def test_an_end_that_cannot_be_recorded_is_not_released() -> None:
    class Full(RecordingAudit):
        async def completed(self, turn: Turn) -> None:
            raise AuditUnavailable()

    setup = Limits(ScriptedEngine(("a", "b", "c")), 1, Full())
    seen: list[GatewayEvent] = []

    async def consume() -> None:
        async for event in setup.gateway.exchange(setup.call()):
            seen.append(event)

    with pytest.raises(AuditUnavailable):
        await consume()
    assert b'finish_reason":"length' not in released(seen)
    assert setup.ledger.settled == [(None, None)]


async def test_output_that_cannot_be_recorded_is_not_released() -> None:
    class Broken(RecordingAudit):
        def output(self, turn: Turn, data: bytes) -> None:
            if b'"length"' in data:
                raise AuditUnavailable()
            super().output(turn, data)

    setup = Limits(ScriptedEngine(("a", "b", "c")), 1, Broken())
    with pytest.raises(AuditUnavailable):
        await setup.run(setup.call())
    assert (setup.turn.outcome, setup.turn.status) == (Outcome.FAILED, 503)
    assert setup.turn.error_code == "audit_unavailable"
    assert setup.ledger.settled == [(None, None)]


async def test_an_odd_piece_before_the_stop_is_our_failure_and_quotes_nothing() -> None:
    setup = Limits(Playing([(b"data: {oops secret\n\n", 1)]), 0)
    with pytest.raises(EngineFailed) as caught:
        await setup.run(setup.call())
    assert "secret" not in str(caught.value)


def request(choices: int = 1) -> InferenceRequest:
    return InferenceRequest(Operation.CHAT, "small", {}, True, False, None, choices)


def test_text_cannot_end_a_choice() -> None:
    ending = Ending(request())
    ending.saw(EngineChunk(piece(0, '"finish_reason":"stop"'), 1))
    assert not ending.complete
    ending.saw(EngineChunk(piece(0, "", "stop"), 1))
    assert ending.complete


def test_comments_between_events_are_no_obstacle() -> None:
    ending = Ending(request())
    ending.saw(EngineChunk(b": ping\n\n" + piece(0, "a"), 1))
    (event,) = events(ending.events(Stop("budget_exhausted"), "r").data)
    assert event["id"] == "chatcmpl-1"


def test_what_is_not_known_of_a_stop_is_null() -> None:
    assert stop_object(Stop("budget_exhausted")) == {
        "code": "budget_exhausted",
        "account": None,
        "window": None,
        "reset": None,
        "reset_at": None,
        "owner": None,
    }
