"""The end of a turn: settle, record, tell; once, and also when the client has gone.

A client that hangs up cancels the task that serves it, and an ``await`` in its ``finally`` would
not finish. So the end runs as a task of its own, kept by reference and awaited behind a shield.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from governance.drafts import Escalated
from governance.errors import ClientClosed, GatehouseError, InternalError
from governance.ports import AuditLog, Clock, Observer
from governance.tracebacks import without_messages
from governance.types import Outcome, Turn

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
        await asyncio.shield(self._start(self._close(turn)))

    async def supersede(self, turn: Turn, error: GatehouseError | Escalated) -> None:
        """End an attempt whose answer is not released, and make the turn ready for the next.

        Raises:
            GatehouseError: It was not settled or not recorded; there may be no next attempt.
        """
        if isinstance(error, Escalated):
            turn.superseded = "cascade"
            turn.outcome, turn.status = Outcome.COMPLETED, 200
        else:
            turn.superseded = "fallback"
            turn.outcome = Outcome.FAILED
            turn.error_code, turn.status = error.code, error.status
        if turn.decided_event_id is not None:
            task = self._start(self._end(turn))
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                # Nobody is left to try the next model: this was the turn's end.
                task.add_done_callback(lambda _: self._abandoned(turn))
                raise
            except GatehouseError:
                self._observer.ended(turn)
                raise
        turn.begin_again(self._clock())

    def _abandoned(self, turn: Turn) -> None:
        """The client hung up between two attempts; the last one is on record as superseded."""
        turn.outcome, turn.error_code = Outcome.ABORTED, ClientClosed.code
        turn.status = ClientClosed.status
        self._observer.ended(turn)

    def _start(self, end: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(end)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return task

    async def drain(self) -> None:
        """Wait for all turns that are being settled and recorded."""
        while self._closing:
            await asyncio.gather(*self._closing, return_exceptions=True)

    async def _close(self, turn: Turn) -> None:
        try:
            await self._end(turn)
        finally:
            self._observer.ended(turn)

    async def _end(self, turn: Turn) -> None:
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

    def _settle(self, turn: Turn) -> None:
        if turn.hold is not None:
            # Of an answer that was ended here the engine has not said all: see ``Turn.stopped``.
            whole = turn.stopped is None
            turn.hold.settle(turn.usage if whole else None, turn.gpu_us if whole else None)
            turn.reservation = turn.hold.reservation
            turn.charged = turn.hold.charged
