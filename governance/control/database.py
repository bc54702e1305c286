"""The control plane's SQLite file: opening it, transactions, and the record of every change.

WAL mode with ``synchronous=FULL``: a transaction is on disk when it returns.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from governance.control.records import AdminEvent
from governance.control.schema import SCHEMA, SCHEMA_VERSION
from governance.ports import Clock


class StoreError(RuntimeError):
    """The database cannot be used; the message is for the operator."""


class Database:
    """One connection. Calls are quick and must not overlap; they may come from any thread.

    Args:
        path: SQLite file; created with mode 0600, its directory with mode 0700.
        clock: Wall clock.

    Raises:
        StoreError: Not a database of this program, or one of another version.
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        self.clock = clock
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite gives its journal files the mode of the database, so it is made before SQLite.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        # An actor is built in one thread and runs its methods in another, never in two at once.
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.row_factory = sqlite3.Row
        try:
            self._open(path)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise StoreError(f"{path}: cannot be used ({error})") from None
        except BaseException:
            self._connection.close()
            raise
        self._data_version = self._read_data_version()

    def close(self) -> None:
        """Close the connection; it cannot be used afterwards."""
        self._connection.close()

    def execute(self, sql: str, parameters: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Run one statement."""
        return self._connection.execute(sql, parameters)

    def execute_many(self, sql: str, parameters: Iterable[tuple[Any, ...]]) -> None:
        """Run one statement for each row of parameters."""
        self._connection.executemany(sql, parameters)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside is on disk afterwards, or nothing of it is."""
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            # SQLite has rolled back already after some errors, such as a full disk.
            if self._connection.in_transaction:
                self.execute("ROLLBACK")
            raise

    def event(
        self, at_us: int, by: str, action: str, target: str, detail: Mapping[str, object]
    ) -> None:
        """Record an administrative act, in the transaction that performs it."""
        self.execute(
            "INSERT INTO admin_event (at_us, by, action, target, detail) VALUES (?, ?, ?, ?, ?)",
            (at_us, by, action, target, json.dumps(detail, sort_keys=True, separators=(",", ":"))),
        )

    def events(self, after_seq: int = 0, limit: int = 1000) -> tuple[AdminEvent, ...]:
        """Administrative acts after a sequence number, oldest first."""
        rows = self.execute(
            "SELECT * FROM admin_event WHERE seq > ? ORDER BY seq LIMIT ?", (after_seq, limit)
        )
        return tuple(AdminEvent(**dict(row)) for row in rows)

    @property
    def version(self) -> int:
        """Number of administrative acts so far; never goes back."""
        return int(self.execute("SELECT coalesce(max(seq), 0) FROM admin_event").fetchone()[0])

    def changed_elsewhere(self) -> bool:
        """Whether another process has written to the file since the last call."""
        current = self._read_data_version()
        changed, self._data_version = current != self._data_version, current
        return changed

    def _read_data_version(self) -> int:
        return int(self.execute("PRAGMA data_version").fetchone()[0])

    def _open(self, path: Path) -> None:
        for pragma in (
            "busy_timeout=5000",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
        ):
            self.execute(f"PRAGMA {pragma}")
        with self.transaction():
            if not self.execute("SELECT 1 FROM sqlite_schema").fetchone():
                for statement in SCHEMA:
                    self.execute(statement)
                self.execute("INSERT INTO schema_version VALUES (?)", (SCHEMA_VERSION,))
            version = self.execute("SELECT max(version) FROM schema_version").fetchone()[0]
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"{path}: schema version {version}, but this program knows {SCHEMA_VERSION}"
            )
