"""The ledger's SQLite file: one transaction a batch, and what a restart reads.

WAL mode with ``synchronous=FULL``: a batch is on disk when ``save`` returns. One process at a
time: a lock file is held for as long as the store is open.

A restart reads accounts, overrides, gateways, leases, open reservations, replicas and prices: what
is alive, not what happened. Reservations that are through are looked up one by one, by their
unique id, when a late or repeated report names one.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from governance.budget.prices import PriceBook, Sketch
from governance.budget.schema import APPLICATION_ID, SCHEMA, SCHEMA_VERSION, UPGRADES
from governance.budget.state import (
    Account,
    Gateway,
    Lease,
    Override,
    Replica,
    Reservation,
    State,
)
from governance.types import Amount

PRUNE_ROWS = 2_000
"""Reservations looked at in one step of pruning."""

_RESERVATION = (
    "id, account, gateway_id, gpu_us, tokens, open, settled, ended, unsettled,"
    " engine_us, weight_milli, raw_us, since_us"
)
_UPSERT_RESERVATION = f"""
    INSERT INTO reservation ({_RESERVATION}, changed_us) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)
    ON CONFLICT (id) DO UPDATE SET gpu_us = excluded.gpu_us, tokens = excluded.tokens,
      open = excluded.open, settled = excluded.settled, ended = excluded.ended,
      unsettled = excluded.unsettled, engine_us = excluded.engine_us,
      weight_milli = excluded.weight_milli, raw_us = excluded.raw_us,
      since_us = excluded.since_us, changed_us = excluded.changed_us
"""  # noqa: S608 - a constant


class LedgerStoreError(RuntimeError):
    """The database cannot be used; the message is for the operator."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Budget that was moved from one account to another."""

    ts_us: int
    source: str
    target: str
    moved: Amount
    until_us: int
    by: str
    reason: str
    key: str | None = None
    """Of the demand; a demand that comes again has the same."""


@dataclass(slots=True)
class Changes:
    """What a batch changed; ``None`` as a row means that it is gone."""

    accounts: dict[str, Account | None] = field(default_factory=dict)
    overrides: dict[str, Override | None] = field(default_factory=dict)
    gateways: dict[str, Gateway | None] = field(default_factory=dict)
    leases: dict[str, Lease | None] = field(default_factory=dict)
    """By id."""
    reservations: dict[str, Reservation] = field(default_factory=dict)
    replicas: dict[str, Replica] = field(default_factory=dict)
    meters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    prices: dict[str, PriceBook] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    events_written: int = 0
    """Events up to this number are in the audit trail."""
    alerts: list[dict[str, Any]] = field(default_factory=list)
    alerts_done: int = 0
    """Alerts up to this number are delivered, or given up."""
    transfers: list[Transfer] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in self.__slots__)


class LedgerStore:
    """One connection. Calls must not overlap; they may come from any thread.

    Args:
        path: SQLite file; created with mode 0600, its directory with mode 0700.

    Raises:
        LedgerStoreError: Not a ledger, one of another version, or one that is in use.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite gives its journal files the mode of the database, so it is made before SQLite.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._lock = os.open(
            path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise LedgerStoreError(f"{path}: is in use by another ledger") from None
        # An actor is built in one thread and runs its methods in another, never in two at once.
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._pruned_to = 0
        try:
            self._open(path)
        except sqlite3.DatabaseError as error:
            self.close()
            raise LedgerStoreError(f"{path}: cannot be used ({error})") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection and give up the lock."""
        self._connection.close()
        os.close(self._lock)

    def load(self) -> State:
        """Everything that is alive."""
        state = State()
        for row in self._rows("SELECT * FROM account"):
            name, window, start_us, end_us = row[:4]
            spent, total, moved, alerted, standing = (
                Amount(*row[i : i + 2]) for i in range(4, 14, 2)
            )
            state.accounts[name] = Account(
                name, window, start_us, end_us, spent, total, moved, alerted, standing, row[14]
            )
        for row in self._rows("SELECT * FROM override"):
            state.overrides[row[0]] = Override(*row)
        for row in self._rows("SELECT * FROM gateway"):
            state.gateways[row[0]] = Gateway(*row)
        for row in self._rows("SELECT * FROM lease"):
            lease_id, gateway_id, name = row[:3]
            hold, bound, reserved, adjust = (Amount(*row[i : i + 2]) for i in (3, 5, 7, 9))
            state.put(Lease(lease_id, gateway_id, name, hold, bound, reserved, adjust))
        for row in self._rows(f"SELECT {_RESERVATION} FROM reservation WHERE open = 1"):  # noqa: S608 - a constant
            found = _reservation(row)
            lease = state.leases[found.gateway_id, found.account]
            lease.reservations[found.id] = found
            lease.open_spent += found.charged
        for row in self._rows("SELECT * FROM replica"):
            state.replicas[row[0]] = _replica(row)
        for row in self._rows("SELECT * FROM meter_sum"):
            state.meters[row[0]] = tuple(row[1:])
        for row in self._rows("SELECT * FROM price"):
            state.prices[row[0]] = PriceBook(*row[:2], *map(Sketch.load, row[2:]))
        return state

    def reservation(self, reservation_id: str) -> Reservation | None:
        """One reservation, by its id."""
        query = f"SELECT {_RESERVATION} FROM reservation WHERE id = ?"  # noqa: S608 - a constant
        row = self._connection.execute(query, (reservation_id,)).fetchone()
        return None if row is None else _reservation(row)

    def setting(self, name: str) -> str | None:
        """A remembered value."""
        row = self._connection.execute("SELECT value FROM setting WHERE name = ?", (name,))
        found = row.fetchone()
        return None if found is None else str(found[0])

    def events(self, limit: int) -> list[tuple[int, dict[str, Any]]]:
        """Audit events that are not written yet, oldest first."""
        rows = self._rows("SELECT seq, detail FROM event ORDER BY seq LIMIT ?", (limit,))
        return [(seq, json.loads(detail)) for seq, detail in rows]

    def alerts(self, limit: int) -> list[tuple[int, dict[str, Any]]]:
        """Alerts that are not delivered yet, oldest first."""
        rows = self._rows("SELECT seq, detail FROM alert ORDER BY seq LIMIT ?", (limit,))
        return [(seq, json.loads(detail)) for seq, detail in rows]

    def transfers(self, limit: int) -> list[Transfer]:
        """The newest entries that moved budget, newest first."""
        rows = self._rows(
            "SELECT ts_us, source, target, gpu_us, tokens, until_us, by, reason, key FROM transfer"
            " ORDER BY n DESC LIMIT ?",
            (limit,),
        )
        return [
            Transfer(ts_us, source, target, Amount(gpu_us, tokens), until_us, by, reason, key)
            for ts_us, source, target, gpu_us, tokens, until_us, by, reason, key in rows
        ]

    def has_transfer(self, key: str) -> bool:
        """Whether a demand to move budget was carried out."""
        row = self._connection.execute("SELECT 1 FROM transfer WHERE key = ?", (key,)).fetchone()
        return row is not None

    def save(self, changes: Changes, age_us: int) -> None:
        """Everything that changed is on disk afterwards, or nothing of it is."""
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            self._write(changes, age_us)
            connection.execute("COMMIT")
        except BaseException:
            # SQLite has rolled back already after some errors, such as a full disk.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def prune(self, closed_before_us: int, any_before_us: int) -> int:
        """Forget old reservations, a step at a time; each call goes on where the last ended.

        Args:
            closed_before_us: Forget what gateway and engine are through with, and nobody named
                since then.
            any_before_us: Forget whatever nobody named since then, unless it is open.

        Returns:
            How many were forgotten.
        """
        row = self._connection.execute(
            "SELECT max(n) FROM (SELECT n FROM reservation WHERE n > ? ORDER BY n LIMIT ?)",
            (self._pruned_to, PRUNE_ROWS),
        ).fetchone()
        if row[0] is None:
            self._pruned_to = 0
            return 0
        deleted = self._connection.execute(
            "DELETE FROM reservation WHERE n > ? AND n <= ? AND open = 0 AND"
            " (changed_us < ? OR (settled = 1 AND ended = 1 AND changed_us < ?))",
            (self._pruned_to, row[0], any_before_us, closed_before_us),
        )
        self._pruned_to = row[0]
        return deleted.rowcount

    def _write(self, changes: Changes, age_us: int) -> None:
        many = self._connection.executemany
        accounts = changes.accounts
        many("DELETE FROM account WHERE name = ?", [(n,) for n, a in accounts.items() if a is None])
        many(
            "INSERT OR REPLACE INTO account VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            [_account_row(a) for a in accounts.values() if a is not None],
        )
        # Leases go first: none may be left without room for the one that takes its place.
        gone = [(key,) for key, lease in changes.leases.items() if lease is None]
        many("DELETE FROM lease WHERE id = ?", gone)
        many(
            "INSERT OR REPLACE INTO lease VALUES (?,?,?,?,?,?,?,?,?,?,?)",
            [_lease_row(lease) for lease in changes.leases.values() if lease is not None],
        )
        many(
            _UPSERT_RESERVATION,
            [(*_reservation_row(r), age_us) for r in changes.reservations.values()],
        )
        self._keyed("override", "account", changes.overrides, _override_row)
        self._keyed("gateway", "id", changes.gateways, lambda g: (g.id, g.seq, g.heard_us))
        self._keyed("replica", "id", changes.replicas, _replica_row)
        self._keyed("price", "base_model", changes.prices, _price_row)
        meters = {name: (name, *sums) for name, sums in changes.meters.items()}
        self._keyed("meter_sum", "base_model", meters, lambda row: row)
        settings = {name: (name, value) for name, value in changes.settings.items()}
        self._keyed("setting", "name", settings, lambda row: row)
        many(
            "INSERT INTO event (detail) VALUES (?)",
            [(json.dumps(event, separators=(",", ":")),) for event in changes.events],
        )
        if changes.events_written:
            many("DELETE FROM event WHERE seq <= ?", [(changes.events_written,)])
        many(
            "INSERT INTO alert (detail) VALUES (?)",
            [(json.dumps(alert, separators=(",", ":")),) for alert in changes.alerts],
        )
        if changes.alerts_done:
            many("DELETE FROM alert WHERE seq <= ?", [(changes.alerts_done,)])
        many(
            "INSERT INTO transfer (ts_us, source, target, gpu_us, tokens, until_us, by, reason,"
            " key) VALUES (?,?,?,?,?,?,?,?,?)",
            [
                (t.ts_us, t.source, t.target, *_pair(t.moved), t.until_us, t.by, t.reason, t.key)
                for t in changes.transfers
            ],
        )

    def _keyed(self, table: str, key: str, rows: Mapping[str, Any], values: Any) -> None:
        """Write or delete the rows of a small table."""
        for name, row in rows.items():
            if row is None:
                self._connection.execute(f"DELETE FROM {table} WHERE {key} = ?", (name,))  # noqa: S608 - constants
            else:
                data = values(row)
                marks = ",".join("?" * len(data))
                self._connection.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", data)  # noqa: S608 - constants

    def _rows(self, sql: str, parameters: tuple[Any, ...] = ()) -> Iterable[tuple[Any, ...]]:
        return self._connection.execute(sql, parameters).fetchall()

    def _open(self, path: Path) -> None:
        execute = self._connection.execute
        execute("PRAGMA busy_timeout=5000")
        new = not execute("SELECT 1 FROM sqlite_schema").fetchone()
        # Before anything is written: another program's database stays as it is.
        if not new and execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise LedgerStoreError(f"{path}: is a database, but not a budget ledger")
        execute("PRAGMA journal_mode=WAL")
        execute("PRAGMA synchronous=FULL")
        if new:
            execute("BEGIN IMMEDIATE")
            for statement in SCHEMA:
                execute(statement)
            execute("INSERT INTO schema_version VALUES (?)", (SCHEMA_VERSION,))
            execute(f"PRAGMA application_id = {APPLICATION_ID}")
            execute("COMMIT")
        version = execute("SELECT max(version) FROM schema_version").fetchone()[0]
        if version in UPGRADES:
            execute("BEGIN IMMEDIATE")
            for statement in UPGRADES[version]:
                execute(statement)
            execute("UPDATE schema_version SET version = ?", (SCHEMA_VERSION,))
            execute("COMMIT")
            version = SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise LedgerStoreError(
                f"{path}: schema version {version}, but this program knows {SCHEMA_VERSION}"
            )


def _pair(amount: Amount) -> tuple[int, int]:
    return amount.gpu_us, amount.tokens


def _account_row(a: Account) -> tuple[Any, ...]:
    amounts = (a.spent, a.total, a.moved, a.alerted, a.standing)
    figures = [figure for amount in amounts for figure in _pair(amount)]
    return (a.name, a.window, a.start_us, a.end_us, *figures, a.standing_at_us)


def _reservation(row: tuple[Any, ...]) -> Reservation:
    key, account, gateway_id, gpu_us, tokens, is_open, settled, ended, *rest = row
    flags = (bool(is_open), bool(settled), bool(ended))
    return Reservation(key, account, gateway_id, Amount(gpu_us, tokens), *flags, *rest)


def _replica(row: tuple[Any, ...]) -> Replica:
    key, epoch, base_model, accelerator, devices, seq, running, live, raw, marked, at_us = row
    meters = (tuple(json.loads(raw)), tuple(json.loads(marked)))
    head = (key, epoch, base_model, accelerator, devices, seq, running, bool(live))
    return Replica(*head, *meters, at_us)


def _reservation_row(r: Reservation) -> tuple[Any, ...]:
    flags = (r.open, r.settled, r.ended)
    reported = (r.engine_us, r.weight_milli, r.raw_us, r.since_us)
    return (r.id, r.account, r.gateway_id, *_pair(r.charged), *flags, r.unsettled, *reported)


def _lease_row(v: Lease) -> tuple[Any, ...]:
    amounts = (*_pair(v.hold), *_pair(v.bound), *_pair(v.open), *_pair(v.adjust))
    return (v.id, v.gateway_id, v.account, *amounts)


def _override_row(o: Override) -> tuple[Any, ...]:
    return o.account, o.gpu_us, o.tokens, o.expires_us, o.by, o.reason


def _replica_row(r: Replica) -> tuple[Any, ...]:
    raw, marked = json.dumps(r.raw), json.dumps(r.marked)
    head = (r.id, r.epoch, r.base_model, r.accelerator, r.devices, r.seq, r.running, r.live)
    return (*head, raw, marked, r.marked_us)


def _price_row(p: PriceBook) -> tuple[Any, ...]:
    return p.base_model, p.weight_milli, p.prefill.dump(), p.decode.dump(), p.density.dump()
