"""The guides' Python runs too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.docs.pages import ROOT, blocks


def test_the_control_plane_can_be_pinned_to_a_node(tmp_path: Path) -> None:
    """As ``cluster.md`` says, on a cluster of one node."""
    start, end = [b for b in blocks(ROOT / "docs/guides/cluster.md") if b.language == "python"]
    assert 'address="auto"' in start.text
    assert 'ray.init(address="auto", namespace="gatehouse")' in end.text
    code = start.text.replace(
        'address="auto"', 'address="local", include_dashboard=False, namespace="gatehouse"'
    )
    code += """
from deployments.control_actor import ACTOR_NAME
from deployments.named_actors import NAMESPACE

actor = ray.get_actor(ACTOR_NAME, NAMESPACE)
print("epoch", ray.get(actor.epoch.remote()))
"""
    # As after an upgrade: the detached actors are found and ended.
    code += end.text.replace('ray.init(address="auto", namespace="gatehouse")', "")
    code += 'print("left", ray.util.list_named_actors())'
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "GATEHOUSE_STATE": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "epoch " in done.stdout
    assert "left []" in done.stdout
    assert (tmp_path / "control" / "control.sqlite").exists()
    assert (tmp_path / "keys" / "pepper").stat().st_mode & 0o077 == 0
