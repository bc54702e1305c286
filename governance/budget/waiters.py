"""Requests of a gateway that wait for the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from governance.types import Amount


class Level(IntEnum):
    """How cautious an estimate is."""

    P99 = 0
    """99 of 100 requests cost less."""
    P50 = 1
    """Every other request costs less."""
    EDGE = 2
    """Median prices, and a prompt much shorter than the median: what is left, if it may do."""


@dataclass(slots=True, eq=False)
class Waiter:
    """One reservation, or one extension, that did not fit."""

    attempt: Callable[[Level], bool]
    """Reserve now, if it fits."""
    need: Callable[[], Amount]
    """What to ask the ledger for."""
    least: Amount
    """The least that could do."""
    done: asyncio.Future[None]
    until_s: float
    """When to give up waiting for what others give back."""
    first: bool
    """It is a new request, not a running answer's next chunk."""
    asked: int = 0
    """Renewal that asked for it; 0 while none did."""
    answered: bool = False
    """The ledger has answered that renewal, and it still does not fit."""
