"""What a replica's engine offers to the data plane."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from deployments.data_plane.ticket_form import Ticket
from governance.types import EngineEvent


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Numbers that an engine reports about itself."""

    running: int = 0
    """Requests in the running batch."""
    waiting: int = 0
    """Requests that wait for a place in it."""
    kv_usage_milli: int = 0
    """Share of the KV cache in use, in thousandths."""
    waiting_by_class: tuple[int, int, int] = (0, 0, 0)
    """Of ``waiting``: critical, standard, batch."""
    oldest_wait_us: tuple[int, int, int] = (0, 0, 0)
    """Longest wait of those that wait now, in the same order."""


class Backend(Protocol):
    """An engine, as ``DataPlaneServer`` and ``HandleReplica`` drive it."""

    def run(self, operation: str, body: bytes, ticket: Ticket) -> AsyncGenerator[EngineEvent, None]:
        """Answer one request whose ticket has been verified.

        Gives ``EngineStarted``, any number of ``EngineChunk``, ``EngineFinished``. It is cancelled
        or closed when the peer goes, and must then abort the engine's work.

        Raises:
            GatehouseError: The request cannot be answered, before or after ``EngineStarted``.

        """
        ...

    def delivered(self, ticket: Ticket) -> None:
        """``EngineFinished`` of this ticket's answer was handed to the connection to its gateway.

        Never called for an answer that the gateway did not wait for.
        """
        ...

    async def detokenize(self, model: str, prompts: list[list[int]]) -> list[str]:
        """Text of token-id prompts.

        Raises:
            InvalidRequest: An id is outside the vocabulary.

        """
        ...

    def load(self) -> EngineLoad:
        """Current load; called up to ten times a second."""
        ...
