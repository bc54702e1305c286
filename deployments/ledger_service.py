"""The budget ledger as a service: what gateways, engines and administration may call.

**Batches.** Every call waits until it is on disk (``ledger_batches``).

**Configuration.** Of two builds of the application the later one holds (``ledger_budgets``): a
gateway of an older build that starts late changes nothing. ``apply`` takes up another file while
everything runs; what was spent counts on in it, and gateways follow within two seconds
(``ledger_follow``).

**Shards.** One of several ledgers answers for the accounts of its cohorts (``Tree.shard``) and for
no others. How many there are is written in the database, and a file that says otherwise is
refused: each would look for what was spent in another ledger than the one that knows it.

**Audit.** What must be recorded is an event in the transaction of what it tells of
(``governance.budget.events``); ``LedgerAudit`` moves events on to the audit trail. An override
waits for that before it is answered:

1. The trail must be writable, else refused, and nothing is done.
2. Override and event are committed together. A crash from here on leaves both: the event is written
   after the restart. The caller got no answer, and may repeat.
3. The event is written to the trail. If that fails, the override is cleared (an event as well), and
   the answer is ``AuditUnavailable``. Both events stay in the database until they can be written.

The end of an override, a transfer and a new file are not undone in step 3: the first returns to
what everybody agreed to, and of the others somebody may have spent already. Their events wait in
the database until they can be written, and the answer says that they are not yet.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from deployments.ledger_alerts import LedgerAlerts
from deployments.ledger_audit import LedgerAudit
from deployments.ledger_batches import Batches
from deployments.ledger_budgets import SHARDS, Budgets, check_count, check_homes, kept_beside
from governance.budget.config import BudgetsConfig
from governance.budget.ledger import BudgetLedger
from governance.budget.messages import AccountState, MeterReport, RenewReply, RenewRequest
from governance.budget.store import LedgerStore, LedgerStoreError
from governance.errors import (
    AuditUnavailable,
    GatehouseError,
    InvalidRequest,
    LedgerUnavailable,
    NoAccount,
    ObjectNotFound,
)
from governance.ports import Clock
from governance.yaml_config import ConfigError, YamlFile, validate

log = logging.getLogger("gatehouse.ledger")

SWEEP_S = 0.5

T = TypeVar("T")


class LedgerService:
    """See the module. One per process; ``start`` in the event loop that calls it.

    Args:
        path: The ledger's database.
        wal_root: Where audit writers have their logs.
        clock: Wall clock, microseconds.
        monotonic: Seconds of a clock that never goes back.
        shard: Which of the ledgers it is, from 0.

    Raises:
        LedgerStoreError: The database cannot be used.
    """

    def __init__(
        self,
        path: Path,
        wal_root: Path,
        *,
        clock: Clock,
        monotonic: Callable[[], float],
        shard: int = 0,
    ) -> None:
        self.shard = shard
        self._path = path
        self._kept = kept_beside(path)
        self._clock = clock
        self._monotonic = monotonic
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._ledger: BudgetLedger | None = None
        self._budgets: Budgets | None = None
        self._batches = Batches(self._thread, lambda: self._ledger)
        self._tasks: list[asyncio.Task[None]] = []
        self._configuring = asyncio.Lock()
        self.late = 0
        """Calls that came after their deadline, and were refused."""
        self.audit = LedgerAudit(wal_root, self._events, self._confirm, clock=clock)
        self.telling = LedgerAlerts(self, self._webhook, clock=clock)
        if (kept := Budgets.read(self._kept)) is not None:
            self._open(kept)

    def start(self) -> None:
        """Begin to serve; repeating it is harmless."""
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(self._batches.run(), name="ledger-commit"),
                asyncio.create_task(self._sweep(), name="ledger-sweep"),
                asyncio.create_task(self.audit.run(), name="ledger-audit"),
                asyncio.create_task(self.telling.run(), name="ledger-alerts"),
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

    async def state(
        self, account: str | None = None, users: bool = False
    ) -> tuple[AccountState, ...]:
        """``BudgetLedger.state``, of accounts that live here."""
        tree, found = await self._call(
            lambda ledger: (ledger.tree, ledger.state(account, users=users))
        )
        return tuple(each for each in found if tree.shard(each.account) == self.shard)

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

    async def transfer(
        self,
        source: str,
        target: str,
        gpu_us: int,
        tokens: int,
        reason: str,
        by: str,
        deadline_us: int,
        key: str,
    ) -> tuple[AccountState, AccountState]:
        """Move budget between two accounts until their window ends; recorded when it returns.

        Args:
            source: Whose budget becomes smaller.
            target: Whose becomes larger.
            gpu_us: Charged device-microseconds.
            tokens: Tokens.
            reason: For the record.
            by: Principal key of who does it.
            deadline_us: Not done later than this; see ``set_override``.
            key: Of this demand: what comes again with it is not done again.

        Returns:
            Both accounts as they are then.

        Raises:
            ObjectNotFound: There is no such account.
            InvalidRequest: It cannot be moved; the message says why.
            AuditUnavailable: It was not done, or it is not in the audit trail yet.
            LedgerUnavailable: Nobody knows whether it was done.
        """
        self._in_time(deadline_us)
        await self.audit.check()
        states = await self._administer(
            lambda ledger: ledger.transfer(source, target, gpu_us, tokens, by, reason, key=key)
        )
        await self.audit.flush()
        return states

    # -- configuration ------------------------------------------------------------------------

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

    async def apply(self, config: Mapping[str, Any], reason: str, by: str, deadline_us: int) -> str:
        """Take up another budgets file while everything runs; recorded when it returns.

        It is kept like the budgets of a build of this moment: it holds after a restart, and until
        the application is built again.

        Args:
            config: The file's contents.
            reason: For the record.
            by: Principal key of who does it.
            deadline_us: Not done later than this; see ``set_override``.

        Returns:
            Digest of the file.

        Raises:
            InvalidRequest: It is not a budgets file, does not add up, or would move an account to
                another ledger; the message says where and why. Nothing was changed.
            AuditUnavailable: It was not done, or it is not in the audit trail yet.
            LedgerUnavailable: No budgets are known yet, or nobody knows whether it was done.
        """
        self._in_time(deadline_us)
        if not 0 < len(by) <= 256 or not 0 < len(reason) <= 1000:
            raise InvalidRequest("Say who, in 256 characters at most, and why, in 1000 at most.")
        try:
            parsed = validate(YamlFile("budgets", dict(config), {}), BudgetsConfig)
        except ConfigError as error:
            raise InvalidRequest(f"The budgets are not taken up. {error}") from None
        await self.audit.check()
        async with self._configuring:
            if self._budgets is None:
                raise LedgerUnavailable
            new = self._budgets.applied(parsed, self._clock())
            try:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._thread, self._take_up, new, by, reason)
            except (LedgerStoreError, ValueError) as error:
                raise InvalidRequest(f"The budgets are not taken up. {error}") from None
            except (OSError, sqlite3.Error) as error:
                log.error("budgets not taken up: %s", type(error).__name__)
                raise LedgerUnavailable from error
        await self.audit.flush()
        return parsed.digest

    async def budgets(self) -> dict[str, Any]:
        """The budgets that hold (``Budgets.dump``), for gateways that have others.

        Raises:
            LedgerUnavailable: No gateway has given any yet.
        """
        if self._budgets is None:
            raise LedgerUnavailable
        return self._budgets.dump()

    def _is_news(self, new: Budgets) -> bool:
        now = self._budgets
        if now is None or self._ledger is None:
            return True
        # A build from the future tells of a clock that was wrong; it must not hold for ever.
        wrong_clock = now.built_us > self._clock()
        return new.built_us > now.built_us or (wrong_clock and new.built_us != now.built_us)

    def _take_up(self, new: Budgets, by: str | None = None, reason: str | None = None) -> None:
        """In the ledger's thread: keep the budgets, and work by them from now on."""
        if self._ledger is None:
            self._open(new)
            new.write(self._kept)
            return
        held = self._ledger.config
        check_homes(held, new.config)
        if by is not None:
            self._ledger.check_file(new.config)
        # Kept first: after a crash in between the ledger is opened with what is kept, and says so.
        new.write(self._kept)
        self._ledger.apply(new.config, by, reason)
        self._budgets = new
        if held.digest != new.config.digest:
            log.info("budgets %s taken up", new.config.digest[:12])

    def _open(self, budgets: Budgets) -> None:
        config, store = budgets.config, LedgerStore(self._path)
        try:
            check_count(store, config, self._path)
            self._ledger = BudgetLedger(store, config, clock=self._clock, monotonic=self._monotonic)
        except BaseException:
            store.close()
            raise
        self._ledger.remember(SHARDS, str(config.shards))
        self._budgets = budgets
        log.info("budgets %s taken up", config.digest[:12])

    # -- counters -----------------------------------------------------------------------------

    async def stats(self) -> dict[str, int]:
        """Counters since the process started, for metrics."""
        counted = await self._call(lambda ledger: ledger.stats)
        own = {
            "queued": self._batches.queued,
            "events_waiting": self.audit.waiting,
            "late": self.late,
        }
        return {**{name: getattr(counted, name) for name in counted.__slots__}, **own}

    # -- inside -------------------------------------------------------------------------------

    async def _call(self, work: Callable[[BudgetLedger], T]) -> T:
        """Run something in the next batch; returns when it is on disk."""
        return await self._batches.call(work)

    async def _administer(self, work: Callable[[BudgetLedger], T]) -> T:
        try:
            return await self._call(work)
        except NoAccount:
            raise ObjectNotFound("There is no such budget account.") from None

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            with suppress(GatehouseError):
                await self._call(lambda ledger: ledger.sweep())

    # -- for audit and alerts -----------------------------------------------------------------

    async def _events(self, limit: int) -> list[tuple[int, dict[str, Any]]]:
        return await self._call(lambda ledger: ledger.events(limit))

    async def _confirm(self, up_to: int) -> None:
        await self._call(lambda ledger: ledger.events_written(up_to))

    async def alerts(self, limit: int) -> list[tuple[int, dict[str, Any]]]:
        """``BudgetLedger.alerts``."""
        return await self._call(lambda ledger: ledger.alerts(limit))

    async def alerts_done(self, up_to: int) -> None:
        """``BudgetLedger.alerts_done``."""
        await self._call(lambda ledger: ledger.alerts_done(up_to))

    async def alert_lost(self, alert: Mapping[str, Any], reason: str) -> None:
        """``BudgetLedger.alert_lost``."""
        await self._call(lambda ledger: ledger.alert_lost(alert, reason))

    def _webhook(self) -> str | None:
        return None if self._budgets is None else self._budgets.config.alerts.webhook

    def _in_time(self, deadline_us: int) -> None:
        late_us = self._clock() - deadline_us
        if late_us > 0:
            # After a restart there may be many; if it does not end, clocks of two machines differ.
            if not self.late:
                log.warning("ledger: a call came %d ms after its deadline", late_us // 1000)
            self.late += 1
            raise LedgerUnavailable
