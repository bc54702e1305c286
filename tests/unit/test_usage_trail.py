"""What is read of the audit trail about usage, against what was written into it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest

from deployments import usage_trail
from deployments.budget_forecast import from_file, from_ledger, outlooks
from deployments.usage_export import COLUMNS, DECIMALS, TIMES, cell, rows, write_csv, write_parquet
from governance.audit.query import connect
from governance.budget.config import BudgetsConfig
from governance.finops.burn import HOUR_US
from governance.finops.showback import Price
from governance.finops.simulate import simulate
from governance.types import Amount, PrincipalKind
from tests.spending_trail import AFTER, FIRST, HOSTILE, PERSONS, Spending, person, spend
from tests.trail import Trail, us

FROM_US, UNTIL_US = us(f"{FIRST} 00:00:00"), us(f"{AFTER} 00:00:00")
BUDGETS = BudgetsConfig.model_validate(
    {
        "accounts": {
            "hr": {"window": "week", "timezone": "Europe/Berlin", "gpu_seconds": 400,
                   "also": [{"window": "day", "tokens": 100_000}],
                   "parts": {"screening": {"match": {"applications": ["hr-screening"]},
                                           "window": "day", "gpu_seconds": 100}}},
            "marketing": {"window": "month", "gpu_seconds": 3600,
                          "per_user": {"window": "day", "gpu_seconds": 600}},
            "data-science": {"window": "month", "timezone": "Asia/Kolkata", "gpu_seconds": 1000},
        }
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trail, Spending]:
    trail = Trail(tmp_path_factory.mktemp("house"))
    sums = spend(trail)
    trail.seal()
    return trail, sums


@pytest.fixture(scope="module")
def sums(written: tuple[Trail, Spending]) -> Spending:
    return written[1]


@pytest.fixture(scope="module")
def trail(written: tuple[Trail, Spending]) -> Iterator[duckdb.DuckDBPyConnection]:
    with connect(written[0].evidence, written[0].state) as connection:
        yield connection


def test_tops_add_up(trail: duckdb.DuckDBPyConnection, sums: Spending) -> None:
    total = sum(sums.charged_us.values())
    for by in usage_trail.GROUPS:
        found = usage_trail.top(trail, by, FROM_US, UNTIL_US, parts=5)
        assert sum(each.charged_us for each in found) == total
        assert sum(each.requests for each in found) == sums.requests
        assert sum(each.share_percent for each in found) == pytest.approx(100, abs=0.5)
        assert all(sum(each.buckets) == each.charged_us for each in found)
        assert [each.charged_us for each in found] == sorted(
            (each.charged_us for each in found), reverse=True
        )


def test_tops_by_each_kind(trail: duckdb.DuckDBPyConnection, sums: Spending) -> None:
    def names(by: str, **more: Any) -> dict[str, int]:
        found = usage_trail.top(trail, by, FROM_US, UNTIL_US, **more)
        return {each.name: each.charged_us for each in found}

    assert names("department") == sums.charged_us
    assert names("account") == sums.accounts
    assert set(names("model")) == {"small", "large"}
    assert names("part")["hr/screening"] == sums.accounts["hr/screening"]
    assert set(names("application")) == {"desk", "hr-screening", HOSTILE}
    own = {person("marketing", number) for number in range(PERSONS["marketing"])}
    assert set(names("person", department="marketing")) == own
    assert sum(names("person", department="marketing").values()) == sums.charged_us["marketing"]
    assert usage_trail.top(trail, "model", UNTIL_US, UNTIL_US + 1) == []
    with pytest.raises(ValueError, match="by must be one of"):
        usage_trail.top(trail, "1; DROP", FROM_US, UNTIL_US)


def test_what_is_above_is_charged_as_well(trail: duckdb.DuckDBPyConnection, sums: Spending) -> None:
    starts = dict.fromkeys(("hr", "hr/screening", "marketing", "nobody"), FROM_US)
    found = usage_trail.spent(trail, starts, UNTIL_US)
    assert found["hr"] == Amount(sums.charged_us["hr"], sums.tokens["hr"])
    assert found["hr/screening"].gpu_us == sums.accounts["hr/screening"]
    assert found["nobody"] == Amount()
    assert usage_trail.totals(trail) == {
        name: Amount(sums.charged_us[name], sums.tokens[name]) for name in PERSONS
    }
    burn = trail.execute(
        "SELECT account, sum(charged_us), sum(tokens) FROM v_budget_burn GROUP BY account"
    ).fetchall()
    by_account = {account: (int(charged_us), int(tokens)) for account, charged_us, tokens in burn}
    assert by_account["marketing"] == (sums.charged_us["marketing"], sums.tokens["marketing"])
    assert by_account["hr/screening"][0] == sums.accounts["hr/screening"]
    someone = f"marketing~{person('marketing', 0)}"
    assert by_account[someone][0] == sums.accounts[someone]


def test_histories_have_no_gaps(trail: duckdb.DuckDBPyConnection, sums: Spending) -> None:
    zones = {"hr": "Europe/Berlin", "hr/screening": "Europe/Berlin", "nobody": "UTC"}
    now_us = us("2026-11-27 12:34:56")
    found = usage_trail.histories(trail, now_us, zones)
    assert set(found) == {(name, q) for name in zones for q in ("gpu_us", "tokens")}
    for history in found.values():
        assert history.start_us % HOUR_US == 0
        assert history.end_us == us("2026-11-27 12:00:00")
    row = trail.execute(
        "SELECT sum(charged_us)::BIGINT FROM v_usage WHERE department = 'hr'"
        " AND ended_ts < TIMESTAMP '2026-11-27 12:00:00'"
    ).fetchone()
    assert row is not None
    assert sum(found["hr", "gpu_us"].amounts) == row[0] > 0
    assert sum(found["nobody", "tokens"].amounts) == 0
    assert usage_trail.histories(trail, FROM_US, {"hr": "UTC"})["hr", "gpu_us"].amounts == ()


def test_requests_of_the_past_know_their_callers(
    trail: duckdb.DuckDBPyConnection, sums: Spending, tmp_path: Path
) -> None:
    found = list(usage_trail.past(trail, FROM_US))
    assert len(found) == sums.requests + sums.refused
    assert sum(each.refused for each in found) == sums.refused
    assert sum(each.took.gpu_us for each in found) == sum(sums.charged_us.values())
    screening = [each for each in found if each.principal.client_id == "hr-screening"]
    assert {each.principal.department for each in screening} == {"hr"}
    assert sum(each.took.gpu_us for each in screening) == sums.accounts["hr/screening"]
    assert {each.principal.kind for each in found} == {PrincipalKind.USER}
    played = simulate(BUDGETS, found, tmp_path)
    assert played.refused_then == sums.refused
    assert {fate.account for fate in played.fates} == {
        name for name in sums.accounts if name != "hr/recruiting"
    }


def test_outlooks_by_a_file(trail: duckdb.DuckDBPyConnection, sums: Spending) -> None:
    now_us = us("2026-11-27 12:34:56")
    subjects = {each.account: each for each in from_file(trail, BUDGETS, now_us)}
    assert set(subjects) == {"hr", "hr@day", "hr/screening", "marketing", "data-science"}
    assert subjects["marketing"].end_us == us("2026-12-01 00:00:00")
    assert subjects["hr"].end_us == us("2026-11-29 23:00:00"), "Monday in Berlin"
    assert subjects["hr@day"].spent.tokens < subjects["hr"].spent.tokens
    found = outlooks(trail, subjects.values(), now_us)
    assert {(each.account, each.quantity) for each in found} == {
        ("hr", "gpu_us"), ("hr@day", "tokens"), ("hr/screening", "gpu_us"),
        ("marketing", "gpu_us"), ("data-science", "gpu_us"),
    }  # fmt: skip
    assert found[0].account == "data-science", "its limit is passed"
    assert found[0].forecast.exhausted_us == now_us
    (month,) = [each for each in found if each.account == "marketing"]
    assert month.spent < month.forecast.low <= month.forecast.spent <= month.forecast.high
    assert len(month.week) == 168
    # Against what really came; the trail ends a working day before the month does.
    assert month.forecast.spent == pytest.approx(sums.november_us["marketing"], rel=0.15)


def test_outlooks_by_the_ledger(trail: duckdb.DuckDBPyConnection) -> None:
    account = {
        "window": "week", "reset_at": 1_796_000_000, "limit": {"gpu_us": 1, "tokens": None},
        "spent": {"gpu_us": 5, "tokens": 6},
    }  # fmt: skip
    names = ("hr", "hr~someone", "hr/screening")
    found = from_ledger([{**account, "account": name} for name in names], BUDGETS)
    assert [(each.account, each.zone) for each in found] == [
        ("hr", "Europe/Berlin"), ("hr/screening", "UTC"),
    ]  # fmt: skip
    assert found[0].spent == Amount(5, 6)


# Rows for other tools

PRICE = Price(Decimal("2.40"), "EUR")


def test_exported_rows_add_up(trail: duckdb.DuckDBPyConnection, sums: Spending) -> None:
    for grain in ("hour", "day"):
        found = list(rows(trail, grain, FROM_US, UNTIL_US, organisation="ACME", price=PRICE))
        assert all(set(row) == set(COLUMNS) for row in found)
        assert sum(row["x_Requests"] for row in found) == sums.requests
        charged = sum(row["ConsumedQuantity"] for row in found)
        assert charged == Decimal(sum(sums.charged_us.values())) / 1_000_000
        cost = sum(row["BilledCost"] for row in found)
        assert cost == pytest.approx(charged * Decimal("2.40") / 3600, abs=Decimal("1e-6"))
        assert {row["SubAccountId"] for row in found} == set(PERSONS)
        for row in found:
            assert row["BillingPeriodStart"].day == row["BillingPeriodEnd"].day == 1
            assert row["BillingPeriodStart"] <= row["ChargePeriodStart"]
            assert row["ChargePeriodEnd"] <= row["BillingPeriodEnd"]
    assert not list(rows(trail, "day", UNTIL_US, UNTIL_US + 1))


def test_csv_is_read_back_and_runs_nothing(
    trail: duckdb.DuckDBPyConnection, sums: Spending
) -> None:
    out = io.StringIO()
    count = write_csv(rows(trail, "day", FROM_US, UNTIL_US), out)
    read = list(csv.DictReader(io.StringIO(out.getvalue())))
    assert len(read) == count
    assert tuple(read[0]) == COLUMNS
    assert {row["x_Application"] for row in read} == {"desk", "hr-screening", f"'{HOSTILE}"}
    charged = sum(Decimal(row["ConsumedQuantity"]) for row in read)
    assert charged == Decimal(sum(sums.charged_us.values())) / 1_000_000
    assert {(row["BilledCost"], row["BillingCurrency"]) for row in read} == {("", "")}
    assert read[0]["ChargePeriodStart"] == "2026-10-26T00:00:00Z"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("=1+1", "'=1+1"), ("+49", "'+49"), ("-1", "'-1"), ("@x", "'@x"), ("\t=1", "'\t=1"),
        ("\r=1", "'\r=1"), ("a=1", "a=1"), ("", ""), (None, ""), (5, "5"),
        (Decimal("0.000000001"), "0.000000001"),
        (datetime(2026, 11, 24, 10, tzinfo=UTC), "2026-11-24T10:00:00Z"),
    ],
)  # fmt: skip
def test_cells(value: Any, text: str) -> None:
    assert cell(value) == text


def test_parquet_is_exact(trail: duckdb.DuckDBPyConnection, sums: Spending, tmp_path: Path) -> None:
    path = tmp_path / "usage.parquet"
    count = write_parquet(rows(trail, "hour", FROM_US, UNTIL_US, price=PRICE), path)
    table = pq.read_table(path)
    assert (table.num_rows, table.column_names) == (count, list(COLUMNS))
    assert {str(table.schema.field(name).type) for name in TIMES} == {"timestamp[us, tz=UTC]"}
    assert {str(table.schema.field(name).type) for name in DECIMALS} == {"decimal128(28, 9)"}
    charged = sum(value.as_py() for value in table["ConsumedQuantity"])
    assert charged == Decimal(sum(sums.charged_us.values())) / 1_000_000
    assert HOSTILE in set(table["x_Application"].to_pylist()), "text is text there"
    empty = tmp_path / "empty.parquet"
    assert write_parquet(iter(()), empty) == 0
    assert pq.read_table(empty).column_names == list(COLUMNS)


def test_days_are_those_of_the_zone(trail: duckdb.DuckDBPyConnection, sums: Spending) -> None:
    first, after = date(2026, 11, 1), date(2026, 12, 1)
    found = list(usage_trail.usage_rows(trail, first, after, "UTC"))
    by: dict[str, int] = {}
    for row in found:
        by[row.department or ""] = by.get(row.department or "", 0) + row.charged_us
    assert by == sums.november_us
    night = list(usage_trail.usage_rows(trail, first, after, "America/Los_Angeles"))
    assert {row.day for row in night if row.department == "data-science"} != {
        row.day for row in found if row.department == "data-science"
    }, "batches at two in the morning are of the day before, over there"
    assert usage_trail.refusals(trail, first, after, "UTC") == {"marketing": sums.refused}
    changes = usage_trail.changes(trail, first, after, "UTC")
    assert [each.what for each in changes["marketing"]] == [
        "transfer from hr to marketing: 30 GPU seconds", "threshold 80 % of GPU time",
    ]  # fmt: skip
    (override,) = changes["hr"]
    assert (override.what, override.reason) == ("override 90 GPU seconds", "quarter end")
    assert usage_trail.changes(trail, date(2026, 12, 1), date(2026, 12, 2), "UTC") == {}
