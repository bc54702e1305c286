"""The sealer as a real Ray actor: it seals, adopts the dead, and comes back by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from deployments import audit_actors
from deployments.audit_actors import ACTOR_PREFIX, get_or_start_sealer
from governance.audit.writer import WalOptions
from tests.unit.audit_kit import event, open_writer, sealed_records

QUICK = WalOptions(segment_age_us=100_000)
CHILD = """
import sys, time
from pathlib import Path
from governance.audit.writer import AuditWriter
writer = AuditWriter.open(Path(sys.argv[1]), "gw-dead", clock=lambda: time.time_ns() // 1000)
print(writer.write_blocking({"event_type": "inference.decided", "ts_us": 1}), flush=True)
time.sleep(60)
"""


@pytest.fixture
def start(
    ray_local: None, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Callable[[], Any]]:
    """Finds or starts this node's sealer in a namespace of its own."""
    node_id = ray.get_runtime_context().get_node_id()
    namespace = f"test-{request.node.name}"

    def find() -> Any:
        return get_or_start_sealer(
            tmp_path / "state", tmp_path / "evidence", node_id, namespace, 0.2
        )

    yield find
    ray.kill(ray.get_actor(f"{ACTOR_PREFIX}{node_id}", namespace), no_restart=True)


def until(condition: Callable[[], object], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.05)


def test_it_seals_and_ends_what_the_dead_left_open(
    start: Callable[[], Any], tmp_path: Path
) -> None:
    wal, evidence = tmp_path / "state" / "wal", tmp_path / "evidence"
    sealer = start()
    writer = open_writer(wal, options=QUICK)
    living = writer.write_blocking(event("budget.set"))
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(wal)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert child.stdout is not None
    decided = child.stdout.readline().strip()
    child.kill()
    child.wait()
    child.stdout.close()
    died = time.monotonic()
    until(lambda: ray.get(sealer.status.remote()).aborted == 1)
    assert time.monotonic() - died < 30
    until(lambda: living in {r["event_id"] for r in sealed_records(evidence)})
    writer.close_blocking()
    until(lambda: not (wal / "gw-1").exists())
    status = ray.get(sealer.status.remote())
    assert status.running
    assert status.faults == []
    assert status.adopted >= 2
    ray.get(sealer.stop.remote())
    ends = [r for r in sealed_records(evidence) if r["event_type"] == "inference.aborted"]
    assert [r["parent_event_id"] for r in ends] == [decided]


def test_one_of_another_deployment_is_replaced(
    start: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wal = tmp_path / "state" / "wal"
    old = start()
    # Somebody who started later, with other code: the old one is older than that process.
    monkeypatch.setattr(audit_actors, "_code", lambda: "other")
    assert start()._actor_id == old._actor_id, "made after this process started"
    monkeypatch.setattr(audit_actors, "_STARTED_US", audit_actors._now_us())
    monkeypatch.setattr(audit_actors, "_code", lambda: "other still")
    new = start()
    assert new._actor_id != old._actor_id
    assert start()._actor_id == new._actor_id
    open_writer(wal).close_blocking()
    until(lambda: not (wal / "gw-1").exists())
    # One that has stopped seals nothing, whoever made it.
    ray.get(new.stop.remote())
    third = start()
    assert third._actor_id != new._actor_id
    assert ray.get(third.status.remote()).running


def test_it_comes_back_by_itself(start: Callable[[], Any], tmp_path: Path) -> None:
    wal, evidence = tmp_path / "state" / "wal", tmp_path / "evidence"
    sealer = start()
    assert start()._actor_id == sealer._actor_id
    ray.kill(sealer, no_restart=False)
    writer = open_writer(wal)
    writer.write_blocking(event("budget.set"))
    writer.close_blocking()
    # Nobody calls it: the loop starts with the process.
    until(lambda: list(evidence.rglob("*.parquet")))
    until(lambda: not (wal / "gw-1").exists())
    assert ray.get(sealer.status.remote()).adopted >= 1
    assert len(sealed_records(evidence)) == 3
