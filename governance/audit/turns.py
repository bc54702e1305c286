"""The audit trail of the request path: ``AuditLog`` over a writer and a keystore.

For each turn two records and their content, encrypted: ``inference.decided`` with the input before
any engine sees it, ``inference.completed`` with the answer before its end is released; or one
``inference.refused``, with the input where a caller is known. Pieces of an answer gather in memory
for ``FLUSH_S`` or ``PART_BYTES``, whichever is first, and become one cell: after a crash, what
was released more than a second before is readable.

A request without a principal leaves no content, and at most ``ANONYMOUS_PER_S`` records a second
and gateway: others are counted, and the next record carries the count in ``detail``. So a flood of
bad credentials is on record and cannot fill the disk.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from governance.audit.content import Cell, CellKind, joined_commit, seal_cell
from governance.audit.keystore import DataKey, KeyScope, Keystore, KeystoreError
from governance.audit.schema import EventType
from governance.audit.turn_record import decided_event, ended_event, refused_input
from governance.audit.ulid import new_ulid
from governance.audit.writer import AuditWriter
from governance.errors import AuditUnavailable
from governance.ports import Clock
from governance.types import Operation, Principal, Turn

PART_BYTES: Final = 64 << 10
"""Content of one output cell, roughly: a piece is not split."""
FLUSH_S: Final = 0.7
"""Age at which gathered pieces become a cell; with a tick and a sync, within a second."""
TICK_S: Final = 0.1
ANONYMOUS_PER_S: Final = 50
_THREAD_BYTES: Final = 256 << 10
"""Content from which sealing (5 ms a megabyte) leaves the event loop."""
_JSON: Final = "application/json"
_EVENTS: Final = "text/event-stream"


@dataclass(slots=True)
class _Answer:
    """Answer of one turn on its way into cells."""

    event_id: str
    key: DataKey
    media: str
    commits: list[bytes] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    size_bytes: int = 0
    since_s: float = 0.0
    """When the first of the pieces came, by the event loop's clock."""
    lost: bool = False

    def lose(self) -> None:
        """A cell could not be written; called from the writer's thread."""
        self.lost = True


class TurnAudit:
    """Implements ``governance.ports.AuditLog``. Used from one event loop.

    Args:
        writer: Where records go; whoever opened it closes it, after ``close`` here.
        keystore: Where data keys come from.
        clock: Wall clock, microseconds.
        per_subject: Whether each subject has data keys of its own, so that one person's content
            can be made unreadable; else one for each department.
        random_bytes: Source of ids, salts and nonces.
    """

    def __init__(
        self,
        writer: AuditWriter,
        keystore: Keystore,
        clock: Clock,
        *,
        per_subject: bool = True,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._writer = writer
        self._keystore = keystore
        self._clock = clock
        self._per_subject = per_subject
        self._random_bytes = random_bytes
        self._answers: dict[str, _Answer] = {}
        self._due: dict[str, _Answer] = {}
        """Answers with pieces in memory; the longest waiting first."""
        self._timer: asyncio.TimerHandle | None = None
        self._key_thread = ThreadPoolExecutor(1, thread_name_prefix="audit-keys")
        self._anonymous = ANONYMOUS_PER_S * 1_000_000
        """Allowance in millionths of a record."""
        self._allowed_us = clock()
        self.suppressed = 0
        """Refusals without a principal that no record has counted yet."""

    # -- the port -----------------------------------------------------------------------------

    async def decided(self, turn: Turn) -> None:
        """Record the decision, with the encrypted input; durable when this returns.

        Raises:
            AuditUnavailable: No room, no key, or the log cannot be written.
        """
        self._writer.check_room()
        principal, body = turn.principal, turn.body
        if principal is None or body is None:
            raise ValueError("a turn is decided once its caller and its body are known")
        key = await self._key(principal)
        event_id = new_ulid(self._clock(), self._random_bytes)
        event = decided_event(turn, event_id)
        cell = await self._input(event, key, body)
        media = _JSON if turn.operation is Operation.EMBEDDINGS else _EVENTS
        self._answers[event_id] = _Answer(event_id, key, media)
        # Before it is durable: a caller that hangs up cancels this wait, not the record, and its
        # end must name it.
        turn.decided_event_id = event_id
        try:
            await self._writer.write(event, (cell,))
        except AuditUnavailable:
            turn.decided_event_id = None
            del self._answers[event_id]
            raise

    def output(self, turn: Turn, data: bytes) -> None:
        """Take a piece of the answer in, before it is released.

        Raises:
            AuditUnavailable: It cannot be kept, so it must not be released.
        """
        answer = self._answers.get(turn.decided_event_id or "")
        if answer is None:
            raise ValueError("no output before the decision is recorded, or after the end is")
        if answer.lost or self._writer.broken:
            raise AuditUnavailable()
        if not data:
            return
        if not answer.pieces:
            answer.since_s = asyncio.get_running_loop().time()
            self._due[answer.event_id] = answer
            if self._timer is None:
                self._start_timer()
        answer.pieces.append(data)
        answer.size_bytes += len(data)
        if answer.size_bytes >= PART_BYTES:
            try:
                self._writer.post(None, (self._part(answer),), answer.lose)
            except AuditUnavailable:
                answer.lose()
                raise

    async def completed(self, turn: Turn) -> None:
        """Record the end, with the rest of the answer; durable when this returns.

        Raises:
            AuditUnavailable: It cannot be written, or part of the answer was not.
        """
        if turn.decided_event_id is None:
            await self._refused(turn)
            return
        answer = self._answers.pop(turn.decided_event_id, None)
        if answer is None:
            raise ValueError("a turn ends once")
        cells = (self._part(answer),) if answer.pieces else ()
        event = ended_event(turn, self._new_id())
        event["dek_id"] = answer.key.id
        if answer.commits:
            event["response_commit"] = joined_commit(answer.commits)
        if answer.lost:
            event["detail"] = '{"output":"incomplete"}'
        await self._writer.write(event, cells)
        if answer.lost:
            raise AuditUnavailable()

    async def close(self) -> None:
        """Record what was suppressed, and stop the timer. Turns must have ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.suppressed and not self._writer.broken:
            await self._writer.write(self._suppression())
        self._key_thread.shutdown(wait=False)

    # -- refusals -----------------------------------------------------------------------------

    async def _refused(self, turn: Turn) -> None:
        event = ended_event(turn, self._new_id())
        if turn.principal is None:
            if not self._allow_anonymous():
                self.suppressed += 1
                self._start_timer()
                return
            event["auth_method"] = "none"
            event["detail"] = self._take_suppressed()
            await self._writer.write(event)
            return
        cells: tuple[Cell, ...] = ()
        content = refused_input(turn)
        if content is not None and self._has_room():
            cells = (await self._input(event, await self._key(turn.principal), content),)
        await self._writer.write(event, cells)

    def _has_room(self) -> bool:
        """Content of refusals may not use up what ends of requests under way need."""
        try:
            self._writer.check_room()
        except AuditUnavailable:
            return False
        return True

    def _allow_anonymous(self) -> bool:
        """Token bucket of a second's allowance."""
        now = self._clock()
        gained = max(0, now - self._allowed_us) * ANONYMOUS_PER_S
        self._allowed_us = now
        self._anonymous = min(ANONYMOUS_PER_S * 1_000_000, self._anonymous + gained)
        if self._anonymous < 1_000_000:
            return False
        self._anonymous -= 1_000_000
        return True

    def _take_suppressed(self) -> str | None:
        count, self.suppressed = self.suppressed, 0
        return f'{{"suppressed":{count}}}' if count else None

    def _suppression(self) -> dict[str, Any]:
        """A record that only carries a count."""
        return {
            "event_type": EventType.REFUSED.value,
            "ts_us": self._clock(),
            "auth_method": "none",
            "outcome": "refused",
            "status": 401,
            "reason_code": "suppressed",
            "detail": self._take_suppressed(),
        }

    # -- content ------------------------------------------------------------------------------

    async def _key(self, principal: Principal) -> DataKey:
        scope = KeyScope.of(
            principal.department, principal.key, self._clock(), per_subject=self._per_subject
        )
        key = self._keystore.cached(scope)
        if key is not None:
            return key
        try:
            # One thread: making a key syncs files, and two at once for one scope help nobody.
            return await asyncio.get_running_loop().run_in_executor(
                self._key_thread, self._keystore.data_key, scope
            )
        except (KeystoreError, OSError) as error:
            raise AuditUnavailable() from error

    async def _input(self, event: dict[str, Any], key: DataKey, content: bytes) -> Cell:
        """Seal the input and note it in the event."""
        event_id = event["event_id"]
        if len(content) < _THREAD_BYTES:
            cell = self._seal(key, event_id, "input", 0, _JSON, content)
        else:
            cell = await asyncio.to_thread(self._seal, key, event_id, "input", 0, _JSON, content)
        event["prompt_commit"] = cell.commit.hex()
        event["prompt_bytes"] = len(content)
        event["dek_id"] = key.id
        return cell

    def _part(self, answer: _Answer) -> Cell:
        """Seal what has gathered as the answer's next part."""
        content = b"".join(answer.pieces)
        answer.pieces.clear()
        answer.size_bytes = 0
        self._due.pop(answer.event_id, None)
        part = len(answer.commits)
        cell = self._seal(answer.key, answer.event_id, "output", part, answer.media, content)
        answer.commits.append(cell.commit)
        return cell

    def _seal(
        self, key: DataKey, event_id: str, kind: CellKind, part: int, media: str, content: bytes
    ) -> Cell:
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

    def _new_id(self) -> str:
        return new_ulid(self._clock(), self._random_bytes)

    # -- the timer ----------------------------------------------------------------------------

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        """Seal what has waited long enough; one timer for all turns, and none while idle."""
        self._timer = None
        latest = asyncio.get_running_loop().time() - FLUSH_S
        while self._due:
            answer = next(iter(self._due.values()))
            if answer.since_s > latest:
                break
            cell = self._part(answer)
            try:
                self._writer.post(None, (cell,), answer.lose)
            except AuditUnavailable:
                answer.lose()
        if self.suppressed and not self._writer.broken and self._allow_anonymous():
            count = self.suppressed
            try:
                self._writer.post(self._suppression())
            except AuditUnavailable:
                self.suppressed = count
        if self._due or (self.suppressed and not self._writer.broken):
            self._start_timer()
