"""The thread of a writer: takes what waits, writes and syncs it as one group, wakes who waits.

It ends with the order to stop, never before: after a failed write or sync it fails what waits,
gives up the segment, and holds the lock until somebody closes the writer. So a sealer never takes
the log of a process that still answers for that of a dead one.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from governance.audit.chain import Chain, link
from governance.audit.options import WalOptions, WriterStats
from governance.audit.pending import Intake, Item, Loops, Stop, Waiter, resolve
from governance.audit.wal import Log, NoRoom
from governance.errors import AuditUnavailable
from governance.ports import Clock

log = logging.getLogger("gatehouse.audit")


class LogThread(threading.Thread):
    """Writes one log.

    Args:
        wal: The log; closed when the thread ends.
        intake: What is to be written.
        stats: What is counted.
        clock: Wall clock, microseconds.
        options: Sizes and times.
        last_record: Makes the record that ends the chain in order.
    """

    def __init__(
        self,
        wal: Log,
        intake: Intake,
        stats: WriterStats,
        *,
        clock: Clock,
        options: WalOptions,
        last_record: Callable[[], dict[str, Any]],
    ) -> None:
        super().__init__(name="audit-writer", daemon=True)
        self.ended: Future[None] = Future()
        """Done once the log is closed."""
        self._wal = wal
        self._intake = intake
        self._stats = stats
        self._clock = clock
        self._options = options
        self._last_record = last_record
        self._chain = Chain()

    def run(self) -> None:
        """Write until told to stop."""
        stop = False
        try:
            while not stop and not self._intake.broken:
                group, stop = self._gather()
                if group:
                    self._write(group)
                self._rotate_if_due()
        except BaseException as error:  # Whatever it was, nobody may wait for ever.
            self.fail(error)
        finally:
            if self._intake.broken:
                self._wait_out(stop)
            self._finish()

    def _wait_out(self, stop: bool) -> None:
        """Broken: fail what waits and hold the lock, and nothing else, until the order to stop."""
        released = False
        while not stop:
            try:
                item = self._intake.get(None if released else 0)
            except queue.Empty:
                self._wal.release()
                released = True
                continue
            if isinstance(item, Stop):
                stop = True
            else:
                item.error = AuditUnavailable()
                self._settle([item])

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
            item = self._intake.get(timeout)
            while True:
                if isinstance(item, Stop):
                    return group, True
                group.append(item)
                size_bytes += item.size_bytes
                if (
                    len(group) >= self._options.group_records
                    or size_bytes >= self._options.group_bytes
                ):
                    break
                item = self._intake.get(0)
        except queue.Empty:
            pass
        return group, False

    def _write(self, group: list[Item]) -> None:
        chain = Chain(self._chain.seq, self._chain.leaf)
        for item in group:
            try:
                if item.unless is not None and item.unless():
                    raise AuditUnavailable()
                link(chain, item)
            except Exception as error:  # One caller's mistake is not the others' loss.
                item.error = error
                item.done.lose()
        failed = False
        try:
            if chain.frames:
                self._append(chain)
        except NoRoom as error:
            self._refuse(error)
            failed = True
        except BaseException as error:
            self.fail(error)
            failed = True
        if failed:
            for item in group:
                item.error = item.error or AuditUnavailable()
        self._settle(group)

    def _append(self, chain: Chain) -> None:
        frames = b"".join(chain.frames)
        begun_ns = time.perf_counter_ns()
        self._wal.append(frames, self._chain.seq + 1, self._chain.leaf)
        self._stats.sync_us += (time.perf_counter_ns() - begun_ns) // 1000
        self._stats.records += chain.seq - self._chain.seq
        self._stats.bytes += len(frames)
        self._stats.syncs += 1
        self._chain.seq, self._chain.leaf = chain.seq, chain.leaf

    def _refuse(self, error: NoRoom) -> None:
        if self._stats.last_error is None or "NoRoom" not in self._stats.last_error:
            log.error("audit log %s: no room: %s", self._wal.writer_id, error)
        self._stats.last_error = f"NoRoom: {error}"

    def _settle(self, group: list[Item]) -> None:
        """Tell all who wait; one call for each event loop."""
        self._intake.settled(group)
        loops: Loops = {}
        for item in group:
            if item.error is None:
                self._stats.cells += len(item.cells)
            else:
                self._stats.refused += 1
            item.done.settle(item, loops)
        for loop, waiters in loops.items():
            try:
                loop.call_soon_threadsafe(resolve, waiters)
            except RuntimeError:  # The loop is closed, and with it all who waited there.
                log.warning("audit log %s: %d waiters are gone", self._wal.writer_id, len(waiters))

    def _rotate_if_due(self) -> None:
        wal, options = self._wal, self._options
        if self._intake.broken or not wal.groups:
            return
        old = not 0 <= self._clock() - wal.begun_us < options.segment_age_us
        if not old and wal.segment_bytes < options.segment_bytes:
            return
        try:
            wal.rotate(self._chain.seq, self._chain.leaf)
            self._stats.segments += 1
        except NoRoom as error:
            self._refuse(error)
            time.sleep(0.05)  # NOTE: due again at once; the disk will not be emptier that soon.
        except OSError as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Take nothing in any more."""
        self._intake.refuse_all()
        number = error.errno if isinstance(error, OSError) else None
        self._stats.last_error = f"{type(error).__name__} {number}"
        log.critical(
            "audit log %s is broken (%s): nothing is recorded until this process starts again",
            self._wal.writer_id,
            self._stats.last_error,
        )

    def _finish(self) -> None:
        self._intake.stop()  # The thread ends, whyever: nothing may come in behind it.
        try:
            if not self._intake.broken:
                self._intake.count_own()
                self._write([Item(self._last_record(), (), 0, Waiter())])
            self._wal.close(self._chain.seq, self._chain.leaf, broken=self._intake.broken)
        except BaseException as error:
            self.fail(error)
        finally:
            self.ended.set_result(None)
