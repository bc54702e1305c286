"""``gatehouse budget forecast``, ``simulate``, ``top``, ``report`` and ``export`` on a trail."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from deployments.cli.budget_reports import Period
from deployments.cli.errors import Exit
from deployments.cli.main import cli
from governance.budget.config import BudgetsConfig
from tests.spending_trail import PERSONS, Spending, spend
from tests.trail import Trail, us
from tests.unit.test_cli_commands import Stub, error, stub

__all__ = ["stub"]

FILE = {
    "accounts": {
        "hr": {"window": "month", "gpu_seconds": 1000},
        "marketing": {"window": "day", "gpu_seconds": 100},
        "data-science": {"window": "month", "gpu_seconds": 9000},
    }
}
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trail, Spending]:
    trail = Trail(tmp_path_factory.mktemp("house"))
    sums = spend(trail)
    trail.seal()
    return trail, sums


@pytest.fixture
def sums(house: tuple[Trail, Spending]) -> Spending:
    return house[1]


@pytest.fixture
def run(house: tuple[Trail, Spending], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "budgets.yaml").write_text(json.dumps(FILE))

    def invoke(*words: str, url: str | None = None) -> Result:
        environment = {
            "GATEHOUSE_EVIDENCE": str(house[0].evidence),
            "GATEHOUSE_STATE": str(house[0].state),
            "GATEHOUSE_TOKEN": "secret-token",
            "GATEHOUSE_URL": url,
        }
        return CliRunner().invoke(cli, ["budget", *words], env=environment)

    return invoke


def rows(result: Result) -> list[list[str]]:
    assert result.exit_code == Exit.OK, result.output
    return [line.split("\t") for line in result.stdout.splitlines() if "\t" in line]


def test_top(run: Run, sums: Spending) -> None:
    found = rows(run("top", "--since", "2026-10-01"))
    assert [row[0] for row in found] == ["marketing", "hr", "data-science"]
    assert sum(int(row[3]) for row in found) == sums.requests
    assert set(found[0][6]) <= set("▁▂▃▄▅▆▇█")
    result = run("top", "--since", "2026-10-01", "--by", "model", "--json")
    charged = sum(each["charged_us"] for each in json.loads(result.stdout))
    assert charged == sum(sums.charged_us.values())
    result = run("top", "--since", "2026-10-01", "--by", "person", "--department", "hr", "-n", "2")
    assert len(rows(result)) == 2
    assert "1 more" in result.stderr
    assert len(rows(result)[0][0]) == 12
    assert "nothing was used" in run("top", "--since", "2027-01-01").stderr


def test_a_forecast_by_a_file(run: Run) -> None:
    words = ("forecast", "--budgets", "budgets.yaml", "--at", "2026-11-20T12:00")
    found = {row[0]: row for row in rows(run(*words))}
    assert set(found) == {"hr", "marketing", "data-science"}
    assert found["hr"][9] == "now", "its month is used up"
    assert found["hr"][10] == "100 %"
    assert found["data-science"][9] == "not"
    assert found["hr"][11] == "hours of the week"
    said = json.loads(run(*words, "--account", "marketing", "--json").stdout)
    assert [each["account"] for each in said] == ["marketing"]
    assert said[0]["forecast"]["low"] <= said[0]["forecast"]["high"]
    assert run(*words, "--account", "nowhere").exit_code == Exit.NOT_FOUND
    assert run("forecast", "--at", "2026-11-20").exit_code == Exit.USAGE


def test_a_forecast_by_the_platform(run: Run, stub: Stub) -> None:
    config = BudgetsConfig.model_validate(FILE)
    stub.answers["GET", "/v1/admin/budget-file"] = 200, {
        "budgets": config.model_dump(mode="json"),
    }  # fmt: skip
    account = {
        "account": "hr", "window": "month", "reset_at": 4_102_444_800,
        "limit": {"gpu_us": 1_000_000_000, "tokens": None},
        "spent": {"gpu_us": 999_000_000, "tokens": 5},
    }  # fmt: skip
    stub.answers["GET", "/v1/admin/budgets"] = 200, {"object": "list", "data": [account]}
    (found,) = rows(run("forecast", url=stub.url))
    assert (found[0], found[5], found[8]) == ("hr", "16m39s", "16m40s")
    stub.answers["GET", "/v1/admin/budget-file"] = 403, error("not_permitted")
    assert run("forecast", url=stub.url).exit_code == Exit.DENIED


def test_a_simulation(run: Run, sums: Spending) -> None:
    result = run("simulate", "--budgets", "budgets.yaml", "--since", "2026-10-01")
    assert result.exit_code == Exit.OK, result.output
    assert f"{sums.requests + sums.refused} requests" in result.stdout
    assert f"{sums.refused} really were" in result.stdout
    said = json.loads(
        run("simulate", "--budgets", "budgets.yaml", "--since", "2026-10-01", "--json").stdout
    )
    refused = {each["account"]: each["refused"] for each in said["fates"]}
    assert refused["data-science"] == 0
    assert refused["hr"] > 0
    assert said["refused"] == sum(refused.values())
    served = {each["account"]: each["served"]["gpu_us"] for each in said["fates"]}
    assert served["data-science"] == sums.charged_us["data-science"]
    assert run("simulate", "--budgets", "budgets.yaml", "--since", "2027-01-01").exit_code == (
        Exit.NOT_FOUND
    )


def test_a_file_that_is_wrong_is_not_simulated(run: Run, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("accounts: {hr: {window: day}}\n")
    result = run("simulate", "--budgets", "wrong.yaml")
    assert result.exit_code == Exit.FAILURE
    assert "sets no limit" in result.output


def test_a_report(run: Run, sums: Spending, stub: Stub, tmp_path: Path) -> None:
    result = run("report", "--period", "2026-11", "--no-ledger")
    assert result.exit_code == Exit.OK, result.output
    assert result.stdout.startswith("# GPU usage by department, 2026-11-01 to 2026-11-30\n")
    assert "Not reconciled" in result.stdout
    accounts = [
        {
            "account": name, "window": "month", "start": "2026-11-01T00:00:00Z",
            "start_at": us("2026-11-01 00:00:00") // 1_000_000, "owner": None, "mode": "hard",
            "limit": {"gpu_us": 1, "tokens": None},
            "spent": {"gpu_us": sums.november_us[name], "tokens": 0},
            "total": {"gpu_us": sums.charged_us[name], "tokens": sums.tokens[name]},
        }
        for name in PERSONS
    ]  # fmt: skip
    stub.answers["GET", "/v1/admin/budgets"] = 200, {"object": "list", "data": accounts}
    result = run("report", "--period", "2026-11", "--out", "november.html", url=stub.url)
    assert result.exit_code == Exit.OK, result.output
    page = (tmp_path / "november.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "Ledger and audit trail" in page
    result = run("report", "--period", "2026-11", "--format", "json", "--price", "2.40",
                 "--department", "hr", url=stub.url)  # fmt: skip
    found = json.loads(result.stdout)
    assert found["total"]["charged_us"] == sums.november_us["hr"]
    assert {each["ledger_us"] - each["trail_us"] for each in found["reconciled"]} == {0}
    stub.answers["GET", "/v1/admin/budgets"] = 503, error("ledger_unavailable")
    assert run("report", url=stub.url).exit_code == Exit.UNAVAILABLE


@pytest.mark.parametrize(
    "words",
    [
        ("--period", "2026-13"), ("--period", "soon"), ("--period", "2026-11-05..2026-11-01"),
        ("--timezone", "Mars/Olympus"), ("--currency", "euro"), ("--price", "-1"),
        ("--price", "1e9"), ("--memory", "much"),
    ],
)  # fmt: skip
def test_wrong_use_of_report(run: Run, words: tuple[str, ...]) -> None:
    assert run("report", "--no-ledger", *words).exit_code == Exit.USAGE


def test_an_unknown_department_has_no_page(run: Run) -> None:
    result = run("report", "--no-ledger", "--period", "2026-11", "--department", "nowhere")
    assert result.exit_code == Exit.NOT_FOUND


@pytest.mark.parametrize(
    ("text", "first", "after"),
    [
        ("2026-12", date(2026, 12, 1), date(2027, 1, 1)),
        ("2024-02", date(2024, 2, 1), date(2024, 3, 1)),
        ("2026-11-02..2026-11-08", date(2026, 11, 2), date(2026, 11, 9)),
        ("2026-11-02..2026-11-02", date(2026, 11, 2), date(2026, 11, 3)),
    ],
)
def test_periods(text: str, first: date, after: date) -> None:
    assert Period().convert(text, None, None) == (first, after)


def test_months_from_today() -> None:
    last = Period().convert("last-month", None, None)
    this = Period().convert("this-month", None, None)
    assert last[1] == this[0]
    assert {day.day for day in (*last, *this)} == {1}
    with pytest.raises(click.BadParameter):
        Period().convert("next-month", None, None)


def test_an_export(run: Run, sums: Spending, tmp_path: Path) -> None:
    span = ("--since", "2026-10-01", "--until", "2026-12-01")
    result = run("export", *span)
    read: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(result.stdout)))
    assert sum(int(row["x_Requests"]) for row in read) == sums.requests
    result = run("export", *span, "--out", "usage.csv", "--grain", "hour", "--price", "2.4")
    assert result.exit_code == Exit.OK, result.output
    with (tmp_path / "usage.csv").open(newline="") as stream:
        read = list(csv.DictReader(stream))
    assert result.stderr == f"{len(read)} rows\n"
    assert {row["BillingCurrency"] for row in read} == {"EUR"}
    result = run("export", *span, "--format", "parquet", "--out", "usage.parquet")
    assert result.exit_code == Exit.OK, result.output
    assert sum(pq.read_table(tmp_path / "usage.parquet")["x_Requests"].to_pylist()) == sums.requests
    assert run("export", "--format", "parquet").exit_code == Exit.USAGE
