"""What engines, scorers, ledger and sealers tell operators: metrics, no request lines or traces."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from deployments.data_plane.backend import EngineLoad
from deployments.telemetry.budgets import AlertSource, LedgerWatch, Service
from deployments.telemetry.classes import ClassSource
from deployments.telemetry.export import Exporter
from deployments.telemetry.ray_sink import RaySink
from deployments.telemetry.registry import Registry
from deployments.telemetry.routing import Batcher, BatcherSource
from deployments.telemetry.sources import EngineSource, SealSource, SealStats, WalSource, WalStats

log = logging.getLogger("gatehouse.telemetry")


class EngineTelemetry:
    """Metrics of one engine replica.

    Args:
        model: Base model.
        load: Its load.
        dead: Whether its engine has died.
    """

    def __init__(
        self, model: str, load: Callable[[], EngineLoad], dead: Callable[[], bool]
    ) -> None:
        registry = Registry()
        self.source = EngineSource(registry, model, load, dead)
        classes = ClassSource(registry, model, load)
        self._exporter = Exporter(registry, RaySink(), [self.source, classes])
        self._exporter.start()

    async def close(self) -> None:
        """Send what is left."""
        await self._exporter.close()


class RouterTelemetry:
    """Metrics of one replica of the scorer.

    Args:
        batcher: Its batcher.
    """

    def __init__(self, batcher: Batcher) -> None:
        registry = Registry()
        self._exporter = Exporter(registry, RaySink(), [BatcherSource(registry, batcher)])
        self._exporter.start()

    async def close(self) -> None:
        """Send what is left."""
        await self._exporter.close()


class LedgerTelemetry:
    """Metrics of a ledger: its accounts, its alerts, its audit log. Made in its event loop.

    Args:
        stats: Counts of the present audit writer; ``None`` while there is none. Another object
            after a writer was replaced.
        service: The ledger.
    """

    def __init__(self, stats: Callable[[], WalStats | None], service: Service) -> None:
        self._registry = Registry()
        self._stats = stats
        self._watched: WalStats | None = None
        self._source: WalSource | None = None
        alerts = AlertSource(self._registry, service.telling.stats)
        self._exporter = Exporter(self._registry, RaySink(), [self._collect, alerts])
        self._exporter.start()
        watch = LedgerWatch(self._registry, service)
        self._watch = asyncio.create_task(watch.run(self._not_asked), name="ledger-metrics")

    def _collect(self) -> None:
        stats = self._stats()
        if stats is not None and stats is not self._watched:
            self._watched, self._source = stats, WalSource(self._registry, "ledger", stats)
        if self._source is not None:
            self._source()

    @staticmethod
    def _not_asked(error: Exception) -> None:
        log.info("accounts not measured (%s)", type(error).__name__)


class SealerTelemetry:
    """Metrics of one sealer, sent after each of its rounds, from its own thread."""

    def __init__(self) -> None:
        registry = Registry()
        self._source = SealSource(registry)
        self._exporter = Exporter(registry, RaySink())

    def round_ended(self, stats: SealStats) -> None:
        """Send figures. Rounds are a few seconds apart: Ray drops a gauge after twenty."""
        self._source.take(stats)
        self._exporter.flush()
