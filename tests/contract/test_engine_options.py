"""Both serve configurations, held to what Ray itself would make of them. Offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.config import AppConfig, ModelConfig
from deployments.engine_config import engine_options, llm_config, located

ROOT = Path(__file__).resolve().parents[2]
FILES = ("serve_config.yaml", "serve_config.local.yaml")


def models(name: str) -> list[ModelConfig]:
    document = yaml.safe_load((ROOT / name).read_text())
    config = AppConfig(**document["applications"][0]["args"])
    return [located(model, ROOT) for model in config.models]


ASK_RAY = """
import json, sys, warnings
warnings.simplefilter("ignore")
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
answers = []
for config in json.load(sys.stdin):
    llm = LLMConfig(**config)
    engine = llm.get_engine_config()
    options = LLMServer.get_deployment_options(llm)
    answers.append({
        "options": options,
        "arguments": engine.get_initialization_kwargs(),
        "frontend": engine.frontend_kwargs,
    })
ray.shutdown()
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, Any]]:
    """What Ray derives for each model of both files; a process of its own, since it loads vLLM."""
    every = [m for name in FILES for m in models(name)]
    process = subprocess.run(
        [sys.executable, "-c", ASK_RAY],
        input=json.dumps([llm_config(m) for m in every]),
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=180,
        cwd=ROOT,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    answer = json.loads(process.stdout[process.stdout.index("[{") :])
    return {m.id: a for m, a in zip(every, answer, strict=True)}


def _environment() -> dict[str, str]:
    return {**os.environ, "RAYLLM_ENABLE_WORKER_PROCESS_SETUP_HOOK": "0", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("name", FILES)
def test_our_options_are_those_that_ray_would_build(
    name: str, answers: dict[str, dict[str, Any]]
) -> None:
    for m in models(name):
        ours, rays = engine_options(m), dict(answers[m.id]["options"])
        environment = rays["ray_actor_options"].pop("runtime_env")["env_vars"]
        assert environment == ours["ray_actor_options"].pop("runtime_env")["env_vars"]
        assert json.loads(json.dumps(ours)) == rays


def test_large_models_span_as_many_gpus_as_configured(answers: dict[str, dict[str, Any]]) -> None:
    large = answers["llama-3.3-70b"]
    assert large["options"]["placement_group_bundles"] == [
        {"GPU": 1, "CPU": 1.0, "accelerator_type:H100": 0.001},
        *[{"GPU": 1, "accelerator_type:H100": 0.001}] * 3,
    ]
    assert large["arguments"]["tensor_parallel_size"] == 4
    assert large["arguments"]["distributed_executor_backend"] == "ray"


def test_revisions_and_adapters_reach_the_engine(answers: dict[str, dict[str, Any]]) -> None:
    small = answers["llama-3.1-8b"]
    assert small["arguments"]["revision"] == "0e9e39f249a16976918f6564b8830bc894c89659"
    assert small["arguments"]["tokenizer_revision"] == small["arguments"]["revision"]
    assert small["arguments"]["enable_lora"] is True
    assert small["arguments"]["max_lora_rank"] == 16
    assert small["frontend"]["lora_modules"] == [
        {
            "name": "llama-3.1-8b-hr",
            "path": "/models/adapters/hr",
            "base_model_name": "llama-3.1-8b",
        }
    ]
