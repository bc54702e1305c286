"""Tables of the ledger's database.

All figures are integers: device-microseconds and tokens, charged unless a column says raw.
"""

from __future__ import annotations

SCHEMA_VERSION = 3
APPLICATION_ID = 0x47484C31
"""``GHL1``: tells a ledger from any other SQLite file."""

_NEW_IN_3 = (
    """
    CREATE TABLE alert (                   -- thresholds that were crossed and not told yet
      seq    INTEGER PRIMARY KEY AUTOINCREMENT,
      detail TEXT NOT NULL                 -- JSON
    ) STRICT
    """,
    """
    CREATE TABLE transfer (                -- entries that moved budget from one account to another
      n        INTEGER PRIMARY KEY,
      ts_us    INTEGER NOT NULL,
      source   TEXT NOT NULL,
      target   TEXT NOT NULL,
      gpu_us   INTEGER NOT NULL CHECK (gpu_us >= 0),
      tokens   INTEGER NOT NULL CHECK (tokens >= 0),
      until_us INTEGER NOT NULL,           -- end of the window in which it counts
      by       TEXT NOT NULL,
      reason   TEXT NOT NULL,
      key      TEXT UNIQUE                 -- of the demand: what comes again is not done again
    ) STRICT
    """,
)

SCHEMA = (
    "CREATE TABLE schema_version (version INTEGER NOT NULL) STRICT",
    "CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    """
    CREATE TABLE account (
      name      TEXT PRIMARY KEY,
      window    TEXT NOT NULL,             -- kind and zone that start and end were computed with
      start_us  INTEGER NOT NULL,
      end_us    INTEGER NOT NULL,
      gpu_us    INTEGER NOT NULL CHECK (gpu_us >= 0),   -- spent in this window
      tokens    INTEGER NOT NULL CHECK (tokens >= 0),
      total_gpu_us INTEGER NOT NULL,       -- spent ever; never goes back
      total_tokens INTEGER NOT NULL,
      moved_gpu_us INTEGER NOT NULL DEFAULT 0,      -- transferred in during this window, less out
      moved_tokens INTEGER NOT NULL DEFAULT 0,
      alerted_gpu_us INTEGER NOT NULL DEFAULT 0,    -- highest threshold told, per cent
      alerted_tokens INTEGER NOT NULL DEFAULT 0,
      standing_gpu_us INTEGER NOT NULL DEFAULT 0,   -- borrowed, older borrowings counting less
      standing_tokens INTEGER NOT NULL DEFAULT 0,
      standing_at_us  INTEGER NOT NULL DEFAULT 0
    ) STRICT
    """,
    """
    CREATE TABLE override (
      account    TEXT PRIMARY KEY,
      gpu_us     INTEGER,                  -- null: as the file says
      tokens     INTEGER,
      expires_us INTEGER NOT NULL,
      by         TEXT NOT NULL,
      reason     TEXT NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE gateway (
      id       TEXT PRIMARY KEY,
      seq      INTEGER NOT NULL,           -- of the last renewal that was carried out
      heard_us INTEGER NOT NULL            -- by the age of the file, as changed_us
    ) STRICT
    """,
    """
    CREATE TABLE lease (
      id            TEXT PRIMARY KEY,
      gateway_id    TEXT NOT NULL,
      account       TEXT NOT NULL,
      hold_gpu_us   INTEGER NOT NULL,      -- as answered to the last renewal
      hold_tokens   INTEGER NOT NULL,
      bound_gpu_us  INTEGER NOT NULL,      -- the most that the gateway may believe to hold
      bound_tokens  INTEGER NOT NULL,
      open_gpu_us   INTEGER NOT NULL,      -- as the gateway said
      open_tokens   INTEGER NOT NULL,
      adjust_gpu_us INTEGER NOT NULL,
      adjust_tokens INTEGER NOT NULL,
      UNIQUE (gateway_id, account)
    ) STRICT
    """,
    """
    CREATE TABLE reservation (
      n          INTEGER PRIMARY KEY,      -- in order of first report
      id         TEXT NOT NULL UNIQUE,     -- a second report of the same changes the first's row
      account    TEXT NOT NULL,
      gateway_id TEXT NOT NULL,
      gpu_us     INTEGER NOT NULL,         -- charged, see governance.budget.books
      tokens     INTEGER NOT NULL,
      open       INTEGER NOT NULL,         -- 1: its gateway's lease lives, and it is not settled
      settled    INTEGER NOT NULL,         -- 1: its gateway reported it
      ended      INTEGER NOT NULL,         -- 1: its engine was through with it
      unsettled  TEXT,                     -- audit event to write if the gateway never settles it
      changed_us INTEGER NOT NULL,         -- by the age of the file, see BudgetLedger
      engine_us    INTEGER NOT NULL DEFAULT 0,   -- largest charge by an engine
      weight_milli INTEGER NOT NULL DEFAULT 0,   -- of its device; 0: no engine reported yet
      raw_us       INTEGER NOT NULL DEFAULT 0,   -- raw: largest figure of the gateway
      since_us     INTEGER NOT NULL DEFAULT 0    -- when it was first charged
    ) STRICT
    """,
    "CREATE INDEX reservation_open ON reservation (gateway_id, account) WHERE open = 1",
    """
    CREATE TABLE replica (
      id          TEXT PRIMARY KEY,
      epoch       TEXT NOT NULL,           -- of the engine's start
      base_model  TEXT NOT NULL,
      accelerator TEXT NOT NULL,
      devices     INTEGER NOT NULL,
      seq         INTEGER NOT NULL,
      running     INTEGER NOT NULL,
      live        INTEGER NOT NULL,        -- 0: it ended or was given up
      raw         TEXT NOT NULL,           -- JSON: elapsed, busy, attributed, unattributed
      marked      TEXT NOT NULL,           -- the same, as of the last meter.interval
      marked_us   INTEGER NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE meter_sum (               -- raw device-microseconds of all engines ever
      base_model      TEXT PRIMARY KEY,
      elapsed_us      INTEGER NOT NULL,
      busy_us         INTEGER NOT NULL,
      attributed_us   INTEGER NOT NULL,
      unattributed_us INTEGER NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE price (
      base_model   TEXT PRIMARY KEY,
      weight_milli INTEGER NOT NULL,
      prefill      TEXT NOT NULL,
      decode       TEXT NOT NULL,
      density      TEXT NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE event (                   -- audit events that are not written yet
      seq    INTEGER PRIMARY KEY AUTOINCREMENT,
      detail TEXT NOT NULL                 -- JSON of the event
    ) STRICT
    """,
    *_NEW_IN_3,
)

_FROM_1 = tuple(
    f"ALTER TABLE reservation ADD COLUMN {name} INTEGER NOT NULL DEFAULT 0"
    for name in ("engine_us", "weight_milli", "raw_us", "since_us")
)
_FROM_2 = (
    *(
        f"ALTER TABLE account ADD COLUMN {name} INTEGER NOT NULL DEFAULT 0"
        for name in (
            "moved_gpu_us",
            "moved_tokens",
            "alerted_gpu_us",
            "alerted_tokens",
            "standing_gpu_us",
            "standing_tokens",
            "standing_at_us",
        )
    ),
    *_NEW_IN_3,
)

UPGRADES = {1: (*_FROM_1, *_FROM_2), 2: _FROM_2}
"""Statements that make a file of an older version one of ``SCHEMA_VERSION``."""
