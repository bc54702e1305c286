"""The path of a request, top to bottom.

    identify -> model visible? -> rate and parallel limits -> inspect input -> decide -> route
      -> enter the queue -> reserve -> record "decided" -> stream -> inspect output -> settle
      -> record "completed" -> release the end

``Gateway.exchange`` names every stage once, in this order. It knows no HTTP, no Ray and no
engine: each stage is a port (``governance.ports``), given at construction.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from governance.admission.limits import RateLimiter
from governance.admission.shedding import Applicant, LoadShedder, Place, overloaded
from governance.advice import advised
from governance.budget.messages import AccountState
from governance.classes import effective_class
from governance.closing import TurnCloser
from governance.dispatching import Plan, plan
from governance.drafts import DraftReader, Escalated, can_draft, with_logprobs
from governance.errors import (
    BudgetExhausted,
    ClientClosed,
    ContextLengthExceeded,
    GatehouseError,
    InternalError,
    InvalidRequest,
    NoAccount,
)
from governance.fallback import Fallbacks
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
from governance.request import parse_request, token_prompts, with_text_prompts
from governance.selection import (
    AUTO,
    LARGE,
    SMALL,
    Option,
    Selection,
    admitted,
    allowed,
    rate_limits,
)
from governance.streaming import Accepted, Answer, AnswerStream, GatewayEvent
from governance.tracebacks import without_messages
from governance.types import (
    Charge,
    Dispatch,
    InferenceRequest,
    ModelInfo,
    Operation,
    Outcome,
    Principal,
    Route,
    RouteAsk,
    Shed,
    Turn,
)

__all__ = ["Accepted", "Answer", "Call", "Gateway", "GatewayEvent"]

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
        shedder: LoadShedder | None = None,
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
        bases = sorted({model.base for model in models})
        self.shedder = shedder or LoadShedder(
            bases, lambda base: self.engine.load(base), lambda: monotonic() / 1e6
        )
        self._closer = TurnCloser(audit, observer, clock)
        self._streams = AnswerStream(
            engine, lambda turn: self.inspector.open_output(turn), audit, self._closer, clock
        )

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
                turn.charge = self._charge(principal)
                options += self._stand_ins(turn, principal, request, options)
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

    def _charge(self, principal: Principal) -> Charge | None:
        """Where the request is charged; that there is no account is said when it is reserved."""
        try:
            return self.ledger.charge(principal)
        except NoAccount:
            return None

    def _stand_ins(
        self,
        turn: Turn,
        principal: Principal,
        request: InferenceRequest,
        options: Sequence[Option],
    ) -> tuple[Option, ...]:
        """Models that policy lets answer in place of a large one that was named."""
        named = options[0]
        if (
            request.model == AUTO
            or named.model.tier != LARGE
            or named.decision.on_exhaustion != SMALL
        ):
            return ()
        return self.selection.stand_ins(principal, request, turn.input_inspection)

    async def _route(
        self,
        turn: Turn,
        principal: Principal,
        request: InferenceRequest,
        options: Sequence[Option],
    ) -> Route:
        auto = request.model == AUTO
        models = tuple(option.bounded for option in options)
        turn.account = self._usage(turn, principal)
        return await self.router.route(
            RouteAsk(
                request_id=turn.request_id,
                request=request,
                permitted=models if auto else models[:1],
                auto=auto,
                department=principal.department,
                principal_key=principal.key,
                priority_class=self._urgency(turn, options[0]),
                account=turn.account,
                stand_ins=() if auto else models[1:],
            )
        )

    @staticmethod
    def _urgency(turn: Turn, option: Option) -> str:
        """Class that counts at a model: the policy's or the account's, whichever is less urgent."""
        given = None if turn.charge is None else turn.charge.priority_class
        return effective_class(option.decision.priority_class, given)

    def _usage(self, turn: Turn, principal: Principal) -> AccountState | None:
        charge = turn.charge
        return self.ledger.usage(principal.department if charge is None else charge.account)

    async def _answer(
        self,
        turn: Turn,
        principal: Principal,
        request: InferenceRequest,
        options: Sequence[Option],
    ) -> AsyncGenerator[GatewayEvent, None]:
        """Reserve, record and stream; at the next model, while nothing was released yet."""
        fallbacks = Fallbacks(turn.route, options)
        released, planned, first = False, None, None
        while True:
            try:
                reader = self._reader(turn, request)
                asked = with_logprobs(request) if reader else request
                planned = self._plan(turn, principal, asked, fallbacks.option)
                first = first or planned
                with self._enter(turn, planned) as place:
                    hold, dispatch = await self._reserve(turn, principal, planned)
                    turn.lap("reserve")
                    await self.audit.decided(turn)
                    turn.lap("record_decided")
                    stream = self._streams.run(turn, request, hold, dispatch, reader, place)
                    async with aclosing(stream) as events:
                        async for event in events:
                            released = True
                            yield event
                return
            except (GatehouseError, Escalated) as error:
                route = None if released else fallbacks.after(error)
                if route is None:
                    standing = fallbacks.standing(error)
                    refused = planned if standing is error else first
                    if released or (told := self._told(turn, refused, standing)) is error:
                        raise
                    raise told from None
                await self._closer.supersede(turn, error)
                turn.route = route

    @staticmethod
    def _reader(turn: Turn, request: InferenceRequest) -> DraftReader | None:
        """Reads an answer that is judged before it is released, where the route says so."""
        route = turn.route
        if route is None or route.draft is None or not route.fallbacks or not can_draft(request):
            return None
        return DraftReader(route.draft, request)

    def _plan(
        self, turn: Turn, principal: Principal, request: InferenceRequest, option: Option
    ) -> Plan:
        """Fix the exact bytes that the engine will get."""
        turn.decision = option.decision
        planned = plan(
            turn.request_id,
            turn.decision_id,
            principal,
            request,
            option,
            self.max_answer_tokens,
            turn.charge,
            self.shedder.patience_ms(option.model.base, self._urgency(turn, option)),
        )
        turn.max_tokens, turn.body = planned.max_tokens, planned.body
        return planned

    def _enter(self, turn: Turn, planned: Plan) -> Place:
        """A place in the model's queue; a request that would not be served in time gets none."""
        charge = planned.charge
        applicant = Applicant(planned.priority_class, charge.department, charge.weight_milli)
        found = self.shedder.enter(planned.option.model.base, applicant)
        if isinstance(found, Shed):
            turn.shed = found
            raise overloaded(found)
        return found

    async def _reserve(
        self, turn: Turn, principal: Principal, planned: Plan
    ) -> tuple[Hold, Dispatch]:
        """Reserve what the request may cost."""
        try:
            turn.hold = hold = await self.ledger.reserve(planned.ask)
        finally:
            turn.account = self._usage(turn, principal)
        turn.reservation = hold.reservation
        return hold, planned.dispatch(hold.reservation)

    def _told(
        self, turn: Turn, planned: Plan | None, error: GatehouseError | Escalated
    ) -> GatehouseError | Escalated:
        """A failure as the caller is told it: want of budget with what would be allowed."""
        if not isinstance(error, BudgetExhausted) or planned is None or turn.principal is None:
            return error
        others = self.selection.stand_ins(turn.principal, planned.request, turn.input_inspection)
        return advised(error, self.ledger, planned.ask, others)

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
