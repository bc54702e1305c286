"""How much of an account a gateway is lent.

For each account

    committed = spent + sum over leases of max(0, bound - open_spent)

where ``bound`` is the most that the gateway may believe to hold, and ``open_spent`` what engines
already charged to reservations that it has not settled. A renewal is granted

    hold = open + min(need, available) + min(cushion, (available - need) / (4 x live gateways))

so that ``committed`` does not pass the limit; ``open``, what requests in flight have reserved, is
always kept. ``bound`` falls to ``hold`` only with the gateway's next renewal, which proves that it
has heard of it: until then it may reserve out of what it held before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from governance.budget.books import Books
from governance.budget.checks import owns
from governance.budget.messages import AccountState, LeaseAsk, Settlement
from governance.budget.state import (
    ZERO,
    Account,
    Gateway,
    Lease,
    largest,
    least,
    positive,
)
from governance.types import Amount

CUSHION_DIVISOR = 4
"""A cushion takes at most this part of what is available, divided by the live gateways."""
LIMITLESS = 1 << 62


def settle(
    books: Books, gateway_id: str, settlements: Iterable[Settlement], now_us: int
) -> dict[str, Amount]:
    """Charge what a gateway says, and take its reservations out of their leases.

    Returns:
        By account, what was settled for the first time.
    """
    first: dict[str, Amount] = {}
    for said in settlements:
        if not owns(gateway_id, said.reservation_id):
            books.conflicts += 1
            continue
        found = books.reservation(said.reservation_id, said.account, gateway_id)
        if found is None:
            continue
        books.close(found)
        books.settle(found, said.used, said.gpu_us, now_us)
        if found.settled:
            continue
        found.settled, found.unsettled = True, None
        first[found.account] = first.get(found.account, ZERO) + found.charged
        if said.final and said.prompt_bytes:
            books.price(said.base_model).sent(said.prompt_bytes, said.prompt_tokens)
    return first


def renew(
    books: Books,
    gateway: Gateway,
    asks: Iterable[LeaseAsk],
    settled: Mapping[str, Amount],
    live: int,
    now_us: int,
) -> None:
    """Renew a gateway's leases.

    Args:
        books: Accounts.
        gateway: Who asks.
        asks: What it has and wants. A lease that is not asked for comes to its end.
        settled: What it settled with this renewal, by account.
        live: Gateways that renew.
        now_us: Wall time.
    """
    wanted = {ask.account: ask for ask in asks if books.exists(ask.account)}
    held = {lease.account for lease in books.state.leases_at(gateway.id)}
    for name in sorted(wanted.keys() | held):
        account = books.account(name, now_us)
        ask = wanted.get(name, LeaseAsk(name, ZERO, ZERO, ZERO))
        _renew_one(books, gateway, account, ask, settled.get(name, ZERO), live)


def account_state(books: Books, name: str, now_us: int) -> AccountState:
    """An account as people see it."""
    account = books.view(name, now_us)
    gpu_us, tokens = books.limits(name)
    override = books.state.overrides.get(name)
    leased, reserved = ZERO, ZERO
    for lease in books.state.leases_of(name):
        leased += lease.outstanding
        reserved += least(lease.outstanding, positive(lease.open - lease.open_spent))
    return AccountState(
        account=name,
        window=account.window.split()[0],
        window_start_us=account.start_us,
        reset_us=account.end_us,
        limit_us=gpu_us,
        limit_tokens=tokens,
        spent=account.spent,
        leased=leased,
        open=reserved,
        overridden_until_us=override.expires_us if override else None,
    )


def _renew_one(
    books: Books, gateway: Gateway, account: Account, ask: LeaseAsk, settled: Amount, live: int
) -> None:
    """Grant one lease; what the account cannot cover is not granted."""
    lease = books.state.leases.get((gateway.id, account.name))
    if lease is None:
        lease_id = f"lease_{gateway.id}_{account.name}_{gateway.seq}"
        lease = Lease(lease_id, gateway.id, account.name)
    # The gateway has heard of `hold`, or it would have repeated its last request.
    left = positive(lease.hold - settled)
    others = books.state.outstanding(account.name) - lease.outstanding
    floor = positive(ask.open - lease.open_spent)
    available = positive(_limit(books, account.name) - account.spent - others - floor)
    need = least(ask.need, available)
    spare, share = available - need, CUSHION_DIVISOR * max(live, 1)
    cushion = least(ask.cushion, Amount(spare.gpu_us // share, spare.tokens // share))
    lease.open = ask.open
    lease.hold = ask.open + need + cushion
    lease.bound = largest(left, lease.hold)
    if lease.bound == ZERO and not lease.reservations:
        if (gateway.id, account.name) in books.state.leases:
            books.state.drop(lease)
            books.changes.leases[lease.id] = None
        return
    books.state.put(lease)
    books.changes.leases[lease.id] = lease


def _limit(books: Books, account: str) -> Amount:
    gpu_us, tokens = books.limits(account)
    return Amount(LIMITLESS if gpu_us is None else gpu_us, LIMITLESS if tokens is None else tokens)
