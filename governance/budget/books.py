"""The ledger's accounts in memory, and what changed in them since the last save.

The rules of charging:

- A reservation is charged the largest figure that any report gave for it, in each dimension. All
  reports are cumulative, so a repeated or an overtaken one changes nothing, and it does not matter
  whether engine or gateway comes first.
- Device time is charged at the weight of the device that served, which an engine's report names: a
  gateway only guesses which of several kinds that is. With E the largest charge by an engine, w the
  weight of the device that gave it (of several that gave the same the largest), and G the raw
  figure of the gateway,

      charged = max(E, G x w)        rounded down, w in thousandths.

  Until an engine has reported, what the gateway charged itself stands in: a charge for the time
  being. The first report of an engine replaces it, which may lower it.
- An increase is charged to the window in which it is reported. What a charge is lowered by returns
  to its window; to a later window it does not.
- While a reservation is open (its lease lives and its gateway has not settled it), what is charged
  to it is part of its lease, so that it does not count twice.
- A charge goes to an account and to everything above it (``governance.budget.tree``), to each in
  the window that it has then.
"""

from __future__ import annotations

import json

from governance.budget import events
from governance.budget.borrowing import decayed
from governance.budget.prices import PriceBook
from governance.budget.state import (
    ZERO,
    Account,
    Lease,
    Override,
    Reservation,
    State,
    positive,
)
from governance.budget.store import Changes, LedgerStore
from governance.budget.tree import Node, Tree
from governance.budget.windows import window_at
from governance.types import Amount

HOUR_US = 3_600_000_000
NEVER_US = 1 << 62


class Books:
    """State, and changes to it.

    Args:
        state: As loaded.
        store: Where reservations that are not in memory are looked up.
        tree: Accounts and their limits.
    """

    def __init__(self, state: State, store: LedgerStore, tree: Tree) -> None:
        self.state = state
        self.changes = Changes()
        self.conflicts = 0
        """Reports that named a reservation of another gateway or account; they change nothing."""
        self.tree = tree
        self._store = store
        self._rolls_us = min((a.end_us for a in state.accounts.values()), default=NEVER_US)
        """When the next window ends."""
        self._limits: dict[str, tuple[int | None, int | None]] = {}
        """As ``limits`` found them."""
        self._touched: dict[str, Lease] = {}
        """Leases by id that are not in the sums as they are now."""
        self._now_s = 0.0
        self._reclaims_s: dict[tuple[str, int], float] = {}
        """By cohort and quantity: until when what is lent is reclaimed, monotonic."""
        self._recount()

    def use(self, tree: Tree) -> None:
        """Take up another budgets file; what was spent counts on in it."""
        self.tree = tree
        self._limits.clear()
        self._recount()

    def account(self, name: str, now_us: int) -> Account:
        """An account with its present window; one that is not in the file is kept as well."""
        account = self.state.accounts.get(name)
        node = self.tree.node(name)
        if account is not None and now_us < account.end_us and account.window == node.window:
            return account
        kind, zone, day = node.span
        start_us, end_us = window_at(kind, zone, now_us, day)
        if account is None:
            account = self.state.accounts[name] = Account(name, node.window, start_us, end_us)
        elif now_us >= account.end_us:
            if account.spent != ZERO and not node.is_user:
                self.changes.events.append(events.window_ended(account, self.limits(node)))
            account.spent = account.moved = account.alerted = ZERO
            self.relimit(name)
        # Else the file gives another window: what was spent in the old one counts on in it.
        account.window, account.start_us, account.end_us = node.window, start_us, end_us
        self.changes.accounts[name] = account
        self._rolls_us = min(self._rolls_us, end_us)
        return account

    def view(self, name: str, now_us: int) -> Account:
        """As ``account``, but nothing is kept of an account that nobody has used."""
        if name in self.state.accounts:
            return self.account(name, now_us)
        node = self.tree.node(name)
        kind, zone, day = node.span
        return Account(name, node.window, *window_at(kind, zone, now_us, day))

    def exists(self, account: str) -> bool:
        """Whether the file has an account of this name."""
        return self.tree.exists(account)

    def limits(self, node: Node) -> tuple[int | None, int | None]:
        """Charged device-microseconds and tokens per window; override, transfers, overdraft."""
        known = self._limits.get(node.name)
        if known is None:
            known = self._limits[node.name] = self._reckon(node)
        return known

    def relimit(self, name: str) -> None:
        """What an account may spend is another now."""
        self._limits.pop(name, None)

    def _reckon(self, node: Node) -> tuple[int | None, int | None]:
        gpu_us, tokens = node.limit_us, node.limit_tokens
        override = self.state.overrides.get(node.name)
        if override is not None:
            gpu_us = gpu_us if override.gpu_us is None else override.gpu_us
            tokens = tokens if override.tokens is None else override.tokens
        account = self.state.accounts.get(node.name)
        moved = ZERO if account is None else account.moved
        if gpu_us is not None:
            gpu_us = max(0, gpu_us + moved.gpu_us) + node.overdraft.gpu_us
        if tokens is not None:
            tokens = max(0, tokens + moved.tokens) + node.overdraft.tokens
        return gpu_us, tokens

    def touch(self, lease: Lease) -> None:
        """Note that a lease changed; ``count`` brings it into the sums."""
        self._touched[lease.id] = lease

    def count(self) -> None:
        """Bring the sums of what is held up to date, at each account and at all above.

        Not with each change: a batch charges the same leases over and over.
        """
        for lease in self._touched.values():
            self._count(lease)
        self._touched.clear()

    def _count(self, lease: Lease) -> None:
        outstanding, reserved = lease.outstanding, lease.reserved
        held, opened = outstanding - lease.counted, reserved - lease.counted_open
        if held != ZERO or opened != ZERO:
            for node in self.tree.path(lease.account):
                _add(self.state.held, node.name, held)
                _add(self.state.opened, node.name, opened)
            lease.counted, lease.counted_open = outstanding, reserved

    def drop(self, lease: Lease) -> None:
        """Forget a lease, and what it held."""
        lease.bound = lease.open_spent
        self._count(lease)
        self._touched.pop(lease.id, None)
        self.state.drop(lease)
        self.changes.leases[lease.id] = None

    def reclaim(self, key: tuple[str, int]) -> None:
        """A member of a cohort cannot have its own: until it is through, nobody borrows anew."""
        self._reclaims_s[key] = self._now_s + self.tree.config.lease.ttl_s

    def reclaims(self, key: tuple[str, int]) -> bool:
        """Whether what is lent in a cohort, of a quantity, is being reclaimed."""
        return self._now_s < self._reclaims_s.get(key, 0.0)

    def _recount(self) -> None:
        self.state.held.clear()
        self.state.opened.clear()
        self._touched.clear()
        for lease in self.state.leases.values():
            lease.counted = lease.counted_open = ZERO
            self._count(lease)

    def reservation(self, reservation_id: str, account: str, gateway_id: str) -> Reservation | None:
        """A reservation, new where nobody named it yet; ``None`` where it is somebody else's."""
        found = self.changes.reservations.get(reservation_id)
        lease = self.state.leases.get((gateway_id, account))
        if found is None and lease is not None:
            found = lease.reservations.get(reservation_id)
        if found is None:
            found = self._store.reservation(reservation_id)
        if found is None:
            found = Reservation(reservation_id, account, gateway_id)
        elif (found.account, found.gateway_id) != (account, gateway_id):
            self.conflicts += 1
            return None
        self.changes.reservations[reservation_id] = found
        return found

    def open(self, reservation: Reservation) -> None:
        """Count a reservation within its gateway's lease: one that is new, or whose lease is.

        What it was charged under a lease that ended is part of what its gateway holds under this.
        """
        lease = self.state.leases.get((reservation.gateway_id, reservation.account))
        if lease is not None and not reservation.settled:
            reservation.open = True
            lease.reservations[reservation.id] = reservation
            lease.open_spent += reservation.charged
            self.touch(lease)
            self.changes.leases[lease.id] = lease

    def metered(
        self, reservation: Reservation, gpu_us: int, tokens: int, weight_milli: int, now_us: int
    ) -> None:
        """Charge what an engine reports; ``gpu_us`` is raw, ``weight_milli`` its device's."""
        engine_us = gpu_us * weight_milli // 1000
        served = (reservation.engine_us, reservation.weight_milli)
        reservation.engine_us, reservation.weight_milli = max(served, (engine_us, weight_milli))
        self._charge(reservation, self._device_us(reservation), tokens, now_us)

    def settle(
        self, reservation: Reservation, used: Amount, raw_us: int | None, now_us: int
    ) -> None:
        """Charge what a gateway says; ``used`` is at its weight, ``raw_us`` before that."""
        reservation.raw_us = max(reservation.raw_us, raw_us or 0)
        gpu_us = max(used.gpu_us, reservation.charged.gpu_us)
        if reservation.weight_milli:
            gpu_us = self._device_us(reservation)
        self._charge(reservation, gpu_us, used.tokens, now_us)

    def _device_us(self, reservation: Reservation) -> int:
        """Charge of a reservation that an engine has reported."""
        gateways_us = reservation.raw_us * reservation.weight_milli // 1000
        return max(reservation.engine_us, gateways_us)

    def _charge(self, reservation: Reservation, gpu_us: int, tokens: int, now_us: int) -> None:
        """Set what a reservation is charged; tokens are never lowered."""
        before = reservation.charged
        change = Amount(gpu_us, max(tokens, before.tokens)) - before
        if change == ZERO:
            return
        if before == ZERO:
            reservation.since_us = now_us
        reservation.charged += change
        increase = positive(change)
        for node in self.tree.path(reservation.account):
            account = self.account(node.name, now_us)
            # What an earlier window was charged too much is not this one's to spend.
            counts = change if reservation.since_us >= account.start_us else increase
            if increase != ZERO and not node.is_user:
                self._watch(node, account, counts, now_us)
            account.spent += counts
            account.total += change
            self.changes.accounts[account.name] = account
        lease = self.state.leases.get((reservation.gateway_id, reservation.account))
        if lease is None:
            return
        if reservation.open:
            lease.open_spent += change
            self.touch(lease)
        elif reservation.settled:
            lease.adjust += increase
        self.changes.leases[lease.id] = lease

    def _watch(self, node: Node, account: Account, change: Amount, now_us: int) -> None:
        """Note what is borrowed, and tell of thresholds that a charge crosses."""
        spent = account.spent + change
        limits = self.limits(node)
        alerted = [account.alerted.gpu_us, account.alerted.tokens]
        pairs = ((spent.gpu_us, limits[0]), (spent.tokens, limits[1]))
        for place, (used, limit) in enumerate(pairs):
            if not limit or used * 100 < limit * self._lowest:
                continue
            for threshold in self.tree.config.alerts.thresholds:
                if threshold > alerted[place] and used * 100 >= limit * threshold:
                    alerted[place] = threshold
                    alert = events.alert(
                        node, account, ("gpu_us", "tokens")[place], threshold, used, limit, now_us
                    )
                    self.changes.alerts.append(alert)
                    self.changes.events.append(events.threshold(alert))
        account.alerted = Amount(*alerted)
        if node.cohort is not None:
            gpu_us = _beyond(spent.gpu_us, account.spent.gpu_us, limits[0])
            tokens = _beyond(spent.tokens, account.spent.tokens, limits[1])
            if gpu_us > 0 or tokens > 0:
                account.standing = self.standing(node, account, now_us) + Amount(gpu_us, tokens)
                account.standing_at_us = now_us

    @property
    def _lowest(self) -> int:
        return self.tree.config.alerts.thresholds[0]

    def standing(self, node: Node, account: Account, now_us: int) -> Amount:
        """What a department borrowed of late; what is older counts less."""
        if account.standing == ZERO or node.cohort is None:
            return ZERO
        half_life_us = self.tree.config.cohorts[node.cohort].half_life_hours * HOUR_US
        elapsed_us = now_us - account.standing_at_us
        return Amount(
            decayed(account.standing.gpu_us, elapsed_us, half_life_us),
            decayed(account.standing.tokens, elapsed_us, half_life_us),
        )

    def close(self, reservation: Reservation) -> None:
        """Take a reservation out of its lease; what it was charged stays charged."""
        if not reservation.open:
            return
        lease = self.state.leases[reservation.gateway_id, reservation.account]
        reservation.open = False
        lease.reservations.pop(reservation.id)
        lease.open_spent -= reservation.charged
        self.touch(lease)
        self.changes.leases[lease.id] = lease

    def end_lease(self, lease: Lease) -> None:
        """End a lease: what it held returns, what was charged under it stays.

        What its gateway did not settle, it will not: the engine's account is put on record.
        """
        for reservation in list(lease.reservations.values()):
            self.close(reservation)
            if reservation.unsettled is not None:
                self.changes.events.append(json.loads(reservation.unsettled))
                reservation.unsettled = None
            self.changes.reservations[reservation.id] = reservation
        self.drop(lease)

    def price(self, base_model: str) -> PriceBook:
        """Prices of a base model, to be changed."""
        book = self.state.prices.get(base_model)
        if book is None:
            book = self.state.prices[base_model] = PriceBook(base_model)
        return book

    def advance(self, now_us: int, now_s: float) -> None:
        """Let time pass: windows roll, leases of silent gateways and overrides end."""
        self._now_s = now_s
        if now_us >= self._rolls_us:
            self._roll(now_us)
        for gateway in [g for g in self.state.gateways.values() if now_s >= g.expires_s]:
            for lease in self.state.leases_at(gateway.id):
                self.end_lease(lease)
        for override in [o for o in self.state.overrides.values() if now_us >= o.expires_us]:
            self.end_override(override, "expired", override.by, override.reason, now_us)

    def end_override(
        self, override: Override, state: str, by: str, reason: str, now_us: int
    ) -> None:
        """Return an account to the limits of the file."""
        del self.state.overrides[override.account]
        self.relimit(override.account)
        self.changes.overrides[override.account] = None
        event = events.budget_set(override, state, by, reason, now_us)
        self.changes.events.append(event)

    def _roll(self, now_us: int) -> None:
        """Begin the windows that are due; users who spend nothing are forgotten."""
        self._rolls_us = NEVER_US
        self.count()
        for account in list(self.state.accounts.values()):
            if now_us >= account.end_us:
                if "~" in account.name and self.state.held.get(account.name, ZERO) == ZERO:
                    del self.state.accounts[account.name]
                    self.relimit(account.name)
                    self.changes.accounts[account.name] = None
                    continue
                self.account(account.name, now_us)
            self._rolls_us = min(self._rolls_us, account.end_us)


def _add(sums: dict[str, Amount], name: str, amount: Amount) -> None:
    """Add to a sum; one that comes to nothing is not kept."""
    total = sums.get(name, ZERO) + amount
    if total == ZERO:
        sums.pop(name, None)
    else:
        sums[name] = total


def _beyond(after: int, before: int, limit: int | None) -> int:
    """How much of an increase lies beyond a limit."""
    if limit is None:
        return 0
    return max(0, after - limit) - max(0, before - limit)
