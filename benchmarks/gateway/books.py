"""What ledger, audit trail and metering add to the CPU of a request.

Two gateways with instant engines run side by side, one without the three; the same load visits
them in turn, and the CPU of each whole process tree (ledger, sealer and engine included) is divided
by its answers, less what the tree takes without requests.

python -m benchmarks.gateway.books
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

from benchmarks.gateway.cost import cost, machine, wait_idle
from benchmarks.gateway.run import IDLE_SHARE, IDLE_WAIT_S, load
from benchmarks.gateway.targets import Target, compile_tools, open_targets, start_serve

CONCURRENCY = 8
WARMUP_S = 1.5
WATCH_S = 6.0
"""How long each tree is watched without requests: seals, renewals and heartbeats go on."""


def measure(rounds: int = 3, seconds: float = 3.0) -> dict[str, Any]:
    """Added CPU per plain request, in milliseconds, with the figures behind it."""
    compile_tools()
    with open_targets() as opened:
        sides = {
            name: start_serve(opened, "gatehouse", "--books", name, label=name)
            for name in ("off", "on")
        }
        idle = {name: _idle_ms_per_s(target) for name, target in sides.items()}
        cells: list[dict[str, Any]] = []
        for target in sides.values():
            load(target, "plain", CONCURRENCY, WARMUP_S)
        for _ in range(rounds):
            cells += [_cell(target, seconds, idle[name]) for name, target in sides.items()]
    figures = {
        name: statistics.median(c["cpu_ms"] for c in cells if c["side"] == name) for name in sides
    }
    return {
        "with_ms": round(figures["on"], 3),
        "without_ms": round(figures["off"], 3),
        "added_ms": round(figures["on"] - figures["off"], 3),
        "idle_ms_per_s": idle,
        "concurrency": CONCURRENCY,
        "machine": machine(),
        "cells": cells,
    }


def _idle_ms_per_s(target: Target) -> float:
    wait_idle(IDLE_SHARE, IDLE_WAIT_S)
    before, began = cost(target.pid), time.monotonic()
    time.sleep(WATCH_S)
    spent = cost(target.pid).since(before, engines=True)
    return round(spent / (time.monotonic() - began), 2)


def _cell(target: Target, seconds: float, idle_ms_per_s: float) -> dict[str, Any]:
    idle = wait_idle(IDLE_SHARE, IDLE_WAIT_S)
    before, began = cost(target.pid), time.monotonic()
    result = load(target, "plain", CONCURRENCY, seconds)
    # What the load left to do (settlements, reports, seals) belongs to it.
    time.sleep(6.0 if target.name == "on" else 0.5)
    spent = cost(target.pid).since(before, engines=True)
    spent -= idle_ms_per_s * (time.monotonic() - began)
    return {
        "side": target.name,
        "answers": result["all"],
        "p50_ms": result["p50"],
        "p99_ms": result["p99"],
        "bad": result["s4"] + result["s5"] + result["sock_errs"],
        "cpu_ms": round(spent / max(1, result["all"]), 4),
        "idle_before": idle,
    }


def main() -> int:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="load of one cell")
    options = parser.parse_args()
    json.dump(measure(options.rounds, options.seconds), sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
