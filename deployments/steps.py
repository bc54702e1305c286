"""Steps with elapsed time: one line each, rewritten in place on a terminal."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

HEARTBEAT_S = 15.0
"""Silence after which a step that runs into a pipe or a file says that it is still at it."""


class Step:
    """One step while it runs."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.detail = ""
        """What it is waiting for at the moment; set freely."""
        self.started_s = time.monotonic()

    @property
    def elapsed_s(self) -> int:
        """Whole seconds since it began."""
        return round(time.monotonic() - self.started_s)


class Steps:
    """Prints steps to one stream; a stream that has gone away is no reason to stop."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._terminal = out.isatty()
        self._began_s = time.monotonic()

    @property
    def elapsed_s(self) -> int:
        """Whole seconds since the first step could begin."""
        return round(time.monotonic() - self._began_s)

    def say(self, text: str = "") -> None:
        """Print lines as they are."""
        self._write(text + "\n")

    @contextlib.contextmanager
    def step(self, label: str) -> Iterator[Step]:
        """Announce a step, keep its line alive, and close it with its time."""
        step = Step(label)
        done = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(step, done.wait), daemon=True)
        ticker.start()
        mark = "FAILED"
        try:
            yield step
            mark = "ok"
        except BaseException as error:
            mark = "FAILED" if isinstance(error, Exception) else "stopped"
            raise
        finally:
            done.set()
            ticker.join()
            self._write(f"{self._clear}- {step.label}: {mark} ({step.elapsed_s} s)\n")

    @property
    def _clear(self) -> str:
        return "\r\x1b[K" if self._terminal else ""

    def _tick(self, step: Step, wait: Callable[[float], bool]) -> None:
        shown, last_s = "", time.monotonic()
        while not wait(1.0 if self._terminal else 0.5):
            tail = f" ({step.detail})" if step.detail else ""
            if self._terminal:
                self._write(f"{self._clear}- {step.label} ... {step.elapsed_s} s{tail}")
            elif step.detail != shown or time.monotonic() - last_s > HEARTBEAT_S:
                shown, last_s = step.detail, time.monotonic()
                self._write(f"  {step.label} ... {step.elapsed_s} s{tail}\n")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._out.write(text)
            self._out.flush()
