"""Collects concurrent calls into batches and works them off in one thread.

An idle batcher starts with the first item at once; what arrives while it works forms the next
batch. So nothing waits for company that may not come, and batches grow with the load by themselves.

Bounded in three ways: items that wait, the time an item waits (one that nobody waits for any more
is not worked on), and at most what can be done in time is taken at all, by the time that recent
items took. Whoever is turned away learns it at once.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from governance.tracebacks import without_messages
from routing.types import ScorerUnavailable

log = logging.getLogger("gatehouse.routing")

In = TypeVar("In")
Out = TypeVar("Out")

SMOOTHING = 0.2
"""Weight of the latest batch in the mean time of an item."""
CLOSE_S = 5.0
"""Time that a batch in progress has when the batcher closes."""
LOG_EVERY_S = 60.0
"""Failures of the work are logged this often at most: whoever can cause one could fill a disk."""

LATE, FAILED, UNREACHABLE = "late", "failed", "unreachable"


class Backlogged(ScorerUnavailable):
    """Turned away at once, because too many wait: says nothing about whether the scorer works."""

    def __init__(self) -> None:
        super().__init__(LATE)


@dataclass(slots=True)
class BatchStats:
    """Counts since the start."""

    batches: int = 0
    items: int = 0
    """Items that were worked on."""
    busy_us: int = 0
    """Time in which a batch was being worked on."""
    refused: int = 0
    """Items that were not taken: too many waited."""
    expired: int = 0
    """Items that were given up before their turn."""
    dropped: int = 0
    """Results that came when nobody waited for them any more."""
    failed: int = 0
    """Items on which the work failed."""


@dataclass(slots=True, eq=False)
class _Entry(Generic[In, Out]):
    item: In
    future: asyncio.Future[Out]
    since: float
    until: float


class _Failed:
    """Stands for the result of an item on which the work failed."""


class MicroBatcher(Generic[In, Out]):
    """Calls ``work`` with lists of items; use it on one event loop.

    Args:
        work: Gives one result for each item, in order. Called in one thread, never twice at once.
        max_batch: Items in one call, at least 1.
        wait_s: How long a batch that follows another one may wait to become full, counted from the
            arrival of its oldest item. 0 where larger batches save little.
        max_waiting: Items that may wait for their turn.
    """

    def __init__(
        self,
        work: Callable[[Sequence[In]], Sequence[Out]],
        *,
        max_batch: int,
        wait_s: float = 0.0,
        max_waiting: int = 64,
    ) -> None:
        self.stats = BatchStats()
        self._work = work
        self._max_batch = max_batch
        self._wait_s = wait_s
        self._max_waiting = max_waiting
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._waiting: dict[int, _Entry[In, Out]] = {}
        """By number, in order of arrival; one that is given up leaves at once."""
        self._numbers = itertools.count()
        self._running = 0
        self._began = 0.0
        self._item_s = 0.0
        self._full = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._logged_at = -LOG_EVERY_S

    @property
    def waiting(self) -> int:
        """Items that wait for their turn."""
        return len(self._waiting)

    @property
    def stuck_s(self) -> float:
        """For how long the batch in progress has been worked on; 0 while idle."""
        return time.monotonic() - self._began if self._running else 0.0

    async def submit(self, item: In, timeout_s: float) -> Out:
        """The result of one item. Cancelling gives the item up.

        Args:
            item: What to work on.
            timeout_s: How long to wait for it.

        Raises:
            Backlogged: Too many wait.
            ScorerUnavailable: ``late``, ``failed``, or ``unreachable`` once closed.
        """
        if self._closed:
            raise ScorerUnavailable(UNREACHABLE)
        if self._is_behind(timeout_s):
            self.stats.refused += 1
            raise Backlogged()
        loop = asyncio.get_running_loop()
        now = loop.time()
        entry = _Entry(item, loop.create_future(), now, now + timeout_s)
        number = next(self._numbers)
        self._waiting[number] = entry
        if len(self._waiting) >= self._max_batch:
            self._full.set()
        if self._task is None:
            self._task = loop.create_task(self._run())
        try:
            async with asyncio.timeout_at(entry.until):
                result: Out = await entry.future
                return result
        except TimeoutError:
            raise ScorerUnavailable(LATE) from None
        finally:
            if self._waiting.pop(number, None) is not None:
                self.stats.expired += 1

    async def close(self) -> None:
        """Turn away what waits; what is being worked on is finished."""
        self._closed = True
        for entry in self._waiting.values():
            if not entry.future.done():
                entry.future.set_exception(ScorerUnavailable(UNREACHABLE))
        self._waiting.clear()
        self._full.set()
        if (task := self._task) is not None:
            await asyncio.wait((task,), timeout=CLOSE_S)
            task.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _is_behind(self, timeout_s: float) -> bool:
        """Whether one more item would have to wait for too long.

        Never while idle, so that one slow batch cannot turn everything away for good.
        """
        ahead = len(self._waiting) + self._running
        return len(self._waiting) >= self._max_waiting or (
            ahead > 0 and ahead * self._item_s > timeout_s
        )

    async def _run(self) -> None:
        """Work until nothing waits."""
        try:
            while batch := self._take():
                await self._process(batch)
                await self._gather()
        finally:
            self._task = None

    def _take(self) -> list[_Entry[In, Out]]:
        numbers = list(itertools.islice(self._waiting, self._max_batch))
        return [self._waiting.pop(number) for number in numbers]

    async def _gather(self) -> None:
        """Let the next batch become full, within the bound."""
        if not self._wait_s or not 0 < len(self._waiting) < self._max_batch:
            return
        oldest = next(iter(self._waiting.values()))
        self._full.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(oldest.since + self._wait_s):
                await self._full.wait()

    async def _process(self, batch: list[_Entry[In, Out]]) -> None:
        self._running, self._began = len(batch), time.monotonic()
        results: Sequence[Out | _Failed] = [_Failed()] * len(batch)
        try:
            results = await asyncio.get_running_loop().run_in_executor(
                self._executor, self._attempt, [entry.item for entry in batch]
            )
        finally:
            self._deliver(batch, results, time.monotonic() - self._began)

    def _deliver(
        self, batch: list[_Entry[In, Out]], results: Sequence[Out | _Failed], took_s: float
    ) -> None:
        self._running = 0
        for entry, result in zip(batch, results, strict=True):
            if entry.future.done():
                self.stats.dropped += 1
            elif isinstance(result, _Failed):
                self.stats.failed += 1
                entry.future.set_exception(ScorerUnavailable(FAILED))
            else:
                entry.future.set_result(result)
        self.stats.batches += 1
        self.stats.items += len(batch)
        self.stats.busy_us += int(took_s * 1e6)
        item_s = took_s / len(batch)
        weight = SMOOTHING if self._item_s else 1.0
        self._item_s += weight * (item_s - self._item_s)

    def _attempt(self, items: list[In]) -> list[Out | _Failed]:
        """In the thread. A batch that fails is taken apart: one item must not fail the others."""
        try:
            results = self._work(items)
            if len(results) == len(items):
                return list(results)
            log.error("%d results for %d prompts", len(results), len(items))
        except BaseException as error:  # a panic of the tokenizer's Rust code is no Exception
            self._note(error)
        if len(items) == 1:
            return [_Failed()]
        return [self._attempt([item])[0] for item in items]

    def _note(self, error: BaseException) -> None:
        now = time.monotonic()
        if now - self._logged_at >= LOG_EVERY_S:
            self._logged_at = now
            log.warning("a prompt could not be scored\n%s", without_messages(error))
