"""One gateway connection, as an engine replica sees it."""

from __future__ import annotations

import asyncio
import base64
import logging
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

import orjson

from deployments.data_plane import frames
from deployments.data_plane.frames import FrameDecoder, FrameError, FrameType
from deployments.data_plane.sockets import STREAM_BUFFER_BYTES, tune
from deployments.data_plane.ticket_form import Ticket
from deployments.data_plane.tickets import TicketRefused
from deployments.data_plane.wire_errors import error_frame, refusal_frame
from governance.errors import (
    EngineFailed,
    EngineUnavailable,
    GatehouseError,
    InvalidRequest,
    Overloaded,
)
from governance.types import EngineChunk, EngineEvent, EngineFinished, EngineStarted

if TYPE_CHECKING:
    from deployments.data_plane.server import DataPlaneServer

log = logging.getLogger("gatehouse.data_plane")

CONNECT = "connect"
DETOKENIZE = "detokenize"
INTERNAL_OPERATIONS = frozenset({CONNECT, DETOKENIZE})

COALESCE_BYTES = 64 << 10
"""Chunks that are ready together share a frame up to this size."""
PART_BYTES = 256 << 10
"""Size of the parts of an event that is longer than a frame."""
HELLO_TIMEOUT_S = 5.0


class Session(asyncio.Protocol):
    """Verifies HELLO, then serves one request at a time, or receives STATE frames.

    What the engine yields without suspending is sent as one frame and one write. What the peer
    does not read stays in the transport up to ``STREAM_BUFFER_BYTES``; then the generator is not
    asked for more. When the peer goes, the request's task is cancelled.
    """

    def __init__(self, server: DataPlaneServer) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._decoder = FrameDecoder(frames.HELLO_LIMITS)
        self._hello_timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._writable: asyncio.Event = asyncio.Event()
        self._writable.set()
        self._out: list[bytes] = []
        self._chunks: list[bytes] = []
        self._chunk_bytes = 0
        self._chunk_tokens = 0
        self._chunk_gpu_us = 0
        self._flush_due = False
        self._ticket: Ticket | None = None
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.role: str | None = None
        self.unsent_prefixes: dict[str, None] = {}
        """Affinity keys that this peer has not been told of yet (state connections)."""

    # -- asyncio.Protocol ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Admit the connection, or close it when there are too many."""
        self._transport = cast(asyncio.Transport, transport)
        if not self._server.admit(self):
            self._transport.abort()
            return
        tune(transport, socket.SO_SNDBUF)
        self._transport.set_write_buffer_limits(high=STREAM_BUFFER_BYTES)
        self._hello_timer = self._loop.call_later(HELLO_TIMEOUT_S, self._transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Abort whatever this connection was for."""
        self.closed.set_result(None)
        self._server.forget(self)
        if self._hello_timer is not None:
            self._hello_timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        """The peer does not read fast enough."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """The peer has caught up."""
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        """Handle whole frames; anything out of turn ends the connection."""
        try:
            for kind, payload in self._decoder.feed(data):
                self._on_frame(kind, payload)
        except FrameError:
            self._server.stats.protocol_errors += 1
            self._transport.abort()

    # -- frames in ----------------------------------------------------------------------------

    def _on_frame(self, kind: int, payload: bytes) -> None:
        if self.role is None:
            self._on_hello(frames.parse_object(payload))
        elif self._task is not None or self.role != "request":
            raise FrameError
        else:
            header, body = frames.parse_request(payload)
            work = self._admit(kind, header, body)
            if work is not None:
                self._server.started()
                self._task = self._loop.create_task(self._run(work))
                self._task.add_done_callback(self._done)

    def _on_hello(self, hello: dict[str, Any]) -> None:
        role = hello.get("role")
        if hello.get("version") != frames.PROTOCOL_VERSION or role not in ("request", "state"):
            raise FrameError
        try:
            self._server.verifier.verify(
                _ticket_bytes(hello), operation=CONNECT, body=role.encode()
            )
        except TicketRefused as refusal:
            self._transport.write(refusal_frame(refusal.reason))
            self._transport.close()
            return
        if self._hello_timer is not None:
            self._hello_timer.cancel()
        self.role = role
        self._decoder.limits = frames.REPLICA_LIMITS
        reply = {"version": frames.PROTOCOL_VERSION, "replica_id": self._server.replica_id}
        self._transport.write(frames.json_frame(FrameType.HELLO, reply))
        self._server.greeted(self)

    def _admit(
        self, kind: int, header: dict[str, Any], body: bytes
    ) -> AsyncGenerator[bytes | EngineEvent, None] | None:
        """Check drain, room and ticket, in this order (cheapest first); refuse or give the work."""
        server = self._server
        operation = DETOKENIZE if kind == FrameType.DETOKENIZE else header.get("operation")
        if not isinstance(operation, str) or (
            kind == FrameType.REQUEST and operation in INTERNAL_OPERATIONS
        ):
            raise FrameError
        if server.draining:
            self._transport.write(error_frame(EngineUnavailable("", None, 2)))
            return None
        if server.stats.in_flight >= server.max_in_flight:
            server.stats.overloaded += 1
            self._transport.write(error_frame(Overloaded("", None, 1)))
            return None
        try:
            ticket = server.verifier.verify(
                _ticket_bytes(header),
                operation=operation,
                body=body,
                replica_id=server.replica_id,
            )
        except TicketRefused as refusal:
            self._transport.write(refusal_frame(refusal.reason))
            return None
        if kind == FrameType.DETOKENIZE:
            return self._detokenize(ticket.audience, body)
        server.served_prefix(header.get("affinity"))
        self._ticket = ticket
        return cast(
            "AsyncGenerator[bytes | EngineEvent, None]",
            server.backend.run(operation, body, ticket),
        )

    async def _detokenize(
        self, model: str, body: bytes
    ) -> AsyncGenerator[bytes | EngineEvent, None]:
        try:
            prompts = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise InvalidRequest() from None
        texts = await self._server.backend.detokenize(model, prompts)
        yield frames.frame(FrameType.DETOKENIZED, orjson.dumps(texts))

    # -- frames out ---------------------------------------------------------------------------

    async def _run(self, work: AsyncGenerator[bytes | EngineEvent, None]) -> None:
        """Drive the engine for one request and send what it gives."""
        last: bytes | None = None
        finished = False
        try:
            async with aclosing(work) as events:
                async for event in events:
                    if type(event) is EngineChunk:
                        await self._send_chunk(event)
                    elif type(event) is EngineStarted:
                        self._out.append(frames.started_frame(event))
                        self._schedule_flush()
                    elif type(event) is EngineFinished:
                        last = frames.finished_frame(event)
                        finished = True
                    elif type(event) is bytes:
                        last = event
                    if not self._writable.is_set():
                        await self._writable.wait()
            if last is None:
                last = error_frame(EngineFailed())
        except GatehouseError as error:
            last = error_frame(error)
        except Exception as error:
            # NOTE: neither text nor traceback: a library's message may hold the prompt.
            log.error("engine raised %s", type(error).__name__)
            last = error_frame(EngineFailed())
        # NOTE: before the last frame is written: on uvloop the peer's next request can be read
        # before this task's done callback runs.
        self._task = None
        self._server.finished()
        self._server.stats.served += 1
        self._flush()
        reached = finished and not self._transport.is_closing()
        self._transport.write(last)
        if reached and self._ticket is not None:
            self._server.backend.delivered(self._ticket)
        if self._server.draining:
            self.go_away()

    def _done(self, task: asyncio.Task[None]) -> None:
        """Settle for a task that did not end in order, also one cancelled before its first step."""
        if self._task is task:
            self._task = None
            self._server.finished()
            self._server.stats.aborted += 1
            self._transport.abort()

    async def _send_chunk(self, chunk: EngineChunk) -> None:
        data = chunk.data
        if len(data) > frames.MAX_CHUNK_BYTES - frames.CHUNK_HEAD_BYTES:
            await self._send_parts(chunk)
            return
        if self._chunk_bytes + len(data) > COALESCE_BYTES:
            self._flush()
        self._chunks.append(data)
        self._chunk_bytes += len(data)
        self._chunk_tokens += chunk.tokens
        self._chunk_gpu_us = chunk.gpu_us
        if self._chunk_bytes >= COALESCE_BYTES:
            self._flush()
            # A generator that never suspends would keep all other streams waiting.
            await asyncio.sleep(0)
        else:
            self._schedule_flush()

    async def _send_parts(self, chunk: EngineChunk) -> None:
        """Send one long event piece by piece, so that no second copy of it lies in the socket."""
        self._flush()
        data = chunk.data
        view = memoryview(data)
        for at in range(0, len(data), PART_BYTES):
            part = bytes(view[at : at + PART_BYTES])
            if at + PART_BYTES >= len(data):
                self._transport.write(frames.chunk_frame(part, chunk.tokens, chunk.gpu_us))
            else:
                self._transport.write(frames.frame(FrameType.CHUNK_PART, part))
            await self._writable.wait()

    def _schedule_flush(self) -> None:
        """Flush when the engine suspends: the loop runs this before anything new arrives."""
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if self._chunks:
            data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
            self._out.append(frames.chunk_frame(data, self._chunk_tokens, self._chunk_gpu_us))
            self._chunks.clear()
            self._chunk_bytes = self._chunk_tokens = 0
        if self._out:
            self._transport.write(b"".join(self._out))
            self._out.clear()

    # -- for the server -----------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a request runs on this connection."""
        return self._task is not None

    @property
    def unsent_bytes(self) -> int:
        """Bytes that wait in user space for the peer to read."""
        return self._transport.get_write_buffer_size() + self._chunk_bytes

    def send_state(self, numbers: dict[str, Any]) -> None:
        """Push STATE: the numbers, and the affinity keys that this peer has not been told of.

        Nothing is sent to a peer that has stopped reading; the next heartbeat carries it.
        """
        if self._writable.is_set():
            state = {**numbers, "prefixes": list(self.unsent_prefixes)}
            self.unsent_prefixes.clear()
            self._transport.write(frames.json_frame(FrameType.STATE, state))

    def go_away(self) -> None:
        """Tell the peer to start nothing more here."""
        if not self._transport.is_closing():
            self._transport.write(frames.frame(FrameType.GOAWAY))

    def close(self) -> None:
        """Close when what was written has been read."""
        self._transport.close()

    def abort(self) -> None:
        """Close at once; a running request is cancelled."""
        self._transport.abort()


def _ticket_bytes(header: dict[str, Any]) -> bytes:
    """The ticket of a header; anything else reads as an empty one, which is malformed."""
    text = header.get("ticket")
    if not isinstance(text, str):
        return b""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return b""
