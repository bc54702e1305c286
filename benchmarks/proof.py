"""What proofs share: goals with their figures, one line each, and the file that keeps them."""

from __future__ import annotations

import json
import platform as machine
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True, slots=True)
class Result:
    """One goal."""

    goal: str
    measured: str
    holds: bool


@dataclass
class Proof:
    """Collects results and prints each as it comes."""

    results: list[Result] = field(default_factory=list)

    def add(self, goal: str, measured: str, holds: bool) -> None:
        """Record and print one goal."""
        self.results.append(Result(goal, measured, holds))
        print(f"{goal} | {measured} | {'holds' if holds else 'falls short'}", flush=True)

    @contextmanager
    def goal(self, goal: str) -> Iterator[Callable[[str, bool], None]]:
        """A goal whose measurement may itself break; that falls short too."""
        before = len(self.results)
        try:
            yield lambda measured, holds: self.add(goal, measured, holds)
        except Exception as error:
            self.add(goal, f"broke: {type(error).__name__}: {str(error)[:160]}", False)
        if len(self.results) == before:
            self.add(goal, "not measured", False)

    @property
    def code(self) -> int:
        """Exit status: 1 if any goal falls short."""
        return 0 if all(result.holds for result in self.results) else 1

    def save(self, path: Path, *packages: str, **figures: Any) -> None:
        """Keep results and raw figures, with what they were measured on."""
        report = {
            "python": machine.python_version(),
            "cpus": psutil.cpu_count(),
            "versions": {name: version(name) for name in packages},
            "results": [asdict(result) for result in self.results],
            **figures,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")


def until(condition: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until a condition holds.

    Raises:
        TimeoutError: It did not.
    """
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout_s:
            raise TimeoutError(f"not within {timeout_s} s")
        time.sleep(0.02)
    return time.monotonic() - started
