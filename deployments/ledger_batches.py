"""Group commit: many callers, one transaction at a time, and nothing said too early.

Calls only queue and wait. One task takes everything that waits, runs it as one batch in the
ledger's own thread, and resolves all answers when the batch is on disk. While the disk works the
next group gathers, so the busier the ledger is, the less one call costs, and no answer is given
that a crash could take back. The event loop never waits for the disk.

**One bad call does not fail its group.** What a call may raise by its contract is its own answer.
Anything else undoes the batch, and its calls are run again one by one.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from governance.budget.ledger import BudgetLedger
from governance.errors import GatehouseError, InternalError, InvalidRequest, LedgerUnavailable
from governance.tracebacks import without_messages

log = logging.getLogger("gatehouse.ledger")

MAX_GROUP = 512
"""Most calls in one batch."""
MAX_QUEUE = 20_000
"""Calls that may wait; more are refused, and come again."""

T = TypeVar("T")


@dataclass(slots=True)
class _Call:
    """One call on its way through a batch."""

    work: Callable[[BudgetLedger], Any]
    future: asyncio.Future[Any]
    result: Any = None
    error: Exception | None = None

    def run(self, ledger: BudgetLedger) -> None:
        """Run it inside a batch; what it may raise is kept as its answer."""
        self.result, self.error = None, None
        try:
            self.result = self.work(ledger)
        except GatehouseError as error:
            self.error = error
        except ValueError as error:
            self.error = InvalidRequest(str(error))

    def answer(self) -> None:
        """Tell who waits, if anybody still does."""
        if self.future.done():
            return
        if self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)


class Batches:
    """Runs calls on a ledger, in batches.

    Args:
        thread: The ledger's own; nothing else may run in it at the same time.
        ledger: Gives the ledger, asked in that thread; ``None`` while there is none.
    """

    def __init__(
        self, thread: ThreadPoolExecutor, ledger: Callable[[], BudgetLedger | None]
    ) -> None:
        self._thread = thread
        self._ledger = ledger
        self._queue: list[_Call] = []
        self._wake = asyncio.Event()

    @property
    def queued(self) -> int:
        """Calls that wait for a batch."""
        return len(self._queue)

    async def call(self, work: Callable[[BudgetLedger], T]) -> T:
        """Run something in the next batch; returns when it is on disk.

        Raises:
            LedgerUnavailable: Too many wait, or nobody knows whether it was done.
            GatehouseError: What the work raised; a ``ValueError`` of it is ``InvalidRequest``.
        """
        if len(self._queue) >= MAX_QUEUE:
            raise LedgerUnavailable
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.append(_Call(work, future))
        self._wake.set()
        return await future

    async def run(self) -> None:
        """Commit for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                group, self._queue = self._queue[:MAX_GROUP], self._queue[MAX_GROUP:]
                try:
                    await loop.run_in_executor(self._thread, self._commit, group)
                except Exception as error:
                    log.error("ledger: batch lost\n%s", without_messages(error))
                    for call in group:
                        call.error = LedgerUnavailable()
                for call in group:
                    call.answer()

    def _commit(self, group: Sequence[_Call]) -> None:
        """In the ledger's thread: run calls as one batch, or one by one where that fails."""
        ledger = self._ledger()
        if ledger is None:
            for call in group:
                call.error = LedgerUnavailable()
            return
        try:
            with ledger.batch():
                for call in group:
                    call.run(ledger)
        except sqlite3.OperationalError as error:
            # The disk is full, or fails: it is none of the calls' fault.
            name = getattr(error, "sqlite_errorname", "")
            log.error("ledger: %d calls not stored: %s", len(group), name)
            for call in group:
                call.error = LedgerUnavailable()
        except Exception as error:
            if len(group) > 1:
                for call in group:
                    self._commit([call])
                return
            log.error("ledger: a call failed\n%s", without_messages(error))
            group[0].error = InternalError()
