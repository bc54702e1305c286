"""Who is next in an engine's queue: classes first, then weighted virtual time per department.

**Virtual time.** In each class a department has a counter of the device time it was given, divided
by its weight. Of those that wait in the most urgent class, the one with the least counter is next,
and within a department the first that came. This is VTC (Sheng et al., *Fairness in Serving Large
Language Models*, OSDI 2024, arXiv 2401.00588) with device-microseconds as the cost of service.
Counters are kept by class, because what a department's batch work was given while nobody else
wanted it is no debt of its urgent work.

**Lift.** Where nobody of a department waits in a class, the next of it that comes raises the
counter to the least of those that wait there, or, where nobody waits, to that of the department
that started last (VTC's algorithm 2; start-time fair queueing, Goyal, Vin, Cheng, SIGCOMM 1996,
calls it the virtual time of the queue). So nobody saves up for later by not asking, and nobody who
used an engine that was free is made to wait for it afterwards. Who *runs* does not count: on an
ordinary day everybody always runs something, and counters drift apart without anybody waiting.

**Charges.** A request is charged an estimate of its prompt when it starts, so that one look at the
queue does not admit everything of one department, and what is metered afterwards: the estimate is
used up first, and what is left of it is returned at the end. While two departments both wait in a
class, what they were given is apart by at most

    2 x max(cost of the dearest prompt, most that requests which run at once may cost)  (/ weight)

which is VTC's 2 x max(w_p L, w_q M). Proof as there: counters of those that wait differ by at most
half of it, because who starts had the least counter, and adds no more than what of it runs before
the others are above the least again. A wrong estimate is among what the running requests cost.

**Other replicas.** A request carries ``served_us``, what its department was charged everywhere, as
its gateway last heard. ``total`` is the largest such figure, plus what was charged here since; what
a new figure exceeds it by was served elsewhere, and counts here as well, in the class of the
request that brought it. Nothing counts twice: a figure holds all that was charged here but the
latest, so it exceeds ``total`` by service elsewhere at most. Nothing is missed for ever: what is
not seen now, because ``total`` had grown here meanwhile, is seen with the next figure. So the bound
grows by what is served elsewhere within the age of the figures (two seconds). Service elsewhere
counts while a department is active here, or was within ``memory_us``: lifetime totals of two
departments say nothing about who waits for whom now.

**Ageing.** A request of the batch class that has waited ``batch_age_us`` is a standard one from
then on, with its department's counter there. As the lift holds there too, it is behind at most one
turn of each other department, and whatever the bound says.

Integers only; no clock, no engine: ``deployments/scheduling`` runs it inside of vLLM, and
``benchmarks/fairness`` in a simulation.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

CRITICAL: Final = 0
STANDARD: Final = 1
BATCH: Final = 2
RANKS: Final = (CRITICAL, STANDARD, BATCH)

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class FairSettings:
    """Bounds; shares are in thousandths."""

    reserved_slots_milli: int = 125
    """Of the requests that may run at once, what only critical ones may take."""
    reserved_kv_milli: int = 100
    """Of the KV cache, the same."""
    reserved_tokens_milli: int = 750
    """Of the tokens of a step, what prompts that are not critical leave free."""
    critical_seen_us: int = 30_000_000
    """What is reserved is kept for so long after the last critical request was there."""
    batch_age_us: int = 30_000_000
    """A batch request that has waited so long competes as a standard one."""
    memory_us: int = 10_000_000
    """Service elsewhere counts for a department that was here no longer ago."""


@dataclass(slots=True)
class _Department:
    """One department here."""

    name: str
    weight_milli: int = 1000
    virtual: list[int] = field(default_factory=lambda: [0 for _ in RANKS])
    """By class. Device-nanoseconds over weight: finer than a microsecond, so that weights do not
    round."""
    total_us: int = 0
    """Charged everywhere, as far as is known here."""
    active: int = 0
    """Requests that wait or run here."""
    left_us: int = -(1 << 62)
    """When it was active last."""

    def advance(self, rank: int, cost_us: int) -> None:
        size = abs(cost_us) * 1_000_000 // self.weight_milli
        self.virtual[rank] += size if cost_us >= 0 else -size


@dataclass(slots=True)
class _Item(Generic[K]):
    """One request."""

    key: K
    department: _Department
    asked: int
    """Class that it came with."""
    rank: int
    """Class in which it competes."""
    number: int
    """In order of arrival."""
    arrived_us: int
    estimate_us: int
    ahead_us: int = 0
    """Of its charges, what was charged in advance and not metered yet."""
    waiting: bool = False


_Line = list[tuple[int, K]]
"""Heap of those of one department and class that wait, by number; some do not wait any more."""


class FairQueue(Generic[K]):
    """Requests that wait for an engine, and virtual times of those that run.

    Keys are unique among those that have not left. Times are microseconds and never go back.

    Args:
        settings: Bounds.
    """

    def __init__(self, settings: FairSettings | None = None) -> None:
        self.settings = settings or FairSettings()
        self._items: dict[K, _Item[K]] = {}
        self._departments: dict[str, _Department] = {}
        self._lines: tuple[dict[str, _Line[K]], ...] = tuple({} for _ in RANKS)
        self._numbers = 0
        self._waiting = 0
        self._last: list[_Department | None] = [None for _ in RANKS]
        """Whose request started last, by class."""
        self._floor = [0 for _ in RANKS]
        """Largest counter with which a request has started, by class."""
        self._next: tuple[int, _Item[K] | None] | None = None
        """Who is next, and at what time that was found; ``None`` after a change."""

    def __len__(self) -> int:
        """How many wait."""
        return self._waiting

    def __contains__(self, key: object) -> bool:
        """Whether a request waits or runs."""
        return key in self._items

    def arrive(
        self,
        key: K,
        department: str,
        rank: int,
        weight_milli: int,
        served_us: int,
        now_us: int,
        estimate_us: int = 0,
    ) -> None:
        """A request begins to wait.

        Args:
            key: Names it.
            department: Who is charged.
            rank: ``CRITICAL``, ``STANDARD`` or ``BATCH``.
            weight_milli: Share of the department, in thousandths; less than 1 counts as 1.
            served_us: What the department was charged everywhere, as last heard.
            now_us: The time.
            estimate_us: What its prompt will cost, charged when it starts.

        Raises:
            ValueError: It is there already.
        """
        if key in self._items:
            raise ValueError("a request cannot arrive twice")
        found = self._departments.get(department)
        if found is None:
            found = self._departments[department] = _Department(department)
        found.weight_milli = max(1, weight_milli)
        recent = found.active or now_us - found.left_us <= self.settings.memory_us
        if recent and served_us > found.total_us:
            found.advance(rank, served_us - found.total_us)
        found.total_us = max(found.total_us, served_us)
        found.active += 1
        item = _Item(key, found, rank, rank, self._numbers, now_us, max(0, estimate_us))
        self._numbers += 1
        self._items[key] = item
        self._wait(item)

    def head(self, now_us: int) -> K | None:
        """Who is next; ``None`` where nobody waits."""
        if self._next is None or self._next[0] != now_us:
            self._next = (now_us, self._head(now_us))
        item = self._next[1]
        return None if item is None else item.key

    def take(self, key: K) -> None:
        """A request that waits, or was set aside, begins to run."""
        item = self._items[key]
        self._rest(item)
        department, rank = item.department, item.rank
        self._last[rank] = department
        self._floor[rank] = max(self._floor[rank], department.virtual[rank])
        more_us = item.estimate_us - item.ahead_us
        if more_us > 0:
            item.ahead_us += more_us
            department.total_us += more_us
            department.advance(rank, more_us)

    def put_back(self, key: K) -> None:
        """A request that ran, or was set aside, waits again, at the place that it had."""
        item = self._items[key]
        if not item.waiting:
            self._refund(item)
            self._wait(item)

    def set_aside(self, key: K) -> None:
        """A request cannot start, whoever's turn it is; ``place`` says where it would stand."""
        item = self._items[key]
        self._rest(item)
        self._refund(item)

    def place(self, key: K, now_us: int) -> tuple[int, int, int]:
        """Where a request stands: of two, the lesser is earlier."""
        item = self._items[key]
        rank = STANDARD if self._aged(item, now_us) else item.rank
        return rank, item.department.virtual[rank], item.number

    def rank(self, key: K) -> int:
        """Class in which a request competes."""
        return self._items[key].rank

    def charge(self, key: K, cost_us: int) -> None:
        """Device time of a request was metered; of one that is gone, nobody pays."""
        item = self._items.get(key)
        if item is None:
            return
        if item.ahead_us:
            paid_us = min(item.ahead_us, cost_us)
            item.ahead_us -= paid_us
            cost_us -= paid_us
        item.estimate_us = item.ahead_us  # what was metered is not estimated again
        department = item.department
        department.total_us += cost_us
        department.virtual[item.rank] += cost_us * 1_000_000 // department.weight_milli
        self._next = None

    def leave(self, key: K, now_us: int | None = None) -> None:
        """A request ended, or was given up; one that is not there changes nothing."""
        item = self._items.pop(key, None)
        if item is None:
            return
        self._rest(item)
        self._refund(item)
        department = item.department
        department.active -= 1
        if not department.active:
            department.left_us = item.arrived_us if now_us is None else now_us
            self._forget(department.left_us)

    def order(self, now_us: int) -> Iterator[K]:
        """Those that wait, about in the order in which they would be next."""
        self.head(now_us)
        waiting = [item for item in self._items.values() if item.waiting]
        waiting.sort(key=lambda i: (i.rank, i.department.virtual[i.rank], i.number))
        return iter([item.key for item in waiting])

    def waiting(self) -> dict[int, int]:
        """How many wait, by the class that they came with."""
        counts = dict.fromkeys(RANKS, 0)
        for item in self._items.values():
            if item.waiting:
                counts[item.asked] += 1
        return counts

    def virtual_us(self) -> dict[str, int]:
        """Largest counter of each department that is active, in device-microseconds over weight."""
        found = self._departments.values()
        return {each.name: max(each.virtual) // 1000 for each in found if each.active}

    def standing(self, key: K) -> int:
        """Counter of a request's department in its class: of two, the larger was given more."""
        item = self._items[key]
        return item.department.virtual[item.rank] // 1000

    # -- inside -------------------------------------------------------------------------------

    def _wait(self, item: _Item[K]) -> None:
        """Put an item into its line."""
        department, rank = item.department, item.rank
        if self._first(rank, department.name) is None:
            department.virtual[rank] = max(department.virtual[rank], self._least(rank))
        if not item.waiting:
            self._waiting += 1
        item.waiting = True
        heapq.heappush(self._lines[rank].setdefault(department.name, []), (item.number, item.key))
        self._next = None

    def _rest(self, item: _Item[K]) -> None:
        """An item does not wait any more; its line finds out by itself."""
        if item.waiting:
            self._waiting -= 1
        item.waiting = False
        self._next = None

    def _refund(self, item: _Item[K]) -> None:
        """Take back what was charged in advance."""
        if item.ahead_us:
            item.department.total_us -= item.ahead_us
            item.department.advance(item.rank, -item.ahead_us)
            item.ahead_us = 0
            self._next = None

    def _least(self, rank: int) -> int:
        """Where a department that comes to a class begins."""
        waiting = [
            item.department.virtual[rank]
            for name in list(self._lines[rank])
            if (item := self._first(rank, name)) is not None
        ]
        if waiting:
            return min(waiting)
        last = self._last[rank]
        return max(self._floor[rank], last.virtual[rank] if last is not None else 0)

    def _head(self, now_us: int) -> _Item[K] | None:
        self._grow(now_us)
        for rank in RANKS:
            firsts = [self._first(rank, name) for name in list(self._lines[rank])]
            waiting = [item for item in firsts if item is not None]
            if waiting:
                return min(waiting, key=lambda i: (i.department.virtual[rank], i.number))
        return None

    def _grow(self, now_us: int) -> None:
        """Batch requests that have waited long become standard ones."""
        grown = []
        for name in list(self._lines[BATCH]):
            while (item := self._first(BATCH, name)) is not None and self._aged(item, now_us):
                heapq.heappop(self._lines[BATCH][name])
                item.rank = STANDARD
                grown.append(item)
        for item in grown:
            self._wait(item)

    def _first(self, rank: int, name: str) -> _Item[K] | None:
        """The first that waits in a line; a line that nobody waits in goes."""
        line = self._lines[rank].get(name)
        while line:
            number, key = line[0]
            item = self._items.get(key)
            if item is not None and item.waiting and (item.number, item.rank) == (number, rank):
                return item
            heapq.heappop(line)
        self._lines[rank].pop(name, None)
        return None

    def _aged(self, item: _Item[K], now_us: int) -> bool:
        return item.rank == BATCH and now_us - item.arrived_us >= self.settings.batch_age_us

    def _forget(self, now_us: int) -> None:
        """Departments that have been away for long begin anew when they come again."""
        gone = [
            each.name
            for each in self._departments.values()
            if not each.active and now_us - each.left_us > self.settings.memory_us
        ]
        for name in gone:
            del self._departments[name]
