"""The ledger's accounts in memory, and what changed in them since the last save.

The rules of charging:

- A reservation is charged the largest figure that any report gave for it, in each dimension. All
  reports are cumulative, so a repeated or an overtaken one changes nothing, and it does not matter
  whether engine or gateway comes first.
- An increase is charged to the window in which it is reported.
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
        limits = self._config.account(name)
        kind, zone = (limits.window.value, limits.timezone) if limits else ("month", "UTC")
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
        """Count a reservation that is seen for the first time within its gateway's lease."""
        lease = self.state.leases.get((reservation.gateway_id, reservation.account))
        if lease is not None and not reservation.settled:
            reservation.open = True
            lease.reservations[reservation.id] = reservation

    def charge(self, reservation: Reservation, used: Amount, now_us: int) -> None:
        """Raise what a reservation is charged to ``used``, where that is more."""
        more = positive(used - reservation.charged)
        if more == ZERO:
            return
        reservation.charged += more
        account = self.account(reservation.account, now_us)
        account.spent += more
        account.total += more
        self.changes.accounts[account.name] = account
        lease = self.state.leases.get((reservation.gateway_id, reservation.account))
        if lease is None:
            return
        if reservation.open:
            lease.open_spent += more
        elif reservation.settled:
            lease.adjust += more
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
