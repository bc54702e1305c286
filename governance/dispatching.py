"""From what was decided to what is reserved, and to the exact bytes that the engine gets."""

from __future__ import annotations

from dataclasses import dataclass

from governance.request import forward_body, opening
from governance.selection import Option
from governance.types import (
    BudgetAsk,
    Dispatch,
    InferenceRequest,
    Operation,
    Principal,
    Reservation,
)
from routing.conversation import affinity_key

PRIORITY = {"critical": -10, "standard": 0, "batch": 10}
"""vLLM priority of each class: lower is served earlier."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One request at one model, before anything is held for it."""

    request_id: str
    decision_id: str
    principal: Principal
    request: InferenceRequest
    option: Option
    max_tokens: int
    """Answer tokens per choice."""
    body: bytes

    @property
    def ask(self) -> BudgetAsk:
        """What the ledger must know."""
        embeddings = self.request.operation is Operation.EMBEDDINGS
        return BudgetAsk(
            request_id=self.request_id,
            department=self.principal.department,
            model=self.option.model.id,
            base_model=self.option.model.base,
            operation=self.request.operation,
            prompt_bytes=len(self.body),
            choices=self.request.choices,
            max_tokens=0 if embeddings else self.max_tokens,
        )

    def dispatch(self, reservation: Reservation) -> Dispatch:
        """What goes to the engine, under a reservation."""
        decision, department = self.option.decision, self.principal.department
        return Dispatch(
            request_id=self.request_id,
            decision_id=self.decision_id,
            model=self.option.model.id,
            base_model=self.option.model.base,
            operation=self.request.operation,
            body=self.body,
            principal_key=self.principal.key,
            department=department,
            priority=PRIORITY[decision.priority_class],
            max_tokens=self.max_tokens * self.request.choices,
            reservation_id=reservation.id,
            affinity=affinity_key(department, opening(self.request)),
            context_tokens=decision.limits.context_tokens,
        )


def plan(
    request_id: str,
    decision_id: str,
    principal: Principal,
    request: InferenceRequest,
    option: Option,
    max_answer_tokens: int,
) -> Plan:
    """Fix the answer's length and the bytes of one request at one model.

    Args:
        request_id: The request.
        decision_id: The decision.
        principal: Who asks.
        request: What is asked, as it shall be forwarded.
        option: The model, with what the policy says of it.
        max_answer_tokens: Answer tokens per choice where neither client nor policy sets a bound.
    """
    most = _answer_tokens(request, option, max_answer_tokens)
    body = forward_body(
        request,
        model=option.model.id,
        max_tokens=most,
        cache_salt=principal.department,
        priority=PRIORITY[option.decision.priority_class],
    )
    return Plan(request_id, decision_id, principal, request, option, most, body)


def _answer_tokens(request: InferenceRequest, option: Option, max_answer_tokens: int) -> int:
    """Answer tokens per choice: what was asked, or the platform's bound, within the policy.

    Never more than the model can hold, so that nothing is reserved that cannot be spent.
    """
    wanted = min(request.max_tokens or max_answer_tokens, option.model.context_tokens)
    most = option.decision.limits.max_tokens
    return wanted if most is None else max(1, min(wanted, most // request.choices))
