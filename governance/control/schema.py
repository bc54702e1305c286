"""Tables of the control plane's database.

The limits that matter most stand here too, so that no code path can write round them.
"""

from __future__ import annotations

from governance.control.records import MAX_KEY_LIFETIME_S, SECOND_US

SCHEMA_VERSION = 1

SCHEMA = (
    "CREATE TABLE schema_version (version INTEGER NOT NULL) STRICT",
    "CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    f"""
    CREATE TABLE service_key (
      key_id       TEXT PRIMARY KEY,
      secret_hash  TEXT NOT NULL CHECK (length(secret_hash) = 64),
      name         TEXT NOT NULL,
      department   TEXT NOT NULL,
      roles        TEXT NOT NULL,          -- JSON array
      models       TEXT,                   -- JSON array, or null for no limit
      operations   TEXT,                   -- JSON array, or null for no limit
      created_us   INTEGER NOT NULL,
      expires_us   INTEGER NOT NULL,
      created_by   TEXT NOT NULL,
      replaces     TEXT UNIQUE REFERENCES service_key (key_id),
      revoked_us   INTEGER,
      revoked_by   TEXT,
      revoked_for  TEXT,
      last_used_us INTEGER,
      CHECK (expires_us - created_us BETWEEN 0 AND {MAX_KEY_LIFETIME_S * SECOND_US})
    ) STRICT
    """,
    """
    CREATE TRIGGER service_key_stays_revoked BEFORE UPDATE OF revoked_us ON service_key
    WHEN old.revoked_us IS NOT NULL AND new.revoked_us IS NOT old.revoked_us
    BEGIN SELECT RAISE (ABORT, 'a revocation is final'); END
    """,
    """
    CREATE TRIGGER service_key_never_extended BEFORE UPDATE OF expires_us ON service_key
    WHEN new.expires_us > old.expires_us
    BEGIN SELECT RAISE (ABORT, 'an expiry is never extended'); END
    """,
    """
    CREATE TABLE revoked_token (
      token_id   TEXT PRIMARY KEY,         -- jti, or SHA-256 of the token in hex
      revoked_us INTEGER NOT NULL,
      until_us   INTEGER NOT NULL,
      by         TEXT NOT NULL,
      reason     TEXT
    ) STRICT
    """,
    """
    CREATE TABLE revoked_subject (
      issuer        TEXT NOT NULL,
      subject       TEXT NOT NULL,
      not_before_us INTEGER NOT NULL,
      revoked_us    INTEGER NOT NULL,
      by            TEXT NOT NULL,
      reason        TEXT,
      PRIMARY KEY (issuer, subject)
    ) STRICT
    """,
    """
    CREATE TABLE admin_event (
      seq    INTEGER PRIMARY KEY AUTOINCREMENT,
      at_us  INTEGER NOT NULL,
      by     TEXT NOT NULL,
      action TEXT NOT NULL,
      target TEXT NOT NULL,
      detail TEXT NOT NULL                 -- canonical JSON
    ) STRICT
    """,
    """
    CREATE TRIGGER admin_event_no_update BEFORE UPDATE ON admin_event
    BEGIN SELECT RAISE (ABORT, 'append-only'); END
    """,
    """
    CREATE TRIGGER admin_event_no_delete BEFORE DELETE ON admin_event
    BEGIN SELECT RAISE (ABORT, 'append-only'); END
    """,
)
"""Statements that make an empty database, but for the row of ``schema_version``."""
