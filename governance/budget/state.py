"""What the ledger knows, in memory: mutable rows, and the sums over them.

Everything here is also in the store; ``BudgetLedger`` changes both in one batch. No rules live
here beyond arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from governance.budget.prices import PriceBook
from governance.types import Amount

ZERO = Amount()


def positive(amount: Amount) -> Amount:
    """Each dimension, or 0 where it is negative."""
    return Amount(max(amount.gpu_us, 0), max(amount.tokens, 0))


def largest(a: Amount, b: Amount) -> Amount:
    """The larger of each dimension."""
    return Amount(max(a.gpu_us, b.gpu_us), max(a.tokens, b.tokens))


def least(a: Amount, b: Amount) -> Amount:
    """The smaller of each dimension."""
    return Amount(min(a.gpu_us, b.gpu_us), min(a.tokens, b.tokens))


@dataclass(slots=True)
class Account:
    """What an account spent in its window."""

    name: str
    window: str
    start_us: int
    end_us: int
    spent: Amount = ZERO
    total: Amount = ZERO
    """Spent ever, over all windows."""
    moved: Amount = ZERO
    """Transferred in during this window, less transferred out."""
    alerted: Amount = ZERO
    """Highest threshold that was told in this window, per cent, by quantity."""
    standing: Amount = ZERO
    """Borrowed, older borrowings counting less; as of ``standing_at_us``."""
    standing_at_us: int = 0


@dataclass(slots=True)
class Override:
    """Limits that somebody set for a time; ``None`` leaves a dimension as the file says."""

    account: str
    gpu_us: int | None
    tokens: int | None
    expires_us: int
    by: str
    reason: str


@dataclass(slots=True)
class Gateway:
    """A gateway that renewed."""

    id: str
    seq: int
    heard_us: int
    """Age of the file at its last renewal; see ``BudgetLedger``."""
    expires_s: float = 0.0
    """By the monotonic clock: when its leases end."""


@dataclass(slots=True)
class Reservation:
    """What is charged for one request."""

    id: str
    account: str
    gateway_id: str
    charged: Amount = ZERO
    open: bool = False
    """Its lease lives, and its gateway has not settled it: ``charged`` is within the lease."""
    settled: bool = False
    ended: bool = False
    unsettled: str | None = None
    """Audit event (JSON) to write if its gateway never settles it."""
    engine_us: int = 0
    """Largest charge by an engine, at the weight of its device."""
    weight_milli: int = 0
    """Weight of the device that gave it, in thousandths; 0 while no engine reported."""
    raw_us: int = 0
    """Largest figure of its gateway, raw device-microseconds."""
    since_us: int = 0
    """When it was first charged; it may be returned to windows that began no later."""


@dataclass(slots=True)
class Lease:
    """What one gateway may hold of one account."""

    id: str
    gateway_id: str
    account: str
    hold: Amount = ZERO
    """As answered to the last renewal."""
    bound: Amount = ZERO
    """The most that the gateway may believe to hold: ``hold``, or what was left of the one before
    until the next renewal proves that the gateway has heard of this one."""
    open: Amount = ZERO
    """Reserved by requests in flight, as the gateway said."""
    adjust: Amount = ZERO
    open_spent: Amount = ZERO
    """Already charged to its open reservations: part of ``bound`` and of the account's sum."""
    reservations: dict[str, Reservation] = field(default_factory=dict)
    """Its open reservations."""
    counted: Amount = ZERO
    """``outstanding`` as it is counted in the sums of its path; see ``Books.touch``."""
    counted_open: Amount = ZERO
    """``reserved``, the same."""

    @property
    def outstanding(self) -> Amount:
        """What may still be charged under this lease."""
        return positive(self.bound - self.open_spent)

    @property
    def reserved(self) -> Amount:
        """Of ``outstanding``, what requests in flight have reserved."""
        return least(self.outstanding, positive(self.open - self.open_spent))


METERS = ("elapsed_us", "busy_us", "attributed_us", "unattributed_us")


@dataclass(slots=True)
class Replica:
    """Meters of one engine replica since its engine started; raw device-microseconds."""

    id: str
    epoch: str
    base_model: str
    accelerator: str
    devices: int
    seq: int
    running: int
    live: bool
    raw: tuple[int, ...]
    """In the order of ``METERS``."""
    marked: tuple[int, ...]
    """``raw`` as of the last ``meter.interval``."""
    marked_us: int
    heard_s: float = 0.0
    """Monotonic time of its last report."""


@dataclass(slots=True)
class State:
    """Everything that a ledger keeps in memory. Settled reservations stay on disk only."""

    accounts: dict[str, Account] = field(default_factory=dict)
    overrides: dict[str, Override] = field(default_factory=dict)
    gateways: dict[str, Gateway] = field(default_factory=dict)
    leases: dict[tuple[str, str], Lease] = field(default_factory=dict)
    """By gateway and account; changed by ``put`` and ``drop``."""
    replicas: dict[str, Replica] = field(default_factory=dict)
    meters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Sums over all engines ever by base model, in the order of ``METERS``."""
    prices: dict[str, PriceBook] = field(default_factory=dict)
    held: dict[str, Amount] = field(default_factory=dict)
    """Outstanding leases at and under each account."""
    opened: dict[str, Amount] = field(default_factory=dict)
    """Of ``held``, what requests in flight have reserved."""

    _by_account: dict[str, dict[str, Lease]] = field(default_factory=dict)
    _by_gateway: dict[str, dict[str, Lease]] = field(default_factory=dict)

    def put(self, lease: Lease) -> None:
        """Keep a lease."""
        self.leases[lease.gateway_id, lease.account] = lease
        self._by_account.setdefault(lease.account, {})[lease.gateway_id] = lease
        self._by_gateway.setdefault(lease.gateway_id, {})[lease.account] = lease

    def drop(self, lease: Lease) -> None:
        """Forget a lease."""
        del self.leases[lease.gateway_id, lease.account]
        del self._by_account[lease.account][lease.gateway_id]
        del self._by_gateway[lease.gateway_id][lease.account]

    def leases_of(self, account: str) -> Iterable[Lease]:
        """Leases of one account."""
        return self._by_account.get(account, {}).values()

    def leases_at(self, gateway_id: str) -> list[Lease]:
        """Leases of one gateway."""
        return list(self._by_gateway.get(gateway_id, {}).values())
