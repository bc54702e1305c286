"""What the benchmark starts and stops: upstreams, LiteLLM and the two Ray Serve targets.

Everything listens on a free port, dies with us, and is gone when ``Targets`` is closed: Ray and
HAProxy leave orphans, so whatever is left of a tree is ended by process id.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gateway.ports import free_port
from deployments.processes import (
    ProcessId,
    adopt_orphans,
    descendants,
    die_with_parent,
    end,
    identify,
)

HERE = Path(__file__).parent
BUILD = Path("build/bench")
LITELLM_VERSION = "1.106.2"
LITELLM_PYTHON = BUILD / "litellm" / "bin" / "python"
PACE_MS = 5
START_S = 240.0
"""Bound on the start of a target; Ray's own ingress imports vLLM in two processes."""
STOP_S = 60.0
"""Bound on the orderly stop of a Ray target; more than what it allows Serve."""
MASTER_KEY = "sk-bench"
EVENTS = 54
"""Events of a streamed answer: role, 50 words, stop, usage, ``[DONE]``."""
_LITELLM_ENVIRONMENT = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOG": "ERROR",
}


class TargetError(Exception):
    """A target did not start or does not answer; says which and where its output is."""


@dataclass(frozen=True, slots=True)
class Target:
    """Something that answers chat completions on loopback."""

    name: str
    port: int
    pid: int
    token: str
    bodies: dict[str, Path]
    """Request body of each case."""
    paced_port: int
    """Port for the paced case; the same unless the target is the upstream itself."""
    paced_pid: int
    """Likewise the process."""


@dataclass
class Targets:
    """The processes that were started; close it to end them all."""

    started: list[tuple[ProcessId, float]] = field(default_factory=list)
    """With the seconds that each may take to stop in order."""
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="gh-", dir="/tmp")))
    """State of the Ray targets; removed with them. Short: HAProxy's socket may have 97 bytes."""

    def spawn(
        self, name: str, command: list[str], *, stop_s: float, env: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a process with its output in ``build/bench/<name>.log``."""
        with (BUILD / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        found = identify(process.pid)
        if found is not None:
            self.started.append((found, stop_s))
        return process

    def close(self) -> None:
        """End everything: roots in order, then what is left below us."""
        roots = [process for process, _ in self.started]
        below = [child for root in roots for child in descendants(root.pid)]
        grace_s = max((seconds for _, seconds in self.started), default=0.0)
        end(roots, grace_s)
        # Orphans are our children by now (``adopt_orphans``), with new ones among them.
        end([*below, *descendants(os.getpid())], 5.0)
        self.started.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def open_targets() -> Iterator[Targets]:
    """A place to start targets in; they are gone afterwards, whatever happens."""
    BUILD.mkdir(parents=True, exist_ok=True)
    adopt_orphans()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    targets = Targets()
    try:
        yield targets
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        targets.close()
        signal.signal(signal.SIGTERM, before)


def compile_tools() -> None:
    """Build the load client and the mock upstream into ``build/bench``."""
    BUILD.mkdir(parents=True, exist_ok=True)
    for tool in ("loadgen", "mock_upstream"):
        source, binary = HERE / f"{tool}.c", BUILD / tool
        if not binary.exists() or binary.stat().st_mtime < source.stat().st_mtime:
            subprocess.run(["cc", "-O2", "-o", str(binary), str(source)], check=True)


def litellm_python(given: Path | None) -> Path:
    """Python with LiteLLM: the one given, or an environment of its own, made when missing."""
    if given is not None:
        return given
    if not LITELLM_PYTHON.exists():
        print(f"installing LiteLLM {LITELLM_VERSION} (once)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(BUILD / "litellm")], check=True)
        pip = [str(LITELLM_PYTHON), "-m", "pip", "install", "-q"]
        subprocess.run([*pip, f"litellm[proxy]=={LITELLM_VERSION}"], check=True)
    return LITELLM_PYTHON


def bodies(name: str, *, model: str | None = None) -> dict[str, Path]:
    """Request bodies of the cases, with the model exchanged where a target has but one."""
    files = {"plain": "chat.json", "stream": "chat_stream.json", "paced": "chat_paced.json"}
    if model is None:
        return {case: HERE / "bodies" / file for case, file in files.items()}
    made = {}
    for case, file in files.items():
        body = json.loads((HERE / "bodies" / file).read_text())
        made[case] = BUILD / f"{name}_{file}"
        made[case].write_text(json.dumps({**body, "model": model}))
    return made


def start_upstream(targets: Targets) -> Target:
    """Two mock upstreams: an instant one, and one with ``PACE_MS`` between chunks."""
    ports = free_port(), free_port()
    tool = str(BUILD / "mock_upstream")
    pids = []
    for port, pace in zip(ports, (0, PACE_MS), strict=True):
        command = [tool, "-p", str(port), "-i", str(pace)]
        pids.append(targets.spawn(f"upstream_{pace}", command, stop_s=1).pid)
    target = Target("direct", ports[0], pids[0], "none", bodies("direct"), ports[1], pids[1])
    check(target)
    return target


def start_litellm(targets: Targets, python: Path, upstream: Target) -> Target:
    """LiteLLM, one worker, no database, no callbacks, as its users run it behind a key."""

    def model(name: str, port: int) -> dict[str, Any]:
        base = f"http://127.0.0.1:{port}/v1"
        params = {"model": f"openai/{name}", "api_base": base, "api_key": "none"}
        return {"model_name": name, "litellm_params": params}

    models = [model("mock-8b", upstream.port), model("mock-paced", upstream.paced_port)]
    config = BUILD / "litellm.yaml"  # YAML is a superset of JSON
    config.write_text(
        json.dumps({"model_list": models, "general_settings": {"master_key": MASTER_KEY}})
    )
    port = free_port()
    command = [str(python.absolute().parent / "litellm"), "--config", str(config)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    process = targets.spawn("litellm", command, stop_s=10, env=_LITELLM_ENVIRONMENT)
    pid = process.pid
    target = Target("litellm", port, pid, MASTER_KEY, bodies("litellm"), port, pid)
    check(target)
    return target


def start_serve(targets: Targets, name: str, *options: str, label: str = "") -> Target:
    """A Ray Serve target: ``gatehouse`` or ``stock``; two of a kind need labels of their own."""
    port = free_port()
    state = targets.folder / (label or name)
    command = [sys.executable, "-m", "benchmarks.gateway.serve_target", name]
    command += ["--port", str(port), "--state", str(state), *options]
    process = targets.spawn(label or name, command, stop_s=STOP_S)
    token = _ready_token(label or name, process)
    model = "mock-8b" if name == "stock" else None
    pid = process.pid
    target = Target(label or name, port, pid, token, bodies(name, model=model), port, pid)
    check(target)
    return target


def _ready_token(name: str, process: subprocess.Popen[str]) -> str:
    """Wait for the line that ``serve_target`` prints when ready; libraries print there too."""
    log = BUILD / f"{name}.log"
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith('{"pid": '):
                token: str = json.loads(line)["token"]
                return token
        time.sleep(0.5)
    raise TargetError(f"{name} did not start; see {log}")


def check(target: Target) -> None:
    """Wait until every case is answered right: the text, or all events and ``[DONE]``.

    Raises:
        TargetError: It is not, within ``START_S``.
    """
    deadline = time.monotonic() + START_S
    for case, path in target.bodies.items():
        port = target.paced_port if case == "paced" else target.port
        while True:
            status, answer = _post(port, target.token, path.read_bytes())
            if status == 200 and _right(case, answer):
                break
            if time.monotonic() > deadline:
                start = answer[:300].decode(errors="replace")
                raise TargetError(f"{target.name} answers {case} with {status}: {start}")
            time.sleep(0.5)


def _right(case: str, answer: bytes) -> bool:
    if case != "plain":
        return answer.count(b"data: ") == EVENTS and answer.endswith(b"data: [DONE]\n\n")
    text = json.loads(answer)["choices"][0]["message"]["content"]
    return bool(text.startswith("The quick brown fox jumps"))


def _post(port: int, token: str, body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    try:
        connection.request("POST", "/v1/chat/completions", body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()
