"""The audit trail of the request path: ``AuditLog`` over a writer and a keystore.

For each turn two records and their content, encrypted: ``inference.decided`` with the input before
any engine sees it, ``inference.completed`` with the answer before its end is released; or one
``inference.refused``, with the input where a caller is known. How an answer becomes cells:
``governance.audit.answers``; after a crash, what was released more than a second before is
readable, but for the rest of a piece of many megabytes.

What refusals may write is bounded for each caller (``governance.audit.refusals``). Of a request
that was refused for its rate, or for a model that is not there, no content is kept.

**An end that claims no more than there is.** Where a part of an answer was lost, or the end itself
found no room, the client is refused its end, and the record says ``failed``, 503; it is written
when there is room again (``governance.audit.unwritten``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import orjson

from governance.audit.answers import Answer, Answers
from governance.audit.content import Cell, joined_commit
from governance.audit.keystore import DataKey, KeyScope, Keystore, KeystoreError
from governance.audit.randomness import random_bytes as pooled
from governance.audit.refusals import Caller, Refusals
from governance.audit.turn_record import (
    canonical_detail,
    decided_event,
    ended_event,
    refused_input,
)
from governance.audit.ulid import new_ulid
from governance.audit.unwritten import INCOMPLETE, UnwrittenEnds
from governance.audit.writer import AuditWriter
from governance.errors import AuditUnavailable, ModelNotFound, RateLimited, TooManyParallel
from governance.ports import Clock
from governance.types import Operation, Outcome, Principal, Turn

log = logging.getLogger("gatehouse.audit")

TICK_S: Final = 0.1
_THREAD_BYTES: Final = 64 << 10
"""Content from which sealing an input (20 ms a megabyte) leaves the event loop."""
_TOLD_AGAIN_S: Final = 60.0
_WITHOUT_CONTENT: Final = frozenset((ModelNotFound.code, RateLimited.code, TooManyParallel.code))
"""Refusals that anybody can have as many of as they like, and that no content explains."""
_JSON: Final = "application/json"
_EVENTS: Final = "text/event-stream"


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
        random_bytes: Callable[[int], bytes] = pooled,
    ) -> None:
        self._writer = writer
        self._keystore = keystore
        self._clock = clock
        self._per_subject = per_subject
        self._random_bytes = random_bytes
        self._answers: dict[str, Answer] = {}
        self._cells = Answers(writer, clock, random_bytes)
        self._refusals = Refusals(clock)
        self._unwritten = UnwrittenEnds(writer)
        self._timer: asyncio.TimerHandle | None = None
        self._key_thread = ThreadPoolExecutor(1, thread_name_prefix="audit-keys")
        self._told: tuple[str, float] = ("", 0.0)
        """What was last wrong with a key, and when that was said."""

    @property
    def suppressed(self) -> int:
        """Refusals that no record has counted yet."""
        return self._refusals.suppressed

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
        self._answers[event_id] = Answer(event_id, key, media)
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
        self._cells.take(answer, data)
        if self._cells.waiting:
            self._start_timer()

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
        cells = await self._cells.rest(answer)
        event = ended_event(turn, self._new_id())
        event["dek_id"] = answer.key.id
        if answer.commits:
            event["response_commit"] = joined_commit(answer.commits)
        lost = answer.lost
        if lost:
            _fail(turn, event, answer)
        try:
            # What gets lost from now on is seen by the writer's thread.
            await self._writer.write(event, cells, None if lost else answer.is_lost)
        except AuditUnavailable:
            _fail(turn, event, answer)
            self._unwritten.keep(event, cells)
            raise
        if lost:
            raise AuditUnavailable()

    async def shadow(self, event: Mapping[str, Any]) -> None:
        """Record a comparison of two models' answers; implements ``governance.shadow.ShadowLog``.

        Raises:
            AuditUnavailable: No room, or the log cannot be written.
        """
        self._writer.check_room()
        await self._writer.write(event)

    async def close(self) -> None:
        """Record what was suppressed, and stop the timer. Turns must have ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await self._unwritten.close()
        for caller, event in self._refusals.due(all_of_them=True):
            if self._writer.broken:
                break
            await self._writer.write(event)
            caller.suppressed = 0
        self._key_thread.shutdown(wait=False)

    # -- refusals -----------------------------------------------------------------------------

    async def _refused(self, turn: Turn) -> None:
        caller = self._refusals.caller(turn.principal)
        if not caller.records.take(1, self._clock()):
            caller.suppressed += 1
            self._start_timer()
            return
        event = ended_event(turn, self._new_id())
        detail: dict[str, Any] = {}
        cells: tuple[Cell, ...] = ()
        if turn.principal is None:
            event["auth_method"] = "none"
        elif turn.error_code not in _WITHOUT_CONTENT:
            content = self._refused_content(turn, caller)
            if content is not None:
                cells = (await self._input(event, await self._key(turn.principal), content),)
            elif turn.request is not None:
                detail["content"] = "left_out"
        counted, caller.suppressed = caller.suppressed, 0
        if counted:
            detail["suppressed"] = counted
        if detail:
            known = orjson.loads(event.get("detail") or b"{}")
            event["detail"] = canonical_detail({**known, **detail})
        try:
            await self._writer.write(event, cells)
        except AuditUnavailable:
            caller.suppressed += counted
            raise

    def _refused_content(self, turn: Turn, caller: Caller) -> bytes | None:
        """The request, as far as it may be kept."""
        size_bytes = turn.request.body_bytes if turn.request is not None else 0
        now_us = self._clock()
        if not self._has_room() or not caller.content.has(max(1, size_bytes), now_us):
            return None
        content = refused_input(turn)
        if content is None or not caller.keeps(len(content), now_us):
            return None
        return content

    def _has_room(self) -> bool:
        """Content of refusals may not use up what ends of requests under way need."""
        try:
            self._writer.check_room()
        except AuditUnavailable:
            return False
        return True

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
            self._tell(error)
            raise AuditUnavailable() from error

    def _tell(self, error: KeystoreError | OSError) -> None:
        """Log what is wrong with a key, and what to do; the same once a minute.

        Messages of errors are withheld elsewhere. These name files of ours and hold no key.
        """
        text, now_s = str(error), time.monotonic()
        if text != self._told[0] or now_s - self._told[1] > _TOLD_AGAIN_S:
            self._told = (text, now_s)
            log.error("audit: no content key: %s", text)

    async def _input(self, event: dict[str, Any], key: DataKey, content: bytes) -> Cell:
        """Seal the input and note it in the event."""
        event_id = event["event_id"]
        if len(content) < _THREAD_BYTES:
            cell = self._cells.seal(key, event_id, "input", 0, _JSON, content)
        else:
            cell = await asyncio.to_thread(
                self._cells.seal, key, event_id, "input", 0, _JSON, content
            )
        event["prompt_commit"] = cell.commit.hex()
        event["prompt_bytes"] = len(content)
        event["dek_id"] = key.id
        return cell

    def _new_id(self) -> str:
        return new_ulid(self._clock(), self._random_bytes)

    # -- the timer ----------------------------------------------------------------------------

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        """Seal what has waited long enough; one timer for all turns, and none while idle."""
        self._timer = None
        self._cells.flush()
        if not self._writer.broken:
            for caller, event in self._refusals.due():
                try:
                    self._writer.post(event)
                except AuditUnavailable:
                    break
                caller.suppressed = 0
        if self._cells.waiting or (self.suppressed and not self._writer.broken):
            self._start_timer()


def _fail(turn: Turn, event: dict[str, Any], answer: Answer) -> None:
    """Make turn and record say that the client did not get the end."""
    if answer.lost:
        event["detail"] = INCOMPLETE
    if turn.outcome is Outcome.COMPLETED:
        turn.outcome, turn.status = Outcome.FAILED, AuditUnavailable.status
        turn.error_code = AuditUnavailable.code
        event["outcome"], event["status"] = turn.outcome.value, turn.status
        event["error_code"] = turn.error_code
