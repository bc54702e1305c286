"""Seals write-ahead logs into evidence, and ends what dead writers left open.

One round (``seal_once``) looks at every writer's folder. Whose lock can be taken is dead: all its
segments are sealed. Of a living writer those are that a later segment follows. For each segment, in
order, each step durable before the next:

    check -> Parquet files -> manifest -> cursor -> delete the segment

Killed at any point, the next round repeats the step and finds it done or undone, never half; see
``governance.audit.evidence`` and ``governance.audit.cursor``. A fault (damage, a gap, a break in
the chain) stops the sealing of that writer alone; it is reported in every round, and nothing is
deleted.

**Aborted.** Once all of a dead writer is sealed, ``inference.aborted`` is written for each decided
without an end, through a log of the sealer's own, and then the folder is removed. Exactly once: an
end that stands in any log not sealed yet counts as written, and sealing an end strikes the decided
from its writer's cursor before the end's own segment is deleted. So at every moment the open
decided is in the cursor, or its end is in a log or in evidence.

One sealer works on a root at a time; a lock sees to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from governance.audit.batch import Batch, SegmentFault, check_segment
from governance.audit.canonical import NO_HASH
from governance.audit.cursor import CURSOR_NAME, Cursor, CursorError, rebuild
from governance.audit.evidence import check_sealed, publish_evidence
from governance.audit.exchanges import ENDS, aborted_event
from governance.audit.files import Files, Locked, is_temporary, take_lock
from governance.audit.schema import EventType
from governance.audit.segments import (
    Segment,
    WalFault,
    is_segment,
    read_folder,
    read_header,
    read_segment,
    segment_files,
)
from governance.audit.wal import EPOCH_NAME, LOCK_NAME
from governance.audit.writer import AuditWriter, WalOptions
from governance.errors import AuditUnavailable
from governance.ports import Clock
from governance.tracebacks import without_messages

log = logging.getLogger("gatehouse.audit")

SEALER_LOCK: Final = "sealer.lock"
_PREFIX: Final = "sealer-"
_OPTIONS: Final = WalOptions()


@dataclass(slots=True)
class SealReport:
    """What one round did and found."""

    segments: int = 0
    records: int = 0
    cells: int = 0
    quarantined: int = 0
    """Records and cells that did not fit the schema; kept apart, see the manifests."""
    torn_bytes: int = 0
    """Bytes of unacknowledged writes that deaths cut off."""
    adopted: list[str] = field(default_factory=list)
    """Writers that had died and are sealed to their end now."""
    aborted: int = 0
    """Ends written for requests of dead writers."""
    faults: list[WalFault] = field(default_factory=list)
    """Logs that cannot be sealed; each needs people."""
    lag_us: int = 0
    """Age of the oldest segment that should be sealed and is not."""


class Sealer:
    """Seals the logs of one node.

    Args:
        wal_root: Folder of the writers' folders.
        evidence_root: Where evidence goes.
        clock: Wall clock, microseconds.
        files: File operations; for tests.
        options: For the log of its own.
        random_bytes: Source of ids.

    Raises:
        Locked: Another sealer works on this root.
        OSError: The folders cannot be made.
    """

    def __init__(
        self,
        wal_root: Path,
        evidence_root: Path,
        clock: Clock,
        *,
        files: Files | None = None,
        options: WalOptions = _OPTIONS,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.writer_id = ""
        """Id of its own log; empty before there is one."""
        self._wal_root = wal_root
        self._evidence_root = evidence_root
        self._clock = clock
        self._files = files or Files()
        self._options = options
        self._random_bytes = random_bytes
        self._cursors: dict[str, Cursor] = {}
        self._writer: AuditWriter | None = None
        self._known: set[tuple[str, str]] = set()
        self._files.make_folder(wal_root)
        self._files.make_folder(evidence_root, 0o750)
        self._lock = take_lock(wal_root / SEALER_LOCK)

    def close(self) -> None:
        """Close the own log, seal what can be, and give up the lock."""
        try:
            if self._writer is not None:
                self._writer.close_blocking()
                self._writer = None
                self.seal_once()
        finally:
            os.close(self._lock)

    def seal_once(self) -> SealReport:
        """One round over all writers. Blocks; not for two threads at once.

        Faults and failures of one writer do not keep the others from being sealed.
        """
        report = SealReport()
        for folder in self._folders():
            try:
                self._seal_writer(folder, report)
            except SegmentFault as error:
                self._faulty(report, error.fault)
            except (CursorError, OSError, AuditUnavailable) as error:
                # The type and our own text; an OSError names a path of ours.
                self._faulty(report, WalFault(str(folder), 0, f"{type(error).__name__}: {error}"))
            except Exception as error:
                # Nobody thought of it, so its text may hold anything. What is on disk counts.
                self._cursors.pop(folder.name, None)
                fault = WalFault(str(folder), 0, f"unexpected: {type(error).__name__}")
                if (fault.path, fault.reason) not in self._known:
                    log.error("not sealed: %s\n%s", folder, without_messages(error))
                self._faulty(report, fault)
        self._known = {(fault.path, fault.reason) for fault in report.faults}
        return report

    def _faulty(self, report: SealReport, fault: WalFault) -> None:
        report.faults.append(fault)
        if (fault.path, fault.reason) not in self._known:
            log.error("not sealed: %s at %d: %s", fault.path, fault.offset, fault.reason)
        folder = Path(fault.path)
        with contextlib.suppress(OSError):
            for _epoch, _number, path in segment_files(
                folder if folder.is_dir() else folder.parent
            ):
                header = read_header(path)
                if header is not None:
                    report.lag_us = max(report.lag_us, self._clock() - header.created_us)

    # -- one writer ---------------------------------------------------------------------------

    def _seal_writer(self, folder: Path, report: SealReport) -> None:
        with self._adopted(folder) as dead:
            waiting = self._waiting(folder, dead)
            if not waiting and not dead:
                return
            cursor = self._cursor(folder)
            for path, last in waiting:
                self._seal_segment(folder, path, cursor, report, last=last)
            if dead:
                self._abort_open(folder, cursor, report)
                self._remove(folder)
                report.adopted.append(folder.name)

    @contextlib.contextmanager
    def _adopted(self, folder: Path) -> Iterator[bool]:
        """Whether the writer is dead; holds its lock meanwhile, so that it cannot come back."""
        if self._writer is not None and folder.name == self.writer_id:
            yield False
            return
        try:
            lock = take_lock(folder / LOCK_NAME)
        except Locked:
            yield False
            return
        try:
            yield True
        finally:
            os.close(lock)

    def _waiting(self, folder: Path, dead: bool) -> list[tuple[Path, bool]]:
        """Segments to be sealed, in order: all of the dead, else those that another one follows.

        With each, whether it is the last that its process wrote, and so may lack an end.
        """
        begun: list[tuple[int, Path]] = []
        for epoch, _number, path in segment_files(folder):
            if read_header(path) is not None:
                begun.append((epoch, path))
            elif dead:
                segment = read_segment(path)
                if segment.fault is not None:
                    raise SegmentFault(segment.fault)
        epochs = [epoch for epoch, _path in begun[1:]] + [0]
        waiting = [
            (path, epoch != following)
            for (epoch, path), following in zip(begun, epochs, strict=False)
        ]
        return waiting if dead else waiting[:-1]

    def _cursor(self, folder: Path) -> Cursor:
        cursor = self._cursors.get(folder.name)
        if cursor is None:
            cursor = Cursor.load(folder) or rebuild(self._evidence_root, folder.name)
            self._cursors[folder.name] = cursor
        return cursor

    def _seal_segment(
        self, folder: Path, path: Path, cursor: Cursor, report: SealReport, *, last: bool
    ) -> None:
        segment = read_segment(path)
        header = segment.header
        if segment.fault is not None:
            raise SegmentFault(segment.fault)
        if header is None or header.writer_id != folder.name:
            raise _fault(path, "not a segment of this writer")
        if (header.epoch, header.number) <= (cursor.epoch, cursor.number):
            check_sealed(self._evidence_root, segment)
            self._files.unlink(path)  # Killed before it was deleted.
            return
        if header.epoch != cursor.epoch:
            # The process before has died, though a new one writes under its name.
            self._abort_open(folder, cursor, report)
        if segment.end is None and not last:
            raise _fault(path, "was never closed, but another one follows")
        batch = check_segment(segment, *_expected(segment, cursor))
        try:
            self._publish(folder, segment, batch, cursor)
        except BaseException:
            self._cursors.pop(folder.name, None)  # What is on disk counts.
            raise
        self._files.unlink(path)
        report.segments += 1
        report.records += len(batch.leaves)
        report.cells += len(batch.cells)
        report.quarantined += len(batch.quarantine)
        report.torn_bytes += segment.torn_bytes

    def _publish(self, folder: Path, segment: Segment, batch: Batch, cursor: Cursor) -> None:
        """Evidence, manifest, ends of others, cursor."""
        header = segment.header
        assert header is not None
        if segment.frames or segment.torn_bytes:
            cursor.manifest = publish_evidence(
                self._evidence_root,
                header,
                batch,
                torn_bytes=segment.torn_bytes,
                previous=cursor.manifest,
                files=self._files,
            )
        cursor.epoch, cursor.number = header.epoch, header.number
        cursor.seq, cursor.leaf = batch.last_seq, batch.last_leaf
        # Cells of a request stand before its end, and behind its decided but for the input.
        ended = batch.ended(*ENDS)
        for record in batch.decided(without=ended):
            cursor.open.record(record)
        for cell in batch.cells:
            cursor.open.cell(cell)
        for event_id in ended:
            cursor.open.by_id.pop(event_id, None)
        self._strike(batch)
        cursor.save(folder, self._files)

    def _strike(self, batch: Batch) -> None:
        """Strike decideds whose ``aborted`` is evidence now from the cursors of their writers."""
        ended = batch.ended(EventType.ABORTED)
        if not ended:
            return
        for folder in self._folders():
            cursor = self._cursor(folder)
            found = ended & cursor.open.by_id.keys()
            if found:
                for event_id in found:
                    del cursor.open.by_id[event_id]
                cursor.save(folder, self._files)

    # -- the dead -----------------------------------------------------------------------------

    def _abort_open(self, folder: Path, cursor: Cursor, report: SealReport) -> None:
        """Write the ends that are missing; durable before the cursor forgets what was open."""
        if not cursor.open.by_id:
            return
        written = self._written_ends()
        now_us = self._clock()
        for event_id, exchange in cursor.open.by_id.items():
            if event_id not in written:
                self._own_writer().write_blocking(aborted_event(event_id, exchange, now_us))
                report.aborted += 1
        cursor.open.by_id.clear()
        cursor.save(folder, self._files)

    def _written_ends(self) -> set[str]:
        """Decideds whose ``aborted`` stands in a log that is not sealed yet."""
        ended = set()
        for folder in self._folders():
            if not folder.name.startswith(_PREFIX):
                continue
            for _epoch, _number, path in segment_files(folder):
                # What a dead sealer wrote can be read before it is durable.
                with path.open("rb") as file:
                    self._files.sync(file.fileno())
            for record in read_folder(folder):
                if record.get("event_type") == EventType.ABORTED:
                    ended.add(str(record.get("parent_event_id")))
        return ended

    def _own_writer(self) -> AuditWriter:
        writer = self._writer
        if writer is not None and writer.broken:
            writer.close_blocking()  # From now on a dead writer like any other.
            self._writer = writer = None
        if writer is None:
            self.writer_id = _PREFIX + secrets.token_hex(6)
            self._writer = writer = AuditWriter.open(
                self._wal_root,
                self.writer_id,
                clock=self._clock,
                options=self._options,
                files=self._files,
                random_bytes=self._random_bytes,
            )
        return writer

    def _remove(self, folder: Path) -> None:
        """Remove a folder of which everything is evidence; the cursor goes last."""
        for path in list(folder.iterdir()):
            unused = is_segment(path) or is_temporary(path) or path.name == EPOCH_NAME
            if unused:
                self._files.unlink(path)
        self._files.unlink(folder / LOCK_NAME)
        self._files.unlink(folder / CURSOR_NAME)
        self._cursors.pop(folder.name, None)
        with contextlib.suppress(OSError):  # Somebody put a file of their own there.
            folder.rmdir()

    def _folders(self) -> list[Path]:
        return sorted(path for path in self._wal_root.iterdir() if path.is_dir())


def _expected(segment: Segment, cursor: Cursor) -> tuple[int, str]:
    """Where the chain stands before a segment, if it is the next one.

    Raises:
        SegmentFault: It is not.
    """
    header = segment.header
    assert header is not None
    follows = header.epoch == cursor.epoch
    number = cursor.number + 1 if follows else 1
    if header.number != number:
        raise _fault(segment.path, f"segment {header.epoch}-{number} is missing before it")
    return (cursor.seq, cursor.leaf) if follows else (0, NO_HASH)


def _fault(path: Path, reason: str) -> SegmentFault:
    return SegmentFault(WalFault(str(path), 0, reason))
