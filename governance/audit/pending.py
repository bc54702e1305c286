"""What waits for a writer's thread, its bounded queue, and how its callers hear of the end."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from governance.audit.content import Cell
from governance.audit.options import WalOptions, WriterStats
from governance.errors import AuditUnavailable


@dataclass(slots=True)
class Item:
    """One call, on its way to the writer's thread."""

    record: dict[str, Any] | None
    cells: Sequence[Cell]
    size_bytes: int
    """Of its ciphertext."""
    done: Waiter
    unless: Callable[[], bool] | None = None
    """Asked before it is written, once all that was put before it is written or lost: whether it
    must not be."""
    error: Exception | None = None


class Waiter:
    """Who waits for an item: nobody."""

    __slots__ = ()

    def lose(self) -> None:
        """The item will not be written; said before anything behind it is looked at."""

    def settle(self, item: Item, loops: Loops) -> None:
        """The item is durable, or has failed with ``item.error``."""


Loops = dict[asyncio.AbstractEventLoop, list[tuple["asyncio.Future[None]", Exception | None]]]


@dataclass(slots=True)
class Awaited(Waiter):
    """A coroutine; told in its event loop."""

    future: asyncio.Future[None]

    def settle(self, item: Item, loops: Loops) -> None:
        """Note it for its loop."""
        loops.setdefault(self.future.get_loop(), []).append((self.future, item.error))


@dataclass(slots=True)
class Blocked(Waiter):
    """A thread; told at once."""

    future: Future[None]

    def settle(self, item: Item, loops: Loops) -> None:
        """Wake it."""
        if item.error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(item.error)


@dataclass(slots=True)
class Posted(Waiter):
    """Nobody, but for a loss."""

    lost: Callable[[], None] | None

    def lose(self) -> None:
        """Tell of a loss, once."""
        lost, self.lost = self.lost, None
        if lost is not None:
            lost()

    def settle(self, item: Item, loops: Loops) -> None:
        """Tell of a loss."""
        if item.error is not None:
            self.lose()


def resolve(waiters: list[tuple[asyncio.Future[None], Exception | None]]) -> None:
    """Runs in the waiters' event loop."""
    for future, error in waiters:
        if future.done():  # Cancelled: the caller has gone, the record stays.
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


class Stop:
    """Last thing in the queue."""


class Intake:
    """The queue: bounded in items and in bytes, closed for good by ``stop`` or ``refuse_all``.

    Any thread puts; the writer's thread takes.

    Args:
        options: The bounds.
        stats: Where what waits, and what was refused, is counted.
    """

    def __init__(self, options: WalOptions, stats: WriterStats) -> None:
        self.broken = False
        """Nothing is taken in any more, because nothing can be written."""
        self.closing = False
        self._options = options
        self._stats = stats
        self._queue: queue.SimpleQueue[Item | Stop] = queue.SimpleQueue()
        self._guard = threading.Lock()
        self._items = self._bytes = 0
        share = 1 - options.kept_for_ends
        self._most_items = max(1, round(options.queue_records * share))
        self._most_bytes = round(options.queue_bytes * share)

    def put(self, item: Item, *, end: bool = False) -> None:
        """Take an item in.

        Args:
            item: What is to be written.
            end: It may use what is kept for ends.

        Raises:
            AuditUnavailable: There is no place, or nothing is taken in any more.
        """
        most_items = self._options.queue_records if end else self._most_items
        most_bytes = self._options.queue_bytes if end else self._most_bytes
        with self._guard:
            if (
                self.broken
                or self.closing
                or self._items >= most_items
                or self._bytes + item.size_bytes > most_bytes
            ):
                self._stats.refused += 1
                raise AuditUnavailable()
            self._items += 1
            self._bytes += item.size_bytes
            # Here as well as when it is settled, so that a sync that hangs can be seen.
            self._stats.queued = self._items
            # Within the guard, so that nothing can come behind the order to stop.
            self._queue.put(item)

    def count_own(self) -> None:
        """Count an item that does not come through the queue."""
        with self._guard:
            self._items += 1

    def get(self, timeout_s: float | None) -> Item | Stop:
        """The next in line.

        Args:
            timeout_s: How long to wait for it; ``None`` for ever.

        Raises:
            queue.Empty: Nothing came.
        """
        if timeout_s == 0:
            return self._queue.get_nowait()
        return self._queue.get(timeout=timeout_s)

    def stop(self) -> None:
        """Take nothing more in; behind what waits there is an order to stop."""
        with self._guard:
            if not self.closing:
                self.closing = True
                self._queue.put(Stop())

    def refuse_all(self) -> None:
        """Take nothing more in, because nothing can be written."""
        with self._guard:
            self.broken = True

    def settled(self, group: Sequence[Item]) -> None:
        """Items that wait no more."""
        with self._guard:
            self._items -= len(group)
            self._bytes -= sum([item.size_bytes for item in group])
            self._stats.queued = self._items
