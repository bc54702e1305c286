"""One engine with continuous batching, as a discrete-event simulation; steps are its events.

Modelled on vLLM's scheduler (``vllm/v1/core/sched/scheduler.py``, 0.29):

* a step has room for ``step_tokens``; every running answer gets one of them, what is left goes to
  prompts, in chunks (Sarathi-Serve: Agrawal et al., OSDI 2024);
* prompts that have begun go before those that wait; who waits is admitted in the order of a
  ``Line`` while there is a place (``max_seqs``) and the KV cache has room for its whole prompt;
* when the KV cache is full a running request is put back and computed again later;
* a step cannot be interrupted, and steps follow each other while there is work.

Left out: the prefix cache (every prompt is computed), rounding to blocks of the KV cache, stop
tokens (a request's answer has the length that the trace says), pipelines, several models.

Answers of one department are kept in sums, not one by one: all of them advance by one token a step,
so a step costs the same however many run.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.fairness.asks import Ask, Line, Part
from benchmarks.fairness.machine import Machine, Share
from benchmarks.fairness.traffic import CRITICAL


@dataclass(slots=True)
class Step:
    """A step under way."""

    departments: list[int]
    shares: list[Share]
    prompt: list[int]
    """Prompt tokens of each of ``departments``."""
    answers: list[int]
    chunks: list[tuple[Ask, int, int]]
    """Of prompts: request, tokens, context before them."""
    finishing: list[Ask]
    """Prompts that are through at its end."""
    span_ns: int


class Engine:
    """See the module."""

    def __init__(self, machine: Machine, line: Line, departments: int) -> None:
        self.machine = machine
        self.line = line
        self.free_kv = machine.kv_tokens
        self.urgent_running = 0
        self.waiting = [0] * departments
        self.put_back = 0
        """Times that a request was put back."""
        self.steps = 0
        self._prompts: list[Ask] = []
        self._answers = [0] * departments
        self._offsets = [0] * departments
        """Sum over running answers of prompt less ``join``."""
        self._decoded = 0
        self._ends: list[tuple[int, int, int, Ask]] = []
        self._running: dict[int, Ask] = {}
        self._sums = (0.0, 0.0, 0.0)
        """What an answer token cost in all decode steps, in nanoseconds: the part that is the same
        for all, the part per token of context, and that part times the count of decode steps."""

    @property
    def running(self) -> int:
        """Requests that run."""
        return len(self._running)

    def arrive(self, ask: Ask, now_us: int, served_us: int) -> None:
        """A request comes."""
        self.waiting[ask.department] += 1
        self.line.arrive(ask, now_us, served_us)

    def begin(self, now_s: float) -> Step | None:
        """Schedule a step; ``None`` where there is nothing to do."""
        now_us = round(now_s * 1e6)
        self._make_room()
        answers = sum(self._answers)
        budget = self.machine.step_tokens - answers
        parts: list[tuple[Ask, int]] = []
        began = list(self._prompts)
        # Critical prompts that have begun, then those that wait, then all others.
        for ask in began:
            if self.line.urgent_first and ask.rank == CRITICAL:
                budget -= self._chunk(ask, budget, parts)
        if self.line.urgent_first:
            budget = self._admit(now_s, now_us, budget, parts, urgent=True)
        others = min(budget, self.line.prompt_tokens(now_us, self, budget, urgent=bool(parts)))
        for ask in began:
            if not (self.line.urgent_first and ask.rank == CRITICAL):
                others -= self._chunk(ask, others, parts)
        self._admit(now_s, now_us, others, parts, urgent=False)
        return self._step(parts)

    def _chunk(self, ask: Ask, budget: int, parts: list[tuple[Ask, int]]) -> int:
        tokens = min(budget, ask.to_compute - ask.done)
        if tokens > 0:
            parts.append((ask, tokens))
        return tokens

    def _admit(
        self, now_s: float, now_us: int, budget: int, parts: list[tuple[Ask, int]], *, urgent: bool
    ) -> int:
        while budget > 0 and len(self._running) < self.machine.max_seqs:
            ask = self.line.head(now_us, self)
            if ask is None or (urgent and ask.rank != CRITICAL):
                break
            # Running answers have been given room for the token of this step.
            if ask.to_compute > self.free_kv - sum(self._answers):
                break
            self.line.take(ask)
            self.waiting[ask.department] -= 1
            self.free_kv -= ask.to_compute
            self._running[ask.number] = ask
            self.urgent_running += ask.rank == CRITICAL
            self._prompts.append(ask)
            ask.done = 0
            if ask.started_s < 0:
                ask.started_s = now_s
            budget -= self._chunk(ask, budget, parts)
        return budget

    def _step(self, parts: Sequence[tuple[Ask, int]]) -> Step | None:
        count = len(self._answers)
        requests = list(self._answers)
        tokens = list(self._answers)
        context = [self._offsets[d] + (self._decoded + 1) * self._answers[d] for d in range(count)]
        pairs = [float(value) for value in context]
        prompt = [0] * count
        finishing, chunks = [], []
        for ask, chunk in parts:
            chunks.append((ask, chunk, ask.done))
            department = ask.department
            requests[department] += 1
            tokens[department] += chunk
            prompt[department] += chunk
            pairs[department] += chunk * (ask.done + 0.5 * (chunk + 1))
            context[department] += ask.done + chunk
            ask.done += chunk
            if ask.done == ask.to_compute:
                finishing.append(ask)
        present = [d for d in range(count) if requests[d]]
        if not present:
            return None
        shares = [Share(requests[d], tokens[d], pairs[d], context[d]) for d in present]
        span_ns = round(self.machine.step_s(shares) * 1e9)
        return Step(
            present,
            shares,
            [prompt[d] for d in present],
            [self._answers[d] for d in present],
            chunks,
            finishing,
            span_ns,
        )

    def end(self, step: Step, now_s: float) -> list[Part]:
        """The step is through; gives the part of each of its departments."""
        self.steps += 1
        costs, scale = self.machine.divide(step.shares, step.span_ns)
        given = list(step.answers)
        chunks = self._meter(step, scale)
        if any(step.answers):
            self._decoded += 1
            self.free_kv -= sum(step.answers)
        place = {department: at for at, department in enumerate(step.departments)}
        for ask in step.finishing:
            given[place[ask.department]] += 1
        parts = [
            Part(costs[at], step.prompt[at], given[at], chunks.get(department, []))
            for at, department in enumerate(step.departments)
        ]
        for department, part in zip(step.departments, parts, strict=True):
            self.line.charge(department, part)
        while self._ends and self._ends[0][0] <= self._decoded:
            _, number, turn, ask = heapq.heappop(self._ends)
            if ask.round == turn and number in self._running:
                self._stop(ask)
                self._finish(ask, now_s)
        for ask in step.finishing:
            self._prompts.remove(ask)
            if ask.first_s < 0:
                ask.first_s = now_s
            left = ask.answer - ask.given - 1
            if left <= 0:
                self.free_kv += ask.to_compute
                self._finish(ask, now_s)
                continue
            ask.join, ask.before = self._decoded, self._sums
            self._answers[ask.department] += 1
            self._offsets[ask.department] += ask.to_compute - ask.join
            heapq.heappush(self._ends, (self._decoded + left, ask.number, ask.round, ask))
        return parts

    def _meter(self, step: Step, scale: float) -> dict[int, list[tuple[Ask, int]]]:
        """Each request's own part: prompts now, by department; answers when they end."""
        found: dict[int, list[tuple[Ask, int]]] = {}
        cost = self.machine.cost
        requests = sum(share.requests for share in step.shares)
        for ask, tokens, context in step.chunks:
            part_ns = scale * cost.weight(tokens, context, requests)
            ask.cost_ns += part_ns
            found.setdefault(ask.department, []).append((ask, int(part_ns)))
        if any(step.answers):
            same, context_ns, counted = self._sums
            base_s = cost.shared_s / requests + cost.request_s + cost.token_s
            each_ns = scale * (cost.pair_s + cost.context_s)
            self._sums = (
                same + scale * base_s,
                context_ns + each_ns,
                counted + each_ns * (self._decoded + 1),
            )
        return found

    def _stop(self, ask: Ask) -> int:
        """Take a running answer out of the sums; gives the tokens it holds."""
        self._answers[ask.department] -= 1
        offset = ask.to_compute - ask.join
        self._offsets[ask.department] -= offset
        same, context, counted = (
            now - then for now, then in zip(self._sums, ask.before, strict=True)
        )
        ask.cost_ns += same + offset * context + counted
        held = ask.to_compute + self._decoded - ask.join
        self.free_kv += held
        return held

    def _finish(self, ask: Ask, now_s: float) -> None:
        ask.ended_s = now_s
        self._gone(ask)
        self.line.leave(ask, round(now_s * 1e6))

    def _gone(self, ask: Ask) -> None:
        del self._running[ask.number]
        self.urgent_running -= ask.rank == CRITICAL

    def _make_room(self) -> None:
        """Put requests back until each running answer has room for its next token."""
        while self.free_kv < sum(self._answers):
            ask = self.line.victim(self._running.values())
            if ask in self._prompts:
                self._prompts.remove(ask)
                self.free_kv += ask.to_compute
            else:
                held = self._stop(ask)
                # The token that was last given has no KV cache yet.
                ask.given = held - ask.prompt + 1
            ask.round += 1
            ask.done = 0
            self.put_back += 1
            self._gone(ask)
            self.waiting[ask.department] += 1
            self.line.put_back(ask)
