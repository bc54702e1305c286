"""Ends that found no place in the log: kept, and written as soon as there is one.

A request whose end was refused for want of room has failed for its client, and its record says so;
but it must not stay open in the trail for as long as the process lives. What is still here when
the process ends, or does not fit here, gets ``inference.aborted`` from the sealer like the requests
of any dead process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from governance.audit.content import Cell
from governance.audit.writer import AuditWriter
from governance.errors import AuditUnavailable

log = logging.getLogger("gatehouse.audit")

MOST_ENDS: Final = 4096
MOST_BYTES: Final = 16 << 20
"""Ciphertext, in bytes, that is kept with them."""
INCOMPLETE: Final = '{"output":"incomplete"}'
_FIRST_PAUSE_S: Final = 0.05
_LAST_PAUSE_S: Final = 1.0


class UnwrittenEnds:
    """Keeps ends and writes them. Used from one event loop.

    Args:
        writer: Where they go.
    """

    def __init__(self, writer: AuditWriter) -> None:
        self._writer = writer
        self._ends: deque[tuple[dict[str, Any], Sequence[Cell], int]] = deque()
        self._bytes = 0
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        """NOTE: never cancelled, or a record would be written and still be kept."""

    def __len__(self) -> int:
        return len(self._ends)

    def keep(self, event: dict[str, Any], cells: Sequence[Cell]) -> None:
        """Take an end that was not written; of a broken writer, nothing."""
        if self._writer.broken:
            return
        if len(self._ends) >= MOST_ENDS:
            log.error("audit: the end of request %s is left to the sealer", event["request_id"])
            return
        size_bytes = sum(len(cell.ciphertext) for cell in cells)
        if self._bytes + size_bytes > MOST_BYTES:
            cells, size_bytes = (), 0
            event["detail"] = INCOMPLETE
        self._ends.append((event, cells, size_bytes))
        self._bytes += size_bytes
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="audit-unwritten-ends")

    async def close(self) -> None:
        """Try once more."""
        self._closing.set()
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        try:
            while self._ends and not self._writer.broken:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), pause_s)
                await self._write()
                if self._closing.is_set():
                    break
                pause_s = min(2 * pause_s, _LAST_PAUSE_S)
        finally:
            self._task = None

    async def _write(self) -> None:
        """Write until one is refused."""
        while self._ends and not self._writer.broken:
            event, cells, size_bytes = self._ends[0]
            try:
                await self._one(event, cells)
            except AuditUnavailable:
                return
            self._ends.popleft()
            self._bytes -= size_bytes

    async def _one(self, event: dict[str, Any], cells: Sequence[Cell]) -> None:
        try:
            await self._writer.write(event, cells)
        except ValueError:
            log.critical("audit: the end of request %s is no record", event["request_id"])
