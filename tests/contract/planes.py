"""Set-ups that the engine port's contract tests share."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deployments.data_plane.client import DataPlaneEngine
from deployments.data_plane.handle_engine import HandleEngine
from deployments.data_plane.handle_replica import HandleReplica
from deployments.data_plane.server import DataPlaneServer
from deployments.data_plane.tickets import TicketSigner, TicketVerifier
from governance.control.snapshot import ReplicaAddress
from governance.types import Dispatch, EngineChunk, EngineEvent
from tests.fakes import MODEL_VERSION, FakeBackend, FakeHandle

PATIENCE_S = 5.0
"""For what has no bound of its own; the bounds that are promised are asserted apart."""


async def eventually(condition: Callable[[], object], within_s: float = PATIENCE_S) -> float:
    """Wait until the condition holds; the time that it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < within_s, "did not happen in time"
        await asyncio.sleep(0.01)
    return time.monotonic() - start


async def collect(engine: Any, dispatch: Dispatch) -> list[EngineEvent]:
    """All events of an exchange."""
    async with aclosing(engine.stream(dispatch)) as events:
        return [event async for event in events]


def text_of(events: list[EngineEvent]) -> bytes:
    """What the chunks of an exchange amount to."""
    return b"".join(event.data for event in events if isinstance(event, EngineChunk))


@dataclass
class Keys:
    """A gateway's identity, and what engines know of it."""

    private: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    known: dict[str, bytes] = field(default_factory=dict)
    gateway_id: str = "gw-1"

    def __post_init__(self) -> None:
        self.known[self.gateway_id] = self.private.public_key().public_bytes_raw()

    def signer(self) -> TicketSigner:
        return TicketSigner(self.gateway_id, self.private)

    def verifier(self, **options: Any) -> TicketVerifier:
        return TicketVerifier({"small", "small-lora"}, lambda: self.known, **options)


@dataclass
class Node:
    """One replica on a socket, in this process."""

    backend: FakeBackend
    verifier: TicketVerifier
    server: DataPlaneServer
    address: ReplicaAddress


async def start_node(keys: Keys, replica_id: str = "replica-1", **options: Any) -> Node:
    backend, verifier = FakeBackend(replica_id), keys.verifier()
    tls = options.pop("tls", None)
    server = DataPlaneServer(backend, verifier, replica_id, **options)
    port = await server.start(tls=tls)
    return Node(backend, verifier, server, address_of(replica_id, port))


def address_of(replica_id: str, port: int) -> ReplicaAddress:
    return ReplicaAddress(
        replica_id, "small", ("small", "small-lora"), "127.0.0.1", port, MODEL_VERSION, "fake-1"
    )


async def start_engine(keys: Keys, *nodes: Node, **options: Any) -> DataPlaneEngine:
    """A gateway's engine that has heard of all nodes."""
    engine = DataPlaneEngine(keys.signer(), rng=random.Random(7), **options)
    engine.update([node.address for node in nodes])
    await eventually(lambda: all(engine._replicas[n.address.replica_id].live for n in nodes))
    return engine


@dataclass
class Plane:
    """The port over one transport, with what stands behind it."""

    engine: Any
    backend: FakeBackend
    verifier: TicketVerifier
    keys: Keys
    kill: Callable[[], Awaitable[None]]
    close: Callable[[], Awaitable[None]]


async def socket_plane(**options: Any) -> Plane:
    keys = Keys()
    node = await start_node(keys)
    engine = await start_engine(keys, node, **options)

    async def close() -> None:
        await engine.close()
        await node.server.close()

    return Plane(engine, node.backend, node.verifier, keys, node.server.close, close)


async def handle_plane(**options: Any) -> Plane:
    keys = Keys()
    backend, verifier = FakeBackend(), keys.verifier()
    handle = FakeHandle(HandleReplica(backend, verifier))
    engine = HandleEngine({"small": handle}, keys.signer(), **options)
    return Plane(engine, backend, verifier, keys, handle.die, engine.close)


PLANES = {"socket": socket_plane, "handle": handle_plane}
