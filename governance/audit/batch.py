"""From a segment to what is sealed of it: everything checked, nothing dropped.

A break in the chain (``prev_hash``, a gap in ``writer_seq``, another writer's record, an END that
says otherwise) is a ``SegmentFault``: the segment stays where it is, for people. A record or cell
that is whole and in its place in the chain but does not fit the schema goes into quarantine: it
keeps its leaf in the tree, and its bytes.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from governance.audit.arrow import content_table, table_of
from governance.audit.canonical import parse_ordered
from governance.audit.content import Cell, unpack_cell
from governance.audit.frames import FrameType
from governance.audit.record import MAX_TS_US, check_record
from governance.audit.schema import CANONICAL, EventType
from governance.audit.segments import Segment, WalFault
from governance.audit.ulid import ULID

_MAX_PART = 2**31 - 1

Row = tuple[Any, ...]
"""Values of a record: a sixth of the memory of a dictionary with 88 keys."""
_TYPE, _ID, _PARENT, _SEQ, _PARTS, _FINDINGS = (
    CANONICAL.index(name)
    for name in (
        "event_type", "event_id", "parent_event_id", "writer_seq", "parts", "findings"
    )
)  # fmt: skip


class SegmentFault(RuntimeError):
    """A segment is not what its writer can have left; ``fault`` says where and what."""

    def __init__(self, fault: WalFault) -> None:
        super().__init__(f"{fault.path} at {fault.offset}: {fault.reason}")
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A frame that does not fit the schema."""

    kind: str
    reason: str
    payload: bytes
    seq: int | None = None
    leaf: bytes | None = None


@dataclass(slots=True)
class Batch:
    """The checked content of one segment."""

    first_seq: int
    prev_leaf: str
    last_seq: int
    last_leaf: str
    leaves: list[bytes] = field(default_factory=list)
    """Of all records in the order of the chain, those in quarantine included."""
    rows: list[Row] = field(default_factory=list)
    """Of each record that fits, its values in the order of ``CANONICAL``."""
    cells: list[Cell] = field(default_factory=list)
    quarantine: list[Quarantined] = field(default_factory=list)
    table: Any = None
    """The records as Arrow."""
    content: Any = None
    """The cells as Arrow."""

    def ended(self, *types: EventType) -> set[str]:
        """The decideds whose end, of one of the types, stands here."""
        return {
            row[_PARENT] for row in self.rows if row[_TYPE] in types and row[_PARENT] is not None
        }

    def decided(self, without: Container[str]) -> Iterator[dict[str, Any]]:
        """The ``inference.decided``, but for those with the given ids."""
        for row in self.rows:
            if row[_TYPE] == EventType.DECIDED and row[_ID] not in without:
                yield dict(zip(CANONICAL, row, strict=True))


def check_segment(segment: Segment, seq: int, leaf: str) -> Batch:
    """Check a segment against the place where the chain stands.

    Args:
        segment: As read, without a fault.
        seq: Last sequence number before it.
        leaf: Leaf hash of that record.

    Raises:
        SegmentFault: The chain does not hold.
    """
    header = segment.header
    assert header is not None
    if header.first_seq != seq + 1 or header.prev_hash != leaf:
        raise _fault(segment, "does not continue the chain: records are missing before it")
    batch = Batch(first_seq=seq + 1, prev_leaf=leaf, last_seq=seq, last_leaf=leaf)
    good: list[tuple[bytes, bytes, Row]] = []
    for kind, payload in segment.frames:
        if kind is FrameType.CELL:
            _take_cell(batch, payload)
        else:
            _take_record(segment, batch, payload, good)
    if segment.end is not None and segment.end != (batch.last_seq, batch.last_leaf):
        raise _fault(segment, "its end names another last record")
    _fill_tables(batch, good)
    return batch


def _take_cell(batch: Batch, payload: bytes) -> None:
    try:
        cell = unpack_cell(payload)
        if (
            cell.part > _MAX_PART
            or cell.size_bytes > _MAX_PART
            or cell.ts_us >= MAX_TS_US
            or ULID.fullmatch(cell.event_id) is None
        ):
            raise ValueError("a field is out of range")
    except ValueError as error:
        batch.quarantine.append(Quarantined("cell", str(error), payload))
    else:
        batch.cells.append(cell)


def _take_record(
    segment: Segment,
    batch: Batch,
    payload: bytes,
    good: list[tuple[bytes, bytes, Row]],
) -> None:
    seq = batch.last_seq + 1
    leaf = sha256(b"\0" + payload).digest()
    try:
        record = parse_ordered(payload)
    except ValueError as error:
        batch.quarantine.append(Quarantined("record", str(error), payload, seq, leaf))
    else:
        _check_place(segment, batch, record)
        good.append((payload, leaf, tuple(record.values())))
    batch.leaves.append(leaf)
    batch.last_seq, batch.last_leaf = seq, leaf.hex()


def _check_place(segment: Segment, batch: Batch, record: Mapping[str, Any]) -> None:
    header = segment.header
    assert header is not None
    if record["writer_seq"] != batch.last_seq + 1:
        raise _fault(segment, f"a gap: no record {batch.last_seq + 1}")
    if record["prev_hash"] != batch.last_leaf:
        raise _fault(segment, f"record {batch.last_seq + 1} does not continue the chain")
    if record["writer_id"] != header.writer_id or record["writer_epoch"] != header.epoch:
        raise _fault(segment, f"record {batch.last_seq + 1} is another writer's")


def _fill_tables(batch: Batch, good: list[tuple[bytes, bytes, Row]]) -> None:
    good = [item for item in good if not _nested(item[2]) or _fits(batch, item)]
    try:
        batch.table = _table(good)
    except ValueError:
        good = [item for item in good if _fits(batch, item)]
        batch.table = _table(good)
    batch.quarantine.sort(key=lambda item: item.seq or 0)
    batch.rows = [row for _p, _l, row in good]
    batch.content = content_table(batch.cells)


def _nested(row: Row) -> bool:
    """Whether it has structs: Arrow fills in what a struct leaves out, the check does not."""
    return bool(row[_PARTS] or row[_FINDINGS])


def _table(good: list[tuple[bytes, bytes, Row]]) -> Any:
    return table_of([row for _p, _l, row in good], [leaf for _p, leaf, _r in good])


def _fits(batch: Batch, item: tuple[bytes, bytes, Row]) -> bool:
    """Check one record by itself; what does not fit goes into quarantine."""
    payload, leaf, row = item
    try:
        check_record(dict(zip(CANONICAL, row, strict=True)))
        table_of([row], [leaf])  # Whatever Arrow refuses beyond must not stop the rest.
    except ValueError as error:
        batch.quarantine.append(Quarantined("record", str(error), payload, row[_SEQ], leaf))
        return False
    return True


def _fault(segment: Segment, reason: str) -> SegmentFault:
    return SegmentFault(WalFault(str(segment.path), 0, reason))
