"""Answers on their way into cells: gathered, sealed part by part, and posted in order.

Pieces gather for ``FLUSH_S`` or ``PART_BYTES``, whichever is first, and become one cell. What comes
in one large piece (an embeddings body is one of many megabytes) is cut into parts of
``LARGE_PART_BYTES`` and sealed in a thread, one part at a time, each durable before the next: the
event loop goes on, and no more than one part of an answer waits in the writer's queue. Pieces that
come meanwhile wait behind it, so parts keep the order of the answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from governance.audit.content import Cell, CellKind, seal_cell
from governance.audit.keystore import DataKey
from governance.audit.randomness import random_bytes as pooled
from governance.audit.writer import AuditWriter
from governance.errors import AuditUnavailable
from governance.ports import Clock

log = logging.getLogger("gatehouse.audit")

PART_BYTES: Final = 64 << 10
"""Content at which what has gathered becomes a cell."""
LARGE_PART_BYTES: Final = 1 << 20
"""Most content of one output cell."""
INLINE_BYTES: Final = 96 << 10
"""Content up to which sealing (1 ms) may hold the event loop."""
FLUSH_S: Final = 0.7
"""Age at which gathered pieces become a cell; with a tick and a sync, within a second."""


@dataclass(slots=True)
class Answer:
    """Answer of one turn."""

    event_id: str
    key: DataKey
    media: str
    commits: list[bytes] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    size_bytes: int = 0
    since_s: float = 0.0
    """When the first of the pieces came, by the event loop's clock."""
    lost: bool = False
    sealing: asyncio.Task[None] | None = None
    """Seals in a thread until no piece is left."""

    def lose(self) -> None:
        """A cell could not be written; called from the writer's thread too."""
        self.lost = True

    def is_lost(self) -> bool:
        """Whether a cell could not be written."""
        return self.lost


class Answers:
    """Seals and posts answers. Used from one event loop.

    Args:
        writer: Where cells go.
        clock: Wall clock, microseconds.
        random_bytes: Source of salts and nonces.
    """

    def __init__(
        self,
        writer: AuditWriter,
        clock: Clock,
        random_bytes: Callable[[int], bytes] = pooled,
    ) -> None:
        self._writer = writer
        self._clock = clock
        self._random_bytes = random_bytes
        self._due: dict[str, Answer] = {}
        """Answers with pieces in memory; the longest waiting first."""

    @property
    def waiting(self) -> bool:
        """Whether any answer has pieces that ``flush`` will take."""
        return bool(self._due)

    def take(self, answer: Answer, data: bytes) -> None:
        """Take a piece in.

        Raises:
            AuditUnavailable: It cannot be kept.
        """
        answer.pieces.append(data)
        answer.size_bytes += len(data)
        if answer.sealing is not None:
            return
        if answer.size_bytes >= INLINE_BYTES:
            self._due.pop(answer.event_id, None)
            answer.sealing = asyncio.create_task(self._seal_all(answer), name="audit-sealing")
        elif answer.size_bytes >= PART_BYTES:
            self._post(answer)
            if answer.lost:
                raise AuditUnavailable()
        elif len(answer.pieces) == 1:
            answer.since_s = asyncio.get_running_loop().time()
            self._due[answer.event_id] = answer

    async def rest(self, answer: Answer) -> tuple[Cell, ...]:
        """What has gathered, sealed, once all that came before is durable or lost."""
        if answer.sealing is not None:
            await answer.sealing
        return (self._part(answer),) if answer.pieces else ()

    def flush(self) -> None:
        """Post what has waited long enough."""
        latest = asyncio.get_running_loop().time() - FLUSH_S
        while self._due:
            answer = next(iter(self._due.values()))
            if answer.since_s > latest:
                break
            self._post(answer)

    def seal(
        self, key: DataKey, event_id: str, kind: CellKind, part: int, media: str, content: bytes
    ) -> Cell:
        """Encrypt one piece of content, in the calling thread."""
        return seal_cell(
            key,
            event_id=event_id,
            kind=kind,
            part=part,
            media=media,
            content=content,
            ts_us=self._clock(),
            random_bytes=self._random_bytes,
        )

    def _post(self, answer: Answer) -> None:
        try:
            self._writer.post(None, (self._part(answer),), answer.lose)
        except AuditUnavailable:
            answer.lose()

    def _part(self, answer: Answer) -> Cell:
        """Seal what has gathered as the answer's next part."""
        content = b"".join(answer.pieces)
        answer.pieces.clear()
        answer.size_bytes = 0
        self._due.pop(answer.event_id, None)
        part = len(answer.commits)
        cell = self.seal(answer.key, answer.event_id, "output", part, answer.media, content)
        answer.commits.append(cell.commit)
        return cell

    async def _seal_all(self, answer: Answer) -> None:
        try:
            while answer.pieces and not answer.lost:
                pieces, answer.pieces, answer.size_bytes = answer.pieces, [], 0
                content = await asyncio.to_thread(b"".join, pieces)
                for start in range(0, len(content), LARGE_PART_BYTES):
                    cell = await asyncio.to_thread(
                        self.seal,
                        answer.key,
                        answer.event_id,
                        "output",
                        len(answer.commits),
                        answer.media,
                        content[start : start + LARGE_PART_BYTES],
                    )
                    answer.commits.append(cell.commit)
                    await self._writer.write(None, (cell,))
        except AuditUnavailable:
            answer.lose()
        except Exception as error:
            answer.lose()
            log.error("audit: a part of an answer was not sealed: %s", type(error).__name__)
        finally:
            answer.sealing = None
