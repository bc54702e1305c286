"""One request run again on the large model: decided, streamed, settled, recorded like any other.

Nobody receives the answer. It is a request of its own in the records (``<id>-shadow``), under the
caller's name and key, so that its content is protected as the original's is; it is charged to the
account that pays for shadows. Its priority is that of batches, and it gives way in mid-answer as
soon as anybody waits for the model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from governance.closing import TurnCloser
from governance.dispatching import plan
from governance.errors import ClientClosed, GatehouseError, InternalError
from governance.nulls import NullObserver
from governance.ports import AuditLog, Clock, Engine, Hold, Ledger, Policy
from governance.selection import Option
from governance.types import (
    Charge,
    Dispatch,
    Effect,
    EngineChunk,
    EngineFinished,
    EngineStarted,
    InferenceRequest,
    Inspection,
    ModelInfo,
    Operation,
    Outcome,
    Principal,
    Route,
    Turn,
)
from routing.types import ModelLoad

REASON = "shadow"
"""``route_reason`` of a shadow's records."""


@dataclass(frozen=True, slots=True)
class Offer:
    """An exchange that may be repeated on the large model."""

    request_id: str
    decision_id: str
    decided_event_id: str
    operation: Operation
    principal: Principal
    request: InferenceRequest
    inspection: Inspection | None
    small: ModelInfo
    small_tokens: int | None
    large: ModelInfo
    gain_milli: int | None
    threshold_milli: int | None
    offered_s: float
    """By the runner's clock."""
    raw: bytes | bytearray = b""
    """The small model's answer as it was released; empty once it has been read."""
    answer: str = ""
    """Its text, once it has been read."""

    def read(self) -> Offer:
        """The same with the answer's text; takes milliseconds where it is long."""
        return replace(self, raw=b"", answer=answer_text(self.operation, self.raw))


@dataclass(frozen=True, slots=True)
class ShadowAnswer:
    """What the large model said, and the turn that is on record for it."""

    text: str
    turn: Turn


class NotRun(Exception):
    """Nothing was sent to an engine and nothing recorded; ``reason`` is a word for the figures."""

    def __init__(self, reason: str, pause: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.pause = pause
        """Whether the next one would not fare better for a while."""


class _GaveWay(Exception):
    """Somebody waits for the model."""


@dataclass(slots=True)
class ShadowExchange:
    """Runs offers, one at a time or several.

    Nothing here reaches the request that was offered: it has been answered and recorded.
    """

    account: str
    """Department whose account pays."""
    max_answer_tokens: int
    policy: Policy
    ledger: Ledger
    audit: AuditLog
    engine: Engine
    load: Callable[[str], ModelLoad]
    """How busy a base model is, as far as this gateway knows."""
    clock: Clock
    _closer: TurnCloser = field(init=False)

    def __post_init__(self) -> None:
        # Shadows do not count among the requests that were served.
        self._closer = TurnCloser(self.audit, NullObserver(), self.clock)

    async def run(self, offer: Offer) -> ShadowAnswer:
        """Run one offer; ``end`` must follow. When this raises, what was decided has its end.

        Raises:
            NotRun: The caller may not use the large model (any more), nothing is left in the
                account, or the decision cannot be recorded.
            GatehouseError: It was decided, and failed; its end says so.
        """
        option = self._option(offer)
        name, decision_id = f"{offer.request_id}-shadow", f"{offer.decision_id}-shadow"
        # The engine reports what it metered under the account of the ticket: who pays.
        charge = Charge(self.account, self.account, "batch")
        planned = plan(
            name,
            decision_id,
            offer.principal,
            offer.request,
            option,
            self.max_answer_tokens,
            charge,
        )
        turn = Turn(
            request_id=name,
            decision_id=decision_id,
            started_us=self.clock(),
            operation=offer.operation,
            principal=offer.principal,
            request=offer.request,
            input_inspection=offer.inspection,
            decision=option.decision,
            charge=charge,
            route=Route(offer.large, REASON),
            body=planned.body,
            max_tokens=planned.max_tokens,
        )
        try:
            hold = await self.ledger.reserve(planned.ask)
        except GatehouseError as error:
            raise NotRun(error.code, pause=True) from None
        turn.hold, turn.reservation = hold, hold.reservation
        dispatch = planned.dispatch(hold.reservation)
        try:
            await self.audit.decided(turn)
            text = await self._stream(turn, hold, dispatch)
        except BaseException as error:
            if turn.decided_event_id is None:
                hold.settle(None, None)
                if isinstance(error, GatehouseError):
                    raise NotRun(error.code, pause=True) from None
                raise
            _failed(turn, error)
            await self._closer.close(turn)
            if isinstance(error, _GaveWay):
                raise NotRun("gave_way") from None
            raise
        turn.outcome, turn.status = Outcome.COMPLETED, 200
        return ShadowAnswer(text, turn)

    async def end(self, turn: Turn) -> None:
        """Settle and record a run that ended well.

        Raises:
            GatehouseError: It was not settled or not recorded.
        """
        await self._closer.close(turn)

    async def drain(self) -> None:
        """Wait for everything that is being settled and recorded."""
        await self._closer.drain()

    def _option(self, offer: Offer) -> Option:
        """The large model, with what the policy says now of this caller and request there."""
        decision = self.policy.decide(
            offer.principal, offer.large, offer.operation.value, offer.inspection
        )
        if decision.effect is not Effect.ALLOW:
            raise NotRun("not_permitted")
        return Option(offer.large, replace(decision, priority_class="batch"))

    async def _stream(self, turn: Turn, hold: Hold, dispatch: Dispatch) -> str:
        pieces: list[str] = []
        finished: EngineFinished | None = None
        async with aclosing(self.engine.stream(dispatch)) as events:
            async for event in events:
                if isinstance(event, EngineChunk):
                    if hold.consumed(event.tokens, event.gpu_us):
                        await hold.extend()
                    self.audit.output(turn, event.data)
                    pieces.append(answer_text(turn.operation, event.data))
                    if self.load(dispatch.base_model).waiting:
                        raise _GaveWay
                elif isinstance(event, EngineStarted):
                    turn.accepted_us = self.clock()
                    turn.replica_id = event.replica_id
                    turn.model_version = event.model_version
                    turn.engine_version = event.engine_version
                    if event.prompt_tokens:
                        await hold.started(event.prompt_tokens)
                else:
                    finished = event
        if finished is None:
            raise InternalError()
        turn.usage, turn.gpu_us = finished.usage, finished.gpu_us
        return "".join(pieces)


def _failed(turn: Turn, error: BaseException) -> None:
    """Say how the turn ended; the client of a shadow is this module."""
    if isinstance(error, _GaveWay) or not isinstance(error, Exception):
        turn.outcome, turn.error_code = Outcome.ABORTED, ClientClosed.code
        turn.status = ClientClosed.status
        return
    known = error if isinstance(error, GatehouseError) else InternalError()
    turn.outcome = Outcome.FAILED if known.status >= 500 else Outcome.REFUSED
    turn.error_code, turn.status = known.code, known.status


def answer_text(operation: Operation, data: bytes | bytearray) -> str:
    """Text of the first choice in a piece of an answer: one or more server-sent events."""
    texts = []
    for part in data.split(b"\n\n"):
        if not part.startswith(b"data: "):
            continue
        event: dict[str, Any] = orjson.loads(part[6:])
        for choice in event.get("choices") or ():
            if choice.get("index", 0) != 0:
                continue
            if operation is Operation.CHAT:
                texts.append((choice.get("delta") or {}).get("content") or "")
            else:
                texts.append(choice.get("text") or "")
    return "".join(texts)
