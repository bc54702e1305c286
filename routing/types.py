"""What the replica choice knows of an engine replica."""

from __future__ import annotations

from dataclasses import dataclass


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
