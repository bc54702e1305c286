"""The record of a running `gatehouse serve`, under ``GATEHOUSE_STATE/run``.

A lock that the kernel releases with its holder says whether one is running; the record says which
processes it started, so that the next start can end what a crash of the machine's user session
left behind.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from deployments.processes import ProcessId, end


class AlreadyRunning(Exception):
    """Another `gatehouse serve` holds this state directory; carries its record, if readable."""

    def __init__(self, record: RunRecord | None) -> None:
        super().__init__(record)
        self.record = record


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What one `gatehouse serve` started."""

    guard: ProcessId
    """The process that the user started; SIGTERM to it stops everything."""
    url: str
    started_s: int
    """Unix time."""
    processes: tuple[ProcessId, ...] = ()
    """Processes below the guard, as far as known."""


class RunFolder:
    """Lock and record of one state directory."""

    def __init__(self, state: Path) -> None:
        self._folder = state / "run"
        self._file = self._folder / "serve.json"
        self._lock: IO[str] | None = None

    def acquire(self) -> list[ProcessId]:
        """Take the lock for this process and those it forks, and end leftovers.

        Returns:
            Processes of an earlier start that were still alive and have been ended.

        Raises:
            AlreadyRunning: The lock is held.
        """
        self._folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder.mkdir(exist_ok=True, mode=0o700)
        lock = (self._folder / "serve.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise AlreadyRunning(self.read()) from None
        self._lock = lock
        record = self.read()
        if record is None:
            return []
        left = [process for process in record.processes if process.alive]
        end(left, grace_s=5.0)
        self._file.unlink(missing_ok=True)
        return left

    def write(self, record: RunRecord) -> None:
        """Replace the record."""
        scratch = self._file.with_suffix(".new")
        with scratch.open("w") as file:
            json.dump(asdict(record), file)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self._file)

    def read(self) -> RunRecord | None:
        """The record, or ``None`` where there is none that can be read."""
        try:
            value = json.loads(self._file.read_text())
            return RunRecord(
                guard=ProcessId(**value["guard"]),
                url=str(value["url"]),
                started_s=int(value["started_s"]),
                processes=tuple(ProcessId(**process) for process in value["processes"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def clear(self) -> None:
        """Everything has been stopped: remove the record and let go of the lock."""
        self._file.unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()
            self._lock = None
