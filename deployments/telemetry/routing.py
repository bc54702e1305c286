"""Figures of routing: what was chosen and why, scores, and the batchers behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from deployments.telemetry import names
from deployments.telemetry.registry import Registry
from governance.shadow import ShadowStats
from governance.types import Turn
from routing.auto import Achieved
from routing.reasons import Instead, Reason

OTHER = "other"
RESULTS = ("scored", "late", "failed", "unreachable", "spared")
CASCADE = "cascade"
_REASONS = frozenset(Reason)
_INSTEAD = frozenset(Instead)


class RouteCounts:
    """Counts choices of the platform, and answers that were given up for another model's.

    Args:
        registry: Where to count.
        models: Ids of all models that are served.
    """

    def __init__(self, registry: Registry, models: Iterable[str]) -> None:
        self._routes = registry.counter(names.ROUTES)
        self._superseded = registry.counter(names.SUPERSEDED)
        for model in models:
            self._superseded.reach(0, (model, CASCADE))
        # Exported as 0 also where nothing is compared: no series could as well be a broken one.
        registry.counter(names.SHADOWS).reach(0, ("compared",))

    def ended(self, turn: Turn, department: str) -> None:
        """A request has ended."""
        if turn.route is None or not (turn.route.auto or turn.route.instead_of):
            return
        self._routes.add(1, (turn.route.model.id, department, reason_of(turn.route.reason)))
        for attempt in turn.earlier:
            self._superseded.add(1, (attempt.model, attempt.why))


def reason_of(route_reason: str) -> str:
    """The reason in ``auto:<tier> <reason>``, or an ``Instead``; of others it is ``other``."""
    if route_reason in _INSTEAD:
        return route_reason
    reason = route_reason.partition(" ")[2]
    return reason if reason in _REASONS else OTHER


class ScoreNote:
    """Counts what becomes of each wish for a score.

    Args:
        registry: Where to count.
    """

    def __init__(self, registry: Registry) -> None:
        self._scores = registry.counter(names.SCORES)
        self._time = registry.histogram(names.SCORE).of()
        for result in RESULTS:
            self._scores.reach(0, (result,))

    def __call__(self, result: str, took_us: int) -> None:
        """One of ``RESULTS``, after so long."""
        self._scores.add(1, (result,))
        if result == RESULTS[0]:
            self._time.observe(took_us)


class ShareSource:
    """Shares of the large tier, as a gateway's router keeps them.

    Args:
        registry: Where to note.
        achieved: What became of each department's latest requests.
    """

    def __init__(self, registry: Registry, achieved: Callable[[], Iterable[Achieved]]) -> None:
        self._achieved = achieved
        self._share = registry.gauge(names.ROUTE_LARGE)

    def __call__(self) -> None:
        """Take over."""
        self._share.clear()
        for each in self._achieved():
            self._share.set(each.large_milli, (each.department, "all"))
            if each.free:
                self._share.set(each.free_large_milli, (each.department, "free"))
                self._share.set(each.aimed_milli, (each.department, "aimed"))


class ShadowSource:
    """What became of the answers that were sampled for comparison.

    Args:
        registry: Where to note.
        stats: Of the runner.
    """

    def __init__(self, registry: Registry, stats: ShadowStats) -> None:
        self._stats = stats
        self._shadows = registry.counter(names.SHADOWS)

    def __call__(self) -> None:
        """Take over."""
        self._shadows.reach(self._stats.compared, ("compared",))
        for reason, count in self._stats.dropped.items():
            self._shadows.reach(count, (reason,))


class BatchCounts(Protocol):
    """Counts of a batcher; ``deployments.routing.micro_batch.BatchStats``."""

    batches: int
    items: int
    busy_us: int
    refused: int
    expired: int
    dropped: int


class Batcher(Protocol):
    """A batcher; ``deployments.routing.micro_batch.MicroBatcher``."""

    @property
    def stats(self) -> BatchCounts:
        """Counts since the start."""
        ...

    @property
    def waiting(self) -> int:
        """Prompts that wait."""
        ...


class BatcherSource:
    """One batcher.

    Args:
        registry: Where to note.
        batcher: The batcher.
    """

    def __init__(self, registry: Registry, batcher: Batcher) -> None:
        self._batcher = batcher
        self._waiting = registry.gauge(names.SCORER_WAITING)
        self._batches = registry.counter(names.SCORER_BATCHES)
        self._prompts = registry.counter(names.SCORER_PROMPTS)
        self._busy = registry.counter(names.SCORER_BUSY)
        self._unused = registry.counter(names.SCORER_UNUSED)

    def __call__(self) -> None:
        """Take over."""
        stats = self._batcher.stats
        self._waiting.set(self._batcher.waiting)
        self._batches.reach(stats.batches)
        self._prompts.reach(stats.items)
        self._busy.reach(stats.busy_us)
        self._unused.reach(stats.refused, ("refused",))
        self._unused.reach(stats.expired, ("expired",))
        self._unused.reach(stats.dropped, ("dropped",))
