"""Which models a request may go to, narrowed stage by stage: visible, admitted, permitted.

A caller names a model, or leaves the choice to the platform (``auto``). Either way policy decides
for each model by itself, and what it does not allow never reaches the router.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from governance.errors import BlockedByPolicy, InvalidRequest, LimitExceeded, ModelNotFound
from governance.ports import Policy
from governance.types import (
    Decision,
    Effect,
    InferenceRequest,
    Inspection,
    Limits,
    ModelInfo,
    Principal,
)

AUTO = "auto"
"""Model id by which a caller leaves the choice to the platform; no model may be called so."""

SMALL, LARGE = TIERS = ("small", "large")
"""Tiers that ``auto`` chooses among, cheapest first."""


@dataclass(frozen=True, slots=True)
class Option:
    """A model, and what the policy says of this request going there."""

    model: ModelInfo
    decision: Decision

    @property
    def bounded(self) -> ModelInfo:
        """The model with as much context as this caller may use of it."""
        most = self.decision.limits.context_tokens
        if most is None or most >= self.model.context_tokens:
            return self.model
        return replace(self.model, context_tokens=most)


class Selection:
    """Narrows the catalogue down to what one request may use.

    Args:
        models: All served models, in catalogue order.
        policy: Decides.
        choices: Ids of the models among which a caller may leave the choice to the platform.
    """

    def __init__(
        self, models: Sequence[ModelInfo], policy: Policy, *, choices: frozenset[str]
    ) -> None:
        self.models: Mapping[str, ModelInfo] = {model.id: model for model in models}
        self._policy = policy
        self._choices = [m for m in models if m.tier in TIERS and m.id in choices]

    def listed(self, principal: Principal) -> list[ModelInfo]:
        """The models that the caller may use; ``auto`` first where there is a choice to make."""
        visible = [m for m in self.models.values() if self._policy.visible(principal, m)]
        choices = [m for m in self._choices if m in visible]
        return [auto_info(choices), *visible] if choices else visible

    def visible(self, principal: Principal, request: InferenceRequest) -> tuple[ModelInfo, ...]:
        """Models that the request names; unknown and invisible ones are told apart by nothing.

        Raises:
            ModelNotFound: There is none that this caller may use.
            InvalidRequest: None of them answers this operation.
        """
        if request.model == AUTO:
            named: Sequence[ModelInfo] = self._choices
        else:
            model = self.models.get(request.model)
            named = () if model is None else (model,)
        seen = [model for model in named if self._policy.visible(principal, model)]
        if not seen:
            raise ModelNotFound("", "model")
        able = tuple(model for model in seen if request.operation in model.operations)
        if not able:
            raise InvalidRequest(
                f"The model does not answer {request.operation.value} requests.", "model"
            )
        return able

    def decide(
        self,
        principal: Principal,
        models: Sequence[ModelInfo],
        request: InferenceRequest,
        inspection: Inspection | None = None,
    ) -> tuple[Option, ...]:
        """What the policy says of each model; before inspection, and again with its findings."""
        operation = request.operation.value
        return tuple(
            Option(model, self._policy.decide(principal, model, operation, inspection))
            for model in models
        )

    def stand_ins(
        self,
        principal: Principal,
        request: InferenceRequest,
        inspection: Inspection | None = None,
    ) -> tuple[Option, ...]:
        """Models of the small tier that might answer in place of the one that is named.

        In catalogue order. Adapters are not among them, since what they are for is not known here.
        """
        models = [
            model
            for model in self.models.values()
            if model.tier == SMALL
            and model.base == model.id != request.model
            and request.operation in model.operations
        ]
        asked = (request.max_tokens or 1) * request.choices
        return tuple(
            option
            for option in self.decide(principal, models, request, inspection)
            if option.decision.effect is Effect.ALLOW
            and asked <= (option.decision.limits.max_tokens or asked)
        )


def allowed(options: Sequence[Option]) -> tuple[Option, ...]:
    """The options that are allowed.

    Raises:
        BlockedByPolicy: None is; says why for the first.
    """
    found = tuple(option for option in options if option.decision.effect is Effect.ALLOW)
    if not found:
        decision = options[0].decision
        raise BlockedByPolicy(decision.message or "", None, None, decision.rule_ids)
    return found


def admitted(options: Sequence[Option], request: InferenceRequest) -> tuple[Option, ...]:
    """The options that are allowed, and may give as long an answer as is asked for.

    Raises:
        BlockedByPolicy: None is allowed.
        LimitExceeded: None may give so long an answer.
    """
    found = allowed(options)
    asked = (request.max_tokens or 1) * request.choices
    able = tuple(o for o in found if asked <= (o.decision.limits.max_tokens or asked))
    if not able:
        most = max(o.decision.limits.max_tokens or 0 for o in found)
        raise LimitExceeded(
            f"The request asks for {asked} answer tokens; at most {most} are allowed to you "
            "in one request, over all choices.",
            "max_tokens",
            None,
            found[0].decision.rule_ids,
        )
    return able


def rate_limits(options: Sequence[Option]) -> Limits:
    """Limits on the rate of a request that may go to any of these: the least of theirs.

    One count serves all models of a caller, so the strictest holds wherever it goes.
    """
    limits = [option.decision.limits for option in options]
    return Limits(
        requests_per_minute=_least([each.requests_per_minute for each in limits]),
        parallel_requests=_least([each.parallel_requests for each in limits]),
    )


def auto_info(choices: Sequence[ModelInfo]) -> ModelInfo:
    """``auto`` as a model: what the models behind it can do, taken together."""
    return ModelInfo(
        id=AUTO,
        tier=AUTO,
        operations=frozenset(op for model in choices for op in model.operations),
        context_tokens=max(model.context_tokens for model in choices),
        base=AUTO,
    )


def _least(bounds: Sequence[int | None]) -> int | None:
    return min((bound for bound in bounds if bound is not None), default=None)
