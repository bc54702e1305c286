"""Logs under damage: every acknowledged group is given back, or the damage is named."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from governance.audit.frames import (
    HEADER_BYTES,
    FrameType,
    SegmentHeader,
    pack_end,
    pack_frame,
    pack_group,
)
from governance.audit.segments import read_segment

ID = bytes(range(16))
HEADER = SegmentHeader("gw-1", 3, 7, 100, "ab" * 32, ID, 5)

payloads = st.binary(max_size=60) | st.just(ID)
groups = st.lists(st.lists(payloads, min_size=1, max_size=4), min_size=1, max_size=5)
hostile = st.lists(
    st.lists(payloads | st.just(pack_group(ID, 99, b"")), min_size=1, max_size=4), max_size=5
)
"""Also payloads that imitate a group, as if the segment's random id could be guessed."""


def build(found: list[list[bytes]], *, closed: bool) -> tuple[bytes, list[int]]:
    """A segment and where each of its groups ends."""
    data, ends = HEADER.pack(), []
    for number, group in enumerate(found, 1):
        frames = b"".join(pack_frame(FrameType.RECORD, payload) for payload in group)
        data += pack_group(ID, number, frames)
        ends.append(len(data))
    if closed:
        data += pack_group(ID, len(found) + 1, pack_end(3, "cd" * 32))
        ends.append(len(data))
    return data, ends


class Scratch:
    """A file to read."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp()) / "3-7.wal"

    def read(self, data: bytes):  # type: ignore[no-untyped-def]
        self.path.write_bytes(data)
        return read_segment(self.path)


scratch = Scratch()


def prefix(found: list[list[bytes]], count: int) -> list[tuple[FrameType, bytes]]:
    return [(FrameType.RECORD, payload) for group in found[:count] for payload in group]


@settings(max_examples=60, deadline=None)
@given(hostile, st.booleans(), st.integers(0, 300))
def test_a_sound_segment_is_read_whole(found: list[list[bytes]], closed: bool, zeros: int) -> None:
    data, _ends = build(found, closed=closed)
    segment = scratch.read(data + bytes(zeros))
    assert segment.fault is None
    assert segment.torn_bytes == 0
    assert segment.header == HEADER
    assert segment.frames == prefix(found, len(found))
    assert segment.end == ((3, "cd" * 32) if closed else None)


@settings(max_examples=8, deadline=None)
@given(groups, st.integers(0, 64))
def test_cut_off_at_every_byte(found: list[list[bytes]], zeros: int) -> None:
    data, ends = build(found, closed=False)
    for cut in range(HEADER_BYTES, len(data)):
        left = data[:cut] + bytes(zeros)
        segment = scratch.read(left)
        # Zeros that were cut off and the zeros of the segment are the same.
        whole = sum(left[:end] == data[:end] for end in ends)
        assert segment.fault is None
        assert segment.frames == prefix(found, whole)
        torn = left[ends[whole - 1] if whole else HEADER_BYTES :]
        assert segment.torn_bytes == len(torn.rstrip(b"\0"))


@settings(max_examples=150, deadline=None)
@given(groups, st.booleans(), st.data())
def test_a_flipped_bit_is_named_or_costs_the_last_group_alone(
    found: list[list[bytes]], closed: bool, data: st.DataObject
) -> None:
    sound, ends = build(found, closed=closed)
    at = data.draw(st.integers(0, len(sound) - 1))
    bit = data.draw(st.integers(0, 7))
    changed = bytearray(sound + bytes(40))
    changed[at] ^= 1 << bit
    segment = scratch.read(bytes(changed))
    if at < HEADER_BYTES:
        # Behind the checksum of the header nothing is read from it.
        assert segment.fault is not None or segment.frames == prefix(found, len(found))
        return
    hit = next(index for index, end in enumerate(ends) if at < end)
    assert segment.frames == prefix(found, hit)
    if hit < len(ends) - 1:
        assert segment.fault is not None
        assert "damaged" in segment.fault.reason
    else:
        assert segment.torn_bytes > 0
        assert segment.end is None, "a closed segment without its end is a fault to the sealer"


@settings(max_examples=60, deadline=None)
@given(groups, st.data())
def test_a_last_write_of_which_only_some_sectors_arrived(
    found: list[list[bytes]], data: st.DataObject
) -> None:
    sound, ends = build(found, closed=False)
    start = ends[-2] if len(ends) > 1 else HEADER_BYTES
    changed = bytearray(sound)
    lost = data.draw(st.sets(st.integers(start, len(sound) - 1), min_size=1))
    for at in lost:
        changed[at] = 0
    segment = scratch.read(bytes(changed))
    assert segment.fault is None, "never acknowledged, so no damage"
    assert segment.frames[: len(prefix(found, len(ends) - 1))] == prefix(found, len(ends) - 1)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=600))
def test_junk_is_never_read_as_records(junk: bytes) -> None:
    assert scratch.read(junk).frames == []
    segment = scratch.read(HEADER.pack() + junk)
    assert segment.frames == []
    assert segment.torn_bytes == len(junk.rstrip(b"\0"))


def test_bytes_behind_the_end_are_a_fault() -> None:
    data, _ends = build([[b"a"]], closed=True)
    segment = scratch.read(data + bytes(10) + b"x")
    assert segment.fault is not None
    assert "follow the end" in segment.fault.reason


@pytest.mark.parametrize("number", [0, 2, 9])
def test_the_groups_of_another_segment_are_not_taken(number: int) -> None:
    data, _ends = build([[b"a"]], closed=False)
    foreign = pack_group(os.urandom(16), 2, pack_frame(FrameType.RECORD, b"foreign"))
    assert scratch.read(data + foreign).frames == prefix([[b"a"]], 1)
    repeated = pack_group(ID, number if number != 2 else 1, pack_frame(FrameType.RECORD, b"old"))
    segment = scratch.read(data + repeated)
    assert segment.frames == prefix([[b"a"]], 1)
    assert segment.torn_bytes or segment.fault
