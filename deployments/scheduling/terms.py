"""What an engine core's queue must know of a request, on its way from the ticket. Pure.

The core knows no tenant: a replica numbers departments, and tells numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from routing.fairness import BATCH, CRITICAL, RANKS, STANDARD

UNKNOWN = 0
"""Number of whoever comes without terms: warm-up, a profiling run."""


def rank_of(priority: int) -> int:
    """Class by a ticket's priority: below 0 critical, above batch."""
    return CRITICAL if priority < 0 else BATCH if priority > 0 else STANDARD


@dataclass(frozen=True, slots=True)
class Terms:
    """Terms of one request."""

    department: int = UNKNOWN
    rank: int = STANDARD
    weight_milli: int = 1000
    served_us: int = 0

    def dump(self) -> list[int]:
        """As an extra argument has it."""
        return [self.department, self.rank, self.weight_milli, self.served_us]

    @classmethod
    def load(cls, value: Any) -> Terms:
        """From ``dump``; anything else is the terms of a stranger."""
        if not isinstance(value, list) or len(value) != 4:
            return cls()
        if not all(type(figure) is int for figure in value) or value[1] not in RANKS:
            return cls()
        return cls(*value)


class Departments:
    """Numbers of departments at one replica, 1, 2, ..."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        """Number of a department, a new one where it is new."""
        return self._numbers.setdefault(name, len(self._numbers) + 1)
