"""How much of the trail is sealed, and by whom it was written; from names of files and the logs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from governance.audit.reading import OnFault, read_logs, sealed_files


@dataclass(slots=True)
class WriterStatus:
    """One writer."""

    writer_id: str
    epoch: int = 0
    """Its last start."""
    sealed: int = 0
    unsealed: int = 0
    last_seq: int = 0
    """Last place in the chain of its last start."""


@dataclass(frozen=True, slots=True)
class TrailStatus:
    """The whole trail."""

    files: int
    sealed: int
    unsealed: int
    oldest_unsealed_s: float | None
    """Age of the oldest event that is only in a log, in seconds."""
    writers: tuple[WriterStatus, ...]

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self)


def trail_status(evidence: Path, state: Path, now_us: int, on_fault: OnFault) -> TrailStatus:
    """Count; each event once, whether it stands in a log, a file or both.

    Args:
        evidence: Root of the evidence.
        state: Root of the state.
        now_us: Time, microseconds since 1970.
        on_fault: Told what in the logs cannot be read.
    """
    logged = [
        (record.get("writer_id"), record.get("writer_epoch"), record.get("writer_seq"),
         record.get("ts_us"))
        for record in read_logs(state, on_fault)
    ]  # fmt: skip
    files = sealed_files(evidence)
    writers: dict[str, WriterStatus] = {}
    until: dict[tuple[str, int], int] = {}

    def note(writer_id: str, epoch: int, seq: int) -> WriterStatus:
        writer = writers.setdefault(writer_id, WriterStatus(writer_id))
        if (epoch, seq) > (writer.epoch, writer.last_seq):
            writer.epoch, writer.last_seq = epoch, seq
        return writer

    # A segment that runs over midnight has several files, of one name.
    segments = {(f.writer_id, f.writer_epoch, f.first_seq, f.last_seq) for f in files}
    for name, start, first, last in segments:
        note(name, start, last).sealed += last - first + 1
        until[name, start] = max(until.get((name, start), 0), last)
    waiting: list[int] = []
    for writer_id, epoch, seq, ts_us in logged:
        if not (
            isinstance(writer_id, str)
            and isinstance(epoch, int)
            and isinstance(seq, int)
            and isinstance(ts_us, int)
        ):
            on_fault("a record in the logs has no place in a chain")
        elif seq > until.get((writer_id, epoch), 0):
            note(writer_id, epoch, seq).unsealed += 1
            waiting.append(ts_us)
    ordered = sorted(writers.values(), key=lambda writer: writer.writer_id)
    return TrailStatus(
        files=len(files),
        sealed=sum(writer.sealed for writer in ordered),
        unsealed=sum(writer.unsealed for writer in ordered),
        oldest_unsealed_s=(now_us - min(waiting)) / 1e6 if waiting else None,
        writers=tuple(ordered),
    )
