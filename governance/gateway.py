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
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from governance.admission.limits import RateLimiter
from governance.closing import TurnCloser
from governance.errors import (
    BlockedByPolicy,
    ClientClosed,
    ContextLengthExceeded,
    GatehouseError,
    InternalError,
    InvalidRequest,
    LimitExceeded,
    ModelNotFound,
)
from governance.inspection.walker import walk
from governance.nulls import NullObserver
from governance.ports import (
    AuditLog,
    Authenticator,
    Clock,
    Engine,
    Hold,
    Inspector,
    Ledger,
    Observer,
    Policy,
    Router,
)
from governance.request import (
    forward_body,
    opening,
    parse_request,
    token_prompts,
    with_text_prompts,
)
from governance.tracebacks import without_messages
from governance.types import (
    BudgetAsk,
    Decision,
    Dispatch,
    Effect,
    EngineChunk,
    EngineFinished,
    EngineStarted,
    InferenceRequest,
    ModelInfo,
    Operation,
    Outcome,
    Principal,
    Route,
    Turn,
)
from routing.conversation import affinity_key

log = logging.getLogger("gatehouse.gateway")

PRIORITY = {"critical": -10, "standard": 0, "batch": 10}
"""vLLM priority of each class: lower is served earlier."""

_UNOBSERVED = NullObserver()

_OF_ITS_OWN = frozenset({400, 403, 404, 413, 415})
"""Statuses of refusals for what a request says; those for want of room are not its fault."""

_FINISH = b'"finish_reason":"'
"""Marks the chunk that ends a choice. Inside generated text the quotes are escaped, so text
cannot imitate it."""
_REASON = re.compile(rb'"finish_reason":"([a-z_]+)"')


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
        self.models: Mapping[str, ModelInfo] = {model.id: model for model in models}
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
            model = self._visible(principal, request)
            admission = self._admission(principal, model, request)
            with self.limiter.acquire(principal.key, admission.limits):
                request = turn.request = await self._decode_tokens(model, admission, request)
                turn.input_inspection = await self.inspector.inspect_input(walk(request))
                turn.lap("inspect_input")
                turn.decision = decision = self._decide(turn, principal, model, request)
                turn.lap("decide")
                turn.route = route = await self.router.route(request, (model,))
                turn.lap("route")
                hold, dispatch = await self._reserve(turn, principal, request, decision, route)
                turn.lap("reserve")
                await self.audit.decided(turn)
                turn.lap("record_decided")
                async with aclosing(self._stream(turn, request, hold, dispatch)) as events:
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
        return [m for m in self.models.values() if self.policy.visible(principal, m)]

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

    def _visible(self, principal: Principal, request: InferenceRequest) -> ModelInfo:
        """Model that the caller names; unknown and invisible ones are told apart by nothing."""
        model = self.models.get(request.model)
        if model is None or not self.policy.visible(principal, model):
            raise ModelNotFound("", "model")
        if request.operation not in model.operations:
            raise InvalidRequest(
                f"The model does not answer {request.operation.value} requests.", "model"
            )
        return model

    def _admission(
        self, principal: Principal, model: ModelInfo, request: InferenceRequest
    ) -> Decision:
        """What the policy says before the content is known; carries the limits."""
        decision = self.policy.decide(principal, model, request.operation.value)
        self._enforce(decision)
        most = decision.limits.max_tokens
        asked = (request.max_tokens or 1) * request.choices
        if most is not None and asked > most:
            raise LimitExceeded(
                f"The request asks for {asked} answer tokens; at most {most} are allowed to you "
                "in one request, over all choices.",
                "max_tokens",
                None,
                decision.rule_ids,
            )
        return decision

    async def _decode_tokens(
        self, model: ModelInfo, admission: Decision, request: InferenceRequest
    ) -> InferenceRequest:
        """Turn token-id prompts into text, so that inspection sees what the model will.

        What cannot fit is refused first: a million ids are a hundred megabytes of text.
        """
        tokens = token_prompts(request)
        if not tokens:
            return request
        longest = max(map(len, tokens))
        context = min(model.context_tokens, admission.limits.context_tokens or model.context_tokens)
        if longest > context:
            raise ContextLengthExceeded(
                f"The prompt has {longest} tokens; prompt and answer together may have {context}."
            )
        return with_text_prompts(request, await self.engine.detokenize(model.base, tokens))

    def _decide(
        self, turn: Turn, principal: Principal, model: ModelInfo, request: InferenceRequest
    ) -> Decision:
        decision = self.policy.decide(
            principal, model, request.operation.value, turn.input_inspection
        )
        turn.decision = decision
        self._enforce(decision)
        return decision

    @staticmethod
    def _enforce(decision: Decision) -> None:
        if decision.effect is not Effect.ALLOW:
            raise BlockedByPolicy(decision.message or "", None, None, decision.rule_ids)

    async def _reserve(
        self,
        turn: Turn,
        principal: Principal,
        request: InferenceRequest,
        decision: Decision,
        route: Route,
    ) -> tuple[Hold, Dispatch]:
        """Fix the exact bytes that the engine will get, and reserve what they may cost."""
        turn.max_tokens = max_tokens = self._answer_tokens(request, decision, route.model)
        priority = PRIORITY[decision.priority_class]
        turn.body = forward_body(
            request,
            model=route.model.id,
            max_tokens=max_tokens,
            cache_salt=principal.department,
            priority=priority,
        )
        ask = BudgetAsk(
            request_id=turn.request_id,
            department=principal.department,
            model=route.model.id,
            base_model=route.model.base,
            operation=request.operation,
            prompt_bytes=len(turn.body),
            choices=request.choices,
            max_tokens=0 if request.operation is Operation.EMBEDDINGS else max_tokens,
        )
        try:
            turn.hold = hold = await self.ledger.reserve(ask)
        finally:
            turn.account = self.ledger.usage(principal.department)
        turn.reservation = hold.reservation
        return hold, Dispatch(
            request_id=turn.request_id,
            decision_id=turn.decision_id,
            model=route.model.id,
            base_model=route.model.base,
            operation=request.operation,
            body=turn.body,
            principal_key=principal.key,
            department=principal.department,
            priority=priority,
            max_tokens=max_tokens * request.choices,
            reservation_id=hold.reservation.id,
            affinity=affinity_key(principal.department, opening(request)),
            context_tokens=decision.limits.context_tokens,
        )

    def _answer_tokens(
        self, request: InferenceRequest, decision: Decision, model: ModelInfo
    ) -> int:
        """Answer tokens per choice: what was asked, or the platform's bound, within the policy.

        Never more than the model can hold, so that nothing is reserved that cannot be spent.
        """
        wanted = min(request.max_tokens or self.max_answer_tokens, model.context_tokens)
        most = decision.limits.max_tokens
        return wanted if most is None else max(1, min(wanted, most // request.choices))

    async def _stream(
        self, turn: Turn, request: InferenceRequest, hold: Hold, dispatch: Dispatch
    ) -> AsyncGenerator[GatewayEvent, None]:
        """Stream from the engine through output inspection; hold the end until it is recorded.

        The hold grows chunk by chunk ahead of the engine: when the account is used up, the stream
        is closed, which aborts the engine's work.
        """
        inspection = self.inspector.open_output(turn)
        held: list[bytes] = []
        unfinished = request.choices
        finished: EngineFinished | None = None
        async with aclosing(self.engine.stream(dispatch)) as events:
            async for event in events:
                if isinstance(event, EngineChunk):
                    if hold.consumed(event.tokens, event.gpu_us):
                        await hold.extend()
                    released = inspection.feed(event)
                    if released is None:
                        continue
                    if not turn.first_chunk_us:
                        turn.first_chunk_us = self.clock()
                    unfinished -= released.data.count(_FINISH)
                    if unfinished <= 0:
                        held.append(released.data)
                        continue
                    turn.sent_bytes += len(released.data)
                    self.audit.output(turn, released.data)
                    yield released
                elif isinstance(event, EngineStarted):
                    turn.accepted_us = self.clock()
                    turn.replica_id = event.replica_id
                    turn.model_version = event.model_version
                    turn.engine_version = event.engine_version
                    if event.prompt_tokens:
                        await hold.started(event.prompt_tokens)
                    turn.lap("engine_start")
                    yield Accepted(request, turn)
                else:
                    finished = event
        if finished is None:
            raise InternalError()
        rest, turn.output_inspection = inspection.finish()
        if rest is not None:
            held.append(rest.data)
        tail = b"".join(held)
        turn.usage, turn.gpu_us = finished.usage, finished.gpu_us
        turn.finish_reason = _finish_reason(tail)
        turn.sent_bytes += len(tail)
        self.audit.output(turn, tail)
        turn.outcome, turn.status = Outcome.COMPLETED, 200
        await self._closer.close(turn)
        yield Answer(tail, finished)

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


def _finish_reason(tail: bytes) -> str | None:
    """Reason of the choice that ended last; ``None`` where nothing was generated."""
    reasons = _REASON.findall(tail)
    return reasons[-1].decode() if reasons else None
