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
from governance.budget.state import METERS, Account, Override, Replica, Reservation
from governance.budget.tree import Node, department_of
from governance.types import Amount

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
        "department": department_of(reservation.account),
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
        "department": department_of(override.account),
        "budget_account": override.account,
        "entity_type": "budget",
        "entity_id": override.account,
        "state": state,
        "reason_code": reason,
        "due_us": override.expires_us,
        "detail": detail(gpu_us=override.gpu_us, tokens=override.tokens),
    }


def budgets_loaded(
    digest: str, before: str | None, now_us: int, by: str | None = None, reason: str | None = None
) -> Event:
    """The ledger took up a budgets file; ``by`` where somebody applied it to a running one."""
    return {
        "event_type": EventType.BUDGETS_LOADED.value,
        "ts_us": now_us,
        "principal_kind": "system" if by is None else None,
        "subject_key": by,
        "operation": None if by is None else "budget.apply",
        "reason_code": reason,
        "entity_type": "budgets",
        "entity_id": digest,
        "detail": detail(digest=digest, before=before),
    }


def transferred(
    source: str, target: str, moved: Amount, until_us: int, by: str, reason: str, now_us: int
) -> Event:
    """Budget was moved from one account to another."""
    return {
        "event_type": EventType.BUDGET_TRANSFER.value,
        "ts_us": now_us,
        "subject_key": by,
        "operation": "budget.transfer",
        "department": department_of(target),
        "budget_account": target,
        "entity_type": "budget",
        "entity_id": source,
        "reason_code": reason,
        "due_us": until_us,
        "detail": detail(source=source, target=target, gpu_us=moved.gpu_us, tokens=moved.tokens),
    }


def window_ended(account: Account, limits: tuple[int | None, int | None]) -> Event:
    """What an account spent in a window that is over; later corrections are not in it."""
    return {
        "event_type": EventType.BUDGET_WINDOW.value,
        "ts_us": account.start_us,
        "ts_end_us": account.end_us,
        "principal_kind": "system",
        "department": department_of(account.name),
        "budget_account": account.name,
        "entity_type": "budget",
        "entity_id": account.name,
        "detail": detail(
            window=account.window.split()[0],
            gpu_us=account.spent.gpu_us,
            tokens=account.spent.tokens,
            limit_us=limits[0],
            limit_tokens=limits[1],
            moved_us=account.moved.gpu_us,
            moved_tokens=account.moved.tokens,
        ),
    }


def alert(
    node: Node,
    account: Account,
    quantity: str,
    threshold: int,
    spent: int,
    limit: int,
    now_us: int,
) -> dict[str, Any]:
    """An account crossed a threshold; ``id`` is the same for the same crossing."""
    return {
        "id": f"{account.name}:{quantity}:{account.start_us}:{threshold}",
        "account": account.name,
        "quantity": quantity,
        "threshold": threshold,
        "spent": spent,
        "limit": limit,
        "window": account.window.split()[0],
        "window_start_us": account.start_us,
        "reset_us": account.end_us,
        "owner": node.owner,
        "ts_us": now_us,
    }


def threshold(alert: Mapping[str, Any]) -> Event:
    """The same, for the record."""
    return {
        "event_type": EventType.BUDGET_THRESHOLD.value,
        "ts_us": alert["ts_us"],
        "principal_kind": "system",
        "department": department_of(alert["account"]),
        "budget_account": alert["account"],
        "entity_type": "budget",
        "entity_id": alert["id"],
        "due_us": alert["reset_us"],
        "detail": detail(
            quantity=alert["quantity"],
            threshold=alert["threshold"],
            spent=alert["spent"],
            limit=alert["limit"],
        ),
    }


def alert_lost(alert: Mapping[str, Any], reason: str, now_us: int) -> Event:
    """An alert could not be delivered, and is given up."""
    return {
        **threshold(alert),
        "ts_us": now_us,
        "state": "undelivered",
        "reason_code": reason,
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
