"""From a model's configuration to the options and arguments of its engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deployments.config import ModelConfig
from deployments.engine_config import (
    DRAIN_TIMEOUT_S,
    SHUTDOWN_TIMEOUT_S,
    deployment_name,
    engine_arguments,
    engine_environment,
    engine_options,
    located,
)

ROOT = Path(__file__).resolve().parents[2]


def model(**fields: Any) -> ModelConfig:
    return ModelConfig(
        **{
            "id": "m",
            "tier": "small",
            "source": "/models/m",
            "context_tokens": 1024,
            "accelerator": {"kind": "cpu"},
            **fields,
        }
    )


def test_a_hub_model_may_use_the_network_and_a_directory_may_not() -> None:
    assert engine_environment(model())["HF_HUB_OFFLINE"] == "1"
    hub = model(source="someone/model", revision="0" * 40)
    assert "HF_HUB_OFFLINE" not in engine_environment(hub)


def test_threads_follow_the_operator() -> None:
    assert engine_environment(model(), {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(("ranks", "expected"), [((1,), 1), ((4, 9), 16), ((300,), 320)])
def test_the_lora_rank_is_one_that_vllm_knows(ranks: tuple[int, ...], expected: int) -> None:
    adapters = [{"id": f"a{i}", "source": "/a", "max_rank": rank} for i, rank in enumerate(ranks)]
    arguments = engine_arguments(model(adapters=adapters))
    assert arguments["max_lora_rank"] == expected
    assert arguments["max_loras"] == len(ranks)


def test_directories_become_absolute_and_hub_ids_stay() -> None:
    root = Path("/srv/gatehouse")
    moved = located(model(source="./data/m", adapters=[{"id": "a", "source": "/abs/a"}]), root)
    assert moved.source == "/srv/gatehouse/data/m"
    assert moved.adapters[0].source == "/abs/a"
    assert located(model(source="someone/model"), root).source == "someone/model"


def test_a_model_that_only_embeds_is_a_pooling_one() -> None:
    assert engine_arguments(model(operations=["embeddings"]))["runner"] == "pooling"
    assert "runner" not in engine_arguments(model())


def test_arguments_of_the_file_come_last() -> None:
    arguments = engine_arguments(model(engine={"scheduling_policy": "fcfs", "dtype": "float32"}))
    assert arguments["scheduling_policy"] == "fcfs"
    assert arguments["dtype"] == "float32"


def test_a_draining_replica_has_time() -> None:
    options = engine_options(model())
    assert options["graceful_shutdown_timeout_s"] == SHUTDOWN_TIMEOUT_S >= 60
    assert DRAIN_TIMEOUT_S < SHUTDOWN_TIMEOUT_S


def test_names_of_deployments_are_plain() -> None:
    assert deployment_name(model(id="llama-3.1:8b")) == "Engine-llama-3.1-8b"


def test_building_the_application_does_not_load_the_engine() -> None:
    code = (
        "import sys, deployments.engine, deployments.engine_config, deployments.checkpoints;"
        "sys.exit(any(m in sys.modules for m in ('vllm', 'torch', 'ray.llm', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
