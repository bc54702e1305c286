"""The audit trail as tables, for people and notebooks: DuckDB over sealed and unsealed records.

**Two halves, each record once.** Sealed records are Parquet files, unsealed ones are still in the
writers' logs. A segment may be sealed, and its log deleted, while we look. So the logs are read
first and the files are listed after: a record is found in one of them or in both, and what a
listed file covers (its path says which writer, epoch, places and day) is dropped from the other
half.
Files and logs are taken as they are at that moment; connect again to see what came later.

**No way out.** DuckDB gets no access to files at all: Arrow reads the Parquet files and hands the
columns over, with filters on columns and on ``dt`` pushed down. NOTE: DuckDB's own reader would
need the folder in ``allowed_directories``, and that permits to write there as well: ``COPY ... TO``
within a CTE is a SELECT. Nothing can be loaded, attached, read or written through the connection,
and its settings are locked. Encrypted content lies in another folder and is not opened.

**Tables.** ``audit`` has every column of ``governance.audit.schema``, hashes as hex text, and
``ts``, ``ts_end`` (timestamps in UTC), ``dt`` (the day of ``ts``; filter by it to read only the
files of those days) and ``sealed``. ``audit_raw`` is the same with hashes as bytes. Columns
that a file is too old to have are null. The views of ``governance/audit/views`` stand on ``audit``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import duckdb

from governance.audit.reading import (
    OnFault,
    Rows,
    dataset,
    read_logs,
    sealed_files,
    unsealed_table,
    without_sealed,
)
from governance.audit.schema import COLUMNS, PART_FIELDS, Column, Kind

MEMORY_LIMIT: Final = "2GB"
"""Memory of a connection; a query that needs more fails, because nothing is written to disk."""
THREADS: Final = 2
"""Threads of a connection; few, because it may run beside engines."""

VIEWS_DIR: Final = Path(__file__).parent / "views"
VIEWS: Final = (
    "v_audit",
    "incident",
    "v_attempts",
    "v_requests",
    "v_refusals",
    "v_model_ops",
    "v_charges",
    "v_usage",
    "v_spend_daily",
    "v_spend",
    "v_budget_burn",
    "v_unattributed_gpu",
    "v_config_changes",
    "v_routes",
    "v_shadow_pairs",
    "v_route_savings",
    "v_route_quality",
)
"""Files of ``VIEWS_DIR`` in the order in which they can be created."""

_SETTINGS = (
    "SET temp_directory = ''",
    "SET TimeZone = 'UTC'",
    "SET autoinstall_known_extensions = false",
    "SET autoload_known_extensions = false",
    "SET allow_community_extensions = false",
    "SET allow_persistent_secrets = false",
    # A name in SQL never means a variable of the program around it.
    "SET python_enable_replacements = false",
)
_LOCK = ("SET enable_external_access = false", "SET lock_configuration = true")


@dataclass(frozen=True, slots=True)
class View:
    """One file of ``VIEWS_DIR``."""

    name: str
    question: str
    """The question that it answers."""
    grain: str
    """What one row is."""
    units: str
    sql: str


def connect(
    evidence: Path | str = Path("data/evidence"),
    state: Path | str = Path("data/state"),
    *,
    unsealed: bool | Callable[[], Rows] = True,
    on_fault: OnFault = lambda said: None,
    since_us: int | None = None,
    memory_limit: str = MEMORY_LIMIT,
    threads: int = THREADS,
) -> duckdb.DuckDBPyConnection:
    """Open the trail for reading. A trail that is empty or not there gives empty tables.

    Args:
        evidence: Root of the evidence; the trail is its folder ``audit``.
        state: Root of the state; the logs are its folder ``wal``.
        unsealed: Whether records in the logs belong to it; or what reads them.
        on_fault: Told what in the logs cannot be read; the rest is there all the same.
        since_us: Leave out what began before, in microseconds since 1970.
        memory_limit: As DuckDB writes it, such as ``2GB``.
        threads: Threads for queries.
    """
    if callable(unsealed):
        logged: Rows = unsealed()
    else:
        logged = read_logs(Path(state), on_fault) if unsealed else ()
    # NOTE: in this order; see above.
    rows = unsealed_table(logged, on_fault)
    listed = sealed_files(Path(evidence))
    rows = without_sealed(rows, listed)
    if since_us is not None:
        first = datetime.fromtimestamp(since_us // 1_000_000, UTC).date()
        listed = [file for file in listed if file.day >= first]
    connection = duckdb.connect(config={"memory_limit": memory_limit, "threads": str(threads)})
    try:
        for statement in _SETTINGS:
            connection.execute(statement)
        connection.register("_sealed", dataset(listed))
        connection.register("_rows", rows)
        connection.execute("CREATE TABLE _unsealed AS SELECT * FROM _rows")
        connection.unregister("_rows")
        connection.execute(_raw_view(since_us))
        connection.execute(_hex_view())
        for view in views():
            connection.execute(view.sql)
        for statement in _LOCK:
            connection.execute(statement)
    except BaseException:
        connection.close()
        raise
    return connection


def views() -> tuple[View, ...]:
    """All views, in the order of ``VIEWS``, with what their comments say."""
    return tuple(_view(VIEWS_DIR / f"{name}.sql") for name in VIEWS)


def _view(path: Path) -> View:
    sql = path.read_text(encoding="utf-8")
    comment: dict[str, str] = {}
    key = ""
    for line in sql.splitlines():
        if not line.startswith("-- "):
            break
        if started := re.match(r"-- (Question|Grain|Units): (.*)", line):
            key = started[1].lower()
            comment[key] = started[2]
        elif key:
            comment[key] += " " + line.removeprefix("-- ").strip()
    return View(path.stem, comment["question"], comment["grain"], comment["units"], sql)


# -- SQL --------------------------------------------------------------------------------------


def _raw_view(since_us: int | None) -> str:
    where = "" if since_us is None else f" WHERE ts_us >= {int(since_us)}"
    return (
        "CREATE VIEW audit_raw AS "  # noqa: S608 - made of our own names and an integer
        "SELECT *, make_timestamp(ts_us) AS ts, make_timestamp(ts_end_us) AS ts_end FROM ("
        f"SELECT *, true AS sealed FROM _sealed{where} "
        f"UNION ALL BY NAME SELECT *, false AS sealed FROM _unsealed{where})"
    )


def _hex_view() -> str:
    columns = [_as_text(column) for column in COLUMNS]
    columns += ["ts", "ts_end", "dt", "sealed"]
    return f"CREATE VIEW audit AS SELECT {', '.join(columns)} FROM audit_raw"  # noqa: S608


def _as_text(column: Column) -> str:
    name = f'"{column.name}"'
    if column.kind is Kind.HEX32:
        return f"lower(hex({name})) AS {name}"
    if column.kind is Kind.PARTS:
        fields = ", ".join(
            f"'{inner}': " + (f'lower(hex(p."{inner}"))' if kind is Kind.HEX32 else f'p."{inner}"')
            for inner, kind, _doc in PART_FIELDS
        )
        return f"list_transform({name}, lambda p: {{{fields}}}) AS {name}"
    return name
