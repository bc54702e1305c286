"""What the sockets promise beyond the port: choice, failure, drain, bounds, and who is let in."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any

import orjson
import pytest
import pytest_asyncio
import uvloop

from deployments.data_plane import frames
from deployments.data_plane.client import DataPlaneEngine
from deployments.data_plane.frames import FrameDecoder, FrameType
from deployments.data_plane.options import ClientOptions
from deployments.data_plane.session import DETOKENIZE
from governance.errors import (
    EngineFailed,
    EngineUnavailable,
    InternalError,
    InvalidRequest,
    Overloaded,
)
from governance.types import EngineChunk, EngineStarted
from tests.contract.planes import (
    Keys,
    Node,
    address_of,
    collect,
    eventually,
    start_engine,
    start_node,
    text_of,
)
from tests.fakes import dispatch_of, event_bytes

pytestmark = pytest.mark.filterwarnings("ignore:.*event_loop_policy.*:DeprecationWarning")


@pytest.fixture(params=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    """Both loops: tests and tools run on asyncio's, Ray's actors on uvloop."""
    if request.param == "uvloop":
        return uvloop.EventLoopPolicy()
    return asyncio.DefaultEventLoopPolicy()


class Cluster:
    """Nodes and gateways of one test, all closed at its end."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.keys = Keys()
        self._stack = stack

    async def node(self, replica_id: str = "replica-1", **options: Any) -> Node:
        node = await start_node(self.keys, replica_id, **options)
        self._stack.push_async_callback(node.server.close)
        return node

    async def peer(self, node: Node) -> Peer:
        peer = await Peer.connect(node)
        self._stack.push_async_callback(peer.close)
        return peer

    async def distant(
        self, process: list[subprocess.Popen[str]], **options: Any
    ) -> tuple[subprocess.Popen[str], DataPlaneEngine]:
        """A replica in a process of its own, and a gateway here that is connected to it."""
        gateway_id = self.keys.gateway_id
        module = [sys.executable, "-m", "tests.contract.replica_process", "replica-x"]
        child = subprocess.Popen(  # noqa: ASYNC220
            [*module, gateway_id, self.keys.known[gateway_id].hex()],
            stdout=subprocess.PIPE,
            text=True,
        )
        process.append(child)
        assert child.stdout
        port = int(await asyncio.to_thread(child.stdout.readline))
        engine = await self.engine(**options)
        engine.update([address_of("replica-x", port)])
        await eventually(lambda: engine.ready("small"), within_s=1)
        return child, engine

    async def engine(self, *nodes: Node, **options: Any) -> DataPlaneEngine:
        engine = await start_engine(self.keys, *nodes, **options)
        self._stack.push_async_callback(engine.close)
        return engine


@pytest_asyncio.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        yield Cluster(stack)


# -- streams and memory -----------------------------------------------------------------------


async def test_connections_are_reused(cluster: Cluster) -> None:
    node = await cluster.node()
    engine = await cluster.engine(node)

    for _ in range(20):
        await collect(engine, dispatch_of())

    assert node.server.stats.connections == 2
    assert node.verifier.accepted == 22  # HELLO of the state and one request connection, requests
    assert node.server.stats.served == 20
    assert node.server.stats.in_flight == 0


async def test_events_that_are_ready_together_share_a_chunk(cluster: Cluster) -> None:
    engine = await cluster.engine(await cluster.node())

    together = await collect(engine, dispatch_of({"count": 50, "burst": True}))
    apart = await collect(engine, dispatch_of({"count": 5, "delay_s": 0.02}))

    assert sum(isinstance(event, EngineChunk) for event in together) == 1
    assert text_of(together) == b"".join(event_bytes("r-1", n) for n in range(50))
    assert sum(isinstance(event, EngineChunk) for event in apart) == 5


async def test_an_event_is_not_held_back_for_the_next(cluster: Cluster) -> None:
    engine = await cluster.engine(await cluster.node())

    async with aclosing(engine.stream(dispatch_of({"count": 3, "hang_at": 1}))) as stream:
        assert isinstance(await anext(stream), EngineStarted)
        async with asyncio.timeout(0.5):
            chunk = await anext(stream)

    assert isinstance(chunk, EngineChunk)


async def test_a_slow_reader_holds_the_engine_back(cluster: Cluster) -> None:
    node = await cluster.node()
    engine = await cluster.engine(node)
    orders = {"count": 20_000, "size": 1000}  # 20 MB

    async with aclosing(engine.stream(dispatch_of(orders))) as stream:
        await anext(stream)
        await anext(stream)
        produced = -1
        while produced != node.backend.produced_bytes:
            produced = node.backend.produced_bytes
            await asyncio.sleep(0.2)

        assert produced < 1 << 20  # user space and kernel buffers of both ends
        assert node.server.unsent_bytes <= 256 << 10
        assert engine.buffered_bytes <= 512 << 10
        rest = [event async for event in stream]

    assert node.backend.produced_bytes > 20_000_000
    assert text_of(rest).endswith(event_bytes("r-1", 19_999, 1000))


async def test_a_hundred_slow_readers_need_flat_memory(cluster: Cluster) -> None:
    node = await cluster.node()
    engine = await cluster.engine(node)
    orders = {"count": 1_000_000, "size": 1000}

    async with AsyncExitStack() as stack:
        for number in range(100):
            dispatch = dispatch_of(orders, request_id=f"r-{number}")
            stream = await stack.enter_async_context(aclosing(engine.stream(dispatch)))
            await anext(stream)
        await asyncio.sleep(1.0)
        before = node.backend.produced_bytes
        resident = _resident_bytes()
        await asyncio.sleep(1.0)

        assert node.backend.running == 100
        assert node.backend.produced_bytes == before
        assert before / 100 < 1 << 20
        assert node.server.unsent_bytes / 100 <= 256 << 10
        assert engine.buffered_bytes / 100 <= 512 << 10
        assert _resident_bytes() - resident < 8 << 20

    await eventually(lambda: node.backend.running == 0, within_s=1)


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_a_slow_reader_does_not_slow_the_others(cluster: Cluster) -> None:
    node = await cluster.node()
    engine = await cluster.engine(node)

    async with aclosing(engine.stream(dispatch_of({"count": 9_999, "size": 4000}))) as stuck:
        await anext(stuck)
        await asyncio.sleep(0.3)
        start = time.monotonic()
        for _ in range(20):
            await collect(engine, dispatch_of({"count": 10}))

    assert time.monotonic() - start < 2


async def test_small_writes_are_sent_at_once(cluster: Cluster) -> None:
    node = await cluster.node()
    engine = await cluster.engine(node)
    await collect(engine, dispatch_of())

    ours = engine._replicas["replica-1"]._idle[0]._transport
    theirs = next(s for s in node.server._sessions if s.role == "request")._transport
    for transport in (ours, theirs):
        sock = transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


# -- replicas that fail -----------------------------------------------------------------------


async def test_a_refused_connection_leads_to_another_replica(cluster: Cluster) -> None:
    first, second = await cluster.node("replica-1"), await cluster.node("replica-2")
    engine = await cluster.engine(first, second)
    first.server._listener.close()  # type: ignore[union-attr]  # the state connection still stands

    asked = 0
    for number in range(8):
        events = await collect(engine, dispatch_of({"count": 1}, request_id=f"r-{number}"))
        started = events[0]
        assert isinstance(started, EngineStarted)
        asked += started.replicas_asked

    assert second.backend.calls["chat"] == 8
    assert engine.retries > 0
    assert asked == 8 + engine.retries
    assert engine.in_flight == 0


@pytest.mark.parametrize("error", ["EngineUnavailable", "Overloaded"])
async def test_a_replica_that_says_no_is_asked_once(cluster: Cluster, error: str) -> None:
    nodes = [await cluster.node(f"replica-{n}") for n in range(3)]
    engine = await cluster.engine(*nodes)

    with pytest.raises((EngineUnavailable, Overloaded)) as caught:
        await collect(engine, dispatch_of({"raise_at": -1, "error": error}))

    assert type(caught.value).__name__ == error
    assert [node.backend.calls["chat"] for node in nodes] == [1, 1, 1]


async def test_a_request_is_never_offered_again_once_it_started(cluster: Cluster) -> None:
    nodes = [await cluster.node(f"replica-{n}") for n in range(3)]
    engine = await cluster.engine(*nodes)
    orders = {"count": 5, "raise_at": 0, "error": "EngineUnavailable"}

    with pytest.raises(EngineUnavailable):
        await collect(engine, dispatch_of(orders))

    assert sum(node.backend.calls["chat"] for node in nodes) == 1


async def test_a_refusal_of_the_request_itself_is_not_retried(cluster: Cluster) -> None:
    nodes = [await cluster.node(f"replica-{n}") for n in range(3)]
    engine = await cluster.engine(*nodes)

    with pytest.raises(InvalidRequest):
        await collect(engine, dispatch_of({"raise_at": -1, "error": "InvalidRequest"}))

    assert sum(node.backend.calls["chat"] for node in nodes) == 1


async def test_what_may_have_killed_a_replica_is_not_sent_to_the_next(cluster: Cluster) -> None:
    nodes = [await cluster.node(f"replica-{n}") for n in range(3)]
    engine = await cluster.engine(*nodes)
    task = asyncio.create_task(collect(engine, dispatch_of({"start_delay_s": 60})))
    await eventually(lambda: any(node.backend.running for node in nodes))

    for session in [s for n in nodes for s in n.server._sessions if s.busy]:
        session.abort()

    with pytest.raises(EngineFailed):
        await task
    assert sum(node.backend.calls["chat"] for node in nodes) == 1


@pytest.fixture
def process() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for child in started:
        child.kill()
        child.wait()
        assert child.stdout
        child.stdout.close()


async def test_a_killed_replica_is_known_at_once(
    cluster: Cluster, process: list[subprocess.Popen[str]]
) -> None:
    child, engine = await cluster.distant(process)
    await eventually(lambda: engine.ready("small"), within_s=1)
    stream = engine.stream(dispatch_of({"count": 5, "hang_at": 2}))
    assert isinstance(await anext(stream), EngineStarted)
    await anext(stream)

    child.send_signal(signal.SIGKILL)

    start = time.monotonic()
    with pytest.raises(EngineFailed):
        async for _ in stream:
            pass
    await eventually(lambda: not engine.ready("small"), within_s=1)
    assert time.monotonic() - start < 1
    with pytest.raises(EngineUnavailable):
        await collect(engine, dispatch_of())


async def test_a_frozen_replica_is_not_chosen(
    cluster: Cluster, process: list[subprocess.Popen[str]]
) -> None:
    child, engine = await cluster.distant(process, options=ClientOptions(stale_after_s=0.8))
    await collect(engine, dispatch_of())

    child.send_signal(signal.SIGSTOP)

    await eventually(lambda: not engine.ready("small"), within_s=2)
    with pytest.raises(EngineUnavailable):
        await collect(engine, dispatch_of())


async def test_requests_follow_each_other_on_one_connection_across_processes(
    cluster: Cluster, process: list[subprocess.Popen[str]]
) -> None:
    """The peer's next request can arrive before the replica's loop has run its callbacks."""
    _, engine = await cluster.distant(process)

    for _ in range(500):
        await collect(engine, dispatch_of({"count": 1}))

    assert engine.retries == 0


async def test_a_silent_replica_gets_no_new_requests(cluster: Cluster) -> None:
    node = await cluster.node(heartbeat_s=60)
    engine = await cluster.engine(node, options=ClientOptions(stale_after_s=0.6))

    await eventually(lambda: not engine.ready("small"), within_s=2)
    with pytest.raises(EngineUnavailable):
        await collect(engine, dispatch_of())


async def test_a_new_replica_serves_within_a_second(cluster: Cluster) -> None:
    first = await cluster.node("replica-1")
    engine = await cluster.engine(first)
    second = await cluster.node("replica-2")

    engine.update([first.address, second.address])

    await eventually(lambda: engine._replicas["replica-2"].live, within_s=1)


async def test_a_restarted_listener_is_found_again(cluster: Cluster) -> None:
    node = await cluster.node()
    engine = await cluster.engine(node)
    for session in list(node.server._sessions):
        session.abort()

    await eventually(lambda: not engine.ready("small"), within_s=1)
    await eventually(lambda: engine.ready("small"), within_s=2)
    await collect(engine, dispatch_of())


async def test_an_empty_snapshot_does_not_cut_off_living_replicas(cluster: Cluster) -> None:
    node = await cluster.node()
    engine = await cluster.engine(node)

    engine.update([])
    await collect(engine, dispatch_of())
    await node.server.close()

    await eventually(lambda: not engine.ready("small"), within_s=1)
    await eventually(lambda: engine._replicas["replica-1"].ended, within_s=2)


async def test_another_replica_on_a_known_address_is_not_used(cluster: Cluster) -> None:
    node = await cluster.node("impostor")
    engine = await cluster.engine()

    engine.update([address_of("replica-1", node.address.port)])
    await asyncio.sleep(0.5)

    assert not engine.ready("small")


# -- drain ------------------------------------------------------------------------------------


async def test_drain_finishes_what_runs_and_takes_nothing_new(cluster: Cluster) -> None:
    first, second = await cluster.node("replica-1"), await cluster.node("replica-2")
    engine = await cluster.engine(first)
    running = asyncio.create_task(collect(engine, dispatch_of({"count": 10, "delay_s": 0.05})))
    await eventually(lambda: first.backend.running == 1)
    engine.update([first.address, second.address])
    await eventually(lambda: engine._replicas["replica-2"].live)

    draining = asyncio.create_task(first.server.drain(5))
    await eventually(lambda: not engine._replicas["replica-1"].live, within_s=1)
    for _ in range(5):
        await collect(engine, dispatch_of({"count": 1}))

    assert await draining == 0
    assert text_of(await running) == b"".join(event_bytes("r-1", n) for n in range(10))
    assert first.backend.calls["chat"] == 1
    assert second.backend.calls["chat"] == 5


async def test_a_request_that_crosses_the_drain_goes_elsewhere(cluster: Cluster) -> None:
    first, second = await cluster.node("replica-1"), await cluster.node("replica-2")
    engine = await cluster.engine(first, second)
    first.server.draining = True  # nobody has been told yet

    for number in range(6):
        await collect(engine, dispatch_of({"count": 1}, request_id=f"r-{number}"))

    assert first.backend.calls["chat"] == 0
    assert second.backend.calls["chat"] == 6


async def test_a_drain_is_told_on_every_connection(cluster: Cluster) -> None:
    node = await cluster.node()
    peers = [await cluster.peer(node) for _ in range(2)]
    for peer, role in zip(peers, ("request", "state"), strict=True):
        await peer.hello(connect_ticket(cluster.keys, role), role)
        await peer.receive()

    await node.server.drain(1)

    for peer in peers:
        seen: list[tuple[int, bytes]] = []
        while (FrameType.GOAWAY, b"") not in seen:
            seen += await peer.receive()


async def test_an_answer_that_is_complete_is_not_cut_by_the_end(cluster: Cluster) -> None:
    node = await cluster.node()
    engine = await cluster.engine(node)
    orders = {"count": 600, "size": 1000}
    async with aclosing(engine.stream(dispatch_of(orders))) as stream:
        events = [await anext(stream)]
        closing = asyncio.create_task(_drain_and_close(node))
        await asyncio.sleep(0.3)
        async for event in stream:
            events.append(event)
            await asyncio.sleep(0.002)
    await closing

    assert text_of(events) == b"".join(event_bytes("r-1", n, 1000) for n in range(600))


async def _drain_and_close(node: Node) -> None:
    assert await node.server.drain(5) == 0
    await node.server.close()


async def test_drain_gives_up_after_its_time(cluster: Cluster) -> None:
    node = await cluster.node()
    engine = await cluster.engine(node)
    task = asyncio.create_task(collect(engine, dispatch_of({"count": 5, "hang_at": 1})))
    await eventually(lambda: node.backend.running == 1)

    assert await node.server.drain(0.2) == 1
    await node.server.close()

    with pytest.raises(EngineFailed):
        await task
    assert node.backend.running == 0


# -- bounds and choice ------------------------------------------------------------------------


async def test_a_full_replica_refuses_before_it_costs_anything(cluster: Cluster) -> None:
    node = await cluster.node(max_in_flight=2)
    engine = await cluster.engine(node)
    held = [engine.stream(dispatch_of({"count": 3, "hang_at": 1})) for _ in range(2)]
    for stream in held:
        await anext(stream)

    with pytest.raises(Overloaded) as caught:
        await collect(engine, dispatch_of())

    assert caught.value.retry_after_s == 1
    assert node.server.stats.overloaded == 1
    assert node.backend.calls["chat"] == 2
    for stream in held:
        await stream.aclose()


async def test_a_gateway_bounds_what_it_has_open(cluster: Cluster) -> None:
    node = await cluster.node()
    per_replica = await cluster.engine(node, max_in_flight={"small": 1})
    in_all = await cluster.engine(node, options=ClientOptions(max_open_requests=1))

    for engine in (per_replica, in_all):
        stream = engine.stream(dispatch_of({"count": 3, "hang_at": 1}))
        await anext(stream)
        with pytest.raises(Overloaded):
            await collect(engine, dispatch_of())
        await stream.aclose()
        await collect(engine, dispatch_of())


async def test_load_is_spread(cluster: Cluster) -> None:
    nodes = [await cluster.node(f"replica-{n}") for n in range(3)]
    engine = await cluster.engine(*nodes)

    await asyncio.gather(
        *(collect(engine, dispatch_of({"count": 2, "delay_s": 0.05})) for _ in range(60))
    )

    calls = sorted(node.backend.calls["chat"] for node in nodes)
    assert sum(calls) == 60
    assert calls[-1] - calls[0] <= 8


async def test_a_conversation_stays_with_its_replica_for_all_gateways(cluster: Cluster) -> None:
    nodes = [await cluster.node(f"replica-{n}") for n in range(4)]
    here, there = await cluster.engine(*nodes), await cluster.engine(*nodes)
    await collect(here, dispatch_of(affinity="k" * 32))
    (holder,) = [node for node in nodes if node.backend.calls["chat"]]
    await eventually(
        lambda: "k" * 32 in there._replicas[holder.server.replica_id].state(True).prefixes,
        within_s=1,
    )

    for engine in (here, there) * 4:
        await collect(engine, dispatch_of(affinity="k" * 32))

    assert holder.backend.calls["chat"] == 9


async def test_a_department_leaves_room_when_others_wait(cluster: Cluster) -> None:
    node = await cluster.node()
    engine = await cluster.engine(node, max_in_flight={"small": 4})
    node.backend.waiting = 1
    await eventually(lambda: engine._replicas["replica-1"].state(False).waiting == 1)
    orders = {"count": 3, "hang_at": 1}
    held = [engine.stream(dispatch_of(orders, department=d)) for d in ("hr", "legal", "hr")]
    for stream in held:
        await anext(stream)

    with pytest.raises(Overloaded, match="department"):
        await collect(engine, dispatch_of(department="hr"))
    await collect(engine, dispatch_of(department="legal"))

    for stream in held:
        await stream.aclose()


async def test_state_follows_load_and_beats_when_nothing_changes(cluster: Cluster) -> None:
    node = await cluster.node()
    engine = await cluster.engine(node)
    replica = engine._replicas["replica-1"]

    node.backend.waiting = 17
    assert await eventually(lambda: replica.state(False).waiting == 17, within_s=1) < 0.5

    heard = Counter[float]()
    end = time.monotonic() + 1.6
    while time.monotonic() < end:
        heard[replica._heard_at] += 1
        await asyncio.sleep(0.02)
    assert 3 <= len(heard) <= 5


# -- who is let in ----------------------------------------------------------------------------


class Peer:
    """A hand-made peer that speaks, or misspeaks, the protocol."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._decoder = FrameDecoder(frames.GATEWAY_LIMITS)

    @classmethod
    async def connect(cls, node: Node) -> Peer:
        return cls(*await asyncio.open_connection(node.address.host, node.address.port))

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def hello(
        self, ticket: bytes, role: str = "request", version: int = frames.PROTOCOL_VERSION
    ) -> None:
        text = base64.b64encode(ticket).decode()
        await self.send(
            frames.json_frame(FrameType.HELLO, {"version": version, "role": role, "ticket": text})
        )

    async def receive(self) -> list[tuple[int, bytes]]:
        """Next frames; an empty list when the connection was closed."""
        async with asyncio.timeout(2):
            try:
                while data := await self._reader.read(65536):
                    if got := self._decoder.feed(data):
                        return got
            except ConnectionError:
                pass
        return []

    async def close(self) -> None:
        self._writer.transport.abort()
        with suppress(ConnectionError):
            await self._writer.wait_closed()


def connect_ticket(keys: Keys, role: str = "request") -> bytes:
    return keys.signer().mint_internal("connect", "small", role.encode())


@pytest.mark.parametrize(
    "first",
    [
        b"GET / HTTP/1.1\r\nHost: replica\r\n\r\n",
        struct.pack(">IB", 12 << 20, FrameType.REQUEST) + b"x" * 100_000,
        struct.pack(">IB", 1 << 20, FrameType.HELLO),
        frames.frame(FrameType.HELLO, b"[]"),
        frames.frame(FrameType.HELLO, b"{"),
        frames.json_frame(
            FrameType.HELLO,
            {"version": frames.PROTOCOL_VERSION - 1, "role": "request", "ticket": ""},
        ),
        frames.json_frame(
            FrameType.HELLO, {"version": frames.PROTOCOL_VERSION, "role": "admin", "ticket": ""}
        ),
        frames.frame(FrameType.GOAWAY),
    ],
)
async def test_a_stranger_is_cut_off(cluster: Cluster, first: bytes) -> None:
    node = await cluster.node()
    peer = await cluster.peer(node)

    await peer.send(first)

    assert await peer.receive() == []
    assert node.server.stats.protocol_errors == 1
    await eventually(lambda: node.server.stats.connections == 0)


@pytest.mark.parametrize("role", ["request", "state"])
async def test_a_hello_without_a_good_ticket_learns_nothing(cluster: Cluster, role: str) -> None:
    node = await cluster.node()
    good = connect_ticket(cluster.keys, role)
    bad = {
        "malformed": b"",
        "bad_signature": good[:-1] + bytes([good[-1] ^ 1]),
        "unknown_gateway": connect_ticket(Keys(gateway_id="gw-2"), role),
        "wrong_body": connect_ticket(cluster.keys, "other"),
        "wrong_operation": cluster.keys.signer().mint(dispatch_of(role.encode())),
        "wrong_audience": cluster.keys.signer().mint_internal("connect", "huge", role.encode()),
    }
    for reason, ticket in bad.items():
        peer = await cluster.peer(node)
        await peer.hello(ticket, role)
        ((kind, payload),) = await peer.receive()
        assert kind == FrameType.ERROR
        assert orjson.loads(payload) == {"code": "ticket_refused", "reason": reason}
        assert await peer.receive() == []
        assert node.verifier.refused[reason] == 1


async def test_a_request_needs_a_ticket_of_its_own(cluster: Cluster) -> None:
    node = await cluster.node()
    signer = cluster.keys.signer()
    peer = await cluster.peer(node)
    await peer.hello(connect_ticket(cluster.keys))
    await peer.receive()

    async def ask(ticket: bytes, operation: str, body: bytes) -> Any:
        header = {"ticket": base64.b64encode(ticket).decode(), "operation": operation}
        await peer.send(frames.request_prefix(FrameType.REQUEST, header, body) + body)
        last = None
        while last is None or last[0] not in (FrameType.ERROR, FrameType.FINISHED):
            last = (await peer.receive())[-1]
        return orjson.loads(last[1])["reason"] if last[0] == FrameType.ERROR else last[0]

    body = b'{"count": 1}'
    good = signer.mint(dispatch_of(body), None, "replica-1")
    assert await ask(b"", "chat", body) == "malformed"
    assert await ask(connect_ticket(cluster.keys), "chat", b"request") == "wrong_operation"
    assert await ask(
        signer.mint_internal(DETOKENIZE, "small", body, "replica-1"), "chat", body
    ) == ("wrong_operation")
    assert await ask(good, "chat", body + b" ") == "wrong_body"
    assert await ask(good, "completions", body) == "wrong_operation"
    assert await ask(signer.mint(dispatch_of(body, model="huge")), "chat", body) == (
        "wrong_audience"
    )
    assert not node.backend.calls
    assert await ask(good, "chat", body) == FrameType.FINISHED
    assert await ask(good, "chat", body) == "replayed"
    assert node.backend.calls["chat"] == 1


async def test_a_detokenize_ticket_is_not_a_request(cluster: Cluster) -> None:
    node = await cluster.node()
    peer = await cluster.peer(node)
    await peer.hello(connect_ticket(cluster.keys))
    await peer.receive()
    body = b"[[1]]"
    ticket = cluster.keys.signer().mint_internal(DETOKENIZE, "small", body, "replica-1")
    header = {"ticket": base64.b64encode(ticket).decode(), "operation": DETOKENIZE}

    await peer.send(frames.request_prefix(FrameType.REQUEST, header, body) + body)

    assert await peer.receive() == []
    assert not node.backend.calls


async def test_two_requests_at_once_on_a_connection_end_it(cluster: Cluster) -> None:
    node = await cluster.node()
    peer = await cluster.peer(node)
    await peer.hello(connect_ticket(cluster.keys))
    await peer.receive()
    body = b'{"start_delay_s": 60}'
    for _ in range(2):
        ticket = cluster.keys.signer().mint(dispatch_of(body), None, "replica-1")
        header = {"ticket": base64.b64encode(ticket).decode(), "operation": "chat"}
        await peer.send(frames.request_prefix(FrameType.REQUEST, header, body) + body)

    assert await peer.receive() == []
    await eventually(lambda: node.server.stats.in_flight == 0, within_s=1)
    assert node.backend.running == 0


async def test_a_silent_stranger_is_dropped(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.data_plane.session.HELLO_TIMEOUT_S", 0.2)
    node = await cluster.node()
    peer = await cluster.peer(node)

    assert await peer.receive() == []


async def test_connections_are_bounded(cluster: Cluster) -> None:
    node = await cluster.node(max_connections=2)
    for _ in range(3):
        await cluster.peer(node)

    await eventually(lambda: node.server.stats.connections_refused == 1)
    assert node.server.stats.connections == 2


async def test_refused_tickets_are_counted_on_both_ends(cluster: Cluster) -> None:
    node = await cluster.node()
    engine = await cluster.engine(node)
    await collect(engine, dispatch_of())  # leaves a connection, so the request's ticket is refused
    cluster.keys.known[cluster.keys.gateway_id] = Keys().known["gw-1"]

    with pytest.raises(InternalError):
        await collect(engine, dispatch_of())

    assert node.verifier.refused["bad_signature"] == 1
    assert engine.refused == {"bad_signature": 1}


async def test_nonsense_from_a_replica_fails_the_request(cluster: Cluster) -> None:
    node = await cluster.node()
    engine = await cluster.engine(node)
    stream = engine.stream(dispatch_of({"count": 3, "hang_at": 1}))
    await anext(stream)
    session = next(s for s in node.server._sessions if s.busy)

    session._transport.write(struct.pack(">IB", 1 << 30, FrameType.CHUNK))

    with pytest.raises(EngineFailed):
        async for _ in stream:
            pass
    await eventually(lambda: node.backend.running == 0, within_s=1)
