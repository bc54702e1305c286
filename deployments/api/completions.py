"""``/v1/chat/completions``, ``/v1/completions``, ``/v1/embeddings``: protocol only.

The gateway decides and orders; this module turns its events into HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.api import sse
from deployments.api.accounts import cost_object
from deployments.api.assemble import Assembler, with_field
from deployments.api.envelope import (
    answer_headers,
    error_body,
    error_response,
    new_id,
    turn_headers,
)
from deployments.logs import concern
from deployments.telemetry.traces import NoTracing, Tracing
from governance.errors import (
    GatehouseError,
    InternalError,
    InvalidRequest,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedMediaType,
)
from governance.gateway import Accepted, Answer, Call, Gateway
from governance.types import EngineChunk, Operation, Turn

log = logging.getLogger("gatehouse.api")

Trace = NoTracing | Tracing
_UNTRACED = NoTracing()


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Bounds on receiving a request body, and on how slowly its answer may be taken."""

    max_bytes: int
    timeout_s: float
    send_timeout_s: float = 60.0
    """Time that a client may take to receive one piece of its answer."""


async def read_body(request: Request, limits: BodyLimits) -> bytes:
    """Receive a body within its bounds; a declared length is checked before a byte is read.

    Raises:
        UnsupportedMediaType: The content type is not JSON.
        RequestTooLarge: More than ``max_bytes``.
        RequestTimeout: Not there within ``timeout_s``.
        InvalidRequest: The client stopped in the middle.
    """
    content_type = request.headers.get("content-type", "application/json")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType()
    too_large = RequestTooLarge(f"The request body may have at most {limits.max_bytes} bytes.")
    declared = request.headers.get("content-length", "0")
    # Digits of other scripts are digits to Python, and a number of 5,000 digits is too long for it.
    if not (declared.isascii() and declared.isdigit()) or len(declared.lstrip("0")) > 18:
        raise too_large
    if int(declared.lstrip("0") or "0") > limits.max_bytes:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.timeout_s):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise InvalidRequest("The request body ended early.")
                part = message.get("body", b"")
                size += len(part)
                if size > limits.max_bytes:
                    raise too_large
                parts.append(part)
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise RequestTimeout() from None


class Exchange(Response):
    """The answer to one inference request, as an ASGI response that runs the request path."""

    def __init__(
        self,
        gateway: Gateway,
        operation: Operation,
        request: Request,
        limits: BodyLimits,
        tracing: Trace = _UNTRACED,
    ) -> None:
        self.background = None
        self._tracing = tracing
        self._gateway = gateway
        self._operation = operation
        self._request = request
        self._limits = limits
        self._watch = sse.DisconnectWatch(request.receive, limits.send_timeout_s)
        self._started = False
        self._turn: Turn | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the exchange and send its answer, whatever it is."""
        request_id, decision_id = new_id("req"), new_id("dec")
        call = Call(
            operation=self._operation,
            authorization=self._request.headers.get("authorization"),
            read_body=self._read,
            request_id=request_id,
            decision_id=decision_id,
            opened=self._opened,
            notes=self._tracing.begin(self._request.headers.get("traceparent")),
        )
        try:
            await self._run(call, scope, receive, send)
        except GatehouseError as error:
            if self._started:
                # No [DONE]: a client must not take a broken answer for a whole one.
                await sse.end(send, sse.event(error_body(error, request_id, decision_id)))
            else:
                account = self._turn.account if self._turn else None
                response = error_response(error, request_id, decision_id, account)
                await response(scope, receive, send)
        except asyncio.CancelledError:
            if not self._watch.gone:
                raise  # cancelled from outside; a hang-up alone ends here, nobody is listening
        finally:
            self._watch.stop()

    def _opened(self, turn: Turn) -> None:
        self._turn = turn
        concern(turn)

    async def _read(self) -> bytes:
        body = await read_body(self._request, self._limits)
        self._watch.start()
        return body

    async def _run(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._gateway.exchange(call)) as events:
            accepted = await anext(events)
            if not isinstance(accepted, Accepted):
                raise InternalError()
            if accepted.request.stream:
                await self._stream(accepted, events, send)
            else:
                body = await self._whole(accepted, events)
                response = Response(
                    body, headers=answer_headers(accepted.turn), media_type="application/json"
                )
                await response(scope, receive, send)

    async def _stream(self, accepted: Accepted, events: sse.Events, send: Send) -> None:
        await sse.start(send, turn_headers(accepted.turn))
        self._started = True
        async for event in events:
            if isinstance(event, EngineChunk):
                await self._watch.write(send, event.data)
            elif isinstance(event, Answer):
                usage = b""
                if accepted.request.include_usage:
                    cost = cost_object(accepted.turn)
                    usage = with_field(event.finished.usage_event, b"}\n\n", "gatehouse", cost)
                await sse.end(send, event.tail + usage + sse.DONE)

    async def _whole(self, accepted: Accepted, events: sse.Events) -> bytes:
        embeddings = self._operation is Operation.EMBEDDINGS
        parts: list[bytes] = []
        assembler = Assembler(self._operation)
        async for event in events:
            if isinstance(event, EngineChunk):
                if embeddings:
                    parts.append(event.data)
                else:
                    assembler.feed(event.data)
            elif isinstance(event, Answer):
                cost = cost_object(accepted.turn)
                if embeddings:
                    return with_field(b"".join([*parts, event.tail]), b"}", "gatehouse", cost)
                assembler.feed(event.tail)
                return assembler.finish(event.finished.usage, cost)
        raise InternalError()
