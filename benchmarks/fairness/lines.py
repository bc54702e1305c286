"""The arms: who waits in which order at an engine.

* ``Fcfs``: first come, first served; vLLM's default.
* ``Classes``: critical before standard before batch, first come first served in each; what vLLM's
  ``priority`` policy gives by itself.
* ``Vtc``: plain virtual token counters (Sheng et al., *Fairness in Serving Large Language Models*,
  OSDI 2024, algorithm 2, with weights): no classes, no floors, each engine for itself.
* ``Ours``: ``routing/fairness.py``, the code that runs inside our engines, with the floors for
  critical requests.

A limit of requests a minute is not a line but a gate in front of ``Fcfs``: ``Gate``.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence

from benchmarks.fairness.asks import Ask, Part, Room
from benchmarks.fairness.traffic import Department

PROMPT_PRICE, ANSWER_PRICE = 1, 2
"""Weights of tokens in plain VTC: ``w_p`` and ``w_q`` of the paper's experiments."""


class Fcfs:
    """First come, first served."""

    urgent_first = False

    def __init__(self) -> None:
        self._back: list[tuple[float, int, Ask]] = []
        self._queue: deque[Ask] = deque()

    def arrive(self, ask: Ask, now_us: int, served_us: int) -> None:
        """At the end."""
        self._queue.append(ask)

    def head(self, now_us: int, room: Room) -> Ask | None:
        """The one who was put back, else the first."""
        if self._back:
            return self._back[0][2]
        return self._queue[0] if self._queue else None

    def take(self, ask: Ask) -> None:
        """Starts."""
        if self._back and self._back[0][2] is ask:
            heapq.heappop(self._back)
        else:
            self._queue.popleft()

    def put_back(self, ask: Ask) -> None:
        """Before all that wait."""
        heapq.heappush(self._back, (ask.arrived_s, ask.number, ask))

    def leave(self, ask: Ask, now_us: int) -> None:
        """Nothing is kept of it."""

    def charge(self, department: int, part: Part) -> None:
        """Costs do not matter."""

    def victim(self, running: Iterable[Ask]) -> Ask:
        """The one that started last."""
        return max(running, key=lambda ask: (ask.started_s, ask.number))

    def prompt_tokens(self, now_us: int, room: Room, tokens: int, *, urgent: bool) -> int:
        """All."""
        return tokens


class Classes(Fcfs):
    """By class, then first come, first served."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, float, int, Ask]] = []

    def arrive(self, ask: Ask, now_us: int, served_us: int) -> None:
        """Behind those of its class."""
        heapq.heappush(self._heap, (ask.rank, ask.arrived_s, ask.number, ask))

    def head(self, now_us: int, room: Room) -> Ask | None:
        """First of the best class."""
        return self._heap[0][3] if self._heap else None

    def take(self, ask: Ask) -> None:
        """Starts."""
        heapq.heappop(self._heap)

    def put_back(self, ask: Ask) -> None:
        """To its old place."""
        heapq.heappush(self._heap, (ask.rank, ask.arrived_s, ask.number, ask))

    def victim(self, running: Iterable[Ask]) -> Ask:
        """Of the least class the one that came last, as vLLM does."""
        return max(running, key=lambda ask: (ask.rank, ask.arrived_s, ask.number))


class Vtc(Fcfs):
    """Virtual token counters."""

    def __init__(self, organisation: Sequence[Department]) -> None:
        self._weights = [department.weight_milli for department in organisation]
        self.counters = [0] * len(organisation)
        """Thousandths of weighted tokens."""
        self._queues: list[deque[Ask]] = [deque() for _ in organisation]
        self._last = 0
        """Department whose last waiting request started last."""

    def arrive(self, ask: Ask, now_us: int, served_us: int) -> None:
        """Lift the counter of a department that had nobody waiting (lines 6 to 13)."""
        queue = self._queues[ask.department]
        if not queue:
            others = [self.counters[d] for d, waits in enumerate(self._queues) if waits] or [
                self.counters[self._last]
            ]
            self.counters[ask.department] = max(self.counters[ask.department], min(others))
        queue.append(ask)

    def head(self, now_us: int, room: Room) -> Ask | None:
        """Of the department with the least counter."""
        waits = [d for d, queue in enumerate(self._queues) if queue]
        if not waits:
            return None
        return self._queues[min(waits, key=lambda d: (self.counters[d], d))][0]

    def take(self, ask: Ask) -> None:
        """Starts, and pays for its prompt (line 22)."""
        self._queues[ask.department].popleft()
        self._last = ask.department
        if not ask.round:
            self._pay(ask.department, PROMPT_PRICE * ask.prompt)

    def put_back(self, ask: Ask) -> None:
        """Before the others of its department."""
        self._queues[ask.department].appendleft(ask)

    def charge(self, department: int, part: Part) -> None:
        """Answers pay as they are generated (line 29)."""
        self._pay(department, ANSWER_PRICE * part.answer)

    def _pay(self, department: int, tokens: int) -> None:
        self.counters[department] += tokens * 1_000_000 // self._weights[department]


class Gate:
    """A limit of requests a minute for each department; what is over it is refused.

    Fixed windows, as the paper's rival RPM.
    """

    def __init__(self, a_minute: Sequence[int]) -> None:
        self.a_minute = list(a_minute)
        self._window = -1
        self._used = [0] * len(a_minute)

    def passes(self, ask: Ask) -> bool:
        """Whether a request may go on."""
        window = int(ask.arrived_s // 60)
        if window != self._window:
            self._window, self._used = window, [0] * len(self.a_minute)
        self._used[ask.department] += 1
        return self._used[ask.department] <= self.a_minute[ask.department]
