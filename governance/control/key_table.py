"""Service keys in the control plane's database."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping

from governance.control.database import Database
from governance.control.records import (
    MAX_GRACE_S,
    MAX_KEY_LIFETIME_S,
    SECOND_US,
    KeyEntry,
    KeySpec,
    KeyStatus,
)
from governance.control.snapshot import ServiceKeyRecord
from governance.errors import InvalidRequest, ObjectNotFound
from governance.identity.service_keys import is_key_id

_ENDED_KEYS_PUBLISHED_US = 30 * 86_400 * SECOND_US
"""How long an expired key stays in the published copy, so that its holder is told "expired". After
that it is as good as unknown."""


class KeyTable:
    """Makes, rotates, revokes and lists service keys. Knows hashes of secrets, never secrets."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def create(self, key_id: str, secret_hash: str, spec: KeySpec, by: str) -> KeyEntry:
        """Store a new key; storing the same one again gives what is stored.

        Raises:
            InvalidRequest: The lifetime is out of range, or a field is not valid.
        """
        _check_lifetime(spec.lifetime_s)
        with self._db.transaction():
            existing = self._existing(key_id, secret_hash, replaces=None)
            if existing is not None:
                return existing
            now_us = self._db.clock()
            self._insert_key(key_id, secret_hash, spec, by, now_us, replaces=None)
            self._db.event(now_us, by, "key.created", key_id, _describe(spec))
        return self.get(key_id)

    def rotate(
        self,
        key_id: str,
        new_key_id: str,
        secret_hash: str,
        by: str,
        lifetime_s: int | None,
        grace_s: int,
    ) -> KeyEntry:
        """Store a successor with the same rights; the old key ends after the grace.

        Args:
            key_id: Active key that was not rotated before.
            new_key_id: Id of the successor.
            secret_hash: Hash of the successor's secret.
            by: Principal key of the administrator.
            lifetime_s: Lifetime of the successor; ``None`` for that of the old key.
            grace_s: How long the old key still works; its own expiry is never extended.

        Returns:
            The successor.

        Raises:
            ObjectNotFound: There is no such key.
            InvalidRequest: The key is not active or was rotated before, or a number is out of
                range.
        """
        if not 0 <= grace_s <= MAX_GRACE_S:
            raise InvalidRequest(f"The grace must be 0 to {MAX_GRACE_S} seconds.", "grace_s")
        with self._db.transaction():
            existing = self._existing(new_key_id, secret_hash, replaces=key_id)
            if existing is not None:
                return existing
            now_us = self._db.clock()
            old = self.get(key_id)
            if old.status(now_us) is not KeyStatus.ACTIVE:
                raise InvalidRequest(f"The key is {old.status(now_us)}; create a new one.")
            row = self._db.execute(
                "SELECT key_id FROM service_key WHERE replaces = ?", (key_id,)
            ).fetchone()
            if row is not None:
                raise InvalidRequest(f"The key was rotated already; rotate {row['key_id']}.")
            spec = _successor(old.record, lifetime_s)
            _check_lifetime(spec.lifetime_s)
            self._insert_key(new_key_id, secret_hash, spec, by, now_us, replaces=key_id)
            old_expires_us = min(old.record.expires_us, now_us + grace_s * SECOND_US)
            self._db.execute(
                "UPDATE service_key SET expires_us = ? WHERE key_id = ?", (old_expires_us, key_id)
            )
            detail = {**_describe(spec), "old_expires_us": old_expires_us, "replaces": key_id}
            self._db.event(now_us, by, "key.rotated", new_key_id, detail)
        return self.get(new_key_id)

    def revoke(self, key_id: str, by: str, reason: str | None = None) -> KeyEntry:
        """Revoke a key for good; its predecessor and successor are left as they are.

        Raises:
            ObjectNotFound: There is no such key.
        """
        with self._db.transaction():
            if self.get(key_id).revoked_us is None:
                now_us = self._db.clock()
                self._db.execute(
                    "UPDATE service_key SET revoked_us = ?, revoked_by = ?, revoked_for = ?"
                    " WHERE key_id = ?",
                    (now_us, by, reason, key_id),
                )
                self._db.event(now_us, by, "key.revoked", key_id, {"reason": reason})
        return self.get(key_id)

    def get(self, key_id: str) -> KeyEntry:
        """One key.

        Raises:
            ObjectNotFound: There is no such key.
        """
        row = self._db.execute("SELECT * FROM service_key WHERE key_id = ?", (key_id,)).fetchone()
        if row is None:
            raise ObjectNotFound("There is no such service key.")
        return _entry(row)

    def all(self) -> tuple[KeyEntry, ...]:
        """All keys ever made, newest first."""
        rows = self._db.execute("SELECT * FROM service_key ORDER BY created_us DESC, key_id")
        return tuple(_entry(row) for row in rows)

    def touch(self, last_used_us: Mapping[str, int]) -> None:
        """Note when keys were last used; later times win, unknown ids are left out."""
        now_us = self._db.clock()
        with self._db.transaction():
            self._db.execute_many(
                "UPDATE service_key SET last_used_us = max(coalesce(last_used_us, 0), ?)"
                " WHERE key_id = ?",
                [(min(used_us, now_us), key_id) for key_id, used_us in last_used_us.items()],
            )

    def published(self) -> dict[str, ServiceKeyRecord]:
        """Keys that gateways must know: the active ones, and those that ended lately."""
        ended_us = self._db.clock() - _ENDED_KEYS_PUBLISHED_US
        rows = self._db.execute("SELECT * FROM service_key WHERE expires_us > ?", (ended_us,))
        return {row["key_id"]: _entry(row).record for row in rows}

    def _existing(self, key_id: str, secret_hash: str, replaces: str | None) -> KeyEntry | None:
        if not is_key_id(key_id):
            raise InvalidRequest("The key id is not valid.", "key_id")
        try:
            entry = self.get(key_id)
        except ObjectNotFound:
            return None
        if (entry.record.secret_hash, entry.record.replaces) != (secret_hash, replaces):
            raise InvalidRequest("The key id is taken.", "key_id")
        return entry

    def _insert_key(
        self,
        key_id: str,
        secret_hash: str,
        spec: KeySpec,
        by: str,
        now_us: int,
        replaces: str | None,
    ) -> None:
        self._db.execute(
            "INSERT INTO service_key (key_id, secret_hash, name, department, roles, models,"
            " operations, created_us, expires_us, created_by, replaces)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                key_id,
                secret_hash,
                spec.name,
                spec.department,
                json.dumps(spec.roles),
                None if spec.models is None else json.dumps(spec.models),
                None if spec.operations is None else json.dumps(spec.operations),
                now_us,
                now_us + spec.lifetime_s * SECOND_US,
                by,
                replaces,
            ),
        )


def _check_lifetime(lifetime_s: int) -> None:
    if not 1 <= lifetime_s <= MAX_KEY_LIFETIME_S:
        raise InvalidRequest(
            f"A key must expire after 1 to {MAX_KEY_LIFETIME_S} seconds (90 days).",
            "expires_in_s",
        )


def _successor(old: ServiceKeyRecord, lifetime_s: int | None) -> KeySpec:
    if lifetime_s is None:
        lifetime_s = (old.expires_us - old.created_us) // SECOND_US
    return KeySpec(old.name, old.department, old.roles, lifetime_s, old.models, old.operations)


def _describe(spec: KeySpec) -> dict[str, object]:
    return {
        "name": spec.name,
        "department": spec.department,
        "roles": spec.roles,
        "models": spec.models,
        "operations": spec.operations,
        "lifetime_s": spec.lifetime_s,
    }


def _entry(row: sqlite3.Row) -> KeyEntry:
    record = ServiceKeyRecord(
        key_id=row["key_id"],
        secret_hash=row["secret_hash"],
        name=row["name"],
        department=row["department"],
        roles=tuple(json.loads(row["roles"])),
        models=_names(row["models"]),
        operations=_names(row["operations"]),
        created_us=row["created_us"],
        expires_us=row["expires_us"],
        created_by=row["created_by"],
        replaces=row["replaces"],
    )
    return KeyEntry(record, row["revoked_us"], row["last_used_us"])


def _names(column: str | None) -> tuple[str, ...] | None:
    return None if column is None else tuple(json.loads(column))
