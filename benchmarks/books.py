"""Compares what clients were told with the audit trail and the ledger, after a run with kills.

Three books must agree: the clients' own (``benchmarks.kills.Told``), the audit trail, and the
ledger's database. Each function gives figures whose values should be zero unless its name says
otherwise.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from typing import Any

from governance.audit.query import connect

_ENDS = "('inference.completed', 'inference.aborted')"


def audit_faults(evidence: Path, state: Path, acknowledged: Collection[str]) -> dict[str, int]:
    """What is wrong with the trail. Keys say what; values are numbers of requests or records."""
    connection = connect(evidence, state)
    connection.execute("CREATE TEMP TABLE told (request_id VARCHAR)")
    connection.executemany("INSERT INTO told VALUES (?)", [[each] for each in acknowledged])
    queries = {
        "records": "SELECT count(*) FROM audit",
        "decided": "SELECT count(*) FROM audit WHERE event_type = 'inference.decided'",
        "aborted": "SELECT count(*) FROM audit WHERE event_type = 'inference.aborted'",
        "acknowledged without exactly one decided": _not_once("event_type = 'inference.decided'"),
        "acknowledged without exactly one completed": _not_once(
            "event_type = 'inference.completed' AND outcome = 'completed'"
        ),
        "decided without exactly one end": f"""
            SELECT count(*) FROM (
              SELECT d.event_id, count(e.event_id) AS ends
              FROM audit d LEFT JOIN audit e
                ON e.parent_event_id = d.event_id AND e.event_type IN {_ENDS}
              WHERE d.event_type = 'inference.decided' GROUP BY d.event_id
            ) WHERE ends <> 1""",
        "events recorded twice": """
            SELECT coalesce(sum(n - 1), 0) FROM
            (SELECT count(*) AS n FROM audit GROUP BY event_id HAVING count(*) > 1)""",
        "records twice in a chain": """
            SELECT coalesce(sum(n - 1), 0) FROM
            (SELECT count(*) AS n FROM audit GROUP BY writer_id, writer_epoch, writer_seq)""",
        "gaps in a chain": """
            SELECT coalesce(sum(highest - n), 0) FROM
            (SELECT max(writer_seq) AS highest, count(*) AS n
             FROM audit GROUP BY writer_id, writer_epoch)""",
        "breaks in a chain": """
            SELECT count(*) FROM
            (SELECT prev_hash, lag(leaf_hash) OVER
               (PARTITION BY writer_id, writer_epoch ORDER BY writer_seq) AS before
             FROM audit) WHERE before IS NOT NULL AND before <> prev_hash""",
    }
    return {name: _number(connection, query) for name, query in queries.items()}


def _not_once(condition: str) -> str:
    return f"""
        SELECT count(*) FROM
        (SELECT t.request_id, count(a.event_id) AS n
         FROM told t LEFT JOIN (SELECT * FROM audit WHERE {condition}) a USING (request_id)
         GROUP BY t.request_id) WHERE n <> 1"""


def ledger_faults(database: Path, evidence: Path, state: Path) -> dict[str, int]:
    """What is wrong between the ledger's accounts, its reservations and the trail."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as ledger:
        rows = ledger.execute("SELECT id, gpu_us, tokens FROM reservation").fetchall()
        totals = ledger.execute(
            "SELECT coalesce(sum(total_gpu_us), 0), coalesce(sum(total_tokens), 0) FROM account"
            # What is charged to a part, a user or a further window is charged to its department.
            " WHERE name NOT GLOB '*[/~@]*'"
        ).fetchone()
        held = ledger.execute(
            "SELECT coalesce(sum(open_gpu_us + open_tokens), 0) FROM lease"
        ).fetchone()[0]
    charged = {name: (gpu_us, tokens) for name, gpu_us, tokens in rows}
    recorded = (
        connect(evidence, state)
        .execute(
            "SELECT reservation_id, max(charged_us) FROM audit WHERE charged_us IS NOT NULL "
            "AND outcome = 'completed' AND reservation_id IS NOT NULL GROUP BY reservation_id"
        )
        .fetchall()
    )
    return {
        "reservations": len(charged),
        "completed requests": len(recorded),
        "completed but not in the ledger": sum(name not in charged for name, _ in recorded),
        "charged less than recorded": sum(
            name in charged and charged[name][0] < us for name, us in recorded
        ),
        "accounts minus their reservations, us": totals[0] - sum(v[0] for v in charged.values()),
        "accounts minus their reservations, tokens": totals[1]
        - sum(v[1] for v in charged.values()),
        "still reserved by nobody": held,
    }


def meter_sums(database: Path) -> dict[str, dict[str, int]]:
    """Device-microseconds of all engines ever, by base model, as the ledger has them."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as ledger:
        ledger.row_factory = sqlite3.Row
        rows = [dict(row) for row in ledger.execute("SELECT * FROM meter_sum")]
    return {row.pop("base_model"): row for row in rows}


def _number(connection: Any, query: str) -> int:
    row = connection.execute(query).fetchone()
    return int(row[0]) if row else 0
