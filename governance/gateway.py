"""The path of a request, top to bottom.

    identify -> model visible? -> rate and parallel limits -> inspect input -> decide -> route
      -> reserve -> record "decided" -> stream -> inspect output -> settle -> record "completed"
      -> release the end

``Gateway.exchange`` names every stage once, in this order. It knows no HTTP, no Ray and no
engine: each stage is a port (``governance.ports``), given at construction.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from governance.admission.limits import RateLimiter
from governance.closing import TurnCloser
from governance.dispatching import plan
from governance.drafts import DraftReader, Escalated, can_draft, with_logprobs
from governance.errors import (
    ClientClosed,
    ContextLengthExceeded,
    GatehouseError,
    InternalError,
    InvalidRequest,
)
from governance.fallback import Fallbacks
from governance.inspection.walker import walk
from governance.nulls import NullObserver
from governance.outlet import Outlet, finish_reason
from governance.ports import (
    AuditLog,
    Authenticator,
    Clock,
    Engine,
    Hold,
    Inspector,
    Ledger,
    Observer,
    OutputInspection,
    Policy,
    Router,
)
from governance.request import parse_request, token_prompts, with_text_prompts
from governance.selection import AUTO, Option, Selection, admitted, allowed, rate_limits
from governance.tracebacks import without_messages
from governance.types import (
    Dispatch,
    EngineChunk,
    EngineFinished,
    EngineStarted,
    InferenceRequest,
    ModelInfo,
    Operation,
    Outcome,
    Principal,
    Route,
    RouteAsk,
    Turn,
)

log = logging.getLogger("gatehouse.gateway")

_UNOBSERVED = NullObserver()

_OF_ITS_OWN = frozenset({400, 403, 404, 413, 415})
"""Statuses of refusals for what a request says; those for want of room are not its fault."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request as it arrived: nothing in it is trusted yet."""

    operation: Operation
    authorization: str | None
    read_body: Callable[[], Awaitable[bytes]]
    """Gives the body; raises RequestTooLarge or RequestTimeout."""
    request_id: str
    decision_id: str
    notes: Mapping[str, str] = field(default_factory=dict)
    """Goes into ``Turn.notes``: where the request stands in a trace, if anywhere."""
    opened: Callable[[Turn], None] | None = None
    """Given the turn at once: a refusal too is told with what is known by then."""


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


class Gateway:
    """Serves requests under governance; one per gateway process, shared by all requests."""

    def __init__(
        self,
        *,
        models: Sequence[ModelInfo],
        authenticator: Authenticator,
        policy: Policy,
        limiter: RateLimiter,
        inspector: Inspector,
        router: Router,
        ledger: Ledger,
        audit: AuditLog,
        engine: Engine,
        clock: Clock,
        max_answer_tokens: int,
        monotonic: Clock = lambda: time.monotonic_ns() // 1000,
        observer: Observer = _UNOBSERVED,
    ) -> None:
        self.selection = Selection(models, policy, choices=router.choices)
        self.authenticator = authenticator
        self.policy = policy
        self.limiter = limiter
        self.inspector = inspector
        self.router = router
        self.ledger = ledger
        self.audit = audit
        self.engine = engine
        self.clock = clock
        self.monotonic = monotonic
        self.max_answer_tokens = max_answer_tokens
        self._closer = TurnCloser(audit, observer, clock)

    async def exchange(self, call: Call) -> AsyncGenerator[GatewayEvent, None]:
        """Serve one request: ``Accepted``, chunks as they may be released, ``Answer``.

        Close the generator when the client goes: the engine's work is aborted and the turn is
        still settled and recorded.

        Raises:
            GatehouseError: A refusal, before ``Accepted``; or a failure, at any point.
        """
        turn = self._open(call)
        try:
            turn.principal = principal = await self.authenticator.authenticate(call.authorization)
            turn.lap("identify")
            # Before the body is received: each refusal leaves a record, with what was asked.
            self.limiter.check_refusals(principal.key)
            turn.request = request = await self._read(call)
            turn.lap("read")
            models = self.selection.visible(principal, request)
            options = admitted(self.selection.decide(principal, models, request), request)
            with self.limiter.acquire(principal.key, rate_limits(options)):
                request = turn.request = await self._decode_tokens(options, request)
                turn.input_inspection = await self.inspector.inspect_input(walk(request))
                turn.lap("inspect_input")
                options = self._decide(turn, principal, request, options)
                turn.lap("decide")
                turn.route = await self._route(turn, principal, request, options)
                turn.lap("route")
                async with aclosing(self._answer(turn, principal, request, options)) as events:
                    async for event in events:
                        yield event
        except GatehouseError as error:
            self._failed(turn, error)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            if turn.outcome is None:
                turn.outcome, turn.error_code = Outcome.ABORTED, ClientClosed.code
                turn.status = ClientClosed.status
            raise
        except Exception as error:
            failure = InternalError()
            self._failed(turn, failure, error)
            raise failure from error
        finally:
            if not turn.ended_us:
                await self._closer.close(turn)

    async def visible_models(self, authorization: str | None) -> list[ModelInfo]:
        """The models that the caller may use, in catalogue order."""
        principal = await self.authenticator.authenticate(authorization)
        return self.selection.listed(principal)

    # -- stages -------------------------------------------------------------------------------

    def _open(self, call: Call) -> Turn:
        turn = Turn(call.request_id, call.decision_id, self.clock(), call.operation)
        turn.monotonic = self.monotonic
        turn.lap_us = self.monotonic()
        turn.notes.update(call.notes)
        if call.opened is not None:
            call.opened(turn)
        return turn

    async def _read(self, call: Call) -> InferenceRequest:
        return parse_request(call.operation, await call.read_body())

    async def _decode_tokens(
        self, options: Sequence[Option], request: InferenceRequest
    ) -> InferenceRequest:
        """Turn token-id prompts into text, so that inspection sees what the model will.

        What cannot fit is refused first: a million ids are a hundred megabytes of text.
        """
        tokens = token_prompts(request)
        if not tokens:
            return request
        if request.model == AUTO:
            raise InvalidRequest("Token ids belong to one model: name it, or send text.", "prompt")
        model, limits = options[0].model, options[0].decision.limits
        longest = max(map(len, tokens))
        context = min(model.context_tokens, limits.context_tokens or model.context_tokens)
        if longest > context:
            raise ContextLengthExceeded(
                f"The prompt has {longest} tokens; prompt and answer together may have {context}."
            )
        return with_text_prompts(request, await self.engine.detokenize(model.base, tokens))

    def _decide(
        self,
        turn: Turn,
        principal: Principal,
        request: InferenceRequest,
        options: Sequence[Option],
    ) -> tuple[Option, ...]:
        """Decide again, with what inspection found; the turn carries the first, until routed."""
        models = [option.model for option in options]
        options = self.selection.decide(principal, models, request, turn.input_inspection)
        turn.decision = options[0].decision
        return allowed(options)

    async def _route(
        self,
        turn: Turn,
        principal: Principal,
        request: InferenceRequest,
        options: Sequence[Option],
    ) -> Route:
        return await self.router.route(
            RouteAsk(
                request_id=turn.request_id,
                request=request,
                permitted=tuple(option.bounded for option in options),
                auto=request.model == AUTO,
                department=principal.department,
                principal_key=principal.key,
                priority_class=options[0].decision.priority_class,
                account=self.ledger.usage(principal.department),
            )
        )

    async def _answer(
        self,
        turn: Turn,
        principal: Principal,
        request: InferenceRequest,
        options: Sequence[Option],
    ) -> AsyncGenerator[GatewayEvent, None]:
        """Reserve, record and stream; at the next model, while nothing was released yet."""
        fallbacks = Fallbacks(turn.route, options)
        released = False
        while True:
            try:
                reader = self._reader(turn, request)
                asked = with_logprobs(request) if reader else request
                hold, dispatch = await self._reserve(turn, principal, asked, fallbacks.option)
                turn.lap("reserve")
                await self.audit.decided(turn)
                turn.lap("record_decided")
                stream = self._stream(turn, request, hold, dispatch, reader)
                async with aclosing(stream) as events:
                    async for event in events:
                        released = True
                        yield event
                return
            except (GatehouseError, Escalated) as error:
                route = None if released else fallbacks.after(error)
                if route is None:
                    raise
                await self._closer.supersede(turn, error)
                turn.route = route

    @staticmethod
    def _reader(turn: Turn, request: InferenceRequest) -> DraftReader | None:
        """Reads an answer that is judged before it is released, where the route says so."""
        route = turn.route
        if route is None or route.draft is None or not route.fallbacks or not can_draft(request):
            return None
        return DraftReader(route.draft, request)

    async def _reserve(
        self, turn: Turn, principal: Principal, request: InferenceRequest, option: Option
    ) -> tuple[Hold, Dispatch]:
        """Fix the exact bytes that the engine will get, and reserve what they may cost."""
        turn.decision = option.decision
        planned = plan(
            turn.request_id,
            turn.decision_id,
            principal,
            request,
            option,
            self.max_answer_tokens,
        )
        turn.max_tokens, turn.body = planned.max_tokens, planned.body
        try:
            turn.hold = hold = await self.ledger.reserve(planned.ask)
        finally:
            turn.account = self.ledger.usage(principal.department)
        turn.reservation = hold.reservation
        return hold, planned.dispatch(hold.reservation)

    async def _stream(
        self,
        turn: Turn,
        request: InferenceRequest,
        hold: Hold,
        dispatch: Dispatch,
        reader: DraftReader | None,
    ) -> AsyncGenerator[GatewayEvent, None]:
        """Stream from the engine through output inspection; hold the end until it is recorded.

        The hold grows chunk by chunk ahead of the engine: when the account is used up, the stream
        is closed, which aborts the engine's work. ``Accepted`` comes with the first piece, so
        that until then another model can answer, or an error be told as one.
        """
        inspection = self.inspector.open_output(turn)
        outlet = Outlet(request.choices)
        finished: EngineFinished | None = None
        async with aclosing(self.engine.stream(dispatch)) as events:
            async for event in events:
                if isinstance(event, EngineChunk):
                    if hold.consumed(event.tokens, event.gpu_us):
                        await hold.extend()
                    outlet.take(inspection.feed(reader.read(event) if reader else event))
                    if reader and not reader.judged:
                        if not reader.due:
                            continue
                        self._judge(turn, reader, inspection, outlet)
                    for piece in outlet.ready():
                        if not turn.first_chunk_us:
                            turn.first_chunk_us = self.clock()
                            yield Accepted(request, turn)
                        turn.sent_bytes += len(piece.data)
                        self.audit.output(turn, piece.data)
                        yield piece
                elif isinstance(event, EngineStarted):
                    turn.accepted_us = self.clock()
                    turn.replica_id = event.replica_id
                    turn.replicas_asked = event.replicas_asked
                    turn.model_version = event.model_version
                    turn.engine_version = event.engine_version
                    if event.prompt_tokens:
                        await hold.started(event.prompt_tokens)
                    turn.lap("engine_start")
                else:
                    finished = event
        if finished is None:
            raise InternalError()
        turn.usage, turn.gpu_us = finished.usage, finished.gpu_us
        if reader and not reader.judged:
            self._judge(turn, reader, inspection, outlet)
        rest, turn.output_inspection = inspection.finish()
        outlet.take(rest)
        tail = outlet.rest()
        if not turn.first_chunk_us:
            turn.first_chunk_us = self.clock()
            yield Accepted(request, turn)
        turn.finish_reason = finish_reason(tail)
        turn.sent_bytes += len(tail)
        self.audit.output(turn, tail)
        turn.outcome, turn.status = Outcome.COMPLETED, 200
        await self._closer.close(turn)
        yield Answer(tail, finished)

    def _judge(
        self, turn: Turn, reader: DraftReader, inspection: OutputInspection, outlet: Outlet
    ) -> None:
        """Keep the answer that was held back, or record it and leave it to the next model."""
        try:
            verdict = reader.judge()
        except Escalated:
            rest, turn.output_inspection = inspection.finish()
            outlet.take(rest)
            self.audit.output(turn, outlet.rest())
            raise
        if turn.route is not None:
            turn.route = replace(turn.route, detail={**turn.route.detail, **verdict.detail})

    # -- the end ------------------------------------------------------------------------------

    def _failed(self, turn: Turn, error: GatehouseError, cause: Exception | None = None) -> None:
        turn.outcome = Outcome.FAILED if error.status >= 500 else Outcome.REFUSED
        turn.error_code, turn.status = error.code, error.status
        if turn.principal is not None and error.status in _OF_ITS_OWN:
            self.limiter.refused(turn.principal.key)
        if turn.outcome is Outcome.FAILED:
            log.error(
                "request %s failed: %s\n%s",
                turn.request_id,
                error.code,
                without_messages(cause or error),
            )

    async def drain(self) -> None:
        """Wait for all turns that are being settled and recorded."""
        await self._closer.drain()
