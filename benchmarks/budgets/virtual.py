"""A loop whose time stands still while anybody can work.

When nothing is left to do, the clock jumps to the next timer: seconds of waiting take no time, and
a schedule gives the same result each time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")
START_US = 1_760_000_000_000_000
"""9 October 2025."""


class _Selector(selectors.DefaultSelector):
    """Does not wait: it moves the clock instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        """What is ready; time passes if nothing is."""
        if timeout is None:
            raise RuntimeError("everybody waits for ever")
        self.now_s += max(timeout, 0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which time passes only while nobody can work."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Seconds since the loop began, and a thousand."""
        return self._virtual.now_s


def run(main: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run a coroutine on a loop with time of its own."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())
