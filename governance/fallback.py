"""Which model is tried next when one cannot answer and nothing was released yet.

Only where the platform chose the model (``auto``): who names a model gets that one or an error.
A request is never sent to a second replica of the same model once one has begun it, because it
might be what killed the first; going on to another tier risks one replica there, and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from governance.drafts import Escalated
from governance.errors import (
    BudgetExhausted,
    ContextLengthExceeded,
    EngineFailed,
    EngineTimeout,
    EngineUnavailable,
    GatehouseError,
    Overloaded,
)
from governance.selection import TIERS, Option
from governance.types import ModelInfo, Route

_ELSEWHERE = (EngineUnavailable, Overloaded, EngineTimeout, EngineFailed)
"""The model cannot answer now; another may."""


class Fallbacks:
    """The models that are left for one request, in the router's order.

    Args:
        route: What the router chose.
        options: The permitted models with their decisions.
    """

    def __init__(self, route: Route | None, options: Sequence[Option]) -> None:
        if route is None:
            raise ValueError("not routed yet")
        self._route = route
        self._options = {option.model.id: option for option in options}
        self._left = list(route.fallbacks)
        self._chosen_tier = route.model.tier

    @property
    def option(self) -> Option:
        """The model being tried, with what the policy says of it."""
        return self._options[self._route.model.id]

    def after(self, error: GatehouseError | Escalated) -> Route | None:
        """The next route after a failure or an escalation; ``None`` where the failure stands."""
        if not self._route.auto:
            return None
        current = self._route.model
        model = next((m for m in self._left if _suits(error, current, m)), None)
        if model is None:
            return None
        self._left.remove(model)
        if isinstance(error, Escalated):
            # What was given up may still be the answer, if the other model has none.
            self._left.append(current)
            reason, detail = f"cascade:{error.verdict.reason}", error.verdict.detail
        else:
            reason, detail = f"fallback:{error.code}", {}
        self._route = replace(
            self._route,
            model=model,
            reason=reason,
            draft=None,
            detail={
                **self._route.detail,
                **detail,
                "tier": model.tier,
                "chosen_tier": self._chosen_tier,
            },
        )
        return self._route


def _suits(error: GatehouseError | Escalated, current: ModelInfo, model: ModelInfo) -> bool:
    """Whether the other model may do what this one could not."""
    if isinstance(error, Escalated):
        return True
    if isinstance(error, BudgetExhausted):
        return TIERS.index(model.tier) < TIERS.index(current.tier)
    if isinstance(error, ContextLengthExceeded):
        return model.context_tokens > current.context_tokens
    return isinstance(error, _ELSEWHERE)
