"""Starts the whole system the way a user does, for proofs and tests, and stops it again.

Real Ray, real vLLM, the development identity provider; ports of its own, state in a directory of
its own. Not a pytest module: ``tests/serve/conftest.py`` wraps it as a fixture.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import yaml
from openai import OpenAI

from deployments.dev_token import fetch_token

ROOT = Path(__file__).resolve().parents[1]
READY_TIMEOUT_S = 420
STOP_TIMEOUT_S = 90
Samples = dict[str, list[tuple[dict[str, str], float]]]
"""Metric name to its series: labels and value."""
_SAMPLE = re.compile(r"^(ray_gatehouse_\w+)\{(.*)\} (\S+)$", re.MULTILINE)


class StartFailed(Exception):
    """The platform did not become ready; holds the end of its output."""


@dataclass
class Platform:
    """A running platform."""

    url: str
    idp: str
    state: Path
    process: subprocess.Popen[bytes]
    log: Path
    config: Path
    ready_s: float = 0.0
    """Seconds from the start of the command until every part was ready."""
    opened: ExitStack = field(default_factory=ExitStack)
    """Clients; closed at the end of the run."""

    @property
    def evidence(self) -> Path:
        """Folder of the sealed audit trail."""
        return self.state.parent / "evidence"

    @functools.cached_property
    def http(self) -> httpx.Client:
        """A plain client for the base URL."""
        return self.opened.enter_context(
            httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        )

    def token(self, identity: str) -> str:
        """A fresh access token of a sample identity."""
        return fetch_token(self.idp, identity)

    def auth(self, identity: str) -> dict[str, str]:
        """Headers that authenticate a sample identity."""
        return {"authorization": f"Bearer {self.token(identity)}"}

    def openai(self, identity: str) -> OpenAI:
        """OpenAI's SDK as a sample identity."""
        return self.openai_with(self.token(identity))

    def openai_with(self, credential: str) -> OpenAI:
        """OpenAI's SDK with any credential."""
        return self.opened.enter_context(
            OpenAI(base_url=f"{self.url}/v1", api_key=credential, max_retries=0)
        )

    def environment(self) -> dict[str, str]:
        """Environment of a command line that talks to this platform."""
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "GATEHOUSE_URL": self.url,
            "GATEHOUSE_DEV_ISSUER": self.idp,
            "GATEHOUSE_STATE": str(self.state),
            "GATEHOUSE_EVIDENCE": str(self.evidence),
        }

    def family(self) -> list[psutil.Process]:
        """Every process that the command started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def processes(self, fragment: str, below: psutil.Process | None = None) -> list[psutil.Process]:
        """Processes of the platform whose title contains ``fragment``."""
        found = []
        for child in below.children(recursive=True) if below else self.family():
            try:
                title = " ".join(child.cmdline())
            except psutil.Error:
                continue
            if fragment in title:
                found.append(child)
        return found

    def replica(self, deployment: str) -> psutil.Process:
        """Process of the (only) replica of a deployment, such as ``Engine-small``."""
        found = self.processes(deployment)
        if len(found) != 1:
            raise LookupError(f"{len(found)} processes of {deployment}")
        return found[0]

    def session(self) -> Path:
        """Folder of the platform's Ray session, which its processes name on their command lines."""
        for process in self.family():
            for argument in process.cmdline():
                if found := re.fullmatch(r"--session-dir=(.+)", argument):
                    return Path(found[1])
        raise LookupError("no session")

    def metrics(self) -> Samples:
        """What Ray's metrics endpoint says of us now; up to ten seconds old."""
        (port,) = self.session().glob("metrics_export_port_*")
        url = f"http://127.0.0.1:{port.read_text().strip()}/metrics"
        text = httpx.get(url, timeout=10, trust_env=False).text
        found: Samples = {}
        for name, labels, value in _SAMPLE.findall(text):
            pairs = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            found.setdefault(name, []).append((pairs, float(value)))
        return found

    def is_ready(self) -> bool:
        """Whether every part is ready now."""
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    def wait_ready(self, timeout_s: float = 180) -> float:
        """Wait until all parts are ready; gives the seconds it took.

        Raises:
            TimeoutError: They were not.
        """
        started = time.monotonic()
        while not self.is_ready():
            if time.monotonic() - started > timeout_s:
                raise TimeoutError(f"not ready after {timeout_s} s")
            time.sleep(0.1)
        return time.monotonic() - started

    def wait_unready(self, timeout_s: float = 5) -> float:
        """Wait until some part is known not to be ready; gives the seconds it took.

        Raises:
            TimeoutError: All parts stayed ready.
        """
        started = time.monotonic()
        while self.is_ready():
            if time.monotonic() - started > timeout_s:
                raise TimeoutError(f"still ready after {timeout_s} s")
            time.sleep(0.02)
        return time.monotonic() - started

    def stop(self) -> list[psutil.Process]:
        """Stop as a user does; gives the processes that are still there afterwards."""
        self.opened.close()
        family = self.family()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(STOP_TIMEOUT_S)
        return list(psutil.wait_procs(family, timeout=15)[1])


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def write_config(directory: Path, issuer: str) -> Path:
    """Write the local configuration, with an issuer of its own and a model for embeddings."""
    config = yaml.safe_load((ROOT / "serve_config.local.yaml").read_text())
    args = config["applications"][0]["args"]
    identity = yaml.safe_load((ROOT / args["identity"]).read_text())
    identity["issuers"][0]["issuer"] = issuer
    args["identity"] = str(directory / "identity.yaml")
    Path(args["identity"]).write_text(yaml.safe_dump(identity))
    models = args["models"]
    vectors = {**models[0], "id": "vectors", "tier": "embedding", "operations": ["embeddings"]}
    vectors["context_tokens"] = 512
    vectors["adapters"] = []
    vectors["engine"] = {
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
        "max_num_seqs": 8,
        "runner": "pooling",
        "convert": "embed",
    }
    models.append(vectors)
    path = directory / "serve_config.test.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextmanager
def running(directory: Path) -> Iterator[Platform]:
    """A platform in ``directory``; killed if the caller did not stop it.

    Raises:
        StartFailed: It did not become ready.
    """
    port, issuer = free_port(), f"http://127.0.0.1:{free_port()}"
    config, log = write_config(directory, issuer), directory / "serve.log"
    state = directory / "state"
    environ = {
        **os.environ,
        "GATEHOUSE_STATE": str(state),
        "GATEHOUSE_EVIDENCE": str(directory / "evidence"),
        "GATEHOUSE_CONFIG_ROOT": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(Path(sys.executable).with_name("gatehouse"), "serve"),
                *("--config", str(config), "--port", str(port)),
            ],
            cwd=ROOT,
            env=environ,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    platform = Platform(f"http://127.0.0.1:{port}", issuer, state, process, log, config)
    try:
        while not platform.is_ready():
            if process.poll() is not None or time.monotonic() - started > READY_TIMEOUT_S:
                raise StartFailed(log.read_text()[-6000:])
            time.sleep(0.25)
        platform.ready_s = time.monotonic() - started
        yield platform
    finally:
        platform.opened.close()
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
