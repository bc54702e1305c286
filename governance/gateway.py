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
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from governance.admission.limits import RateLimiter
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
from governance.ports import (
    AuditLog,
    Authenticator,
    Clock,
    Engine,
    Inspector,
    Ledger,
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

_FINISH = b'"finish_reason":"'
"""Marks the chunk that ends a choice. Inside generated text the quotes are escaped, so text
cannot imitate it."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request as it arrived: nothing in it is trusted yet."""

    operation: Operation
    authorization: str | None
    read_body: Callable[[], Awaitable[bytes]]
    """Gives the body; raises RequestTooLarge or RequestTimeout."""
    request_id: str
    decision_id: str


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
        self.max_answer_tokens = max_answer_tokens
        self._closing: set[asyncio.Task[None]] = set()

    async def exchange(self, call: Call) -> AsyncGenerator[GatewayEvent, None]:
        """Serve one request: ``Accepted``, chunks as they may be released, ``Answer``.

        Close the generator when the client goes: the engine's work is aborted and the turn is
        still settled and recorded.

        Raises:
            GatehouseError: A refusal, before ``Accepted``; or a failure, at any point.
        """
        turn = Turn(call.request_id, call.decision_id, self.clock(), call.operation)
        try:
            turn.principal = principal = await self.authenticator.authenticate(call.authorization)
            turn.request = request = await self._read(call)
            model = self._visible(principal, request)
            admission = self._admission(principal, model, request)
            with self.limiter.acquire(principal.key, admission.limits):
                request = turn.request = await self._decode_tokens(model, admission, request)
                turn.input_inspection = await self.inspector.inspect_input(walk(request))
                turn.decision = decision = self._decide(turn, principal, model, request)
                turn.route = route = await self.router.route(request, (model,))
                dispatch = await self._prepare(turn, principal, request, decision, route)
                await self.audit.decided(turn)
                async with aclosing(self._stream(turn, request, dispatch)) as events:
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
                await self._shielded(self._close(turn))

    async def visible_models(self, authorization: str | None) -> list[ModelInfo]:
        """The models that the caller may use, in catalogue order."""
        principal = await self.authenticator.authenticate(authorization)
        return [m for m in self.models.values() if self.policy.visible(principal, m)]

    # -- stages -------------------------------------------------------------------------------

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

    async def _prepare(
        self,
        turn: Turn,
        principal: Principal,
        request: InferenceRequest,
        decision: Decision,
        route: Route,
    ) -> Dispatch:
        """Reserve, and fix the exact bytes that the engine will get."""
        turn.reservation = await self.ledger.reserve(turn)
        max_tokens = self._answer_tokens(request, decision)
        priority = PRIORITY[decision.priority_class]
        body = forward_body(
            request,
            model=route.model.id,
            max_tokens=max_tokens,
            cache_salt=principal.department,
            priority=priority,
        )
        return Dispatch(
            request_id=turn.request_id,
            decision_id=turn.decision_id,
            model=route.model.id,
            base_model=route.model.base,
            operation=request.operation,
            body=body,
            principal_key=principal.key,
            department=principal.department,
            priority=priority,
            max_tokens=max_tokens * request.choices,
            reservation_id=turn.reservation.id,
            affinity=affinity_key(principal.department, opening(request)),
            context_tokens=decision.limits.context_tokens,
        )

    def _answer_tokens(self, request: InferenceRequest, decision: Decision) -> int:
        """Answer tokens per choice: what was asked, or the platform's bound, within the policy."""
        wanted = request.max_tokens or self.max_answer_tokens
        most = decision.limits.max_tokens
        return wanted if most is None else max(1, min(wanted, most // request.choices))

    async def _stream(
        self, turn: Turn, request: InferenceRequest, dispatch: Dispatch
    ) -> AsyncGenerator[GatewayEvent, None]:
        """Stream from the engine through output inspection; hold the end until it is recorded."""
        inspection = self.inspector.open_output(turn)
        held: list[bytes] = []
        unfinished = request.choices
        finished: EngineFinished | None = None
        async with aclosing(self.engine.stream(dispatch)) as events:
            async for event in events:
                if isinstance(event, EngineChunk):
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
                    yield released
                elif isinstance(event, EngineStarted):
                    turn.replica_id = event.replica_id
                    turn.model_version = event.model_version
                    turn.engine_version = event.engine_version
                    yield Accepted(request, turn)
                else:
                    finished = event
        if finished is None:
            raise InternalError()
        rest, turn.output_inspection = inspection.finish()
        if rest is not None:
            held.append(rest.data)
        tail = b"".join(held)
        turn.usage = finished.usage
        turn.sent_bytes += len(tail)
        turn.outcome, turn.status = Outcome.COMPLETED, 200
        await self._shielded(self._close(turn))
        yield Answer(tail, finished)

    # -- the end ------------------------------------------------------------------------------

    def _failed(self, turn: Turn, error: GatehouseError, cause: Exception | None = None) -> None:
        turn.outcome = Outcome.FAILED if error.status >= 500 else Outcome.REFUSED
        turn.error_code, turn.status = error.code, error.status
        if turn.outcome is Outcome.FAILED:
            log.error(
                "request %s failed: %s\n%s",
                turn.request_id,
                error.code,
                without_messages(cause or error),
            )

    async def _close(self, turn: Turn) -> None:
        """Settle and record, once per turn; a settlement that fails costs no record."""
        turn.ended_us = self.clock()
        try:
            try:
                if turn.reservation is not None:
                    await self.ledger.settle(turn)
            finally:
                await self.audit.completed(turn)
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

    async def _shielded(self, work: Coroutine[Any, Any, None]) -> None:
        """Finish ``work`` also when the client goes: cancellation reaches us, not the work."""
        task = asyncio.create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        await asyncio.shield(task)

    async def drain(self) -> None:
        """Wait for all turns that are being settled and recorded."""
        while self._closing:
            await asyncio.gather(*self._closing, return_exceptions=True)
