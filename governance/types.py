"""The values that travel along the request path.

Every stage takes values of this module and returns a frozen one. Units are suffixes: ``_us``
microseconds, ``_tokens`` tokens, ``_bytes`` bytes. Nothing here does I/O or reads a clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from governance.budget.messages import AccountState
    from governance.ports import Draft, Hold


class Operation(StrEnum):
    """What a caller asks of a model. The policy names operations by these values."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    EMBEDDINGS = "embeddings"


class PrincipalKind(StrEnum):
    """Who stands behind a credential."""

    USER = "user"
    """A person, through a delegated OIDC access token."""
    SERVICE = "service"
    """An application with a token of its own (client credentials)."""
    KEY = "key"
    """An application with a service key issued by Gatehouse."""


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller.

    Built by ``governance.identity`` only, from a verified credential; never from a header or a
    field of the body.
    """

    kind: PrincipalKind
    subject: str
    """Stable identifier within the issuer: ``sub``, ``tid/oid`` for Entra, key id for a key."""
    issuer: str
    """Configured name of the issuer (not its URL); ``gatehouse`` for service keys."""
    department: str
    roles: frozenset[str]
    key: str
    """Pseudonym: HMAC-SHA256 in hex over the length-prefixed (issuer, tenant, subject)."""
    tenant_id: str | None = None
    client_id: str | None = None
    key_id: str | None = None
    """Id of the service key, or ``kid`` of the signing key for a token."""
    token_id: str | None = None
    """``jti`` (or ``uti`` for Entra) of the token."""
    token_hash: str | None = None
    """SHA-256 in hex of the presented credential; lets one token be revoked and found again."""
    issued_at_us: int = 0
    expires_at_us: int = 0
    models: frozenset[str] | None = None
    """Models that the credential itself is limited to; ``None`` means no limit of its own."""
    operations: frozenset[str] | None = None
    """Operations that the credential itself is limited to; ``None`` means no limit of its own."""
    groups_overage: bool = False
    """The issuer left groups out because there were too many; group-derived roles were denied."""


class Effect(StrEnum):
    """What the policy does with a request; strictest first."""

    BLOCK = "block"
    REQUIRE_APPROVAL = "require_approval"
    REROUTE = "reroute"
    REDACT = "redact"
    ALLOW = "allow"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that an allowing decision carries; ``None`` means that no rule set this bound."""

    max_tokens: int | None = None
    """Most tokens that one request may generate, over all its choices."""
    context_tokens: int | None = None
    """Most tokens of prompt and answer together."""
    requests_per_minute: int | None = None
    parallel_requests: int | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Outcome of the policy for one (principal, model, operation); always explained."""

    effect: Effect
    rule_ids: tuple[str, ...]
    """Rules responsible, in file order; empty only for default deny."""
    policy_digest: str
    """SHA-256 in hex of the canonical policy that decided."""
    limits: Limits = Limits()
    priority_class: str | None = None
    """``critical``, ``standard`` or ``batch``; ``None`` where no rule sets one."""
    on_exhaustion: str | None = None
    """``small``: where the budget or the queue has no room for a large model that was named, a
    model of the small tier may answer; ``None`` or ``refuse``: it may not."""
    message: str | None = None
    """Text of the responsible rule for the caller, where it has one."""


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """A validated request: what governance reads, and the body that may be forwarded."""

    operation: Operation
    model: str
    body: Mapping[str, Any]
    """Allow-listed fields only, as the client sent them; treat as read-only."""
    stream: bool
    include_usage: bool
    """The client asked for the usage event of a stream."""
    max_tokens: int | None
    """Answer tokens asked for per choice; ``None`` when the client left it to the server."""
    choices: int = 1
    body_bytes: int = 0


class Surface(StrEnum):
    """Where in a request a text came from; each finding names one."""

    SYSTEM = "system"
    PROMPT = "prompt"
    ASSISTANT = "assistant"
    UPLOAD = "upload"
    RETRIEVAL = "retrieval"
    TOOL_DEFINITION = "tool_definition"
    TOOL_CALL = "tool_call"
    TOOL_OUTPUT = "tool_output"
    SCHEMA = "schema"
    METADATA = "metadata"


@dataclass(frozen=True, slots=True)
class TextLeaf:
    """One string of a request with its place: ``path`` is a JSON Pointer (RFC 6901)."""

    path: str
    surface: Surface
    text: str


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a detector saw."""

    category: str
    severity: str
    detector: str
    path: str
    surface: Surface
    score_milli: int = 1000


@dataclass(frozen=True, slots=True)
class Inspection:
    """What inspection of one direction amounted to."""

    inspector: str
    """Name of the inspector; ``none`` when inspection is not configured."""
    findings: tuple[Finding, ...] = ()
    inspected_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model as the rest of the platform sees it."""

    id: str
    tier: str
    """``small``, ``large`` or ``embedding``."""
    operations: frozenset[Operation]
    context_tokens: int
    """Longest prompt plus answer, in tokens."""
    base: str
    """Model whose engine serves it: its own id, or the base model of a LoRA adapter."""


@dataclass(frozen=True, slots=True)
class RouteAsk:
    """What a router may know of a request."""

    request_id: str
    request: InferenceRequest
    permitted: tuple[ModelInfo, ...]
    """Models that policy permits for this request, in catalogue order; never empty."""
    auto: bool
    """Whether the caller left the choice to the platform; else ``permitted`` is what it named."""
    department: str
    principal_key: str
    priority_class: str
    """``critical``, ``standard`` or ``batch``."""
    account: AccountState | None = None
    """State of the account that is charged, where there is one."""
    stand_ins: tuple[ModelInfo, ...] = ()
    """Where a model was named: those that may answer instead if there is no room for it."""


@dataclass(frozen=True, slots=True)
class Route:
    """Which model answers, and why."""

    model: ModelInfo
    reason: str
    auto: bool = False
    """The platform chose."""
    fallbacks: tuple[ModelInfo, ...] = ()
    """Models to try, in order, where the first cannot answer and nothing was released yet."""
    may_rise: bool = True
    """Whether a cheaper model that is too busy may be replaced by a dearer one."""
    draft: Draft | None = None
    """The model's answer is held back and judged first: a cascade. ``fallbacks`` starts with the
    model that answers instead."""
    detail: Mapping[str, int | str | bool | None] = field(default_factory=dict)
    """What the choice rests on, for the record; fractions in thousandths."""
    instead_of: str | None = None
    """The model that was named, where another one answers because policy permits that."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A model that was tried for a request before the one that answered."""

    model: str
    why: str
    """Why its answer was not released: code of an error, or ``cascade``."""
    gpu_us: int | None
    """Device-microseconds metered; ``None`` where the engine had not said."""
    charged: Amount | None


@dataclass(frozen=True, slots=True)
class Amount:
    """A quantity of what budgets are kept in; also a difference of two."""

    gpu_us: int = 0
    """Charged device time: device-microseconds times the weight of the accelerator."""
    tokens: int = 0
    """Prompt plus answer tokens."""

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.gpu_us + other.gpu_us, self.tokens + other.tokens)

    def __sub__(self, other: Amount) -> Amount:
        return Amount(self.gpu_us - other.gpu_us, self.tokens - other.tokens)


@dataclass(frozen=True, slots=True)
class Charge:
    """Where a principal's requests are charged, and how they share the engines at peak."""

    account: str
    """The most particular account: ``hr``, ``hr/recruiting``, ``hr~<principal key>``."""
    department: str
    priority_class: str | None = None
    """Class by the budgets file; ``None`` leaves it to the policy."""
    weight_milli: int = 1000
    """Share of the engines beside other departments of the class, in thousandths."""
    served_us: int = 0
    """Charged device-microseconds of the department so far, at all gateways, as last heard."""


@dataclass(frozen=True, slots=True)
class BudgetAsk:
    """What the ledger must know of a request to reserve for it."""

    request_id: str
    account: str
    """Account that is charged, see ``Charge``."""
    model: str
    base_model: str
    operation: Operation
    prompt_bytes: int
    """Bytes of the body that is forwarded: the prompt is not tokenised at the gateway."""
    choices: int
    max_tokens: int
    """Most answer tokens per choice; 0 where nothing is generated."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """A hold on an account; ``account`` is ``None`` while no ledger is configured."""

    id: str
    account: str | None = None
    reserved: Amount = Amount()
    """What is held now; grows with each chunk."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one exchange, over all its choices. ``prompt_tokens`` includes cached ones."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt plus completion tokens."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Dispatch:
    """One request on its way to an engine, as decided; everything a ticket binds is here."""

    request_id: str
    decision_id: str
    model: str
    """Model or adapter id, as the engine serves it."""
    base_model: str
    operation: Operation
    body: bytes
    """Exactly the bytes forwarded (JSON); the ticket carries their SHA-256."""
    principal_key: str
    department: str
    account: str
    """Account that is charged, see ``Charge``."""
    priority: int
    """vLLM priority: lower is served earlier."""
    max_tokens: int
    reservation_id: str
    weight_milli: int = 1000
    """See ``Charge``."""
    served_us: int = 0
    """See ``Charge``."""
    patience_ms: int = 0
    """Longest wait in the engine's queue; 0 is no bound."""
    affinity: str | None = None
    """Key of the conversation or shared prefix; equal keys prefer the same replica."""
    context_tokens: int | None = None
    """Most tokens of prompt and answer by policy; the engine, which counts, enforces it."""


@dataclass(frozen=True, slots=True)
class EngineStarted:
    """First event of an exchange: an engine has taken the request."""

    replica_id: str
    model_version: str
    """``sha256:<hex>`` digest of the weights actually loaded (base, then adapter if any)."""
    engine_version: str
    prompt_tokens: int = 0
    """Tokens of the prompts taken so far; 0 where the engine did not say."""
    replicas_asked: int = 1
    """Replicas that were offered the request until this one took it."""


@dataclass(frozen=True, slots=True)
class EngineChunk:
    """A piece of an answer.

    One or more complete server-sent events, each ``data: {...}`` and a blank line; or the JSON
    body of an embeddings answer. Never ``[DONE]``, never an error, never the usage event.
    """

    data: bytes
    tokens: int = 0
    """Answer tokens that this piece stands for."""
    gpu_us: int = 0
    """Device-microseconds metered for the whole request so far; a tenth of a second old at most."""


@dataclass(frozen=True, slots=True)
class EngineFinished:
    """Last event of a successful exchange."""

    usage: Usage
    usage_event: bytes = b""
    """The engine's own usage event, for streams whose client asked for it."""
    gpu_us: int | None = None
    """Device-microseconds metered for the request: step time times devices, its share of each step
    (not weighted by accelerator). ``None`` where the engine does not meter."""


EngineEvent = EngineStarted | EngineChunk | EngineFinished


class Outcome(StrEnum):
    """How a turn ended."""

    COMPLETED = "completed"
    REFUSED = "refused"
    FAILED = "failed"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class Stop:
    """Why an answer was ended before the model ended it."""

    code: str
    """Code of the error that it would have been, had nothing been generated."""
    account: str | None = None
    """Account that ran out."""
    window: str | None = None
    """Kind of its window."""
    reset_us: int | None = None
    """When that window ends."""
    owner: str | None = None
    """Who owns the budget."""


@dataclass(frozen=True, slots=True)
class Shed:
    """Why a request was turned away from a model's queue."""

    reason: str
    """``queue`` (no room for its class) or ``patience`` (its wait would be too long)."""
    model: str
    """Base model."""
    priority_class: str
    waiting: int
    """Requests estimated to wait there."""
    wait_ms: int | None
    """Estimated wait of this one; ``None`` while nothing is known of the model's rate."""
    retry_after_s: int = 1


@dataclass(slots=True)
class Turn:
    """Accumulates what each stage found; becomes the audit record. The one mutable value."""

    request_id: str
    decision_id: str
    started_us: int
    operation: Operation
    principal: Principal | None = None
    request: InferenceRequest | None = None
    input_inspection: Inspection | None = None
    decision: Decision | None = None
    charge: Charge | None = None
    """Where the request is charged; ``None`` before that is known, or where there is no account."""
    route: Route | None = None
    hold: Hold | None = None
    """The live hold on the budget; ``reservation`` is what it was when last looked at."""
    reservation: Reservation | None = None
    body: bytes | None = None
    """Exactly what the engine was sent; ``None`` until it is fixed."""
    max_tokens: int | None = None
    """Answer tokens per choice that were allowed; ``None`` until ``body`` is fixed."""
    decided_event_id: str | None = None
    """Audit event of the decision, once it is durable; cells of content hang on it."""
    replica_id: str | None = None
    replicas_asked: int = 0
    """Replicas of the model that were offered the request; 0 while none has taken it."""
    model_version: str | None = None
    engine_version: str | None = None
    output_inspection: Inspection | None = None
    usage: Usage | None = None
    gpu_us: int | None = None
    """Device-microseconds metered; ``None`` while unknown."""
    charged: Amount | None = None
    """What the account was charged; ``None`` without a ledger."""
    finish_reason: str | None = None
    stopped: Stop | None = None
    """Set where the answer was ended for want of budget; ``usage`` is then what was consumed as far
    as the gateway knows, and the engine's own account follows."""
    shed: Shed | None = None
    """Why the model's queue did not take the request, where it did not."""
    outcome: Outcome | None = None
    error_code: str | None = None
    status: int = 0
    accepted_us: int = 0
    """When an engine took the request; 0 before."""
    first_chunk_us: int = 0
    ended_us: int = 0
    sent_bytes: int = 0
    stage_us: dict[str, int] = field(default_factory=dict)
    """Microseconds that each stage took, by name, in the order of the path."""
    account: AccountState | None = None
    """State of the caller's account when the request was admitted or refused."""
    attempt: int = 1
    """Which model in turn is being tried; each attempt is decided, settled and recorded."""
    attempt_us: int = 0
    """When this attempt began; 0 for the first, which began with the turn."""
    superseded: str | None = None
    """``fallback`` or ``cascade`` while an attempt ends whose answer is not released."""
    earlier: tuple[Attempt, ...] = ()
    """Attempts before this one."""
    notes: dict[str, str] = field(default_factory=dict)
    monotonic: Callable[[], int] = lambda: 0
    """Clock of the laps: microseconds that never go back."""
    lap_us: int = 0
    """When the stage in progress began, by ``monotonic``."""

    def lap(self, stage: str) -> None:
        """A stage has ended: note how long it took, and begin the next."""
        now = self.monotonic()
        self.stage_us[stage] = self.stage_us.get(stage, 0) + now - self.lap_us
        self.lap_us = now

    def begin_again(self, now_us: int) -> None:
        """The attempt has ended and is on record: forget what belongs to it alone.

        Args:
            now_us: Wall clock, microseconds.
        """
        if self.route is None:
            raise ValueError("nothing was attempted yet")
        why = "cascade" if self.superseded == "cascade" else self.error_code or "failed"
        tried = Attempt(self.route.model.id, why, self.gpu_us, self.charged)
        self.earlier = (*self.earlier, tried)
        self.attempt += 1
        self.attempt_us = now_us
        for name in _OF_AN_ATTEMPT:
            setattr(self, name, None)
        for name in _NUMBERS_OF_AN_ATTEMPT:
            setattr(self, name, 0)


_OF_AN_ATTEMPT = (
    "hold",
    "reservation",
    "body",
    "max_tokens",
    "decided_event_id",
    "replica_id",
    "model_version",
    "engine_version",
    "output_inspection",
    "usage",
    "gpu_us",
    "charged",
    "finish_reason",
    "stopped",
    "shed",
    "outcome",
    "error_code",
    "superseded",
)
_NUMBERS_OF_AN_ATTEMPT = (
    "status",
    "replicas_asked",
    "accepted_us",
    "first_chunk_us",
    "ended_us",
    "sent_bytes",
)
