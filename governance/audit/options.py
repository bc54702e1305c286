"""What a writer can be told, and what it tells of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WalOptions:
    """Sizes and times of a log."""

    segment_bytes: int = 16 << 20
    """A segment is closed once it has grown to this."""
    segment_age_us: int = 30_000_000
    """A segment that has records is closed at this age, so that it can be sealed. Its records are
    durable and can be queried before; a shorter age makes more and smaller Parquet files."""
    first_bytes: int = 1 << 18
    """What a segment is made with. Larger spares a busy writer growth; each close of a quiet
    writer's segment writes this much in zeros."""
    queue_records: int = 8192
    """Waiting events at which further ones are refused."""
    queue_bytes: int = 128 << 20
    """Waiting ciphertext, in bytes, at which further events are refused."""
    group_records: int = 2048
    """Most events in one group."""
    group_bytes: int = 8 << 20
    """Ciphertext, in bytes, at which a group is full."""
    kept_for_ends: float = 0.125
    """Share of both limits that only ends of requests (``inference.completed``) may use: what was
    admitted has a place."""
    reserve_bytes: int | None = None
    """Free space below which no request is admitted, so that those under way can be recorded;
    ``None`` for 1 % of the disk or 256 MiB, the larger, but at most 10 % of the disk."""


@dataclass(slots=True)
class WriterStats:
    """Counts since the start; written by the writer's thread, read by anybody."""

    records: int = 0
    cells: int = 0
    bytes: int = 0
    """Bytes of the groups written."""
    syncs: int = 0
    """Groups, each with one sync."""
    sync_us: int = 0
    """Time in which groups were being written and synced."""
    segments: int = 0
    refused: int = 0
    """Events that were not recorded: no room, a full queue, a broken log."""
    queued: int = 0
    """Events waiting now."""
    last_error: str | None = None
    """Type and number of the last failure; never content."""
