"""Reading write-ahead logs: every record that was made durable, and a loud word on any that is not.

A segment is read group by group to the first frame that is not valid. What that means depends on
what follows (``governance.audit.frames.later_group``):

- nothing valid of a later group: the **torn tail** of a write that was never acknowledged, or the
  end. It is dropped and, in the last segment of a dead writer, reported.
- a later group: **damage** to what was durable. Never skipped: a fault, for people.

A group is taken whole or not at all. The one loss that cannot be told from a torn tail is damage to
the very last group before a crash; every closed segment ends in a group of its own (END), so this
concerns at most one group per death of a process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson

from governance.audit.canonical import leaf_hash
from governance.audit.frames import (
    HEADER_BYTES,
    FrameType,
    SegmentHeader,
    later_group,
    read_end,
    read_frame,
    read_group,
)

SUFFIX: Final = ".wal"
_NAME = re.compile(r"(\d{1,9})-(\d{1,12})\.wal")


@dataclass(frozen=True, slots=True)
class WalFault:
    """Something in a log that is not as a writer leaves it."""

    path: str
    offset: int
    reason: str


@dataclass(slots=True)
class Segment:
    """What a segment file holds."""

    path: Path
    header: SegmentHeader | None
    """``None`` for a file that was prepared and never used, or whose header is damaged."""
    frames: list[tuple[FrameType, bytes]] = field(default_factory=list)
    """RECORD and CELL frames in order."""
    end: tuple[int, str] | None = None
    """Last sequence number and leaf hash, if the segment was closed."""
    torn_bytes: int = 0
    """Bytes of a write that was cut off; 0 where the valid part is followed by zeros."""
    fault: WalFault | None = None
    """Damage; ``frames`` then holds what stands before it."""


def segment_files(folder: Path) -> list[tuple[int, int, Path]]:
    """Segment files of one writer as (epoch, number, path), in order."""
    found = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match is not None:
            found.append((int(match[1]), int(match[2]), path))
    return sorted(found)


def is_segment(path: Path) -> bool:
    """Whether a file is named like a segment."""
    return _NAME.fullmatch(path.name) is not None


def segment_name(epoch: int, number: int) -> str:
    """File name of a segment."""
    return f"{epoch}-{number}{SUFFIX}"


def read_header(path: Path) -> SegmentHeader | None:
    """Header of a segment file; ``None`` if it has none or is gone."""
    try:
        with path.open("rb") as file:
            return SegmentHeader.unpack(file.read(HEADER_BYTES))
    except FileNotFoundError:
        return None


def read_segment(path: Path) -> Segment:
    """Read a segment file, damaged or not.

    Raises:
        OSError: It cannot be read.
    """
    data = path.read_bytes()
    header = SegmentHeader.unpack(data)
    if header is None:
        segment = Segment(path, None)
        if data.count(0) != len(data):
            # Groups behind a header prove damage; alone, it is a write that was cut off.
            if data.count(0, HEADER_BYTES) != max(0, len(data) - HEADER_BYTES):
                segment.fault = WalFault(str(path), 0, "the header is damaged")
            else:
                segment.torn_bytes = HEADER_BYTES
        return segment
    segment = Segment(path, header)
    _read_groups(data, header, segment)
    return segment


def _read_groups(data: bytes, header: SegmentHeader, segment: Segment) -> None:
    offset, number = HEADER_BYTES, 0
    while segment.end is None:
        group = _whole_group(data, offset, header.segment_id, number + 1)
        if group is None:
            break
        frames, offset = group
        number += 1
        if frames and frames[-1][0] is FrameType.END:
            segment.end = read_end(frames.pop()[1])
        segment.frames += frames
    clean = data.count(0, offset) == len(data) - offset
    if clean:
        return
    if segment.end is not None:
        segment.fault = WalFault(str(segment.path), offset, "bytes follow the end of the segment")
        return
    later = later_group(data, offset, header.segment_id, number + 1)
    if later is not None:
        segment.fault = WalFault(
            str(segment.path), offset, f"group {number + 1} is damaged: a later one is at {later}"
        )
    else:
        segment.torn_bytes = len(data[offset:].rstrip(b"\0"))


def _whole_group(
    data: bytes, offset: int, segment_id: bytes, number: int
) -> tuple[list[tuple[FrameType, bytes]], int] | None:
    """Frames of the group at an offset, and where it ends; ``None`` unless all of it is valid."""
    frame = read_frame(data, offset)
    if frame is None or frame[0] is not FrameType.GROUP:
        return None
    group = read_group(frame[1], segment_id)
    if group is None or group[0] != number:
        return None
    end = offset + group[1]
    at = frame[2]
    frames: list[tuple[FrameType, bytes]] = []
    while at < end:
        frame = read_frame(data, at)
        if frame is None or frame[2] > end or frame[0] is FrameType.GROUP:
            return None
        frames.append((frame[0], frame[1]))
        at = frame[2]
    return (frames, end) if at == end else None


def read_records(
    wal_root: Path, on_fault: Callable[[WalFault], None] | None = None
) -> Iterator[dict[str, Any]]:
    """Every record that stands in the logs of all writers and is not deleted yet.

    Safe beside running writers and the sealer; reads one segment into memory at a time. Records
    come as parsed canonical bytes (32-byte values as hex), ``leaf_hash`` included, in the order of
    each writer's chain. The newest may not be acknowledged yet.

    NOTE: the sealer deletes a segment after its records are in Parquet. So read this first and list
    Parquet afterwards: then no record is missed, and one may come twice (same ``leaf_hash``).

    Args:
        wal_root: Folder of the writers' folders; may be missing.
        on_fault: Hears of damage, and of records that are not JSON; the readable rest is given.
    """
    try:
        folders = sorted(path for path in wal_root.iterdir() if path.is_dir())
    except FileNotFoundError:
        return
    for folder in folders:
        yield from read_folder(folder, on_fault)


def read_folder(
    folder: Path, on_fault: Callable[[WalFault], None] | None = None
) -> Iterator[dict[str, Any]]:
    """``read_records`` for one writer's folder."""
    try:
        files = segment_files(folder)
    except FileNotFoundError:
        return
    for _epoch, _number, path in files:
        yield from _records_of(path, on_fault)


def _records_of(
    path: Path, on_fault: Callable[[WalFault], None] | None
) -> Iterator[dict[str, Any]]:
    try:
        if read_header(path) is None and on_fault is None:
            return
        segment = read_segment(path)
    except FileNotFoundError:
        return
    if segment.fault is not None and on_fault is not None:
        on_fault(segment.fault)
    for kind, payload in segment.frames:
        if kind is not FrameType.RECORD:
            continue
        try:
            record = orjson.loads(payload)
            record["leaf_hash"] = leaf_hash(payload)
        except (ValueError, TypeError):
            if on_fault is not None:
                on_fault(WalFault(str(path), 0, "a record is not a JSON object"))
            continue
        yield record
