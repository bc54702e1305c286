"""Tells the ledger what a replica has metered.

Every half second what has changed; at least every two seconds that the replica lives; at once
when a request ended whose gateway was not given the figure. Figures are cumulative, so a report
that may or may not have arrived is simply followed by a newer one. A row is told until a report
with it has been taken, and forgotten when that row was its last.

A report that the ledger *rejects* would be rejected for ever: it is told again in halves. A row
that is rejected alone, while a report without rows is taken, is given up, with an error in the log:
what its gateway settles is charged.

Where there are several ledgers, each is told the rows of its own reservations, which it knows by
their ids (``governance.budget.shards``), and waits for no other. The meters of the devices go to
the first alone, so that nothing counts twice; to the others they stand still.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol

from deployments.metering.collector import MeterCollector
from deployments.metering.exchange import MeteredExchange
from governance.budget.messages import MeterReport, MeterRow
from governance.budget.shards import book_of, shard_of
from governance.errors import GatehouseError, LedgerUnavailable

log = logging.getLogger("gatehouse.metering")

INTERVAL_S = 0.5
HEARTBEAT_S = 2.0
SEND_TIMEOUT_S = 5.0
MAX_ROWS = 2048
"""Rows of one report; the rest follows at once."""

Told = list[tuple[MeteredExchange, MeterRow]]
Send = Callable[[MeterReport, int], Awaitable[None]]
"""Gives a report to a ledger, counted from 0."""


@dataclass(slots=True)
class _Ledger:
    """What one ledger has been told."""

    shard: int
    told_at_s: float = float("-inf")
    told: tuple[int, int, int, bool] | None = None
    most: int = MAX_ROWS
    """Rows of the next report at most."""
    failing: bool = False


class Watcher(Protocol):
    """Hears of reports, for metrics."""

    def metered(self, report: MeterReport) -> None:
        """A report was made; taken or not, its sums are true."""
        ...

    def not_taken(self, failures: int) -> None:
        """So many reports so far were not taken."""
        ...


def _rejected(error: Exception) -> bool:
    """Whether the ledger looked at a report and will never take it."""
    return isinstance(error, GatehouseError) and not isinstance(error, LedgerUnavailable)


class MeterReporter:
    """Makes reports and sends them.

    Args:
        collector: Has the figures.
        send: Gives a report to the ledger; raises anything where it was not taken.
        replica_id: Id under which the replica is registered.
        accelerator: Kind of device, names the price.
        devices: Devices that the replica occupies.
        monotonic: Clock in seconds.
        watcher: Told of every report.
    """

    def __init__(
        self,
        collector: MeterCollector,
        send: Send,
        *,
        replica_id: str,
        accelerator: str,
        devices: int,
        monotonic: Callable[[], float] = time.monotonic,
        watcher: Watcher | None = None,
    ) -> None:
        self._watcher = watcher
        self.epoch = secrets.token_hex(8)
        self.seq = 0
        self.failures = 0
        """Reports that the ledger did not take."""
        self.given_up = 0
        """Rows that it will never take."""
        self._collector = collector
        self._send = send
        self._replica_id = replica_id
        self._accelerator = accelerator
        self._devices = devices
        self._monotonic = monotonic
        self._started_s = monotonic()
        self._ledgers = {0: _Ledger(0)}
        """By number; the first, and each that was ever told a row."""
        self._wake = asyncio.Event()
        self._skipped: dict[int, MeteredExchange] = {}
        """Exchanges that run on, of which the ledger takes no rows."""
        self._task: asyncio.Task[None] | None = None
        collector.on_left = self._wake.set

    def start(self) -> None:
        """Report from now on."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Report what is left, once, and end."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._collector.drain()
        await self.report(force=True)

    def build(self, most: int = MAX_ROWS, shard: int = 0) -> tuple[MeterReport, Told]:
        """The next report of so many rows at most to a ledger, with the exchanges behind them."""
        collector, now_s = self._collector, self._monotonic()
        totals = collector.totals
        told: Told = []
        for exchange in collector.exchanges.values():
            if len(told) == most:
                break
            if _home(exchange) == shard and self._due(exchange, time.monotonic()):
                told.append((exchange, _row(exchange, shard, time.monotonic())))
                exchange.changed = False
        self.seq += 1
        report = MeterReport(
            replica_id=self._replica_id,
            base_model=collector.base_model,
            accelerator=self._accelerator,
            epoch=self.epoch,
            seq=self.seq,
            devices=self._devices,
            elapsed_us=round((now_s - self._started_s) * 1_000_000) * self._devices,
            busy_us=totals.busy_ns // 1000,
            attributed_us=totals.attributed_ns // 1000,
            unattributed_us=totals.unattributed_ns // 1000 + collector.lost_us * self._devices,
            running=0 if collector.dead else collector.running,
            dead=collector.dead,
            rows=tuple(row for _, row in told),
            hooks_us=totals.hooks_ns // 1000,
        )
        return (_rows_only(report) if shard else report), told

    async def report(self, *, force: bool = False) -> bool:
        """Report if there is something to tell; gives whether all that there was has been taken.

        Args:
            force: Tell even if nothing has changed.
        """
        for exchange in self._collector.exchanges.values():
            shard = _home(exchange)
            if shard not in self._ledgers:
                self._ledgers[shard] = _Ledger(shard)
        ledgers = list(self._ledgers.values())
        if len(ledgers) == 1:
            return await self._report_to(ledgers[0], force)
        return all(await asyncio.gather(*(self._report_to(each, force) for each in ledgers)))

    async def _report_to(self, ledger: _Ledger, force: bool) -> bool:
        """``report`` to one ledger."""
        while True:
            collector = self._collector
            totals = collector.totals
            state = (totals.busy_ns, totals.unattributed_ns, totals.running, collector.dead)
            due = self._monotonic() - ledger.told_at_s >= HEARTBEAT_S
            now_s = time.monotonic()
            for exchange in [x for x in self._skipped.values() if x.over(now_s)]:
                del self._skipped[exchange.key]
                collector.forget(exchange)
            pending = any(
                _home(x) == ledger.shard and self._due(x, now_s)
                for x in collector.exchanges.values()
            )
            changed = state != ledger.told and ledger.shard == 0
            if not (force or due or pending or changed):
                return True
            force = False
            most = ledger.most
            report, told = self.build(most, ledger.shard)
            error = await self._tell(ledger, report, told)
            if error is None:
                ledger.told_at_s, ledger.told = self._monotonic(), state
                ledger.most = min(most * 2, MAX_ROWS)
                if len(told) < most:
                    return True
            elif not told or not _rejected(error) or not await self._narrow(ledger, told):
                return False

    async def _tell(self, ledger: _Ledger, report: MeterReport, told: Told) -> Exception | None:
        """Send a report; gives why it was not taken."""
        if self._watcher is not None:
            self._watcher.metered(report)  # of a further ledger: rows alone, its meters stand at 0
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._send(report, ledger.shard)
        except BaseException as error:
            for exchange, _ in told:
                exchange.changed = True
            self.failures += 1
            if self._watcher is not None:
                self._watcher.not_taken(self.failures)
            if not isinstance(error, Exception):
                raise
            if not ledger.failing:
                log.warning("the ledger takes no meter report: %s", type(error).__name__)
            ledger.failing = True
            return error
        ledger.failing = False
        for exchange, row in told:
            if row.ended and not exchange.changed:
                self._collector.forget(exchange)
        return None

    async def _narrow(self, ledger: _Ledger, told: Told) -> bool:
        """Rows were rejected: tell fewer at a time, or give the one up; whether to go on."""
        ledger.most = max(len(told) // 2, 1)
        if len(told) > 1:
            return True
        if await self._tell(ledger, self.build(0, ledger.shard)[0], []) is not None:
            return False  # it is not the row
        ((exchange, row),) = told
        self.given_up += 1
        log.error("the ledger does not take the row of %s: given up", row.reservation_id)
        self._skipped[exchange.key] = exchange  # its gateway is told on, from the same figures
        return True

    def _due(self, exchange: MeteredExchange, now_s: float) -> bool:
        """Whether there is something to tell of an exchange."""
        if not exchange.submitted or exchange.key in self._skipped:
            return False
        return exchange.changed or exchange.over(now_s)

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(INTERVAL_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            if not await self.report():
                # What failed is due again; not sooner because somebody hung up meanwhile.
                await asyncio.sleep(INTERVAL_S)


def _home(exchange: MeteredExchange) -> int:
    """Ledger that an exchange is charged at."""
    return shard_of(exchange.ticket.reservation_id)


def _row(exchange: MeteredExchange, shard: int, now_s: float) -> MeterRow:
    """A row as its ledger knows it: under the name that the gateway has there."""
    row = exchange.row(now_s)
    return replace(row, gateway_id=book_of(row.reservation_id) or row.gateway_id) if shard else row


def _rows_only(report: MeterReport) -> MeterReport:
    """A report whose meters stand still, of an engine of which the first ledger knows the state."""
    return replace(
        report,
        elapsed_us=0,
        busy_us=0,
        attributed_us=0,
        unattributed_us=0,
        running=0,
        dead=False,
        hooks_us=0,
    )
