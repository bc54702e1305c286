"""Frames: what is refused before it is stored."""

from __future__ import annotations

import struct

import pytest

from deployments.data_plane import frames
from deployments.data_plane.frames import FrameDecoder, FrameError, FrameType
from deployments.data_plane.wire_errors import error_frame, parse_error
from governance import errors
from governance.errors import EngineFailed, GatehouseError, RateLimited
from governance.types import EngineChunk, EngineFinished, EngineStarted, Usage


def head(kind: int, length: int) -> bytes:
    return struct.pack(">IB", length, kind)


@pytest.mark.parametrize(
    ("limits", "data"),
    [
        (frames.HELLO_LIMITS, head(FrameType.HELLO, frames.MAX_HELLO_BYTES + 1)),
        (frames.HELLO_LIMITS, head(FrameType.REQUEST, 1)),
        (frames.REPLICA_LIMITS, head(FrameType.REQUEST, (16 << 20) + 1)),
        (frames.REPLICA_LIMITS, head(FrameType.CHUNK, 1)),
        (frames.GATEWAY_LIMITS, head(FrameType.CHUNK, (1 << 20) + 1)),
        (frames.GATEWAY_LIMITS, head(FrameType.REQUEST, 1)),
        (frames.GATEWAY_LIMITS, head(FrameType.GOAWAY, 1)),
        (frames.GATEWAY_LIMITS, head(0, 0)),
        (frames.GATEWAY_LIMITS, head(99, 0)),
        (frames.GATEWAY_LIMITS, b"\xff" * 5),
    ],
)
def test_a_frame_that_is_not_permitted_is_refused_by_its_header(
    limits: dict[int, int], data: bytes
) -> None:
    decoder = FrameDecoder(limits)

    with pytest.raises(FrameError):
        decoder.feed(data)
    assert decoder.buffered_bytes == 0


def test_the_longest_permitted_request_is_read() -> None:
    decoder = FrameDecoder(frames.REPLICA_LIMITS)
    payload = bytes(16 << 20)
    whole = frames.frame(FrameType.REQUEST, payload)

    got = [
        f for at in range(0, len(whole), 256 << 10) for f in decoder.feed(whole[at:][: 256 << 10])
    ]

    assert got == [(FrameType.REQUEST, payload)]
    assert decoder.buffered_bytes == 0


def test_a_request_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(FrameError):
        frames.request_prefix(FrameType.REQUEST, {}, bytes(16 << 20))


@pytest.mark.parametrize("payload", [b"", b"\0", b"\0\x05{}", b"\0\x02[]body", b"\0\x02{]body"])
def test_a_broken_request_is_refused(payload: bytes) -> None:
    with pytest.raises(FrameError):
        frames.parse_request(payload)


@pytest.mark.parametrize("payload", [b"", b"[]", b'{"replica_id": "r"}', b'{"x": 1}'])
def test_a_broken_started_is_refused(payload: bytes) -> None:
    with pytest.raises(FrameError):
        frames.parse_started(payload)


def test_events_survive_the_wire() -> None:
    started = EngineStarted("replica-1", "sha256:00", "vllm-0.29.0", 17)
    finished = EngineFinished(Usage(4_000_000_000, 2, 1), b"data: {}\n\n", 1 << 60)
    decoder = FrameDecoder(frames.GATEWAY_LIMITS)

    (_, first), (_, last) = decoder.feed(
        frames.started_frame(started) + frames.finished_frame(finished)
    )

    assert frames.parse_started(first) == started
    assert frames.parse_finished(last) == finished
    with pytest.raises(FrameError):
        frames.parse_finished(last[:20])


@pytest.mark.parametrize("gpu_us", [None, 0, 1, 2**64 - 1])
def test_not_metered_is_not_nothing(gpu_us: int | None) -> None:
    sent = EngineFinished(Usage(), b"", gpu_us)
    assert frames.parse_finished(frames.finished_frame(sent)[5:]) == sent


def test_a_chunk_carries_its_tokens_and_the_cost_so_far() -> None:
    whole = frames.chunk_frame(b"data: {}\n\n", 3, 2**63)

    assert frames.parse_chunk(whole[5:]) == EngineChunk(b"data: {}\n\n", 3, 2**63)
    assert frames.parse_chunk(whole[5:], [b"a", b"b"]).data == b"abdata: {}\n\n"
    assert frames.parse_chunk(frames.chunk_frame(b"", 2**40, 0)[5:]).tokens == 2**32 - 1
    for short in range(frames.CHUNK_HEAD_BYTES):
        with pytest.raises(FrameError):
            frames.parse_chunk(whole[5 : 5 + short])


@pytest.mark.parametrize("tokens", [b'"7"', b"-1", b"1.5", b"true", b"null"])
def test_a_started_with_an_odd_count_is_refused(tokens: bytes) -> None:
    head = b'{"replica_id":"r","model_version":"m","engine_version":"e","prompt_tokens":'
    with pytest.raises(FrameError):
        frames.parse_started(head + tokens + b"}")


def every_error(root: type[GatehouseError] = GatehouseError) -> list[type[GatehouseError]]:
    return [root, *(cls for child in root.__subclasses__() for cls in every_error(child))]


@pytest.mark.parametrize("cls", every_error()[1:], ids=lambda cls: cls.__name__)
def test_each_error_survives_the_wire(cls: type[GatehouseError]) -> None:
    sent = cls("Our words.", "messages.0", 7, ("rule-1",))

    error, reason = parse_error(error_frame(sent)[5:])

    assert type(error) is cls
    assert (error.message, error.param, error.retry_after_s) == ("Our words.", "messages.0", 7)
    assert reason is None


def test_an_unknown_error_is_told_in_our_words() -> None:
    error, _ = parse_error(b'{"code": "brand_new", "message": "/secret/path"}')

    assert type(error) is EngineFailed
    assert error.message == EngineFailed().message


def test_odd_fields_of_an_error_are_dropped() -> None:
    error, _ = parse_error(
        b'{"code": "rate_limit_exceeded", "message": 5, "param": [], "retry_after_s": "x"}'
    )

    assert type(error) is RateLimited
    assert (error.message, error.param, error.retry_after_s) == (
        errors.RateLimited().message,
        None,
        None,
    )
