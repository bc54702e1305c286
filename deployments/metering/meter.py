"""Splits an engine's busy time over the requests it worked for. Pure: no vLLM, no clock.

**Time.** A step begins when it is scheduled and ends when its output has been processed. Steps
end in the order in which they began, and may overlap: with asynchronous scheduling the next one
is scheduled while the last one runs. Step ``i`` is given

    dt = end_i - max(start_i, end of the step before)

so no moment counts twice, and the sum is exactly the time in which at least one step was under
way. Scheduling and output processing are in it: meanwhile the device serves nobody else.

**Parts.** ``dt`` times the number of devices, in whole nanoseconds, is cut at the rounded running
sums of the requests' weights. Cuts never go back and the last one is the end, so parts are never
negative and add up to the whole exactly; each is within a nanosecond of its exact value.

**Who pays.** A request pays for every step that it was scheduled in and had not ended before:

- one that is aborted still pays for the steps that are under way, and has ended with the last;
- one that stopped may have been scheduled once more by then (asynchronous scheduling runs ahead
  of the stop token). Nobody asked for that work, so its part goes to ``unattributed_ns`` (and
  ``overrun_ns`` tells how much); the final figure is final when the last token leaves;
- a request without a key (nothing of a ticket in it: warm-up, a profiling run) goes to
  ``unattributed_ns`` as well.

A step without tokens runs no model; its time is idle time.

Always: ``busy_ns == attributed_ns + unattributed_ns``, and ``attributed_ns`` is the sum over all
requests with a key that there ever were.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from deployments.metering.cost import CostModel

_LEAST, _MOST = 1e-100, 1e100
"""Weights outside make no sense, or would not divide; such a step is split equally."""


class Work:
    """One request of the engine: a prompt and one choice. Figures are cumulative."""

    __slots__ = (
        "adapter",
        "cached_tokens",
        "decode_ns",
        "ended",
        "in_flight",
        "key",
        "prefill_ns",
        "prefill_tokens",
        "row",
        "seen",
    )

    def __init__(self, key: int, row: int, adapter: bool) -> None:
        self.key = key
        """Of the exchange that it belongs to; 0 for none."""
        self.row = row
        """1, 2, ... within the meter."""
        self.adapter = adapter
        self.prefill_ns = 0
        """Device-nanoseconds of steps that computed a part of the prompt."""
        self.decode_ns = 0
        self.prefill_tokens = 0
        """Prompt tokens computed, again after a preemption."""
        self.cached_tokens = 0
        """Prompt tokens found computed when it was first scheduled."""
        self.in_flight = 0
        """Steps under way that it was in when it was aborted; 0 before."""
        self.seen = False
        self.ended = False
        """No figure changes any more."""


Scheduled = tuple[str, int, int, bool]
"""Request id, tokens, context before them, whether they are of the prompt."""


class _Step:
    __slots__ = ("parts", "start_ns", "weight")

    def __init__(self, start_ns: int, parts: list[tuple[Work, float, bool]], weight: float) -> None:
        self.start_ns = start_ns
        self.parts = parts
        self.weight = weight


class StepMeter:
    """Meter of one engine core; see the module.

    Args:
        cost: Weighs requests within a step.
        devices: Devices that a step occupies.
    """

    def __init__(self, cost: CostModel, devices: int = 1) -> None:
        self.cost = cost
        self.devices = devices
        self.busy_ns = 0
        """Device-nanoseconds, as the other three."""
        self.attributed_ns = 0
        self.unattributed_ns = 0
        self.overrun_ns = 0
        """Of ``unattributed_ns``: work for requests that had stopped."""
        self.steps = 0
        self.changed: dict[int, Work] = {}
        """Rows with a key that have changed since the caller last took them out."""
        self._works: dict[str, Work] = {}
        self._steps: dict[Hashable, _Step] = {}
        self._end_ns = 0
        self._rows = 0

    @property
    def running(self) -> int:
        """Requests that have been added and have not ended."""
        return len(self._works)

    def added(self, request_id: str, key: int, *, adapter: bool = False) -> Work:
        """The engine has taken a request; a second time is the same one.

        Args:
            request_id: The engine's own id, unique among those that have not ended.
            key: Exchange that pays, positive; 0 for nobody.
            adapter: Whether it runs with a low-rank adapter.
        """
        work = self._works.get(request_id)
        if work is None:
            self._rows += 1
            work = self._works[request_id] = Work(key, self._rows, adapter)
            if key:
                self.changed[work.row] = work
        return work

    def scheduled(self, step: Hashable, now_ns: int, parts: Iterable[Scheduled]) -> None:
        """A step with tokens begins.

        Args:
            step: Names it until ``updated``.
            now_ns: When scheduling began; monotonic.
            parts: Who is in it.
        """
        parts = list(parts)
        if not parts:
            return
        works, cost = self._works, self.cost
        token_s, pair_s, context_s = cost.token_s, cost.pair_s, cost.context_s
        base_s = cost.shared_s / len(parts) + cost.request_s
        total = 0.0
        weighed = []
        for name, tokens, context, prompt in parts:
            work = works.get(name) or self.added(name, 0)
            # As ``CostModel.weight``, which a call per request and step would make twice as dear.
            weight = (
                base_s
                + tokens * (token_s + pair_s * (context + 0.5 * (tokens + 1)))
                + context_s * (context + tokens)
            )
            if work.adapter:
                weight += tokens * cost.adapter_token_s
            if prompt:
                if not work.seen:
                    work.seen = True
                    work.cached_tokens = context
                work.prefill_tokens += tokens
            total += weight
            weighed.append((work, weight, prompt))
        self._steps[step] = _Step(now_ns, weighed, total)

    def updated(self, step: Hashable, now_ns: int, stopped: Iterable[str] = ()) -> bool:
        """The output of a step has been processed.

        Args:
            step: As given to ``scheduled``; one that was not is ignored.
            now_ns: Monotonic.
            stopped: Requests that ended by themselves with this output.

        Returns:
            Whether a request has ended or nothing is under way: figures are to be told at once.
        """
        ended = False
        if (record := self._steps.pop(step, None)) is not None:
            span_ns = now_ns - max(record.start_ns, self._end_ns)
            self._end_ns = max(self._end_ns, now_ns)
            self.steps += 1
            ended = self._split(record, max(0, span_ns) * self.devices)
        for name in stopped:
            ended = self._end(name) or ended
        return ended or not self._works

    def aborted(self, request_ids: Iterable[str]) -> bool:
        """Requests ended from outside.

        Returns:
            Whether one of them has ended now and not with a step under way.
        """
        ended = False
        for name in request_ids:
            work = self._works.get(name)
            if work is None:
                continue
            work.in_flight = sum(
                work is other for step in self._steps.values() for other, _, _ in step.parts
            )
            if work.in_flight:
                # Its id may be used again, so it is found by its steps from now on.
                del self._works[name]
            else:
                ended = self._end(name) or ended
        return ended

    def _split(self, step: _Step, span_ns: int) -> bool:
        self.busy_ns += span_ns
        parts, weight = step.parts, step.weight
        if not _LEAST < weight < _MOST:
            parts = [(work, 1.0, prompt) for work, _, prompt in parts]
            weight = float(len(parts))
        scale = span_ns / weight
        changed = self.changed
        running, before, nobody = 0.0, 0, 0
        ended = False
        for work, part, prompt in parts:
            running += part
            # NOTE: the same sum in the same order as the total, so the last one is equal to it.
            cut = int(running * scale) if running < weight else span_ns
            if cut > span_ns:
                cut = span_ns
            share = cut - before
            before = cut
            if not work.key:
                nobody += share
            elif work.ended:
                nobody += share
                self.overrun_ns += share
            else:
                if prompt:
                    work.prefill_ns += share
                else:
                    work.decode_ns += share
                changed[work.row] = work
            if work.in_flight:
                work.in_flight -= 1
                if not work.in_flight:
                    work.ended = ended = True
        self.unattributed_ns += nobody
        self.attributed_ns += span_ns - nobody
        return ended

    def _end(self, name: str) -> bool:
        work = self._works.pop(name, None)
        if work is None:
            return False
        work.ended = True
        if work.key:
            self.changed[work.row] = work
        return True
