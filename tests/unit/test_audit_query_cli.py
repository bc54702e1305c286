"""``gatehouse audit``: what it prints, how it ends; against real logs and the real sealer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from deployments.cli import audit as module
from deployments.cli.main import cli
from governance.audit.follow import Follower
from governance.audit.query import connect
from governance.audit.reading import sealed_files
from governance.audit.seal import Sealer
from tests.trail import Trail, sample, today
from tests.unit.audit_kit import SMALL, event, now_us, open_writer


@pytest.fixture
def trail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trail:
    made = Trail(tmp_path)
    sample(made)
    today(made)
    made.seal()
    monkeypatch.setenv("GATEHOUSE_EVIDENCE", str(made.evidence))
    monkeypatch.setenv("GATEHOUSE_STATE", str(made.state))
    return made


def audit(*words: str, text: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["audit", *words], input=text)


# -- query ------------------------------------------------------------------------------------


def test_csv_into_a_pipe(trail: Trail) -> None:
    result = audit("query", "SELECT department, charged_us, first_day FROM v_spend")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[:2] == [
        "department,charged_us,first_day",
        "hr,6000000,2026-11-24",
    ]


def test_json_lines(trail: Trail) -> None:
    sql = "SELECT request_id, rule_ids, ts, gpu_us FROM v_requests WHERE request_id = 'r4'"
    result = audit("query", sql, "--format", "jsonl")
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {
            "request_id": "r4",
            "rule_ids": ["no-large", "no-hr"],
            "ts": "2026-11-24 12:00:00",
            "gpu_us": None,
        }
    ]


def test_parquet(trail: Trail, tmp_path: Path) -> None:
    result = audit("query", "FROM v_requests", "--format", "parquet")
    (tmp_path / "rows.parquet").write_bytes(result.stdout_bytes)
    assert pq.read_table(tmp_path / "rows.parquet").num_rows == 11


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "table"])
def test_a_limit_says_that_there_is_more(trail: Trail, form: str) -> None:
    result = audit("query", "FROM v_requests", "--format", form, "--limit", "3")
    assert result.exit_code == 0
    assert "3 rows shown" in result.stderr
    result = audit("query", "FROM v_requests", "--format", form, "--limit", "11")
    assert not result.stderr


def test_the_statement_may_come_from_standard_input(trail: Trail) -> None:
    assert audit("query", "-", text="SELECT 40 + 2 AS x\n").stdout == "x\n42\n"


def test_since(trail: Trail) -> None:
    sql = "SELECT count(*) AS n FROM audit"
    assert audit("query", sql, "--since", "2026-11-25").stdout == "n\n7\n"
    assert audit("query", sql, "--since", "2026-11-25T09:30").stdout == "n\n2\n"
    assert audit("query", sql, "--since", "9999w").stdout == f"n\n{len(trail.records)}\n"
    assert audit("query", sql, "--since", "soon").exit_code == 2


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("COPY audit TO '/tmp/x'",), 2, "COPY is not permitted"),
        (("WITH a AS (COPY (SELECT 1) TO '/tmp/x') SELECT 1",), 2, "COPY within a SELECT"),
        (("SELECT 1; SELECT 2",), 2, "2 statements"),
        (("FROM read_text('/etc/passwd')",), 2, "table function read_text"),
        (("SELECT nothing FROM audit",), 1, "nothing"),
        (("SELECT 'a'::INTEGER",), 1, "Could not convert"),
        (("SELECT 1", "--memory", "a lot"), 2, "not a size"),
        (("SELECT 1", "--limit", "-1"), 2, ""),
        (("SELECT list(range::VARCHAR) FROM range(10000000)", "--memory", "50MB"), 1, "memory"),
        (
            ("WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n FROM t) SELECT count(*) FROM t",
             "--timeout", "0.2"),
            1,
            "stopped after 0.2 s",
        ),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said(
    trail: Trail, words: tuple[str, ...], code: int, said: str
) -> None:
    result = audit("query", *words)
    assert (result.exit_code, result.stdout.strip()) in ((code, ""), (code, "count_star()"))
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_no_trail_says_what_to_do(tmp_path: Path) -> None:
    where = ("--evidence", str(tmp_path / "e"), "--state", str(tmp_path / "s"))
    for words in (("query", "SELECT 1"), ("tail",), ("show", "r1"), ("status",)):
        result = audit(*words, *where)
        assert result.exit_code == 4
        assert "no audit trail" in result.stderr
        assert "make serve" in result.stderr


def test_a_trail_without_records_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "e" / "audit").mkdir(parents=True)
    where = ("--evidence", str(tmp_path / "e"), "--state", str(tmp_path / "s"))
    result = audit("query", "FROM v_spend", "--format", "jsonl", *where)
    assert (result.exit_code, result.stdout) == (0, "")
    assert audit("tail", *where).exit_code == 0


# -- show, tail, views, status ----------------------------------------------------------------


def test_show_tells_one_request_in_order(trail: Trail) -> None:
    result = audit("show", "r1")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "request r1"
    assert [line.split()[0] for line in lines if line.startswith("inference.")] == [
        "inference.decided",
        "inference.completed",
    ]
    text = " ".join(result.stdout.split())
    for said in (
        "subject s-anna", "department hr", "effect allow", "rules staff", "answered small",
        "weights sha256:1212", "input tokens 100", "GPU-s 0.400000", "charged s 0.400000",
        "420 bytes, encrypted, commitment cdcd", "130 bytes, encrypted, commitment efef",
        "first piece s 0.500000", "gw-1 start 1 place 2, sealed", trail.records[1]["leaf_hash"],
    ):  # fmt: skip
        assert said in text
    assert text.count("commitment cdcd") == 1


def test_show_json_and_unknown(trail: Trail) -> None:
    events = json.loads(audit("show", "r2", "--json").stdout)
    assert [each["event_type"] for each in events] == [
        "inference.decided", "inference.aborted", "usage.settled",
    ]  # fmt: skip
    assert {each["request_id"] for each in events} == {"r2"}
    for unknown in ("r99", "' OR 1=1 --"):
        result = audit("show", unknown)
        assert result.exit_code == 4
        assert "no request" in result.stderr


def test_tail(trail: Trail) -> None:
    lines = audit("tail", "-n", "3").stdout.splitlines()
    assert [line.split()[2] for line in lines] == ["meter.interval", "budget.set", "budget.set"]
    lines = audit("tail", "--type", "inference.refused", "--department", "hr").stdout.splitlines()
    assert [line.split()[-1] for line in lines] == ["r4", "r5"]
    assert "refused 403 blocked_by_policy" in lines[0]
    (record,) = map(json.loads, audit("tail", "-n", "1", "--json").stdout.splitlines())
    assert record in trail.records
    assert audit("tail", "-n", "0").stdout == ""
    assert len(audit("tail", "-n", "1000").stdout.splitlines()) == len(trail.records)


def test_what_a_caller_chose_cannot_steer_the_terminal(trail: Trail) -> None:
    trail.write(
        "inference.refused", "2026-11-26 10:00:00", request_id="r\x1b]0;x\x07", outcome="refused",
        request_model="\x1b[2J\x1b[8mred\x1b[0m\nfake line", department="hr",
    )  # fmt: skip
    trail.seal()
    # With colours, as on a terminal: without one, click takes escape sequences out by itself.
    for arguments in (("tail", "-n", "1"), ("show", "r\x1b]0;x\x07")):
        result = CliRunner().invoke(cli, ["audit", *arguments], color=True)
        assert result.exit_code == 0
        left = re.sub(r"\x1b\[(?:3\d|[012]|90)?m", "", result.stdout)  # colours of our own
        assert "\x1b" not in left
        assert "\x07" not in left
        assert "[2J" in left  # what is left of it is harmless text
    assert len(audit("tail", "-n", "1").stdout.splitlines()) == 1


def test_views_lists_questions(trail: Trail) -> None:
    found = json.loads(audit("views", "--json").stdout)
    assert {"v_spend_daily", "incident"} <= {view["name"] for view in found}
    assert all(view["question"] and view["grain"] and view["units"] for view in found)
    assert "What did each department spend" in audit("views").stdout


def test_status(trail: Trail) -> None:
    with open_writer_closed(trail):
        pass
    result = audit("status")
    assert result.exit_code == 0
    assert f"sealed {len(trail.records)} events" in result.stdout
    assert "not sealed 3 events" in result.stdout
    found = json.loads(audit("status", "--json").stdout)
    assert (found["unsealed"], found["faults"]) == (3, [])
    (wal, *_) = (trail.state / "wal" / "gw-live").glob("*.wal")
    wal.write_bytes(b"rubbish" * 100)
    result = audit("status")
    assert result.exit_code == 1
    assert "warning:" in result.stderr


class open_writer_closed:
    """A writer that wrote one event between its start and its stop."""

    def __init__(self, trail: Trail) -> None:
        self._trail = trail

    def __enter__(self) -> None:
        writer = open_writer(self._trail.state / "wal", "gw-live")
        writer.write_blocking(event("inference.refused", request_id="live", outcome="refused"))
        writer.close_blocking()

    def __exit__(self, *_: object) -> None:
        return


def test_tail_follows_logs_and_sealed_files(trail: Trail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FOLLOW_S", 0.02)
    looks = iter(range(40))

    def sleep(seconds: float) -> None:
        step = next(looks)
        if step == 1:
            with open_writer_closed(trail):
                pass
        if step == 3:
            Sealer(trail.state / "wal", trail.evidence, now_us).close()
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", sleep)
    result = audit("tail", "-f", "-n", "1", "--json", "--type", "inference.refused")
    assert result.exit_code == 0
    assert [json.loads(line)["request_id"] for line in result.stdout.splitlines()] == ["r7", "live"]


# -- beside a writer and a sealer that work ---------------------------------------------------


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A writer of many small segments, and a sealer that seals and deletes them all the time."""
    wal, evidence = tmp_path / "wal", tmp_path / "evidence"
    writer = open_writer(wal, "gw-1", options=SMALL)
    sealer = Sealer(wal, evidence, now_us)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            writer.write_blocking(event("inference.refused", outcome="refused"))
            time.sleep(0.001)

    def seal() -> None:
        while not stop.is_set():
            sealer.seal_once()
            time.sleep(0.005)

    threads = [threading.Thread(target=work) for work in (write, seal)]
    for thread in threads:
        thread.start()
    yield tmp_path, evidence
    stop.set()
    for thread in threads:
        thread.join()
    writer.close_blocking()
    sealer.close()


def test_no_event_is_missed_or_seen_twice_while_it_is_sealed(busy: tuple[Path, Path]) -> None:
    state, evidence = busy
    until = time.monotonic() + 30
    highest = looks = 0
    while (looks < 8 or highest < 50) and time.monotonic() < until:
        with connect(evidence, state) as connection:
            row = connection.execute(
                "SELECT count(*), max(writer_seq), count(DISTINCT writer_seq) FROM audit"
                " WHERE writer_id = 'gw-1'"
            ).fetchone()
        assert row is not None
        rows, last, places = row
        assert rows == last == places >= highest
        highest, looks = last, looks + 1
    assert looks >= 8
    assert sealed_files(evidence)


def test_a_follower_gives_each_event_once_and_in_order(busy: tuple[Path, Path]) -> None:
    state, evidence = busy
    follower = Follower(evidence, state, lambda record: record["writer_id"] == "gw-1")
    seen = [record["writer_seq"] for record in follower.last(10**6)]
    until = time.monotonic() + 30
    while (len(seen) < 100 or not sealed_files(evidence)) and time.monotonic() < until:
        seen += [record["writer_seq"] for record in follower.new()]
        time.sleep(0.02)
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) >= 100


def test_a_pipe_that_closes_is_no_error(trail: Trail) -> None:
    code = "from deployments.cli.main import main; import sys; main()"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -c '{code}' audit query "
         "'FROM audit, range(2000)' --format jsonl | head -n 1 | wc -l"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr
