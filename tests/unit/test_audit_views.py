"""Each view on an empty trail and on one whose answers were worked out by hand."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path
from typing import Any

import duckdb
import pytest

from governance.audit.query import VIEWS, VIEWS_DIR, connect, views
from tests.trail import Trail, sample, today

D24, D25 = date(2026, 11, 24), date(2026, 11, 25)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


@pytest.fixture(scope="module", params=["sealed", "half sealed", "in logs"])
def trail(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same answers, wherever the records are."""
    made = Trail(tmp_path_factory.mktemp("trail"))
    sample(made)
    if request.param != "in logs":
        made.seal()
    today(made)
    if request.param == "sealed":
        made.seal()
    with connect(made.evidence, made.state, unsealed=made.unsealed) as connection:
        yield connection


def rows(connection: duckdb.DuckDBPyConnection, sql: str) -> list[tuple[Any, ...]]:
    return connection.execute(sql).fetchall()


@pytest.mark.parametrize("name", VIEWS)
def test_each_view_is_empty_on_an_empty_trail(tmp_path: Path, name: str) -> None:
    with connect(tmp_path / "evidence", tmp_path / "state") as connection:
        table = "incident('r1')" if name == "incident" else name
        assert rows(connection, f"FROM {table}") == []
        assert rows(connection, f"DESCRIBE FROM {table}")


def test_every_file_is_a_view_that_says_what_it_is() -> None:
    assert sorted(path.stem for path in VIEWS_DIR.iterdir()) == sorted(VIEWS)
    for view in views():
        assert "?" in view.question
        assert view.grain.startswith("one row per")
        assert view.units
        assert f" {view.name}" in view.sql


def test_v_audit_has_every_event(trail: duckdb.DuckDBPyConnection) -> None:
    kinds = dict(rows(trail, "SELECT event_type, count(*) FROM v_audit GROUP BY 1"))
    assert kinds == {
        "writer.started": 1,
        "inference.decided": 7,
        "inference.completed": 5,
        "inference.aborted": 1,
        "inference.refused": 4,
        "usage.settled": 3,
        "meter.interval": 4,
        "engine.lost": 2,
        "budget.loaded": 1,
        "budget.set": 2,
    }


def test_incident_gives_all_events_of_a_request_in_order(trail: duckdb.DuckDBPyConnection) -> None:
    assert rows(trail, "SELECT event_type, writer_id FROM incident('r2')") == [
        ("inference.decided", "gw-1"),
        ("inference.aborted", "sealer-1"),
        ("usage.settled", "ledger-1"),
    ]
    assert rows(trail, "FROM incident('r')") == []
    assert rows(trail, "FROM incident(NULL)") == []


def test_v_requests_folds_what_is_known_of_each(trail: duckdb.DuckDBPyConnection) -> None:
    sql = """SELECT request_id, department, outcome, status, error_code, input_tokens,
        output_tokens, gpu_us, charged_us, events FROM v_requests ORDER BY length(request_id), 1"""
    assert rows(trail, sql) == [
        ("r1", "hr", "completed", 200, None, 100, 30, 400_000, 400_000, 2),
        ("r2", "hr", "aborted", None, None, 200, 50, 3_000_000, 6_000_000, 3),
        ("r3", "research", "aborted", 499, None, 60, 40, 2_000_000, 2_500_000, 4),
        ("r4", "hr", "refused", 403, "blocked_by_policy", None, None, None, None, 1),
        ("r5", "hr", "refused", 403, "blocked_by_policy", None, None, None, None, 1),
        ("r6", "research", "refused", 429, "budget_exhausted", None, None, None, None, 1),
        ("r7", None, "refused", 401, "invalid_credential", None, None, None, None, 1),
        ("r8", "hr", "completed", 200, None, 10, 5, None, None, 2),
        ("r9", "research", "failed", 500, "engine_failed", 10, None, 100_000, 200_000, 2),
        ("r10", "research", "open", None, None, None, None, None, None, 1),
        ("r11", "research", "refused", 429, "budget_exhausted", 10, 10, 50_000, 50_000, 2),
    ]
    ((began, ended),) = rows(trail, "SELECT ts, ts_end FROM v_requests WHERE request_id = 'r8'")
    assert (began, ended) == (at("2026-11-24 23:59:58"), at("2026-11-25 00:00:03"))


def test_v_refusals_blames_only_rules_that_refused(trail: duckdb.DuckDBPyConnection) -> None:
    sql = """SELECT error_code, rule_id, status, refusals, admitted, departments, subjects
        FROM v_refusals ORDER BY 1, 2"""
    assert rows(trail, sql) == [
        ("blocked_by_policy", "no-hr", 403, 2, 0, 1, 1),
        ("blocked_by_policy", "no-large", 403, 2, 0, 1, 1),
        ("budget_exhausted", None, 429, 2, 1, 1, 1),
        ("invalid_credential", None, 401, 1, 0, 0, 0),
    ]


def test_v_model_ops(trail: duckdb.DuckDBPyConnection) -> None:
    sql = """SELECT model, hour, requests, failed, aborted, refused, ttft_p50_us, latency_p95_us,
        input_tokens, output_tokens, output_tokens_per_s, gpu_us_per_token FROM v_model_ops"""
    assert rows(trail, sql) == [
        # r2: its gateway died and measured nothing; 3,000,000 us over 250 tokens.
        ("large", at("2026-11-24 10:00:00"), 1, 0, 1, 0, None, None, 200, 50, None, 12000.0),
        # r1: 30 tokens in 1.5 s; 400,000 us over 130 tokens.
        ("small", at("2026-11-24 10:00:00"), 1, 0, 0, 0, 500_000, 2_000_000, 100, 30, 20.0, 3076.9),
        # r3: 40 tokens in 4 s; 2,000,000 us over 100 tokens.
        (
            "small",
            at("2026-11-24 11:00:00"),
            1,
            0,
            1,
            0,
            1_000_000,
            5_000_000,
            60,
            40,
            10.0,
            20000.0,
        ),
        # r11: 10 tokens in 0.5 s until the budget was used up; 50,000 us over 20 tokens.
        ("small", at("2026-11-24 13:00:00"), 1, 0, 0, 1, 500_000, 1_000_000, 10, 10, 20.0, 2500.0),
        # r8: 5 tokens in 4.9 s; not metered, so no price.
        ("small", at("2026-11-24 23:00:00"), 1, 0, 0, 0, 100_000, 5_000_000, 10, 5, 1.0, None),
        # r9: no piece came; 100,000 us over the 10 tokens of the prompt.
        ("large", at("2026-11-25 09:00:00"), 1, 1, 0, 0, None, 1_000_000, 10, None, None, 10000.0),
    ]


def test_v_charges_takes_the_larger_of_two_accounts(trail: duckdb.DuckDBPyConnection) -> None:
    sql = "SELECT charge_id, account, gpu_us, charged_us, tokens, ended_ts FROM v_charges"
    assert rows(trail, sql + " ORDER BY 1") == [
        ("rsv-r1", "hr", 400_000, 400_000, 130, at("2026-11-24 10:00:02")),
        ("rsv-r11", "research", 50_000, 50_000, 20, at("2026-11-24 13:00:01")),
        ("rsv-r2", "hr", 3_000_000, 6_000_000, 250, at("2026-11-24 10:30:40")),
        ("rsv-r3", "research", 2_000_000, 2_500_000, 100, at("2026-11-24 11:00:05")),
        ("rsv-r8", "hr", None, None, 15, at("2026-11-25 00:00:03")),
        ("rsv-r9", "research", 100_000, 200_000, 10, at("2026-11-25 09:00:01")),
    ]


def test_v_spend_daily_counts_by_the_day_of_the_end(trail: duckdb.DuckDBPyConnection) -> None:
    assert rows(trail, "FROM v_spend_daily") == [
        (D24, "hr", "large", 1, 3.0, 6.0, 3_000_000, 6_000_000, 200, 50, 0),
        (D24, "hr", "small", 1, 0.4, 0.4, 400_000, 400_000, 100, 30, 0),
        (D24, "research", "small", 2, 2.05, 2.55, 2_050_000, 2_550_000, 70, 50, 0),
        (D25, "hr", "small", 1, 0.0, 0.0, 0, 0, 10, 5, 1),
        (D25, "research", "large", 1, 0.1, 0.2, 100_000, 200_000, 10, 0, 0),
    ]


def test_v_spend_adds_up_to_all_of_it(trail: duckdb.DuckDBPyConnection) -> None:
    # Charged 9.15 s altogether: 6.0, 2.55, 0.4, 0.2.
    assert rows(trail, "FROM v_spend") == [
        ("hr", "large", D24, D24, 1, 3.0, 6.0, 3_000_000, 6_000_000, 200, 50, 65.6),
        ("research", "small", D24, D24, 2, 2.05, 2.55, 2_050_000, 2_550_000, 70, 50, 27.9),
        ("hr", "small", D24, D25, 2, 0.4, 0.4, 400_000, 400_000, 110, 35, 4.4),
        ("research", "large", D25, D25, 1, 0.1, 0.2, 100_000, 200_000, 10, 0, 2.2),
    ]


def test_v_budget_burn_adds_up_within_each_window(trail: duckdb.DuckDBPyConnection) -> None:
    sql = """SELECT account, hour, charged_us, tokens, day_charged_us, day_tokens,
        week_charged_us, month_charged_us, month_tokens FROM v_budget_burn"""
    ten, eleven = at("2026-11-24 10:00:00"), at("2026-11-24 11:00:00")
    thirteen = at("2026-11-24 13:00:00")
    midnight, nine = at("2026-11-25 00:00:00"), at("2026-11-25 09:00:00")
    week, other = 6_400_000, 2_500_000
    assert rows(trail, sql) == [
        ("hr", ten, 6_400_000, 380, 6_400_000, 380, 6_400_000, 6_400_000, 380),
        ("hr", midnight, 0, 15, 0, 15, week, week, 395),
        ("research", eleven, other, 100, other, 100, other, other, 100),
        ("research", thirteen, 50_000, 20, 2_550_000, 120, 2_550_000, 2_550_000, 120),
        ("research", nine, 200_000, 10, 200_000, 10, 2_750_000, 2_750_000, 130),
    ]


def test_v_unattributed_gpu_counts_a_repeated_interval_once(
    trail: duckdb.DuckDBPyConnection,
) -> None:
    assert rows(trail, "FROM v_unattributed_gpu") == [
        # 20 s: 8 busy, of them 7.5 for somebody; lost, but what it lost is in its interval.
        (D24, "rep-a", "small-base", "H100", 20.0, 8.0, 7.5, 12.0, 0.5, 6.25, 1),
        # An engine lost with 1.5 s at most, and an interval that nobody can read.
        (D25, "rep-b", "large-base", "H100", 0.0, 0.0, 0.0, 0.0, 1.5, 100.0, 1),
    ]


def test_v_config_changes_shows_administration_only(trail: duckdb.DuckDBPyConnection) -> None:
    sql = "SELECT event_type, entity_id, state, subject_key, reason_code, due FROM v_config_changes"
    due = at("2026-11-26 10:00:00")
    assert rows(trail, sql) == [
        ("budget.loaded", "d" * 64, None, None, None, None),
        ("budget.set", "hr", "set", "s-olga", "quarter end", due),
    ]
