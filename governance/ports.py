"""What the request path needs from outside: one protocol a stage.

An adapter lives in ``deployments``; a stage that is not configured uses the null implementation
of ``governance.nulls``, which is honest about doing nothing.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Protocol

from governance.budget.messages import AccountState
from governance.types import (
    Amount,
    BudgetAsk,
    Charge,
    Decision,
    Dispatch,
    EngineChunk,
    EngineEvent,
    Inspection,
    ModelInfo,
    Principal,
    Reservation,
    Route,
    RouteAsk,
    TextLeaf,
    Turn,
    Usage,
)
from routing.types import ModelLoad, Verdict

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

    choices: frozenset[str]
    """Ids of the models that it chooses among for a caller who leaves the choice to the platform;
    empty where that is not offered."""

    async def route(self, ask: RouteAsk) -> Route:
        """Pick one of ``ask.permitted``; never raises for want of a score or of a replica."""
        ...


class Draft(Protocol):
    """Judges the answer of a model that may be replaced by a better one's, as it is generated."""

    hold_tokens: int
    """Answer tokens that are held back at most until the verdict."""

    def feed(self, text: str, logprobs: Sequence[float]) -> None:
        """Take in a piece of the answer, with the log-probability of each of its tokens."""
        ...

    def verdict(self, finish_reason: str | None) -> Verdict:
        """Whether another model shall answer instead; asked once.

        Args:
            finish_reason: Why the answer ended; ``None`` where it goes on.
        """
        ...


class Hold(Protocol):
    """What one request holds of its department's budget, from admission to settlement."""

    @property
    def reservation(self) -> Reservation:
        """The hold as it is now."""
        ...

    @property
    def charged(self) -> Amount:
        """What has been charged so far; final after ``settle``."""
        ...

    async def started(self, prompt_tokens: int) -> None:
        """The engine has counted the prompt: replace the estimate.

        Raises:
            BudgetExhausted: The prompt is longer than estimated and the account cannot cover it.
        """
        ...

    def consumed(self, tokens: int, gpu_us: int) -> bool:
        """Count what was generated; called for each chunk, so it takes a microsecond.

        Args:
            tokens: Answer tokens of this chunk.
            gpu_us: Device-microseconds metered for the request so far, unweighted.

        Returns:
            Whether the next chunk must be reserved (``extend``) before more is released.
        """
        ...

    async def extend(self) -> None:
        """Reserve the next chunk.

        Raises:
            BudgetExhausted: The account cannot cover it.
        """
        ...

    def settle(self, usage: Usage | None, gpu_us: int | None) -> None:
        """Replace the hold by what was used; repeating it changes nothing.

        ``None`` where the engine has not said: what was consumed counts, and the engine's own
        report to the ledger corrects it.
        """
        ...


class Ledger(Protocol):
    """reserve and settle."""

    async def reserve(self, ask: BudgetAsk) -> Hold:
        """Hold what the prompt and the first chunk of the answer may cost.

        Raises:
            BudgetExhausted: The account cannot cover it.
            NoAccount: The department has no account.
            LedgerUnavailable: No lease is left, and the ledger cannot be reached.
        """
        ...

    def charge(self, principal: Principal) -> Charge:
        """Where a principal's requests are charged, and how they share engines; in microseconds.

        Raises:
            NoAccount: The department has no account.
        """
        ...

    def usage(self, account: str) -> AccountState | None:
        """State of an account, two seconds old at most while the ledger is reached.

        ``None`` where there is no account, or nothing has been heard of it yet.
        """
        ...

    def fits(self, ask: BudgetAsk) -> int | None:
        """The longest answer per choice, in tokens, that the account could still cover.

        An estimate, for people; 0 where not even the prompt fits, ``None`` where nothing is known.
        """
        ...


class AuditLog(Protocol):
    """record decided, record completed."""

    async def decided(self, turn: Turn) -> None:
        """Make the decision and the encrypted input durable before any model sees the request.

        Sets ``turn.decided_event_id``.

        Raises:
            AuditUnavailable: It cannot be written.
        """
        ...

    def output(self, turn: Turn, data: bytes) -> None:
        """Take a piece of the answer in, in order; encrypted and durable within a second.

        Raises:
            AuditUnavailable: It cannot be written; the piece must not be released.
        """
        ...

    async def completed(self, turn: Turn) -> None:
        """Make the outcome, and the rest of the encrypted answer, durable.

        Called once per turn, also for one that was refused before ``decided``.

        Raises:
            AuditUnavailable: It cannot be written.
        """
        ...


class Observer(Protocol):
    """Hears of every turn that ended: metrics, traces, the line in the log."""

    def ended(self, turn: Turn) -> None:
        """Take note, in microseconds; never raises, never waits."""
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

    def load(self, base_model: str) -> ModelLoad:
        """How busy the replicas of this model are, as far as this gateway knows; microseconds."""
        ...
