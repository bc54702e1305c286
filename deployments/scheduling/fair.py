"""vLLM's scheduler with a fair queue and floors for critical requests. Runs in the engine core.

Over vLLM's priority policy, which is kept: ``waiting`` becomes a queue in the order of
``routing.fairness``, and where the KV cache runs short, the ``priority`` of each that runs is set
so that vLLM preempts the least urgent first, and of those whose department was given most. What a
department is charged is what the meter attributes to its requests, step by step
(``deployments.metering.meter``). The floors are in ``deployments.scheduling.floors``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from deployments.metering.keys import FAIR_KEY, FAIRNESS_VARIABLE
from deployments.metering.meter import StepMeter, Work
from deployments.scheduling.floors import Floors
from deployments.scheduling.queues import SkippedQueue, WaitingQueue
from deployments.scheduling.terms import Terms
from routing.fairness import CRITICAL, FairQueue, FairSettings

if TYPE_CHECKING:
    _Base = Scheduler
else:
    _Base = object

RANK_STRIDE = 1 << 62
"""Between the priorities of two classes; virtual times are less."""
_KEEP = 0.9
"""Of the average cost of a prompt token, with each prompt."""


class _Bill:
    """What a request has cost, and how much of it its department was charged."""

    __slots__ = ("told_ns", "work")

    def __init__(self, work: Work) -> None:
        self.work = work
        self.told_ns = 0


class FairMixin(_Base):
    """The queue and the floors, over either scheduler; below ``MeteredMixin``."""

    meter: StepMeter

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.fair: FairQueue[str] | None = None
        self._bills: dict[str, _Bill] = {}
        self._prompt_ns = 0.0
        """Average device-nanoseconds per computed prompt token."""
        if os.environ.get(FAIRNESS_VARIABLE) == "fcfs":
            return
        self.fair = FairQueue(FairSettings())
        self._floors = Floors(self, self.fair.settings)
        self.waiting = WaitingQueue(self.fair, self._floors.may_start)
        self.skipped_waiting = SkippedQueue(self.fair, self._floors.may_start)

    def add_request(self, request: Request) -> None:
        """Put a request into the queue, by its terms."""
        if self.fair is None:
            request.priority = 0
        elif request.request_id not in self.fair:
            terms = Terms.load(_extra(request).get(FAIR_KEY))
            self._bills[request.request_id] = _Bill(self.meter.added(request.request_id, 0))
            self.fair.arrive(
                request.request_id,
                str(terms.department),
                terms.rank,
                terms.weight_milli,
                terms.served_us,
                _now_us(),
                round(request.num_prompt_tokens * self._prompt_ns / 1000),
            )
            if terms.rank == CRITICAL:
                self._floors.urgent[request.request_id] = request
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule a step in fair order, within the floors."""
        fair = self.fair
        if fair is None:
            return super().schedule(throttle_prefills)
        now_us = _now_us()
        self.waiting.begin(now_us)  # type: ignore[attr-defined]
        self.skipped_waiting.begin(now_us)  # type: ignore[attr-defined]
        full = self.max_num_scheduled_tokens
        paused = self._floors.begin(now_us)
        self.max_num_scheduled_tokens = self._floors.step_tokens(full)
        if self._floors.short_of_cache(full):
            for request in self.running:
                name = request.request_id
                request.priority = fair.rank(name) * RANK_STRIDE + fair.standing(name)
        try:
            output = super().schedule(throttle_prefills)
        finally:
            self.max_num_scheduled_tokens = full
            self.running.extend(paused)
        self._floors.end(output.num_scheduled_tokens)
        return output

    def charged(self, requests: Iterable[Request]) -> None:
        """The meter has divided a step's time among these requests."""
        fair = self.fair
        if fair is None:
            return
        bills = self._bills
        for request in requests:
            name = request.request_id
            bill = bills.get(name)
            if bill is None:
                continue
            work = bill.work
            more_us = (work.prefill_ns + work.decode_ns - bill.told_ns) // 1000
            if more_us > 0:
                bill.told_ns += more_us * 1000
                fair.charge(name, more_us)
            if work.ended:
                if work.prefill_tokens:
                    cost_ns = work.prefill_ns / work.prefill_tokens
                    self._prompt_ns += (1 - _KEEP) * (cost_ns - self._prompt_ns)
                self._left(name)

    def finish_requests(self, *arguments: Any, **options: Any) -> list[Request]:
        """End requests from outside."""
        requests = super().finish_requests(*arguments, **options)
        for request in requests:
            self._left(request.request_id)
        return requests

    def _select_waiting_queue_for_scheduling(self) -> Any:
        """Which of vLLM's two queues has the next; asked only where one may start."""
        fair = self.fair
        if fair is None:
            return super()._select_waiting_queue_for_scheduling()
        if self.waiting and self.skipped_waiting:
            first, second = self.waiting.peek_request(), self.skipped_waiting.peek_request()
            now_us = self.waiting.now_us  # type: ignore[attr-defined]
            places = (fair.place(r.request_id, now_us) for r in (first, second))
            return self.waiting if next(places) < next(places) else self.skipped_waiting
        return self.waiting or self.skipped_waiting or None

    def _left(self, name: str) -> None:
        self._bills.pop(name, None)
        if self.fair is not None:
            self.fair.leave(name, _now_us())
            self._floors.urgent.pop(name, None)


def _extra(request: Request) -> dict[str, Any]:
    params: Any = request.sampling_params
    if params is not None:
        return params.extra_args or {}
    pooling: Any = request.pooling_params
    return (pooling.extra_kwargs if pooling is not None else None) or {}


def _now_us() -> int:
    return time.monotonic_ns() // 1000
