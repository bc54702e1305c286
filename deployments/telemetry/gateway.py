"""What a gateway tells operators: metrics, request lines, traces; assembled in one place."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

from deployments import __version__
from deployments.gateway_books import GatewayBooks
from deployments.settings import Settings
from deployments.telemetry.access import AccessLog
from deployments.telemetry.budgets import LeaseSource, ShedSource
from deployments.telemetry.export import Exporter
from deployments.telemetry.ray_sink import RaySink
from deployments.telemetry.registry import Registry
from deployments.telemetry.routing import (
    Batcher,
    BatcherSource,
    ScoreNote,
    ShadowSource,
    ShareSource,
)
from deployments.telemetry.sources import DiskSource, GatewaySource, WalSource
from deployments.telemetry.traces import from_environment
from deployments.telemetry.turns import TurnObserver
from governance.shadow import ShadowStats
from routing.auto import Achieved


class GatewayTelemetry:
    """Registry, exporter, request lines and traces of one gateway.

    Call it after ``logs.join_serve_log``: request lines go to the handlers that are there then.

    Args:
        gateway_id: Names this gateway in traces.
        models: Served ids; labels of metrics.
        base_models: Ids of the engines.
        ready: Whether a base model can be served now.
        control_age_s: Age of the copy of the control plane.
    """

    def __init__(
        self,
        gateway_id: str,
        models: Sequence[str],
        base_models: Sequence[str],
        ready: Callable[[str], bool],
        control_age_s: Callable[[], float],
    ) -> None:
        self.registry = Registry()
        self.score_note = ScoreNote(self.registry)
        self._access = AccessLog()
        self.tracing = from_environment(os.environ, __version__, gateway_id)
        self.observer = TurnObserver(self.registry, models, self._access, self.tracing)
        self._exporter = Exporter(
            self.registry,
            RaySink(),
            [
                self._access.flush,
                GatewaySource(self.registry, base_models, ready, control_age_s),
            ],
        )

    def watch(self, books: GatewayBooks, settings: Settings) -> None:
        """Export the figures of the gateway's books and disks, too; begins to export."""
        self._exporter.collect(
            LeaseSource(self.registry, books.leases),
            WalSource(self.registry, "gateway", books.writer.stats),
            DiskSource(
                self.registry,
                [("state", settings.state, None), ("evidence", settings.evidence, None)],
            ),
        )
        self._exporter.start()

    def watch_routing(
        self, achieved: Callable[[], Iterable[Achieved]], batcher: Batcher | None
    ) -> None:
        """Export what routing leads to, and the figures of a scorer in this process.

        Args:
            achieved: What became of each department's latest requests.
            batcher: Of the scorer; ``None`` where it runs elsewhere.
        """
        self._exporter.collect(ShareSource(self.registry, achieved))
        if batcher is not None:
            self._exporter.collect(BatcherSource(self.registry, batcher))

    def watch_shedding(self, stats: Callable[[], Mapping[tuple[str, str, str], int]]) -> None:
        """Export how many requests were refused before they waited.

        Args:
            stats: Counts so far by model, class and reason.
        """
        self._exporter.collect(ShedSource(self.registry, stats))

    def watch_shadow(self, stats: ShadowStats) -> None:
        """Export what becomes of shadow comparisons."""
        self._exporter.collect(ShadowSource(self.registry, stats))

    async def close(self) -> None:
        """Write and send what is left."""
        await self._exporter.close()
        await asyncio.to_thread(self.tracing.close)
