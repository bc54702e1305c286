"""Every statement of docs/consistency.md names what checks it; what it names must be there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from governance.budget.config import LeaseConfig, Mode
from governance.budget.leases import GIVE_BACK_S, MARGIN, WAIT_S
from governance.budget.lines import SCARCITY

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "consistency.md").read_text()


def test_the_tests_that_it_names_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
    assert len(named) > 30
    for file, test in named:
        tree = ast.parse((ROOT / file).read_text())
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        found = {node.name for node in tree.body if isinstance(node, functions)}
        assert test in found, f"{file} has no {test}"


def test_the_files_that_it_names_exist() -> None:
    for file in re.findall(r"`((?:tests|benchmarks)/[\w/.]+)`", TEXT):
        assert (ROOT / file).exists(), file


def test_every_mode_has_its_bound() -> None:
    table = TEXT[TEXT.index("| mode |") : TEXT.index("*Abort lag*")]
    assert set(re.findall(r"`(\w+)`", table)) >= set(Mode)


def test_its_figures_are_those_of_the_code() -> None:
    assert MARGIN == 0.05
    assert "less 5 %" in TEXT
    assert (WAIT_S, GIVE_BACK_S) == (3.0, 2.5)
    assert "then wait 3 s" in TEXT
    assert "up to 2.5 s" in TEXT
    assert SCARCITY == 8
    assert "more than eight gateways" in TEXT
    assert LeaseConfig().renew_s == 1
    assert "1 s by default" in TEXT
