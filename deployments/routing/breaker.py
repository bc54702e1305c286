"""A circuit breaker: spares callers the wait for somebody who did not answer the last few times."""

from __future__ import annotations

from collections.abc import Callable

FAILURES = 5
"""Failures in a row that open it."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 8.0


class Breaker:
    """Closed: everybody may try. Open: nobody, for a pause; then one at a time, until one succeeds.

    Each attempt after a pause that fails doubles the next pause, up to eight seconds.

    Args:
        clock_s: Monotonic seconds.
    """

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._until: float | None = None
        """When it was or will be tried again; ``None`` while closed."""
        self._trying = False

    @property
    def is_open(self) -> bool:
        """Whether attempts are being spared."""
        return self._until is not None

    def admits(self) -> bool:
        """Whether an attempt may be made now; its end must be told."""
        if self._until is None:
            return True
        if self._trying or self._clock_s() < self._until:
            return False
        self._trying = True
        return True

    def succeeded(self) -> None:
        """The attempt was answered."""
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._until = None
        self._trying = False

    def failed(self) -> None:
        """The attempt was not answered."""
        if self._until is None:
            self._failures += 1
            if self._failures >= FAILURES:
                self._until = self._clock_s() + self._pause_s
        elif self._trying:
            self._trying = False
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self._until = self._clock_s() + self._pause_s
        # Else it began before the breaker opened, and tells nothing new.

    def withdrawn(self) -> None:
        """The attempt was given up by its caller: it tells nothing."""
        self._trying = False
