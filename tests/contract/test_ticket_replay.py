"""A request that was listened to, sent again where nobody remembers its ticket."""

from __future__ import annotations

import base64

import orjson

from deployments.data_plane import frames
from deployments.data_plane.frames import FrameType
from tests.contract.planes import Keys, start_engine, start_node
from tests.contract.test_data_plane import Peer, connect_ticket
from tests.fakes import dispatch_of

BODY = b'{"count": 1}'


async def replayed_at(replica_id: str, keys: Keys, ticket: bytes) -> str:
    """What a replica that is new answers to the ticket of another one."""
    node = await start_node(keys, replica_id)
    peer = await Peer.connect(node)
    try:
        await peer.hello(connect_ticket(keys))
        await peer.receive()
        header = {"ticket": base64.b64encode(ticket).decode(), "operation": "chat"}
        await peer.send(frames.request_prefix(FrameType.REQUEST, header, BODY) + BODY)
        kind, payload = (await peer.receive())[-1]
        assert not node.backend.calls
        assert kind == FrameType.ERROR
        return str(orjson.loads(payload)["reason"])
    finally:
        await peer.close()
        await node.server.close()


async def test_a_ticket_is_good_at_one_replica_of_a_model() -> None:
    keys = Keys()
    ticket = keys.signer().mint(dispatch_of(BODY), None, "replica-1")
    assert await replayed_at("replica-2", keys, ticket) == "wrong_replica"


async def test_a_ticket_for_whichever_replica_serve_picks_is_not_good_on_a_socket() -> None:
    keys = Keys()
    ticket = keys.signer().mint(dispatch_of(BODY))
    assert await replayed_at("replica-1", keys, ticket) == "wrong_replica"


async def test_each_attempt_has_a_ticket_for_the_replica_that_it_goes_to() -> None:
    keys = Keys()
    nodes = [await start_node(keys, f"replica-{i}") for i in (1, 2)]
    engine = await start_engine(keys, *nodes)
    for number in range(8):
        async for _ in engine.stream(dispatch_of(BODY, request_id=f"r-{number}")):
            pass
    for node in nodes:
        assert node.backend.tickets
        for ticket in node.backend.tickets:
            assert ticket.replica_id == node.address.replica_id
    await engine.close()
    for node in nodes:
        await node.server.close()
