"""Where there is no room for a request: shed, answered by the small tier, told what would fit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from deployments.api.accounts import cost_object
from deployments.api.envelope import error_body, turn_headers
from governance.admission.shedding import QUEUE, Applicant, LoadShedder, QueueLimits
from governance.errors import (
    Allowed,
    BudgetExhausted,
    ContextLengthExceeded,
    DepartmentShareTaken,
    EngineUnavailable,
    GatehouseError,
    InvalidRequest,
    NoAccount,
    Overloaded,
    Shortage,
)
from governance.gateway import Gateway
from governance.types import BudgetAsk, Charge, Outcome, Principal, Shed
from routing.reasons import Instead
from routing.types import ModelLoad
from tests.unit.test_gateway_routing import (
    ADAPTER,
    MODELS,
    TWIN,
    Account,
    Choosing,
    Held,
    Judge,
    Setup,
    Tiers,
)

LEFT = Shortage("hr", 1_800_000_000_000_000, None, 40, "month", "tokens", 100, 60, "hr-lead")
REFUSAL = BudgetExhausted("No.", None, 60, (), LEFT)


class Estimating(Account):
    """Refuses some models, and says what would fit at each."""

    def __init__(self, *refused: str, fits: dict[str, int] | None = None) -> None:
        super().__init__(*refused)
        self.lengths = fits
        self.charged: Charge | None = Charge("hr/team", "hr", None, 2000, 77)
        self.asked_for: list[str] = []
        self.asks: list[BudgetAsk] = []

    def charge(self, principal: Principal) -> Charge:
        if self.charged is None:
            raise NoAccount
        return self.charged

    async def reserve(self, ask: BudgetAsk) -> Held:
        self.asks.append(ask)
        if self.charged is None:
            raise NoAccount
        if ask.model in self.refused:
            raise REFUSAL
        return await super().reserve(ask)

    def usage(self, account: str) -> None:
        self.asked_for.append(account)

    def fits(self, ask: BudgetAsk) -> int | None:
        return None if self.lengths is None else min(self.lengths[ask.model], ask.max_tokens)


class Busy(Tiers):
    """Engines of which some have requests waiting."""

    def __init__(self, waiting: dict[str, int], **scripts: Any) -> None:
        super().__init__(**scripts)
        self.waiting = waiting

    def load(self, base_model: str) -> ModelLoad:
        return ModelLoad(replicas=1, slots=256, waiting=self.waiting.get(base_model, 0))


def large(setup: Setup, token: str = "flexible", **fields: Any) -> Any:
    return setup.call(token, model="large", **fields)


# -- the account and the class ----------------------------------------------------------------


async def test_what_the_ledger_says_of_the_account_reaches_the_engine() -> None:
    ledger = Estimating()
    setup = Setup(ledger=ledger)
    await setup.run(setup.call(model="small"))
    (dispatch,) = setup.engine.dispatched
    assert (dispatch.department, dispatch.account) == ("hr", "hr/team")
    assert (dispatch.weight_milli, dispatch.served_us) == (2000, 77)
    assert dispatch.patience_ms == 60_000
    assert ledger.holds[0].ask.account == "hr/team"
    assert set(ledger.asked_for) == {"hr/team"}


@pytest.mark.parametrize(
    ("account", "priority", "patience_ms"),
    [(None, 0, 60_000), ("critical", -10, 10_000), ("batch", 10, 600_000)],
)
async def test_the_account_sets_the_class_where_policy_does_not(
    account: str | None, priority: int, patience_ms: int
) -> None:
    ledger = Estimating()
    ledger.charged = Charge("hr", "hr", account)
    setup = Setup(ledger=ledger)
    await setup.run(setup.call(model="small"))
    (dispatch,) = setup.engine.dispatched
    assert (dispatch.priority, dispatch.patience_ms) == (priority, patience_ms)
    assert json.loads(dispatch.body).get("priority", 0) == priority
    assert {event["priority_class"] for event in setup.audit.events} == {account or "standard"}


async def test_without_an_account_the_ledger_refuses_where_it_always_did() -> None:
    ledger = Estimating()
    ledger.charged = None
    setup = Setup(ledger=ledger)
    with pytest.raises(NoAccount):
        await setup.run(setup.call(model="small"))
    assert ledger.asks[0].account == "hr"
    (event,) = setup.audit.events
    assert event["event_type"] == "inference.refused"
    assert (event["error_code"], event["status"]) == ("no_budget_account", 403)
    assert setup.turn is not None
    assert setup.turn.body is not None


# -- shed --------------------------------------------------------------------------------------


async def test_a_request_that_is_shed_reaches_neither_ledger_nor_engine() -> None:
    ledger = Estimating()
    setup = Setup(Busy({"small": 103}), ledger=ledger)
    with pytest.raises(Overloaded) as caught:
        await setup.run(setup.call(model="small"))
    assert caught.value.code == "overloaded"
    assert caught.value.retry_after_s
    assert ledger.asks == []
    assert setup.engine.dispatched == []
    (event,) = setup.audit.events
    assert event["event_type"] == "inference.refused"
    assert (event["outcome"], event["status"], event["error_code"]) == (
        "refused",
        429,
        "overloaded",
    )
    assert json.loads(event["detail"]) == {
        "shed": {
            "reason": "queue",
            "model": "small",
            "class": "standard",
            "waiting": 103,
            "wait_ms": None,
        }
    }
    assert setup.gateway.shedder.stats["small", "standard", QUEUE] == 1


@pytest.mark.parametrize(("waiting", "shed"), [(64, ["batch"]), (103, ["standard", "batch"])])
async def test_the_class_decides_who_is_shed(waiting: int, shed: list[str]) -> None:
    for each in ("critical", "standard", "batch"):
        ledger = Estimating()
        ledger.charged = Charge("hr", "hr", each)
        setup = Setup(Busy({"small": waiting}), ledger=ledger)
        if each in shed:
            with pytest.raises(Overloaded):
                await setup.run(setup.call(model="small"))
        else:
            assert await setup.text(setup.call(model="small")) == "s1s2s3"


async def test_places_are_given_back_by_every_end() -> None:
    setup = Setup(Busy({"small": 1, "large": 1}, large=EngineUnavailable()))
    setup.engine.mid["small"] = InvalidRequest("no")
    for model in ("small", "large"):
        with pytest.raises(GatehouseError):
            await setup.run(setup.call(model=model))
    setup.engine.mid.clear()
    await setup.run(setup.call(model="small"))
    for queue in setup.gateway.shedder._queues.values():
        assert queue.known == 0


async def test_auto_goes_on_to_the_other_tier_when_one_sheds() -> None:
    setup = Setup(Busy({"small": 103}))
    assert await setup.text() == "l1l2"
    assert setup.turn is not None
    assert setup.turn.shed is None
    assert [attempt.why for attempt in setup.turn.earlier] == ["overloaded"]


# -- the small tier instead of a large model that was named -------------------------------------


async def test_who_names_a_model_gets_that_one_or_a_refusal() -> None:
    setup = Setup(ledger=Estimating("large"))
    with pytest.raises(BudgetExhausted):
        await setup.run(large(setup, "ok"))
    assert setup.engine.dispatched == []


async def test_policy_may_let_the_small_tier_answer_what_the_budget_cannot_cover() -> None:
    setup = Setup(ledger=Estimating("large"))
    assert await setup.text(large(setup)) == "s1s2s3"
    (dispatch,) = setup.engine.dispatched
    assert dispatch.model == json.loads(dispatch.body)["model"] == "small"
    turn = setup.turn
    assert turn is not None
    assert turn.route is not None
    headers = turn_headers(turn)
    assert headers["x-gatehouse-model"] == "small"
    assert headers["x-gatehouse-route-reason"] == "budget:small instead of large"
    assert headers["x-gatehouse-attempts"] == "large=budget_exhausted,small"
    assert cost_object(turn)["instead_of"] == {"model": "large", "why": Instead.BUDGET}
    decided, completed = setup.audit.events
    for event in (decided, completed):
        assert event["request_model"] == "large"
        assert event["response_model"] == "small"
        assert event["route_reason"] == "budget:small instead of large"
        assert json.loads(event["detail"])["route"] == {
            "attempt": 2,
            "chosen_tier": "large",
            "instead_of": "large",
            "tier": "small",
        }


@pytest.mark.parametrize(
    "engine",
    [
        Busy({"large": 103}),
        Tiers(large=Overloaded()),
        Tiers(large=DepartmentShareTaken()),
    ],
    ids=["shed", "full", "share taken"],
)
async def test_so_it_does_where_the_large_tier_is_full(engine: Tiers) -> None:
    setup = Setup(engine)
    assert await setup.text(large(setup)) == "s1s2s3"
    assert setup.turn is not None
    assert turn_headers(setup.turn)["x-gatehouse-route-reason"] == Instead.LOAD
    assert setup.audit.events[-1]["route_reason"] == "load:small instead of large"


@pytest.mark.parametrize("error", [EngineUnavailable(), InvalidRequest(), ContextLengthExceeded()])
async def test_other_failures_of_a_named_model_stand(error: GatehouseError) -> None:
    setup = Setup(Tiers(large=error))
    with pytest.raises(type(error)):
        await setup.run(large(setup))
    assert [dispatch.model for dispatch in setup.engine.dispatched] == ["large"]


async def test_nothing_is_replaced_once_an_answer_has_begun() -> None:
    engine = Tiers()
    engine.mid["large"] = Overloaded()
    setup = Setup(engine)
    with pytest.raises(Overloaded):
        await setup.run(large(setup))
    assert [dispatch.model for dispatch in engine.dispatched] == ["large"]


async def test_a_rule_that_refuses_wins_over_one_that_does_not() -> None:
    setup = Setup(ledger=Estimating("large"))
    with pytest.raises(BudgetExhausted):
        await setup.run(large(setup, "strict"))


async def test_a_small_model_that_was_named_has_no_stand_in() -> None:
    setup = Setup(ledger=Estimating("small"), models=(*MODELS, TWIN))
    with pytest.raises(BudgetExhausted):
        await setup.run(setup.call("flexible", model="small"))


async def test_adapters_stand_in_for_nobody_and_the_next_small_model_is_tried() -> None:
    setup = Setup(ledger=Estimating("large", "small"), models=(ADAPTER, *MODELS, TWIN))
    assert await setup.text(large(setup)) == "t1"
    assert setup.turn is not None
    assert setup.turn.route is not None
    assert setup.turn.route.instead_of == "large"


async def test_where_nobody_has_room_the_named_model_s_refusal_is_told() -> None:
    ledger = Estimating("large", fits={"large": 12, "small": 60})
    setup = Setup(Busy({"small": 103}), ledger=ledger)
    with pytest.raises(BudgetExhausted) as caught:
        await setup.run(large(setup))
    assert caught.value.shortage is not None
    assert caught.value.shortage.allowed == Allowed(12, "small", 60), "of the model that was named"
    assert setup.turn is not None
    assert (setup.turn.outcome, setup.turn.error_code) == (Outcome.REFUSED, "budget_exhausted")


async def test_what_a_stand_in_cannot_take_is_told_of_the_named_model() -> None:
    setup = Setup(Tiers(small=ContextLengthExceeded()), ledger=Estimating("large"))
    with pytest.raises(BudgetExhausted):
        await setup.run(large(setup))


async def test_a_stand_in_that_breaks_is_told_as_such() -> None:
    setup = Setup(Tiers(small=EngineUnavailable()), ledger=Estimating("large"))
    with pytest.raises(EngineUnavailable):
        await setup.run(large(setup))


async def test_a_stand_in_needs_the_callers_permission() -> None:
    setup = Setup(ledger=Estimating("large"))
    people = setup.gateway.authenticator.table  # type: ignore[attr-defined]
    people["flexible"] = replace(people["flexible"], models=frozenset({"large"}))
    with pytest.raises(BudgetExhausted):
        await setup.run(large(setup))
    assert setup.engine.dispatched == []


# -- what would still be allowed ------------------------------------------------------------------


async def told(setup: Setup, **fields: Any) -> BudgetExhausted:
    with pytest.raises(BudgetExhausted) as caught:
        await setup.run(large(setup, "ok", **fields))
    return caught.value


async def test_a_refusal_says_how_long_an_answer_still_fits_and_where() -> None:
    setup = Setup(ledger=Estimating("large", fits={"large": 12, "small": 60}))
    error = await told(setup)
    assert error.shortage is not None
    assert error.shortage.allowed == Allowed(12, "small", 50)
    assert error.retry_after_s == 60
    assert "up to about 12 tokens to this prompt" in error.message
    assert "model small" in error.message
    body = json.loads(error_body(error, "req_1"))["error"]
    assert body["allowed"] == {
        "answer_tokens": 12,
        "instead": {"model": "small", "answer_tokens": 50},
    }
    assert (body["account"], body["owner"], body["window"]) == ("hr", "hr-lead", "month")
    assert (body["ran_out"], body["limit"], body["spent"]) == ("tokens", 100, 60)
    assert body["reset_at"] == 1_800_000_000
    assert body["still_fits"] == {"tokens": 40, "gpu_ms": None}


async def test_a_small_model_that_fits_no_more_is_no_advice() -> None:
    setup = Setup(ledger=Estimating("large", fits={"large": 12, "small": 12}))
    error = await told(setup)
    assert error.shortage is not None
    assert error.shortage.allowed == Allowed(12)
    assert "small" not in error.message


async def test_where_nothing_fits_that_is_said() -> None:
    setup = Setup(ledger=Estimating("large", fits={"large": 0, "small": 0}))
    error = await told(setup)
    assert error.shortage is not None
    assert error.shortage.allowed == Allowed(0)
    assert error.message.endswith("Nothing as long as this prompt fits until then.")
    body = json.loads(error_body(error, "req_1"))["error"]
    assert body["allowed"] == {"answer_tokens": 0, "instead": None}


async def test_models_that_the_caller_may_not_use_are_not_named() -> None:
    setup = Setup(ledger=Estimating("large", fits={"large": 0, "small": 60}))
    people = setup.gateway.authenticator.table  # type: ignore[attr-defined]
    people["ok"] = replace(people["ok"], models=frozenset({"large"}))
    error = await told(setup)
    assert "small" not in error.message
    assert error.shortage is not None
    assert error.shortage.allowed == Allowed(0)


async def test_a_ledger_that_cannot_tell_gives_no_advice() -> None:
    error = await told(Setup(ledger=Estimating("large")))
    assert error is REFUSAL


# -- a draft at the limit --------------------------------------------------------------------------


class Ending(Held):
    """Ends at the first chunk of the small model's answer."""

    def consumed(self, tokens: int, gpu_us: int) -> bool:
        return self.ask.model == "small"

    async def extend(self) -> None:
        raise REFUSAL


class EndingAccount(Account):
    async def reserve(self, ask: BudgetAsk) -> Held:
        if ask.model in self.refused:
            raise REFUSAL
        self.holds.append(Ending(ask))
        return self.holds[-1]


async def test_a_draft_at_the_limit_is_judged_before_anything_of_it_is_released() -> None:
    judge = Judge(hold_tokens=64, escalate_below=-5.0)
    setup = Setup(router=Choosing(judge), ledger=EndingAccount())
    assert await setup.text() == "s1"
    assert judge.finish == [None]
    assert setup.audit.events[-1]["finish_reason"] == "length"


async def test_a_draft_that_is_given_up_at_the_limit_never_leaves() -> None:
    judge = Judge(hold_tokens=64, escalate_below=0.0)
    setup = Setup(router=Choosing(judge), ledger=EndingAccount())
    assert await setup.text() == "l1l2"
    first, second, *_ = setup.ledger.holds
    assert (first.ask.model, first.settled) == ("small", [(None, None)])
    assert second.ask.model == "large"
    assert setup.turn is not None
    assert setup.turn.stopped is None
    ended = [event for event in setup.audit.events if event["event_type"] != "inference.decided"]
    assert [event["error_code"] for event in ended] == [None, None]


def test_the_bounds_of_a_shedder_that_is_given_hold() -> None:
    engine = Busy({"small": 1})
    setup = Setup()
    gateway = Gateway(
        models=MODELS,
        authenticator=setup.gateway.authenticator,
        policy=setup.gateway.policy,
        limiter=setup.gateway.limiter,
        inspector=setup.gateway.inspector,
        router=setup.router,
        ledger=setup.ledger,
        audit=setup.audit,
        engine=engine,
        clock=lambda: 1,
        max_answer_tokens=64,
        shedder=LoadShedder(["small"], engine.load, lambda: 0.0, {"small": QueueLimits(1)}),
    )
    found = gateway.shedder.enter("small", Applicant("critical", "hr"))
    assert isinstance(found, Shed), "one waits, and one may"
