"""The official Node SDK, unchanged."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.contract.conftest import Server
from tests.contract.node import NODE, install


def test_node_sdk(server: Server) -> None:
    directory = install(Path(__file__).with_name("openai_node"))
    done = subprocess.run(
        [NODE, "chat.mjs", server.v1, "hr-analyst"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["whole"] == seen["streamed"] == "Good morning"
    assert seen["usage"]["completion_tokens"] == 2
    assert seen["models"] == ["small", "large"]
    assert seen["refused"] == {"name": "NotFoundError", "status": 404, "code": "model_not_found"}
