"""The supervisor's order, messages and exit status, with a cluster that starts nothing."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments import supervisor
from deployments.local_cluster import AppStatus, ClusterError, set_environment
from deployments.machine import Holder
from deployments.processes import identify
from deployments.run_record import RunFolder, RunRecord
from deployments.serve_file import ServeFile, load_serve_file
from deployments.settings import Settings
from deployments.steps import Steps
from deployments.supervisor import Plan, Supervisor
from tests.unit.test_preflight import FakeMachine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The supervisor owns its process; here it must give signals and environment back."""
    handlers = {
        each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    for name in ("GATEHOUSE_STATE", "GATEHOUSE_CONFIG_ROOT"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(supervisor, "raise_file_limit", lambda: None)
    monkeypatch.setattr(supervisor, "POLL_S", 0.01)
    yield
    for each, handler in handlers.items():
        signal.signal(each, handler)


class FakeCluster:
    """Goes through given states; counts what is asked of it."""

    def __init__(self, *states: AppStatus) -> None:
        self.states = list(states)
        self.calls: list[str] = []
        self.alive = True
        self.log_folder = Path("/logs")
        self.refuses: str | None = None
        self.on_status: Callable[[], None] = lambda: None

    def start(self) -> None:
        self.calls.append("start")
        if self.refuses:
            raise ClusterError(self.refuses)

    def deploy(self, file: ServeFile, application: Any) -> None:
        self.calls.append(f"deploy {application}")

    def status(self, name: str) -> AppStatus:
        self.on_status()
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def stop(self, serve_bound_s: float) -> None:
        self.calls.append("stop")


LOADING = AppStatus("DEPLOYING", {"Engine-small": "UPDATING", "Gateway": "HEALTHY"}, "")
RUNNING = AppStatus("RUNNING", {"Engine-small": "HEALTHY", "Gateway": "HEALTHY"}, "")


class Run:
    def __init__(self, tmp_path: Path, cluster: FakeCluster, **changes: Any) -> None:
        file = load_serve_file(ROOT / changes.pop("file", "serve_config.local.yaml"))
        self.out = io.StringIO()
        self.cluster = cluster
        plan = Plan(
            file=file,
            config_path=Path("serve_config.local.yaml"),
            settings=Settings(tmp_path / "state", tmp_path, tmp_path / "evidence"),
            issuer=None,
            ready_timeout_s=5.0,
            announcement=lambda plan, logs: f"READY {plan.file.url} {logs}",
        )
        # Checkpoints are not built here: models are said to come from a hub.
        models = tuple(m.model_copy(update={"source": "hub/model"}) for m in file.app.models)
        app = file.app.model_copy(update={"models": models})
        entry = file.application.model_copy(update={"args": app})
        plan = replace(plan, file=file.model_copy(update={"applications": (entry,)}))
        self.plan = replace(plan, **changes.pop("plan", {}))
        self.supervisor = Supervisor(
            self.plan,
            Steps(self.out),
            builder=lambda file: "app",
            machine=changes.pop("machine", FakeMachine()),
            cluster=cluster,  # type: ignore[arg-type]
        )

    def __call__(self) -> int:
        return self.supervisor.run()

    @property
    def text(self) -> str:
        return self.out.getvalue()

    def when(self, words: str, action: Callable[[], None]) -> None:
        """Do something as soon as the output has some words."""

        def wait() -> None:
            while words not in self.text:
                done.wait(0.01)
            action()

        done = threading.Event()
        threading.Thread(target=wait, daemon=True).start()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_from_start_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "answers", lambda url: url.endswith(":8000/readyz"))
    run = Run(tmp_path, FakeCluster(LOADING, LOADING, RUNNING))
    run.when("READY", interrupt)
    assert run() == 0
    assert run.cluster.calls == ["start", "deploy app", "stop"]
    lines = [line for line in run.text.splitlines() if line.startswith(("-", "READY"))]
    assert [line.partition(" (")[0] for line in lines] == [
        "- check this machine: ok",
        "- start Ray: ok",
        "- start Serve: ok",
        "- load engines: ok",
        "READY http://127.0.0.1:8000 /logs",
        "- stop: ok",
    ]
    assert not (tmp_path / "state" / "run" / "serve.json").exists()


def test_stopped_before_it_was_ready(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeCluster(LOADING))
    run.cluster.on_status = interrupt
    assert run() == 130
    assert run.cluster.calls[-1] == "stop"
    assert "load engines: stopped" in run.text


def test_what_the_machine_lacks_is_all_said_and_nothing_is_started(tmp_path: Path) -> None:
    machine = FakeMachine(
        flags=frozenset(), memory_bytes=1, holders={8000: Holder(77, "python server.py")}
    )
    run = Run(tmp_path, FakeCluster(RUNNING), machine=machine)
    assert run() == 1
    assert "start" not in run.cluster.calls
    for words in ("processor: ", "memory: ", "held by process 77 (python server.py)", "PORT=8001"):
        assert words in run.text


def test_a_failed_engine_is_reported_at_once(tmp_path: Path) -> None:
    broken = AppStatus("DEPLOY_FAILED", {"Engine-small": "DEPLOY_FAILED"}, "ValueError: no weights")
    run = Run(tmp_path, FakeCluster(LOADING, broken))
    assert run() == 1
    assert "error: an engine or the gateway failed: ValueError: no weights\n  logs: /logs" in (
        run.text
    )
    assert run.cluster.calls[-1] == "stop"


def test_an_engine_that_takes_too_long_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeCluster(LOADING), plan={"ready_timeout_s": 0.05})
    assert run() == 1
    assert "waiting for Engine-small\n" in run.text
    assert "--ready-timeout" in run.text


def test_ray_that_does_not_start_and_ray_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = FakeCluster(LOADING)
    cluster.refuses = "Ray did not start: no room"
    run = Run(tmp_path, cluster)
    assert run() == 1
    assert "error: Ray did not start: no room" in run.text
    monkeypatch.setattr(supervisor, "answers", lambda url: True)
    run = Run(tmp_path, FakeCluster(RUNNING))
    run.when("READY", lambda: setattr(run.cluster, "alive", False))
    assert run() == 1
    assert "error: Ray has ended" in run.text
    assert run.cluster.calls[-1] == "stop"


def test_a_second_start_names_the_first(tmp_path: Path) -> None:
    me = identify(os.getpid())
    assert me is not None
    folder = RunFolder(tmp_path / "state")
    folder.acquire()
    folder.write(RunRecord(me, "http://127.0.0.1:8000", 1_700_000_000))
    run = Run(tmp_path, FakeCluster(RUNNING))
    assert run() == 1
    assert f"already running at http://127.0.0.1:8000 (process {me.pid})" in run.text
    assert run.cluster.calls == []
    assert folder.read() is not None
    folder.clear()


def test_missing_gpus_name_the_local_file_before_ray_starts(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeCluster(RUNNING), file="serve_config.yaml")
    assert run() == 1
    assert "serve_config.local.yaml" in run.text
    assert "start" not in run.cluster.calls


def test_gpus_of_another_type_are_refused_before_serve_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "cluster_groups", lambda: [])
    machine = FakeMachine(gpu_count=8)
    run = Run(tmp_path, FakeCluster(RUNNING), file="serve_config.yaml", machine=machine)
    assert run() == 1
    assert run.cluster.calls == ["start", "stop"]
    assert "H100" in run.text


def test_an_output_that_went_away_is_no_reason_to_stop() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    steps = Steps(Gone())
    with steps.step("anything") as step:
        step.detail = "more"
    steps.say("still here")


def test_ray_asks_for_a_token_of_this_run_unless_told_otherwise() -> None:
    first: dict[str, str] = {"RAY_ADDRESS": "10.0.0.1:6379"}
    second: dict[str, str] = {}
    set_environment(first)
    set_environment(second)
    assert first["RAY_AUTH_MODE"] == "token"
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]
    assert "RAY_ADDRESS" not in first
    chosen = {"RAY_AUTH_MODE": "disabled"}
    set_environment(chosen)
    assert "RAY_AUTH_TOKEN" not in chosen
