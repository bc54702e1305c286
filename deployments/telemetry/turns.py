"""What telemetry makes of a request that has ended: counts, a line in the log, a trace.

``TurnObserver`` implements ``governance.ports.Observer``. All it needs stands on the turn, so the
request path calls it once and pays about ten microseconds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Protocol

from deployments.telemetry import budget_names, names
from deployments.telemetry.access import AccessLog
from deployments.telemetry.registry import Buckets, Registry
from deployments.telemetry.routing import RouteCounts
from governance.errors import BudgetExhausted
from governance.tracebacks import without_messages
from governance.types import Amount, Turn

log = logging.getLogger("gatehouse.telemetry")

NONE = "none"
OTHER = "other"
MAX_DEPARTMENTS = 500
"""Departments told apart; configuration bounds them, and this a mistake in it."""


class Trace(Protocol):
    """Takes finished turns; see ``deployments.telemetry.traces``."""

    def ended(self, turn: Turn) -> None:
        """Send the trace of a turn."""
        ...


def stopped(turn: Turn) -> bool:
    """Whether an answer ended at the limit of a budget before it was complete."""
    return turn.finish_reason == "length" and turn.error_code == BudgetExhausted.code


class TurnObserver:
    """Counts, logs and traces turns.

    Args:
        registry: Where to count.
        models: Ids of all models that are served; anything else is ``none`` in a label.
        access: Where lines go.
        trace: Where spans go, if anywhere.
    """

    def __init__(
        self,
        registry: Registry,
        models: Iterable[str],
        access: AccessLog | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._models = frozenset(models)
        self._departments: set[str] = set()
        self._access = access
        self._trace = trace
        self._requests = registry.counter(names.REQUESTS)
        self._refusals = registry.counter(names.REFUSALS)
        self._tokens = registry.counter(names.TOKENS)
        self._routes = RouteCounts(registry, self._models)
        self._gpu = registry.counter(names.GPU)
        self._charged = registry.counter(names.CHARGED)
        self._stops = registry.counter(budget_names.STOPS)
        self._faults = registry.counter(names.FAULTS)
        self._whole = registry.histogram(names.REQUEST)
        self._first = registry.histogram(names.FIRST_CHUNK)
        self._stage = registry.histogram(names.STAGE)
        self._stages: dict[tuple[str, str], dict[str, Buckets]] = {}
        """Series of the stage histogram, so that a request builds no labels for them."""

    def ended(self, turn: Turn) -> None:
        """See ``Observer.ended``."""
        try:
            model = self._model(turn)
            self._count(turn, model)
            if self._access is not None:
                self._access.ended(turn, model)
            if self._trace is not None:
                self._trace.ended(turn)
        except Exception as error:
            self._faults.add()
            log.warning("a request was not measured\n%s", without_messages(error))

    def _count(self, turn: Turn, model: str) -> None:
        operation: str = turn.operation.value
        department = self._department(turn)
        outcome = turn.outcome.value if turn.outcome else NONE
        self._requests.add(1, (model, department, operation, outcome, str(turn.status)))
        self._stops.add(int(stopped(turn)), (model, department))
        if turn.error_code is not None:
            self._refusals.add(1, (model, department, outcome, turn.error_code))
        series = self._stages.get((model, operation))
        if series is None:
            series = self._stages[model, operation] = {}
        total_us = 0
        for stage, stage_us in turn.stage_us.items():
            total_us += stage_us
            buckets = series.get(stage)
            if buckets is None:
                buckets = series[stage] = self._stage.of((model, operation, stage))
            buckets.observe(stage_us)
        self._whole.observe(total_us, (model, operation))
        if turn.first_chunk_us:
            first_us = max(0, turn.first_chunk_us - turn.started_us)
            self._first.observe(first_us, (model, operation))
        if (usage := turn.usage) is not None:
            self._tokens.add(usage.prompt_tokens, (model, department, "prompt"))
            self._tokens.add(usage.completion_tokens, (model, department, "completion"))
            self._tokens.add(usage.cached_tokens, (model, department, "cached"))
        self._count_time(model, department, turn.gpu_us, turn.charged)
        for attempt in turn.earlier:
            self._count_time(attempt.model, department, attempt.gpu_us, attempt.charged)
        self._routes.ended(turn, department)

    def _count_time(
        self, model: str, department: str, gpu_us: int | None, charged: Amount | None
    ) -> None:
        if gpu_us:
            self._gpu.add(gpu_us, (model, department))
        if charged is not None and charged.gpu_us:
            self._charged.add(charged.gpu_us, (model, department))

    def _model(self, turn: Turn) -> str:
        """Model that answered, or else the one that was named, if there is such a one."""
        if turn.route is not None:
            return turn.route.model.id
        if turn.request is not None and turn.request.model in self._models:
            return turn.request.model
        return NONE

    def _department(self, turn: Turn) -> str:
        if turn.principal is None:
            return NONE
        department = turn.principal.department
        if department not in self._departments:
            if len(self._departments) >= MAX_DEPARTMENTS:
                return OTHER
            self._departments.add(department)
        return department
