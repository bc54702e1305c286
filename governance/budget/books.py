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
"""

from __future__ import annotations

import json

from governance.budget import events
from governance.budget.config import BudgetsConfig
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
from governance.budget.windows import window_at
from governance.types import Amount


class Books:
    """State, and changes to it.

    Args:
        state: As loaded.
        store: Where reservations that are not in memory are looked up.
        config: Limits.
    """

    def __init__(self, state: State, store: LedgerStore, config: BudgetsConfig) -> None:
        self.state = state
        self.changes = Changes()
        self.conflicts = 0
        """Reports that named a reservation of another gateway or account; they change nothing."""
        self._store = store
        self._config = config

    def account(self, name: str, now_us: int) -> Account:
        """An account with its present window; one that is not in the file is kept as well."""
        account = self.state.accounts.get(name)
        kind, zone = self._window(name)
        window = f"{kind} {zone}"
        if account is None:
            account = Account(name, window, *window_at(kind, zone, now_us))
            self.state.accounts[name] = account
            self.changes.accounts[name] = account
        elif now_us >= account.end_us:
            account.window = window
            account.start_us, account.end_us = window_at(kind, zone, now_us)
            account.spent = ZERO
            self.changes.accounts[name] = account
        elif account.window != window:
            # The file gives another window: what was spent in the old one counts on in it.
            account.window = window
            account.start_us, account.end_us = window_at(kind, zone, now_us)
            self.changes.accounts[name] = account
        return account

    def view(self, name: str, now_us: int) -> Account:
        """As ``account``, but nothing is kept of an account that nobody has used."""
        if name in self.state.accounts:
            return self.account(name, now_us)
        kind, zone = self._window(name)
        return Account(name, f"{kind} {zone}", *window_at(kind, zone, now_us))

    def exists(self, account: str) -> bool:
        """Whether the file has an account of this name."""
        return self._config.account(account) is not None

    def limits(self, account: str) -> tuple[int | None, int | None]:
        """Charged device-microseconds and tokens per window, an override counted."""
        limits = self._config.account(account)
        gpu_us, tokens = (limits.limit_us, limits.tokens) if limits else (0, 0)
        override = self.state.overrides.get(account)
        if override is not None:
            gpu_us = gpu_us if override.gpu_us is None else override.gpu_us
            tokens = tokens if override.tokens is None else override.tokens
        return gpu_us, tokens

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
        account = self.account(reservation.account, now_us)
        if before == ZERO:
            reservation.since_us = account.start_us
        reservation.charged += change
        # What an earlier window was charged too much is not this one's to spend.
        account.spent += change if reservation.since_us == account.start_us else positive(change)
        account.total += change
        self.changes.accounts[account.name] = account
        lease = self.state.leases.get((reservation.gateway_id, reservation.account))
        if lease is None:
            return
        if reservation.open:
            lease.open_spent += change
        elif reservation.settled:
            lease.adjust += positive(change)
        self.changes.leases[lease.id] = lease

    def close(self, reservation: Reservation) -> None:
        """Take a reservation out of its lease; what it was charged stays charged."""
        if not reservation.open:
            return
        lease = self.state.leases[reservation.gateway_id, reservation.account]
        reservation.open = False
        lease.reservations.pop(reservation.id)
        lease.open_spent -= reservation.charged
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
        self.state.drop(lease)
        self.changes.leases[lease.id] = None

    def price(self, base_model: str) -> PriceBook:
        """Prices of a base model, to be changed."""
        book = self.state.prices.get(base_model)
        if book is None:
            book = self.state.prices[base_model] = PriceBook(base_model)
        return book

    def advance(self, now_us: int, now_s: float) -> None:
        """Let time pass: windows roll, leases of silent gateways and overrides end."""
        for name in [a.name for a in self.state.accounts.values() if now_us >= a.end_us]:
            self.account(name, now_us)
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
        self.changes.overrides[override.account] = None
        event = events.budget_set(override, state, by, reason, now_us)
        self.changes.events.append(event)

    def _window(self, account: str) -> tuple[str, str]:
        limits = self._config.account(account)
        return (limits.window.value, limits.timezone) if limits else ("month", "UTC")
