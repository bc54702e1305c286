"""The guide to the audit trail is true: every block runs against a small trail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from governance.audit.query import VIEWS
from governance.audit.sql_guard import _TABLE_FUNCTIONS
from tests.docs.pages import ROOT, Block, blocks
from tests.trail import Trail, sample, today

GUIDE = ROOT / "docs/guides/audit.md"
BLOCKS = blocks(GUIDE)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("house")
    trail = Trail(root)
    sample(trail)
    today(trail)
    trail.seal()
    return root


def environment(root: Path) -> dict[str, str]:
    return {
        **os.environ,
        "GATEHOUSE_EVIDENCE": str(root / "evidence"),
        "GATEHOUSE_STATE": str(root / "state"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "sh"], ids=lambda b: b.text)
def test_commands_run(root: Path, block: Block) -> None:
    for command in block.commands():
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=root,
            env=environment(root),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout or ">" in command.rpartition('"')[2]
        assert not done.stderr


def test_the_notebook_runs(root: Path) -> None:
    (block,) = [block for block in BLOCKS if block.language == "python"]
    code = block.text.replace('"data/', f'"{root}/')
    assert code != block.text
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=root,
        env=environment(root),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "('hr', 6400000)" in done.stdout
    assert done.stdout.rstrip().endswith("inference.completed completed")


def test_every_view_and_table_function_is_named() -> None:
    page = GUIDE.read_text()
    assert not [name for name in VIEWS if name not in page and name != "v_audit"]
    assert not [name for name in _TABLE_FUNCTIONS if f"`{name}`" not in page]


def test_nothing_is_asked_of_columns_that_are_not_there() -> None:
    """What the page says of the schema, in the page that is made from it."""
    schema = (ROOT / "docs/audit-schema.md").read_text()
    for name in re.findall(r"`(\w+_us)`", GUIDE.read_text()):
        assert f"`{name}`" in schema or name in "day_charged_us"
