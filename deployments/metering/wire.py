"""The datagrams in which an engine core tells its replica what it has metered.

    head    8 bytes core id, u64 each: steps, busy_ns, attributed_ns, unattributed_ns, overrun_ns,
            hooks_ns; u32 running, u16 number of rows
    row     u64 each: row, key, prefill_ns, decode_ns; u32 prefill_tokens, u32 cached_tokens,
            u8 ended

Native byte order: both ends are on one machine. Every figure is cumulative and each row stands
for itself, so a datagram may be lost, repeated or overtaken: a later one says it all again.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from deployments.metering.meter import Work

_HEAD = struct.Struct("=8sQQQQQQIH")
_ROW = struct.Struct("=QQQQIIB")

MAX_ROWS = 64
"""Rows of one datagram: 2.7 kB, far below what a Unix socket takes in one piece."""
MAX_DATAGRAM_BYTES = _HEAD.size + MAX_ROWS * _ROW.size
_U32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Totals:
    """A core's figures as a whole, in device-nanoseconds where not said otherwise."""

    core: bytes
    """8 random bytes a start."""
    steps: int = 0
    busy_ns: int = 0
    attributed_ns: int = 0
    unattributed_ns: int = 0
    overrun_ns: int = 0
    hooks_ns: int = 0
    """Nanoseconds of the core that metering took: of time in its hooks, of CPU for sending."""
    running: int = 0
    """Requests in the core."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request of the core; see ``meter.Work``."""

    row: int
    key: int
    prefill_ns: int
    decode_ns: int
    prefill_tokens: int
    cached_tokens: int
    ended: bool


def pack_row(row: Row) -> bytes:
    """One row."""
    return _ROW.pack(
        row.row,
        row.key,
        row.prefill_ns,
        row.decode_ns,
        min(row.prefill_tokens, _U32),
        min(row.cached_tokens, _U32),
        row.ended,
    )


def pack_work(work: Work) -> bytes:
    """What the meter knows of one request, as a row."""
    return pack_row(
        Row(
            work.row,
            work.key,
            work.prefill_ns,
            work.decode_ns,
            work.prefill_tokens,
            work.cached_tokens,
            work.ended,
        )
    )


def pack(totals: Totals, rows: Sequence[bytes]) -> bytes:
    """One datagram; at most ``MAX_ROWS`` rows, packed."""
    head = _HEAD.pack(
        totals.core,
        totals.steps,
        totals.busy_ns,
        totals.attributed_ns,
        totals.unattributed_ns,
        totals.overrun_ns,
        totals.hooks_ns,
        totals.running,
        len(rows),
    )
    return b"".join((head, *rows))


def unpack(datagram: bytes) -> tuple[Totals, list[Row]]:
    """Read a datagram.

    Raises:
        ValueError: It is not one of ours.
    """
    if len(datagram) < _HEAD.size:
        raise ValueError("short")
    *totals, count = _HEAD.unpack_from(datagram)
    if len(datagram) != _HEAD.size + count * _ROW.size:
        raise ValueError("length")
    rows = [
        Row(row, key, prefill, decode, computed, cached, bool(ended))
        for row, key, prefill, decode, computed, cached, ended in _ROW.iter_unpack(
            datagram[_HEAD.size :]
        )
    ]
    return Totals(*totals), rows
