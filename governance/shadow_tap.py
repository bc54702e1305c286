"""Listens at the audit trail: what was answered, for shadow traffic, without the gateway's help.

The trail hears of every piece that is released and of every end, so the answer of a turn that may
be offered is gathered here on its way there, as it is: the runner reads it later, in a thread.
Whatever goes wrong here, the trail gets what it would have got, and raises what it would have
raised.
"""

from __future__ import annotations

from governance.ports import AuditLog
from governance.shadow import ShadowRunner
from governance.types import Turn

_MAX_BYTES = 2 << 20
"""Events around the text included; a longer answer is not offered."""


class ShadowTap:
    """Implements ``governance.ports.AuditLog`` over another one.

    Args:
        audit: The trail.
        runner: Is offered every turn that ended well; it looks at what it wants.
    """

    def __init__(self, audit: AuditLog, runner: ShadowRunner) -> None:
        self._audit = audit
        self._runner = runner
        self._gathered: dict[str, bytearray] = {}

    async def decided(self, turn: Turn) -> None:
        """Record the decision; begin to gather where the answer may be wanted."""
        await self._audit.decided(turn)
        name = turn.decided_event_id
        if name and self._runner.may_take(turn):
            self._gathered[name] = bytearray()

    def output(self, turn: Turn, data: bytes) -> None:
        """Record a piece, and keep it."""
        self._audit.output(turn, data)
        name = turn.decided_event_id or ""
        gathered = self._gathered.get(name)
        if gathered is None:
            return
        gathered += data
        if len(gathered) > _MAX_BYTES:
            del self._gathered[name]

    async def completed(self, turn: Turn) -> None:
        """Record the end, then offer the turn."""
        gathered = self._gathered.pop(turn.decided_event_id or "", None)
        await self._audit.completed(turn)
        if gathered is not None:
            self._runner.offer(turn, gathered)
