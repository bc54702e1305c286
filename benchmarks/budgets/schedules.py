"""A thousand simulated schedules: ``python -m benchmarks.budgets.schedules``.

Each seed is one schedule of kills, losses, repeats, delays, overtaking, clock jumps, transfers and
new budgets files (``benchmarks.budgets.schedule``), with every invariant looked at after every
message (``benchmarks.budgets.watch``). Two processes share them. A seed that breaks an invariant is
printed with what broke; ``--seed`` plays it again, alone, with the traceback.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.budgets.schedule import Outcome, Schedule

RESULTS = Path(__file__).parent / "results" / "schedules.json"
COUNTED = (
    "requests",
    "refused",
    "stopped",
    "checks",
    "ledger_kills",
    "gateway_kills",
    "engine_kills",
    "cuts",
    "jumps",
    "changes",
    "transfers",
)
BATCH = 10
"""Schedules that a process is given at a time."""


def play(seeds: range) -> tuple[list[Outcome], list[tuple[int, str]]]:
    """Play schedules; what each was, and which broke an invariant."""
    logging.disable(logging.CRITICAL)  # failures are provoked here by the dozen
    found, broken = [], []
    for seed in seeds:
        try:
            found.append(Schedule(seed).play())
        except Exception as error:
            broken.append((seed, f"{type(error).__name__}: {error}"))
    return found, broken


def run(first: int, count: int, processes: int = 2) -> dict[str, Any]:
    """Play schedules in several processes, and sum up.

    Args:
        first: First seed.
        count: How many.
        processes: How many at a time.
    """
    started = time.monotonic()
    parts = [range(at, min(at + BATCH, first + count)) for at in range(first, first + count, BATCH)]
    total: Counter[str] = Counter()
    troubles: Counter[str] = Counter()
    broken: list[tuple[int, str]] = []
    worst = 0
    with ProcessPoolExecutor(processes) as pool:
        for found, failed in pool.map(play, parts):
            broken += failed
            for each in failed:
                print(f"seed {each[0]}: {each[1]}", flush=True)
            for outcome in found:
                total.update({name: getattr(outcome, name) for name in COUNTED})
                total["schedules"] += 1
                total["with several ledgers"] += outcome.shards > 1
                total["in which somebody borrowed"] += outcome.borrowed > 0
                worst = max(worst, outcome.worst_over_tokens)
                for each_field in fields(outcome.trouble):
                    troubles[each_field.name] += bool(getattr(outcome.trouble, each_field.name))
    return {
        "first seed": first,
        "asked": count,
        "broken": [{"seed": seed, "what": what} for seed, what in broken],
        "totals": dict(total),
        "schedules with": dict(troubles),
        "most tokens of one request beyond its reservation": worst,
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> int:
    """Play them, print and keep the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--seed", type=int, help="play one again")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.seed is not None:
        print(Schedule(options.seed).play())
        return 0
    result = {
        "method": __doc__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        **run(options.first, options.count, options.processes),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "method"}, indent=1))
    return 1 if result["broken"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
