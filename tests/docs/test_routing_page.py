"""The page about routing is true: its blocks run, and it names every key, reason and header."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pydantic import BaseModel

from deployments.api import envelope
from governance.audit.query import connect
from governance.audit.sql_guard import check_select
from governance.models_file import load_models
from governance.types import ModelInfo, Operation
from routing import cards
from routing.reasons import Instead, Judgement, Reason
from tests.docs.pages import ROOT, Block, blocks
from tests.routed_trail import routed
from tests.trail import Trail

if TYPE_CHECKING:
    from benchmarks.platform import Platform

PAGE = ROOT / "docs/routing.md"
TEXT = PAGE.read_text()
BLOCKS = blocks(PAGE)
LIVE, NOTEBOOK = [block for block in BLOCKS if block.language == "python"]
URL = "http://127.0.0.1:8000"
SINCE = "--since 2026-11-01"
"""Reaches the trail below, however late it is."""


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


@pytest.fixture(scope="module")
def trail(tmp_path_factory: pytest.TempPathFactory) -> Trail:
    made = Trail(tmp_path_factory.mktemp("house"))
    routed(made)
    made.seal()
    return made


def environment(trail: Trail) -> dict[str, str]:
    return {
        **os.environ,
        "GATEHOUSE_EVIDENCE": str(trail.evidence),
        "GATEHOUSE_STATE": str(trail.state),
        "GATEHOUSE_CONFIG_ROOT": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with the serve files."""
    for name in ("serve_config.yaml", "serve_config.local.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_blocks_are_of_a_kind_that_is_tested() -> None:
    assert {block.language for block in BLOCKS} == {"python", "sh", "sql", "yaml"}


@pytest.mark.parametrize("block", of("sh"), ids=lambda b: b.text[:30])
def test_commands_run(trail: Trail, folder: Path, block: Block) -> None:
    for command in block.commands():
        report = f"route report {SINCE}"
        words = command.replace("--since 30d", "").replace("route report", report)
        done = subprocess.run(
            [
                "bash",
                "-o",
                "pipefail",
                "-c",
                words.replace("route report", f"route report {SINCE}"),
            ],
            cwd=folder,
            env=environment(trail),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout or ">" in command
        assert not done.stderr


@pytest.mark.parametrize("block", of("sql"), ids=lambda b: b.text[:30])
def test_questions_have_answers(trail: Trail, block: Block) -> None:
    with connect(trail.evidence, trail.state) as connection:
        assert connection.execute(check_select(block.text)).fetchall()


def test_the_notebook_runs(trail: Trail) -> None:
    code = NOTEBOOK.text.replace('"data/', f'"{trail.evidence.parent}/')
    assert code != NOTEBOOK.text
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment(trail),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0 2 500.0\n"


def test_the_sdk_example_runs(platform: Platform) -> None:
    platform.wait_ready()
    done = subprocess.run(
        [sys.executable, "-c", LIVE.text.replace(URL, platform.url)],
        cwd=ROOT,
        env=platform.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"(small|large) because auto:(small|large) \w", done.stdout), done.stdout


def test_the_models_file_loads(tmp_path: Path) -> None:
    (block,) = of("yaml")
    path = tmp_path / "models.yaml"
    path.write_text(block.text)
    served = [
        ModelInfo(name, name, frozenset({Operation.CHAT}), 1000, name)
        for name in ("small", "large")
    ]
    loaded = load_models(path, served)
    assert loaded.routing.target("data-science").quality == 0.9
    assert loaded.routing.cascade is not None
    assert loaded.routing.shadow is not None


@pytest.mark.parametrize(
    "model",
    [
        cards.ModelCard, cards.Price, cards.Target, cards.Hysteresis, cards.Pressure, cards.Cascade,
        cards.Shadow, cards.RoutingConfig, cards.ModelsFile,
    ],
)  # fmt: skip
def test_every_key_is_explained(model: type[BaseModel]) -> None:
    named = set(re.findall(r"`(\w+)`", TEXT)) | {"version"}
    assert not set(model.model_fields) - named


def test_every_reason_is_named() -> None:
    """In full, or as another last word of one that is."""
    spans = set(re.findall(r"`([^`\n]+)`", TEXT))
    named = {span.partition(" ")[2] for span in spans if span.startswith("auto:")}
    for reason in Reason:
        begin, _, end = reason.rpartition(" ")
        siblings = {name for name in named if name.rpartition(" ")[0] == begin}
        assert reason.value in named or (siblings and end in spans), reason
    assert {reason.value for reason in Instead} <= spans
    given_up = set(Judgement) - {Judgement.SURE, Judgement.LEARNING, Judgement.NO_EVIDENCE}
    assert not {word.value for word in given_up} - spans - {"unsure"}


def test_headers_are_those_that_are_sent() -> None:
    sent = {value for value in vars(envelope).values() if isinstance(value, str)}
    named = set(re.findall(r"`(x-gatehouse-[a-z-]+)`", TEXT)) - {"x-gatehouse-gpu-ms"}
    assert named
    assert named <= sent
