"""Counts within one process: plain integers in dictionaries, no Ray, no lock.

Recording a figure costs well below a microsecond; handing one to Ray costs two, and a histogram's
observation costs Ray's agent as much again (``deployments.telemetry.export``). So requests are
counted here, and the totals are handed on once a second.

One event loop writes. A reader in another thread would see totals that are at most one request
apart from each other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import TypeVar

from deployments.telemetry.names import METRICS
from deployments.telemetry.spec import Kind, Spec

Labels = tuple[str, ...]
"""Values of a spec's labels, in its order."""


class Counter:
    """A total by labels that never goes back."""

    __slots__ = ("spec", "totals")

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.totals: dict[Labels, int] = {}

    def add(self, amount: int = 1, labels: Labels = ()) -> None:
        """Count ``amount`` more, not negative."""
        self.totals[labels] = self.totals.get(labels, 0) + amount

    def reach(self, total: int, labels: Labels = ()) -> None:
        """Take over a total that is kept elsewhere; one that went back changes nothing."""
        if total >= self.totals.get(labels, 0):
            self.totals[labels] = total


class Gauge:
    """A level by labels; what was not set for a while is forgotten by Ray."""

    __slots__ = ("levels", "spec")

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.levels: dict[Labels, int] = {}

    def set(self, level: int, labels: Labels = ()) -> None:
        """The level is this now."""
        self.levels[labels] = level

    def clear(self) -> None:
        """Forget every level: what is not set again is not exported again."""
        self.levels.clear()


class Buckets:
    """One series of a histogram."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[int, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Observations in each bucket alone; the last one is above all bounds."""
        self.sum = 0

    def observe(self, value: int) -> None:
        """Count one value; a bound belongs to the bucket below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Histogram:
    """Distribution of values by labels."""

    __slots__ = ("series", "spec")

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.series: dict[Labels, Buckets] = {}

    def of(self, labels: Labels = ()) -> Buckets:
        """The series of these labels; callers may keep it."""
        found = self.series.get(labels)
        if found is None:
            found = self.series[labels] = Buckets(self.spec.bounds)
        return found

    def observe(self, value: int, labels: Labels = ()) -> None:
        """Count one value."""
        self.of(labels).observe(value)


Instrument = Counter | Gauge | Histogram
_Kind = TypeVar("_Kind", Counter, Gauge, Histogram)
_CLASSES: Mapping[Kind, type[Instrument]] = {
    Kind.COUNTER: Counter,
    Kind.GAUGE: Gauge,
    Kind.HISTOGRAM: Histogram,
}


class Registry:
    """The instruments of one process. Only what is declared can be had.

    Args:
        specs: What is declared.
    """

    def __init__(self, specs: tuple[Spec, ...] = METRICS) -> None:
        self._instruments = {spec.name: _CLASSES[spec.kind](spec) for spec in specs}

    def counter(self, name: str) -> Counter:
        """A declared counter.

        Raises:
            KeyError: It is not declared.
            TypeError: It is of another kind.
        """
        return self._find(name, Counter)

    def gauge(self, name: str) -> Gauge:
        """A declared gauge; raises as ``counter``."""
        return self._find(name, Gauge)

    def histogram(self, name: str) -> Histogram:
        """A declared histogram; raises as ``counter``."""
        return self._find(name, Histogram)

    def _find(self, name: str, kind: type[_Kind]) -> _Kind:
        found = self._instruments[name]
        if not isinstance(found, kind):
            raise TypeError(f"{name} is no {kind.__name__}")
        return found

    def __iter__(self) -> Iterator[Instrument]:
        return iter(self._instruments.values())
