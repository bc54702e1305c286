"""The choice of the model: ``auto``, fallback before the first byte, cascade."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from governance.admission.limits import RateLimiter
from governance.audit.turn_record import decided_event, ended_event
from governance.errors import (
    AuditUnavailable,
    BlockedByPolicy,
    BudgetExhausted,
    ContextLengthExceeded,
    DepartmentShareTaken,
    EngineFailed,
    EngineTimeout,
    EngineUnavailable,
    GatehouseError,
    InternalError,
    InvalidRequest,
    LimitExceeded,
    ModelNotFound,
    Overloaded,
)
from governance.gateway import Accepted, Answer, Call, Gateway, GatewayEvent
from governance.nulls import NullHold, NullInspector, NullLedger
from governance.policy.engine import CompiledPolicy
from governance.policy.model import PolicyConfig
from governance.types import (
    Amount,
    BudgetAsk,
    Dispatch,
    EngineChunk,
    EngineEvent,
    EngineFinished,
    EngineStarted,
    Inspection,
    ModelInfo,
    Operation,
    Outcome,
    Reservation,
    Route,
    RouteAsk,
    Turn,
    Usage,
)
from routing.types import ModelLoad, Verdict
from tests.doubles import VERSION, TokenTable, principal, sse

GENERATE = frozenset({Operation.CHAT, Operation.COMPLETIONS})
SMALL = ModelInfo("small", "small", GENERATE, 512, "small")
LARGE = ModelInfo("large", "large", GENERATE, 1024, "large")
VECTORS = ModelInfo("vectors", "embedding", frozenset({Operation.EMBEDDINGS}), 512, "vectors")
TWIN = ModelInfo("twin", "small", GENERATE, 512, "twin")
ADAPTER = ModelInfo("adapter", "small", GENERATE, 512, "small")
MODELS = (SMALL, LARGE, VECTORS)


def rule(name: str, roles: Sequence[str], **more: Any) -> dict[str, Any]:
    when = {"roles": list(roles), **more.pop("when", {})}
    return {"id": name, "when": when, "effect": "allow", **more}


POLICY = {
    "version": 1,
    "roles": ["employee", "intern", "nobody", "curator", "clerk", "flexible", "strict"],
    "departments": ["hr", "marketing"],
    "rules": [
        rule("all", ["employee"], limits={"max_tokens": 100}),
        rule("large-little", ["employee"], when={"models": ["large"]}, limits={"max_tokens": 50}),
        rule("interns", ["intern"], when={"models": ["tier:small"]}),
        rule("vectors", ["curator"], when={"models": ["vectors"]}),
        rule("flexible", ["flexible"], on_exhaustion="small"),
        rule("strict", ["strict"], when={"models": ["large"]}, on_exhaustion="refuse"),
        rule("narrow", ["clerk"], when={"models": ["tier:small"]}),
        rule("narrow-large", ["clerk"], when={"models": ["large"]}, limits={"context_tokens": 100}),
        rule(
            "adapter", ["employee"], when={"models": ["adapter"]}, limits={"requests_per_minute": 1}
        ),
    ],
    "tests": [],
}


class Choosing:
    """Chooses as it is told, of what it is offered."""

    choices = frozenset({"small", "large", "twin"})

    def __init__(
        self, draft: Judge | None = None, order: Sequence[str] = ("small", "large")
    ) -> None:
        self.draft = draft
        self.order = order
        self.may_rise = True
        self.asks: list[RouteAsk] = []

    async def route(self, ask: RouteAsk) -> Route:
        self.asks.append(ask)
        if not ask.auto:
            return Route(ask.permitted[0], "named", fallbacks=ask.stand_ins)
        models = {model.id: model for model in ask.permitted}
        first, *rest = [models[name] for name in self.order if name in models]
        draft = self.draft if first is SMALL else None
        return Route(
            first,
            f"auto:{first.id}",
            True,
            tuple(rest),
            self.may_rise,
            draft,
            {"gain_milli": 12},
        )


class Judge:
    """Keeps or gives up an answer by its mean log-probability."""

    def __init__(self, hold_tokens: int = 64, escalate_below: float = -1.0) -> None:
        self.hold_tokens = hold_tokens
        self.escalate_below = escalate_below
        self.text = ""
        self.logprobs: list[float] = []
        self.finish: list[str | None] = []

    def feed(self, text: str, logprobs: Sequence[float]) -> None:
        self.text += text
        self.logprobs += logprobs

    def verdict(self, finish_reason: str | None) -> Verdict:
        self.finish.append(finish_reason)
        unsure = sum(self.logprobs) < self.escalate_below * len(self.logprobs)
        return Verdict(unsure, "unsure" if unsure else "sure", {"confidence_milli": 7})


class Tiers:
    """An engine with a script a model: words, or an error before or after it has started."""

    def __init__(self, **scripts: Sequence[str] | GatehouseError) -> None:
        self.scripts: dict[str, Any] = {"small": ("s1", "s2", "s3"), "large": ("l1", "l2")}
        self.scripts["twin"] = ("t1",)
        self.odd: bytes = b""
        """Sent by the small model before its first piece."""
        self.scripts |= scripts
        self.late: dict[str, GatehouseError] = {}
        """Raised after the engine has taken the request, before its first piece."""
        self.mid: dict[str, GatehouseError] = {}
        """Raised after the first piece."""
        self.logprob = -0.1
        self.dispatched: list[Dispatch] = []
        self.closed: list[str] = []
        self.pieces: dict[str, int] = {}

    def ready(self, base_model: str) -> bool:
        return True

    def load(self, base_model: str) -> ModelLoad:
        return ModelLoad(replicas=1, slots=8)

    async def detokenize(self, base_model: str, prompts: list[list[int]]) -> list[str]:
        return ["text"] * len(prompts)

    async def stream(self, dispatch: Dispatch) -> AsyncGenerator[EngineEvent, None]:
        self.dispatched.append(dispatch)
        name = dispatch.model
        script = self.scripts[name]
        if isinstance(script, GatehouseError):
            raise script
        try:
            yield EngineStarted(f"{name}-1", VERSION, "test", 3)
            if name in self.late:
                raise self.late[name]
            if self.odd and name == "small":
                yield EngineChunk(self.odd)
            asked = json.loads(dispatch.body).get("logprobs")
            for number, word in enumerate(script):
                if number and name in self.mid:
                    raise self.mid[name]
                self.pieces[name] = number + 1
                last = number == len(script) - 1
                logprobs = {"content": [{"token": word, "logprob": self.logprob, "bytes": [1]}]}
                choice = {
                    "index": 0,
                    "delta": {"content": word},
                    "logprobs": logprobs if asked else None,
                    "finish_reason": "stop" if last else None,
                }
                data = sse({"id": "x", "model": name, "choices": [choice]})
                yield EngineChunk(data, 1, 1000 * (number + 1))
                await asyncio.sleep(0)
            yield EngineFinished(Usage(3, len(script)), b"", 1000 * len(script) + 7)
        finally:
            self.closed.append(name)


class Held(NullHold):
    def __init__(self, ask: BudgetAsk) -> None:
        super().__init__(Reservation(f"res-{ask.model}", "hr", Amount(5, 5)))
        self.ask = ask
        self.settled: list[tuple[Usage | None, int | None]] = []

    def settle(self, usage: Usage | None, gpu_us: int | None) -> None:
        self.settled.append((usage, gpu_us))
        self.charged = Amount((gpu_us or 0) * 2, 0)


class Account(NullLedger):
    def __init__(self, *refused: str) -> None:
        self.refused = refused
        self.holds: list[Held] = []

    async def reserve(self, ask: BudgetAsk) -> Held:
        if ask.model in self.refused:
            raise BudgetExhausted()
        self.holds.append(Held(ask))
        return self.holds[-1]


class Records:
    """Keeps the events that the trail would get, and the content of each attempt."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.content: dict[str, bytes] = {}
        self.break_at = 0
        """Number of the end, from 1, that cannot be recorded."""
        self.wait: asyncio.Event | None = None

    async def decided(self, turn: Turn) -> None:
        assert turn.decided_event_id is None
        turn.decided_event_id = f"e{len(self.events)}"
        self.events.append(decided_event(turn, turn.decided_event_id))

    def output(self, turn: Turn, data: bytes) -> None:
        name = turn.decided_event_id or ""
        self.content[name] = self.content.get(name, b"") + data

    async def completed(self, turn: Turn) -> None:
        if self.wait is not None:
            await self.wait.wait()
        ends = sum(event["event_type"] != "inference.decided" for event in self.events) + 1
        if ends == self.break_at:
            raise AuditUnavailable()
        self.events.append(ended_event(turn, f"e{len(self.events)}"))

    @property
    def kinds(self) -> list[str]:
        return [event["event_type"].partition(".")[2] for event in self.events]

    @property
    def details(self) -> list[dict[str, Any]]:
        return [json.loads(event["detail"])["route"] for event in self.events]


class Ended:
    def __init__(self) -> None:
        self.turns: list[tuple[Outcome | None, int]] = []

    def ended(self, turn: Turn) -> None:
        self.turns.append((turn.outcome, turn.attempt))


class Setup:
    def __init__(
        self,
        engine: Tiers | None = None,
        router: Choosing | None = None,
        ledger: Account | None = None,
        models: tuple[ModelInfo, ...] = MODELS,
    ) -> None:
        self.engine = engine or Tiers()
        self.router = router or Choosing()
        self.ledger = ledger or Account()
        self.audit = Records()
        self.observer = Ended()
        self.turn: Turn | None = None
        people = {
            "ok": principal(),
            "intern": principal("intern", "marketing", ("intern",)),
            "nobody": principal("nobody", "hr", ("nobody",)),
            "curator": principal("curator", "hr", ("curator",)),
            "clerk": principal("clerk", "hr", ("clerk",)),
            "flexible": principal("flexible", "hr", ("flexible",)),
            "strict": principal("strict", "hr", ("flexible", "strict")),
        }
        self.gateway = Gateway(
            models=models,
            authenticator=TokenTable(people),
            policy=CompiledPolicy(PolicyConfig.model_validate(POLICY), models),
            limiter=RateLimiter(lambda: 0.0),
            inspector=NullInspector(),
            router=self.router,
            ledger=self.ledger,
            audit=self.audit,
            engine=self.engine,
            clock=lambda: 1,
            max_answer_tokens=64,
            observer=self.observer,
        )

    def call(self, token: str = "ok", operation: Operation = Operation.CHAT, **fields: Any) -> Call:
        body: dict[str, Any] = {"model": "auto", **fields}
        if operation is Operation.CHAT:
            body.setdefault("messages", [{"role": "user", "content": "hi"}])

        async def read() -> bytes:
            return json.dumps(body).encode()

        def opened(turn: Turn) -> None:
            self.turn = turn

        return Call(operation, f"Bearer {token}", read, "req_1", "dec_1", opened=opened)

    async def run(self, call: Call | None = None) -> list[GatewayEvent]:
        async with aclosing(self.gateway.exchange(call or self.call())) as events:
            return [event async for event in events]

    async def text(self, call: Call | None = None) -> str:
        """What a client gets to read."""
        data = b""
        for event in await self.run(call):
            if isinstance(event, EngineChunk):
                data += event.data
            elif isinstance(event, Answer):
                data += event.tail
        return "".join(choice["delta"].get("content", "") for choice in choices(data))


def choices(data: bytes) -> list[Mapping[str, Any]]:
    events = [json.loads(part.removeprefix(b"data: ")) for part in data.split(b"\n\n") if part]
    return [choice for event in events for choice in event["choices"]]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("did not happen")


# -- what the router is offered ---------------------------------------------------------------


async def test_auto_offers_the_models_that_policy_permits() -> None:
    setup = Setup()
    assert await setup.text() == "s1s2s3"
    (ask,) = setup.router.asks
    assert (ask.permitted, ask.auto, ask.department) == ((SMALL, LARGE), True, "hr")
    assert json.loads(setup.engine.dispatched[0].body)["model"] == "small"


async def test_an_intern_is_never_routed_to_what_it_may_not_use() -> None:
    setup = Setup(router=Choosing(order=("large", "small")))
    assert await setup.text(setup.call("intern")) == "s1s2s3"
    assert setup.router.asks[0].permitted == (SMALL,)


@pytest.mark.parametrize("token", ["nobody", "curator"])
async def test_auto_does_not_exist_for_who_may_use_neither_tier(token: str) -> None:
    setup = Setup()
    with pytest.raises(ModelNotFound):
        await setup.run(setup.call(token))


async def test_embeddings_cannot_be_routed() -> None:
    setup = Setup()
    with pytest.raises(InvalidRequest):
        await setup.run(setup.call(operation=Operation.EMBEDDINGS, input="text"))


async def test_token_ids_belong_to_one_model() -> None:
    setup = Setup()
    with pytest.raises(InvalidRequest, match="name it"):
        await setup.run(setup.call(operation=Operation.COMPLETIONS, prompt=[1, 2]))


async def test_a_model_that_may_not_answer_at_length_is_left_out() -> None:
    setup = Setup(router=Choosing(order=("large", "small")))
    assert await setup.text(setup.call(max_tokens=60)) == "s1s2s3"
    with pytest.raises(LimitExceeded, match="100"):
        await setup.run(setup.call(max_tokens=101))


async def test_without_a_router_there_is_no_auto() -> None:
    router = Choosing()
    router.choices = frozenset()
    setup = Setup(router=router)
    with pytest.raises(ModelNotFound):
        await setup.run()
    listed = await setup.gateway.visible_models("Bearer ok")
    assert [model.id for model in listed] == ["small", "large", "vectors"]


async def test_auto_is_listed_for_who_may_use_it() -> None:
    setup = Setup()
    listed = await setup.gateway.visible_models("Bearer ok")
    assert [model.id for model in listed] == ["auto", "small", "large", "vectors"]
    assert listed[0].context_tokens == 1024
    assert [m.id for m in await setup.gateway.visible_models("Bearer intern")] == ["auto", "small"]
    assert [m.id for m in await setup.gateway.visible_models("Bearer curator")] == ["vectors"]


async def test_the_record_says_what_the_choice_rests_on() -> None:
    setup = Setup()
    await setup.run()
    assert setup.audit.kinds == ["decided", "completed"]
    for event, detail in zip(setup.audit.events, setup.audit.details, strict=True):
        assert event["request_model"] == "auto"
        assert event["response_model"] == "small"
        assert event["route_reason"] == "auto:small"
        assert detail == {"auto": True, "attempt": 1, "gain_milli": 12}


async def test_a_named_model_has_no_route_on_record() -> None:
    setup = Setup()
    assert await setup.text(setup.call(model="large")) == "l1l2"
    assert [event.get("detail") for event in setup.audit.events] == [None, None]


# -- fallback ---------------------------------------------------------------------------------

FAILURES = [EngineUnavailable(), Overloaded(), EngineTimeout(), EngineFailed()]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda error: error.code)
@pytest.mark.parametrize("when", ["before", "taken"])
async def test_another_tier_answers_where_one_cannot(failure: GatehouseError, when: str) -> None:
    engine = Tiers()
    if when == "before":
        engine.scripts["small"] = failure
    else:
        engine.late["small"] = failure
    setup = Setup(engine)
    assert await setup.text() == "l1l2"
    assert setup.turn is not None
    assert setup.turn.route is not None
    assert setup.turn.route.reason == f"fallback:{failure.code}"
    assert [(a.model, a.why) for a in setup.turn.earlier] == [("small", failure.code)]
    assert (setup.turn.outcome, setup.turn.status) == (Outcome.COMPLETED, 200)
    assert setup.observer.turns == [(Outcome.COMPLETED, 2)]


async def test_each_attempt_is_decided_reserved_settled_and_recorded() -> None:
    setup = Setup(Tiers(small=EngineUnavailable()))
    await setup.run()
    first, failed, second, done = setup.audit.events
    assert setup.audit.kinds == ["decided", "completed"] * 2
    assert {event["request_id"] for event in setup.audit.events} == {"req_1"}
    assert (failed["outcome"], failed["status"]) == ("failed", 503)
    assert failed["parent_event_id"] == first["event_id"]
    assert failed["response_bytes"] == 0
    assert (done["outcome"], done["response_model"]) == ("completed", "large")
    assert done["parent_event_id"] == second["event_id"]
    assert [event["reservation_id"] for event in setup.audit.events] == [
        "res-small", "res-small", "res-large", "res-large",
    ]  # fmt: skip
    assert [detail.get("superseded") for detail in setup.audit.details] == [
        None, "fallback", None, None,
    ]  # fmt: skip
    assert [detail["attempt"] for detail in setup.audit.details] == [1, 1, 2, 2]
    assert (setup.audit.details[-1]["tier"], setup.audit.details[-1]["chosen_tier"]) == (
        "large",
        "small",
    )
    assert [len(hold.settled) for hold in setup.ledger.holds] == [1, 1]


async def test_the_policy_of_the_model_that_answers_holds() -> None:
    setup = Setup(Tiers(small=EngineUnavailable()))
    await setup.run()
    small, large = setup.engine.dispatched
    assert json.loads(small.body)["max_completion_tokens"] == 64
    assert json.loads(large.body)["max_completion_tokens"] == 50
    assert setup.turn is not None
    assert setup.turn.decision is not None
    assert setup.turn.decision.rule_ids == ("all", "large-little")


async def test_a_named_model_is_never_replaced() -> None:
    setup = Setup(Tiers(small=EngineUnavailable()))
    with pytest.raises(EngineUnavailable):
        await setup.run(setup.call(model="small"))
    assert setup.audit.kinds == ["decided", "completed"]


async def test_nothing_is_replaced_once_a_piece_was_released() -> None:
    engine = Tiers()
    engine.mid["small"] = EngineFailed()
    setup = Setup(engine)
    with pytest.raises(EngineFailed):
        await setup.run()
    assert [dispatch.model for dispatch in engine.dispatched] == ["small"]
    assert setup.audit.events[-1]["outcome"] == "failed"


async def test_the_last_failure_stands_when_no_model_is_left() -> None:
    setup = Setup(Tiers(small=EngineUnavailable(), large=Overloaded()))
    with pytest.raises(Overloaded):
        await setup.run()
    assert [dispatch.model for dispatch in setup.engine.dispatched] == ["small", "large"]
    assert setup.audit.kinds == ["decided", "completed"] * 2
    assert setup.audit.events[-1]["outcome"] == "refused"
    assert setup.observer.turns == [(Outcome.REFUSED, 2)]


@pytest.mark.parametrize("failure", [InvalidRequest("no"), BlockedByPolicy("no")])
async def test_what_the_request_itself_is_refused_for_goes_nowhere_else(
    failure: GatehouseError,
) -> None:
    setup = Setup(Tiers(small=failure))
    with pytest.raises(type(failure)):
        await setup.run()
    assert [dispatch.model for dispatch in setup.engine.dispatched] == ["small"]


async def test_a_prompt_too_long_for_one_model_goes_to_one_with_more_room() -> None:
    setup = Setup(Tiers(small=ContextLengthExceeded("too long")))
    assert await setup.text() == "l1l2"
    setup = Setup(
        Tiers(large=ContextLengthExceeded("too long")), Choosing(order=("large", "small"))
    )
    with pytest.raises(ContextLengthExceeded):
        await setup.run()


@pytest.mark.parametrize("refusal", [Overloaded(), DepartmentShareTaken()])
async def test_being_told_to_wait_is_no_way_up_for_who_may_not_rise(
    refusal: GatehouseError,
) -> None:
    router = Choosing()
    router.may_rise = False
    setup = Setup(Tiers(small=refusal), router)
    with pytest.raises(Overloaded):
        await setup.run()
    assert [dispatch.model for dispatch in setup.engine.dispatched] == ["small"]


async def test_a_department_that_fills_its_share_stays_in_its_tier() -> None:
    setup = Setup(Tiers(small=DepartmentShareTaken()))
    with pytest.raises(DepartmentShareTaken):
        await setup.run()
    down = Setup(Tiers(large=DepartmentShareTaken()), Choosing(order=("large", "small")))
    assert await down.text() == "s1s2s3"


async def test_a_request_that_kills_engines_kills_two_at_most() -> None:
    models = (SMALL, TWIN, LARGE)
    order = Choosing(order=("small", "twin", "large"))
    setup = Setup(Tiers(small=EngineFailed(), large=EngineFailed()), order, models=models)
    with pytest.raises(EngineFailed):
        await setup.run()
    assert [dispatch.model for dispatch in setup.engine.dispatched] == ["small", "large"]


async def test_a_model_counts_with_the_context_that_the_caller_may_use() -> None:
    setup = Setup(
        Tiers(large=ContextLengthExceeded("too long")), Choosing(order=("large", "small"))
    )
    assert await setup.text(setup.call("clerk")) == "s1s2s3"
    (ask,) = setup.router.asks
    assert [model.context_tokens for model in ask.permitted] == [512, 100]
    assert setup.engine.dispatched[0].context_tokens == 100


async def test_limits_of_a_model_that_auto_does_not_choose_do_not_bind_it() -> None:
    setup = Setup(models=(*MODELS, ADAPTER))
    for _ in range(3):
        assert await setup.text() == "s1s2s3"


async def test_a_budget_that_cannot_cover_the_large_model_may_cover_the_small_one() -> None:
    setup = Setup(router=Choosing(order=("large", "small")), ledger=Account("large"))
    assert await setup.text() == "s1s2s3"
    assert setup.audit.kinds == ["decided", "completed"]
    assert setup.audit.events[0]["route_reason"] == "fallback:budget_exhausted"
    assert setup.turn is not None
    assert [attempt.why for attempt in setup.turn.earlier] == ["budget_exhausted"]


async def test_a_budget_that_cannot_cover_the_small_model_covers_no_other() -> None:
    setup = Setup(ledger=Account("small"))
    with pytest.raises(BudgetExhausted):
        await setup.run()
    assert setup.engine.dispatched == []
    assert setup.audit.kinds == ["refused"]


async def test_an_attempt_that_cannot_be_recorded_has_no_successor() -> None:
    setup = Setup(Tiers(small=EngineUnavailable()))
    setup.audit.break_at = 1
    with pytest.raises(AuditUnavailable):
        await setup.run()
    assert [dispatch.model for dispatch in setup.engine.dispatched] == ["small"]
    assert len(setup.observer.turns) == 1


async def test_who_hangs_up_between_two_attempts_gets_no_second() -> None:
    setup = Setup(Tiers(small=EngineUnavailable()))
    setup.audit.wait = asyncio.Event()
    task = asyncio.create_task(setup.run())
    await until(lambda: setup.audit.kinds == ["decided"] and bool(setup.ledger.holds[0].settled))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    setup.audit.wait.set()
    await setup.gateway.drain()
    await asyncio.sleep(0)
    assert setup.audit.kinds == ["decided", "completed"]
    assert [dispatch.model for dispatch in setup.engine.dispatched] == ["small"]
    assert len(setup.observer.turns) == 1


# -- cascade ----------------------------------------------------------------------------------


async def test_a_sure_answer_is_kept() -> None:
    judge = Judge()
    setup = Setup(router=Choosing(judge))
    assert await setup.text() == "s1s2s3"
    assert (judge.text, len(judge.logprobs), judge.finish) == ("s1s2s3", 3, ["stop"])
    assert [dispatch.model for dispatch in setup.engine.dispatched] == ["small"]
    assert setup.audit.details[-1]["confidence_milli"] == 7
    assert setup.turn is not None
    assert setup.turn.finish_reason == "stop"


async def test_only_the_kept_answer_is_released() -> None:
    setup = Setup(router=Choosing(Judge()))
    setup.engine.logprob = -3.0
    assert await setup.text() == "l1l2"
    assert setup.audit.kinds == ["decided", "completed"] * 2
    first, dropped, second, kept = setup.audit.events
    assert [detail.get("superseded") for detail in setup.audit.details] == [
        None, "cascade", None, None,
    ]  # fmt: skip
    assert (dropped["outcome"], dropped["response_bytes"]) == ("completed", 0)
    assert (dropped["output_tokens"], dropped["gpu_us"]) == (3, 3007)
    assert kept["route_reason"] == "cascade:unsure"
    assert b"s3" in setup.audit.content[first["event_id"]]
    assert b"s1" not in setup.audit.content[second["event_id"]]
    assert setup.turn is not None
    assert [(a.model, a.why, a.gpu_us) for a in setup.turn.earlier] == [("small", "cascade", 3007)]
    assert setup.turn.usage == Usage(3, 2)
    assert [len(hold.settled) for hold in setup.ledger.holds] == [1, 1]


async def test_a_long_answer_is_judged_by_its_beginning() -> None:
    judge = Judge(hold_tokens=2)
    engine = Tiers(small=("a", "b", "c", "d"))
    setup = Setup(engine, Choosing(judge))
    seen: list[tuple[str, int]] = []
    async with aclosing(setup.gateway.exchange(setup.call())) as events:
        async for event in events:
            seen.append((type(event).__name__, engine.pieces["small"]))
    assert seen == [
        ("Accepted", 2), ("EngineChunk", 2), ("EngineChunk", 2), ("EngineChunk", 3), ("Answer", 4),
    ]  # fmt: skip
    assert (judge.text, judge.finish) == ("ab", [None])


async def test_an_unsure_beginning_stops_the_engine() -> None:
    engine = Tiers(small=("a", "b", "c", "d"))
    engine.logprob = -3.0
    setup = Setup(engine, Choosing(Judge(hold_tokens=2)))
    assert await setup.text() == "l1l2"
    assert engine.pieces["small"] == 2
    assert engine.closed == ["small", "large"]
    assert setup.ledger.holds[0].settled == [(None, None)]


@pytest.mark.parametrize("asked", [True, False, None])
async def test_a_client_gets_log_probabilities_only_if_it_asked(asked: bool | None) -> None:
    setup = Setup(router=Choosing(Judge(hold_tokens=2)))
    fields = {} if asked is None else {"logprobs": asked}
    data = b""
    for event in await setup.run(setup.call(**fields)):
        data += getattr(event, "data", b"") + getattr(event, "tail", b"")
    assert all(bool(choice["logprobs"]) is bool(asked) for choice in choices(data))
    assert json.loads(setup.engine.dispatched[0].body)["logprobs"] is True


async def test_several_choices_are_not_held_back() -> None:
    judge = Judge()
    setup = Setup(router=Choosing(judge))
    await setup.run(setup.call(n=2))
    assert judge.finish == []
    assert "logprobs" not in json.loads(setup.engine.dispatched[0].body)


async def test_an_answer_given_up_is_asked_for_again_where_the_other_model_is_down() -> None:
    engine = Tiers(large=EngineUnavailable())
    engine.logprob = -3.0
    setup = Setup(engine, Choosing(Judge()))
    assert await setup.text() == "s1s2s3"
    assert [dispatch.model for dispatch in engine.dispatched] == ["small", "large", "small"]
    assert setup.turn is not None
    assert [attempt.why for attempt in setup.turn.earlier] == ["cascade", "engine_unavailable"]


@pytest.mark.parametrize(
    "failure",
    [
        ContextLengthExceeded("no"),
        InvalidRequest("no"),
        InternalError(),
        ModelNotFound("", "model"),
    ],
    ids=lambda error: error.code,
)
async def test_an_answer_given_up_stands_in_for_any_failure_of_the_other_model(
    failure: GatehouseError,
) -> None:
    engine = Tiers(large=failure)
    engine.logprob = -3.0
    setup = Setup(engine, Choosing(Judge()))
    assert await setup.text() == "s1s2s3"


@pytest.mark.parametrize(
    "odd",
    [
        b": ping\n\n",
        b"event: x\ndata: {}\n\n",
        b'data: {"choices":null}\n\n',
        b'data: {"choices":[{"delta":null,"logprobs":{"content":[{"logprob":null}]}}]}\n\n',
    ],
)
async def test_an_odd_event_does_not_break_a_draft(odd: bytes) -> None:
    setup = Setup(router=Choosing(Judge()))
    setup.engine.odd = odd
    events = await setup.run()
    assert isinstance(events[-1], Answer)


async def test_what_is_no_event_is_a_failure_of_the_engine() -> None:
    setup = Setup(router=Choosing(Judge()))
    setup.engine.odd = b"data: {secret"
    assert await setup.text() == "l1l2"
    assert setup.audit.events[1]["error_code"] == "engine_failed"


async def test_who_hangs_up_after_an_escalation_was_not_answered() -> None:
    setup = Setup(router=Choosing(Judge()))
    setup.engine.logprob = -3.0
    setup.audit.wait = asyncio.Event()
    task = asyncio.create_task(setup.run())
    await until(lambda: bool(setup.ledger.holds) and bool(setup.ledger.holds[0].settled))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    setup.audit.wait.set()
    await setup.gateway.drain()
    await asyncio.sleep(0)
    assert setup.observer.turns == [(Outcome.ABORTED, 1)]


class Buffering(NullInspector):
    """Releases nothing before the end."""

    def open_output(self, turn: Turn) -> Any:
        return BufferingOutput()


class BufferingOutput:
    def __init__(self) -> None:
        self.data = b""

    def feed(self, chunk: EngineChunk) -> EngineChunk | None:
        self.data += chunk.data
        return None

    def finish(self) -> tuple[EngineChunk | None, Inspection]:
        return EngineChunk(self.data), Inspection("buffering")


async def test_an_answer_given_up_is_on_record_whole_whatever_inspection_held_back() -> None:
    setup = Setup(router=Choosing(Judge()))
    setup.gateway.inspector = Buffering()
    setup.engine.logprob = -3.0
    assert await setup.text() == "l1l2"
    first = setup.audit.events[0]
    assert b"s1" in setup.audit.content[first["event_id"]]
    assert setup.audit.events[1]["inspector"] == "none"


async def test_a_draft_whose_engine_fails_falls_back() -> None:
    engine = Tiers()
    engine.mid["small"] = EngineFailed()
    setup = Setup(engine, Choosing(Judge()))
    assert await setup.text() == "l1l2"
    assert setup.audit.events[1]["error_code"] == "engine_failed"


async def test_who_hangs_up_during_a_draft_is_recorded_once() -> None:
    setup = Setup(Tiers(small=("a",) * 50), Choosing(Judge()))
    task = asyncio.create_task(setup.run())
    await until(lambda: setup.engine.pieces.get("small", 0) > 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await setup.gateway.drain()
    assert setup.audit.kinds == ["decided", "completed"]
    assert setup.audit.events[-1]["outcome"] == "aborted"
    assert setup.audit.content == {}


async def test_accepted_comes_first_and_once() -> None:
    for router in (Choosing(), Choosing(Judge())):
        events = await Setup(router=router).run()
        assert isinstance(events[0], Accepted)
        assert sum(isinstance(event, Accepted) for event in events) == 1
        assert isinstance(events[-1], Answer)
