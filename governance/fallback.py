"""Which model is tried next when one cannot answer and nothing was released yet.

Where the platform chose the model (``auto``). Who names a model gets that one or an error, unless
policy lets the small tier answer in its place (``on_exhaustion``): then only a budget or a queue
that has no room for it leads there, and the reason of the route says so.

A request is never sent to a second replica of the same model once one has begun it, because it
might be what killed the first; it goes on once, to the other tier, and risks one replica there.

Being told to wait is no way up: a department that fills its share of the small tier stays there,
and so does one whose target or budget leaves no room for the large tier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from governance.drafts import Escalated
from governance.errors import (
    AuditUnavailable,
    BudgetExhausted,
    ContextLengthExceeded,
    DepartmentShareTaken,
    EngineFailed,
    EngineTimeout,
    EngineUnavailable,
    GatehouseError,
    Overloaded,
)
from governance.selection import TIERS, Option
from governance.types import ModelInfo, Route
from routing.reasons import Instead

_BEGUN = (EngineTimeout, EngineFailed)
"""An engine may have begun the request."""


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
        self._given_up: str | None = None
        """Model whose answer was not kept, and would still do."""
        self._risked = False
        """An engine has failed with the request."""
        self._refused: GatehouseError | None = None
        """Why the model that was named has no room for the request."""

    @property
    def option(self) -> Option:
        """The model being tried, with what the policy says of it."""
        return self._options[self._route.model.id]

    def after(self, error: GatehouseError | Escalated) -> Route | None:
        """The next route after a failure or an escalation; ``None`` where the failure stands."""
        if not self._route.auto:
            return self._instead(error)
        current = self._route.model
        model = next((m for m in self._left if self._suits(error, current, m)), None)
        if model is None:
            return None
        self._left.remove(model)
        self._risked = self._risked or isinstance(error, _BEGUN)
        if isinstance(error, Escalated):
            self._left.append(current)
            self._given_up = current.id
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

    def standing(self, error: GatehouseError | Escalated) -> GatehouseError | Escalated:
        """The failure to tell where none is left: a caller who named a model is told of that one.

        A stand-in that broke is told as what it is.
        """
        if self._refused is None or not isinstance(error, GatehouseError) or error.status >= 500:
            return error
        return self._refused

    def _instead(self, error: GatehouseError | Escalated) -> Route | None:
        """The next model of the small tier, where the named one has no room and policy permits."""
        if not isinstance(error, BudgetExhausted | Overloaded) or not self._left:
            return None
        reason = Instead.BUDGET if isinstance(error, BudgetExhausted) else Instead.LOAD
        named = self._route.instead_of or self._route.model.id
        if self._refused is None:
            self._refused = error
            self._route = replace(self._route, reason=reason)
        model = self._left.pop(0)
        self._route = replace(
            self._route,
            model=model,
            instead_of=named,
            detail={**self._route.detail, "tier": model.tier, "chosen_tier": self._chosen_tier},
        )
        return self._route

    def _suits(
        self, error: GatehouseError | Escalated, current: ModelInfo, model: ModelInfo
    ) -> bool:
        """Whether the other model may do what this one could not."""
        if isinstance(error, Escalated):
            return True
        if model.id == self._given_up:
            # It has answered this very request; only what cannot be recorded is not tried again.
            return not isinstance(error, AuditUnavailable)
        rises = TIERS.index(model.tier) > TIERS.index(current.tier)
        if isinstance(error, BudgetExhausted):
            return TIERS.index(model.tier) < TIERS.index(current.tier)
        if isinstance(error, ContextLengthExceeded):
            return model.context_tokens > current.context_tokens
        if isinstance(error, DepartmentShareTaken):
            return not rises
        if isinstance(error, Overloaded):
            return self._route.may_rise or not rises
        if isinstance(error, _BEGUN):
            return not self._risked and model.tier != current.tier
        return isinstance(error, EngineUnavailable)
