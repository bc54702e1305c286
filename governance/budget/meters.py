"""What engine replicas report: charges of their requests, and meters of their devices.

Meters are cumulative since the engine's start, which ``epoch`` names. Over all engines ever,
``elapsed = busy + idle`` and ``busy = attributed + unattributed``, in raw device-microseconds; a
meter that goes back keeps its larger figure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from governance.budget import events
from governance.budget.books import Books
from governance.budget.checks import owns
from governance.budget.messages import MeterReport, MeterRow
from governance.budget.prices import PriceBook
from governance.budget.state import METERS, Replica, State

SILENT_S = 10.0
"""An engine that was not heard of for so long is given up; it reports twice a second."""
INTERVAL_US = 60_000_000
"""A replica's device time goes on record this often."""


def take(books: Books, report: MeterReport, now_us: int, now_s: float) -> tuple[bool, bool]:
    """Take a replica's meters in.

    Returns:
        Whether the report is new, and whether a meter went back.
    """
    state, changes = books.state, books.changes
    raw = tuple(getattr(report, name) for name in METERS)
    replica = state.replicas.get(report.replica_id)
    if replica is not None and replica.epoch == report.epoch and report.seq <= replica.seq:
        return False, False
    if replica is None or replica.epoch != report.epoch:
        if replica is not None and replica.live:
            _end(books, replica, "restarted", now_us, now_s)
        zero = (0,) * len(METERS)
        replica = Replica(
            id=report.replica_id,
            epoch=report.epoch,
            base_model=report.base_model,
            accelerator=report.accelerator,
            devices=report.devices,
            seq=0,
            running=0,
            live=True,
            raw=zero,
            marked=zero,
            marked_us=now_us,
        )
        state.replicas[replica.id] = replica
    grown = tuple(max(new, old) for new, old in zip(raw, replica.raw, strict=True))
    before = state.meters.get(replica.base_model, (0,) * len(METERS))
    sums = tuple(s + new - old for s, new, old in zip(before, grown, replica.raw, strict=True))
    state.meters[replica.base_model] = changes.meters[replica.base_model] = sums
    replica.raw = grown
    replica.seq, replica.running, replica.heard_s = report.seq, report.running, now_s
    changes.replicas[replica.id] = replica
    if not report.dead:
        replica.live = True
    elif replica.live:  # a replica whose core is dead says so until it is replaced
        _end(books, replica, "dead", now_us, now_s)
    return True, grown != raw


def charge_row(
    books: Books,
    row: MeterRow,
    report: MeterReport,
    weight_milli: int,
    prices: PriceBook,
    now_us: int,
) -> None:
    """Charge what an engine reports for one reservation, and learn its price when it is through."""
    if not owns(row.gateway_id, row.reservation_id):
        books.conflicts += 1
        return
    found = books.reservation(row.reservation_id, row.account, row.gateway_id)
    if found is None:
        return
    if not found.open and not found.settled and not found.ended:
        books.open(found)
    tokens = row.prompt_tokens + row.decode_tokens
    books.metered(found, row.gpu_us, tokens, weight_milli, now_us)
    if not row.ended or found.ended:
        return
    found.ended = True
    prices.served(row.prefill_us, row.prefill_tokens, row.decode_us, row.decode_tokens)
    lease = books.state.leases.get((row.gateway_id, row.account))
    event = events.settled(row, report, found, lease.id if lease else None, now_us)
    if not row.delivered or (lease is None and not found.settled):
        books.changes.events.append(event)
    elif not found.settled:
        # The gateway was told, and may die before it settles: then this goes on record.
        found.unsettled = json.dumps(event, separators=(",", ":"))


def sweep(books: Books, now_us: int, now_s: float) -> None:
    """Give up replicas that went silent, and put device time on record."""
    for replica in [r for r in books.state.replicas.values() if r.live]:
        if now_s - replica.heard_s >= SILENT_S:
            _end(books, replica, "silent", now_us, now_s)
        elif now_us - replica.marked_us >= INTERVAL_US:
            _mark(books, replica, now_us)


def sums(state: State) -> dict[str, dict[str, int]]:
    """Meters of all engines ever, by base model."""
    return {model: dict(zip(METERS, row, strict=True)) for model, row in state.meters.items()}


def _end(books: Books, replica: Replica, seen: str, now_us: int, now_s: float) -> None:
    """A replica is over. It was lost if it had requests: an idle one leaves nothing unreported."""
    replica.live = False
    _mark(books, replica, now_us)
    if seen == "dead":
        bound_us = replica.raw[METERS.index("unattributed_us")]
    elif replica.running:
        bound_us = replica.devices * round((now_s - replica.heard_s) * 1_000_000)
    else:
        return
    books.changes.events.append(events.engine_lost(replica, bound_us, seen, now_us))


def _mark(books: Books, replica: Replica, now_us: int) -> None:
    """Put the device time since the last mark on record."""
    if replica.raw != replica.marked:
        books.changes.events.append(events.interval(replica, now_us))
    replica.marked, replica.marked_us = replica.raw, now_us
    books.changes.replicas[replica.id] = replica


def live(state: State) -> Iterator[Replica]:
    """Replicas that report."""
    return (replica for replica in state.replicas.values() if replica.live)
