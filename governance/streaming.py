"""The answer of one attempt: from the engine, through inspection, to whoever asked.

What is released is recorded first, and the end leaves only when the whole turn is on record. When
the account is used up in the middle, the answer ends in order (``governance.stopping``).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from governance.admission.shedding import Place
from governance.closing import TurnCloser
from governance.drafts import DraftReader, Escalated
from governance.errors import BudgetExhausted, InternalError
from governance.outlet import Outlet, finish_reason
from governance.ports import AuditLog, Clock, Engine, Hold, OutputInspection
from governance.stopping import Ending, stop_of
from governance.types import (
    Dispatch,
    EngineChunk,
    EngineFinished,
    EngineStarted,
    InferenceRequest,
    Outcome,
    Stop,
    Turn,
)


@dataclass(frozen=True, slots=True)
class Accepted:
    """An engine has taken the request; the answer follows."""

    request: InferenceRequest
    turn: Turn


@dataclass(frozen=True, slots=True)
class Answer:
    """The rest of a turn that ended well, released after its record is durable."""

    tail: bytes
    """Events (or body) held back until now."""
    finished: EngineFinished


GatewayEvent = Accepted | EngineChunk | Answer


class AnswerStream:
    """Streams answers; one per gateway.

    Args:
        engine: Generates.
        open_output: Begins to inspect an answer before it is released.
        audit: Takes what is released.
        closer: Ends turns.
        clock: Wall clock, microseconds.
    """

    def __init__(
        self,
        engine: Engine,
        open_output: Callable[[Turn], OutputInspection],
        audit: AuditLog,
        closer: TurnCloser,
        clock: Clock,
    ) -> None:
        self._engine = engine
        self._open_output = open_output
        self._audit = audit
        self._closer = closer
        self._clock = clock

    async def run(
        self,
        turn: Turn,
        request: InferenceRequest,
        hold: Hold,
        dispatch: Dispatch,
        reader: DraftReader | None,
        place: Place,
    ) -> AsyncGenerator[GatewayEvent, None]:
        """Stream from the engine through output inspection; hold the end until it is recorded.

        The hold grows chunk by chunk ahead of the engine: when the account is used up, the stream
        is closed, which aborts the engine's work, and the answer ends as one that reached its
        length. ``Accepted`` comes with the first piece, so that until then another model can
        answer, or an error be told as one.
        """
        inspection = self._open_output(turn)
        outlet, ending = Outlet(request.choices), Ending(request)
        stop: Stop | None = None
        finished: EngineFinished | None = None
        async with aclosing(self._engine.stream(dispatch)) as events:
            async for event in events:
                if isinstance(event, EngineChunk):
                    place.started()
                    ending.saw(event)
                    if hold.consumed(event.tokens, event.gpu_us):
                        stop = await self._extend(turn, hold, ending)
                    outlet.take(inspection.feed(reader.read(event) if reader else event))
                    if reader and not reader.judged:
                        if not reader.due and stop is None:
                            continue
                        self._judge(turn, reader, inspection, outlet)
                    for piece in outlet.ready():
                        if not turn.first_chunk_us:
                            turn.first_chunk_us = self._clock()
                            yield Accepted(request, turn)
                        turn.sent_bytes += len(piece.data)
                        self._audit.output(turn, piece.data)
                        yield piece
                    if stop is not None:
                        turn.stopped, finished = stop, ending.finished()
                        break
                elif isinstance(event, EngineStarted):
                    turn.accepted_us = self._clock()
                    turn.replica_id = event.replica_id
                    turn.replicas_asked = event.replicas_asked
                    turn.model_version = event.model_version
                    turn.engine_version = event.engine_version
                    ending.began(event)
                    if event.prompt_tokens:
                        await hold.started(event.prompt_tokens)
                    turn.lap("engine_start")
                else:
                    finished = event
        if finished is None:
            raise InternalError()
        place.completed()
        turn.usage, turn.gpu_us = finished.usage, finished.gpu_us
        if reader and not reader.judged:
            self._judge(turn, reader, inspection, outlet)
        rest, turn.output_inspection = inspection.finish()
        outlet.take(rest)
        if stop is not None:
            outlet.take(ending.events(stop, turn.request_id))
            turn.error_code = stop.code
        tail = outlet.rest()
        if not turn.first_chunk_us:
            turn.first_chunk_us = self._clock()
            yield Accepted(request, turn)
        turn.finish_reason = finish_reason(tail)
        turn.sent_bytes += len(tail)
        self._audit.output(turn, tail)
        turn.outcome, turn.status = Outcome.COMPLETED, 200
        await self._closer.close(turn)
        yield Answer(tail, finished)

    @staticmethod
    async def _extend(turn: Turn, hold: Hold, ending: Ending) -> Stop | None:
        """Reserve the next chunk; says why the answer must end here, if it must.

        Raises:
            BudgetExhausted: Nothing was generated that could be ended.
        """
        try:
            await hold.extend()
        except BudgetExhausted as error:
            if ending.complete:
                return None
            if not ending.possible:
                raise
            return stop_of(error, turn.charge)
        return None

    def _judge(
        self, turn: Turn, reader: DraftReader, inspection: OutputInspection, outlet: Outlet
    ) -> None:
        """Keep the answer that was held back, or record it and leave it to the next model."""
        try:
            verdict = reader.judge()
        except Escalated:
            rest, turn.output_inspection = inspection.finish()
            outlet.take(rest)
            self._audit.output(turn, outlet.rest())
            raise
        if turn.route is not None:
            turn.route = replace(turn.route, detail={**turn.route.detail, **verdict.detail})
