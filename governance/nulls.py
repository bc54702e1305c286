"""Stages that are not configured: real, documented, and open about doing nothing.

Each says at start what it leaves undone (``announce``), so that nobody takes a platform without a
ledger for one with a generous budget.
"""

from __future__ import annotations

from collections.abc import Iterable

from governance.budget.messages import AccountState
from governance.types import (
    Amount,
    BudgetAsk,
    Charge,
    EngineChunk,
    Inspection,
    Principal,
    Reservation,
    Route,
    RouteAsk,
    TextLeaf,
    Turn,
    Usage,
)


class NullInspector:
    """Releases everything unseen; reports ``inspector="none"`` and zero inspected bytes."""

    name = "none"
    announce = "inspection: off - prompts and answers are not inspected"

    async def inspect_input(self, leaves: Iterable[TextLeaf]) -> Inspection:
        """Look at nothing; ``leaves`` is lazy and stays unread."""
        return Inspection(inspector=self.name)

    def open_output(self, turn: Turn) -> NullOutputInspection:
        """Give an output stage that passes chunks through."""
        return NullOutputInspection()


class NullOutputInspection:
    """Passes each chunk through unchanged."""

    def feed(self, chunk: EngineChunk) -> EngineChunk | None:
        """Release the chunk at once."""
        return chunk

    def finish(self) -> tuple[EngineChunk | None, Inspection]:
        """Nothing is held back."""
        return None, Inspection(inspector=NullInspector.name)


class FixedRouter:
    """Sends a request to the model it names; there is no ``auto``."""

    choices: frozenset[str] = frozenset()
    announce = "routing: by name - 'auto' is not offered, callers name their model"

    async def route(self, ask: RouteAsk) -> Route:
        """Pick the only permitted model: the one the caller named."""
        return Route(model=ask.permitted[0], reason="named", fallbacks=ask.stand_ins)


class NullLedger:
    """Reserves nothing and settles nothing: departments have no budgets."""

    announce = "budgets: off - GPU time is not limited per department"

    async def reserve(self, ask: BudgetAsk) -> NullHold:
        """Give a hold without an account; its id ties the engine's work to the turn."""
        return NullHold(Reservation(id=ask.request_id))

    def charge(self, principal: Principal) -> Charge:
        """Name the department; nothing is charged to it."""
        return Charge(principal.department, principal.department)

    def usage(self, account: str) -> AccountState | None:
        """There are no accounts."""
        return None

    def fits(self, ask: BudgetAsk) -> int | None:
        """Nothing is limited."""
        return None


class NullHold:
    """Holds nothing."""

    charged = Amount()

    def __init__(self, reservation: Reservation) -> None:
        self.reservation = reservation

    async def started(self, prompt_tokens: int) -> None:
        """Nothing was estimated."""

    def consumed(self, tokens: int, gpu_us: int) -> bool:
        """Nothing is counted; nothing needs to be reserved."""
        return False

    async def extend(self) -> None:
        """Nothing is reserved."""

    def settle(self, usage: Usage | None, gpu_us: int | None) -> None:
        """Nothing was held."""


class NullAudit:
    """Keeps no record: requests leave no durable trace."""

    announce = "audit: off - requests are served without a durable record"

    async def decided(self, turn: Turn) -> None:
        """Record nothing."""

    def output(self, turn: Turn, data: bytes) -> None:
        """Keep nothing."""

    async def completed(self, turn: Turn) -> None:
        """Record nothing."""


class NullObserver:
    """Takes no notice."""

    def ended(self, turn: Turn) -> None:
        """Forget it."""
