"""What a policy decision costs as rules are added: ``python -m benchmarks.policy.run``.

Policies of 10, 100 and 1,000 seeded rules over 40 roles and 20 departments decide for 2,000
callers; first decisions (nothing remembered) and repeated ones apart. p50 and p99 in microseconds
of wall time per call, the best of five rounds, because other work on the machine can only slow a
round down. Goal: p99 at most 50 us at 1,000 rules.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

from governance.policy.engine import CompiledPolicy
from governance.policy.model import PolicyConfig
from governance.types import ModelInfo, Operation, Principal, PrincipalKind

RESULTS = Path(__file__).parent / "results" / "decisions.json"
MODEL = ModelInfo("tiny", "small", frozenset({Operation.CHAT}), 1024, "tiny")
GOAL_US = 50.0
ROUNDS = 5


def policy(rules: int) -> CompiledPolicy:
    """A policy in which each cell is matched by about one rule in eighty."""
    roles = [f"role{i}" for i in range(40)]
    departments = [f"d{i}" for i in range(20)]
    config = {
        "version": 1,
        "roles": roles,
        "departments": departments,
        "rules": [
            {
                "id": f"r{i}",
                "effect": "block" if i % 10 == 9 else "allow",
                "when": {
                    "roles": [roles[i % 40], roles[(7 * i + 3) % 40]],
                    "departments": [departments[(i // 40 + j) % 20] for j in range(5)],
                    "operations": ["chat"],
                    "models": ["tier:small"] if i % 2 else ["tiny"],
                },
                "limits": {} if i % 10 == 9 else {"max_tokens": i + 1},
            }
            for i in range(rules)
        ],
    }
    return CompiledPolicy(PolicyConfig.model_validate(config), [MODEL])


def callers() -> list[Principal]:
    """Two thousand callers over all roles and departments."""
    return [
        Principal(
            kind=PrincipalKind.USER,
            subject=f"s{i}",
            issuer="bench",
            department=f"d{i % 20}",
            roles=frozenset({f"role{i % 40}", f"role{i % 7}"}),
            key=f"k{i}",
        )
        for i in range(2_000)
    ]


def measure(
    compiled: CompiledPolicy, who: list[Principal], *, remember: bool
) -> tuple[float, float]:
    """(p50, p99) of one round, in microseconds."""
    taken = []
    for caller in who:
        if not remember:
            compiled._remembered.clear()
        start = time.perf_counter_ns()
        compiled.decide(caller, MODEL, "chat")
        taken.append(time.perf_counter_ns() - start)
    taken.sort()
    return taken[len(taken) // 2] / 1_000, taken[int(len(taken) * 0.99)] / 1_000


def main() -> int:
    """Measure, print, keep; 1 when the goal falls short."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    who, rows = callers(), []
    for rules in (10, 100, 1_000):
        compiled = policy(rules)
        for remember in (False, True):
            rounds = [measure(compiled, who, remember=remember) for _ in range(ROUNDS)]
            p50, p99 = min(r[0] for r in rounds), min(r[1] for r in rounds)
            rows.append({"rules": rules, "remembered": remember, "p50_us": p50, "p99_us": p99})
            kind = "repeated" if remember else "first"
            print(f"{rules:5} rules, {kind:8}: p50 {p50:6.2f} us, p99 {p99:6.2f} us", flush=True)
    worst = max(row["p99_us"] for row in rows if row["rules"] == 1_000)
    holds = worst <= GOAL_US
    verdict = "holds" if holds else "falls short"
    print(f"p99 at most {GOAL_US:.0f} us at 1,000 rules | {worst:.1f} us | {verdict}")
    versions = {"python": platform.python_version(), "gatehouse": version("gatehouse")}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
