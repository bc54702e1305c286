"""Which of several ledgers a reservation belongs to: its id says so.

Each ledger knows a gateway under a name of its own: the gateway's, and for ledger ``k`` > 0 the
gateway's followed by ``.k``. A reservation's id holds that name (``checks.owns``), so that an
engine, which knows only the id on its ticket, tells the right ledger, and needs neither the budgets
file nor a number that could be out of date:

    rsv_gw-12ab_7        ledger 0
    rsv_gw-12ab.3_7      ledger 3

Where there is one ledger, ids are as they were before there could be several.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from governance.budget.config import BudgetsConfig
from governance.budget.tree import Tree

MOST_SHARDS = 64
_ID = re.compile(r"rsv_(?P<book>.+?(?:\.(?P<shard>[1-9][0-9]?))?)_[0-9]+")


def book_id(gateway_id: str, shard: int) -> str:
    """Name under which a ledger knows a gateway."""
    return gateway_id if shard == 0 else f"{gateway_id}.{shard}"


def shard_of(reservation_id: str) -> int:
    """Ledger that a reservation belongs to; 0 where the id does not say."""
    match = _ID.fullmatch(reservation_id)
    if match is None or match["shard"] is None:
        return 0
    shard = int(match["shard"])
    return shard if shard < MOST_SHARDS else 0


def book_of(reservation_id: str) -> str | None:
    """Name under which its ledger knows its gateway; ``None`` where the id has none."""
    match = _ID.fullmatch(reservation_id)
    return None if match is None else match["book"]


def moved(before: BudgetsConfig, after: BudgetsConfig) -> list[str]:
    """Departments that would live in another ledger, where nobody knows what they have spent.

    A department that neither file names lives in the ledger of its name under both.
    """
    old, new = Tree(before), Tree(after)
    names: Iterable[str] = sorted({*before.accounts, *after.accounts})
    return [name for name in names if old.shard(name) != new.shard(name)]
