"""Our arm: the queue of ``routing/fairness.py`` with the floors that our scheduler keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.fairness.asks import Ask, Part, Room
from benchmarks.fairness.traffic import CRITICAL, Department
from routing.fairness import FairQueue, FairSettings

LEAST_PROMPT_TOKENS = 64
"""Of a step, for prompts that are not critical, however many answers run; as in the engines."""


class Ours:
    """Weighted virtual time per department within classes, ageing, and floors for critical ones.

    Args:
        organisation: Departments.
        settings: As engines have them.
        prompt_us: What a prompt token is expected to cost, charged when a request starts.
        floors: Whether critical requests have reserved places, KV cache and tokens of a step.
    """

    def __init__(
        self,
        organisation: Sequence[Department],
        settings: FairSettings | None = None,
        *,
        prompt_us: float = 0.0,
        floors: bool = True,
    ) -> None:
        self.settings = settings or FairSettings()
        self.queue: FairQueue[int] = FairQueue(self.settings)
        self.urgent_first = floors
        self._organisation = organisation
        self._floors = floors
        self._asks: dict[int, Ask] = {}
        self._running: list[dict[int, None]] = [{} for _ in organisation]
        self._left_ns = [0] * len(organisation)
        self._urgent_us: int | None = None
        """When a critical request was last here."""
        self._urgent_here = 0
        self._prompt_us = prompt_us

    def arrive(self, ask: Ask, now_us: int, served_us: int) -> None:
        """A request with its department's class and weight."""
        department = self._organisation[ask.department]
        self._asks[ask.number] = ask
        self._urgent_here += ask.rank == CRITICAL
        self.queue.arrive(
            ask.number,
            department.name,
            ask.rank,
            department.weight_milli,
            served_us,
            now_us,
            round(ask.prompt * self._prompt_us),
        )

    def head(self, now_us: int, room: Room) -> Ask | None:
        """Who the queue says, where the floors allow it."""
        number = self.queue.head(now_us)
        if number is None:
            return None
        ask = self._asks[number]
        if ask.rank == CRITICAL or not self._keeps_floors(now_us) or not room.running:
            return ask
        machine, settings = room.machine, self.settings
        places = max(1, machine.max_seqs * settings.reserved_slots_milli // 1000)
        tokens = machine.kv_tokens * settings.reserved_kv_milli // 1000
        if machine.max_seqs - room.running <= max(0, places - room.urgent_running):
            return None
        if not room.urgent_running and room.free_kv - ask.to_compute < tokens:
            return None
        return ask

    def _keeps_floors(self, now_us: int) -> bool:
        if self._urgent_here:
            self._urgent_us = now_us
        return (
            self._floors
            and self._urgent_us is not None
            and now_us - self._urgent_us <= self.settings.critical_seen_us
        )

    def take(self, ask: Ask) -> None:
        """Starts."""
        self.queue.take(ask.number)
        self._running[ask.department][ask.number] = None

    def put_back(self, ask: Ask) -> None:
        """Waits again."""
        self._running[ask.department].pop(ask.number)
        self.queue.put_back(ask.number)

    def leave(self, ask: Ask, now_us: int) -> None:
        """Gone."""
        self._urgent_here -= ask.rank == CRITICAL
        self._running[ask.department].pop(ask.number)
        self.queue.leave(ask.number, now_us)
        del self._asks[ask.number]

    def charge(self, department: int, part: Part) -> None:
        """Prompts pay one by one; the answers' whole microseconds go to one that runs."""
        left_ns = self._left_ns[department] + part.cost_ns
        for ask, chunk_ns in part.chunks:
            self.queue.charge(ask.number, chunk_ns // 1000)
            left_ns -= chunk_ns // 1000 * 1000
        cost_us = max(0, left_ns // 1000)
        self._left_ns[department] = left_ns - 1000 * cost_us
        self.queue.charge(next(iter(self._running[department])), cost_us)

    def victim(self, running: Iterable[Ask]) -> Ask:
        """Of the least class, of whose department was given most."""
        standing = self.queue.standing
        return max(running, key=lambda ask: (ask.rank, standing(ask.number), ask.number))

    def prompt_tokens(self, now_us: int, room: Room, tokens: int, *, urgent: bool) -> int:
        """None beside critical prompts; else what keeps a step short while critical ones come."""
        if not self._keeps_floors(now_us):
            return tokens
        if urgent:
            return 0
        most = room.machine.step_tokens * (1000 - self.settings.reserved_tokens_milli) // 1000
        answers = room.machine.step_tokens - tokens
        return min(tokens, max(LEAST_PROMPT_TOKENS, most - answers))
