"""What a process tree has cost so far: CPU time and memory, from ``/proc`` (Linux)."""

from __future__ import annotations

import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path

from deployments.processes import PROC, descendants

ENGINE = re.compile(r"^ray::.*(Engine-|LLMServer)")
"""Title of the processes that stand for an engine: LiteLLM's engine is outside its tree too."""
_TICK_MS = 1000 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU of the living processes since their start, in ms, and memory, in MB."""

    cpu_ms: dict[int, float]
    """By process id; resolution 10 ms."""
    engines: frozenset[int]
    """Which of them are instant engines."""

    def since(self, before: Cost, *, engines: bool) -> float:
        """CPU spent since ``before``, in ms, with or without the instant engines."""
        return sum(
            ms - before.cpu_ms.get(pid, 0.0)
            for pid, ms in self.cpu_ms.items()
            if engines or pid not in self.engines
        )


def cost(pid: int) -> Cost:
    """CPU of the tree under ``pid``. What ended before is not in it."""
    cpu_ms: dict[int, float] = {}
    engines: set[int] = set()
    for each in (pid, *(process.pid for process in descendants(pid))):
        try:
            stat = (PROC / str(each) / "stat").read_text()
            title = (PROC / str(each) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, UnicodeDecodeError):
            continue
        fields = stat[stat.rindex(")") + 2 :].split()
        cpu_ms[each] = (int(fields[11]) + int(fields[12])) * _TICK_MS
        if ENGINE.match(title):
            engines.add(each)
    return Cost(cpu_ms, frozenset(engines))


def memory_mb(pid: int) -> dict[str, float]:
    """Proportional set size of the tree: ``all``, and ``gateway`` without instant engines."""
    of = cost(pid)
    sizes = {each: process_memory_mb(each) for each in of.cpu_ms}
    return {
        "all": round(sum(sizes.values()), 1),
        "gateway": round(sum(mb for each, mb in sizes.items() if each not in of.engines), 1),
    }


def process_memory_mb(pid: int) -> float:
    """Proportional set size of one process; 0 when it is gone."""
    try:
        text = (PROC / str(pid) / "smaps_rollup").read_text()
    except OSError:
        return 0.0
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def titled(pid: int, pattern: str) -> list[int]:
    """Processes of the tree whose title or command line matches."""
    found = []
    for process in descendants(pid):
        try:
            title = (PROC / str(process.pid) / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if re.search(pattern, title):
            found.append(process.pid)
    return found


def wait_idle(share: float, most_s: float) -> float:
    """Wait until ``share`` of the machine is idle, at most ``most_s``; the share seen last."""
    deadline = time.monotonic() + most_s
    while True:
        idle, total = _jiffies()
        time.sleep(0.4)
        idle_after, total_after = _jiffies()
        seen = (idle_after - idle) / max(1, total_after - total)
        if seen >= share or time.monotonic() > deadline:
            return round(seen, 2)


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    model = re.search(r"^model name\s*:\s*(.*)$", (PROC / "cpuinfo").read_text(), re.MULTILINE)
    total = re.search(r"MemTotal:\s+(\d+)", (PROC / "meminfo").read_text())
    return {
        "cores": os.cpu_count(),
        "processor": model[1] if model else platform.machine(),
        "memory_gb": round(int(total[1]) / 1024**2, 1) if total else None,
        "kernel": platform.release(),
        "load_average": os.getloadavg(),
    }


def _jiffies() -> tuple[int, int]:
    """(idle, total) of the whole machine since boot."""
    with Path("/proc/stat").open() as file:
        values = [int(word) for word in file.readline().split()[1:]]
    return values[3] + values[4], sum(values)
