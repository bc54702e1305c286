"""A replica in a process of its own, for tests that kill it: prints its port and serves."""

from __future__ import annotations

import asyncio
import sys

import uvloop

from deployments.data_plane.server import DataPlaneServer
from deployments.data_plane.tickets import TicketVerifier
from tests.fakes import FakeBackend


async def main(replica_id: str, gateway_id: str, public_key: bytes) -> None:
    verifier = TicketVerifier({"small", "small-lora"}, lambda: {gateway_id: public_key})
    server = DataPlaneServer(FakeBackend(replica_id), verifier, replica_id)
    print(await server.start(), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], bytes.fromhex(sys.argv[3])))
