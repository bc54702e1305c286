"""Figures of budgets: leases at a gateway; accounts, cohorts and alerts at the ledger.

No account of a single user is exported: what it holds counts in its department's leases.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Protocol

from deployments.telemetry import budget_names as names
from deployments.telemetry.registry import Gauge, Registry
from deployments.telemetry.sources import age_us
from governance.budget.messages import AccountState
from governance.budget.tree import department_of

POLL_S = 5.0
"""The ledger is asked for its accounts this often, in seconds."""
SHARE = 20
"""And no more often than this many times what the answer took: a twentieth of its time at most."""
FAULTS = ("late", "conflicts", "backwards", "failed_batches")
RESULTS = ("delivered", "retried", "refused", "expired", "coalesced", "unwanted")


class LeaseLine(Protocol):
    """One account at a gateway; ``governance.budget.lines.Line``."""

    account: str
    hold_us: int
    hold_tokens: int
    open_us: int
    open_tokens: int
    limited_us: bool
    limited_tokens: bool


class LeaseStats(Protocol):
    """Figures of a lease book; ``governance.budget.leases.LeaseStats``."""

    waiting: int
    renewals: int
    failures: int
    renew_us: int


class LeaseBook(Protocol):
    """The leases of a gateway; ``governance.budget.leases.LeaseBook``, or of several ledgers."""

    @property
    def lines(self) -> Collection[LeaseLine]:
        """Every account that has been asked for."""
        ...

    @property
    def stats(self) -> LeaseStats:
        """Figures as of now."""
        ...

    def age_s(self) -> float:
        """Since the last answered renewal was sent; infinite before."""
        ...


class LeaseSource:
    """Leases, as a gateway holds them, by department.

    Args:
        registry: Where to note.
        book: Its leases.
    """

    def __init__(self, registry: Registry, book: LeaseBook) -> None:
        self._book = book
        self._gpu = registry.gauge(names.LEASE)
        self._tokens = registry.gauge(names.LEASE_TOKENS)
        self._waiting = registry.gauge(names.LEASE_WAITING)
        self._age = registry.gauge(names.LEDGER_AGE)
        self._renew = registry.gauge(names.RENEW)
        self._renewals = registry.counter(names.RENEWALS)
        self._failures = registry.counter(names.RENEW_FAILURES)

    def __call__(self) -> None:
        """Take over."""
        for gauge in (self._gpu, self._tokens):
            gauge.clear()
        for line in self._book.lines:
            department = department_of(line.account)
            if line.limited_us:
                _add(self._gpu, department, line.hold_us, line.open_us)
            if line.limited_tokens:
                _add(self._tokens, department, line.hold_tokens, line.open_tokens)
        stats = self._book.stats
        self._waiting.set(stats.waiting)
        self._renew.set(stats.renew_us)
        self._renewals.reach(stats.renewals)
        self._failures.reach(stats.failures)
        self._age.set(age_us(self._book.age_s()))


def _add(gauge: Gauge, department: str, hold: int, reserved: int) -> None:
    """Add one account to its department's."""
    amounts = {"hold": hold, "open": reserved, "free": max(0, hold - reserved)}
    for state, amount in amounts.items():
        labels = (department, state)
        gauge.set(gauge.levels.get(labels, 0) + amount, labels)


class ShedSource:
    """Requests that a gateway refused before they waited.

    Args:
        registry: Where to note.
        stats: Counts so far by model, class and reason.
    """

    def __init__(
        self, registry: Registry, stats: Callable[[], Mapping[tuple[str, str, str], int]]
    ) -> None:
        self._stats = stats
        self._shed = registry.counter(names.SHED)

    def __call__(self) -> None:
        """Take over."""
        for labels, count in self._stats().items():
            self._shed.reach(count, labels)


class AccountSource:
    """Accounts and cohorts, as the ledger knows them.

    Args:
        registry: Where to note.
        clock: Wall clock, microseconds.
    """

    def __init__(
        self, registry: Registry, clock: Callable[[], int] = lambda: time.time_ns() // 1000
    ) -> None:
        self._clock = clock
        self._amounts = (registry.gauge(names.BUDGET_GPU), registry.gauge(names.BUDGET_TOKENS))
        self._cohorts = (registry.gauge(names.COHORT_GPU), registry.gauge(names.COHORT_TOKENS))
        self._used = registry.gauge(names.BUDGET_USED)
        self._reset = registry.gauge(names.BUDGET_RESET)
        self._weight = registry.gauge(names.WEIGHT)
        self._totals = (registry.counter(names.SPENT_GPU), registry.counter(names.SPENT_TOKENS))
        self._first: dict[str, tuple[int, int]] = {}
        """What accounts had spent ever when this process first saw them."""

    def take(self, states: Iterable[AccountState]) -> None:
        """Take over."""
        gauges = (*self._amounts, *self._cohorts, self._used, self._reset, self._weight)
        for gauge in gauges:
            gauge.clear()
        cohorts: dict[str, list[AccountState]] = {}
        for state in chosen(states):
            self._note(state)
            if state.cohort is not None:
                cohorts.setdefault(state.cohort, []).append(state)
        for cohort, members in cohorts.items():
            lent = [(m.borrowed.gpu_us, m.borrowed.tokens) for m in members]
            lendable = [(m.lend.gpu_us, m.lend.tokens) for m in members]
            for place, gauge in enumerate(self._cohorts):
                gauge.set(sum(each[place] for each in lent), (cohort, "lent"))
                gauge.set(sum(each[place] for each in lendable), (cohort, "lendable"))

    def _note(self, state: AccountState) -> None:
        name, total = state.account, state.total
        self._reset.set(max(0, state.reset_us - self._clock()), (name,))
        if name == department_of(name):
            self._weight.set(state.weight_milli, (name,))
        first = self._first.setdefault(name, (total.gpu_us, total.tokens))
        limits = (state.limit_us, state.limit_tokens)
        for place, quantity in enumerate(("gpu_us", "tokens")):
            gauge, limit = self._amounts[place], limits[place]
            amounts = {of: getattr(getattr(state, of), quantity) for of in _SHOWN}
            if state.cohort is not None:
                amounts |= {of: getattr(getattr(state, of), quantity) for of in _OF_A_COHORT}
            if limit is not None:
                amounts["limit"] = limit
                used_milli = state_milli(amounts["spent"], limit)
                self._used.set(used_milli, (name, ("gpu", "tokens")[place]))
            for of, amount in amounts.items():
                gauge.set(amount, (name, of))
            self._totals[place].reach(
                max(0, (total.gpu_us, total.tokens)[place] - first[place]), (name,)
            )


_SHOWN = ("spent", "leased", "open", "moved")
_OF_A_COHORT = ("borrowed", "borrow", "lend")


def state_milli(spent: int, limit: int) -> int:
    """Spent part in thousandths; of a limit that is nothing, or less, everything is spent."""
    return spent * 1000 // limit if limit > 0 else 1000


def chosen(states: Iterable[AccountState]) -> list[AccountState]:
    """The accounts that are exported: no user's, at most ``MAX_ACCOUNTS``."""
    found = [state for state in states if "~" not in state.account]
    if len(found) > names.MAX_ACCOUNTS:
        found.sort(key=lambda s: (s.parent is not None or "@" in s.account, -s.total.gpu_us))
    return found[: names.MAX_ACCOUNTS]


class AlertStats(Protocol):
    """Figures of the delivery of alerts; ``deployments.alerts.delivery.DeliveryStats``."""

    delivered: int
    retried: int
    refused: int
    expired: int
    coalesced: int
    unwanted: int
    waiting: int
    oldest_us: int
    """When the oldest that waits was crossed; 0 where none waits."""


class AlertSource:
    """Alerts on their way to the webhook.

    Args:
        registry: Where to note.
        stats: Figures.
        clock: Wall clock, microseconds.
    """

    def __init__(
        self,
        registry: Registry,
        stats: AlertStats,
        clock: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._stats = stats
        self._clock = clock
        self._alerts = registry.counter(names.ALERTS)
        self._waiting = registry.gauge(names.ALERTS_WAITING)
        self._age = registry.gauge(names.ALERTS_AGE)

    def __call__(self) -> None:
        """Take over."""
        stats = self._stats
        for result in RESULTS:
            self._alerts.reach(getattr(stats, result), (result,))
        self._waiting.set(stats.waiting)
        self._age.set(max(0, self._clock() - stats.oldest_us) if stats.oldest_us else 0)


class Telling(Protocol):
    """Delivers alerts; ``deployments.ledger_alerts.LedgerAlerts``."""

    @property
    def stats(self) -> AlertStats:
        """Figures as of now."""
        ...


class Service(Protocol):
    """A ledger in its process; ``deployments.ledger_service.LedgerService``."""

    @property
    def telling(self) -> Telling:
        """What delivers its alerts."""
        ...

    def state(self, account: str | None = None) -> Awaitable[tuple[AccountState, ...]]:
        """All accounts but users'."""
        ...

    def stats(self) -> Awaitable[dict[str, int]]:
        """Counters since the process started."""
        ...


class LedgerWatch:
    """Asks a ledger for its accounts and counters, now and then.

    Args:
        registry: Where to note.
        service: The ledger.
        monotonic: Seconds.
    """

    def __init__(
        self,
        registry: Registry,
        service: Service,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service = service
        self._monotonic = monotonic
        self._accounts = AccountSource(registry)
        self._queued = registry.gauge(names.LEDGER_QUEUED)
        self._faults = registry.counter(names.LEDGER_FAULTS)
        for kind in FAULTS:
            self._faults.reach(0, (kind,))

    async def run(self, note: Callable[[Exception], None]) -> None:
        """Ask for ever.

        Args:
            note: Told of each answer that was none.
        """
        while True:
            began_s = self._monotonic()
            try:
                await self.once()
            except Exception as error:  # before the first budgets, or while the disk fails
                note(error)
            await asyncio.sleep(max(POLL_S, SHARE * (self._monotonic() - began_s)))

    async def once(self) -> None:
        """Ask, and take over.

        Raises:
            LedgerUnavailable: There is no answer.
        """
        counted = await self._service.stats()
        self._queued.set(counted["queued"])
        for kind in FAULTS:
            self._faults.reach(counted[kind], (kind,))
        self._accounts.take(await self._service.state(None))
