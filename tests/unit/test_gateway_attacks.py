"""The request path, attacked: what must not be lost, and what must not be said."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import aclosing

import pytest

from governance.admission.limits import REFUSALS_PER_MINUTE
from governance.errors import (
    AuditUnavailable,
    BudgetExhausted,
    ContextLengthExceeded,
    GatehouseError,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    RateLimited,
)
from governance.gateway import Answer
from governance.nulls import NullInspector
from governance.types import (
    BudgetAsk,
    Inspection,
    Operation,
    Outcome,
    TextLeaf,
    Turn,
    Usage,
)
from tests.doubles import RecordingAudit, ScriptedEngine
from tests.unit.test_gateway import Account, Setup

SECRET = "the patient's number is 4711"


class QuotingInspector(NullInspector):
    """Fails as libraries do: with the text it choked on."""

    async def inspect_input(self, leaves: Iterable[TextLeaf]) -> Inspection:
        for leaf in leaves:
            raise ValueError(f"cannot parse {leaf.text!r}")
        raise AssertionError("no text")


class LosingAudit(RecordingAudit):
    """The disk is slow, and then full, when the end of a turn is written."""

    def __init__(self) -> None:
        super().__init__()
        self.started, self.release = asyncio.Event(), asyncio.Event()

    async def completed(self, turn: Turn) -> None:
        self.started.set()
        await self.release.wait()
        raise AuditUnavailable()


async def test_a_prompt_quoted_by_an_unforeseen_exception_is_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    setup = Setup(ScriptedEngine())
    setup.gateway.inspector = QuotingInspector()
    with pytest.raises(InternalError):
        await setup.run(setup.call(messages=[{"role": "user", "content": SECRET}]))
    assert "4711" not in caplog.text
    assert "req_1" in caplog.text
    assert "ValueError" in caplog.text
    assert "inspect_input" in caplog.text


async def test_a_ledger_that_fails_does_not_cost_the_record() -> None:
    setup = Setup(ScriptedEngine())
    reserve = setup.ledger.reserve

    async def reserve_broken(ask: BudgetAsk) -> Account:
        hold = await reserve(ask)

        def broken(usage: Usage | None, gpu_us: int | None) -> None:
            raise RuntimeError("ledger gone")

        hold.settle = broken  # type: ignore[method-assign]
        return hold

    setup.ledger.reserve = reserve_broken  # type: ignore[method-assign]
    with pytest.raises(InternalError):
        await setup.run(setup.call())
    assert [stage for stage, _ in setup.audit.entries] == ["decided", "completed"]


async def test_an_audit_that_breaks_at_a_refusal_is_an_error_of_ours() -> None:
    setup = Setup(ScriptedEngine())

    async def broken(turn: Turn) -> None:
        raise RuntimeError("disk")

    setup.audit.completed = broken  # type: ignore[method-assign]
    with pytest.raises(GatehouseError) as caught:
        await setup.run(setup.call(model="nothing"))
    assert caught.value.code == "internal_error"


async def test_a_record_lost_after_the_client_went_is_not_lost_silently(
    caplog: pytest.LogCaptureFixture,
) -> None:
    audit = LosingAudit()
    setup = Setup(ScriptedEngine(), audit)
    started, release = audit.started, audit.release

    async def serve() -> None:
        async with aclosing(setup.gateway.exchange(setup.call())) as events:
            async for _ in events:
                pass

    task = asyncio.create_task(serve())
    await started.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    release.set()
    await setup.gateway.drain()
    assert "req_1" in caplog.text
    assert "audit_unavailable" in caplog.text


async def test_token_prompts_beyond_the_context_never_reach_an_engine() -> None:
    engine = ScriptedEngine()
    setup = Setup(engine)

    async def asked(base_model: str, prompts: list[list[int]]) -> list[str]:
        raise AssertionError("an engine was asked to decode")

    engine.detokenize = asked  # type: ignore[method-assign]
    for prompt in ([7] * 1025, [[7], [7] * 1025]):
        with pytest.raises(ContextLengthExceeded):
            await setup.run(setup.call(operation=Operation.COMPLETIONS, prompt=prompt))
    assert setup.audit.entries[-1][1].outcome is Outcome.REFUSED


async def test_a_caller_that_keeps_asking_for_what_it_cannot_have_is_held_back() -> None:
    setup = Setup(ScriptedEngine())
    for _ in range(REFUSALS_PER_MINUTE):
        with pytest.raises(ModelNotFound):
            await setup.run(setup.call(model="nothing"))
    with pytest.raises(RateLimited) as caught:
        await setup.run(setup.call(raw=b"never read"))
    assert caught.value.retry_after_s
    assert setup.turn.request is None  # its body was not received
    assert isinstance((await setup.run(setup.call("intern")))[-1], Answer)  # nobody else is


async def test_want_of_budget_or_room_is_not_held_against_a_caller() -> None:
    setup = Setup(ScriptedEngine())
    setup.ledger.refuse = BudgetExhausted()
    for _ in range(REFUSALS_PER_MINUTE + 1):
        with pytest.raises(BudgetExhausted):
            await setup.run(setup.call())


async def test_nothing_is_reserved_that_the_model_cannot_hold() -> None:
    setup = Setup(ScriptedEngine())
    setup.gateway.max_answer_tokens = 10**7
    await setup.run(setup.call("intern", max_tokens=10**7))
    assert setup.ledger.holds[-1].ask.max_tokens == 1024
    await setup.run(setup.call("intern"))
    assert setup.ledger.holds[-1].ask.max_tokens == 1024


@pytest.mark.parametrize("model", ["small\x1b[2J", "small\n", "\u202esmall"])
async def test_a_model_name_that_steers_a_terminal_is_refused(model: str) -> None:
    setup = Setup(ScriptedEngine())
    with pytest.raises(InvalidRequest):
        await setup.run(setup.call(model=model))
