"""What ``governance.ports.Engine`` promises, held to by each way of reaching an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
import pytest_asyncio

from governance.errors import (
    ContextLengthExceeded,
    EngineFailed,
    EngineTimeout,
    EngineUnavailable,
    InternalError,
    InvalidRequest,
    Overloaded,
)
from governance.types import EngineChunk, EngineFinished, EngineStarted, Operation, Usage
from tests.contract.planes import PLANES, Plane, collect, eventually, text_of
from tests.fakes import MODEL_VERSION, TOKEN_US, dispatch_of, event_bytes

Open = Callable[..., Awaitable[Plane]]


@pytest_asyncio.fixture(params=sorted(PLANES))
async def open_plane(request: pytest.FixtureRequest) -> AsyncIterator[Open]:
    """Opens the port over one transport; keyword arguments go to the engine."""
    opened: list[Plane] = []

    async def open_it(**options: Any) -> Plane:
        plane = await PLANES[request.param](**options)
        opened.append(plane)
        return plane

    yield open_it
    for plane in opened:
        await plane.close()


async def test_events_come_in_order_and_whole(open_plane: Open) -> None:
    plane = await open_plane()

    events = await collect(plane.engine, dispatch_of({"count": 54}))

    assert events[0] == EngineStarted("replica-1", MODEL_VERSION, "fake-1", 7)
    assert events[-1] == EngineFinished(Usage(7, 54, 2), b"data: {}\n\n", 55 * TOKEN_US)
    assert all(isinstance(event, EngineChunk) for event in events[1:-1])
    assert text_of(events) == b"".join(event_bytes("r-1", n) for n in range(54))


@pytest.mark.parametrize("orders", [{"delay_s": 0.002}, {"burst": True, "size": 3000}])
async def test_tokens_and_cost_come_with_the_chunks(
    open_plane: Open, orders: dict[str, Any]
) -> None:
    plane = await open_plane()

    events = await collect(plane.engine, dispatch_of({"count": 100, **orders}))

    chunks = [event for event in events if isinstance(event, EngineChunk)]
    assert sum(chunk.tokens for chunk in chunks) == 100
    costs = [chunk.gpu_us for chunk in chunks]
    assert costs == sorted(costs)
    assert costs[-1] == 101 * TOKEN_US
    for chunk in chunks:
        assert chunk.tokens == chunk.data.count(b"\n\n")


async def test_a_long_body_has_its_cost_too(open_plane: Open) -> None:
    plane = await open_plane()

    events = await collect(
        plane.engine, dispatch_of({"raw_bytes": 3_000_000}, operation=Operation.EMBEDDINGS)
    )

    assert [e.gpu_us for e in events if isinstance(e, EngineChunk)] == [TOKEN_US]


async def test_an_engine_without_a_meter_says_so(open_plane: Open) -> None:
    plane = await open_plane()

    events = await collect(plane.engine, dispatch_of({"count": 1, "unmetered": True}))

    assert isinstance(events[-1], EngineFinished)
    assert events[-1].gpu_us is None


async def test_the_engine_knows_who_was_told_the_end(open_plane: Open) -> None:
    plane = await open_plane()

    await collect(plane.engine, dispatch_of({"count": 3}, request_id="whole"))
    async with aclosing(plane.engine.stream(dispatch_of({"count": 99, "hang_at": 3}))) as events:
        async for event in events:
            if isinstance(event, EngineChunk):
                break
    with pytest.raises(EngineFailed):
        await collect(
            plane.engine, dispatch_of({"count": 9, "raise_at": 2, "error": "EngineFailed"})
        )
    await eventually(lambda: plane.backend.ended == 3)

    await eventually(lambda: bool(plane.backend.delivered_tickets))
    assert [t.request_id for t in plane.backend.delivered_tickets] == ["whole"]


async def test_every_chunk_ends_with_a_whole_event(open_plane: Open) -> None:
    plane = await open_plane()

    events = await collect(plane.engine, dispatch_of({"count": 200, "size": 2000, "burst": True}))

    assert all(e.data.endswith(b"\n\n") for e in events if isinstance(e, EngineChunk))


async def test_a_long_body_arrives_as_one_chunk(open_plane: Open) -> None:
    plane = await open_plane()

    events = await collect(
        plane.engine, dispatch_of({"raw_bytes": 5_000_001}, operation=Operation.EMBEDDINGS)
    )

    assert [len(e.data) for e in events if isinstance(e, EngineChunk)] == [5_000_001]


async def test_a_large_request_arrives_whole(open_plane: Open) -> None:
    plane = await open_plane()

    events = await collect(plane.engine, dispatch_of({"count": 1, "padding": "p" * (8 << 20)}))

    assert text_of(events) == event_bytes("r-1", 0)


async def test_the_engine_gets_what_was_decided(open_plane: Open) -> None:
    plane = await open_plane()

    await collect(plane.engine, dispatch_of(model="small-lora"))

    (ticket,) = plane.backend.tickets
    assert (ticket.audience, ticket.operation, ticket.request_id) == ("small-lora", "chat", "r-1")
    assert (ticket.department, ticket.principal_key) == ("hr", "principal")
    assert (ticket.priority, ticket.max_tokens, ticket.context_tokens) == (0, 64, 1024)
    assert (ticket.decision_id, ticket.reservation_id) == ("d-1", "v-1")


async def test_streams_do_not_mix(open_plane: Open) -> None:
    plane = await open_plane()

    answers = await asyncio.gather(
        *(
            collect(plane.engine, dispatch_of({"count": 20}, request_id=f"r-{number}"))
            for number in range(40)
        )
    )

    for number, events in enumerate(answers):
        assert text_of(events) == b"".join(event_bytes(f"r-{number}", n) for n in range(20))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("InvalidRequest", InvalidRequest), ("ContextLengthExceeded", ContextLengthExceeded)],
)
async def test_a_refusal_of_the_engine_arrives_as_raised(
    open_plane: Open, name: str, expected: type[Exception]
) -> None:
    plane = await open_plane()
    orders = {"raise_at": -1, "error": name, "message": "The prompt is too long."}

    with pytest.raises(InvalidRequest) as caught:
        await collect(plane.engine, dispatch_of(orders))

    assert type(caught.value) is expected
    assert caught.value.message == "The prompt is too long."
    assert caught.value.param == "messages"


@pytest.mark.parametrize("error", ["EngineUnavailable", "Overloaded"])
async def test_a_busy_engine_says_so(open_plane: Open, error: str) -> None:
    plane = await open_plane()

    with pytest.raises((EngineUnavailable, Overloaded)) as caught:
        await collect(plane.engine, dispatch_of({"raise_at": -1, "error": error}))

    assert type(caught.value).__name__ == error


@pytest.mark.parametrize("error", ["EngineFailed", "foreign"])
async def test_a_failure_in_mid_stream_is_raised_after_what_came_before(
    open_plane: Open, error: str
) -> None:
    plane = await open_plane()
    orders = {"count": 9, "raise_at": 3, "error": error}
    seen = []

    async def consume() -> None:
        async with aclosing(plane.engine.stream(dispatch_of(orders))) as events:
            async for event in events:
                seen.append(event)

    with pytest.raises(InternalError) as caught:  # EngineFailed is one
        await consume()

    assert text_of(seen) == b"".join(event_bytes("r-1", n) for n in range(3))
    assert "secret" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert plane.backend.calls["chat"] == 1


async def test_an_answer_without_its_end_is_a_failure(open_plane: Open) -> None:
    plane = await open_plane()

    with pytest.raises(EngineFailed):
        await collect(plane.engine, dispatch_of({"count": 3, "truncate": True}))


async def test_a_failed_exchange_does_not_spoil_the_next(open_plane: Open) -> None:
    plane = await open_plane()

    for _ in range(3):
        with pytest.raises(InvalidRequest):
            await collect(plane.engine, dispatch_of({"raise_at": -1, "error": "InvalidRequest"}))
        events = await collect(plane.engine, dispatch_of({"count": 2}))
        assert text_of(events) == event_bytes("r-1", 0) + event_bytes("r-1", 1)


async def test_closing_the_stream_aborts_the_engine_within_a_second(open_plane: Open) -> None:
    plane = await open_plane()
    stream = plane.engine.stream(dispatch_of({"count": 10, "hang_at": 3}))

    assert isinstance(await anext(stream), EngineStarted)
    await anext(stream)
    assert plane.backend.running == 1
    await stream.aclose()

    await eventually(lambda: plane.backend.running == 0 and plane.backend.ended == 1, within_s=1)


async def test_cancelling_the_consumer_aborts_the_engine_within_a_second(open_plane: Open) -> None:
    plane = await open_plane()
    task = asyncio.create_task(collect(plane.engine, dispatch_of({"start_delay_s": 60})))
    await eventually(lambda: plane.backend.running == 1)

    task.cancel()

    await eventually(lambda: plane.backend.running == 0, within_s=1)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert plane.engine.in_flight == 0


async def test_a_replica_that_dies_in_mid_stream_fails_the_request_once(open_plane: Open) -> None:
    plane = await open_plane()
    stream = plane.engine.stream(dispatch_of({"count": 10, "hang_at": 2}))
    assert isinstance(await anext(stream), EngineStarted)
    await anext(stream)

    await plane.kill()

    start = time.monotonic()
    with pytest.raises(EngineFailed):
        async for _ in stream:
            pass
    assert time.monotonic() - start < 1
    assert plane.backend.calls["chat"] == 1
    assert plane.engine.in_flight == 0


async def test_an_engine_that_does_not_start_in_time_is_given_up(open_plane: Open) -> None:
    plane = await open_plane(start_timeout_s=0.3)

    with pytest.raises(EngineTimeout):
        await collect(plane.engine, dispatch_of({"start_delay_s": 60}))

    await eventually(lambda: plane.backend.running == 0, within_s=1)
    assert plane.backend.calls["chat"] == 1


async def test_an_engine_that_falls_silent_is_given_up(open_plane: Open) -> None:
    plane = await open_plane(chunk_timeout_s=0.3)

    with pytest.raises(EngineTimeout):
        await collect(plane.engine, dispatch_of({"count": 9, "hang_at": 4}))

    await eventually(lambda: plane.backend.running == 0, within_s=1)


async def test_a_slow_consumer_is_not_a_silent_engine(open_plane: Open) -> None:
    plane = await open_plane(chunk_timeout_s=0.2)
    count = 0

    async with aclosing(plane.engine.stream(dispatch_of({"count": 3, "delay_s": 0.05}))) as events:
        async for _ in events:
            count += 1
            await asyncio.sleep(0.3)

    assert count >= 3


async def test_a_model_that_nothing_serves_is_unavailable(open_plane: Open) -> None:
    plane = await open_plane()

    with pytest.raises(EngineUnavailable) as caught:
        await collect(plane.engine, dispatch_of(model="huge", base_model="huge"))

    assert caught.value.retry_after_s
    assert not plane.engine.ready("huge")
    assert plane.engine.ready("small")


async def test_token_ids_are_decoded_by_the_replica(open_plane: Open) -> None:
    plane = await open_plane()

    assert await plane.engine.detokenize("small", [[1, 2], [], [3]]) == ["t1 t2", "", "t3"]
    with pytest.raises(InvalidRequest, match="vocabulary"):
        await plane.engine.detokenize("small", [[5000]])
    with pytest.raises(EngineUnavailable):
        await plane.engine.detokenize("huge", [[1]])


async def test_an_engine_that_knows_no_such_gateway_serves_nothing(open_plane: Open) -> None:
    plane = await open_plane()
    plane.keys.known.clear()

    with pytest.raises(EngineUnavailable):
        await collect(plane.engine, dispatch_of())
    with pytest.raises(EngineUnavailable):
        await plane.engine.detokenize("small", [[1]])

    assert not plane.backend.calls
    assert plane.verifier.refused["unknown_gateway"] == 2


async def test_a_forged_key_is_a_defect_not_a_retry(open_plane: Open) -> None:
    plane = await open_plane()
    plane.keys.known[plane.keys.gateway_id] = bytes(32)

    with pytest.raises(InternalError):
        await collect(plane.engine, dispatch_of())

    assert not plane.backend.calls
    assert plane.verifier.refused["bad_signature"] == 1
