"""How much of an account a gateway is lent.

For each account on a path, with ``held`` the sum over the leases at and under it,

    committed = spent + held,    held = sum of max(0, bound - open_spent)

where ``bound`` is the most that the gateway may believe to hold, and ``open_spent`` what engines
already charged to reservations that it has not settled. A renewal is granted

    hold = open + min(need, available) + min(cushion, (available - need) / (4 x live gateways))

so that ``committed`` passes no limit on the path (``governance.budget.room``); ``open``, what
requests in flight have reserved, is always kept. ``bound`` falls to ``hold`` only with the
gateway's next renewal, which proves that it has heard of it: until then it may reserve out of what
it held before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from governance.budget.books import Books
from governance.budget.checks import owns
from governance.budget.messages import LeaseAsk, Settlement
from governance.budget.room import Rooms
from governance.budget.state import ZERO, Gateway, Lease, largest, least, positive
from governance.types import Amount

CUSHION_DIVISOR = 4
"""A cushion takes at most this part of what is available, divided by the live gateways."""


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
    rooms = Rooms(books, now_us)
    for name in sorted(wanted.keys() | held):
        ask = wanted.get(name, LeaseAsk(name, ZERO, ZERO, ZERO))
        _renew_one(rooms, gateway, ask, settled.get(name, ZERO), live)


def _renew_one(rooms: Rooms, gateway: Gateway, ask: LeaseAsk, settled: Amount, live: int) -> None:
    """Grant one lease; what the path cannot cover is not granted."""
    books, name = rooms.books, ask.account
    lease = books.state.leases.get((gateway.id, name))
    known = lease is not None
    if lease is None:
        lease = Lease(f"lease_{gateway.id}_{name}_{gateway.seq}", gateway.id, name)
    # The gateway has heard of `hold`, or it would have repeated its last request.
    left = positive(lease.hold - settled)
    floor = positive(ask.open - lease.open_spent)
    available = rooms.available(name, lease.counted, floor, ask.need)
    need = least(ask.need, available)
    spare, share = available - need, CUSHION_DIVISOR * max(live, 1)
    cushion = least(ask.cushion, Amount(spare.gpu_us // share, spare.tokens // share))
    lease.open = ask.open
    lease.hold = ask.open + need + cushion
    lease.bound = largest(left, lease.hold)
    if lease.bound == ZERO and not lease.reservations:
        if known:
            books.drop(lease)
            rooms.changed(name)
        return
    books.state.put(lease)
    books.touch(lease)
    rooms.changed(name)
    books.changes.leases[lease.id] = lease
