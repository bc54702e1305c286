"""Hands the totals of a process to Ray, once a second.

**Histograms.** Ray has no call that takes a histogram as a whole. ``Histogram.observe`` costs the
caller 2.4 µs, and then the node's agent repeats each single observation at the middle of its
bucket: its cost grows with the requests of the whole node, and the sum is a guess. So a histogram
leaves here as three counters (``_bucket`` with the cumulative label ``le``, ``_sum``, ``_count``):
exact, at a cost that depends on the number of series and not of observations. Prometheus sees
``_bucket_total`` and so on; ``rate`` and ``histogram_quantile`` ask for no more than ``le``.

**Counters** are sent as differences. A series whose labels are known at start is opened with 0
there, because ``rate`` cannot see the first count of a series that begins with it.

**Gauges** are sent anew each time: Ray drops one that it was not told of for two reports.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import accumulate
from typing import Protocol

from deployments.telemetry.names import FAULTS, le
from deployments.telemetry.registry import Counter, Gauge, Histogram, Labels, Registry
from governance.tracebacks import without_messages

log = logging.getLogger("gatehouse.telemetry")

INTERVAL_S = 1.0

Collect = Callable[[], None]
"""Brings gauges and totals that are kept elsewhere up to date."""


class Sink(Protocol):
    """Where figures go; ``RaySink``, or a double."""

    def add(self, name: str, description: str, labels: Mapping[str, str], amount: float) -> None:
        """A counter has grown by ``amount``; 0 only opens the series."""
        ...

    def set(self, name: str, description: str, labels: Mapping[str, str], level: float) -> None:
        """A gauge stands at ``level``."""
        ...


class Exporter:
    """Flushes a registry, in the background of the event loop that writes it.

    Args:
        registry: The figures.
        sink: Where they go.
        collect: Called before each flush; one that fails costs only its own figures.
        interval_s: Time between flushes.
    """

    def __init__(
        self,
        registry: Registry,
        sink: Sink,
        collect: Iterable[Collect] = (),
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._registry = registry
        self._sink = sink
        self._collect = list(collect)
        self._interval_s = interval_s
        self._sent: dict[tuple[str, Labels], int] = {}
        self._failing: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        registry.counter(FAULTS).reach(0)

    def collect(self, *more: Collect) -> None:
        """Call these before each flush as well."""
        self._collect.extend(more)

    def start(self) -> None:
        """Flush from now on."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Flush what is left and end."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
            self.flush()

    def flush(self) -> None:
        """Collect and hand over; never raises."""
        for collect in self._collect:
            self._attempt(collect, getattr(collect, "__qualname__", type(collect).__name__))
        for instrument in self._registry:
            self._attempt(partial(self._send, instrument), instrument.spec.name)

    def _attempt(self, call: Callable[[], None], name: str) -> None:
        try:
            call()
        except Exception as error:
            self._registry.counter(FAULTS).add()
            # Once until it works again: a line a second would drown the rest.
            if name not in self._failing:
                self._failing.add(name)
                log.warning("not measured: %s\n%s", name, without_messages(error))
        else:
            self._failing.discard(name)

    def _send(self, instrument: Counter | Gauge | Histogram) -> None:
        spec = instrument.spec
        if isinstance(instrument, Counter):
            for labels, total in list(instrument.totals.items()):
                self._grow(spec.name, spec.help, spec.labels, labels, total, spec.scale)
        elif isinstance(instrument, Gauge):
            for labels, level in list(instrument.levels.items()):
                named = dict(zip(spec.labels, labels, strict=True))
                self._sink.set(spec.name, spec.help, named, level * spec.scale)
        else:
            self._send_histogram(instrument)

    def _send_histogram(self, instrument: Histogram) -> None:
        spec = instrument.spec
        bounds = [le(bound * spec.scale) for bound in spec.bounds] + ["+Inf"]
        for labels, buckets in list(instrument.series.items()):
            totals = list(accumulate(buckets.counts))
            if self._sent.get((f"{spec.name}_count", labels)) == totals[-1]:
                continue
            for bound, total in zip(bounds, totals, strict=True):
                self._grow(
                    f"{spec.name}_bucket",
                    spec.help,
                    (*spec.labels, "le"),
                    (*labels, bound),
                    total,
                    1.0,
                )
            for part, total, scale in (
                ("sum", buckets.sum, spec.scale),
                ("count", totals[-1], 1.0),
            ):
                self._grow(f"{spec.name}_{part}", spec.help, spec.labels, labels, total, scale)

    def _grow(
        self,
        name: str,
        description: str,
        keys: tuple[str, ...],
        labels: Labels,
        total: int,
        scale: float,
    ) -> None:
        sent = self._sent.get((name, labels))
        if sent == total:
            return
        named = dict(zip(keys, labels, strict=True))
        self._sink.add(name, description, named, (total - (sent or 0)) * scale)
        self._sent[name, labels] = total

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            self.flush()
