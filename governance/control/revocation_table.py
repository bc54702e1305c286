"""Revocations in the control plane's database.

A revoked key is marked in its own row (``KeyTable.revoke``); tokens and subjects have tables here.
"""

from __future__ import annotations

import sqlite3

from governance.control.database import Database, StoreError
from governance.control.records import (
    MAX_TOKEN_REVOCATION_S,
    REVOCATION_LEEWAY_S,
    SECOND_US,
    RevocationEntry,
    RevocationKind,
)
from governance.control.snapshot import Revocations
from governance.errors import InvalidRequest


class RevocationTable:
    """Revokes tokens and subjects, and lists all revocations in force."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def revoke_token(
        self, token_id: str, by: str, expires_us: int | None = None, reason: str | None = None
    ) -> RevocationEntry:
        """Refuse one token until it has expired anyway.

        Args:
            token_id: ``jti``, or SHA-256 of the token in hex.
            by: Principal key of the administrator.
            expires_us: When the token expires; ``None`` for the longest that is kept.
            reason: For the record.

        Raises:
            InvalidRequest: The token has expired, or lives longer than a revocation is kept.
        """
        now_us = self._db.clock()
        longest_us = now_us + MAX_TOKEN_REVOCATION_S * SECOND_US
        expires_us = longest_us if expires_us is None else expires_us
        until_us = expires_us + REVOCATION_LEEWAY_S * SECOND_US
        if expires_us > longest_us:
            raise InvalidRequest(
                "A token that lives longer than 36 hours cannot be revoked by itself;"
                " revoke its subject.",
                "expires_at",
            )
        if until_us <= now_us:
            raise InvalidRequest("The token has expired already.", "expires_at")
        with self._db.transaction():
            before = self._token(token_id)
            if before is None or (before.until_us or 0) < until_us:
                self._db.execute(
                    "INSERT INTO revoked_token VALUES (?, ?, ?, ?, ?)"
                    " ON CONFLICT (token_id) DO UPDATE SET until_us = excluded.until_us",
                    (token_id, now_us, until_us, by, reason),
                )
                detail = {"until_us": until_us, "reason": reason}
                self._db.event(now_us, by, "token.revoked", token_id, detail)
            return _found(self._token(token_id))

    def revoke_subject(
        self,
        issuer: str,
        subject: str,
        by: str,
        not_before_us: int | None = None,
        reason: str | None = None,
    ) -> RevocationEntry:
        """Refuse what was issued to a subject before a moment; this never lapses or goes back.

        Args:
            issuer: Configured name of the issuer.
            subject: Subject as in ``Principal.subject``.
            by: Principal key of the administrator.
            not_before_us: The moment; ``None`` for now. At most a day ahead, which also refuses
                what will be issued until then: useful where the issuer's clock may be ahead.
            reason: For the record.

        Raises:
            InvalidRequest: The moment is too far ahead.
        """
        now_us = self._db.clock()
        not_before_us = now_us if not_before_us is None else not_before_us
        if not_before_us > now_us + MAX_TOKEN_REVOCATION_S * SECOND_US:
            raise InvalidRequest("The moment is more than 36 hours ahead.", "not_before")
        with self._db.transaction():
            before = self._subject(issuer, subject)
            if before is None or (before.not_before_us or 0) < not_before_us:
                self._db.execute(
                    "INSERT OR REPLACE INTO revoked_subject VALUES (?, ?, ?, ?, ?, ?)",
                    (issuer, subject, not_before_us, now_us, by, reason),
                )
                detail = {"issuer": issuer, "not_before_us": not_before_us, "reason": reason}
                self._db.event(now_us, by, "subject.revoked", subject, detail)
            return _found(self._subject(issuer, subject))

    def entries(self) -> tuple[RevocationEntry, ...]:
        """Revocations in force, newest first."""
        keys = self._db.execute("SELECT * FROM service_key WHERE revoked_us IS NOT NULL")
        tokens = self._db.execute(
            "SELECT * FROM revoked_token WHERE until_us > ?", (self._db.clock(),)
        )
        subjects = self._db.execute("SELECT * FROM revoked_subject")
        entries = [
            *(_key_entry(row) for row in keys),
            *(_token_entry(row) for row in tokens),
            *(_subject_entry(row) for row in subjects),
        ]
        return tuple(sorted(entries, key=lambda entry: (-entry.revoked_us, entry.target)))

    def published(self) -> Revocations:
        """Revocations in force, as gateways look them up."""
        entries = self.entries()
        return Revocations(
            key_ids=frozenset(e.target for e in entries if e.kind is RevocationKind.KEY),
            token_ids=frozenset(e.target for e in entries if e.kind is RevocationKind.TOKEN),
            subjects={
                (e.issuer, e.target): e.not_before_us
                for e in entries
                if e.issuer is not None and e.not_before_us is not None
            },
        )

    def _token(self, token_id: str) -> RevocationEntry | None:
        row = self._db.execute(
            "SELECT * FROM revoked_token WHERE token_id = ?", (token_id,)
        ).fetchone()
        return None if row is None else _token_entry(row)

    def _subject(self, issuer: str, subject: str) -> RevocationEntry | None:
        row = self._db.execute(
            "SELECT * FROM revoked_subject WHERE issuer = ? AND subject = ?", (issuer, subject)
        ).fetchone()
        return None if row is None else _subject_entry(row)


def _found(entry: RevocationEntry | None) -> RevocationEntry:
    if entry is None:
        raise StoreError("a row that was just written is not there")
    return entry


def _key_entry(row: sqlite3.Row) -> RevocationEntry:
    return RevocationEntry(
        RevocationKind.KEY,
        row["key_id"],
        row["revoked_us"],
        row["revoked_by"],
        reason=row["revoked_for"],
    )


def _token_entry(row: sqlite3.Row) -> RevocationEntry:
    return RevocationEntry(
        RevocationKind.TOKEN,
        row["token_id"],
        row["revoked_us"],
        row["by"],
        until_us=row["until_us"],
        reason=row["reason"],
    )


def _subject_entry(row: sqlite3.Row) -> RevocationEntry:
    return RevocationEntry(
        RevocationKind.SUBJECT,
        row["subject"],
        row["revoked_us"],
        row["by"],
        issuer=row["issuer"],
        not_before_us=row["not_before_us"],
        reason=row["reason"],
    )
