"""Listens at the audit trail: what was answered, for shadow traffic, without the gateway's help.

The trail hears of every piece that is released and of every end, so the answer of a turn that may
be offered is gathered here on its way there. Whatever goes wrong here, the trail gets what it would
have got, and raises what it would have raised.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from governance.ports import AuditLog
from governance.shadow import ShadowRunner
from governance.shadow_exchange import answer_text
from governance.tracebacks import without_messages
from governance.types import Turn

log = logging.getLogger("gatehouse.shadow")

_MAX_BYTES = 2 << 20
"""Events around the text included; a longer answer is not offered."""


@dataclass(slots=True)
class _Gathered:
    pieces: list[bytes] = field(default_factory=list)
    size_bytes: int = 0


class ShadowTap:
    """Implements ``governance.ports.AuditLog`` over another one.

    Args:
        audit: The trail.
        runner: Is offered every turn that ended well; it looks at what it wants.
    """

    def __init__(self, audit: AuditLog, runner: ShadowRunner) -> None:
        self._audit = audit
        self._runner = runner
        self._gathered: dict[str, _Gathered] = {}

    async def decided(self, turn: Turn) -> None:
        """Record the decision; begin to gather where the answer may be wanted."""
        await self._audit.decided(turn)
        route, name = turn.route, turn.decided_event_id
        small = route is not None and route.auto and route.model.tier == "small"
        if small and name and self._runner.wants(turn.request_id):
            self._gathered[name] = _Gathered()

    def output(self, turn: Turn, data: bytes) -> None:
        """Record a piece, and keep it."""
        self._audit.output(turn, data)
        name = turn.decided_event_id or ""
        gathered = self._gathered.get(name)
        if gathered is None:
            return
        gathered.pieces.append(data)
        gathered.size_bytes += len(data)
        if gathered.size_bytes > _MAX_BYTES:
            del self._gathered[name]

    async def completed(self, turn: Turn) -> None:
        """Record the end, then offer the turn."""
        gathered = self._gathered.pop(turn.decided_event_id or "", None)
        await self._audit.completed(turn)
        if gathered is None:
            return
        try:
            text = answer_text(turn.operation, b"".join(gathered.pieces))
        except Exception as error:
            log.error("request %s not offered\n%s", turn.request_id, without_messages(error))
            return
        self._runner.offer(turn, text)
