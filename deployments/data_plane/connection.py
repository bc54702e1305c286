"""One connection to an engine replica, as a gateway sees it."""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, Self, cast

from deployments.data_plane import frames
from deployments.data_plane.frames import FrameDecoder, FrameError, FrameType
from deployments.data_plane.session import CONNECT
from deployments.data_plane.sockets import STREAM_BUFFER_BYTES, tune
from deployments.data_plane.tickets import TicketSigner
from deployments.data_plane.wire_errors import parse_error
from governance.control.snapshot import ReplicaAddress
from governance.errors import EngineFailed, EngineTimeout, EngineUnavailable, GatehouseError
from governance.types import EngineChunk, EngineEvent, EngineFinished, EngineStarted

_CHUNK, _CHUNK_PART, _GOAWAY = map(int, (FrameType.CHUNK, FrameType.CHUNK_PART, FrameType.GOAWAY))
"""Plain integers for what happens per event: an enum's attribute costs as much as the work."""


class Connection(asyncio.Protocol):
    """What request and state connections share: dialling, HELLO, frames in."""

    role: str

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._decoder = FrameDecoder(frames.GATEWAY_LIMITS)
        self._hello: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self.lost = False
        self.refusal: str | None = None
        """Reason, when the last ERROR was about the ticket."""

    @classmethod
    async def dial(
        cls, address: ReplicaAddress, signer: TicketSigner, tls: ssl.SSLContext | None
    ) -> Self:
        """Connect and say HELLO.

        Raises:
            OSError: The address does not accept connections.
            EngineUnavailable: Another replica, or something else, listens there; or it refused
                the ticket for the time being.
            InternalError: It refused the ticket for good.

        """
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, address.host, address.port, ssl=tls)
        try:
            ticket = signer.mint_internal(CONNECT, address.base_model, cls.role.encode())
            hello = {
                "version": frames.PROTOCOL_VERSION,
                "role": cls.role,
                "ticket": base64.b64encode(ticket).decode(),
            }
            connection._transport.write(frames.json_frame(FrameType.HELLO, hello))
            reply = await connection._hello
            if (
                reply.get("version") != frames.PROTOCOL_VERSION
                or reply.get("replica_id") != address.replica_id
            ):
                raise EngineUnavailable()
        except BaseException:
            connection.abort()
            raise
        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Set the socket up."""
        self._transport = cast(asyncio.Transport, transport)
        tune(transport, socket.SO_RCVBUF)

    def connection_lost(self, exc: Exception | None) -> None:
        """The replica closed, died, or was aborted by us."""
        self.lost = True
        if not self._hello.done():
            self._fail_hello(EngineUnavailable())
        self._on_lost()

    def data_received(self, data: bytes) -> None:
        """Handle whole frames; nonsense ends the connection."""
        try:
            for kind, payload in self._decoder.feed(data):
                if self._hello.done():
                    self._on_frame(kind, payload)
                elif kind == FrameType.HELLO:
                    self._hello.set_result(frames.parse_object(payload))
                elif kind == FrameType.ERROR:
                    error, self.refusal = parse_error(payload)
                    self._fail_hello(error)
                else:
                    raise FrameError
        except FrameError:
            self.abort()

    def _fail_hello(self, error: GatehouseError) -> None:
        self._hello.set_exception(error)
        self._hello.exception()  # a dialler that was cancelled never looks at it

    def abort(self) -> None:
        """Close at once; what runs on this connection is aborted in the engine."""
        self._transport.abort()

    def _on_frame(self, kind: int, payload: bytes) -> None:
        raise NotImplementedError

    def _on_lost(self) -> None:
        raise NotImplementedError


class RequestConnection(Connection):
    """Runs one exchange after another, never two at once.

    Events wait in a queue; beyond ``STREAM_BUFFER_BYTES`` the socket is not read, which in turn
    holds the replica back.
    """

    role = "request"

    def __init__(self) -> None:
        super().__init__()
        self._events: deque[EngineEvent | bytes] = deque()
        self._queued_bytes = 0
        self._parts: list[bytes] = []
        self._part_bytes = 0
        self._paused = False
        self._open = False
        self._failure: GatehouseError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._limit_s = 0.0
        self._quiet_since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.going_away = False

    # -- for the pool -------------------------------------------------------------------------

    @property
    def reusable(self) -> bool:
        """Whether the last exchange ended in order and another may follow."""
        return not (self._open or self.lost or self.going_away or self._transport.is_closing())

    @property
    def buffered_bytes(self) -> int:
        """Bytes received that nobody has taken yet."""
        return self._queued_bytes + self._part_bytes + self._decoder.buffered_bytes

    def send(self, kind: FrameType, header: dict[str, Any], body: bytes, start_by: float) -> None:
        """Begin an exchange.

        Args:
            kind: REQUEST or DETOKENIZE.
            header: Goes in front of the body.
            body: The bytes that the ticket in ``header`` binds.
            start_by: Loop time by which the first event must be there.

        Raises:
            FrameError: Header and body together exceed ``MAX_REQUEST_BYTES``.
            EngineUnavailable: The connection ended, or was told GOAWAY, since it was taken;
                nothing was sent.

        """
        if not self.reusable:
            raise EngineUnavailable()
        prefix = frames.request_prefix(kind, header, body)
        self._open, self._failure, self.refusal = True, None, None
        if len(body) < STREAM_BUFFER_BYTES:
            self._transport.write(prefix + body)
        else:
            self._transport.write(prefix)
            self._transport.write(body)
        self._quiet_since = self._loop.time()
        self._limit_s = max(0.0, start_by - self._quiet_since)
        self._timer = self._loop.call_later(self._limit_s, self._check_silence)

    def set_chunk_timeout(self, limit_s: float) -> None:
        """From now on bound the silence between events instead of the start."""
        self._limit_s = limit_s
        self._quiet_since = self._loop.time()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = self._loop.call_later(limit_s, self._check_silence)

    async def receive(self) -> EngineEvent | bytes:
        """Next event; chunks that wait are joined into one.

        Raises:
            GatehouseError: As the replica reported it.
            EngineFailed: The connection broke.
            EngineTimeout: The replica was silent for too long.

        """
        events = self._events
        while not events:
            if self._failure is not None:
                raise self._failure
            self._quiet_since = self._loop.time()
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        event = events.popleft()
        if type(event) is not EngineChunk:
            return event
        if events and type(events[0]) is EngineChunk:
            data, tokens = [event.data], event.tokens
            while events and type(events[0]) is EngineChunk:
                event = cast(EngineChunk, events.popleft())
                data.append(event.data)
                tokens += event.tokens
            event = EngineChunk(b"".join(data), tokens, event.gpu_us)
        self._queued_bytes -= len(event.data)
        if self._paused and self._queued_bytes < STREAM_BUFFER_BYTES // 2 and not self.lost:
            self._paused = False
            self._transport.resume_reading()
        return event

    # -- frames in ----------------------------------------------------------------------------

    def _on_frame(self, kind: int, payload: bytes) -> None:
        if kind == _GOAWAY:
            self.going_away = True
            if not self._open:
                self._transport.close()
        elif not self._open:
            raise FrameError
        elif kind == _CHUNK:
            chunk = frames.parse_chunk(payload, self._parts)
            if self._parts:
                self._parts.clear()
                self._part_bytes = 0
            self._queued_bytes += len(chunk.data)
            self._put(chunk)
            if self._queued_bytes >= STREAM_BUFFER_BYTES and not self._paused:
                self._paused = True
                self._transport.pause_reading()
        elif kind == _CHUNK_PART:
            self._part_bytes += len(payload)
            if self._part_bytes > frames.MAX_EVENT_BYTES:
                raise FrameError
            self._parts.append(payload)
            self._quiet_since = self._loop.time()
        elif kind == FrameType.STARTED:
            self._put(frames.parse_started(payload))
        elif kind == FrameType.FINISHED:
            self._put(frames.parse_finished(payload))
            self._end(None)
        elif kind == FrameType.DETOKENIZED:
            self._put(payload)
            self._end(None)
        elif kind == FrameType.ERROR:
            error, self.refusal = parse_error(payload)
            self._end(error)
        else:
            raise FrameError

    def _put(self, event: EngineStarted | EngineChunk | EngineFinished | bytes) -> None:
        self._events.append(event)
        self._wake()

    def _end(self, failure: GatehouseError | None) -> None:
        """The exchange is over; what was received before still gets out first."""
        self._open = False
        self._failure = failure
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _on_lost(self) -> None:
        if self._open:
            self._end(EngineFailed())

    def _check_silence(self) -> None:
        """Runs once per limit and re-arms itself, which is cheaper than a timer per event.

        Silence counts only while somebody waits: a slow consumer is not the engine's fault.
        """
        now = self._loop.time()
        waiting = self._waiter is not None and not self._waiter.done()
        quiet = now - self._quiet_since if waiting else 0.0
        if quiet >= self._limit_s - 0.001:
            self._end(EngineTimeout())
            self.abort()
            return
        self._timer = self._loop.call_later(self._limit_s - quiet, self._check_silence)


class StateConnection(Connection):
    """Receives STATE and GOAWAY of one replica.

    ``on_state`` is called for each STATE, and with ``{"draining": True}`` for a GOAWAY; ``closed``
    resolves when the connection is gone.
    """

    role = "state"

    def __init__(self) -> None:
        super().__init__()
        self.on_state: Callable[[dict[str, Any]], None] | None = None
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._early: list[dict[str, Any]] = []

    def listen(self, on_state: Callable[[dict[str, Any]], None]) -> None:
        """Deliver what came with HELLO, and from now on whatever comes."""
        self.on_state = on_state
        for state in self._early:
            on_state(state)
        self._early.clear()

    def _on_frame(self, kind: int, payload: bytes) -> None:
        if kind == FrameType.STATE:
            state = frames.parse_object(payload)
        elif kind == FrameType.GOAWAY:
            state = {"draining": True}
        else:
            raise FrameError
        if self.on_state is None:
            self._early.append(state)
        else:
            self.on_state(state)

    def _on_lost(self) -> None:
        if not self.closed.done():
            self.closed.set_result(None)
