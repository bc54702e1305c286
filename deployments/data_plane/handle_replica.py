"""The replica's end of the Serve handle path: tickets as on the socket, picklable tuples out.

An engine deployment delegates its ``run`` and ``detokenize`` methods to this. Knows no Ray.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson

from deployments.data_plane.backend import Backend
from deployments.data_plane.session import DETOKENIZE, INTERNAL_OPERATIONS
from deployments.data_plane.tickets import TicketRefusal, TicketRefused, TicketVerifier
from governance.errors import EngineFailed
from governance.types import EngineChunk, EngineEvent, EngineFinished, EngineStarted, Usage

WireEvent = tuple[Any, ...]
"""``("started", replica_id, model_version, engine_version, prompt_tokens)``,
``("chunk", data, tokens, gpu_us)``,
``("finished", prompt, completion, cached, usage_event, gpu_us)``."""


def to_wire(event: EngineEvent) -> WireEvent:
    """An event as a tuple, which pickles at a third of the size and time of a dataclass."""
    if isinstance(event, EngineChunk):
        return ("chunk", event.data, event.tokens, event.gpu_us)
    if isinstance(event, EngineStarted):
        return (
            "started",
            event.replica_id,
            event.model_version,
            event.engine_version,
            event.prompt_tokens,
        )
    usage = event.usage
    return (
        "finished",
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.cached_tokens,
        event.usage_event,
        event.gpu_us,
    )


def from_wire(item: WireEvent) -> EngineEvent:
    """The event of a tuple.

    Raises:
        EngineFailed: It is not one of ours.

    """
    match item:
        case ("chunk", data, tokens, gpu_us):
            return EngineChunk(data, tokens, gpu_us)
        case ("started", replica_id, model_version, engine_version, prompt_tokens):
            return EngineStarted(replica_id, model_version, engine_version, prompt_tokens)
        case ("finished", prompt, completion, cached, usage_event, gpu_us):
            return EngineFinished(Usage(prompt, completion, cached), usage_event, gpu_us)
        case _:
            raise EngineFailed()


class HandleReplica:
    """Verifies the ticket of each call, then runs the backend.

    Args:
        backend: The engine; the same object that the ``DataPlaneServer`` drives.
        verifier: The same verifier too, so that a ticket used on one path is used up on both.

    """

    def __init__(self, backend: Backend, verifier: TicketVerifier) -> None:
        self._backend = backend
        self._verifier = verifier

    async def run(
        self, ticket: bytes, operation: str, body: bytes
    ) -> AsyncGenerator[WireEvent, None]:
        """Answer one request.

        Raises:
            TicketRefused: The ticket does not admit it.
            GatehouseError: As the backend raised it.

        """
        if operation in INTERNAL_OPERATIONS:
            raise TicketRefused(TicketRefusal.WRONG_OPERATION)
        verified = self._verifier.verify(ticket, operation=operation, body=body)
        async with aclosing(self._backend.run(operation, body, verified)) as events:
            async for event in events:
                yield to_wire(event)
                if isinstance(event, EngineFinished):
                    # Serve has taken it: it asks for the next one.
                    self._backend.delivered(verified)

    async def detokenize(self, ticket: bytes, body: bytes) -> list[str]:
        """Text of the token-id prompts in ``body`` (JSON).

        Raises:
            TicketRefused: The ticket does not admit it.
            GatehouseError: As the backend raised it.

        """
        verified = self._verifier.verify(ticket, operation=DETOKENIZE, body=body)
        return await self._backend.detokenize(verified.audience, orjson.loads(body))
