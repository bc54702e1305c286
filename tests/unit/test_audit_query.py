"""The trail as tables: each record once, whatever is where; and no way out of it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest

import governance.audit
from governance.audit.query import connect
from governance.audit.reading import sealed_files
from governance.audit.schema import COLUMNS, Kind
from governance.audit.sql_guard import (
    MAX_SQL_BYTES,
    NotASelect,
    QueryTimeout,
    check_select,
    time_limit,
)
from governance.audit.status import trail_status
from tests.trail import SCHEMA, Record, Trail, sample, today, us


@pytest.fixture
def trail(tmp_path: Path) -> Trail:
    made = Trail(tmp_path)
    sample(made)
    made.seal()
    today(made)
    return made


def rows(connection: duckdb.DuckDBPyConnection, sql: str) -> list[tuple[Any, ...]]:
    return connection.execute(sql).fetchall()


def count(trail: Trail, **options: Any) -> int:
    with connect(trail.evidence, trail.state, **options) as connection:
        ((found,),) = rows(connection, "SELECT count(*) FROM audit")
    return int(found)


# -- each record once -------------------------------------------------------------------------


def test_every_value_comes_back_as_it_was_written(trail: Trail) -> None:
    with connect(trail.evidence, trail.state, unsealed=trail.unsealed) as connection:
        result = connection.execute("FROM audit")
        names = [column[0] for column in result.description or ()]
        found = [dict(zip(names, row, strict=True)) for row in result.fetchall()]
    assert names[: len(COLUMNS)] == [column.name for column in COLUMNS]
    assert names[len(COLUMNS) :] == ["ts", "ts_end", "dt", "sealed"]
    extra = set(names[len(COLUMNS) :])
    plain = [{k: v for k, v in row.items() if k not in extra} for row in found]
    assert by_id(plain) == by_id(trail.records)
    for row in found:
        assert us(row["ts"].isoformat()) == row["ts_us"]


def by_id(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(records, key=lambda record: record["event_id"])


def test_parts_and_findings_come_back_too(tmp_path: Path) -> None:
    trail = Trail(tmp_path)
    part = {"kind": "prompt", "source_id": None, "class": "public", "bytes": 3, "commit": "ab" * 32}
    finding = {
        "finding_id": "f1", "detector": "d", "version": "1", "category": "pii", "severity": "low",
        "part": "/messages/0", "count": 2, "score_milli": 900, "action": "redact",
    }  # fmt: skip
    trail.write("inference.decided", "2026-11-24 10:00:00", parts=[part], findings=[finding])
    for seal in (False, True):
        if seal:
            trail.seal()
        with connect(trail.evidence, trail.state, unsealed=trail.unsealed) as connection:
            assert rows(connection, "SELECT parts, findings FROM audit") == [([part], [finding])]
            assert rows(connection, "SELECT parts[1].commit FROM audit") == [("ab" * 32,)]


def test_audit_raw_has_hashes_as_bytes(trail: Trail) -> None:
    with connect(trail.evidence, trail.state, unsealed=trail.unsealed) as connection:
        found = rows(connection, "SELECT event_id, leaf_hash, sealed FROM audit_raw")
    want = {r["event_id"]: bytes.fromhex(r["leaf_hash"]) for r in trail.records}
    assert {event: leaf for event, leaf, _ in found} == want
    assert {sealed for _, _, sealed in found} == {True, False}


def test_a_record_that_is_in_a_log_and_in_a_file_counts_once(trail: Trail) -> None:
    trail.seal(delete=False)
    assert count(trail, unsealed=trail.unsealed) == len(trail.records)
    assert count(trail, unsealed=False) == len(trail.records)


def test_what_is_sealed_while_we_look_is_not_lost(trail: Trail) -> None:
    """The sealer seals and deletes right after the logs were read, or before."""

    def before() -> Iterator[Record]:
        trail.seal()
        return trail.unsealed()

    total = len(trail.records)
    assert count(trail, unsealed=before) == total
    trail.write("inference.decided", "2026-11-25 11:00:00", request_id="late")

    def after() -> Iterator[Record]:
        found = list(trail.unsealed())
        trail.seal()
        return iter(found)

    assert count(trail, unsealed=after) == total + 1


def test_half_of_a_segment_that_runs_over_midnight_does_not_hide_the_rest(tmp_path: Path) -> None:
    """One file of two is there, as it is for a moment while a segment is sealed."""
    trail = Trail(tmp_path)
    for at in ("2026-11-24 23:59:59", "2026-11-25 00:00:01", "2026-11-24 23:59:58"):
        trail.write("inference.refused", at, outcome="refused")
    _first, second = trail.seal(delete=False)
    kept = second.read_bytes()
    second.unlink()
    assert count(trail, unsealed=trail.unsealed) == 3
    second.write_bytes(kept)
    assert count(trail, unsealed=trail.unsealed) == count(trail) == 3
    assert trail_status(trail.evidence, trail.state, 0, print).sealed == 3


def test_a_writer_of_a_like_name_or_other_epoch_is_another(tmp_path: Path) -> None:
    trail = Trail(tmp_path)
    trail.write("writer.started", "2026-11-24 10:00:00", writer="gw-1")
    trail.seal()
    for writer, epoch in (("gw", 1), ("gw-1-1", 1), ("gw-1", 2)):
        trail.write("writer.started", "2026-11-24 10:00:00", writer=writer, writer_epoch=epoch)
        trail._open[-1]["writer_seq"] = 1
    assert count(trail, unsealed=trail.unsealed) == 4


def test_unsealed_rows_come_from_the_logs_by_default(trail: Trail) -> None:
    assert count(trail) == count(trail, unsealed=False) == len(trail.records) - 8
    (trail.state / "wal" / "gw-9").mkdir()
    (trail.state / "wal" / "gw-9" / "1-1.wal").write_bytes(b"rubbish" * 100)
    said: list[str] = []
    assert count(trail, on_fault=said.append) == count(trail, unsealed=False)
    assert "1-1.wal" in said[0]


def test_a_record_that_does_not_fit_is_left_out_and_said(trail: Trail) -> None:
    good = list(trail.unsealed())
    bad = [{**good[0], "ts_us": "now"}, {**good[0], "leaf_hash": "no"}, {"event_type": 1}]
    said: list[str] = []
    logged = [*bad, *good]
    assert count(trail, unsealed=lambda: logged, on_fault=said.append) == len(trail.records)
    assert len(said) == 3


def test_an_older_file_has_nulls_where_it_has_no_column(tmp_path: Path) -> None:
    trail = Trail(tmp_path)
    trail.write("inference.decided", "2026-11-23 10:00:00", department="hr")
    older = [name for name in SCHEMA.names if name not in ("reserved_us", "detail")]
    trail.seal(columns=older)
    trail.write("inference.decided", "2026-11-24 10:00:00", department="hr", reserved_us=7)
    trail.seal()
    with connect(trail.evidence, trail.state) as connection:
        sql = "SELECT reserved_us, detail FROM audit ORDER BY ts"
        assert rows(connection, sql) == [(None, None), (7, None)]


def test_other_files_are_not_part_of_the_trail(trail: Trail) -> None:
    (path, *_) = [file.path for file in sealed_files(trail.evidence)]
    for name in ("copy.parquet", ".gw-1-1-1-9.parquet", "gw-1-1-9.parquet.tmp", "gw-x-1-9.parquet"):
        (path.parent / name).write_bytes(path.read_bytes())
    for folder in ("dt=2026-99-99", "dt=tomorrow", "manifests"):
        (trail.evidence / "audit" / folder).mkdir()
        (trail.evidence / "audit" / folder / path.name).write_bytes(path.read_bytes())
    assert count(trail, unsealed=trail.unsealed) == len(trail.records)


def test_a_day_reads_only_the_files_of_that_day(trail: Trail) -> None:
    trail.seal()
    for file in sealed_files(trail.evidence):
        if f"{file.day}" == "2026-11-24":
            file.path.write_bytes(b"not Parquet, and reading it fails")
    with connect(trail.evidence, trail.state) as connection:
        sql = "SELECT count(*) FROM audit WHERE dt = '2026-11-25'"
        assert rows(connection, sql) == [(7,)]
        sql = "SELECT count(*) FROM v_audit WHERE dt BETWEEN '2026-11-25' AND '2026-11-26'"
        assert rows(connection, sql) == [(7,)]
        with pytest.raises((duckdb.Error, OSError)):
            rows(connection, "SELECT count(department) FROM audit")


def test_since_leaves_out_what_began_before(trail: Trail) -> None:
    since = us("2026-11-25 00:00:00")
    want = [record for record in trail.records if record["ts_us"] >= since]
    assert count(trail, unsealed=trail.unsealed, since_us=since) == len(want) == 7
    trail.seal()
    assert count(trail, since_us=since) == 7


def test_what_came_later_is_seen_by_another_connection(trail: Trail) -> None:
    with connect(trail.evidence, trail.state, unsealed=False) as connection:
        before = rows(connection, "SELECT count(*) FROM audit")
        trail.seal()
        assert rows(connection, "SELECT count(*) FROM audit") == before
    assert count(trail) == len(trail.records)


def test_notebooks_find_it_in_the_package(trail: Trail) -> None:
    assert governance.audit.connect is connect
    with pytest.raises(AttributeError, match="disconnect"):
        governance.audit.disconnect  # noqa: B018


def test_the_package_itself_loads_neither_duckdb_nor_arrow() -> None:
    code = (
        "import sys, governance.audit, governance.audit.writer; "
        "assert not {'duckdb', 'pyarrow'} & set(sys.modules); governance.audit.connect"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_status_counts_each_event_once(trail: Trail) -> None:
    trail.seal(delete=False)
    trail.write("writer.stopped", "2026-11-25 12:00:00")
    said: list[str] = []
    found = trail_status(trail.evidence, trail.state, us("2026-11-25 12:00:07"), said.append)
    assert (found.sealed, found.unsealed, found.oldest_unsealed_s) == (
        len(trail.records) - 1,
        0,
        None,
    )
    assert [(w.writer_id, w.sealed) for w in found.writers] == [
        (writer, len([r for r in trail.records[:-1] if r["writer_id"] == writer]))
        for writer in ("gw-1", "ledger-1", "ledger-2", "sealer-1")
    ]
    assert not said


# -- no way out -------------------------------------------------------------------------------


WRITES = (
    "COPY (SELECT 1) TO '{audit}/x.csv'",
    "COPY (SELECT 1) TO '{file}' (FORMAT parquet)",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{audit}/x.csv'",
    "WITH a AS (COPY (SELECT 1) TO '{audit}/x.csv') SELECT 1",
    "WITH a AS (COPY (SELECT 1) TO '{audit}/x.csv') FROM a",
    "SELECT (WITH a AS (COPY (SELECT 1) TO '{audit}/x.csv') SELECT 1)",
    "SELECT 1 UNION ALL (WITH a AS (COPY (SELECT 1) TO '{audit}/x.csv') SELECT 1)",
    "SELECT 1 WHERE EXISTS (WITH a AS (COPY (SELECT 1) TO '{audit}/x.csv') SELECT 1)",
    "DESCRIBE (WITH a AS (COPY (SELECT 1) TO '{audit}/x.csv') SELECT 1)",
    "FROM query('WITH a AS (COPY (SELECT 1) TO ''{audit}/x.csv'') SELECT 1')",
    "EXPORT DATABASE '{audit}/x'",
    "ATTACH '{audit}/x.db'",
    "SELECT 1; COPY (SELECT 1) TO '{audit}/x.csv'",
    "SELECT 1 --\n; COPY (SELECT 1) TO '{audit}/x.csv'",
    "/* SELECT */ COPY (SELECT 1) TO '{audit}/x.csv'",
    "FROM enable_logging(storage = 'file', storage_config = {{'path': '{audit}/log'}})",
    "FROM enable_profiling(save_location = '{audit}/profile.json')",
    "INSTALL httpfs",
)
READS = (
    "FROM '{secret}'",
    'FROM "{secret}"',
    "FROM read_csv('{secret}')",
    "FROM Read_Csv('{secret}')",
    "FROM \"read_csv\"('{secret}')",
    "FROM system.main.read_csv('{secret}')",
    "FROM read_text('{secret}')",
    "FROM read_blob('{audit}/../content/cells.csv')",
    "FROM read_json('{secret}')",
    "FROM read_parquet('{file}')",
    "FROM parquet_metadata('{file}')",
    "FROM sniff_csv('{secret}')",
    "FROM glob('{audit}/**')",
    "FROM query('FROM read_text(''{secret}'')')",
    "FROM query_table('{secret}')",
    "FROM json_execute_serialized_sql(json_serialize_sql('FROM read_text(''{secret}'')'))",
    "SELECT (SELECT content FROM read_text('{secret}'))",
    "SELECT [x FOR x IN (SELECT list(content) FROM read_text('{secret}'))]",
    "WITH a AS (FROM read_text('{secret}')) FROM a",
    "SELECT 1 FROM audit JOIN read_text('{secret}') ON true",
    "SELECT 1 UNION ALL SELECT size FROM read_text('{secret}')",
    "PIVOT read_csv('{secret}') ON secret",
    "SUMMARIZE FROM read_csv('{secret}')",
    "FROM arrow_scan(1::POINTER, 2::POINTER, 3::POINTER)",
    "FROM python_arrow_scan()",
    "FROM pandas_scan(1::POINTER)",
    "FROM '/etc/passwd'",
    "FROM 'https://localhost:1/x.csv'",
    "FROM duckdb_secrets()",
)
STATEMENTS = (
    "",
    ";",
    "-- nothing",
    "SELECT 1; SELECT 2",
    "SELEC 1",
    "S\u200bELECT 1",
    "ＳＥＬＥＣＴ 1",
    "SELECT 1\0; COPY audit TO 'x'",
    "SELECT '\ud800'",
    "PRAGMA version",
    "SET threads = 9",
    "SET VARIABLE x = 1",
    "RESET lock_configuration",
    "CALL pragma_version()",
    "CREATE TABLE x AS SELECT 1",
    "CREATE MACRO audit() AS TABLE SELECT 1",
    "DROP VIEW audit",
    "INSERT INTO _unsealed SELECT * FROM _unsealed",
    "WITH a AS (INSERT INTO _unsealed FROM _unsealed RETURNING 1) FROM a",
    "WITH a AS (DELETE FROM _unsealed RETURNING 1) FROM a",
    "WITH a AS (UPDATE _unsealed SET department = 'x' RETURNING 1) FROM a",
    "EXPLAIN SELECT 1",
    "EXPLAIN ANALYZE SELECT 1",
    "PREPARE x AS SELECT 1",
    "EXECUTE x",
    "BEGIN",
    "LOAD json",
    "DETACH memory",
    "USE memory",
    "VACUUM",
    "CHECKPOINT",
    "FROM checkpoint()",
    "SELECT 1 FROM force_checkpoint()",
    "SELECT " + "(" * 5000 + "1" + ")" * 5000,
    "SELECT " + "+".join(["1"] * 30_000),
    "SELECT '" + "x" * MAX_SQL_BYTES + "'",
)


@pytest.fixture(scope="module")
def locked(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[duckdb.DuckDBPyConnection, dict[str, Path]]]:
    """A connection, and the files around it that attacks are after."""
    trail = Trail(tmp_path_factory.mktemp("locked"))
    sample(trail)
    trail.seal()
    secret = trail.evidence / "content" / "cells.csv"
    secret.parent.mkdir()
    secret.write_text("secret\n1\n")
    places = {
        "audit": trail.evidence / "audit",
        "file": sealed_files(trail.evidence)[0].path,
        "secret": secret,
    }
    with connect(trail.evidence, trail.state) as connection:
        yield connection, places


def everything(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*")}


@pytest.mark.parametrize("attack", [*WRITES, *READS, *STATEMENTS], ids=lambda sql: sql[:60])
def test_the_guard_takes_none_of_these(attack: str) -> None:
    places = {"audit": "/a", "file": "/a/f.parquet", "secret": "/c/x.csv"}
    with pytest.raises(NotASelect):
        check_select(attack if attack in STATEMENTS else attack.format(**places))


@pytest.mark.parametrize("attack", [*WRITES, *READS], ids=lambda sql: sql[:60])
def test_and_without_the_guard_the_connection_lets_nothing_through(
    locked: tuple[duckdb.DuckDBPyConnection, dict[str, Path]], attack: str
) -> None:
    """The first lock alone: a notebook has the connection itself."""
    connection, places = locked
    root = places["audit"].parent
    before = everything(root)
    try:
        found = connection.execute(attack.format(**places)).fetchall()
    except duckdb.Error:
        found = []
    assert "secret" not in str(found)
    assert "cells.csv" not in str(found)
    assert everything(root) == before


@pytest.mark.parametrize(
    "setting",
    [
        "SET enable_external_access = true",
        "SET allowed_directories = ['/']",
        "SET lock_configuration = false",
        "SET temp_directory = '/tmp'",
        "SET memory_limit = '100GB'",
        "SET threads = 64",
        "SET autoload_known_extensions = true",
        "SET python_enable_replacements = true",
        "SET GLOBAL enable_external_access = true",
        "PRAGMA enable_external_access = true",
        "RESET enable_external_access",
        "SET profiling_output = '/tmp/x'",
    ],
)
def test_settings_are_locked(
    locked: tuple[duckdb.DuckDBPyConnection, dict[str, Path]], setting: str
) -> None:
    with pytest.raises(duckdb.Error):
        locked[0].execute(setting)


def test_variables_of_the_program_are_no_tables(trail: Trail) -> None:
    stolen = pq.read_table(sealed_files(trail.evidence)[0].path)
    with (
        connect(trail.evidence, trail.state) as connection,
        pytest.raises(duckdb.CatalogException),
    ):
        connection.execute("FROM stolen")
    assert stolen.num_rows


def test_the_environment_is_not_to_be_read(trail: Trail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEHOUSE_TOKEN", "t0p")
    assert os.environ["GATEHOUSE_TOKEN"]
    with connect(trail.evidence, trail.state) as connection:
        for sql in (
            "SELECT getenv('GATEHOUSE_TOKEN')",
            "SELECT current_setting('GATEHOUSE_TOKEN')",
        ):
            with pytest.raises(duckdb.Error):
                connection.execute(sql).fetchall()


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM audit",
        "select 1;",
        "\ufeffSELECT 1",
        "FROM v_spend LIMIT 1",
        "VALUES (1)",
        "TABLE v_spend",
        "(SELECT 1)",
        "DESCRIBE audit",
        "SHOW TABLES",
        "SUMMARIZE audit",
        "FROM incident('r1')",
        "WITH a AS (SELECT 1 AS x) SELECT x FROM a UNION SELECT 2",
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 5) FROM t",
        "SELECT unnest(rule_ids), count(*) OVER () FROM audit, range(2)",
        "SELECT detail ->> '$.busy_us' FROM memory.main.audit WHERE detail IS NOT NULL",
        "SELECT 'COPY x TO y; ATTACH z' -- COPY",
    ],
)
def test_what_auditors_need_runs(
    locked: tuple[duckdb.DuckDBPyConnection, dict[str, Path]], sql: str
) -> None:
    locked[0].execute(check_select(sql)).fetchall()


def test_a_bomb_is_stopped(trail: Trail) -> None:
    bombs = (
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT count(*) FROM t",
        "SELECT count(*) FROM range(10000000) a, range(10000000) b WHERE a.range * b.range = 7",
    )
    with connect(trail.evidence, trail.state) as connection:
        for sql in bombs:
            began = time.monotonic()
            with pytest.raises(QueryTimeout), time_limit(connection, 0.2):
                connection.execute(check_select(sql)).fetchall()
            assert time.monotonic() - began < 5
        with time_limit(connection, 30):
            assert rows(connection, "SELECT 1") == [(1,)]
    assert not [t for t in threading.enumerate() if t.name == "sql-time-limit"]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT length(repeat('x', 3000000000))",
        "SELECT 'x'.REPEAT(3000000000)",
        "SELECT system.main.\"lpad\"('x', 2000000000, 'y')",
        "SELECT list_transform([1000000000], lambda x: rpad('x', x, 'y'))",
        "SELECT len(range(3000000000))",
        "SELECT * FROM unnest(generate_series(1, 3000000000))",
        "SELECT * FROM range(1, length(repeat('x', 99)))",
        "SELECT printf('%2000000000d', 1)",
        "SELECT format('{:2000000000}', 1)",
        "SELECT bitstring('0', 2000000000)",
        "SELECT list_resize([1], 2000000000)",
        "SELECT count(*) FILTER (WHERE lpad('x', 4, 'z') = '') FROM audit",
        "SELECT 1 FROM audit ORDER BY repeat('x', 4)",
        "SELECT write_log('x')",
        "SELECT getvariable('x')",
    ],
)
def test_values_of_any_length_and_effects_are_not_taken(sql: str) -> None:
    with pytest.raises(NotASelect, match="not permitted"):
        check_select(sql)


def test_memory_is_bounded(trail: Trail) -> None:
    with (
        connect(trail.evidence, trail.state, memory_limit="50MB") as connection,
        pytest.raises(duckdb.OutOfMemoryException),
    ):
        connection.execute("SELECT list(range::VARCHAR || 'xxxxxxxx') FROM range(10000000)")


def test_every_kind_of_column_can_be_read() -> None:
    assert {column.kind for column in COLUMNS} == set(Kind)
