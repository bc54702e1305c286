"""Processes by id: who descends from whom, and ending them without hitting a stranger.

A process is named by id and start time, since the kernel hands ids out again. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
PROC = Path("/proc")
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class ProcessId:
    """One process, also after its id was given to another."""

    pid: int
    start_ticks: int
    """Clock ticks from boot to its start (field 22 of ``/proc/PID/stat``)."""

    @property
    def alive(self) -> bool:
        """Whether this very process still runs; a zombie does not."""
        stat = _stat(self.pid)
        return stat is not None and stat[0] != "Z" and int(stat[19]) == self.start_ticks


def identify(pid: int) -> ProcessId | None:
    """The process that has this id now, or ``None``."""
    stat = _stat(pid)
    return None if stat is None else ProcessId(pid, int(stat[19]))


def program(pid: int) -> str:
    """Command line of a process, shortened; empty where it cannot be read."""
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    text = b" ".join(words).decode(errors="replace").strip()
    return text if len(text) <= 60 else text[:59] + "…"


def descendants(pid: int) -> list[ProcessId]:
    """All living processes below ``pid``, nearest first."""
    children: dict[int, list[ProcessId]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))) and stat[0] != "Z":
            child = ProcessId(int(entry.name), int(stat[19]))
            children.setdefault(int(stat[1]), []).append(child)
    found: list[ProcessId] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(0), [])
        found += below
        waiting += [child.pid for child in below]
    return found


def end(processes: Iterable[ProcessId], grace_s: float) -> None:
    """SIGTERM, up to ``grace_s`` to comply, then SIGKILL. Ids given to others are left alone."""
    living = [process for process in processes if process.alive]
    for process in living:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while living and time.monotonic() < deadline:
        time.sleep(0.05)
        living = [process for process in living if process.alive]
    for process in living:
        _signal(process, signal.SIGKILL)


def die_with_parent(signum: int = signal.SIGTERM) -> None:
    """Have the kernel send us ``signum`` when the thread that started us ends."""
    _prctl(_PR_SET_PDEATHSIG, signum)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _signal(process: ProcessId, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process.pid, signum)


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def _stat(pid: int) -> list[str] | None:
    """Fields of ``/proc/PID/stat`` from the third (state) on."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    # The second field is the program's name in parentheses and may hold anything.
    return text[text.rindex(")") + 2 :].split()
