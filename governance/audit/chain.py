"""The chain of one writer: packs what waits into frames, each record behind the one before."""

from __future__ import annotations

from dataclasses import dataclass, field

from governance.audit.canonical import NO_HASH, encode_ordered
from governance.audit.content import pack_cell
from governance.audit.frames import FrameType, pack_frame
from governance.audit.hashing import sha256_of
from governance.audit.pending import Item


@dataclass(slots=True)
class Chain:
    """Where the chain stands: durable, or as of the group in hand."""

    seq: int = 0
    leaf: str = NO_HASH
    frames: list[bytes] = field(default_factory=list)


def link(chain: Chain, item: Item) -> None:
    """Pack an item's frames and put its record at the end of the chain.

    Raises:
        ValueError: The record is not JSON; the chain is as before.
    """
    frames = [pack_frame(FrameType.CELL, pack_cell(cell)) for cell in item.cells]
    record = item.record
    if record is not None:
        record["writer_seq"] = chain.seq + 1
        record["prev_hash"] = chain.leaf
        payload = encode_ordered(record)
        frames.append(pack_frame(FrameType.RECORD, payload))
        chain.seq += 1
        chain.leaf = sha256_of(b"\0", payload).hexdigest()
    chain.frames += frames
