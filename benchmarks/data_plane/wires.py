"""The wire forms: for each a server and an ``Engine``-like client, with the same ticket work.

``frames``   ours: length-prefixed frames on ``asyncio.Protocol``
``streams``  the same frames on asyncio's StreamReader and StreamWriter
``aiohttp``  HTTP/1.1, chunked: aiohttp server, aiohttp client
``uvicorn``  HTTP/1.1, chunked: uvicorn (httptools, bare ASGI) server, aiohttp client

The HTTP forms are the leanest that carry the same facts: ticket and operation in request headers,
EngineStarted in response headers, EngineFinished as a last line, without which an answer is not
complete.
"""

from __future__ import annotations

import asyncio
import base64
import random
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import aiohttp
import uvicorn
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.data_plane.instant import FINISHED, MODEL, InstantBackend
from deployments.data_plane import frames
from deployments.data_plane.client import DataPlaneEngine
from deployments.data_plane.frames import FrameType
from deployments.data_plane.server import DataPlaneServer
from deployments.data_plane.tickets import TicketSigner, TicketVerifier
from governance.control.snapshot import ReplicaAddress
from governance.types import Dispatch, EngineChunk, EngineEvent, EngineFinished, EngineStarted

SEED = 7
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIGNER = TicketSigner("gw-1", KEY)
END = b"finished 20 54 0\n"

Client = Callable[[Dispatch], AsyncGenerator[EngineEvent, None]]
Close = Callable[[], Awaitable[None]]


serving: list[object] = []
"""Keeps servers and their tasks alive."""


def verifier_of() -> TicketVerifier:
    """The replica's verifier."""
    return TicketVerifier({MODEL}, lambda: {"gw-1": SIGNER.public_key})


def _ticket(dispatch: Dispatch) -> str:
    return base64.b64encode(SIGNER.mint(dispatch)).decode()


# -- ours -------------------------------------------------------------------------------------


async def serve_frames() -> int:
    """Start ``DataPlaneServer``; gives its port."""
    server = DataPlaneServer(InstantBackend(), verifier_of(), "replica-1")
    serving.append(server)
    return await server.start()


async def dial_frames(port: int) -> tuple[Client, Close]:
    """Connect ``DataPlaneEngine``."""
    engine = DataPlaneEngine(SIGNER, rng=random.Random(SEED))
    address = ReplicaAddress("replica-1", MODEL, (MODEL,), "127.0.0.1", port, "", "")
    engine.update([address])
    while not engine.ready(MODEL):  # noqa: ASYNC110 - it has no event, and needs none
        await asyncio.sleep(0.01)
    return engine.stream, engine.close


# -- the same frames on asyncio streams ---------------------------------------------------------


async def serve_streams() -> int:
    """Start a server of frames on asyncio streams; gives its port."""
    backend, verifier = InstantBackend(), verifier_of()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                length, _ = frames.HEADER.unpack(await reader.readexactly(5))
            except asyncio.IncompleteReadError:
                return
            header, body = frames.parse_request(await reader.readexactly(length))
            operation = header["operation"]
            ticket = verifier.verify(
                base64.b64decode(header["ticket"]), operation=operation, body=body
            )
            async for event in backend.run(operation, body, ticket):
                if isinstance(event, EngineChunk):
                    writer.write(frames.chunk_frame(event.data, event.tokens, event.gpu_us))
                elif isinstance(event, EngineStarted):
                    writer.write(frames.started_frame(event))
                else:
                    writer.write(frames.finished_frame(event))
                await writer.drain()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    serving.append(server)
    return int(server.sockets[0].getsockname()[1])


async def dial_streams(port: int) -> tuple[Client, Close]:
    """Give a client of frames on asyncio streams, with a pool."""
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def stream(dispatch: Dispatch) -> AsyncGenerator[EngineEvent, None]:
        pair = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
        reader, writer = pair
        header = {"ticket": _ticket(dispatch), "operation": dispatch.operation.value}
        writer.write(
            frames.request_prefix(FrameType.REQUEST, header, dispatch.body) + dispatch.body
        )
        await writer.drain()
        while True:
            length, kind = struct.unpack(">IB", await reader.readexactly(5))
            payload = await reader.readexactly(length)
            if kind == FrameType.CHUNK:
                yield frames.parse_chunk(payload)
            elif kind == FrameType.STARTED:
                yield frames.parse_started(payload)
            else:
                idle.append(pair)
                yield frames.parse_finished(payload)
                return

    async def close() -> None:
        for _, writer in idle:
            writer.close()

    return stream, close


# -- HTTP/1.1 -----------------------------------------------------------------------------------


async def serve_aiohttp() -> int:
    """Start the HTTP server on aiohttp; gives its port."""
    backend, verifier = InstantBackend(), verifier_of()

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        operation = request.headers["x-operation"]
        ticket = verifier.verify(
            base64.b64decode(request.headers["x-ticket"]), operation=operation, body=body
        )
        response = web.StreamResponse()
        async for event in backend.run(operation, body, ticket):
            if isinstance(event, EngineChunk):
                await response.write(event.data)
            elif isinstance(event, EngineStarted):
                response.headers.update(_started_headers(event))
                response.enable_chunked_encoding()
                await response.prepare(request)
            else:
                await response.write(END)
        return response

    app = web.Application(client_max_size=frames.MAX_REQUEST_BYTES)
    app.router.add_post("/", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return int(runner.addresses[0][1])


def _started_headers(event: EngineStarted) -> dict[str, str]:
    return {
        "x-replica": event.replica_id,
        "x-model-version": event.model_version,
        "x-engine": event.engine_version,
    }


async def serve_uvicorn() -> int:
    """Start the HTTP server on uvicorn, as a bare ASGI application; gives its port."""
    backend, verifier = InstantBackend(), verifier_of()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        sent = dict(scope["headers"])
        operation = sent[b"x-operation"].decode()
        ticket = verifier.verify(
            base64.b64decode(sent[b"x-ticket"]), operation=operation, body=body
        )
        async for event in backend.run(operation, body, ticket):
            if isinstance(event, EngineChunk):
                message = {"type": "http.response.body", "body": event.data, "more_body": True}
            elif isinstance(event, EngineStarted):
                headers = [(k.encode(), v.encode()) for k, v in _started_headers(event).items()]
                message = {"type": "http.response.start", "status": 200, "headers": headers}
            else:
                message = {"type": "http.response.body", "body": END}
            await send(message)

    config = uvicorn.Config(
        app,
        port=0,
        lifespan="off",
        http="httptools",
        ws="none",
        access_log=False,
        log_level="error",
        server_header=False,
    )
    server = uvicorn.Server(config)
    serving.append(asyncio.create_task(server.serve()))
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event
        await asyncio.sleep(0.01)
    return int(server.servers[0].sockets[0].getsockname()[1])


async def dial_http(port: int) -> tuple[Client, Close]:
    """Give an aiohttp client with a pool."""
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), skip_auto_headers=("user-agent", "accept")
    )
    url = f"http://127.0.0.1:{port}/"

    async def stream(dispatch: Dispatch) -> AsyncGenerator[EngineEvent, None]:
        headers = {"x-ticket": _ticket(dispatch), "x-operation": dispatch.operation.value}
        async with session.post(url, data=dispatch.body, headers=headers) as response:
            got = response.headers
            yield EngineStarted(got["x-replica"], got["x-model-version"], got["x-engine"])
            finished: EngineFinished | None = None
            async for data in response.content.iter_any():
                if data.endswith(END):
                    finished = FINISHED
                    data = data[: -len(END)]
                if data:
                    yield EngineChunk(data)
            if finished is None:
                raise ConnectionError("cut short")
            yield finished

    return stream, session.close


SERVERS: dict[str, Callable[[], Awaitable[int]]] = {
    "frames": serve_frames,
    "streams": serve_streams,
    "aiohttp": serve_aiohttp,
    "uvicorn": serve_uvicorn,
}
CLIENTS: dict[str, Callable[[int], Awaitable[tuple[Client, Close]]]] = {
    "frames": dial_frames,
    "streams": dial_streams,
    "aiohttp": dial_http,
    "uvicorn": dial_http,
}
