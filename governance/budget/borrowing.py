"""How departments of one cohort lend to each other: arithmetic on one quantity.

As in Kueue (cohorts with nominal quota, ``borrowingLimit`` and ``lendingLimit``), for a quantity
that is used up and not given back:

    guaranteed = nominal - min(lend, nominal)         nobody else may use it
    pool       = shared + sum of min(lend, nominal)    what members may use of each other
    in use     = sum of max(0, used - guaranteed)      of the pool, by whoever it is
    room       = min(nominal + borrow - used,
                     max(0, guaranteed - used) + max(0, pool - in use))

``used`` is what is spent and what is out in leases; ``shared`` is what the cohort has beyond its
members' nominal budgets. What a member lends and another spends is gone until the window ends, so a
member decides by ``lend`` how much it can lose. What is only held comes back: while a member cannot
have what is its own, nobody in the cohort borrows anew, and a borrower's lease shrinks at its next
renewal to what its running requests have reserved.

Of several that borrow, each may take a part of what is left of the pool that halves with each
nominal budget that it borrowed of late (``2^-(borrowed / nominal)``, as Slurm's fair-share factor);
what was borrowed counts half after the cohort's half-life.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Member:
    """One department in one quantity."""

    nominal: int
    lend: int
    borrow: int
    used: int
    standing: int = 0
    """Borrowed of late."""

    @property
    def guaranteed(self) -> int:
        """What nobody else may use."""
        return self.nominal - min(self.lend, self.nominal)

    @property
    def pooled(self) -> int:
        """What it uses of the pool."""
        return max(0, self.used - self.guaranteed)

    @property
    def borrowed(self) -> int:
        """What it uses beyond its own."""
        return max(0, self.used - self.nominal)

    @property
    def share(self) -> float:
        """Weight among those that borrow."""
        return float(2 ** -min(self.standing / max(self.nominal, 1), 64.0))


@dataclass(frozen=True, slots=True)
class Room:
    """How much more a member may use; ``own`` and ``borrowed`` add up to it."""

    own: int
    """Within its nominal budget."""
    borrowed: int


class Pool:
    """One cohort in one quantity: its members, and sums over them.

    Args:
        members: By name.
        shared: What the cohort has beyond its members' nominal budgets.
    """

    def __init__(self, members: Mapping[str, Member], shared: int) -> None:
        self._members: dict[str, Member] = {}
        self._size = shared
        self._in_use = 0
        self._borrowing: dict[str, float] = {}
        """Weights of those that borrow."""
        for name, member in members.items():
            self.put(name, member)

    def put(self, name: str, member: Member) -> None:
        """Take in what a member is now."""
        old = self._members.get(name)
        if old is not None:
            self._size -= min(old.lend, old.nominal)
            self._in_use -= old.pooled
        self._members[name] = member
        self._size += min(member.lend, member.nominal)
        self._in_use += member.pooled
        if member.borrowed:
            self._borrowing[name] = member.share
        else:
            self._borrowing.pop(name, None)

    @property
    def left(self) -> int:
        """What is left of the pool."""
        return max(0, self._size - self._in_use)

    def borrowers(self, beside: str) -> bool:
        """Whether somebody else uses more than its own."""
        return bool(self._borrowing.keys() - {beside})

    def free(self, name: str, member: Member) -> int:
        """What a member may use, if it were as given: of its own, and of the pool."""
        known = self._members.get(name)
        in_use = self._in_use - (known.pooled if known is not None else 0) + member.pooled
        return max(0, member.guaranteed - member.used) + max(0, self._size - in_use)

    def room(self, name: str, member: Member, *, lending: bool = True) -> Room:
        """How much more a member may use, if it were as given.

        Args:
            name: Who asks; its nominal budget and what it lends are as the pool knows them.
            member: What it is now.
            lending: Whether anybody may borrow anew.
        """
        free = self.free(name, member)
        own = min(max(0, member.nominal - member.used), free)
        if not lending or not member.borrow:
            return Room(own, 0)
        total = max(0, min(member.nominal + member.borrow - member.used, free))
        borrowed = max(0, total - own)
        rivals = sum(share for other, share in self._borrowing.items() if other != name)
        if borrowed and rivals:
            left = free - max(0, member.guaranteed - member.used)
            borrowed = min(borrowed, int(left * member.share / (member.share + rivals)))
        return Room(own, borrowed)


def decayed(amount: int, elapsed_us: int, half_life_us: int) -> int:
    """What an amount counts after a time, rounded down."""
    if amount <= 0:
        return 0
    return int(amount * 2 ** -min(max(elapsed_us, 0) / half_life_us, 64.0))
