"""The request path over a real ledger: refusals and their advice, stops, soft accounts."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest

from governance.budget.messages import AccountState
from governance.errors import BudgetExhausted
from governance.gateway import GatewayEvent
from governance.types import (
    Dispatch,
    EngineChunk,
    EngineEvent,
    EngineFinished,
    EngineStarted,
    Stop,
    Turn,
    Usage,
)
from tests.budget_world import World, config, run
from tests.doubles import VERSION, ScriptedEngine
from tests.unit.test_gateway import Setup
from tests.unit.test_gateway_stopping import ends_of, piece, released, text_of

EACH_US = 50_000
"""Device time of a token of ``Steady``: more than a model of unknown price is taken for."""


class Steady(ScriptedEngine):
    """One token a piece, each of the same cost, as many as were asked for."""

    async def stream(self, dispatch: Dispatch) -> AsyncGenerator[EngineEvent, None]:
        self.dispatched.append(dispatch)
        try:
            yield EngineStarted("replica-1", VERSION, "test", 3)
            for number in range(dispatch.max_tokens):
                last = number == dispatch.max_tokens - 1
                data = piece(0, "x", "length" if last else None)
                yield EngineChunk(data, 1, (number + 1) * EACH_US)
            used = Usage(3, dispatch.max_tokens)
            yield EngineFinished(used, b"", dispatch.max_tokens * EACH_US)
        finally:
            self.closed += 1


def asked(
    limits: dict[str, Any], *lengths: int
) -> tuple[list[list[GatewayEvent] | BudgetExhausted], list[Turn], AccountState]:
    """What becomes of requests for answers of these lengths, one after the other."""

    async def main() -> Any:
        with World(config(hr=limits)) as world:
            book = world.book()
            setup = Setup(Steady())
            setup.gateway.ledger = book
            found: list[list[GatewayEvent] | BudgetExhausted] = []
            for length in lengths:
                try:
                    found.append(await setup.run(setup.call(max_tokens=length)))
                except BudgetExhausted as error:
                    found.append(error)
            await setup.gateway.drain()
            await book.close()
            (state,) = world.ledger.state("hr")
            return found, setup.observer.turns, state

    found: tuple[list[list[GatewayEvent] | BudgetExhausted], list[Turn], AccountState] = run(main)
    return found


@pytest.mark.parametrize("limits", [{"tokens": 100}, {"gpu_seconds": 2}])
def test_what_a_refusal_says_would_fit_is_admitted(limits: dict[str, Any]) -> None:
    (refused,), _, _ = asked({**limits, "owner": "hr-lead"}, 100)
    assert isinstance(refused, BudgetExhausted)
    left = refused.shortage
    assert left is not None
    assert left.allowed is not None
    assert (left.account, left.window, left.owner) == ("hr", "day", "hr-lead")
    assert 0 < left.allowed.answer_tokens < 100
    (answered,), _, _ = asked(limits, left.allowed.answer_tokens)
    assert isinstance(answered, list)


def test_an_answer_that_costs_more_than_was_thought_ends_in_order_within_the_budget() -> None:
    (events,), (turn,), state = asked({"gpu_seconds": 1, "owner": "hr-lead"}, 40)
    assert isinstance(events, list)
    data = released(events)
    assert ends_of(data) == [(0, "length")]
    assert turn.stopped == Stop("budget_exhausted", "hr", "day", state.reset_us, "hr-lead")
    tokens = len(text_of(data))
    assert 10 < tokens < 40
    assert turn.usage == Usage(3, tokens)
    assert turn.charged is not None
    assert state.spent == turn.charged, "nothing is held any more"
    assert 1_000_000 <= state.spent.gpu_us <= 1_000_000 + EACH_US, "one token beyond, at most"


def test_a_soft_account_finishes_what_runs_and_begins_nothing_more() -> None:
    (events, refused), (first, _), state = asked({"gpu_seconds": 1, "mode": "soft"}, 40, 40)
    assert isinstance(events, list)
    assert first.stopped is None
    assert len(text_of(released(events))) == 40
    assert state.spent.gpu_us == 40 * EACH_US
    assert isinstance(refused, BudgetExhausted)
