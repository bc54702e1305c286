"""Requests per minute and requests at the same time, per principal.

Counts live in the gateway process: asking another process would cost more than the request path
(milliseconds against microseconds). With several gateways each enforces its share of a limit,
the limit divided by the gateways alive, rounded down and at least 1; so together they admit no
more than the limit, or one each where the limit is smaller than the number of gateways.
Connections that stick to one gateway see that gateway's share only; load balancing evens it out.

Requests that are refused for what they say (not valid, not permitted, no such model) count apart,
for all callers alike: ``REFUSALS_PER_MINUTE``. Each leaves a record, with what was asked, so a
caller without any limit of its own could fill the disk by asking for what it cannot have.

The minute is a sliding one, kept exactly: the times of the admissions of the last 60 s. A token
bucket would be smaller, but admits up to twice its limit in some minute.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from governance.errors import Overloaded, RateLimited, TooManyParallel
from governance.types import Limits

WINDOW_US = 60_000_000
"""Length of the window for requests per minute, in microseconds."""
REFUSALS_PER_MINUTE = 120
"""Refused requests of one caller within a minute; a caller past that waits, whatever it asks."""


@dataclass(slots=True)
class _Counts:
    """What one key has admitted."""

    running: int = 0
    admitted_us: deque[int] = field(default_factory=deque)
    """Times of admission within the last window, oldest first."""
    refused_us: deque[int] = field(default_factory=deque)
    """Times of refusals within the last window, oldest first."""

    def forget(self, now_us: int) -> None:
        """Drop what has left the window."""
        for times in (self.admitted_us, self.refused_us):
            while times and times[0] <= now_us - WINDOW_US:
                times.popleft()


class Lease:
    """Place of one running request; give it back with ``release`` or as a context manager."""

    __slots__ = ("_counts",)

    def __init__(self, counts: _Counts) -> None:
        self._counts: _Counts | None = counts

    def release(self) -> None:
        """Give the place back; a second call does nothing."""
        if self._counts is not None:
            self._counts.running -= 1
            self._counts = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class RateLimiter:
    """Admits requests within the limits of their decisions.

    Not thread-safe: it belongs to one event loop, and no method awaits.
    """

    def __init__(
        self,
        monotonic: Callable[[], float],
        share: Callable[[], float] = lambda: 1.0,
        max_keys: int = 100_000,
    ) -> None:
        """Create a limiter.

        Args:
            monotonic: Clock that never goes back, in seconds.
            share: Part of each limit that this gateway may give out, above 0 and at most 1: one
                over the number of gateways alive. Asked at each admission.
            max_keys: Keys counted at once. Keys come from verified credentials, so only that
                many real callers in one minute reach it; the next one is then told to wait,
                because forgetting an active one would lift its limit.
        """
        self._monotonic = monotonic
        self._share = share
        self._max_keys = max_keys
        self._keys: OrderedDict[str, _Counts] = OrderedDict()

    def __len__(self) -> int:
        """Number of keys counted now."""
        return len(self._keys)

    def acquire(self, key: str, limits: Limits) -> Lease:
        """Admit one request and count it.

        A refused request counts for nothing, and one whose decision sets no bound per minute
        does not count towards that of another.

        Args:
            key: What counts together: the key of the principal.
            limits: Limits of the decision; a bound that is ``None`` does not bind.

        Raises:
            TooManyParallel: As many requests as allowed are running.
            RateLimited: The minute is full; ``retry_after_s`` says when it no longer is.
            Overloaded: Too many different callers at once.
        """
        now_us = int(self._monotonic() * 1_000_000)
        counts = self._counts(key, now_us)
        if limits.parallel_requests is not None:
            most = self._own(limits.parallel_requests)
            if counts.running >= most:
                raise TooManyParallel(
                    f"At most {limits.parallel_requests} requests at the same time are allowed "
                    "to you; wait for one to end.",
                    None,
                    1,
                )
        if limits.requests_per_minute is not None:
            most = self._own(limits.requests_per_minute)
            if len(counts.admitted_us) >= most:
                free_us = counts.admitted_us[-most] + WINDOW_US - now_us
                raise RateLimited(
                    f"At most {limits.requests_per_minute} requests per minute are allowed to "
                    "you; try again shortly.",
                    None,
                    max(1, -(-free_us // 1_000_000)),
                )
            counts.admitted_us.append(now_us)
        counts.running += 1
        return Lease(counts)

    def check_refusals(self, key: str) -> None:
        """Hold a caller back that was refused too often; before its request is read.

        Raises:
            RateLimited: It was; ``retry_after_s`` says when it may ask again.
            Overloaded: Too many different callers at once.
        """
        now_us = int(self._monotonic() * 1_000_000)
        refused_us = self._counts(key, now_us).refused_us
        most = self._own(REFUSALS_PER_MINUTE)
        if len(refused_us) >= most:
            free_us = refused_us[-most] + WINDOW_US - now_us
            raise RateLimited(
                f"{most} requests of yours were refused within a minute; correct them, and try "
                "again later.",
                None,
                max(1, -(-free_us // 1_000_000)),
            )

    def refused(self, key: str) -> None:
        """Count a request that was refused for what it says. Never raises.

        Its key has been looked at by ``check_refusals``; one that was dropped since then, because
        there were too many others, counts for nothing.
        """
        if counts := self._keys.get(key):
            counts.refused_us.append(int(self._monotonic() * 1_000_000))

    def _own(self, limit: int) -> int:
        """What this gateway may give out of a limit."""
        # The addend keeps 98 * (1 / 49), a hair under 2 in floating point, from becoming 1.
        return max(1, int(limit * self._share() + 1e-9))

    def _counts(self, key: str, now_us: int) -> _Counts:
        counts = self._keys.get(key)
        if counts is None:
            self._evict(now_us)
            if len(self._keys) >= self._max_keys:
                raise Overloaded("Too many callers at once; try again shortly.", None, 5)
            counts = self._keys[key] = _Counts()
        else:
            self._keys.move_to_end(key)
        counts.forget(now_us)
        return counts

    def _evict(self, now_us: int) -> None:
        """Drop the least recently used keys that hold nothing any more; two for each new one."""
        tries = 64 if len(self._keys) >= self._max_keys else 2
        for _ in range(min(tries, len(self._keys))):
            key, counts = next(iter(self._keys.items()))
            counts.forget(now_us)
            if counts.running or counts.admitted_us or counts.refused_us:
                self._keys.move_to_end(key)
            else:
                del self._keys[key]
