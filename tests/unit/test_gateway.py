"""The request path: order of stages, refusals, and what holds when things break off."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from governance.admission.limits import RateLimiter
from governance.errors import (
    AuditUnavailable,
    BlockedByPolicy,
    BudgetExhausted,
    EngineFailed,
    GatehouseError,
    InternalError,
    InvalidRequest,
    LimitExceeded,
    ModelNotFound,
    TooManyParallel,
    Unauthenticated,
)
from governance.gateway import Accepted, Answer, Call, Gateway, GatewayEvent
from governance.nulls import FixedRouter, NullHold, NullInspector, NullLedger
from governance.policy.engine import CompiledPolicy
from governance.policy.model import PolicyConfig
from governance.types import (
    Amount,
    BudgetAsk,
    EngineChunk,
    ModelInfo,
    Operation,
    Outcome,
    Reservation,
    Turn,
    Usage,
)
from tests.doubles import VERSION, RecordingAudit, ScriptedEngine, TokenTable, principal

GENERATE = frozenset({Operation.CHAT, Operation.COMPLETIONS})
MODELS = (
    ModelInfo("small", "small", GENERATE, 1024, "small"),
    ModelInfo("large", "large", GENERATE, 1024, "large"),
    ModelInfo("vectors", "embedding", frozenset({Operation.EMBEDDINGS}), 512, "vectors"),
)
POLICY = {
    "version": 1,
    "roles": ["employee", "intern"],
    "departments": ["hr", "marketing"],
    "rules": [
        {
            "id": "employees",
            "when": {"roles": ["employee"]},
            "effect": "allow",
            "limits": {"max_tokens": 100, "parallel_requests": 2},
        },
        {
            "id": "interns-chat-small",
            "when": {
                "roles": ["intern"],
                "models": ["tier:small"],
                "operations": ["chat"],
            },
            "effect": "allow",
        },
    ],
    "tests": [],
}


class Account(NullHold):
    """A hold that remembers; ``left`` chunks can be reserved before it is exhausted."""

    def __init__(self, ask: BudgetAsk, left: int) -> None:
        super().__init__(Reservation(f"res-{ask.request_id}", "hr", Amount(5, 5)))
        self.ask = ask
        self.left = left
        self.prompt_tokens = 0
        self.seen: list[tuple[int, int]] = []
        self.settled: list[tuple[Usage | None, int | None]] = []

    async def started(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens

    def consumed(self, tokens: int, gpu_us: int) -> bool:
        self.seen.append((tokens, gpu_us))
        return True

    async def extend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise BudgetExhausted()

    def settle(self, usage: Usage | None, gpu_us: int | None) -> None:
        self.settled.append((usage, gpu_us))


class Ledger(NullLedger):
    def __init__(self) -> None:
        self.holds: list[Account] = []
        self.left = 1000
        self.refuse: GatehouseError | None = None

    async def reserve(self, ask: BudgetAsk) -> Account:
        if self.refuse:
            raise self.refuse
        self.holds.append(Account(ask, self.left))
        return self.holds[-1]

    @property
    def settled(self) -> list[tuple[Usage | None, int | None]]:
        return [settlement for hold in self.holds for settlement in hold.settled]


class Ended:
    def __init__(self) -> None:
        self.turns: list[Turn] = []

    def ended(self, turn: Turn) -> None:
        self.turns.append(turn)


class Setup:
    def __init__(self, engine: ScriptedEngine, audit: RecordingAudit | None = None) -> None:
        self.engine = engine
        self.audit = audit or RecordingAudit()
        self.ledger = Ledger()
        self.observer = Ended()
        self.gateway = Gateway(
            models=MODELS,
            authenticator=TokenTable(
                {"ok": principal(), "intern": principal("intern", "marketing", ("intern",))}
            ),
            policy=CompiledPolicy(PolicyConfig.model_validate(POLICY), MODELS),
            limiter=RateLimiter(lambda: 0.0),
            inspector=NullInspector(),
            router=FixedRouter(),
            ledger=self.ledger,
            audit=self.audit,
            engine=engine,
            clock=lambda: 1,
            max_answer_tokens=64,
            observer=self.observer,
        )

    def call(
        self,
        token: str | None = "ok",
        operation: Operation = Operation.CHAT,
        raw: bytes | None = None,
        **fields: Any,
    ) -> Call:
        body: dict[str, Any] = {"model": "small", **fields}
        if operation is Operation.CHAT:
            body.setdefault("messages", [{"role": "user", "content": "hi"}])

        async def read() -> bytes:
            return raw if raw is not None else json.dumps(body).encode()

        authorization = None if token is None else f"Bearer {token}"
        return Call(operation, authorization, read, "req_1", "dec_1")

    async def run(self, call: Call) -> list[GatewayEvent]:
        async with aclosing(self.gateway.exchange(call)) as events:
            return [event async for event in events]

    @staticmethod
    async def until(condition: Callable[[], bool]) -> None:
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(0)
        raise AssertionError("did not happen")

    @property
    def turn(self) -> Turn:
        return self.audit.entries[-1][1]


async def test_a_whole_exchange_in_order() -> None:
    setup = Setup(ScriptedEngine(("a", "b", "c")))
    events = await setup.run(setup.call())
    assert [type(e) for e in events] == [Accepted, EngineChunk, EngineChunk, Answer]
    assert setup.audit.kinds == ["decided", "completed"]
    turn = setup.turn
    assert setup.ledger.settled == [(turn.usage, 4000)]
    assert setup.observer.turns == [turn]
    assert turn.charged == Amount()
    assert turn.finish_reason == "stop"
    assert (turn.outcome, turn.status) == (Outcome.COMPLETED, 200)
    assert turn.model_version == VERSION
    assert turn.usage is not None
    assert turn.usage.completion_tokens == 3
    assert turn.decision is not None
    assert turn.decision.rule_ids == ("employees",)
    released = sum(len(e.data) for e in events if isinstance(e, EngineChunk))
    assert turn.sent_bytes == released + len(events[-1].tail)  # type: ignore[union-attr]


async def test_the_end_is_released_only_after_it_is_recorded() -> None:
    setup = Setup(ScriptedEngine(("a", "b")))
    async with aclosing(setup.gateway.exchange(setup.call())) as events:
        async for event in events:
            if isinstance(event, EngineChunk):
                assert b'"finish_reason":"' not in event.data
                assert setup.audit.kinds == ["decided"]
            if isinstance(event, Answer):
                assert b'"finish_reason":"stop"' in event.tail
                assert setup.audit.kinds == ["decided", "completed"]


async def test_the_engine_gets_exactly_what_was_decided() -> None:
    setup = Setup(ScriptedEngine())
    await setup.run(setup.call(max_tokens=7, temperature=0.5, user="a name"))
    (dispatch,) = setup.engine.dispatched
    body = json.loads(dispatch.body)
    assert body["max_completion_tokens"] == 7
    assert body["cache_salt"] == "hr"
    assert body["stream"] is True
    assert "user" not in body
    assert dispatch.max_tokens == 7
    assert dispatch.department == "hr"
    assert dispatch.reservation_id == "res-req_1"


async def test_policy_bounds_what_the_client_left_open() -> None:
    setup = Setup(ScriptedEngine())
    await setup.run(setup.call(n=4))
    (dispatch,) = setup.engine.dispatched
    assert json.loads(dispatch.body)["max_completion_tokens"] == 25
    assert dispatch.max_tokens == 100


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ({"token": None}, Unauthenticated),
        ({"token": "forged"}, Unauthenticated),
        ({"model": "nowhere"}, ModelNotFound),
        ({"token": "intern", "model": "large"}, ModelNotFound),
        ({"token": "intern", "operation": Operation.COMPLETIONS, "prompt": "x"}, BlockedByPolicy),
        ({"max_tokens": 101}, LimitExceeded),
        ({"max_tokens": 51, "n": 2}, LimitExceeded),
        ({"operation": Operation.COMPLETIONS, "prompt": ["x"] * 13, "n": 8}, LimitExceeded),
        ({"raw": b"{"}, GatehouseError),
        ({"operation": Operation.EMBEDDINGS, "input": "x"}, InvalidRequest),
    ],
)
async def test_refusals_are_recorded_and_reach_no_engine(
    call: dict[str, Any], error: type[GatehouseError]
) -> None:
    setup = Setup(ScriptedEngine())
    with pytest.raises(error):
        await setup.run(setup.call(**call))
    assert setup.engine.dispatched == []
    assert setup.audit.kinds == ["completed"]
    assert setup.turn.outcome is Outcome.REFUSED
    assert 400 <= setup.turn.status < 500


async def test_unknown_and_invisible_models_are_told_apart_by_nothing() -> None:
    setup = Setup(ScriptedEngine())
    answers = []
    for model in ("large", "no-such-model"):
        with pytest.raises(ModelNotFound) as caught:
            await setup.run(setup.call("intern", model=model))
        answers.append((caught.value.message, caught.value.param, caught.value.rule_ids))
    assert answers[0] == answers[1]


async def test_nothing_is_served_when_the_decision_cannot_be_recorded() -> None:
    setup = Setup(ScriptedEngine(), RecordingAudit(refuse=AuditUnavailable()))
    with pytest.raises(AuditUnavailable):
        await setup.run(setup.call())
    assert setup.engine.dispatched == []
    assert setup.ledger.settled == [(None, None)]  # what was reserved goes back


async def test_an_engine_that_dies_in_mid_stream_is_a_failure_without_an_end() -> None:
    setup = Setup(ScriptedEngine(("a", "b"), fail_at=1, failure=EngineFailed()))
    seen: list[GatewayEvent] = []

    async def consume() -> None:
        async for event in setup.gateway.exchange(setup.call()):
            seen.append(event)

    with pytest.raises(EngineFailed):
        await consume()
    assert not any(isinstance(event, Answer) for event in seen)
    assert setup.turn.outcome is Outcome.FAILED
    assert setup.ledger.settled


async def test_an_unforeseen_exception_becomes_an_internal_error() -> None:
    setup = Setup(ScriptedEngine())

    async def broken(request: object, permitted: Sequence[ModelInfo]) -> Any:
        raise RuntimeError("secret detail")

    setup.gateway.router.route = broken  # type: ignore[method-assign]
    with pytest.raises(InternalError) as caught:
        await setup.run(setup.call())
    assert "secret" not in str(caught.value)
    assert setup.turn.error_code == "internal_error"


async def test_a_client_that_leaves_aborts_the_engine_and_is_still_recorded() -> None:
    setup = Setup(ScriptedEngine(("a", "b"), hang_at=1))

    async def consume() -> None:
        await setup.run(setup.call())

    task = asyncio.create_task(consume())
    await setup.until(lambda: bool(setup.audit.entries))
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await setup.gateway.drain()
    assert setup.engine.closed == 1
    assert setup.audit.kinds == ["decided", "completed"]
    assert setup.turn.outcome is Outcome.ABORTED
    assert setup.ledger.settled == [(None, None)]
    assert setup.observer.turns == [setup.turn]


async def test_a_second_cancellation_does_not_stop_the_record() -> None:
    setup = Setup(ScriptedEngine(("a",), hang_at=0))
    task = asyncio.create_task(setup.run(setup.call()))
    await setup.until(lambda: bool(setup.audit.entries))
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    await setup.gateway.drain()
    assert setup.audit.kinds == ["decided", "completed"]


async def test_parallel_places_return_when_a_turn_ends() -> None:
    setup = Setup(ScriptedEngine(hang_at=0))
    hanging = [asyncio.create_task(setup.run(setup.call())) for _ in range(2)]
    await setup.until(lambda: len(setup.engine.dispatched) == 2)
    with pytest.raises(TooManyParallel) as caught:
        await setup.run(setup.call())
    assert caught.value.retry_after_s
    for task in hanging:
        task.cancel()
    await asyncio.gather(*hanging, return_exceptions=True)
    setup.engine.hang_at = None
    assert isinstance((await setup.run(setup.call()))[-1], Answer)


async def test_token_prompts_are_decoded_before_the_engine_sees_them() -> None:
    setup = Setup(ScriptedEngine())
    await setup.run(setup.call(operation=Operation.COMPLETIONS, prompt=[5, 6]))
    assert json.loads(setup.engine.dispatched[0].body)["prompt"] == "t5 t6"


async def test_generated_text_cannot_imitate_the_end() -> None:
    hostile = '"finish_reason":"stop"'
    setup = Setup(ScriptedEngine((hostile, "b", "c")))
    events = await setup.run(setup.call())
    assert [type(e) for e in events] == [Accepted, EngineChunk, EngineChunk, Answer]


async def test_models_are_listed_by_right() -> None:
    gateway = Setup(ScriptedEngine()).gateway
    assert [m.id for m in await gateway.visible_models("Bearer ok")] == [
        "small",
        "large",
        "vectors",
    ]
    assert [m.id for m in await gateway.visible_models("Bearer intern")] == ["small"]
    with pytest.raises(Unauthenticated):
        await gateway.visible_models(None)


async def test_the_ledger_is_asked_for_what_the_engine_is_sent() -> None:
    setup = Setup(ScriptedEngine())
    await setup.run(setup.call(max_tokens=9, n=2))
    (hold,) = setup.ledger.holds
    (dispatch,) = setup.engine.dispatched
    assert hold.ask == BudgetAsk(
        "req_1", "hr", "small", "small", Operation.CHAT, len(dispatch.body), 2, 9
    )
    assert hold.prompt_tokens == 3


async def test_an_exhausted_account_is_refused_before_it_is_recorded_as_decided() -> None:
    setup = Setup(ScriptedEngine())
    setup.ledger.refuse = BudgetExhausted()
    with pytest.raises(BudgetExhausted):
        await setup.run(setup.call())
    assert setup.engine.dispatched == []
    assert setup.audit.kinds == ["completed"]
    assert (setup.turn.outcome, setup.turn.status) == (Outcome.REFUSED, 429)
    assert setup.turn.body is not None  # the prompt is evidence


async def test_an_answer_ends_where_the_account_does() -> None:
    setup = Setup(ScriptedEngine(("a", "b", "c", "d")))
    setup.ledger.left = 2
    seen: list[GatewayEvent] = []

    async def consume() -> None:
        async for event in setup.gateway.exchange(setup.call()):
            seen.append(event)

    await consume()
    assert [type(event) for event in seen] == [Accepted, *[EngineChunk] * 3, Answer]
    assert setup.engine.closed == 1
    (hold,) = setup.ledger.holds
    assert hold.seen == [(1, 1000), (1, 2000), (1, 3000)]
    assert setup.ledger.settled == [(None, None)]


async def test_what_is_released_is_what_is_recorded() -> None:
    setup = Setup(ScriptedEngine(("a", "b", "c")))
    events = await setup.run(setup.call())
    released = b"".join(
        event.data if isinstance(event, EngineChunk) else event.tail
        for event in events
        if not isinstance(event, Accepted)
    )
    assert setup.audit.outputs == {"req_1": released}


async def test_every_stage_is_timed_once_in_order() -> None:
    setup = Setup(ScriptedEngine(("a", "b")))
    now = iter(range(0, 10_000, 10))
    setup.gateway.monotonic = lambda: next(now)
    await setup.run(setup.call())
    assert list(setup.turn.stage_us) == [
        "identify",
        "read",
        "inspect_input",
        "decide",
        "route",
        "reserve",
        "record_decided",
        "engine_start",
        "stream",
        "settle",
        "record_completed",
    ]
    assert set(setup.turn.stage_us.values()) == {10}
