"""Writing one process's log: segments, prepared ahead, one write and one ``fdatasync`` a group.

**Space first.** A write into a range that was zeroed and synced before changes no metadata, so its
``fdatasync`` costs one flush of the device (0.18 instead of 0.44 ms at the median). A helper thread
makes the next segment under its final name, and zeroes the current one ahead of the writer. A disk
that is full therefore shows where no record is at stake: ``NoRoom``, and the log stays usable.

**A failed write or sync is final.** After a failed ``fsync`` the kernel may have dropped the dirty
pages and marked them clean, so a repeat would succeed without the data being there (Rebello et al.,
"Can Applications Recover from fsync Failures?", USENIX ATC 2020). Writing on in a new segment is
no way out: whether the old one's last group is on disk is unknown, and the chain would fork. So the
log is broken until the process is started again and reads what is really there.

**Closing** writes an END frame in a group of its own, then the header of the next segment: a
segment is closed exactly when a higher one of the same epoch has a header, or its END stands.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from governance.audit.files import Files, Locked, take_lock
from governance.audit.frames import (
    END_BYTES,
    GROUP_BYTES,
    HEADER_BYTES,
    SEGMENT_ID_BYTES,
    SegmentHeader,
    pack_end,
    pack_group,
)
from governance.audit.segments import segment_files, segment_name
from governance.ports import Clock

LOCK_NAME: Final = "lock"
EPOCH_NAME: Final = "epoch"
_TAIL_BYTES: Final = GROUP_BYTES + END_BYTES
"""Room that closing takes."""
_STEP_BYTES: Final = 1 << 20
"""How far the helper zeroes ahead in a busy segment."""
_LOCK_WAIT_S: Final = 2.0
_EPOCH = re.compile(r"\d{1,9}")


class NoRoom(RuntimeError):
    """There is no space for the group; nothing was written."""


class Log:
    """The segments of one writer and epoch. One thread uses it.

    Args:
        folder: The writer's folder; made, and locked for as long as the log is open.
        writer_id: Name of the writer.
        clock: Wall clock, microseconds.
        files: File operations.
        random_bytes: Source of segment ids.
        first_bytes: What a new segment is prepared with.

    Raises:
        Locked: Another process writes here.
        OSError: The folder cannot be made or written.
    """

    def __init__(
        self,
        folder: Path,
        writer_id: str,
        *,
        clock: Clock,
        files: Files,
        random_bytes: Callable[[int], bytes],
        first_bytes: int,
    ) -> None:
        self.folder = folder
        self.writer_id = writer_id
        self._clock = clock
        self._files = files
        self._random_bytes = random_bytes
        self._first_bytes = first_bytes
        self._lock = _lock_folder(folder, files)
        try:
            self.epoch = _next_epoch(folder, files)
            self._helper = ThreadPoolExecutor(1, thread_name_prefix="audit-wal-helper")
            self._next_number = 1
            self._next: Future[int] = self._helper.submit(self._prepare, 1)
            self._growing: Future[None] | None = None
            self._descriptor = -1
            self._offset = self._zeroed = self._grown = 0
            self._segment_id = b""
            self.groups = 0
            """Groups in the current segment."""
            self.begun_us = 0
            """When the first of them was written."""
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def segment_bytes(self) -> int:
        """Bytes written to the current segment, its header included."""
        return self._offset

    def append(self, frames: bytes, first_seq: int, prev_hash: str) -> None:
        """Write frames as one group and make them durable.

        Args:
            frames: Packed RECORD and CELL frames.
            first_seq: ``writer_seq`` of the first record among them.
            prev_hash: Leaf hash of the record before that one.

        Raises:
            NoRoom: No space; nothing was written, and a later call may succeed.
            OSError: The write or sync failed; the log must not be used again.
        """
        if self._descriptor < 0:
            self._start(self._take_next(), first_seq, prev_hash)
        self._make_room(GROUP_BYTES + len(frames) + _TAIL_BYTES)
        if self.groups == 0:
            self.begun_us = self._clock()
        self._write_group(frames)

    def rotate(self, last_seq: int, last_hash: str) -> None:
        """Close the current segment and begin the next, if it has anything.

        Raises:
            NoRoom: The next segment cannot be made; the current one stays open.
            OSError: As in ``append``.
        """
        if self.groups == 0:
            return
        prepared = self._take_next()  # Before closing: a closed log without a next is stuck.
        self._write_group(pack_end(last_seq, last_hash))
        if self._growing is not None:
            with contextlib.suppress(NoRoom):  # Room that nobody needs any more.
                self._settle_growth()
        os.close(self._descriptor)
        self._start(prepared, last_seq + 1, last_hash)
        self._files.sync(self._descriptor)

    def release(self) -> None:
        """After a failed write or sync: give up everything but the lock."""
        self._helper.shutdown(wait=True)  # It may be zeroing the segment that is closed next.
        for descriptor in (self._descriptor, self._take_prepared()):
            if descriptor >= 0:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        self._descriptor = -1

    def _take_prepared(self) -> int:
        """Descriptor of the segment made ahead, whose file is removed; -1 if there is none."""
        if self._next.cancelled() or self._next.exception() is not None:
            return -1
        descriptor, self._next = self._next.result(), Future()
        self._next.cancel()
        with contextlib.suppress(OSError):
            self._files.unlink(self._path(self._next_number))
        return descriptor

    def close(self, last_seq: int, last_hash: str, *, broken: bool) -> None:
        """Close the segment for good, and give up the lock.

        Args:
            last_seq: Last record written.
            last_hash: Its leaf hash.
            broken: A write failed: touch the segment no more.

        Raises:
            OSError: The end could not be written; the lock is given up all the same.
        """
        with contextlib.ExitStack() as last:
            last.callback(os.close, self._lock)
            if self._descriptor >= 0:
                last.callback(os.close, self._descriptor)
            self._helper.shutdown(wait=True)
            prepared = self._take_prepared()
            if prepared >= 0:
                os.close(prepared)
            if self._descriptor >= 0 and not broken:
                self._write_group(pack_end(last_seq, last_hash))

    # -- segments -----------------------------------------------------------------------------

    def _path(self, number: int) -> Path:
        return self.folder / segment_name(self.epoch, number)

    def _prepare(self, number: int) -> int:
        """Make a segment of zeros; a helper's work."""
        path = self._path(number)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # Left by a try that found no room.
        return self._files.create(path, self._first_bytes)

    def _take_next(self) -> int:
        """Descriptor of the prepared segment; where that failed, the next call finds a new try."""
        try:
            return self._next.result()
        except OSError as error:
            self._next = self._helper.submit(self._prepare, self._next_number)
            raise NoRoom(str(error)) from error

    def _start(self, descriptor: int, first_seq: int, prev_hash: str) -> None:
        number, self._next_number = self._next_number, self._next_number + 1
        self._next = self._helper.submit(self._prepare, self._next_number)
        self._descriptor = descriptor
        self._segment_id = self._random_bytes(SEGMENT_ID_BYTES)
        header = SegmentHeader(
            writer_id=self.writer_id,
            epoch=self.epoch,
            number=number,
            first_seq=first_seq,
            prev_hash=prev_hash,
            segment_id=self._segment_id,
            created_us=self._clock(),
        )
        self._files.write(descriptor, header.pack(), 0)
        self._offset, self._zeroed = HEADER_BYTES, self._first_bytes
        self.groups = 0

    # -- space --------------------------------------------------------------------------------

    def _make_room(self, size_bytes: int) -> None:
        """Wait until the next ``size_bytes`` are zeroed; have more zeroed in time."""
        needed = self._offset + size_bytes
        while self._zeroed < needed:
            self._grow(max(needed, self._zeroed + _STEP_BYTES))
            self._settle_growth()
        if self._growing is not None and self._growing.done():
            with contextlib.suppress(NoRoom):  # Told when the room is needed.
                self._settle_growth()
        if self._zeroed - needed < min(self._first_bytes, _STEP_BYTES) // 2:
            self._grow(self._zeroed + _STEP_BYTES)

    def _grow(self, end: int) -> None:
        if self._growing is None:
            self._grown = end
            self._growing = self._helper.submit(
                self._files.zero, self._descriptor, self._zeroed, end
            )

    def _settle_growth(self) -> None:
        assert self._growing is not None
        growing, self._growing = self._growing, None
        try:
            growing.result()
        except OSError as error:
            raise NoRoom(str(error)) from error
        self._zeroed = self._grown

    def _write_group(self, frames: bytes) -> None:
        data = pack_group(self._segment_id, self.groups + 1, frames)
        self._files.write(self._descriptor, data, self._offset)
        self._files.sync(self._descriptor)
        self.groups += 1
        self._offset += len(data)


def _lock_folder(folder: Path, files: Files) -> int:
    """Make and lock a writer's folder.

    The sealer takes the lock for a moment to see who lives, and removes the folders of the dead:
    both are waited out.
    """
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        files.make_folder(folder)
        try:
            return take_lock(folder / LOCK_NAME)
        except FileNotFoundError:
            pass
        except Locked:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def _next_epoch(folder: Path, files: Files) -> int:
    """The next start number, durable before it is used: never used again, whatever was sealed."""
    last = max((epoch for epoch, _number, _path in segment_files(folder)), default=0)
    path = folder / EPOCH_NAME
    if path.exists():
        text = path.read_text().strip()
        if _EPOCH.fullmatch(text) is None:
            raise ValueError(f"{path} is not a number; restore it or use another writer id")
        last = max(last, int(text))
    files.publish(path, f"{last + 1}\n".encode())
    return last + 1
