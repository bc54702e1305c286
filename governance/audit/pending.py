"""What waits in a writer's queue, and how its callers hear of the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from governance.audit.content import Cell


@dataclass(slots=True)
class Item:
    """One call, on its way to the writer's thread."""

    record: dict[str, Any] | None
    cells: Sequence[Cell]
    size_bytes: int
    """Of its ciphertext."""
    done: Waiter
    error: Exception | None = None


class Waiter:
    """Who waits for an item: nobody."""

    __slots__ = ()

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

    def settle(self, item: Item, loops: Loops) -> None:
        """Tell of a loss."""
        if item.error is not None and self.lost is not None:
            self.lost()


def resolve(waiters: list[tuple[asyncio.Future[None], Exception | None]]) -> None:
    """Runs in the waiters' event loop."""
    for future, error in waiters:
        if future.done():  # Cancelled: the caller has gone, the record stays.
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
