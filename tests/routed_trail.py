"""Two days of requests that were left to the platform, with answers worked out by hand.

A token of the large model costs 1,000 us of charged device time in a prompt, 20,000 in an answer.
"""

from __future__ import annotations

import json
from typing import Any

from tests.trail import Trail, us

SCORER = "abcdef012345"
PRICE = {"large_model": "large", "large_prefill_ns": 1_000_000, "large_decode_ns": 20_000_000}


class Asked:
    """One request and its attempts.

    Args:
        trail: Where it is written.
        request: Its id.
        at: When it was received, UTC.
        department: Of the caller.
        reason: Of the choice.
        choice: What else the choice rests on.
    """

    def __init__(
        self, trail: Trail, request: str, at: str, department: str, reason: str, **choice: Any
    ) -> None:
        self._trail = trail
        self._request = request
        self._at = at
        self._department = department
        self._reason = reason
        tier = reason.removeprefix("auto:").split(" ")[0]
        self._choice = {
            "target": "large_share=0.300", "tier": tier, "wanted_tier": tier, "pressure_milli": 0,
            **PRICE, **choice,
        }  # fmt: skip
        self._tried = 0

    def attempt(self, model: str, *, open_end: bool = False, **end: Any) -> None:
        """Try a model; ``end`` is columns of its end, and ``more`` what its detail adds."""
        self._tried += 1
        columns = self._columns(model, end.pop("reason", None))
        detail, more = self._detail(model), end.pop("more", {})
        number = f"rsv-{self._request}-{self._tried}"
        columns |= {"reservation_id": number, "budget_account": self._department}
        decided = self._trail.write("inference.decided", self._at, **columns, detail=told(detail))
        if open_end:
            return
        self._trail.write(
            "inference.completed", self._at, **columns, parent_event_id=decided["event_id"],
            ts_end_us=us(self._at) + 1_000_000, detail=told(detail | more),
            **{"outcome": "completed", "status": 200, "latency_us": 1_000_000, **end},
        )  # fmt: skip

    def skip(self) -> None:
        """A model that the budget did not cover: tried, and not on record."""
        self._tried += 1

    def settled(self, **figures: int) -> None:
        """The engine's own account of the last attempt."""
        self._trail.write(
            "usage.settled", self._at, writer="ledger-1", principal_kind="system",
            request_id=self._request, reservation_id=f"rsv-{self._request}-{self._tried}",
            department=self._department, budget_account=self._department,
            detail='{"delivered":false}', **figures,
        )  # fmt: skip

    def refused(self, model: str, reason: str, **end: Any) -> None:
        """The next model was refused before anything was decided."""
        self._tried += 1
        self._trail.write(
            "inference.refused", self._at, **self._columns(model, reason), outcome="refused",
            ts_end_us=us(self._at) + 2_000_000, detail=told(self._detail(model)), **end,
        )  # fmt: skip

    def _columns(self, model: str, reason: str | None) -> dict[str, Any]:
        return {
            "request_id": self._request, "decision_id": f"dec-{self._request}",
            "department": self._department, "subject_key": "s-eva", "principal_kind": "user",
            "operation": "chat", "request_model": "auto", "response_model": model,
            "route_reason": reason or self._reason,
        }  # fmt: skip

    def _detail(self, model: str) -> dict[str, Any]:
        detail = {**self._choice, "auto": True, "attempt": self._tried}
        if self._tried > 1:
            tier = "large" if model.startswith("large") else "small"
            detail |= {"tier": tier, "chosen_tier": self._choice["tier"]}
        return detail


def told(route: dict[str, Any]) -> str:
    """A detail, as records have it."""
    return json.dumps({"route": route}, sort_keys=True, separators=(",", ":"))


def scored(gain: int, **more: Any) -> dict[str, Any]:
    """What a choice by score rests on."""
    return {
        "gain_milli": gain, "threshold_milli": 140, "aimed_milli": 300, "weak_milli": 600,
        "strong_milli": 600 + gain, "trust_milli": 900, "cluster": 17, "similarity_milli": 640,
        "scorer": SCORER, "score_us": 9000, **more,
    }  # fmt: skip


def used(tokens_in: int, tokens_out: int, charged_us: int, **more: Any) -> dict[str, Any]:
    """Columns of what an answer took; half of what is charged was metered."""
    return {
        "input_tokens": tokens_in, "output_tokens": tokens_out, "gpu_us": charged_us // 2,
        "charged_us": charged_us, "gpu_us_method": "step_split", **more,
    }  # fmt: skip


LOW, HIGH = "auto:small gain below threshold", "auto:large gain above threshold"
DOWN = {"outcome": "failed", "status": 503, "error_code": "engine_unavailable", "charged_us": 0}
FELL = {"superseded": "fallback"}


def legal(trail: Trail) -> None:
    """2026-11-24: five requests and one that is open; a cascade judges two of them."""
    day, who = "2026-11-24 10:00:0", "legal"
    Asked(trail, "a1", day + "0", who, LOW, **scored(80)).attempt(
        "small", **used(100, 50, 400_000, cached_tokens=20)
    )
    Asked(trail, "a2", day + "1", who, HIGH, **scored(200)).attempt(
        "large", **used(100, 50, 2_000_000)
    )
    given_up = Asked(trail, "a3", day + "2", who, LOW, **scored(100, cascade=True))
    given_up.attempt("small", more={"superseded": "cascade"}, **used(100, 40, 300_000))
    given_up.attempt(
        "large", reason="cascade:unsure", more={"confidence_milli": 412, "draft_ended": "stop"},
        **used(100, 60, 1_500_000),
    )  # fmt: skip
    Asked(trail, "a4", day + "3", who, LOW, **scored(90, cascade=True)).attempt(
        "small", more={"confidence_milli": 950, "draft_ended": "stop"}, **used(50, 10, 100_000)
    )
    Asked(trail, "a10", day + "4", who, LOW, **scored(70)).attempt("small", open_end=True)
    Asked(trail, "a11", day + "5", who, "auto:large capability tools").attempt(
        "large", **used(10, 10, 700_000)
    )


def research(trail: Trail) -> None:
    """2026-11-25: five requests, four of which changed their model."""
    day, who = "2026-11-25 10:00:0", "research"
    up = Asked(trail, "a5", day + "0", who, LOW, **scored(60))
    up.attempt("small", more=FELL, **DOWN)
    up.attempt("large", reason="fallback:engine_unavailable", **used(30, 10, 900_000))
    late = "auto:small default scorer late"
    Asked(
        trail, "a6", day + "1", who, late, default="default scorer late", score_us=100_400
    ).attempt("small", **used(10, 10, 50_000))
    # Its engine died; what it had cost was told by the ledger, which knew better.
    down = Asked(trail, "a7", day + "2", who, HIGH, **scored(300))
    down.attempt(
        "large", more=FELL, outcome="failed", status=500, error_code="engine_failed",
        gpu_us=1_000, charged_us=2_000, gpu_us_method="pending",
    )  # fmt: skip
    down.settled(gpu_us=200_000, charged_us=400_000, input_tokens=20)
    down.attempt("small", reason="fallback:engine_failed", **used(20, 20, 80_000))
    dear = Asked(trail, "a8", day + "3", who, HIGH, **scored(250))
    dear.skip()
    dear.attempt("small", reason="fallback:budget_exhausted", **used(20, 5, 60_000))
    out = Asked(trail, "a9", day + "4", who, LOW, **scored(20))
    out.attempt("small", more=FELL, **DOWN)
    out.refused("large", "fallback:engine_unavailable", status=429, error_code="budget_exhausted")


def shadows(trail: Trail) -> None:
    """Two comparisons; one of them with all its records, under the caller and at another's cost."""
    at = "2026-11-24 11:00:00"
    run = {
        "request_id": "a1-shadow", "reservation_id": "rsv-a1-shadow", "department": "legal",
        "budget_account": "platform", "principal_kind": "user", "subject_key": "s-eva",
        "request_model": "auto", "response_model": "large", "route_reason": "shadow",
    }  # fmt: skip
    trail.write("inference.decided", at, **run)
    trail.write(
        "inference.completed", at, **run, ts_end_us=us(at) + 1_000_000, outcome="completed",
        status=200, **used(100, 75, 1_200_000),
    )  # fmt: skip
    trail.write(
        "usage.settled", at, writer="ledger-1", request_id="a1-shadow", department="platform",
        reservation_id="rsv-a1-shadow", budget_account="platform", gpu_us=600_000,
        charged_us=1_200_000,
    )  # fmt: skip
    pair(trail, "a1", at, "legal", "number", 1000, 80, 50, 75, reservation_id="rsv-a1-shadow")
    pair(trail, "a6", "2026-11-25 11:00:00", "research", "cosine", 480, None, 20, 30)
    pair(trail, "a5", "2026-11-25 11:00:01", "research", "choice", 0, 60, None, None)


def pair(
    trail: Trail, request: str, at: str, department: str, method: str, agreement: int,
    gain: int | None, small: int | None, large: int | None, **columns: Any,
) -> None:  # fmt: skip
    """One comparison."""
    detail = {
        "agreement_milli": agreement, "method": method, "small_model": "small",
        "large_model": "large", "small_tokens": small, "large_tokens": large, "gain_milli": gain,
        "threshold_milli": 140, "run_request_id": f"{request}-shadow",
    }  # fmt: skip
    trail.write(
        "route.shadow", at, request_id=request, department=department, gpu_us=600_000,
        detail=json.dumps({"shadow": detail}), **columns,
    )  # fmt: skip


def routed(trail: Trail) -> None:
    """All of it."""
    legal(trail)
    research(trail)
    shadows(trail)
