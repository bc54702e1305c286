"""Ray's metrics as a ``Sink``: they reach Prometheus through the agent of the node."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util import metrics


class _Counter(metrics.Counter):
    """Ray's counter, which also takes a difference of 0.

    Its ``inc`` refuses that, although a series that does not begin with 0 loses its first count in
    ``rate``, and a histogram without its empty buckets loses precision.
    """

    def grow(self, amount: float, labels: dict[str, str]) -> None:
        """Add ``amount``, not negative."""
        self._record(amount, labels)


class RaySink:
    """Declares each metric to Ray when it is first used, in a process that Ray started."""

    def __init__(self) -> None:
        self._counters: dict[str, _Counter] = {}
        self._gauges: dict[str, metrics.Gauge] = {}

    def add(self, name: str, description: str, labels: Mapping[str, str], amount: float) -> None:
        """See ``Sink.add``."""
        counter = self._counters.get(name)
        if counter is None:
            counter = self._counters[name] = _Counter(name, description, tuple(labels))
        counter.grow(amount, dict(labels))

    def set(self, name: str, description: str, labels: Mapping[str, str], level: float) -> None:
        """See ``Sink.set``."""
        gauge = self._gauges.get(name)
        if gauge is None:
            gauge = self._gauges[name] = metrics.Gauge(name, description, tuple(labels))
        gauge.set(level, dict(labels))
