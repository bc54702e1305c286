"""The fallback of the data plane, on real Serve: requests through deployment handles.

Behind HAProxy and with the throughput flags, as a cluster runs; the engine is instant, because what
is tested stands in front of it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import openai
import psutil
import pytest
from openai import OpenAI

from benchmarks.platform import ROOT, free_port

HELLO = [{"role": "user", "content": "words=50"}]


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.gateway.serve_target", "gatehouse"]
    command += ["--data-plane", "handle", "--port", str(port)]
    # A short path: the name of HAProxy's socket is long, and 97 characters are its bound.
    with TemporaryDirectory(prefix="gh") as state, (Path(state) / "log").open("wb") as errors:
        command += ["--state", state]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors) as process:
            assert process.stdout is not None
            try:
                line = process.stdout.readline()
                assert line.startswith(b"{"), (Path(state) / "log").read_text()[-3000:]
                url = f"http://127.0.0.1:{port}/v1"
                token = json.loads(line)["token"]
                with OpenAI(base_url=url, api_key=token, max_retries=0) as connected:
                    yield connected
            finally:
                family = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(signal.SIGTERM)
                process.wait(120)
        assert not psutil.wait_procs(family, timeout=15)[1]


def test_a_whole_answer(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="mock-8b", messages=HELLO)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == " word" * 50
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 50


def test_a_stream(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="mock-8b",
            messages=HELLO,  # type: ignore[arg-type]
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == " word" * 50
    assert chunks[-1].usage is not None


def test_policy_holds_on_this_path_too(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nowhere", messages=HELLO)  # type: ignore[arg-type]
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="forged").models.list()
