"""Memory of single-use ids that is bounded in time and size, and fails closed."""

from __future__ import annotations

from enum import Enum


class Seen(Enum):
    """What the cache knows of an id."""

    NEW = "new"
    """Never used; it is now."""
    BEFORE = "before"
    FORGOTTEN = "forgotten"
    """So old that its record may have been dropped: nobody can tell, so it counts as used."""
    NO_ROOM = "no_room"


class ReplayCache:
    """Remembers each id until it expires.

    Ids lie in buckets of one second of expiry, so that dropping the expired ones costs nothing
    per id. What was dropped is never accepted again even if the wall clock is set back.

    Args:
        capacity: Ids held at most; beyond it new ones are refused.

    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._seen: set[bytes] = set()
        self._buckets: dict[int, list[bytes]] = {}
        self._dropped_until = -1
        """Last second of expiry of which ids were dropped."""
        self._purged_at = -1

    def __len__(self) -> int:
        return len(self._seen)

    def use(self, identifier: bytes, expires_us: int, now_us: int) -> Seen:
        """Use an id up, if it is new.

        Args:
            identifier: The id.
            expires_us: Wall clock after which the caller refuses it anyway.
            now_us: Wall clock now.

        """
        second = now_us // 1_000_000
        if second != self._purged_at:
            self._purge(second)
        if identifier in self._seen:
            return Seen.BEFORE
        bucket = expires_us // 1_000_000
        if bucket <= self._dropped_until:
            return Seen.FORGOTTEN
        if len(self._seen) >= self._capacity:
            return Seen.NO_ROOM
        self._seen.add(identifier)
        self._buckets.setdefault(bucket, []).append(identifier)
        return Seen.NEW

    def _purge(self, second: int) -> None:
        """Drop all buckets whose second of expiry has passed."""
        self._purged_at = second
        for bucket in [b for b in self._buckets if b < second]:
            self._seen.difference_update(self._buckets.pop(bucket))
            self._dropped_until = max(self._dropped_until, bucket)
