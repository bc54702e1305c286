"""What engines and those who order their queues tell each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from benchmarks.fairness.machine import Machine


class Ask:
    """One request and what became of it; times in seconds, -1 for never."""

    __slots__ = (
        "answer",
        "arrived_s",
        "before",
        "cost_ns",
        "department",
        "done",
        "ended_s",
        "first_s",
        "given",
        "join",
        "number",
        "prompt",
        "rank",
        "refused",
        "round",
        "started_s",
    )

    def __init__(
        self, number: int, arrived_s: float, department: int, rank: int, prompt: int, answer: int
    ) -> None:
        self.number = number
        self.arrived_s = arrived_s
        self.department = department
        self.rank = rank
        self.prompt = prompt
        self.answer = answer
        """Tokens; the first comes with the prompt's last chunk."""
        self.done = 0
        """Tokens whose KV cache is computed, while it is in its prompt."""
        self.given = 0
        """Answer tokens it had when it was last put back."""
        self.join = 0
        """Count of decode steps at which its answer began."""
        self.round = 0
        """Times it was put back."""
        self.cost_ns = 0.0
        """What the meter gave it, once it has ended."""
        self.before = (0.0, 0.0, 0.0)
        """The engine's sums when its answer began."""
        self.started_s = self.first_s = self.ended_s = -1.0
        self.refused = False

    @property
    def to_compute(self) -> int:
        """Tokens of its prompt, and of the answer that it lost when it was put back."""
        return self.prompt + self.given


class Part(NamedTuple):
    """What a department had of a step."""

    cost_ns: int
    """Of the step's time."""
    prompt: int
    """Tokens of prompts that were computed."""
    answer: int
    """Tokens of answers that were generated."""
    chunks: list[tuple[Ask, int]]
    """Of ``cost_ns``, what the prompts in it cost, one by one."""


class Room(Protocol):
    """What a line may know of the engine when it says who is next."""

    machine: Machine
    urgent_running: int
    """Critical requests that run."""
    free_kv: int
    """Tokens of the KV cache that nobody holds."""

    @property
    def running(self) -> int:
        """Requests that run."""


class Line(Protocol):
    """Who waits at one engine, and in which order."""

    urgent_first: bool
    """Critical prompts are computed before others that have begun."""

    def arrive(self, ask: Ask, now_us: int, served_us: int) -> None:
        """It waits from now on.

        Args:
            ask: Request.
            now_us: Time.
            served_us: Service of its department at all engines, as the gateway has last heard.
        """

    def head(self, now_us: int, room: Room) -> Ask | None:
        """Who may start now; ``None`` for nobody."""

    def take(self, ask: Ask) -> None:
        """It starts."""

    def put_back(self, ask: Ask) -> None:
        """It was put back and waits again."""

    def leave(self, ask: Ask, now_us: int) -> None:
        """It has ended."""

    def charge(self, department: int, part: Part) -> None:
        """A step has ended in which a department had a part.

        Args:
            department: Index.
            part: What it had.
        """

    def victim(self, running: Iterable[Ask]) -> Ask:
        """Whom to put back when the KV cache is full."""

    def prompt_tokens(self, now_us: int, room: Room, tokens: int, *, urgent: bool) -> int:
        """How many of the step's tokens prompts that are not critical may have, at most.

        Args:
            now_us: Time.
            room: The engine.
            tokens: Tokens of the step that nobody has yet.
            urgent: Critical prompts are in the step.
        """
