"""Budgets files for simulated schedules: drawn from a seed, and small enough to run out."""

from __future__ import annotations

from random import Random
from typing import Any

from governance.budget.config import BudgetsConfig

WEIGHTS = {"cpu": 1.5, "L4": 0.25}
"""Weight by kind of device. Models are served by the first, in some schedules by both."""
TTL_S = 3
RENEW_S = 1
CHUNK_TOKENS = 32
ROOMY_S = 6_000
"""Device-seconds that do not run out."""


def draw(rng: Random, *, shards: int = 1) -> dict[str, Any]:
    """A file: two departments that lend to each other, one with an overdraft, one soft, one plain.

    All accounts of a department have windows of one hour, so that sums up the tree can be compared;
    some have a day beside it.
    """
    tight = rng.random() < 0.5
    seconds = rng.choice((30, 60)) if tight else ROOMY_S
    accounts: dict[str, Any] = {
        "hr": _limits(rng, seconds, 1_200) | {"cohort": "biz", "owner": "budgets-hr@example.com"},
        "it": _limits(rng, seconds, 1_200) | {"cohort": "biz"},
        "ops": _limits(rng, seconds, 600)
        | {"mode": "overdraft", "overdraft": {"tokens": 150, "gpu_seconds": seconds // 3}},
        "sci": _limits(rng, seconds, 600) | {"mode": "soft"},
        "law": _limits(rng, seconds, 600),
    }
    for name in ("hr", "it"):
        tokens = accounts[name]["tokens"]
        accounts[name]["lend"] = {
            "tokens": rng.choice((0, tokens // 2, tokens)),
            "gpu_seconds": rng.choice((0, seconds)),
        }
        accounts[name]["borrow"] = {
            "tokens": rng.choice((0, 300, 5_000)),
            "gpu_seconds": rng.choice((0, seconds)),
        }
        accounts[name]["mode"] = rng.choice(("hard", "hard", "soft"))
    if rng.random() < 0.7:
        accounts["hr"]["parts"] = {
            "jobs": {
                **_limits(rng, seconds, 450),
                "match": {"applications": ["app-jobs"]},
                "priority": "critical",
                **({"mode": "soft"} if rng.random() < 0.3 else {}),
            },
            "pay": {
                "window": "hour",
                "tokens": 600,
                "match": {"roles": ["payroll"]},
                "per_user": {"window": "hour", "tokens": 250},
            },
        }
    if rng.random() < 0.5:
        accounts["it"]["per_user"] = {"window": "hour", "tokens": rng.choice((200, 500))}
    if rng.random() < 0.5:
        accounts[rng.choice(("hr", "it", "ops", "sci"))]["also"] = [
            {"window": "day", "tokens": rng.choice((500, 3_000))}
        ]
    cohort: dict[str, Any] = {"window": "hour", "half_life_hours": rng.choice((1, 24))}
    if rng.random() < 0.5:
        cohort["tokens"] = accounts["hr"]["tokens"] + accounts["it"]["tokens"] + 600
    return {
        "cohorts": {"biz": cohort},
        "accounts": accounts,
        "chunk_tokens": CHUNK_TOKENS,
        "accelerators": WEIGHTS,
        "lease": {"ttl_s": TTL_S, "renew_s": RENEW_S},
        "shards": shards,
        "alerts": {"thresholds": [50, 80, 100]},
    }


def changed(rng: Random, data: dict[str, Any]) -> dict[str, Any]:
    """The same file after somebody worked on it: limits, modes, loans; a new part."""
    accounts = {name: dict(account) for name, account in data["accounts"].items()}
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(sorted(accounts))
        account = accounts[name]
        kind = rng.randrange(5)
        if kind == 0:
            account["tokens"] = max(
                account["tokens"] * rng.choice((1, 3, 6)) // 3, _least(account, "tokens")
            )
        elif kind == 1:
            account["gpu_seconds"] = max(
                account["gpu_seconds"] * rng.choice((1, 4)) // 2, _least(account, "gpu_seconds")
            )
        elif kind == 2 and account.get("mode") in ("hard", "soft"):
            account["mode"] = "soft" if account["mode"] == "hard" else "hard"
        elif kind == 3 and "cohort" in account:
            account["borrow"] = {"tokens": rng.choice((0, 600)), "gpu_seconds": 0}
        elif kind == 4 and "parts" not in account:
            part = {"window": "hour", "tokens": 300, "match": {"applications": ["app-jobs"]}}
            account["parts"] = {"new": part}
    cohorts = {"biz": dict(data["cohorts"]["biz"])}
    if "tokens" in cohorts["biz"]:
        cohorts["biz"]["tokens"] = accounts["hr"]["tokens"] + accounts["it"]["tokens"] + 600
    return {**data, "accounts": accounts, "cohorts": cohorts}


def load(data: dict[str, Any]) -> BudgetsConfig:
    """The file, checked."""
    return BudgetsConfig.model_validate(data)


def _limits(rng: Random, seconds: int, tokens: int) -> dict[str, Any]:
    return {"window": "hour", "tokens": tokens * rng.choice((2, 3)) // 3, "gpu_seconds": seconds}


def _least(account: dict[str, Any], quantity: str) -> int:
    """No less than what the account lends."""
    lent = account.get("lend", {}).get(quantity, 0)
    return max(int(lent), 1)
