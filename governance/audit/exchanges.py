"""Exchanges that were decided and have no end yet, and the end that the sealer writes for them.

An ``inference.aborted`` takes over who asked for what from its ``inference.decided``. Its id is
computed from the decided's, so a second one could never pass for another event. The client of a
gateway that died saw its connection break and no error of ours: ``error_code`` is null, ``status``
500 stands for a failure on our side, and ``reason_code`` says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final

from governance.audit.content import Cell, joined_commit
from governance.audit.schema import COLUMNS, EventType
from governance.audit.ulid import ulid_ms, ulid_of

_COPIED: Final = (
    *(c.name for c in COLUMNS if c.group in ("links", "who", "what", "data", "decision")),
    "ts_us",
    "prompt_commit",
    "prompt_bytes",
    "dek_id",
    "budget_account",
    "priority_class",
    "reserved_us",
)

ENDS: Final = (EventType.COMPLETED, EventType.ABORTED)
"""Types of the records that end a decided request."""


@dataclass(slots=True)
class Exchange:
    """One decided request."""

    columns: dict[str, Any]
    """What its end takes over."""
    parts: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Commitment and length of each output cell found, by part."""


class OpenExchanges:
    """Decided requests of one writer that have no end, by event id."""

    def __init__(self) -> None:
        self.by_id: dict[str, Exchange] = {}

    def record(self, record: Mapping[str, Any]) -> None:
        """Take a record in, in the order of the chain."""
        if record["event_type"] == EventType.DECIDED:
            columns = {name: record[name] for name in _COPIED if record[name] is not None}
            self.by_id[record["event_id"]] = Exchange(columns)
        elif record["parent_event_id"] is not None and ends(record):
            self.by_id.pop(record["parent_event_id"], None)

    def cell(self, cell: Cell) -> None:
        """Take a cell in; of a request that is open and has begun to answer, note the part."""
        exchange = self.by_id.get(cell.event_id) if cell.kind == "output" else None
        if exchange is not None:
            exchange.parts[cell.part] = (cell.commit.hex(), cell.size_bytes)

    def to_json(self) -> dict[str, Any]:
        """For a cursor."""
        return {
            event_id: {"columns": exchange.columns, "parts": sorted(exchange.parts.items())}
            for event_id, exchange in self.by_id.items()
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> OpenExchanges:
        """From a cursor."""
        exchanges = cls()
        for event_id, item in value.items():
            parts = {int(part): (str(commit), int(size)) for part, (commit, size) in item["parts"]}
            exchanges.by_id[event_id] = Exchange(dict(item["columns"]), parts)
        return exchanges


def ends(record: Mapping[str, Any]) -> bool:
    """Whether a record is the end of the request that its ``parent_event_id`` names."""
    return record["event_type"] in ENDS


def aborted_event(event_id: str, exchange: Exchange, now_us: int) -> dict[str, Any]:
    """The end of a request whose writer died.

    Args:
        event_id: Id of its ``inference.decided``.
        exchange: What is known of it.
        now_us: When the death was noticed.
    """
    parts = [exchange.parts[part] for part in sorted(exchange.parts)]
    commits = [bytes.fromhex(commit) for commit, _size in parts]
    return {
        **exchange.columns,
        "event_id": aborted_id(event_id),
        "event_type": EventType.ABORTED.value,
        "parent_event_id": event_id,
        "ts_end_us": now_us,
        "response_commit": joined_commit(commits) if commits else None,
        "response_bytes": sum(size for _commit, size in parts),
        "gpu_us_method": "pending",
        "outcome": "aborted",
        "status": 500,
        "reason_code": "writer_lost",
    }


def aborted_id(event_id: str) -> str:
    """Event id of the ``inference.aborted`` of a decided: the same each time."""
    tail = sha256(b"inference.aborted\0" + event_id.encode()).digest()[:10]
    return ulid_of(ulid_ms(event_id) * 1000, tail)
