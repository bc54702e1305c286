"""What is recorded of a shadow."""

from __future__ import annotations

from typing import Any

from governance.audit.schema import EventType
from governance.audit.turn_record import canonical_detail
from governance.shadow_exchange import Offer
from governance.types import Turn
from routing.agreement import Agreement


def shadow_event(offer: Offer, turn: Turn, found: Agreement) -> dict[str, Any]:
    """Columns of ``route.shadow``; it holds no content."""
    principal, usage, reservation = offer.principal, turn.usage, turn.reservation
    detail = {
        "agreement_milli": found.milli,
        "method": found.method,
        "small_model": offer.small.id,
        "large_model": offer.large.id,
        "small_tokens": offer.small_tokens,
        "large_tokens": usage.completion_tokens if usage else None,
        "gain_milli": offer.gain_milli,
        "threshold_milli": offer.threshold_milli,
        "run_request_id": turn.request_id,
    }
    return {
        "event_type": EventType.SHADOW.value,
        "ts_us": turn.started_us,
        "ts_end_us": turn.ended_us or None,
        "request_id": offer.request_id,
        "decision_id": offer.decision_id,
        "parent_event_id": offer.decided_event_id,
        "reservation_id": reservation.id if reservation else None,
        "budget_account": reservation.account if reservation else None,
        "subject_key": principal.key,
        "principal_kind": principal.kind.value,
        "department": principal.department,
        "operation": offer.operation.value,
        "response_model": offer.large.id,
        "model_revision": turn.model_version,
        "replica_id": turn.replica_id,
        "gpu_us": turn.gpu_us,
        "gpu_us_method": "pending" if turn.gpu_us is None else "step_split",
        "detail": canonical_detail({"shadow": detail}),
    }
