"""The writing end of the audit trail: one thread, one chain, one sync for all who wait.

Callers put events into a queue; the writer's thread takes all there are, gives each its place in
the chain (``writer_seq``, ``prev_hash``), writes them as one group with one ``fdatasync`` and wakes
all waiters of an event loop with one call. While the device works, the next group gathers: the
busier the writer, the larger the group, and the less one record costs.

Encrypted content travels in the same group, before the record that it belongs to: a record on disk
has its content.

**Fail closed.** The queue is bounded, and full means refused. No room on the disk refuses what is
waiting, and later calls may succeed. A failed write or sync breaks the writer for good (see
``governance.audit.wal``): every waiter and every later call gets ``AuditUnavailable`` until the
process is started again. The lock is kept until ``close``, so that nobody takes the chain for
finished while this process still answers.

**Ends.** A part of the queue is kept for ``inference.completed``. An end may depend on what was
posted for its answer (``unless``): it is asked in the writer's thread, where all that came before
is written or known to be lost, so no end claims content that is not there.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

from governance.audit.canonical import complete
from governance.audit.content import Cell
from governance.audit.files import Files
from governance.audit.log_thread import LogThread
from governance.audit.options import WalOptions, WriterStats
from governance.audit.pending import Awaited, Blocked, Intake, Item, Posted, Waiter
from governance.audit.randomness import random_bytes as pooled
from governance.audit.record import WRITER_ID
from governance.audit.room import Room
from governance.audit.schema import SCHEMA_VERSION, EventType
from governance.audit.ulid import new_ulid
from governance.audit.wal import Log
from governance.errors import AuditUnavailable
from governance.ports import Clock

log = logging.getLogger("gatehouse.audit")


__all__ = ["AuditWriter", "WalOptions", "WriterStats"]

_OPTIONS: Final = WalOptions()
_END: Final = EventType.COMPLETED.value


class AuditWriter:
    """Writes audit events of one process; ``open`` makes one. Any thread may call it."""

    def __init__(
        self,
        wal: Log,
        room: Room,
        *,
        clock: Clock,
        options: WalOptions,
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self.writer_id = wal.writer_id
        self.epoch = wal.epoch
        self.stats = WriterStats()
        self._room = room
        self._clock = clock
        self._options = options
        self._random_bytes = random_bytes
        self._intake = Intake(options, self.stats)
        self._thread = LogThread(
            wal,
            self._intake,
            self.stats,
            clock=clock,
            options=options,
            last_record=lambda: self._complete(self._own(EventType.WRITER_STOPPED)),
        )

    @classmethod
    def open(
        cls,
        wal_root: Path,
        writer_id: str,
        *,
        clock: Clock,
        options: WalOptions = _OPTIONS,
        files: Files | None = None,
        random_bytes: Callable[[int], bytes] = pooled,
    ) -> AuditWriter:
        """Open a log and begin its chain with ``writer.started``, durably. Blocks.

        Args:
            wal_root: Folder of all writers' folders.
            writer_id: 1 to 64 of ``A-Za-z0-9._-``, new for each start of a process. Where the
                folder exists, the chain gets the next epoch.
            clock: Wall clock, microseconds.
            options: Sizes and times.
            files: File operations; for tests.
            random_bytes: Source of ids.

        Raises:
            Locked: A living process writes under this id.
            AuditUnavailable: The first record cannot be written.
            OSError: The folder cannot be used.
        """
        if WRITER_ID.fullmatch(writer_id) is None:
            raise ValueError("a writer id is 1 to 64 of A-Z a-z 0-9 . _ -, a letter or digit first")
        folder = wal_root / writer_id
        wal = Log(
            folder,
            writer_id,
            clock=clock,
            files=files or Files(),
            random_bytes=random_bytes,
            first_bytes=options.first_bytes,
        )
        room = Room(folder, options.reserve_bytes)
        writer = cls(wal, room, clock=clock, options=options, random_bytes=random_bytes)
        writer._thread.start()
        try:
            writer.write_blocking(writer._own(EventType.WRITER_STARTED))
        except BaseException:
            writer.close_blocking()
            raise
        return writer

    @property
    def broken(self) -> bool:
        """A write failed: this process records nothing any more and must be started again."""
        return self._intake.broken

    # -- writing ------------------------------------------------------------------------------

    async def write(
        self,
        event: Mapping[str, Any] | None,
        cells: Sequence[Cell] = (),
        unless: Callable[[], bool] | None = None,
    ) -> str:
        """Record an event; when this returns, it is on disk, and its cells are.

        Args:
            event: Values by column: ``event_type``, ``ts_us`` and whatever applies. The writer
                adds ``schema_version``, ``event_id`` where it is missing, and the chain. Values
                are not checked against the schema here (``check_record`` does that in tests); the
                sealer puts what does not fit it into quarantine. ``None`` for cells alone.
            cells: Content of the event.
            unless: Asked in the writer's thread before it is written; where it says true, the
                event is refused.

        Returns:
            The event's id; empty for cells alone.

        Raises:
            AuditUnavailable: It is not recorded, or nobody knows whether it is.
            ValueError: A column that the schema does not have, or a value that is not JSON.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        event_id = self._put(event, cells, Awaited(future), unless)
        await future
        return event_id

    def write_blocking(self, event: Mapping[str, Any], cells: Sequence[Cell] = ()) -> str:
        """``write`` for a thread without an event loop."""
        future: Future[None] = Future()
        event_id = self._put(event, cells, Blocked(future))
        future.result()
        return event_id

    def post(
        self,
        event: Mapping[str, Any] | None = None,
        cells: Sequence[Cell] = (),
        lost: Callable[[], None] | None = None,
    ) -> None:
        """Record without waiting: durable within milliseconds, unless the writer fails.

        Args:
            event: As in ``write``; ``None`` for cells alone.
            cells: Content.
            lost: Called from the writer's thread if it could not be written after all.

        Raises:
            AuditUnavailable: The writer is broken, closed or overfull.
            ValueError: As in ``write``.
        """
        self._put(event, cells, Posted(lost))

    def check_room(self) -> None:
        """Refuse new work while the disk is nearly full or the writer broken; costs 1 µs.

        What is already under way may use the reserve, so ends are still recorded.

        Raises:
            AuditUnavailable: Do not begin anything that will have to be recorded.
        """
        if self._intake.broken or self._intake.closing or not self._room.enough():
            raise AuditUnavailable()

    def _put(
        self,
        event: Mapping[str, Any] | None,
        cells: Sequence[Cell],
        done: Waiter,
        unless: Callable[[], bool] | None = None,
    ) -> str:
        record = None if event is None else self._complete(event)
        size_bytes = sum([len(cell.ciphertext) for cell in cells]) if cells else 0
        end = record is not None and record["event_type"] == _END
        event_id: str = "" if record is None else record["event_id"]
        self._intake.put(Item(record, cells, size_bytes, done, unless), end=end)
        return event_id

    def _complete(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """The record, but for its place in the chain."""
        record = complete(event)
        if record["event_id"] is None:
            record["event_id"] = new_ulid(record["ts_us"], self._random_bytes)
        record["schema_version"] = SCHEMA_VERSION
        record["writer_id"], record["writer_epoch"] = self.writer_id, self.epoch
        return record

    # -- the end ------------------------------------------------------------------------------

    async def close(self) -> None:
        """Record what waits, then ``writer.stopped``; give up the log. Repeating it is harmless."""
        self._intake.stop()
        await asyncio.wrap_future(self._thread.ended)

    def close_blocking(self) -> None:
        """``close`` for a thread without an event loop."""
        self._intake.stop()
        self._thread.ended.result()

    def _own(self, event_type: EventType) -> dict[str, Any]:
        return {
            "event_type": event_type.value,
            "ts_us": self._clock(),
            "principal_kind": "system",
            "detail": f'{{"pid":{os.getpid()}}}',
        }
