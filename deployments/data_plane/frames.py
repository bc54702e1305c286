"""The wire form between a gateway and an engine replica: length-prefixed frames.

    u32 big-endian length of the payload, u8 type, payload

One request at a time per connection, so frames carry no stream id: a connection that is closed
is one request aborted, and TCP's own flow control is the back pressure.

    gateway                                   replica
    HELLO {version, role, ticket}        ->
                                         <-   HELLO {version, replica_id}
    REQUEST header + body                ->
                                         <-   STARTED, CHUNK ..., FINISHED   (or ERROR)
    DETOKENIZE header + body             ->
                                         <-   DETOKENIZED                   (or ERROR)
                                         <-   GOAWAY: no new request on this connection
    role "state":                        <-   STATE on change, and as a heartbeat

CHUNK begins with the answer tokens that it stands for and the device-microseconds metered for the
request so far, FINISHED with the usage and the metered total. Chunks may be joined on either side:
tokens add up, the last of the metered figures holds.

Until a connection's HELLO has been verified only a small HELLO is read, so a peer without a ticket
can make a replica hold a few kilobytes and no more.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import orjson

from governance.types import EngineChunk, EngineFinished, EngineStarted, Usage

PROTOCOL_VERSION = 2

MAX_HELLO_BYTES = 8 << 10
MAX_CONTROL_BYTES = 64 << 10
MAX_REQUEST_BYTES = 16 << 20
MAX_CHUNK_BYTES = 1 << 20
MAX_EVENT_BYTES = 64 << 20
"""Longest engine event put together from parts (an embeddings answer with many inputs)."""

HEADER = struct.Struct(">IB")
_U16 = struct.Struct(">H")
_CHUNK = struct.Struct(">IQ")
_FINISHED = struct.Struct(">IIIBQ")
CHUNK_HEAD_BYTES = _CHUNK.size
_U32 = 0xFFFFFFFF


class FrameType(IntEnum):
    """First byte after the length."""

    HELLO = 1
    REQUEST = 2
    STARTED = 3
    CHUNK = 4
    CHUNK_PART = 5
    """Start or middle of an event that is longer than one frame; a CHUNK ends it."""
    FINISHED = 6
    ERROR = 7
    STATE = 8
    DETOKENIZE = 9
    DETOKENIZED = 10
    GOAWAY = 11


class FrameError(Exception):
    """The peer does not speak this protocol; the connection is of no further use."""


HELLO_LIMITS: Mapping[int, int] = {FrameType.HELLO: MAX_HELLO_BYTES}
"""What a replica reads before it knows the peer."""

REPLICA_LIMITS: Mapping[int, int] = {
    FrameType.REQUEST: MAX_REQUEST_BYTES,
    FrameType.DETOKENIZE: MAX_REQUEST_BYTES,
}
"""What a replica reads after that."""

GATEWAY_LIMITS: Mapping[int, int] = {
    FrameType.HELLO: MAX_HELLO_BYTES,
    FrameType.STARTED: MAX_CONTROL_BYTES,
    FrameType.CHUNK: MAX_CHUNK_BYTES,
    FrameType.CHUNK_PART: MAX_CHUNK_BYTES,
    FrameType.FINISHED: MAX_CONTROL_BYTES,
    FrameType.ERROR: MAX_CONTROL_BYTES,
    FrameType.STATE: MAX_CONTROL_BYTES,
    FrameType.DETOKENIZED: MAX_REQUEST_BYTES,
    FrameType.GOAWAY: 0,
}
"""What a gateway reads."""


class FrameDecoder:
    """Cuts a byte stream into frames.

    A frame's length is checked against its type before a byte of its payload is kept, so the
    decoder never holds more than the longest permitted frame and one read.

    Args:
        limits: Type -> longest payload in bytes; a type that is not there is an error.

    """

    __slots__ = ("_buffer", "_need", "limits")

    def __init__(self, limits: Mapping[int, int]) -> None:
        self.limits = limits
        self._buffer = bytearray()
        self._need = HEADER.size

    @property
    def buffered_bytes(self) -> int:
        """Bytes of an incomplete frame."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Take bytes in, give the (type, payload) of each frame that they complete.

        Raises:
            FrameError: A type that is not permitted here, or a payload that is too long.

        """
        buffer = self._buffer
        if buffer:
            buffer += data
            if len(buffer) < self._need:
                return []
            data = bytes(buffer)
            buffer.clear()
        frames: list[tuple[int, bytes]] = []
        at, end = 0, len(data)
        while end - at >= 5:
            length, kind = HEADER.unpack_from(data, at)
            limit = self.limits.get(kind)
            if limit is None or length > limit:
                raise FrameError
            stop = at + 5 + length
            if stop > end:
                self._need = 5 + length
                buffer += memoryview(data)[at:]
                return frames
            frames.append((kind, data[at + 5 : stop]))
            at = stop
        self._need = HEADER.size
        if at < end:
            buffer += memoryview(data)[at:]
        return frames


def frame(kind: int, payload: bytes = b"") -> bytes:
    """One whole frame."""
    return HEADER.pack(len(payload), kind) + payload


def json_frame(kind: FrameType, value: Mapping[str, Any]) -> bytes:
    """A frame with a JSON object."""
    return frame(kind, orjson.dumps(value))


def parse_object(payload: bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FrameError: It is something else.

    """
    try:
        value = orjson.loads(payload)
    except orjson.JSONDecodeError:
        raise FrameError from None
    if not isinstance(value, dict):
        raise FrameError
    return value


def request_prefix(kind: FrameType, header: Mapping[str, Any], body: bytes) -> bytes:
    """Everything of a REQUEST or DETOKENIZE frame but the body, which is sent without a copy."""
    raw = orjson.dumps(header)
    size = _U16.size + len(raw) + len(body)
    if size > MAX_REQUEST_BYTES:
        raise FrameError
    return HEADER.pack(size, kind) + _U16.pack(len(raw)) + raw


def parse_request(payload: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a REQUEST or DETOKENIZE.

    Raises:
        FrameError: The payload is cut short or its header is not a JSON object.

    """
    if len(payload) < _U16.size:
        raise FrameError
    (length,) = _U16.unpack_from(payload)
    start = _U16.size + length
    if start > len(payload):
        raise FrameError
    return parse_object(payload[_U16.size : start]), payload[start:]


def started_frame(event: EngineStarted) -> bytes:
    """STARTED."""
    return json_frame(
        FrameType.STARTED,
        {
            "replica_id": event.replica_id,
            "model_version": event.model_version,
            "engine_version": event.engine_version,
            "prompt_tokens": event.prompt_tokens,
        },
    )


def parse_started(payload: bytes) -> EngineStarted:
    """Read STARTED.

    Raises:
        FrameError: It has other fields.

    """
    try:
        started = EngineStarted(**parse_object(payload))
    except TypeError:
        raise FrameError from None
    if type(started.prompt_tokens) is not int or started.prompt_tokens < 0:
        raise FrameError
    return started


def chunk_frame(data: bytes, tokens: int, gpu_us: int) -> bytes:
    """CHUNK: u32 answer tokens, u64 device-microseconds so far, then the data."""
    head = _CHUNK.pack(min(tokens, _U32), gpu_us)
    return b"".join((HEADER.pack(_CHUNK.size + len(data), FrameType.CHUNK), head, data))


def parse_chunk(payload: bytes, before: Sequence[bytes] = ()) -> EngineChunk:
    """Read CHUNK.

    Args:
        payload: Of the frame.
        before: Payloads of the CHUNK_PART frames that came before it; they are data alone.

    Raises:
        FrameError: It is too short.

    """
    if len(payload) < _CHUNK.size:
        raise FrameError
    tokens, gpu_us = _CHUNK.unpack_from(payload)
    data = payload[_CHUNK.size :]
    return EngineChunk(b"".join((*before, data)) if before else data, tokens, gpu_us)


def finished_frame(event: EngineFinished) -> bytes:
    """FINISHED.

    Three u32 (prompt, completion, cached tokens), u8 (1 where it was metered), u64
    device-microseconds, then the usage event.
    """
    usage = event.usage
    return frame(
        FrameType.FINISHED,
        _FINISHED.pack(
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.cached_tokens,
            event.gpu_us is not None,
            event.gpu_us or 0,
        )
        + event.usage_event,
    )


def parse_finished(payload: bytes) -> EngineFinished:
    """Read FINISHED.

    Raises:
        FrameError: It is too short.

    """
    if len(payload) < _FINISHED.size:
        raise FrameError
    prompt, completion, cached, metered, gpu_us = _FINISHED.unpack_from(payload)
    if metered > 1:
        raise FrameError
    usage = Usage(prompt, completion, cached)
    return EngineFinished(usage, payload[_FINISHED.size :], gpu_us if metered else None)
