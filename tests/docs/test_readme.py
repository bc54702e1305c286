"""README's own words, run: every block against the running platform."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.docs.pages import ROOT, Block, blocks

if TYPE_CHECKING:
    from benchmarks.platform import Platform

README = ROOT / "README.md"
BLOCKS = blocks(README)
SHELL = [block for block in BLOCKS if block.language == "sh"]
PYTHON = [block for block in BLOCKS if block.language == "python"]
STARTS = ("make ", "serve run ")
"""Commands that start something of their own: checked for what they name, not run again."""
RUN = [block for block in SHELL if not block.text.startswith(STARTS)]
REFUSED = 4
"""Exit code of the command that README shows being refused: not visible to this caller."""
URL = "http://127.0.0.1:8000"


def run(platform: Platform, command: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**platform.environment(), **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_blocks_are_of_a_kind_that_is_tested() -> None:
    assert {block.language for block in BLOCKS} == {"sh", "python"}
    assert RUN
    assert PYTHON


@pytest.mark.parametrize("block", [b for b in SHELL if b not in RUN], ids=lambda b: b.text[:20])
def test_what_starts_the_platform_names_what_exists(block: Block) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in block.commands():
        words = command.partition("#")[0].split()
        if words[0] == "make":
            target, *settings = words[1:]
            assert re.search(rf"^{target}:.*## ", makefile, re.MULTILINE)
            assert all(f"$({setting.split('=')[0]})" in makefile for setting in settings)
        else:
            assert words[:2] == ["serve", "run"]
            assert (ROOT / words[2]).is_file()


@pytest.mark.parametrize("block", RUN, ids=lambda b: b.text[:20])
def test_shell_blocks(platform: Platform, block: Block) -> None:
    platform.wait_ready()
    for command in block.commands():
        words, _, comment = command.partition("  # ")
        done = run(platform, ["bash", "-c", words.replace(URL, platform.url)])
        expected = REFUSED if "refused" in comment else 0
        assert done.returncode == expected, (command, done.stdout, done.stderr)
        if "curl" in words:
            assert '"choices"' in done.stdout, done.stdout
        elif "one model" in comment:
            assert len(done.stdout.splitlines()) == 2, done.stdout
        elif "gatehouse models" in words:
            assert len(done.stdout.splitlines()) > 1, done.stdout
        elif "gatehouse chat" in words and not expected:
            assert done.stdout.strip(), done.stderr
            # The id that stands in our logs, not one that Serve's proxy made up.
            assert re.search(r"request req_[0-9a-f]{32}", done.stderr), done.stderr
        elif expected:
            assert "error: " in done.stderr
            assert not done.stdout.strip()


@pytest.mark.parametrize("block", PYTHON, ids=lambda b: b.text[:20])
def test_python_blocks(platform: Platform, block: Block) -> None:
    platform.wait_ready()
    done = run(platform, [sys.executable, "-c", block.text.replace(URL, platform.url)])
    assert done.returncode == 0, done.stderr
    assert "sha256:" in done.stdout


def test_what_make_serve_prints_can_be_pasted(platform: Platform) -> None:
    """The announcement is documentation too, and most people's first."""
    platform.wait_ready()
    said = platform.log.read_text().partition("Gatehouse is ready at")[2]
    tokens = re.findall(r"^  (\S+ token .*)$", said, re.MULTILINE)
    curl = re.search(r"^curl:\n(.*?)\n\n", said, re.DOTALL | re.MULTILINE)
    sdk = re.search(r"^OpenAI SDK:\n(.*?)\n\n", said, re.DOTALL | re.MULTILINE)
    assert len(tokens) == 3
    assert curl
    assert sdk
    folder = os.environ.get("PWD") or os.getcwd()
    for command in (*tokens, curl[1], sdk[1]):
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout.strip()
        assert '"error"' not in done.stdout
