"""Moves the ledger's events from its database to the audit trail: at least once, in order.

An event leaves the database when it is durable in the trail. A crash in between writes it again,
under the same id: ids are computed from what the event says, so whoever reads the trail can tell a
repeat from a second event.

The ledger serves on while the trail cannot be written (gateways then admit nothing by themselves);
its events wait in the database. A writer that broke is replaced by one with a new id and a chain
of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from governance.audit.ulid import ulid_of
from governance.audit.writer import AuditWriter, WriterStats
from governance.errors import AuditUnavailable, GatehouseError
from governance.ports import Clock

log = logging.getLogger("gatehouse.ledger")

INTERVAL_S = 0.25
LAST_BACKOFF_S = 5.0
FLUSH_TIMEOUT_S = 2.0
"""How long an override waits for its record, in seconds."""
BATCH = 500
"""Events moved at a time."""
_ID_BYTES = 10

Events = list[tuple[int, dict[str, Any]]]


class LedgerAudit:
    """See the module.

    Args:
        wal_root: Folder of all writers' logs.
        read: Gives waiting events, oldest first, each with its number.
        confirm: Takes the number up to which events are in the trail.
        clock: Wall clock, microseconds.
    """

    def __init__(
        self,
        wal_root: Path,
        read: Callable[[int], Awaitable[Events]],
        confirm: Callable[[int], Awaitable[None]],
        *,
        clock: Clock,
    ) -> None:
        self.waiting = 0
        """Events that were waiting when last looked at; 500 stands for more."""
        self._wal_root = wal_root
        self._read = read
        self._confirm = confirm
        self._clock = clock
        self._writer: AuditWriter | None = None
        self._opening: asyncio.Task[None] | None = None
        self._moving = asyncio.Lock()

    @property
    def stats(self) -> WriterStats | None:
        """Counts of the present writer, if there is one."""
        return None if self._writer is None else self._writer.stats

    async def run(self) -> None:
        """Move events for ever."""
        pause_s = INTERVAL_S
        while True:
            try:
                await self.flush()
                pause_s = INTERVAL_S
            except GatehouseError as error:
                if pause_s == INTERVAL_S:
                    log.error("ledger: events wait for the audit trail (%s)", error.code)
                pause_s = min(pause_s * 2, LAST_BACKOFF_S)
            except Exception as error:
                log.error("ledger: events not moved (%s)", type(error).__name__)
                pause_s = LAST_BACKOFF_S
            await asyncio.sleep(pause_s)

    async def check(self) -> None:
        """Refuse what would have to be recorded while that is not possible.

        Raises:
            AuditUnavailable: There is no writer, or the disk is nearly full.
        """
        try:
            async with asyncio.timeout(FLUSH_TIMEOUT_S), self._moving:
                writer = await self._open()
        except TimeoutError:
            raise AuditUnavailable from None
        writer.check_room()

    async def flush(self) -> None:
        """Move everything that waits now.

        Raises:
            AuditUnavailable: Not everything could be written within ``FLUSH_TIMEOUT_S``.
            LedgerUnavailable: The database did not give or forget its events.
        """
        try:
            async with asyncio.timeout(FLUSH_TIMEOUT_S), self._moving:
                writer = await self._open()
                while True:
                    events = await self._read(BATCH)
                    self.waiting = len(events)
                    if events:
                        await self._move(writer, events)
                    if len(events) < BATCH:
                        break
                self.waiting = 0
        except TimeoutError:
            raise AuditUnavailable from None

    async def close(self) -> None:
        """End the writer's chain in order."""
        if self._writer is not None:
            await self._writer.close()
            self._writer = None

    async def _open(self) -> AuditWriter:
        """The writer; a new one where there is none that works."""
        if self._writer is not None and self._writer.broken:
            broken, self._writer = self._writer, None
            await broken.close()
        if self._writer is None:
            if self._opening is None:
                self._opening = asyncio.create_task(self._open_new())
            # Shielded: one that opens after its time must not be lost, with its lock held.
            await asyncio.shield(self._opening)
        if self._writer is None:
            raise AuditUnavailable
        return self._writer

    async def _open_new(self) -> None:
        name = f"ledger-{secrets.token_hex(8)}"
        try:
            self._writer = await asyncio.to_thread(
                AuditWriter.open, self._wal_root, name, clock=self._clock
            )
        except OSError as error:
            log.error("ledger: no audit writer (%s)", error.strerror)
            raise AuditUnavailable from None
        finally:
            self._opening = None

    async def _move(self, writer: AuditWriter, events: Events) -> None:
        """Write events together, and forget those that are durable, up to the first that is not."""
        outcomes = await asyncio.gather(
            *(writer.write(with_id(event)) for _, event in events), return_exceptions=True
        )
        done = 0
        failure: BaseException | None = None
        for (number, event), outcome in zip(events, outcomes, strict=True):
            if isinstance(outcome, ValueError):
                # It will never be written; behind it wait others.
                kind = event.get("event_type")
                log.critical("ledger: event %r does not fit the audit record", kind)
            elif isinstance(outcome, BaseException):
                failure = outcome
                break
            done = number
        if done:
            await self._confirm(done)
        if failure is not None:
            raise failure


def with_id(event: dict[str, Any]) -> dict[str, Any]:
    """An event with the id that it always has: its time, and a hash of what it says."""
    text = json.dumps(event, sort_keys=True, separators=(",", ":"))
    tail = hashlib.sha256(text.encode()).digest()[:_ID_BYTES]
    return {"event_id": ulid_of(event["ts_us"], tail), **event}
