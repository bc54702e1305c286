"""Figures of fairness at an engine replica: who waits, and how much each department was given."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from deployments.telemetry import budget_names as names
from deployments.telemetry.registry import Registry
from governance.budget.messages import MeterRow
from governance.budget.tree import department_of
from governance.classes import PRIORITY_CLASSES

MAX_ROWS = 50_000
"""Reservations whose last figure is remembered; more than a replica can have unreported."""


class ClassLoad(Protocol):
    """What an engine says of its queue; ``deployments.data_plane.backend.EngineLoad``."""

    @property
    def waiting_by_class(self) -> Sequence[int]:
        """Requests that wait, in the order of ``PRIORITY_CLASSES``."""
        ...

    @property
    def oldest_wait_us(self) -> Sequence[int]:
        """Longest wait of those that wait now, microseconds, in the same order."""
        ...


class ClassSource:
    """Who waits at one engine replica.

    Args:
        registry: Where to note.
        model: Base model.
        load: Its load.
    """

    def __init__(self, registry: Registry, model: str, load: Callable[[], ClassLoad]) -> None:
        self._model = model
        self._load = load
        self._waiting = registry.gauge(names.CLASS_WAITING)
        self._wait = registry.gauge(names.CLASS_WAIT)

    def __call__(self) -> None:
        """Take over."""
        load = self._load()
        counts = zip(PRIORITY_CLASSES, load.waiting_by_class, load.oldest_wait_us, strict=True)
        for name, waiting, oldest_us in counts:
            self._waiting.set(waiting, (self._model, name))
            self._wait.set(oldest_us, (self._model, name))


class ServedCounts:
    """Device time that one engine replica gave to each department.

    Args:
        registry: Where to count.
        model: Base model.
    """

    def __init__(self, registry: Registry, model: str) -> None:
        self._model = model
        self._served = registry.counter(names.SERVED)
        self._last: OrderedDict[str, int] = OrderedDict()
        """Figures by reservation: they are cumulative, and a report may be repeated."""

    def take(self, rows: Iterable[MeterRow]) -> None:
        """Take over what a report says."""
        for row in rows:
            before = self._last.get(row.reservation_id, 0)
            if row.gpu_us > before:
                department = department_of(row.account)
                self._served.add(row.gpu_us - before, (self._model, department))
                self._last[row.reservation_id] = row.gpu_us
            if row.reservation_id in self._last:
                self._last.move_to_end(row.reservation_id)
        while len(self._last) > MAX_ROWS:
            self._last.popitem(last=False)
