"""From ``ModelConfig`` to what Ray and vLLM want. Pure: imports neither."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deployments.autoscaling import load_autoscaling
from deployments.config import ModelConfig
from deployments.metering.keys import FAIRNESS_VARIABLE
from governance.types import Operation

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM can be set to."""
_CPU_BUNDLE = 0.01
"""CPUs reserved for the engine process itself on a CPU: it shares those of its replica."""

SHUTDOWN_TIMEOUT_S = 90.0
"""Given to a replica that is told to stop, in seconds. NOTE: set in code; a shorter one in YAML
gets a replica killed while it drains."""
DRAIN_TIMEOUT_S = 75.0
"""Of that, for requests in flight."""


def located(model: ModelConfig, root: Path) -> ModelConfig:
    """The same model with absolute directories: replicas have other working directories.

    Args:
        model: As configured.
        root: Directory that relative ones start from.
    """

    def absolute(source: str) -> str:
        path = root / Path(source).expanduser()
        return str(path.resolve()) if source[0] in "./~" or path.is_dir() else source

    adapters = tuple(a.model_copy(update={"source": absolute(a.source)}) for a in model.adapters)
    return model.model_copy(update={"source": absolute(model.source), "adapters": adapters})


def engine_environment(
    model: ModelConfig, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Environment of the replica and the processes it starts.

    Args:
        model: The model.
        environ: Where a thread count set by the operator is looked up.
    """
    variables = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if fairness := environ.get(FAIRNESS_VARIABLE):
        variables[FAIRNESS_VARIABLE] = fairness
    if not model.is_hub:
        variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if model.accelerator.kind == "cpu":
        threads = environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 2) // 2))
        variables |= {
            "OMP_NUM_THREADS": threads,
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # The sampler would be compiled at the first request (8 s), eager mode or not.
            "TORCHDYNAMO_DISABLE": "1",
            # Lets the engine process do the work itself instead of starting a worker for it.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    return variables


def engine_arguments(model: ModelConfig) -> dict[str, Any]:
    """Arguments of vLLM's engine and of its OpenAI layer."""
    arguments: dict[str, Any] = {
        "max_model_len": model.context_tokens,
        # The gateway sets priorities; without this vLLM refuses or ignores them.
        "scheduling_policy": "priority",
        "enable_prompt_tokens_details": True,
        # JSON without free white space: fewer tokens, and a small model cannot get lost in it.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        # vLLM's own loggers; ours is added in code.
        "disable_log_stats": True,
    }
    if set(model.operations) == {Operation.EMBEDDINGS}:
        arguments |= {"runner": "pooling", "convert": "embed"}
    if model.accelerator.kind == "gpu":
        arguments["tensor_parallel_size"] = model.accelerator.tensor_parallel
        arguments["pipeline_parallel_size"] = model.accelerator.pipeline_parallel
    if model.revision is not None:
        arguments["revision"] = model.revision
        arguments["tokenizer_revision"] = model.revision
    if model.adapters:
        highest = max(adapter.max_rank for adapter in model.adapters)
        arguments["enable_lora"] = True
        arguments["max_loras"] = len(model.adapters)
        arguments["max_lora_rank"] = min(rank for rank in _LORA_RANKS if rank >= highest)
        arguments["lora_modules"] = [
            {"name": adapter.id, "path": adapter.source, "base_model_name": model.id}
            for adapter in model.adapters
        ]
    return {**arguments, **model.engine}


def llm_config(model: ModelConfig) -> dict[str, Any]:
    """Arguments of ``ray.serve.llm.LLMConfig``.

    ``deployment_config`` holds what Serve's options are derived from; a test holds
    ``engine_options`` to what Ray derives.
    """
    accelerator = model.accelerator
    config: dict[str, Any] = {
        "model_loading_config": {"model_id": model.id, "model_source": model.source},
        "engine_kwargs": engine_arguments(model),
        "deployment_config": _deployment(model),
        "runtime_env": {"env_vars": engine_environment(model)},
        "log_engine_metrics": False,
    }
    if accelerator.kind == "cpu":
        config["accelerator_config"] = {"kind": "cpu"}
        config["placement_group_config"] = {"bundle_per_worker": {"CPU": _CPU_BUNDLE}}
    elif accelerator.type is not None:
        config["accelerator_type"] = accelerator.type
    return config


def deployment_name(model: ModelConfig) -> str:
    """Name of the model's deployment, for dashboards and overrides in YAML."""
    return "Engine-" + re.sub(r"[^A-Za-z0-9_.-]", "-", model.id)


def engine_options(model: ModelConfig) -> dict[str, Any]:
    """Options of ``serve.deployment`` for the model's engine replicas."""
    options = _deployment(model)
    options["ray_actor_options"] = {
        **options["ray_actor_options"],
        "runtime_env": {"env_vars": engine_environment(model)},
    }
    options["placement_group_bundles"] = _bundles(model)
    options["placement_group_strategy"] = "PACK"
    return options


def _deployment(model: ModelConfig) -> dict[str, Any]:
    return {
        "name": deployment_name(model),
        # Only the handle fallback counts here; the data plane bounds itself.
        "max_ongoing_requests": model.max_in_flight,
        # Three failures in a row replace a replica.
        "health_check_period_s": 1.0,
        "health_check_timeout_s": 5.0,
        # Serve sleeps this long before it lets a replica say that it drains.
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": SHUTDOWN_TIMEOUT_S,
        "ray_actor_options": {"num_cpus": model.accelerator.cpus},
        **load_autoscaling(model.replicas),
    }


def _bundles(model: ModelConfig) -> list[dict[str, float]]:
    """One bundle a device; the first one holds the replica actor too."""
    accelerator = model.accelerator
    if accelerator.kind == "cpu":
        return [{"CPU": accelerator.cpus + _CPU_BUNDLE, "GPU": 0}]
    bundle: dict[str, float] = {"GPU": 1}
    if accelerator.type is not None:
        bundle[f"accelerator_type:{accelerator.type}"] = 0.001
    bundles = [dict(bundle) for _ in range(_devices(model))]
    bundles[0]["CPU"] = accelerator.cpus
    return bundles


def _devices(model: ModelConfig) -> int:
    return model.accelerator.tensor_parallel * model.accelerator.pipeline_parallel
