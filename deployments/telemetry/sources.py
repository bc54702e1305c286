"""Figures that other parts keep, taken over before each flush: one class a part.

Each is given what it reads, and reads plain attributes; a part knows nothing of telemetry.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from deployments.data_plane.backend import EngineLoad
from deployments.telemetry import names
from deployments.telemetry.classes import ServedCounts
from deployments.telemetry.registry import Registry
from governance.budget.messages import MeterReport

MAX_AGE_US = 86_400_000_000
"""An age that is infinite, because nothing was ever heard, is shown as a day."""


def age_us(age_s: float) -> int:
    """An age in microseconds, at most ``MAX_AGE_US``."""
    return min(MAX_AGE_US, int(min(age_s, 1e6) * 1_000_000))


class GatewaySource:
    """What a gateway sees of engines and control plane.

    Args:
        registry: Where to note.
        models: Base models.
        ready: Whether a model can be served now.
        control_age_s: Age of the copy of the control plane.
    """

    def __init__(
        self,
        registry: Registry,
        models: Iterable[str],
        ready: Callable[[str], bool],
        control_age_s: Callable[[], float],
    ) -> None:
        self._models = list(models)
        self._ready = ready
        self._control_age_s = control_age_s
        self._model_ready = registry.gauge(names.MODEL_READY)
        self._age = registry.gauge(names.CONTROL_AGE)

    def __call__(self) -> None:
        """Take over."""
        for model in self._models:
            self._model_ready.set(int(self._ready(model)), (model,))
        self._age.set(age_us(self._control_age_s()))


class WalStats(Protocol):
    """Counts of an audit writer; ``governance.audit.writer.WriterStats``."""

    records: int
    bytes: int
    syncs: int
    sync_us: int
    """Time in which groups were being written and synced."""
    refused: int
    queued: int


class WalSource:
    """One audit writer.

    Args:
        registry: Where to note.
        writer: ``gateway``, ``ledger`` or ``sealer``.
        stats: Its counts.
        monotonic: Seconds.
    """

    def __init__(
        self,
        registry: Registry,
        writer: str,
        stats: WalStats,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stats = stats
        self._labels = (writer,)
        self._monotonic = monotonic
        self._records = registry.counter(names.WAL_RECORDS)
        self._bytes = registry.counter(names.WAL_BYTES)
        self._syncs = registry.counter(names.WAL_SYNCS)
        self._sync_time = registry.counter(names.WAL_SYNC_TIME)
        self._refused = registry.counter(names.WAL_REFUSED)
        self._queued = registry.gauge(names.WAL_QUEUE)
        self._lag = registry.gauge(names.WAL_LAG)
        self._moved = (-1, monotonic())
        self()

    def __call__(self) -> None:
        """Take over."""
        stats, labels = self._stats, self._labels
        self._records.reach(stats.records, labels)
        self._bytes.reach(stats.bytes, labels)
        self._syncs.reach(stats.syncs, labels)
        self._sync_time.reach(stats.sync_us, labels)
        self._refused.reach(stats.refused, labels)
        self._queued.set(stats.queued, labels)
        now_s = self._monotonic()
        if not stats.queued or stats.syncs != self._moved[0]:
            self._moved = (stats.syncs, now_s)
        self._lag.set(age_us(now_s - self._moved[1]), labels)


class DiskSource:
    """Free space of the roots. A root that is no local folder is left out.

    Args:
        registry: Where to note.
        roots: Folder by name, ``state`` or ``evidence``, with the reserve that is kept, in bytes;
            ``None`` for the reserve of ``governance.audit.room``.
        every: Ask the file system on every so manyth call.
    """

    def __init__(
        self, registry: Registry, roots: Sequence[tuple[str, Path, int | None]], every: int = 10
    ) -> None:
        self._roots = roots
        self._every = every
        self._calls = 0
        self._free = registry.gauge(names.DISK_FREE)
        self._reserve = registry.gauge(names.DISK_RESERVE)

    def __call__(self) -> None:
        """Take over."""
        self._calls += 1
        if self._calls % self._every != 1 % self._every:
            return
        self._free.clear()
        for name, folder, reserve_bytes in self._roots:
            try:
                stat = os.statvfs(folder)
            except OSError:
                continue
            size = stat.f_blocks * stat.f_frsize
            self._free.set(stat.f_bavail * stat.f_frsize, (name,))
            if reserve_bytes is None:
                reserve_bytes = min(max(size // 100, 256 << 20), size // 10)
            self._reserve.set(reserve_bytes, (name,))


class SealStats(Protocol):
    """Counts of a sealer; ``deployments.audit_actors.SealerStatus``."""

    records: int
    """Events sealed."""
    faults_seen: int
    """Logs that could not be sealed, counted in each round."""
    lag_us: int
    """Age of the oldest segment that should be sealed and is not."""


class SealSource:
    """One sealer.

    Args:
        registry: Where to note.
    """

    def __init__(self, registry: Registry) -> None:
        self._rows = registry.counter(names.SEALED_ROWS)
        self._faults = registry.counter(names.SEAL_FAULTS)
        self._lag = registry.gauge(names.SEAL_LAG)

    def take(self, stats: SealStats) -> None:
        """Take over."""
        self._rows.reach(stats.records)
        self._faults.reach(stats.faults_seen)
        self._lag.set(stats.lag_us)


class EngineSource:
    """One engine replica.

    Args:
        registry: Where to note.
        model: Base model.
        load: Its load.
        dead: Whether its engine has died.
    """

    def __init__(
        self,
        registry: Registry,
        model: str,
        load: Callable[[], EngineLoad],
        dead: Callable[[], bool],
    ) -> None:
        self._model = model
        self._load = load
        self._dead = dead
        self._running = registry.gauge(names.ENGINE_RUNNING)
        self._waiting = registry.gauge(names.ENGINE_WAITING)
        self._kv = registry.gauge(names.ENGINE_KV)
        self._gone = registry.gauge(names.ENGINE_DEAD)
        self._time = registry.counter(names.ENGINE_TIME)
        self._metering = registry.counter(names.METERING_TIME)
        self._failures = registry.counter(names.METER_FAILURES)
        self._failures.reach(0, (model,))
        self._served = ServedCounts(registry, model)

    def __call__(self) -> None:
        """Take over."""
        load, labels = self._load(), (self._model,)
        self._running.set(load.running, labels)
        self._waiting.set(load.waiting, labels)
        self._kv.set(load.kv_usage_milli, labels)
        self._gone.set(int(self._dead()), labels)

    def metered(self, report: MeterReport) -> None:
        """A report has been made; given to the ledger or not, its sums are true."""
        busy_us = report.attributed_us + report.unattributed_us
        self._metering.reach(report.hooks_us, (self._model,))
        self._time.reach(report.attributed_us, (self._model, "attributed"))
        self._time.reach(report.unattributed_us, (self._model, "unattributed"))
        self._time.reach(max(0, report.elapsed_us - busy_us), (self._model, "idle"))
        self._served.take(report.rows)

    def not_taken(self, failures: int) -> None:
        """So many reports so far were not taken."""
        self._failures.reach(failures, (self._model,))
