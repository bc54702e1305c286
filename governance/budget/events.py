"""Audit events of the ledger, as partial records (``governance.audit.schema.COLUMNS``).

The ledger keeps each event in its database, in the transaction of what it tells of, until the
shell has written it to the audit trail: an event is written at least once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from governance.audit.schema import EventType
from governance.budget.messages import MeterReport, MeterRow
from governance.budget.state import METERS, Override, Replica, Reservation

Event = dict[str, Any]


def settled(
    row: MeterRow, report: MeterReport, reservation: Reservation, lease_id: str | None, now_us: int
) -> Event:
    """The engine's own account of a request whose gateway did not get it."""
    return {
        "event_type": EventType.SETTLED.value,
        "ts_us": now_us,
        "principal_kind": "system",
        "request_id": row.request_id,
        "reservation_id": reservation.id,
        "lease_id": lease_id,
        "department": reservation.account,
        "budget_account": reservation.account,
        "response_model": row.model,
        "replica_id": report.replica_id,
        "input_tokens": row.prompt_tokens,
        "cached_tokens": row.cached_tokens,
        "output_tokens": row.decode_tokens,
        "gpu_us": row.gpu_us,
        "gpu_us_method": "step_split",
        "charged_us": reservation.charged.gpu_us,
        "detail": detail(gateway_id=row.gateway_id, delivered=row.delivered),
    }


def interval(replica: Replica, now_us: int) -> Event:
    """Device time of a replica since its last such event."""
    figures = dict(zip(METERS, _since(replica), strict=True))
    return {
        **_of(EventType.METER_INTERVAL, replica, replica.marked_us),
        "ts_end_us": now_us,
        "detail": detail(
            **_about(replica),
            **figures,
            idle_us=max(figures["elapsed_us"] - figures["busy_us"], 0),
        ),
    }


def engine_lost(replica: Replica, bound_us: int, seen: str, now_us: int) -> Event:
    """A replica ended without its last report; at most ``bound_us`` of its work is nobody's."""
    return {
        **_of(EventType.ENGINE_LOST, replica, now_us),
        "reason_code": seen,
        "detail": detail(**_about(replica), running=replica.running, unattributed_us=bound_us),
    }


def budget_set(override: Override, state: str, by: str, reason: str, now_us: int) -> Event:
    """An override began, was cleared or expired."""
    return {
        "event_type": EventType.BUDGET_SET.value,
        "ts_us": now_us,
        "principal_kind": "system" if state == "expired" else None,
        "subject_key": None if state == "expired" else by,
        "operation": "budget.set",
        "department": override.account,
        "budget_account": override.account,
        "entity_type": "budget",
        "entity_id": override.account,
        "state": state,
        "reason_code": reason,
        "due_us": override.expires_us,
        "detail": detail(gpu_us=override.gpu_us, tokens=override.tokens),
    }


def budgets_loaded(digest: str, before: str | None, now_us: int) -> Event:
    """The ledger took up a budgets file."""
    return {
        "event_type": EventType.BUDGETS_LOADED.value,
        "ts_us": now_us,
        "principal_kind": "system",
        "entity_type": "budgets",
        "entity_id": digest,
        "detail": detail(digest=digest, before=before),
    }


def detail(**values: object) -> str:
    """Canonical JSON of further values."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _since(replica: Replica) -> list[int]:
    return [now - then for now, then in zip(replica.raw, replica.marked, strict=True)]


def _of(event_type: EventType, replica: Replica, ts_us: int) -> Event:
    return {
        "event_type": event_type.value,
        "ts_us": ts_us,
        "principal_kind": "system",
        "response_model": replica.base_model,
        "replica_id": replica.id,
        "entity_type": "replica",
        "entity_id": replica.id,
    }


def _about(replica: Replica) -> Mapping[str, object]:
    return {
        "epoch": replica.epoch,
        "accelerator": replica.accelerator,
        "devices": replica.devices,
    }
