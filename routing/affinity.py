"""Which replica takes the next request: pure functions of what is known.

Algorithm, in order:

1. Draining replicas are not considered.
2. With an affinity key, a replica that served the key lately holds its prefix in the KV cache and
   is preferred, as long as taking one more leaves it within the load bound (or within
   ``AFFINITY_SLACK`` requests: a cached prefix is worth a short queue).
3. With a key that no replica within the bound holds, replicas are ranked by rendezvous hash, so
   that every gateway ranks them alike without talking to the others, and the first within the
   bound is taken. When a replica comes or goes, only the keys that it won move.
4. Without a key: the less loaded of two replicas drawn at random. Two choices bring the longest
   queue from O(log n / log log n) to O(log log n), and, unlike "the least loaded of all", do not
   make every gateway run to the same replica between two reports of its load.

Sources: M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE TPDS 12(10),
2001. D. Thaler and C. Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", IEEE/ACM ToN
6(1), 1998 (rendezvous hashing). V. Mirrokni, M. Thorup and M. Zadimoghaddam, "Consistent Hashing
with Bounded Loads", SODA 2018.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from routing.types import ReplicaState

LOAD_FACTOR_MILLI = 1250
"""A keyed request may bring a replica to 1.25 times the mean load, and no further."""

AFFINITY_SLACK = 4
"""Load up to which a replica that holds the prefix is preferred whatever the mean is: on a nearly
idle model the mean is below one, and the bound alone would throw the cache away."""


def load(replica: ReplicaState) -> int:
    """Requests at the replica: the greater of what it reported and what we have open there."""
    return max(replica.running + replica.waiting, replica.in_flight)


def load_bound(replicas: Sequence[ReplicaState]) -> int:
    """Most requests a replica may have after taking one more keyed one.

    ``ceil(1.25 * (total + 1) / n)``; at least one replica is always below it.
    """
    total = sum(load(replica) for replica in replicas) + 1
    return -(-LOAD_FACTOR_MILLI * total // (1000 * len(replicas)))


def choose(
    replicas: Sequence[ReplicaState], key: str | None, rng: random.Random
) -> ReplicaState | None:
    """Pick the replica for one request.

    Args:
        replicas: Replicas of one model, as last known; ids are unique.
        key: Conversation or shared prefix of the request, or ``None``.
        rng: Source of the two draws and of ties.

    Returns:
        One of ``replicas``, or ``None`` when all of them are draining or there are none.

    """
    eligible = [replica for replica in replicas if not replica.draining]
    if len(eligible) < 2:
        return eligible[0] if eligible else None
    if key is None:
        return _lighter(*rng.sample(eligible, 2))
    bound = load_bound(eligible)
    holders = [
        replica
        for replica in eligible
        if key in replica.prefixes and load(replica) < max(bound, AFFINITY_SLACK)
    ]
    if holders:
        return min(holders, key=_weight)
    ranked = sorted(eligible, key=lambda replica: _score(key, replica.replica_id), reverse=True)
    return next(replica for replica in ranked if load(replica) < bound)


def _lighter(first: ReplicaState, second: ReplicaState) -> ReplicaState:
    """The less loaded one; on a tie the first, which was drawn at random."""
    return second if _weight(second) < _weight(first) else first


def _weight(replica: ReplicaState) -> tuple[int, int]:
    return load(replica), replica.kv_usage_milli


def _score(key: str, replica_id: str) -> bytes:
    """Rendezvous score; the key has a fixed alphabet without NUL, so pairs cannot collide."""
    return blake2b(f"{key}\0{replica_id}".encode(), digest_size=8).digest()


@dataclass(frozen=True, slots=True)
class DepartmentShare:
    """Bound on what one department holds of a replica's slots while others wait.

    It takes effect only under contention, when the replica reports requests that wait and another
    department is there as well; an idle replica is anybody's. It never stops a running request:
    the department is sent elsewhere, or told to come back, until it is below its share again.
    Deliberately simple: it counts slots and not GPU time, and only what this gateway sees.
    """

    share_milli: int = 500
    """Share of the slots, in thousandths, 1 to 1000; 1000 turns the bound off."""

    def admits(self, replica: ReplicaState, slots: int, held: int, held_by_others: int) -> bool:
        """Whether a department may take one more slot of a replica.

        Args:
            replica: The replica as last reported.
            slots: Requests that the replica takes at once.
            held: Slots that the department holds there.
            held_by_others: Slots that other departments hold there.

        """
        if replica.waiting == 0 or held_by_others == 0:
            return True
        return held < max(1, slots * self.share_milli // 1000)
