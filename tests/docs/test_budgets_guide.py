"""The guide to budgets is true: files load, and commands run against a real ledger and a trail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.forecast.run import RECORDS, RESULTS
from deployments.usage_export import COLUMNS
from governance.audit.query import connect
from governance.audit.sql_guard import check_select
from governance.budget.config import Mode, load_budgets
from governance.finops.simulate import Past, simulate
from governance.types import Amount, Principal, PrincipalKind
from tests.budget_platform import BudgetPlatform
from tests.docs.pages import ROOT, Block, blocks
from tests.spending_trail import spend
from tests.trail import Trail

PAGE = ROOT / "docs/budgets.md"
TEXT = PAGE.read_text()
BLOCKS = blocks(PAGE)
FILES = [block for block in BLOCKS if block.language == "yaml"]
COMMANDS = [c for block in BLOCKS if block.language == "sh" for c in block.commands()]
USED = max(FILES, key=lambda block: len(block.text))
"""The file that the commands are run against."""


def load(block: Block, folder: Path) -> object:
    path = folder / "budgets.yaml"
    path.write_text(block.text)
    return load_budgets(path)


def test_blocks_are_of_a_kind_that_is_tested() -> None:
    assert {block.language for block in BLOCKS} == {"sh", "sql", "yaml"}


@pytest.mark.parametrize("block", FILES, ids=lambda block: block.text[:40])
def test_files_load(tmp_path: Path, block: Block) -> None:
    assert load(block, tmp_path)


def test_every_mode_is_explained() -> None:
    assert not [mode for mode in Mode if f"mode: {mode.value}" not in TEXT]


def test_the_example_of_lending_is_right(tmp_path: Path) -> None:
    (block,) = [block for block in FILES if "lend: {gpu_seconds: 4}" in block.text]
    (tmp_path / "budgets.yaml").write_text(block.text)
    config = load_budgets(tmp_path / "budgets.yaml")
    requests = []
    for second in range(30):
        name = "marketing" if second < 15 else "hr"
        who = Principal(PrincipalKind.USER, "x", "i", name, frozenset(), "x")
        requests.append(Past(1_795_507_200_000_000 + second, who, Amount(1_000_000, 1)))
    found = {fate.account: fate for fate in simulate(config, requests, tmp_path).fates}
    served = {name: fate.served.gpu_us // 1_000_000 for name, fate in found.items()}
    assert served == {"marketing": 8, "hr": 7}
    assert "marketing may use 8 seconds" in TEXT
    assert "human resources has 7 of its own 10 left" in TEXT


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Trail:
    trail = Trail(tmp_path_factory.mktemp("house"))
    spend(trail)
    trail.seal()
    return trail


@pytest.fixture(scope="module")
def environment(house: Trail, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("budgets")
    (folder / "budgets.yaml").write_text(USED.text)
    platform = BudgetPlatform(load_budgets(folder / "budgets.yaml"), house.state)
    with platform.running():
        yield {
            **os.environ,
            **platform.environment("platform-admin"),
            "GATEHOUSE_EVIDENCE": str(house.evidence),
            "GATEHOUSE_STATE": str(house.state),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PWD": str(folder),
        }


def test_commands_run_in_order(environment: dict[str, str], tmp_path: Path) -> None:
    """Each as it stands, but that the trail's days are taken, whatever day it is."""
    (tmp_path / "budgets.yaml").write_text(USED.text)
    assert len(COMMANDS) > 15
    for command in COMMANDS:
        words = command.replace("--since 30d", "--since 2026-11-01")
        words = words.replace("--period last-month", "--period 2026-11")
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", words],
            cwd=tmp_path,
            env={**environment, "PWD": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, (command, done.stderr)
        said = done.stdout + done.stderr
        assert said or ">" in command, command
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "usage.parquet").read_bytes().startswith(b"PAR1")
    assert (tmp_path / "usage.csv").read_text().startswith("BillingAccountId,")


def test_questions_have_answers(house: Trail) -> None:
    (block,) = [block for block in BLOCKS if block.language == "sql"]
    with connect(house.evidence, house.state) as connection:
        assert connection.execute(check_select(block.text)).fetchall()


def test_columns_that_are_named_exist() -> None:
    tail = TEXT[TEXT.index("## Rows for other tools") :]
    named = set(re.findall(r"`((?:x_)?[A-Z]\w+|x_\w+)`", tail))
    assert len(named) > 5
    assert named <= set(COLUMNS)


def test_what_is_said_of_forecasts_was_measured() -> None:
    rows = json.loads(RESULTS.read_text())["rows"]

    def mean(record: str, rival: str) -> float:
        found = [row[rival] for name, row in rows.items() if f", {record} on record" in name]
        assert found
        return float(sum(found) / len(found))

    long = [record for record in RECORDS if record != "1 day"]
    for record in long:
        for rival in ("flat", "since start"):
            assert 0.35 < mean(record, "forecast") / mean(record, rival) < 0.65, (record, rival)
        assert 0.7 < mean(record, "coverage") < 0.95
    for rival in ("flat", "since start"):
        assert mean("1 day", "forecast") / mean("1 day", rival) > 0.8
