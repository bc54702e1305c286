"""Tells the ledger what a replica has metered.

Every half second what has changed; at least every two seconds that the replica lives; at once
when a request ended whose gateway was not given the figure. Figures are cumulative, so a report
that may or may not have arrived is simply followed by a newer one. A row is told until a report
with it has been taken, and forgotten when that row was its last.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from deployments.metering.collector import MeterCollector, MeteredExchange
from governance.budget.messages import MeterReport, MeterRow

log = logging.getLogger("gatehouse.metering")

INTERVAL_S = 0.5
HEARTBEAT_S = 2.0
SEND_TIMEOUT_S = 5.0
MAX_ROWS = 2048
"""Rows of one report; the rest follows at once."""

Send = Callable[[MeterReport], Awaitable[None]]


class Watcher(Protocol):
    """Hears of reports, for metrics."""

    def metered(self, report: MeterReport) -> None:
        """A report was made; taken or not, its sums are true."""
        ...

    def not_taken(self, failures: int) -> None:
        """So many reports so far were not taken."""
        ...


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
        self._collector = collector
        self._send = send
        self._replica_id = replica_id
        self._accelerator = accelerator
        self._devices = devices
        self._monotonic = monotonic
        self._started_s = monotonic()
        self._told_at_s = float("-inf")
        self._told: tuple[int, int, int, bool] | None = None
        self._wake = asyncio.Event()
        self._failing = False
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

    def build(self) -> tuple[MeterReport, list[tuple[MeteredExchange, MeterRow]]]:
        """The next report, with the exchanges behind its rows."""
        collector, now_s = self._collector, self._monotonic()
        totals = collector.totals
        told: list[tuple[MeteredExchange, MeterRow]] = []
        for exchange in collector.exchanges.values():
            if len(told) == MAX_ROWS:
                break
            if exchange.submitted and (exchange.changed or exchange.over(time.monotonic())):
                told.append((exchange, exchange.row(time.monotonic())))
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
        return report, told

    async def report(self, *, force: bool = False) -> bool:
        """Report if there is something to tell; gives whether all that there was has been taken.

        Args:
            force: Tell even if nothing has changed.
        """
        while True:
            collector = self._collector
            totals = collector.totals
            state = (totals.busy_ns, totals.unattributed_ns, totals.running, collector.dead)
            due = self._monotonic() - self._told_at_s >= HEARTBEAT_S
            now_s = time.monotonic()
            pending = any(
                exchange.submitted and (exchange.changed or exchange.over(now_s))
                for exchange in collector.exchanges.values()
            )
            if not (force or due or pending or state != self._told):
                return True
            force = False
            report, told = self.build()
            if self._watcher is not None:
                self._watcher.metered(report)
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await self._send(report)
            except BaseException as error:
                for exchange, _ in told:
                    exchange.changed = True
                self.failures += 1
                if self._watcher is not None:
                    self._watcher.not_taken(self.failures)
                if not isinstance(error, Exception):
                    raise
                if not self._failing:
                    log.warning("the ledger takes no meter report: %s", type(error).__name__)
                self._failing = True
                return False
            self._failing = False
            self._told_at_s, self._told = self._monotonic(), state
            for exchange, row in told:
                if row.ended and not exchange.changed:
                    collector.forget(exchange)
            if len(told) < MAX_ROWS:
                return True

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
