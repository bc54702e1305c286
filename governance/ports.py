"""What the request path needs from outside: one protocol a stage.

An adapter lives in ``deployments``; a stage that is not configured uses the null implementation
of ``governance.nulls``, which is honest about doing nothing.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Protocol

from governance.types import (
    Decision,
    Dispatch,
    EngineChunk,
    EngineEvent,
    InferenceRequest,
    Inspection,
    ModelInfo,
    Principal,
    Reservation,
    Route,
    TextLeaf,
    Turn,
)

Clock = Callable[[], int]
"""Wall clock in microseconds since the epoch."""


class Authenticator(Protocol):
    """identify: credential in, principal out."""

    async def authenticate(self, authorization: str | None) -> Principal:
        """Verify the value of an Authorization header.

        Raises:
            Unauthenticated: No, wrong, expired or revoked credential.
            IdentityUnavailable: The issuer's keys cannot be had.
            ControlUnavailable: The copy of keys and revocations is too old.
        """
        ...


class Policy(Protocol):
    """model visible? and decide."""

    digest: str

    def visible(self, principal: Principal, model: ModelInfo) -> bool:
        """Whether the principal may use the model for at least one operation."""
        ...

    def decide(
        self,
        principal: Principal,
        model: ModelInfo,
        operation: str,
        inspection: Inspection | None = None,
    ) -> Decision:
        """Exactly one effect for the request; total, and deny by default."""
        ...


class Inspector(Protocol):
    """inspect input and inspect output."""

    name: str

    async def inspect_input(self, leaves: Iterable[TextLeaf]) -> Inspection:
        """Look at every string of a request once."""
        ...

    def open_output(self, turn: Turn) -> OutputInspection:
        """Start to inspect one answer."""
        ...


class OutputInspection(Protocol):
    """Inspects one answer incrementally; releases only what it has seen."""

    def feed(self, chunk: EngineChunk) -> EngineChunk | None:
        """Take a chunk in; give what may be released now, if anything."""
        ...

    def finish(self) -> tuple[EngineChunk | None, Inspection]:
        """Release the rest and report."""
        ...


class Router(Protocol):
    """route: choose among the models that policy permits. Knows no policy."""

    async def route(self, request: InferenceRequest, permitted: Sequence[ModelInfo]) -> Route:
        """Pick one of ``permitted`` (never empty)."""
        ...


class Ledger(Protocol):
    """reserve and settle."""

    async def reserve(self, turn: Turn) -> Reservation:
        """Hold what the request may cost.

        Raises:
            BudgetExhausted: The account cannot cover it.
        """
        ...

    async def settle(self, turn: Turn) -> None:
        """Replace the hold by what was used; repeating it changes nothing."""
        ...


class AuditLog(Protocol):
    """record decided, record completed."""

    async def decided(self, turn: Turn) -> None:
        """Make the decision durable before any model sees the request.

        Raises:
            AuditUnavailable: It cannot be written.
        """
        ...

    async def completed(self, turn: Turn) -> None:
        """Make the outcome durable before the end of the answer is released."""
        ...


class Engine(Protocol):
    """stream: one exchange with some replica of a model's engine."""

    def stream(self, dispatch: Dispatch) -> AsyncGenerator[EngineEvent, None]:
        """Run a request: ``EngineStarted``, any number of ``EngineChunk``, ``EngineFinished``.

        Closing the generator aborts the request in the engine within a second. A consumer that
        does not read holds the engine's sender back; memory stays bounded.

        Raises:
            EngineUnavailable: No replica can take the request.
            EngineFailed: The replica or its engine died, before or in mid-stream.
            InvalidRequest: The engine refused the request.
        """
        ...

    async def detokenize(self, base_model: str, prompts: list[list[int]]) -> list[str]:
        """Text of token-id prompts, by the model's own tokenizer.

        Raises:
            InvalidRequest: An id is outside the vocabulary.
            EngineUnavailable: No replica can be asked.
        """
        ...

    def ready(self, base_model: str) -> bool:
        """Whether at least one replica of this model can take requests."""
        ...
