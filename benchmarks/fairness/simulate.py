"""Fairness at peak on public traces: ``python -m benchmarks.fairness.simulate --data TRACES``.

A published trace is played through simulated engines with continuous batching (``batching``,
``machine``) under several ways to order who waits (``lines``, ``ours``). Ours is the very code that
runs in the engines. Departments are drawn by a seed (``traffic``); each seed also starts at another
place of the trace. Every arm gets the same requests. Scenarios:

* ``flood``: an ordinary day at half of what the engine can do; then marketing, of the same class as
  data science and HR, asks for ten times its share.
* ``batch flood``: the same by the batch class.
* ``peak``: twice what the engine can do, by everybody. HR has twice the weight of the others, and
  data science asks for nearly twice as much as each of them.
* ``engines``: ``peak`` on two engines, marketing bound to one of them. Gateways learn of service
  elsewhere two seconds late, or never.
* ``shuffled``: ``flood`` with the departments drawn anew: the control, in which as much is asked
  and no department asks for more than its share.

``alone`` is the reference of a critical request's wait: the same critical requests and no other.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.fairness import measures, summary
from benchmarks.fairness.asks import Line
from benchmarks.fairness.lines import Classes, Fcfs, Gate, Vtc
from benchmarks.fairness.machine import Machine
from benchmarks.fairness.ours import Ours
from benchmarks.fairness.scenarios import (
    MARKETING,
    SCENARIOS,
    TIMES,
    Scenario,
    capacity,
    limits,
    traffic_of,
    window,
)
from benchmarks.fairness.traffic import CRITICAL, ORGANISATION, STANDARD, Traffic
from benchmarks.fairness.world import Played, play
from benchmarks.routing.traffic import Trace, read_trace
from routing import fairness
from routing.fairness import FairSettings

RESULTS = Path(__file__).parent / "results"
TRACES = ("azure_llm_2023_conv", "azure_llm_2023_code")
SEEDS = (1, 2, 3, 4, 5)
SPAN_S = 600.0
LATE_S = 2.0


@cache
def _trace(folder: Path, name: str) -> tuple[Trace, float]:
    trace = read_trace(folder, name)
    return trace, capacity(trace, Machine())


def arm(name: str, prompt_us: float) -> tuple[Callable[[], Line], dict[str, Any]]:
    """How an arm's lines are made, and what it differs in besides.

    Args:
        name: Of the arm.
        prompt_us: What ours takes a prompt token to cost until it is metered.
    """
    if name in ("fcfs", "rpm"):
        return Fcfs, {}
    if name == "classes":
        return Classes, {}
    if name == "vtc":
        return (lambda: Vtc(ORGANISATION)), {}
    if name == "ours, no floors":
        return (lambda: Ours(ORGANISATION, prompt_us=prompt_us, floors=False)), {}
    options = {"late_s": None} if name == "ours, not told" else {"late_s": LATE_S}
    return (lambda: Ours(ORGANISATION, prompt_us=prompt_us)), options


def run(
    folder: Path, trace_name: str, scenario: Scenario, arm_name: str, seed: int, span_s: float
) -> dict[str, Any]:
    """One arm of one scenario with one seed."""
    trace, rate = _trace(folder, trace_name)
    machine, began = Machine(), time.monotonic()
    traffic = traffic_of(scenario, trace, rate, seed, span_s)
    if arm_name == "alone":
        traffic = traffic.only(traffic.department == _critical())
    prompt_us, _ = machine.token_us(round(float(traffic.prompt_tokens.mean())))
    line, options = arm("ours" if arm_name == "alone" else arm_name, prompt_us)
    if arm_name == "rpm":
        options["gate"] = Gate(limits(rate * scenario.engines))
    if scenario.engines > 1:
        options |= {"engines": scenario.engines, "bound": {MARKETING: 0}}
    played = play(traffic, machine, line, **options)
    return {
        "trace": trace_name,
        "scenario": scenario.name,
        "arm": arm_name,
        "seed": seed,
        "wall_s": round(time.monotonic() - began, 2),
        **judged(played, traffic, machine, scenario, span_s),
    }


def judged(
    played: Played, traffic: Traffic, machine: Machine, scenario: Scenario, span_s: float
) -> dict[str, Any]:
    """All figures of a run; gaps and evenness while requests come."""
    coming = played.until(span_s)
    return {
        "requests": len(traffic),
        "refused": sum(ask.refused for ask in played.asks),
        "tokens": played.tokens,
        "busy_s": round(played.busy_s, 3),
        "ended_s": round(played.ended_s, 3),
        "put_back": played.put_back,
        "steps": played.steps,
        "longest_step_s": round(played.longest_step_s, 4),
        "waiting": measures.waiting(played, ORGANISATION, window(span_s)),
        "throughput": measures.throughput(played, window(span_s)),
        "gaps": measures.gaps(coming, traffic, machine, engines=scenario.engines, late_s=LATE_S),
        "evenness": measures.evenness(coming, ORGANISATION, STANDARD),
    }


def _critical() -> int:
    return next(d for d, one in enumerate(ORGANISATION) if one.rank == CRITICAL)


def tasks(
    scenarios: Sequence[Scenario], traces: Sequence[str], seeds: Sequence[int]
) -> list[tuple[str, Scenario, str, int]]:
    """Every run: trace, scenario, arm, seed; ``alone`` where a scenario has a flood."""
    found = []
    for name in traces:
        for scenario in scenarios:
            alone = ("alone",) if scenario.floods is not None else ()
            found += [
                (name, scenario, one, seed) for seed in seeds for one in (*alone, *scenario.arms)
            ]
    return found


def simulate(
    folder: Path,
    scenarios: Sequence[Scenario] = SCENARIOS,
    traces: Sequence[str] = TRACES,
    seeds: Sequence[int] = SEEDS,
    span_s: float = SPAN_S,
    jobs: int = 1,
    told: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Every run of some scenarios.

    Raises:
        FileNotFoundError: The folder lacks a trace.
    """
    wanted = tasks(scenarios, traces, seeds)
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        told(f"{len(rows)}/{len(wanted)} {shown(row)}")

    if jobs == 1:
        for name, scenario, one, seed in wanted:
            add(run(folder, name, scenario, one, seed, span_s))
        return rows
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [
            pool.submit(run, folder, name, scenario, one, seed, span_s)
            for name, scenario, one, seed in wanted
        ]
        for future in futures:
            add(future.result())
    return rows


def shown(row: dict[str, Any]) -> str:
    """One run in one line."""
    urgent = row["waiting"].get(ORGANISATION[_critical()].name, {})
    gap = row["gaps"]["gpu_us"]
    return (
        f"{row['trace']}, {row['scenario']}, {row['arm']}, seed {row['seed']}: critical p99 "
        f"{urgent.get('ttft_p99_s')} s; gap {gap['largest share of bound']:.1%} of bound, "
        f"{gap['violations']} violations; {row['throughput']['tokens_a_busy_second']:,.0f} tokens "
        f"a busy second; {row['wall_s']} s"
    )


def report(rows: Sequence[dict[str, Any]], span_s: float, seeds: Sequence[int]) -> dict[str, Any]:
    """What is kept: method, versions, summary, every run."""
    machine = Machine()
    return {
        "what": "fairness at peak in a simulation of continuous batching on public traces",
        "method": (__doc__ or "").strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seeds": list(seeds),
        "span_s": span_s,
        "window_s": list(window(span_s)),
        "machine": {
            "model": "Llama-3.1-8B, BF16",
            "device": machine.device.name,
            "max_seqs": machine.max_seqs,
            "step_tokens": machine.step_tokens,
            "kv_tokens": machine.kv_tokens,
            "flops_share": machine.flops_share,
            "bytes_share": machine.bytes_share,
            "fixed_s": machine.fixed_s,
        },
        "organisation": [
            {
                "name": one.name,
                "rank": one.rank,
                "weight_milli": one.weight_milli,
                "share": one.share,
            }
            for one in ORGANISATION
        ],
        "flood_times": TIMES,
        "late_s": LATE_S,
        "fair settings": asdict(FairSettings()),
        "fairness.py": "sha256:" + sha256(Path(fairness.__file__).read_bytes()).hexdigest(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "gatehouse")},
        "summary": summary.summarise(rows),
        "runs": list(rows),
    }


def main() -> int:
    """Simulate, print a line for each arm, keep figures and pictures."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fairness.simulate",
        description="Fairness at peak, simulated on public traces.",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the traces")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and pictures")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--traces", nargs="+", default=list(TRACES), help="names of their files")
    parser.add_argument(
        "--scenarios", nargs="+", default=[one.name for one in SCENARIOS], help="some of them"
    )
    parser.add_argument("--span", type=float, default=SPAN_S, help="simulated seconds of a run")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    given = parser.parse_args()
    chosen = [one for one in SCENARIOS if one.name in given.scenarios]
    if len(chosen) != len(given.scenarios):
        parser.error(f"scenarios are {', '.join(one.name for one in SCENARIOS)}")
    rows = simulate(
        given.data,
        chosen,
        given.traces,
        given.seeds,
        given.span,
        given.jobs,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    found = report(rows, given.span, given.seeds)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "simulation.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")
    from benchmarks.fairness.picture import draw_simulation

    draw_simulation(found, given.out / "simulation.png")
    for trace, scenarios in found["summary"].items():
        for scenario, arms in scenarios.items():
            for name, cell in arms.items():
                print(summary.line(trace, scenario, name, cell))
    return 0


if __name__ == "__main__":
    sys.exit(main())
