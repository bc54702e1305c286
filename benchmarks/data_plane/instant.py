"""The engine that all wire forms are measured with: it costs next to nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

from deployments.data_plane.backend import EngineLoad
from deployments.data_plane.ticket_form import Ticket
from governance.types import (
    Dispatch,
    EngineChunk,
    EngineEvent,
    EngineFinished,
    EngineStarted,
    Operation,
    Usage,
)

STREAM_EVENTS = 54
PACE_MS = 2
MODEL = "small"
STARTED = EngineStarted("replica-1", "sha256:" + "00" * 32, "instant")
FINISHED = EngineFinished(Usage(20, STREAM_EVENTS), b"")
PLAIN = b"data: " + b"x" * 592 + b"\n\n"
EVENT = (
    b'data: {"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1,'
    b'"model":"small","choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]}'
    b"\n\n"
)
BODIES = {
    kind: json.dumps(
        {
            "model": MODEL,
            "stream": kind != "plain",
            "pace_ms": PACE_MS if kind == "paced" else 0,
            "messages": [{"role": "user", "content": "word " * 80}],
        }
    ).encode()
    for kind in ("plain", "stream", "paced")
}


def dispatch_of(kind: str) -> Dispatch:
    """The request of a kind: ``plain``, ``stream`` or ``paced``."""
    return Dispatch(
        request_id="0123456789abcdef",
        decision_id="fedcba9876543210",
        model=MODEL,
        base_model=MODEL,
        operation=Operation.CHAT,
        body=BODIES[kind],
        principal_key="00" * 32,
        department="department",
        priority=0,
        max_tokens=256,
        reservation_id="0123456789abcdef",
        affinity="0123456789abcdef0123456789abcdef",
    )


class InstantBackend:
    """One event of 600 bytes, or 54 events of one token each, at once or ``PACE_MS`` apart.

    It suspends before each event of a stream, as a real engine does. At once, a receiver that is
    slower than the sender finds several events in one read and handles them together; paced, each
    event is sent, received and handled alone, as with a real engine.
    """

    def load(self) -> EngineLoad:
        """No load."""
        return EngineLoad()

    def delivered(self, ticket: Ticket) -> None:
        """Nothing is metered."""

    async def detokenize(self, model: str, prompts: list[list[int]]) -> list[str]:
        """Not measured; each prompt is an empty text."""
        return ["" for _ in prompts]

    async def run(
        self, operation: str, body: bytes, ticket: Ticket
    ) -> AsyncGenerator[EngineEvent, None]:
        """Answer at once."""
        yield STARTED
        if b'"stream": true' not in body:
            yield EngineChunk(PLAIN)
        else:
            pace_s = json.loads(body)["pace_ms"] / 1000
            for _ in range(STREAM_EVENTS):
                await asyncio.sleep(pace_s)
                yield EngineChunk(EVENT)
        yield FINISHED
