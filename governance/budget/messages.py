"""What engines, gateways and the ledger tell each other about budgets.

Figures are **cumulative** wherever a message may be lost, repeated or overtaken: of two reports
about one reservation the larger figure holds, so that a repeat or an old one changes nothing.
``gpu_us`` of a ``MeterRow`` is raw device time; every ``Amount`` is charged (raw times the weight
of the accelerator, see ``governance.budget.config``). Nothing here does I/O or reads a clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from governance.types import Amount

NOTHING = Amount()


@dataclass(frozen=True, slots=True)
class MeterRow:
    """One reservation as its engine sees it; every figure is cumulative."""

    reservation_id: str
    request_id: str
    gateway_id: str
    account: str
    """Department on the ticket."""
    model: str
    base_model: str
    gpu_us: int
    """Raw device-microseconds so far, over all prompts and choices of the request; the sum of
    ``prefill_us`` and ``decode_us``."""
    prefill_us: int
    decode_us: int
    prefill_tokens: int
    """Prompt tokens that were computed, not found in the prefix cache."""
    cached_tokens: int
    """Prompt tokens found in the prefix cache."""
    prompt_tokens: int
    """Prompt as counted by the engine."""
    decode_tokens: int
    """Answer tokens generated, over all choices."""
    ended: bool
    """The engine is through with it: no later row has larger figures."""
    delivered: bool
    """The gateway was sent the final figure."""


@dataclass(frozen=True, slots=True)
class MeterReport:
    """What an engine replica says at least once a second."""

    replica_id: str
    base_model: str
    accelerator: str
    """Kind of device, such as ``H100`` or ``cpu``; names the weight."""
    epoch: str
    """Random per start of the engine."""
    seq: int
    """1, 2, ... within the epoch; a repeat changes nothing."""
    devices: int
    elapsed_us: int
    """Devices times the time since the engine started, device-microseconds."""
    busy_us: int
    """Device-microseconds in which the engine worked, cumulative."""
    attributed_us: int
    """Device-microseconds charged to requests, cumulative; equals ``busy_us`` less what
    ``unattributed_us`` holds of it, up to one microsecond a request for rounding."""
    unattributed_us: int
    """Device-microseconds that no request can be charged for, cumulative: time of steps with
    nobody in them, and the bound on what was lost with a dead engine core."""
    running: int
    """Requests in the engine now."""
    dead: bool
    """Last report of an engine that died; ``unattributed_us`` has the bound on what was lost."""
    rows: tuple[MeterRow, ...]
    hooks_us: int = 0
    """Time of the engine core's process that metering itself took, cumulative; for operators."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """What a gateway knows of a reservation that it is through with."""

    reservation_id: str
    account: str
    request_id: str
    model: str
    base_model: str
    gpu_us: int | None
    """Raw device-microseconds as far as the gateway knows, cumulative; ``None`` where no engine
    said anything."""
    used: Amount
    """Charged as far as the gateway knows, cumulative, at the weight that it was told."""
    final: bool
    """The usage came with the engine's last frame."""
    prompt_bytes: int = 0
    """Bytes of the forwarded body; 0 where its tokens are not known exactly."""
    prompt_tokens: int = 0
    """Prompt as the engine counted it; with ``prompt_bytes`` it teaches tokens per byte."""


@dataclass(frozen=True, slots=True)
class LeaseAsk:
    """What a gateway has and wants of one account."""

    account: str
    open: Amount
    """Sum of this gateway's open reservations, settled ones not counted."""
    need: Amount
    """Asked for now by requests that wait."""
    cushion: Amount
    """Wanted beyond that, for requests to come."""


@dataclass(frozen=True, slots=True)
class RenewRequest:
    """A gateway's regular message to the ledger; one is in flight at a time."""

    gateway_id: str
    seq: int
    """An older or repeated number changes nothing."""
    asks: tuple[LeaseAsk, ...]
    settlements: tuple[Settlement, ...]
    closing: bool
    """The gateway drains: its leases end, and what they held returns."""


@dataclass(frozen=True, slots=True)
class LeaseState:
    """A lease as it stands after a renewal."""

    lease_id: str
    account: str
    hold: Amount
    """Total that the gateway may have open and free under this lease now."""
    adjust: Amount
    """Cumulative: what engines charged to reservations after this gateway had settled them for
    less."""


@dataclass(frozen=True, slots=True)
class Tight:
    """The account, of those on a path, that leaves least of a quantity."""

    account: str
    window: str
    reset_us: int
    limit: int
    """What may be used in its window: nominal, transfers and overdraft counted, borrowing not."""
    spent: int
    owner: str | None
    """Who to ask for more."""


@dataclass(frozen=True, slots=True)
class AccountState:
    """An account as shown to people and in headers, and as gateways reserve by."""

    account: str
    """``hr``, ``hr/recruiting``, ``hr~<principal key>``, or ``hr@hour`` for a further window."""
    window: str
    """A ``WindowKind``."""
    window_start_us: int
    reset_us: int
    """When the window ends; microseconds since 1970 UTC, as ``window_start_us``."""
    limit_us: int | None
    """Charged device-microseconds per window, an override, transfers and overdraft counted;
    ``None`` is no limit of its own."""
    limit_tokens: int | None
    spent: Amount
    leased: Amount
    """Outstanding at gateways beyond ``spent``."""
    open: Amount
    """Of ``leased``, what gateways said to be reserved by requests in flight."""
    overridden_until_us: int | None
    """When an override of the limits ends; ``None`` where there is none."""
    parent: str | None = None
    """Account above; ``None`` for a department."""
    cohort: str | None = None
    owner: str | None = None
    """Who to ask for more."""
    mode: str = "hard"
    """A ``governance.budget.config.Mode``."""
    priority_class: str = "standard"
    weight_milli: int = 1000
    moved: Amount = NOTHING
    """Transferred in during this window, less transferred out; part of the limits."""
    overdraft: Amount = NOTHING
    """Part of the limits."""
    borrowed: Amount = NOTHING
    """Used or held beyond the limits, out of what the cohort lends."""
    borrow: Amount = NOTHING
    """The most that may be borrowed."""
    lend: Amount = NOTHING
    """The most that others may borrow of it."""
    total: Amount = NOTHING
    """Spent ever, over all windows."""
    rest_us: int | None = None
    """What may still be lent out, all accounts above and borrowing counted; ``None``: nothing on
    the path limits it."""
    rest_tokens: int | None = None
    reach_us: int | None = None
    """The same, if gateways gave back what no request has reserved."""
    reach_tokens: int | None = None
    stops: bool = True
    """A running answer stops at the limit; ``False`` where every account on the path is soft."""
    over: bool = False
    """Some account on the path has spent all it may: nobody needs to be asked."""
    tight_us: Tight | None = None
    """Which account limits ``reach_us``."""
    tight_tokens: Tight | None = None
    served_us: int = 0
    """Charged device-microseconds of the department ever: its service, for fair queues."""


@dataclass(frozen=True, slots=True)
class ModelPrice:
    """What a token of a base model has cost of late; see ``governance.budget.prices``."""

    base_model: str
    weight_milli: int
    """Weight of its accelerator in thousandths; of several kinds the largest."""
    prefill_p50_ns: int
    """Raw device-nanoseconds per computed prompt token."""
    prefill_p99_ns: int
    decode_p50_ns: int
    """Raw device-nanoseconds per answer token."""
    decode_p99_ns: int
    prompt_tokens_per_kib_p50: int
    """Prompt tokens per 1,024 bytes of forwarded body."""
    prompt_tokens_per_kib_p99: int
    observations: int
    """Requests behind these figures; with too few of them the defaults stand in."""


@dataclass(frozen=True, slots=True)
class RenewReply:
    """The ledger's answer."""

    seq: int
    ttl_ms: int
    """Leases hold this long, counted by the gateway from when it sent the request."""
    leases: tuple[LeaseState, ...]
    accounts: tuple[AccountState, ...]
    prices: tuple[ModelPrice, ...]
    unknown: tuple[str, ...]
    """Accounts that were asked for and do not exist."""
    digest: str = ""
    """Of the budgets file that holds; a gateway that has another asks for it."""
