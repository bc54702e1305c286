"""Engines, gateways and time: plays traffic and keeps what is needed to judge it.

Requests go to the engines in turn, whatever waits there, or to the one that their department is
bound to, as conversations do whose prefix an engine has. What a department has been served at all
engines is known to gateways ``late_s`` later; they send the figure along with each request, as
tickets do.
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from benchmarks.fairness.asks import Ask, Line
from benchmarks.fairness.batching import Engine, Step
from benchmarks.fairness.lines import ANSWER_PRICE, PROMPT_PRICE, Gate
from benchmarks.fairness.machine import Machine
from benchmarks.fairness.traffic import Traffic

TOLD_EVERY_S = 0.25
"""How finely it is kept what gateways were told when."""


@dataclass
class Books:
    """Service of departments over all engines, now and as it was."""

    departments: int
    cost_ns: list[int] = field(init=False)
    tokens: list[int] = field(init=False)
    """Weighted as in plain VTC."""
    _at_s: list[float] = field(default_factory=list)
    _was_us: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cost_ns = [0] * self.departments
        self.tokens = [0] * self.departments

    def keep(self, now_s: float) -> None:
        """Remember the figures of now."""
        if not self._at_s or now_s - self._at_s[-1] >= TOLD_EVERY_S:
            self._at_s.append(now_s)
            self._was_us.append([value // 1000 for value in self.cost_ns])

    def heard(self, department: int, at_s: float) -> int:
        """Service in microseconds as it was at a time."""
        place = bisect_right(self._at_s, at_s) - 1
        return self._was_us[place][department] if place >= 0 else 0


@dataclass(frozen=True)
class Played:
    """What came of a run; arrays are by request or by moment."""

    asks: list[Ask]
    busy_s: float
    """Device-seconds of all engines."""
    ended_s: float
    tokens: int
    """Prompt and answer tokens of requests that ended."""
    put_back: int
    steps: int
    longest_step_s: float
    at_s: npt.NDArray[np.float64]
    """Moments: begin of each step, after admission."""
    cost_ns: npt.NDArray[np.int64]
    """By moment and department: service so far at all engines."""
    vtc_tokens: npt.NDArray[np.int64]
    """The same in weighted tokens."""
    waiting: npt.NDArray[np.int64]
    """By moment and department: requests that wait anywhere."""
    done_tokens: npt.NDArray[np.int64]
    """By moment: prompt and answer tokens computed so far, recomputed ones left out."""
    busy_at_s: npt.NDArray[np.float64]
    """By moment: device-seconds so far."""

    def until(self, end_s: float) -> Played:
        """The same with the moments before a time only."""
        count = int(np.searchsorted(self.at_s, end_s))
        return replace(
            self,
            at_s=self.at_s[:count],
            cost_ns=self.cost_ns[:count],
            vtc_tokens=self.vtc_tokens[:count],
            waiting=self.waiting[:count],
            done_tokens=self.done_tokens[:count],
            busy_at_s=self.busy_at_s[:count],
        )


def play(
    traffic: Traffic,
    machine: Machine,
    line: Callable[[], Line],
    *,
    engines: int = 1,
    late_s: float | None = 2.0,
    bound: Mapping[int, int] | None = None,
    gate: Gate | None = None,
    until_s: float | None = None,
) -> Played:
    """Play traffic to its end.

    Args:
        traffic: Requests.
        machine: Each of the engines.
        line: Makes the line of one engine.
        engines: How many there are.
        late_s: Age of what gateways know of service elsewhere; ``None`` if they know nothing.
        bound: Departments that use one engine only, by index.
        gate: Refuses requests before they reach an engine.
        until_s: End here, whatever waits; ``None`` plays until all is done.

    Raises:
        ValueError: A request does not fit into an engine at all.
    """
    count = len(traffic.organisation)
    if len(traffic) and int((traffic.prompt_tokens + traffic.answer_tokens).max()) > (
        machine.kv_tokens
    ):
        raise ValueError("a request is longer than the KV cache")
    ranks = [department.rank for department in traffic.organisation]
    asks = [
        Ask(number, at_s, who, ranks[who], prompt, answer)
        for number, (at_s, who, prompt, answer) in enumerate(
            zip(
                traffic.at_s.tolist(),
                traffic.department.tolist(),
                traffic.prompt_tokens.tolist(),
                traffic.answer_tokens.tolist(),
                strict=True,
            )
        )
    ]
    hosts = [Engine(machine, line(), count) for _ in range(engines)]
    under_way: list[Step | None] = [None] * engines
    ends: list[tuple[float, int]] = []
    books = Books(count)
    at_s, busy_at_s = array("d"), array("d")
    cost, tokens, waiting, done_tokens = array("q"), array("q"), array("q"), array("q")
    busy_ns = done = longest_ns = 0
    now_s = 0.0

    def begin(place: int) -> None:
        nonlocal longest_ns
        step = under_way[place] = hosts[place].begin(now_s)
        if step is None:
            return
        longest_ns = max(longest_ns, step.span_ns)
        heapq.heappush(ends, (now_s + step.span_ns / 1e9, place))
        at_s.append(now_s)
        busy_at_s.append(busy_ns / 1e9)
        done_tokens.append(done)
        cost.extend(books.cost_ns)
        tokens.extend(books.tokens)
        waiting.extend(map(sum, zip(*(host.waiting for host in hosts), strict=True)))

    arrivals = iter(asks)
    coming = next(arrivals, None)
    while coming is not None or ends:
        if coming is not None and (not ends or coming.arrived_s <= ends[0][0]):
            now_s = coming.arrived_s
            if until_s is not None and now_s >= until_s:
                break
            ask, coming = coming, next(arrivals, None)
            if gate is not None and not gate.passes(ask):
                ask.refused = True
                continue
            if bound is not None and ask.department in bound:
                place = bound[ask.department]
            else:
                place = ask.number % engines
            served = 0 if late_s is None else books.heard(ask.department, now_s - late_s)
            hosts[place].arrive(ask, round(now_s * 1e6), served)
            if under_way[place] is None:
                begin(place)
            continue
        now_s, place = heapq.heappop(ends)
        if until_s is not None and now_s >= until_s:
            break
        step = under_way[place]
        if step is None:
            raise RuntimeError("the end of a step that never began")
        busy_ns += step.span_ns
        for department, part in zip(step.departments, hosts[place].end(step, now_s), strict=True):
            books.cost_ns[department] += part.cost_ns
            books.tokens[department] += PROMPT_PRICE * part.prompt + ANSWER_PRICE * part.answer
            done += part.prompt + part.answer
        books.keep(now_s)
        begin(place)
    shape = (len(at_s), count)
    return Played(
        asks,
        busy_ns / 1e9,
        now_s,
        sum(ask.prompt + ask.answer for ask in asks if ask.ended_s >= 0),
        sum(host.put_back for host in hosts),
        sum(host.steps for host in hosts),
        longest_ns / 1e9,
        np.frombuffer(at_s),
        np.frombuffer(cost, dtype=np.int64).reshape(shape),
        np.frombuffer(tokens, dtype=np.int64).reshape(shape),
        np.frombuffer(waiting, dtype=np.int64).reshape(shape),
        np.frombuffer(done_tokens, dtype=np.int64),
        np.frombuffer(busy_at_s),
    )
