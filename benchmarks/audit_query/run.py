"""How long questions to the audit trail take: ``python -m benchmarks.audit_query.run``.

A seeded trail of 500,000 requests (a million records, 30 days, 120 sealed files, about 200 MB) is
made in a temporary folder and asked through ``governance.audit.query.connect`` with its defaults
(two threads, 2 GB). Wall milliseconds, the best of three after one that is not counted; other work
on the machine can only slow a run down. Hashes are random, as real ones are, so that files have
their real size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from governance.audit.arrow import SCHEMA
from governance.audit.query import MEMORY_LIMIT, THREADS, connect

RESULTS = Path(__file__).parent / "results" / "queries.json"
DAYS, FILES_A_DAY, REQUESTS_A_FILE = 30, 4, 4200
START_US = 1_767_225_600_000_000
"""2026-01-01."""
DAY_US = 86_400_000_000
DEPARTMENTS = ("hr", "legal", "marketing", "operations", "research", "risk")
MODELS = ("small", "medium", "large")
REQUEST = "req-3-1-7"
QUERIES = (
    ("one day's device time", "SELECT sum(gpu_us) FROM audit WHERE dt = '2026-01-05'"),
    ("one event, no day given", "FROM audit WHERE event_id = '01KAAAAAAAAAAAAAAAAAAAAAAA'"),
    ("one request, no day given", f"FROM incident('{REQUEST}')"),
    ("records of a department", "SELECT count(*) FROM audit WHERE department = 'hr'"),
    ("requests by outcome", "SELECT outcome, count(*) FROM v_requests GROUP BY ALL"),
    ("v_refusals", "FROM v_refusals"),
    ("v_budget_burn", "FROM v_budget_burn"),
    ("v_spend_daily", "FROM v_spend_daily"),
    ("v_spend", "FROM v_spend"),
    ("v_model_ops", "FROM v_model_ops"),
)


def segment(day: int, number: int, first_seq: int, rng: random.Random) -> pa.Table:
    """Decisions and ends of one file's requests."""
    n, span = REQUESTS_A_FILE, DAY_US // FILES_A_DAY
    began = sorted(START_US + day * DAY_US + number * span + rng.randrange(span) for _ in range(n))
    requests = [f"req-{day}-{number}-{i}" for i in range(n)]
    latency = [rng.randrange(50_000, 9_000_000) for _ in range(n)]
    gpu = [rng.randrange(1_000, 3_000_000) for _ in range(n)]
    none: list[Any] = [None] * n
    departments, models = rng.choices(DEPARTMENTS, k=n), rng.choices(MODELS, k=n)
    values: dict[str, list[Any]] = {
        "event_type": ["inference.decided"] * n + ["inference.completed"] * n,
        "event_id": [f"01K{day:02}{number}{i:020}" for i in range(2 * n)],
        "ts_us": began * 2,
        "ts_end_us": [*none, *(a + b for a, b in zip(began, latency, strict=True))],
        "writer_seq": list(range(first_seq, first_seq + 2 * n)),
        "request_id": requests * 2,
        "decision_id": [f"dec-{request}" for request in requests] * 2,
        "reservation_id": [f"rsv-{request}" for request in requests] * 2,
        "subject_key": [f"s{rng.randrange(5000)}" for _ in range(n)] * 2,
        "department": departments * 2,
        "budget_account": departments * 2,
        "request_model": models * 2,
        "response_model": models * 2,
        "replica_id": none + [f"rep-{rng.randrange(8)}" for _ in range(n)],
        "input_tokens": none + [rng.randrange(10, 3000) for _ in range(n)],
        "output_tokens": none + [rng.randrange(1, 800) for _ in range(n)],
        "gpu_us": none + gpu,
        "charged_us": none + [2 * us for us in gpu],
        "ttft_us": [*none, *(us // 10 for us in latency)],
        "latency_us": none + latency,
        "outcome": none + ["completed"] * n,
        "status": none + [200] * n,
    }
    same = {
        "schema_version": 1, "writer_id": "gw-1", "writer_epoch": 1, "principal_kind": "user",
        "issuer": "entra", "auth_method": "oidc", "operation": "chat", "decision": "allow",
        "rule_ids": ["staff"], "stream": True, "route_target": "internal",
    }  # fmt: skip
    hashes = ("prev_hash", "leaf_hash", "token_hash", "policy_digest", "prompt_commit")
    columns = []
    for field in SCHEMA:
        if field.name in hashes:
            drawn = [os.urandom(32) for _ in range(2 * n)]
            columns.append(pa.array(drawn, field.type))
            continue
        plain = pa.string() if pa.types.is_dictionary(field.type) else field.type
        given = values.get(field.name, [same.get(field.name)] * (2 * n))
        columns.append(pa.array(given, plain).cast(field.type))
    table = pa.table(columns, schema=SCHEMA)
    return table.sort_by([("department", "ascending"), ("writer_seq", "ascending")])


def make(evidence: Path) -> tuple[int, int, int]:
    """Write the trail; (records, files, bytes)."""
    rng, seq, size = random.Random(7), 1, 0
    for day in range(DAYS):
        name = time.strftime("dt=%Y-%m-%d", time.gmtime(START_US // 1_000_000 + day * 86_400))
        folder = evidence / "audit" / name
        folder.mkdir(parents=True)
        for number in range(FILES_A_DAY):
            last = seq + 2 * REQUESTS_A_FILE - 1
            path = folder / f"gw-1-1-{seq}-{last}.parquet"
            table = segment(day, number, seq, rng)
            pq.write_table(table, path, compression="zstd", compression_level=3)
            seq, size = last + 1, size + path.stat().st_size
    return seq - 1, DAYS * FILES_A_DAY, size


def best_ms(work: Callable[[], object]) -> float:
    """Milliseconds, the best of three after a first."""
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        taken.append((time.perf_counter() - start) * 1000)
    return round(min(taken[1:]), 1)


def main() -> int:
    """Make, ask, print, keep."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        evidence, state = Path(folder) / "evidence", Path(folder) / "state"
        records, files, size = make(evidence)
        print(f"{records} records in {files} files, {size / 1e6:.0f} MB", flush=True)
        rows = [{"query": "connect", "ms": best_ms(lambda: connect(evidence, state).close())}]
        with connect(evidence, state) as trail:
            for name, sql in QUERIES:

                def ask(sql: str = sql) -> object:
                    return trail.execute(sql).fetchall()

                rows.append({"query": name, "sql": sql, "ms": best_ms(ask)})
    for row in rows:
        print(f"{row['ms']:8.1f} ms  {row['query']}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    report = {
        "records": records,
        "files": files,
        "bytes": size,
        "threads": THREADS,
        "memory_limit": MEMORY_LIMIT,
        "peak_rss_mib": peak,
        "cpus": os.cpu_count(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("gatehouse", "duckdb", "pyarrow")},
        },
        "rows": rows,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
