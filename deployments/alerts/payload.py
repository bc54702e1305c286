"""What a webhook is told: one message for what an account crossed, versioned JSON.

    {"type": "gatehouse.budget.threshold", "version": 1, "timestamp": "2026-12-01T09:30:00.000000Z",
     "data": {"alert": "hr:gpu_us:1764543600000000:80", "account": "hr", "quantity": "gpu_us",
              "threshold_percent": 80, "thresholds_percent": [50, 80],
              "spent": 11664000000, "limit": 14400000000,
              "window": "day", "window_start": "...", "reset": "...", "owner": "...",
              "text": "hr has used 81% ..."}}

``spent`` and ``limit`` are charged device-microseconds where ``quantity`` is ``gpu_us``, and tokens
where it is ``tokens``. ``limit`` is what may be used in the window without borrowing. ``alert`` is
the ``entity_id`` of the event ``budget.threshold`` in the audit trail. Fields may be added to a
version, none is removed or changed. The message names accounts, never a person.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson

VERSION = 1
THRESHOLD = "gatehouse.budget.threshold"
TEST = "gatehouse.alerts.test"
MAX_BODY_BYTES = 20_000
"""No message is longer; the specification advises receivers to expect so much."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WINDOWS = {"fiscal-month": "fiscal month"}


@dataclass(frozen=True, slots=True)
class Message:
    """One message, and which waiting alerts it tells of."""

    id: str
    """Value of ``webhook-id``: the same for each attempt, also after a restart."""
    account: str
    body: bytes
    seqs: tuple[int, ...]
    """Numbers of its alerts in the ledger's table, rising."""
    ts_us: int
    """When the newest of them was crossed."""
    alert: Mapping[str, Any]
    """The highest of them, as the ledger gave it."""

    @property
    def group(self) -> tuple[str, str, int]:
        """What its alerts have in common: account, quantity, start of the window."""
        return _group(self.alert)


def messages(rows: Iterable[tuple[int, Mapping[str, Any]]]) -> list[Message]:
    """Messages for waiting alerts, in the order of the first alert of each.

    Several thresholds that one account crossed in one window become one message, of the highest.

    Args:
        rows: As ``BudgetLedger.alerts`` gives them: number and alert, oldest first.
    """
    groups: dict[tuple[str, str, int], list[tuple[int, Mapping[str, Any]]]] = {}
    for seq, alert in rows:
        groups.setdefault(_group(alert), []).append((seq, alert))
    found = []
    for each in groups.values():
        highest = max((alert for _, alert in each), key=lambda alert: int(alert["threshold"]))
        thresholds = sorted({int(alert["threshold"]) for _, alert in each})
        found.append(
            Message(
                message_id(highest["id"]),
                highest["account"],
                threshold_body(highest, thresholds),
                tuple(seq for seq, _ in each),
                max(int(alert["ts_us"]) for _, alert in each),
                highest,
            )
        )
    return found


def message_id(alert_id: str) -> str:
    """``webhook-id`` of an alert: of its id, with nothing in it that a header or ``.`` confuses."""
    return "alert_" + hashlib.sha256(alert_id.encode()).hexdigest()[:32]


def threshold_body(alert: Mapping[str, Any], thresholds: Iterable[int]) -> bytes:
    """The body for a threshold.

    Args:
        alert: As the ledger gives it.
        thresholds: All thresholds, per cent, that the message tells of.
    """
    data = {
        "alert": alert["id"],
        "account": alert["account"],
        "quantity": alert["quantity"],
        "threshold_percent": alert["threshold"],
        "thresholds_percent": list(thresholds),
        "spent": alert["spent"],
        "limit": alert["limit"],
        "window": alert["window"],
        "window_start": _moment(alert["window_start_us"]),
        "reset": _moment(alert["reset_us"]),
        "owner": alert["owner"],
        "text": _text(alert),
    }
    return _body(THRESHOLD, alert["ts_us"], data)


def check_body(now_us: int, note: str) -> bytes:
    """The body of a message that only tries out whether messages arrive.

    Args:
        now_us: Wall clock, microseconds.
        note: For whoever reads it.
    """
    return _body(TEST, now_us, {"text": note})


def _body(kind: str, ts_us: int, data: Mapping[str, Any]) -> bytes:
    return orjson.dumps(
        {"type": kind, "version": VERSION, "timestamp": _moment(ts_us), "data": data}
    )


def _text(alert: Mapping[str, Any]) -> str:
    """One sentence for people; integers only on the way."""
    spent, limit = int(alert["spent"]), int(alert["limit"])
    used = spent * 100 // limit if limit else 100
    if alert["quantity"] == "gpu_us":
        amount = f"GPU time ({spent // 1_000_000:,} of {limit // 1_000_000:,} s)"
    else:
        amount = f"tokens ({spent:,} of {limit:,})"
    window = _WINDOWS.get(alert["window"], alert["window"])
    return (
        f"{alert['account']} has used {used}% of its {amount} for this {window}; the budget is"
        f" fresh again at {_moment(alert['reset_us'])[:19]}Z."
    )


def _group(alert: Mapping[str, Any]) -> tuple[str, str, int]:
    return alert["account"], alert["quantity"], int(alert["window_start_us"])


def _moment(at_us: int) -> str:
    """RFC 3339 in UTC, microseconds."""
    return f"{_EPOCH + timedelta(microseconds=at_us):%Y-%m-%dT%H:%M:%S.%f}Z"
