"""Values of routing: what is known of a replica and of a model, and what a scorer says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """State that a replica pushed last, plus what the chooser sent there since."""

    replica_id: str
    running: int = 0
    """Requests in the engine's running batch."""
    waiting: int = 0
    """Requests queued in the engine."""
    in_flight: int = 0
    """Requests this gateway has open there."""
    kv_usage_milli: int = 0
    """Share of the KV cache in use, in thousandths."""
    prefixes: frozenset[str] = frozenset()
    """Affinity keys that this replica served lately."""
    draining: bool = False


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """How busy the live replicas of one base model are, together."""

    replicas: int = 0
    """Replicas that can take requests; 0 where the model cannot be reached now."""
    running: int = 0
    waiting: int = 0
    """Requests queued in the engines."""
    slots: int = 0
    """Requests that this gateway may have open there, over all replicas."""
    in_flight: int = 0
    """Requests that this gateway has open there."""


@dataclass(frozen=True, slots=True)
class Score:
    """What the complexity scorer says of one prompt; see ``routing.complexity.Scores``."""

    gain: float
    """Expected gain of the strong model, -1 to 1."""
    weak: float
    """Chance that the weak model answers correctly, 0 to 1."""
    strong: float
    trust: float
    """How far the prompt's own estimate counts, 0 to 1."""
    cluster: int
    """Nearest centre of the training data."""
    similarity: float
    """Cosine to that centre."""
    scorer: str
    """First 12 hexadecimal digits of the artefact's digest."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of an answer that was held back."""

    escalate: bool
    """Another model shall answer instead."""
    reason: str
    detail: Mapping[str, int | str | bool | None] = field(default_factory=dict)
    """The evidence, for the record; fractions in thousandths."""


class ScorerUnavailable(Exception):
    """No score can be had now; ``reason`` is ``late``, ``unreachable`` or ``failed``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Scorer(Protocol):
    """Scores one prompt; concurrent calls are batched behind it."""

    async def score(self, prompt: str) -> Score:
        """Score a prompt.

        Raises:
            ScorerUnavailable: Not in time, not reachable, or it failed.
        """
        ...
