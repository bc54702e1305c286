"""The end of a turn: settle, record, tell; once, and also when the client has gone.

A client that hangs up cancels the task that serves it, and an ``await`` in its ``finally`` would
not finish. So the end runs as a task of its own, kept by reference and awaited behind a shield.
"""

from __future__ import annotations

import asyncio
import logging

from governance.errors import GatehouseError, InternalError
from governance.ports import AuditLog, Clock, Observer
from governance.tracebacks import without_messages
from governance.types import Turn

log = logging.getLogger("gatehouse.gateway")


class TurnCloser:
    """Ends turns.

    Args:
        audit: Where the outcome is recorded.
        observer: Told of every turn that ended.
        clock: Wall clock, microseconds.
    """

    def __init__(self, audit: AuditLog, observer: Observer, clock: Clock) -> None:
        self.audit = audit
        self._observer = observer
        self._clock = clock
        self._closing: set[asyncio.Task[None]] = set()

    async def close(self, turn: Turn) -> None:
        """Settle and record, shielded from cancellation.

        Raises:
            GatehouseError: It was not settled or not recorded; the answer must not be released.
        """
        task = asyncio.create_task(self._close(turn))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        await asyncio.shield(task)

    async def drain(self) -> None:
        """Wait for all turns that are being settled and recorded."""
        while self._closing:
            await asyncio.gather(*self._closing, return_exceptions=True)

    async def _close(self, turn: Turn) -> None:
        """A settlement that fails costs no record."""
        turn.ended_us = self._clock()
        try:
            try:
                turn.lap("stream" if turn.accepted_us else "unfinished")
                self._settle(turn)
                turn.lap("settle")
            finally:
                await self.audit.completed(turn)
                turn.lap("record_completed")
        except Exception as error:
            known = error if isinstance(error, GatehouseError) else InternalError()
            # Said here, because a client that has gone leaves nobody to raise it to.
            log.error(
                "request %s not settled or not recorded: %s\n%s",
                turn.request_id,
                known.code,
                without_messages(error),
            )
            raise known from None
        finally:
            self._observer.ended(turn)

    def _settle(self, turn: Turn) -> None:
        if turn.hold is not None:
            turn.hold.settle(turn.usage, turn.gpu_us)
            turn.reservation = turn.hold.reservation
            turn.charged = turn.hold.charged
