"""Bytes of a write-ahead log: header of a segment, groups of frames.

All integers are little-endian. A segment file is

    header (256 bytes) | group | group | ... | zeros

and a **group** is what one write and one ``fdatasync`` made durable together: a GROUP frame and
the frames it announces. A **frame** is

    u32 length of payload | u32 CRC | u8 type | payload

CRC is CRC-32 (IEEE 802.3, as in zlib) over type and payload. Types: 1 RECORD (canonical bytes),
2 CELL (``governance.audit.content.pack_cell``), 3 GROUP (segment id, u64 number of the group within
the segment from 1, u32 length of all its frames, itself included), 4 END (u64 last writer_seq,
leaf hash of that record): nothing follows, the segment is closed. Zeros are no frame, because the
CRC of a zero type is not zero.

**Header**: ``GATEWAL1`` | u16 length of the writer id | 64 bytes writer id, zero-padded | u32 epoch
| u64 number of the segment | u64 writer_seq of its first record | 32 bytes leaf hash of the record
before | 16 random bytes, the segment id | i64 microseconds since 1970 UTC | u32 CRC-32 of all
before it | zeros. A file whose header is zeros was prepared and never used.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final
from zlib import crc32

MAGIC: Final = b"GATEWAL1"
HEADER_BYTES: Final = 256
SEGMENT_ID_BYTES: Final = 16
FRAME_OVERHEAD_BYTES: Final = 9
MAX_PAYLOAD_BYTES: Final = 1 << 28
"""Longer lengths are damage, not frames."""

_HEADER = struct.Struct("<8sH64sIQQ32s16sq")
_CRC = struct.Struct("<I")
_FRAME = struct.Struct("<IIB")
_GROUP = struct.Struct("<16sQI")
_END = struct.Struct("<Q32s")
GROUP_BYTES: Final = FRAME_OVERHEAD_BYTES + _GROUP.size
END_BYTES: Final = FRAME_OVERHEAD_BYTES + _END.size


class FrameType(IntEnum):
    """What a frame holds."""

    RECORD = 1
    CELL = 2
    GROUP = 3
    END = 4


_TYPE_CRC: Final = {kind: crc32(bytes([kind])) for kind in FrameType}
_TYPES: Final = {int(kind): (kind, crc) for kind, crc in _TYPE_CRC.items()}


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """First 256 bytes of a segment."""

    writer_id: str
    epoch: int
    number: int
    """Place among the segments of the epoch, from 1."""
    first_seq: int
    """``writer_seq`` that its first record has, or would have."""
    prev_hash: str
    """Leaf hash of the record before the first, hex."""
    segment_id: bytes
    created_us: int

    def pack(self) -> bytes:
        """The header's bytes."""
        name = self.writer_id.encode()
        body = _HEADER.pack(
            MAGIC,
            len(name),
            name,
            self.epoch,
            self.number,
            self.first_seq,
            bytes.fromhex(self.prev_hash),
            self.segment_id,
            self.created_us,
        )
        return (body + _CRC.pack(crc32(body))).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> SegmentHeader | None:
        """The header at the start of ``data``; ``None`` if there is no whole, valid one."""
        if len(data) < HEADER_BYTES:
            return None
        (crc,) = _CRC.unpack_from(data, _HEADER.size)
        if crc32(data[: _HEADER.size]) != crc:
            return None
        magic, length, name, epoch, number, first_seq, prev, segment_id, created_us = (
            _HEADER.unpack_from(data)
        )
        if magic != MAGIC or length > len(name):
            return None
        return cls(
            writer_id=name[:length].decode(errors="replace"),
            epoch=epoch,
            number=number,
            first_seq=first_seq,
            prev_hash=prev.hex(),
            segment_id=segment_id,
            created_us=created_us,
        )


def pack_frame(kind: FrameType, payload: bytes) -> bytes:
    """A frame."""
    return _FRAME.pack(len(payload), crc32(payload, _TYPE_CRC[kind]), kind) + payload


def pack_group(segment_id: bytes, number: int, frames: bytes) -> bytes:
    """A group: the frames behind the frame that announces them."""
    head = _GROUP.pack(segment_id, number, GROUP_BYTES + len(frames))
    return pack_frame(FrameType.GROUP, head) + frames


def pack_end(last_seq: int, last_hash: str) -> bytes:
    """The frame that closes a segment."""
    return pack_frame(FrameType.END, _END.pack(last_seq, bytes.fromhex(last_hash)))


def read_frame(data: bytes, offset: int) -> tuple[FrameType, bytes, int] | None:
    """The frame at an offset: its type, payload, and where the next begins.

    ``None`` if there is no whole, valid one.
    """
    start = offset + FRAME_OVERHEAD_BYTES
    if start > len(data):
        return None
    length, crc, kind = _FRAME.unpack_from(data, offset)
    end = start + length
    found = _TYPES.get(kind)
    if length > MAX_PAYLOAD_BYTES or end > len(data) or found is None:
        return None
    payload = data[start:end]
    if crc32(payload, found[1]) != crc:
        return None
    return found[0], payload, end


def read_group(payload: bytes, segment_id: bytes) -> tuple[int, int] | None:
    """Number and length of the group that a GROUP frame announces, if it is of this segment."""
    if len(payload) != _GROUP.size:
        return None
    found, number, length = _GROUP.unpack(payload)
    return (number, length) if found == segment_id else None


def read_end(payload: bytes) -> tuple[int, str] | None:
    """Last sequence number and leaf hash that an END frame states."""
    if len(payload) != _END.size:
        return None
    seq, leaf = _END.unpack(payload)
    return seq, leaf.hex()


def later_group(data: bytes, offset: int, segment_id: bytes, number: int) -> int | None:
    """Where, beyond ``offset``, a whole header of a group after ``number`` stands.

    A group is written only after the one before is durable. So a later one proves that what is
    unreadable before it was durable once: damage, not a write that a crash cut off.
    """
    at = data.find(segment_id, offset)
    while at >= 0:
        start = at - FRAME_OVERHEAD_BYTES
        frame = read_frame(data, start) if start >= 0 else None
        if frame is not None and frame[0] is FrameType.GROUP:
            group = read_group(frame[1], segment_id)
            if group is not None and group[0] > number:
                return start
        at = data.find(segment_id, at + 1)
    return None
