"""The whole system, started once per run as a user starts it: real Ray, real vLLM, real tokens."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from openai import OpenAI

from deployments.dev_token import fetch_token
from tests.contract.conftest import free_port

ROOT = Path(__file__).resolve().parents[2]
READY_TIMEOUT_S = 420


@dataclass
class Platform:
    """A running platform."""

    url: str
    idp: str
    state: Path
    process: subprocess.Popen[bytes]
    log: Path
    config: Path

    @functools.cached_property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def token(self, identity: str) -> str:
        return fetch_token(self.idp, identity)

    def openai(self, identity: str) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.token(identity), max_retries=0)

    def auth(self, identity: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token(identity)}"}

    def environment(self) -> dict[str, str]:
        """Environment of a command line that talks to this platform."""
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "GATEHOUSE_URL": self.url,
            "GATEHOUSE_DEV_ISSUER": self.idp,
            "GATEHOUSE_STATE": str(self.state),
        }

    def processes(self, fragment: str) -> list[psutil.Process]:
        """Processes that the supervisor started whose title contains ``fragment``."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                title = " ".join(child.cmdline())
            except psutil.Error:
                continue
            if fragment in title:
                found.append(child)
        return found

    def wait_ready(self, timeout_s: float = 180) -> float:
        """Wait until all parts are ready; gives the seconds it took."""
        started = time.monotonic()
        while time.monotonic() - started < timeout_s:
            try:
                if self.http.get("/readyz").status_code == 200:
                    return time.monotonic() - started
            except httpx.HTTPError:
                pass
            time.sleep(0.25)
        raise AssertionError(f"not ready after {timeout_s} s: {self.http.get('/readyz').text}")


def write_config(directory: Path, issuer: str) -> Path:
    """The local configuration on ports of its own, plus an embedding model, so that each endpoint
    has an engine."""
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


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """The platform; stopped as a user stops it, and nothing of it may be left."""
    directory = tmp_path_factory.mktemp("platform")
    port, issuer = free_port(), f"http://127.0.0.1:{free_port()}"
    config = write_config(directory, issuer)
    state = directory / "state"
    log = directory / "serve.log"
    environ = {
        **os.environ,
        "GATEHOUSE_STATE": str(state),
        "GATEHOUSE_CONFIG_ROOT": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
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
    running = Platform(f"http://127.0.0.1:{port}", issuer, state, process, log, config)
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the platform did not start:\n{log.read_text()[-6000:]}")
            try:
                if httpx.get(f"{running.url}/readyz", trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        yield running
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0, log.read_text()[-3000:]
        _, left = psutil.wait_procs(family, timeout=15)
        assert not left, [p.cmdline() for p in left]
    finally:
        if process.poll() is None:
            process.kill()
