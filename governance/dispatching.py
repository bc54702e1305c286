"""From what was decided to what is reserved, and to the exact bytes that the engine gets."""

from __future__ import annotations

from dataclasses import dataclass

from governance.classes import effective_class
from governance.request import forward_body, opening
from governance.selection import Option
from governance.types import (
    BudgetAsk,
    Charge,
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
    charge: Charge
    """Where it is charged; the department alone where no account was found."""
    patience_ms: int = 0
    """Longest wait in the engine's queue; 0 is no bound."""

    @property
    def priority_class(self) -> str:
        """Class that counts: the less urgent of the policy's and the account's."""
        return effective_class(self.option.decision.priority_class, self.charge.priority_class)

    @property
    def ask(self) -> BudgetAsk:
        """What the ledger must know."""
        embeddings = self.request.operation is Operation.EMBEDDINGS
        return BudgetAsk(
            request_id=self.request_id,
            account=self.charge.account,
            model=self.option.model.id,
            base_model=self.option.model.base,
            operation=self.request.operation,
            prompt_bytes=len(self.body),
            choices=self.request.choices,
            max_tokens=0 if embeddings else self.max_tokens,
        )

    def dispatch(self, reservation: Reservation) -> Dispatch:
        """What goes to the engine, under a reservation."""
        department = self.principal.department
        return Dispatch(
            request_id=self.request_id,
            decision_id=self.decision_id,
            model=self.option.model.id,
            base_model=self.option.model.base,
            operation=self.request.operation,
            body=self.body,
            principal_key=self.principal.key,
            department=self.charge.department,
            account=self.charge.account,
            priority=PRIORITY[self.priority_class],
            max_tokens=self.max_tokens * self.request.choices,
            reservation_id=reservation.id,
            weight_milli=self.charge.weight_milli,
            served_us=self.charge.served_us,
            patience_ms=self.patience_ms,
            affinity=affinity_key(department, opening(self.request)),
            context_tokens=self.option.decision.limits.context_tokens,
        )


def plan(
    request_id: str,
    decision_id: str,
    principal: Principal,
    request: InferenceRequest,
    option: Option,
    max_answer_tokens: int,
    charge: Charge | None = None,
    patience_ms: int = 0,
) -> Plan:
    """Fix the answer's length and the bytes of one request at one model.

    Args:
        request_id: The request.
        decision_id: The decision.
        principal: Who asks.
        request: What is asked, as it shall be forwarded.
        option: The model, with what the policy says of it.
        max_answer_tokens: Answer tokens per choice where neither client nor policy sets a bound.
        charge: Where it is charged; ``None`` where there is no account, which the ledger will say.
        patience_ms: Longest wait in the engine's queue; 0 is no bound.
    """
    most = _answer_tokens(request, option, max_answer_tokens)
    if charge is None:
        charge = Charge(principal.department, principal.department)
    urgency = effective_class(option.decision.priority_class, charge.priority_class)
    body = forward_body(
        request,
        model=option.model.id,
        max_tokens=most,
        cache_salt=principal.department,
        priority=PRIORITY[urgency],
    )
    return Plan(
        request_id, decision_id, principal, request, option, most, body, charge, patience_ms
    )


def _answer_tokens(request: InferenceRequest, option: Option, max_answer_tokens: int) -> int:
    """Answer tokens per choice: what was asked, or the platform's bound, within the policy.

    Never more than the model can hold, so that nothing is reserved that cannot be spent.
    """
    wanted = min(request.max_tokens or max_answer_tokens, option.model.context_tokens)
    most = option.decision.limits.max_tokens
    return wanted if most is None else max(1, min(wanted, most // request.choices))
