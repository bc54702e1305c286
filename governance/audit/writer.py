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
process is started again. The lock is kept meanwhile, so that nobody takes the chain for finished
while this process still answers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from governance.audit.canonical import NO_HASH, complete, encode
from governance.audit.content import Cell, pack_cell
from governance.audit.files import Files
from governance.audit.frames import FrameType, pack_frame
from governance.audit.pending import Awaited, Blocked, Item, Loops, Posted, Waiter, resolve
from governance.audit.record import WRITER_ID
from governance.audit.room import Room
from governance.audit.schema import SCHEMA_VERSION, EventType
from governance.audit.ulid import new_ulid
from governance.audit.wal import Log, NoRoom
from governance.errors import AuditUnavailable
from governance.ports import Clock

log = logging.getLogger("gatehouse.audit")


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
    reserve_bytes: int | None = None
    """Free space below which no request is admitted, so that those under way can be recorded;
    ``None`` for 1 % of the disk or 256 MiB, the larger, but at most 10 % of the disk."""


_OPTIONS: Final = WalOptions()


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


class _Stop:
    """Last thing in the queue."""


@dataclass(slots=True)
class _Chain:
    """Where the chain stands: durable, or as of the group in hand."""

    seq: int = 0
    leaf: str = NO_HASH
    frames: list[bytes] = field(default_factory=list)


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
        self._wal = wal
        self._room = room
        self._clock = clock
        self._options = options
        self._random_bytes = random_bytes
        self._queue: queue.SimpleQueue[Item | _Stop] = queue.SimpleQueue()
        self._guard = threading.Lock()
        self._queued_items = self._queued_bytes = 0
        self._broken = False
        self._closing = False
        self._chain = _Chain()
        self._stopped: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="audit-writer", daemon=True)

    @classmethod
    def open(
        cls,
        wal_root: Path,
        writer_id: str,
        *,
        clock: Clock,
        options: WalOptions = _OPTIONS,
        files: Files | None = None,
        random_bytes: Callable[[int], bytes] = os.urandom,
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
        return self._broken

    # -- writing ------------------------------------------------------------------------------

    async def write(self, event: Mapping[str, Any], cells: Sequence[Cell] = ()) -> str:
        """Record an event; when this returns, it is on disk, and its cells are.

        Args:
            event: Values by column: ``event_type``, ``ts_us`` and whatever applies. The writer
                adds ``schema_version``, ``event_id`` where it is missing, and the chain. Values
                are not checked against the schema here (``check_record`` does that in tests); the
                sealer puts what does not fit it into quarantine.
            cells: Content of the event.

        Returns:
            The event's id.

        Raises:
            AuditUnavailable: It is not recorded, or nobody knows whether it is.
            ValueError: A column that the schema does not have, or a value that is not JSON.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        event_id = self._put(event, cells, Awaited(future))
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
        if self._broken or self._closing or not self._room.enough():
            raise AuditUnavailable()

    def _put(self, event: Mapping[str, Any] | None, cells: Sequence[Cell], done: Waiter) -> str:
        event_id = ""
        record = None
        if event is not None:
            record = complete(event)
            event_id = record["event_id"] or new_ulid(record["ts_us"], self._random_bytes)
            record["event_id"] = event_id
            record["schema_version"] = SCHEMA_VERSION
            record["writer_id"], record["writer_epoch"] = self.writer_id, self.epoch
        size_bytes = sum(len(cell.ciphertext) for cell in cells)
        with self._guard:
            if (
                self._broken
                or self._closing
                or self._queued_items >= self._options.queue_records
                or self._queued_bytes + size_bytes > self._options.queue_bytes
            ):
                self.stats.refused += 1
                raise AuditUnavailable()
            self._queued_items += 1
            self._queued_bytes += size_bytes
            # Here as well as when it is settled, so that a sync that hangs can be seen.
            self.stats.queued = self._queued_items
            # Within the guard, so that nothing can come behind the order to stop.
            self._queue.put(Item(record, cells, size_bytes, done))
        return event_id

    # -- the end ------------------------------------------------------------------------------

    async def close(self) -> None:
        """Record what waits, then ``writer.stopped``; give up the log. Repeating it is harmless."""
        self._order_stop()
        await asyncio.wrap_future(self._stopped)

    def close_blocking(self) -> None:
        """``close`` for a thread without an event loop."""
        self._order_stop()
        self._stopped.result()

    def _order_stop(self) -> None:
        with self._guard:
            if not self._closing:
                self._closing = True
                self._queue.put(_Stop())

    def _own(self, event_type: EventType) -> dict[str, Any]:
        return {
            "event_type": event_type.value,
            "ts_us": self._clock(),
            "principal_kind": "system",
            "detail": f'{{"pid":{os.getpid()}}}',
        }

    # -- the writer's thread ------------------------------------------------------------------

    def _run(self) -> None:
        try:
            stop = False
            while not stop and not self._broken:
                group, stop = self._gather()
                if group:
                    self._write(group)
                self._rotate_if_due()
        except BaseException as error:  # Whatever it was, nobody may wait for ever.
            self._break(error)
        finally:
            self._finish()

    def _gather(self) -> tuple[list[Item], bool]:
        """All that waits, up to a group; waits for the first, or until the segment is of age."""
        timeout = None
        if self._wal.groups:
            due_us = self._wal.begun_us + self._options.segment_age_us
            # A wall clock may jump: then a segment is closed early, or late by its age at most.
            timeout = min(max(0, due_us - self._clock()), self._options.segment_age_us) / 1e6
        group: list[Item] = []
        size_bytes = 0
        try:
            item = self._queue.get(timeout=timeout)
            while True:
                if isinstance(item, _Stop):
                    return group, True
                group.append(item)
                size_bytes += item.size_bytes
                if (
                    len(group) >= self._options.group_records
                    or size_bytes >= self._options.group_bytes
                ):
                    break
                item = self._queue.get_nowait()
        except queue.Empty:
            pass
        return group, False

    def _write(self, group: list[Item]) -> None:
        chain = _Chain(self._chain.seq, self._chain.leaf)
        for item in group:
            try:
                _link(chain, item)
            except Exception as error:  # One caller's mistake is not the others' loss.
                item.error = error
        failed = False
        try:
            if chain.frames:
                self._append(chain)
        except NoRoom as error:
            self._refuse(error)
            failed = True
        except BaseException as error:
            self._break(error)
            failed = True
        if failed:
            for item in group:
                item.error = item.error or AuditUnavailable()
        self._settle(group)

    def _append(self, chain: _Chain) -> None:
        frames = b"".join(chain.frames)
        begun_ns = time.perf_counter_ns()
        self._wal.append(frames, self._chain.seq + 1, self._chain.leaf)
        self.stats.sync_us += (time.perf_counter_ns() - begun_ns) // 1000
        self.stats.records += chain.seq - self._chain.seq
        self.stats.bytes += len(frames)
        self.stats.syncs += 1
        self._chain.seq, self._chain.leaf = chain.seq, chain.leaf

    def _refuse(self, error: NoRoom) -> None:
        if self.stats.last_error is None or "NoRoom" not in self.stats.last_error:
            log.error("audit log %s: no room: %s", self.writer_id, error)
        self.stats.last_error = f"NoRoom: {error}"

    def _settle(self, group: list[Item]) -> None:
        """Tell all who wait; one call for each event loop."""
        with self._guard:
            for item in group:
                self._queued_items -= 1
                self._queued_bytes -= item.size_bytes
            self.stats.queued = self._queued_items
        loops: Loops = {}
        for item in group:
            if item.error is None:
                self.stats.cells += len(item.cells)
            else:
                self.stats.refused += 1
            item.done.settle(item, loops)
        for loop, waiters in loops.items():
            try:
                loop.call_soon_threadsafe(resolve, waiters)
            except RuntimeError:  # The loop is closed, and with it all who waited there.
                log.warning("audit log %s: %d waiters are gone", self.writer_id, len(waiters))

    def _rotate_if_due(self) -> None:
        wal, options = self._wal, self._options
        if self._broken or not wal.groups:
            return
        old = not 0 <= self._clock() - wal.begun_us < options.segment_age_us
        if not old and wal.segment_bytes < options.segment_bytes:
            return
        try:
            wal.rotate(self._chain.seq, self._chain.leaf)
            self.stats.segments += 1
        except NoRoom as error:
            self._refuse(error)
            time.sleep(0.05)  # NOTE: due again at once; the disk will not be emptier that soon.
        except OSError as error:
            self._break(error)

    def _break(self, error: BaseException) -> None:
        with self._guard:
            self._broken = True
        number = error.errno if isinstance(error, OSError) else None
        self.stats.last_error = f"{type(error).__name__} {number}"
        log.critical(
            "audit log %s is broken (%s): nothing is recorded until this process starts again",
            self.writer_id,
            self.stats.last_error,
        )

    def _finish(self) -> None:
        with self._guard:
            self._closing = True
        try:
            self._drain()
            if not self._broken:
                stopped = Item(complete(self._own(EventType.WRITER_STOPPED)), (), 0, Waiter())
                assert stopped.record is not None
                stopped.record["event_id"] = new_ulid(self._clock(), self._random_bytes)
                stopped.record["schema_version"] = SCHEMA_VERSION
                stopped.record["writer_id"] = self.writer_id
                stopped.record["writer_epoch"] = self.epoch
                with self._guard:
                    self._queued_items += 1
                self._write([stopped])
            self._wal.close(self._chain.seq, self._chain.leaf, broken=self._broken)
        except BaseException as error:
            self._break(error)
        finally:
            self._stopped.set_result(None)

    def _drain(self) -> None:
        """Fail what is left after a failure; an order to stop is the last thing there is."""
        rest = []
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if not isinstance(item, _Stop):
                item.error = AuditUnavailable()
                rest.append(item)
        self._settle(rest)


def _link(chain: _Chain, item: Item) -> None:
    """Pack an item's frames and put its record at the end of the chain.

    Raises:
        ValueError: The record is not JSON; the chain is as before.
    """
    frames = [pack_frame(FrameType.CELL, pack_cell(cell)) for cell in item.cells]
    record = item.record
    if record is not None:
        record["writer_seq"] = chain.seq + 1
        record["prev_hash"] = chain.leaf
        payload = encode(record)
        frames.append(pack_frame(FrameType.RECORD, payload))
        chain.seq += 1
        chain.leaf = sha256(b"\0" + payload).hexdigest()
    chain.frames += frames
