"""Engines that answer at once, so that what is measured is what stands in front of them.

Both give the answers of ``mock_upstream.c``: 24 tokens for a plain request; for a streamed one a
role chunk, 50 content chunks, a stop chunk and usage (54 events with ``[DONE]``). A prompt that
says ``pace=N`` spaces the chunks by N milliseconds, so that none can be coalesced.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson

from deployments.control_actor import ControlClient
from deployments.data_plane.backend import EngineLoad
from deployments.data_plane.handle_replica import HandleReplica, WireEvent
from deployments.data_plane.server import DataPlaneServer
from deployments.data_plane.tickets import Ticket, TicketVerifier
from governance.control.snapshot import ReplicaAddress
from governance.types import EngineChunk, EngineEvent, EngineFinished, EngineStarted, Usage

STREAM_WORDS = (" word",) * 50
_TEXT = (
    "The quick brown fox jumps over the lazy dog and keeps running through the quiet forest "
    "until the evening light slowly fades far away."
)
PLAIN_WORDS = tuple(f"{' ' * bool(number)}{word}" for number, word in enumerate(_TEXT.split()))
_PACE = re.compile(rb"pace=(\d+)")
_HEAD = {"id": "chatcmpl-mock", "object": "chat.completion.chunk", "created": 1700000000}


def event(choices: list[dict[str, Any]], **extra: Any) -> bytes:
    """One server-sent event of the mock model."""
    body = {**_HEAD, "model": "mock-8b", "choices": choices, **extra}
    return b"data: " + orjson.dumps(body) + b"\n\n"


def chunk(delta: dict[str, str], finish: str | None = None) -> bytes:
    """An event with one choice."""
    return event([{"index": 0, "delta": delta, "finish_reason": finish}])


_FIRST = chunk({"role": "assistant", "content": ""})
_LAST = chunk({}, "stop")
_USAGE = event([], usage={"prompt_tokens": 32, "completion_tokens": 50, "total_tokens": 82})


class InstantBackend:
    """Implements the data plane's ``Backend`` without a model."""

    def __init__(self, replica_id: str) -> None:
        self._replica_id = replica_id
        self._word = [chunk({"content": word}) for word in STREAM_WORDS]
        self._plain = [chunk({"content": word}) for word in PLAIN_WORDS]

    async def run(
        self, operation: str, body: bytes, ticket: Ticket
    ) -> AsyncGenerator[EngineEvent, None]:
        """Answer; ``words=50`` in the prompt asks for the long answer of the streamed case."""
        pace = _PACE.search(body)
        words = self._word if b"words=50" in body else self._plain
        yield EngineStarted(self._replica_id, "sha256:" + "0" * 64, "instant", 32)
        yield EngineChunk(_FIRST)
        for number, word in enumerate(words, 2):
            if pace:
                await asyncio.sleep(int(pace[1]) / 1000)
            yield EngineChunk(word, 1, 100 * number)
        yield EngineChunk(_LAST, 0, 100 * len(words) + 100)
        yield EngineFinished(Usage(32, len(words)), _USAGE, 100 * len(words) + 100)

    async def detokenize(self, model: str, prompts: list[list[int]]) -> list[str]:
        """Not part of the measurement."""
        return ["" for _ in prompts]

    def load(self) -> EngineLoad:
        """An instant engine has none."""
        return EngineLoad()

    def delivered(self, ticket: Ticket) -> None:
        """Nothing is metered."""


class InstantEngine:
    """Engine deployment around ``InstantBackend``, for ``deployments.app.assemble``."""

    async def __init__(  # type: ignore[misc]
        self, model: dict[str, Any], state_dir: str, host: str | None = None
    ) -> None:
        self._control = ControlClient(state_dir)
        replica_id = f"instant-{os.getpid()}"

        def keys() -> dict[str, bytes]:
            return {g.gateway_id: g.public_key for g in self._control.snapshot.gateways}

        verifier = TicketVerifier([model["id"]], keys, lambda: time.time_ns() // 1000)
        backend = self.make_backend(replica_id, model, state_dir)
        self._handles = HandleReplica(backend, verifier)
        self._server = DataPlaneServer(backend, verifier, replica_id, max_in_flight=4096)
        port = await self._server.start(host or "127.0.0.1")
        version = "sha256:" + "0" * 64
        address = ReplicaAddress(
            replica_id, model["id"], (model["id"],), "127.0.0.1", port, version, "instant"
        )
        await self._control.start(address)

    def make_backend(self, replica_id: str, model: dict[str, Any], state_dir: str) -> Any:
        """What answers."""
        return InstantBackend(replica_id)

    async def run(
        self, ticket: bytes, operation: str, body: bytes
    ) -> AsyncGenerator[WireEvent, None]:
        """Answer through a Serve handle, the fallback of the data plane."""
        async with aclosing(self._handles.run(ticket, operation, body)) as events:
            async for event in events:
                yield event

    async def __del__(self) -> None:
        await self._server.close()
        await self._control.stop()
