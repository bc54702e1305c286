"""The budget ledger as a service: many callers, one transaction at a time, nothing said too early.

**Group commit.** Calls only queue and wait. One task takes everything that waits, runs it as one
batch in the ledger's own thread, and resolves all answers when the batch is on disk. While the
disk works the next group gathers, so the busier the ledger is, the less one call costs, and no
answer is given that a crash could take back. The event loop never waits for the disk.

**One bad call does not fail its group.** What a call may raise by its contract is its own answer.
Anything else undoes the batch, and its calls are run again one by one.

**Configuration.** Of two builds of the application the later one holds (``ledger_budgets``): a
gateway of an older build that starts late changes nothing.

**Audit.** What must be recorded is an event in the transaction of what it tells of
(``governance.budget.events``); ``LedgerAudit`` moves events on to the audit trail. An override
waits for that before it is answered:

1. The trail must be writable, else refused, and nothing is done.
2. Override and event are committed together. A crash from here on leaves both: the event is written
   after the restart. The caller got no answer, and may repeat.
3. The event is written to the trail. If that fails, the override is cleared (an event as well), and
   the answer is ``AuditUnavailable``. Both events stay in the database until they can be written.

Ending an override is not undone in step 3: the limits of the file are what everybody agreed to.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from deployments.ledger_audit import LedgerAudit
from deployments.ledger_budgets import Budgets
from governance.budget.ledger import BudgetLedger
from governance.budget.messages import AccountState, MeterReport, RenewReply, RenewRequest
from governance.budget.store import LedgerStoreError
from governance.errors import (
    AuditUnavailable,
    GatehouseError,
    InternalError,
    InvalidRequest,
    LedgerUnavailable,
    NoAccount,
    ObjectNotFound,
)
from governance.ports import Clock
from governance.tracebacks import without_messages

log = logging.getLogger("gatehouse.ledger")

SWEEP_S = 0.5
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


class LedgerService:
    """See the module. One per process; ``start`` in the event loop that calls it.

    Args:
        path: The ledger's database.
        wal_root: Where audit writers have their logs.
        clock: Wall clock, microseconds.
        monotonic: Seconds of a clock that never goes back.

    Raises:
        LedgerStoreError: The database cannot be used.
    """

    def __init__(
        self, path: Path, wal_root: Path, *, clock: Clock, monotonic: Callable[[], float]
    ) -> None:
        self._path = path
        self._clock = clock
        self._monotonic = monotonic
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._ledger: BudgetLedger | None = None
        self._budgets: Budgets | None = None
        self._queue: list[_Call] = []
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._configuring = asyncio.Lock()
        self.late = 0
        """Calls that came after their deadline, and were refused."""
        self.audit = LedgerAudit(wal_root, self._events, self._confirm, clock=clock)
        if (kept := Budgets.read(path.parent)) is not None:
            self._open(kept)

    def start(self) -> None:
        """Begin to serve; repeating it is harmless."""
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(self._commit_all(), name="ledger-commit"),
                asyncio.create_task(self._sweep(), name="ledger-sweep"),
                asyncio.create_task(self.audit.run(), name="ledger-audit"),
            ]

    async def stop(self) -> None:
        """Serve what waits, then close everything."""
        with suppress(GatehouseError):
            await self.audit.flush()  # goes behind whatever waits
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.audit.close()
        if self._ledger is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._ledger.close)
        self._thread.shutdown()

    # -- what gateways and engines say --------------------------------------------------------

    async def renew(self, request: RenewRequest, deadline_us: int | None = None) -> RenewReply:
        """``BudgetLedger.renew``; durable when it returns.

        Args:
            request: What the gateway says.
            deadline_us: Not done later than this; see ``set_override``.

        Raises:
            InvalidRequest: It is not possible; nothing was changed.
            LedgerUnavailable: It came too late, or nobody knows whether it was done.
        """
        if deadline_us is not None:
            self._in_time(deadline_us)
        reply = await self._call(lambda ledger: ledger.renew(request))
        return reply if self._budgets is None else self._budgets.weighed(reply)

    async def report(self, report: MeterReport) -> None:
        """``BudgetLedger.report``; durable when it returns."""
        await self._call(lambda ledger: ledger.report(report))

    # -- administration -----------------------------------------------------------------------

    async def state(self, account: str | None = None) -> tuple[AccountState, ...]:
        """``BudgetLedger.state``."""
        return await self._call(lambda ledger: ledger.state(account))

    async def set_override(
        self,
        account: str,
        limit_us: int | None,
        limit_tokens: int | None,
        expires_us: int,
        reason: str,
        by: str,
        deadline_us: int,
    ) -> AccountState:
        """Override an account's limits until a moment; recorded when it returns.

        Args:
            account: The account.
            limit_us: Charged device-microseconds per window; ``None``: as the file says.
            limit_tokens: Tokens per window; ``None``: as the file says.
            expires_us: When the file's limits hold again.
            reason: For the record.
            by: Principal key of who does it.
            deadline_us: Not done later than this: a call may wait in Ray while this process is
                started again, and its caller has long been told that it failed.

        Raises:
            ObjectNotFound: There is no such account.
            InvalidRequest: A value is out of range.
            AuditUnavailable: It cannot be recorded, and was not done or was taken back.
            LedgerUnavailable: Nobody knows whether it was done.
        """
        self._in_time(deadline_us)
        await self.audit.check()
        state = await self._administer(
            lambda ledger: ledger.set_override(
                account, limit_us, limit_tokens, expires_us, by, reason
            )
        )
        try:
            await self.audit.flush()
        except AuditUnavailable:
            log.error("override of %s taken back: the audit trail cannot be written", account)
            await self._administer(
                lambda ledger: ledger.clear_override(account, by, "not recorded, so taken back")
            )
            raise
        return state

    async def clear_override(self, account: str, by: str, deadline_us: int) -> AccountState:
        """End an override; recorded when it returns.

        Raises:
            ObjectNotFound: There is no such account.
            AuditUnavailable: It is not in the audit trail yet; it may be done nevertheless.
            LedgerUnavailable: Nobody knows whether it was done.
        """
        self._in_time(deadline_us)
        await self.audit.check()
        state = await self._administer(
            lambda ledger: ledger.clear_override(account, by, "cleared by hand")
        )
        await self.audit.flush()
        return state

    async def configure(self, budgets: Mapping[str, Any]) -> None:
        """Take up the budgets of a build of the application, unless a later one has come before.

        Raises:
            LedgerUnavailable: They cannot be kept.
        """
        new = Budgets.load(budgets)
        async with self._configuring:
            if not self._is_news(new):
                return
            try:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._thread, self._take_up, new)
            except (OSError, sqlite3.Error, LedgerStoreError) as error:
                reason = error if isinstance(error, LedgerStoreError) else type(error).__name__
                log.error("budgets not taken up: %s", reason)
                raise LedgerUnavailable from error

    async def stats(self) -> dict[str, int]:
        """Counters since the process started, for metrics."""
        counted = await self._call(lambda ledger: ledger.stats)
        own = {
            "queued": len(self._queue),
            "events_waiting": self.audit.waiting,
            "late": self.late,
        }
        return {**{name: getattr(counted, name) for name in counted.__slots__}, **own}

    # -- configuration ------------------------------------------------------------------------

    def _is_news(self, new: Budgets) -> bool:
        now = self._budgets
        if now is None or self._ledger is None:
            return True
        # A build from the future tells of a clock that was wrong; it must not hold for ever.
        wrong_clock = now.built_us > self._clock()
        return new.built_us > now.built_us or (wrong_clock and new.built_us != now.built_us)

    def _take_up(self, new: Budgets) -> None:
        """In the ledger's thread: keep the budgets, and open the ledger with them."""
        new.write(self._path.parent)
        if self._ledger is not None:
            if self._ledger.config.digest == new.config.digest:
                self._budgets = new
                return
            ledger, self._ledger = self._ledger, None
            ledger.close()
        self._open(new)

    def _open(self, budgets: Budgets) -> None:
        self._ledger = BudgetLedger.open(
            self._path, budgets.config, clock=self._clock, monotonic=self._monotonic
        )
        self._budgets = budgets
        log.info("budgets %s taken up", budgets.config.digest[:12])

    # -- group commit -------------------------------------------------------------------------

    async def _call(self, work: Callable[[BudgetLedger], T]) -> T:
        """Run something in the next batch; returns when it is on disk."""
        if len(self._queue) >= MAX_QUEUE:
            raise LedgerUnavailable
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.append(_Call(work, future))
        self._wake.set()
        return await future

    async def _administer(self, work: Callable[[BudgetLedger], AccountState]) -> AccountState:
        try:
            return await self._call(work)
        except NoAccount:
            raise ObjectNotFound("There is no such budget account.") from None

    async def _commit_all(self) -> None:
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
        ledger = self._ledger
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

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            with suppress(GatehouseError):
                await self._call(lambda ledger: ledger.sweep())

    # -- for the audit ------------------------------------------------------------------------

    async def _events(self, limit: int) -> list[tuple[int, dict[str, Any]]]:
        return await self._call(lambda ledger: ledger.events(limit))

    async def _confirm(self, up_to: int) -> None:
        await self._call(lambda ledger: ledger.events_written(up_to))

    def _in_time(self, deadline_us: int) -> None:
        late_us = self._clock() - deadline_us
        if late_us > 0:
            # After a restart there may be many; if it does not end, clocks of two machines differ.
            if not self.late:
                log.warning("ledger: a call came %d ms after its deadline", late_us // 1000)
            self.late += 1
            raise LedgerUnavailable
