"""What a run is judged by: service gap against VTC's bound, waiting, throughput, evenness.

**Service gap.** ``W_d`` is what department ``d`` has been served so far by its weight. Over a
stretch of time in which two departments both have somebody waiting all the while, the gap of the
stretch is the largest ``|W_f(t1, t2) - W_g(t1, t2)|`` of all its parts, that is, the largest less
the smallest value of ``W_f - W_g`` in it. VTC's theorem 4.4 bounds it by

    2 max(w_p L_input, w_q M)

with the longest prompt ``L_input``, the tokens ``M`` that a batch holds at most, and the prices
``w_p`` and ``w_q`` of a prompt and an answer token (Sheng et al., OSDI 2024); with weights it is
divided by the smaller weight. In tokens the prices are 1 and 2, as there. In device time they are
what a full step charges (``Machine.token_us``). Over several engines that learn of each other
``late_s`` late, each engine may go wrong by the bound, and by what all of them do meanwhile.

**Stake.** VTC's bound is wide, because a batch never holds all of its room for one department. What
can really go wrong is narrower: a department gets a place only while it is the least served, and
from then on it can grow by no more than what its started requests still cost. So with ``R`` the
largest such rest of any department at any moment, in weighted device time as the meter gave it in
the end, a gap is at most ``2 R``. This is the paper's proof with costs in place of counts; it can
be checked only afterwards, and holds on one engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.fairness.lines import ANSWER_PRICE, PROMPT_PRICE
from benchmarks.fairness.machine import Machine
from benchmarks.fairness.traffic import Department, Traffic
from benchmarks.fairness.world import Played

Floats = npt.NDArray[np.float64]
LEAST_S = 1.0
"""Stretches shorter than this are left out: nothing can go apart in them."""

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
"""Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom."""


def stretches(on: npt.NDArray[np.bool_]) -> Iterator[slice]:
    """Maximal runs of moments at which something holds."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], on, [False]]).astype(np.int8)))
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield slice(begin, end)


def bound(
    machine: Machine, longest: int, prices: tuple[float, float], weights_milli: tuple[int, int]
) -> float:
    """VTC's bound for two departments, in the unit of the prices."""
    prompt, answer = prices
    return 2 * max(prompt * longest, answer * machine.kv_tokens) * 1000 / min(weights_milli)


def stake_us(played: Played, traffic: Traffic) -> float:
    """``R`` of the module, in weighted device-microseconds."""
    most = 0.0
    for number, department in enumerate(traffic.organisation):
        started = sorted(
            (ask.started_s, ask.cost_ns)
            for ask in played.asks
            if ask.department == number and ask.started_s >= 0
        )
        if not started:
            continue
        times, costs = (np.asarray(column) for column in zip(*started, strict=True))
        sums = np.concatenate([[0.0], np.cumsum(costs)])
        rest = sums[np.searchsorted(times, played.at_s, side="right")] - played.cost_ns[:, number]
        most = max(most, float(rest.max()) / department.weight_milli)
    return most


def gaps(
    played: Played,
    traffic: Traffic,
    machine: Machine,
    *,
    engines: int = 1,
    late_s: float = 0.0,
) -> dict[str, Any]:
    """Service gaps of all pairs of one class, in device time and in tokens, against the bound."""
    organisation = traffic.organisation
    longest = int(traffic.prompt_tokens.max())
    prices = machine.token_us(round(float(traffic.prompt_tokens.mean())))
    units = {
        "gpu_us": (played.cost_ns / 1e3, prices, 1e6),
        "tokens": (played.vtc_tokens.astype(np.float64), (PROMPT_PRICE, ANSWER_PRICE), None),
    }
    found: dict[str, Any] = {}
    for unit, (service, price, second) in units.items():
        rows: list[dict[str, Any]] = []
        for f, g in combinations(range(len(organisation)), 2):
            if organisation[f].rank != organisation[g].rank:
                continue
            weights = organisation[f].weight_milli, organisation[g].weight_milli
            most = bound(machine, longest, price, weights) * engines
            if engines > 1 and second is not None:
                most += 2 * engines * late_s * second * 1000 / min(weights)
            apart = 1000 * (service[:, f] / weights[0] - service[:, g] / weights[1])
            both = (played.waiting[:, f] > 0) & (played.waiting[:, g] > 0)
            widths = [
                (float(np.ptp(apart[run])), float(played.at_s[run][-1] - played.at_s[run][0]))
                for run in stretches(both)
            ]
            widths = [(width, span) for width, span in widths if span >= LEAST_S]
            rows.append(
                {
                    "pair": [organisation[f].name, organisation[g].name],
                    "bound": round(most, 1),
                    "largest gap": round(max((width for width, _ in widths), default=0.0), 1),
                    "stretches": len(widths),
                    "violations": sum(width > most for width, _ in widths),
                    "backlogged_s": round(sum(span for _, span in widths), 1),
                }
            )
        found[unit] = {
            "pairs": rows,
            "largest share of bound": round(
                max((row["largest gap"] / row["bound"] for row in rows), default=0.0), 4
            ),
            "stretches": sum(row["stretches"] for row in rows),
            "violations": sum(row["violations"] for row in rows),
        }
    if engines == 1:
        stake = stake_us(played, traffic)
        widest = max(row["largest gap"] for row in found["gpu_us"]["pairs"])
        found["stake"] = {
            "bound_us": round(2 * stake, 1),
            "largest share of bound": round(widest / (2 * stake), 4) if stake else 0.0,
        }
    return found


def jain(shares: Sequence[float]) -> float:
    """Jain's index of evenness: 1 if all are equal, 1/n if one has everything.

    Jain, Chiu and Hawe, DEC-TR-301, 1984.
    """
    total, squares = sum(shares), sum(share * share for share in shares)
    return total * total / (len(shares) * squares) if squares else 1.0


def evenness(played: Played, organisation: Sequence[Department], rank: int) -> dict[str, Any]:
    """Jain's index of weighted service while all departments of a class have somebody waiting."""
    members = [d for d, one in enumerate(organisation) if one.rank == rank]
    together = np.all(played.waiting[:, members] > 0, axis=1)
    served, seconds = np.zeros(len(members)), 0.0
    for run in stretches(together):
        ends = played.cost_ns[run][:, members]
        served += (ends[-1] - ends[0]) / 1e9
        seconds += float(played.at_s[run][-1] - played.at_s[run][0])
    weighted = [
        float(value) * 1000 / organisation[d].weight_milli
        for value, d in zip(served, members, strict=True)
    ]
    return {
        "seconds": round(seconds, 1),
        "service_s": {
            organisation[d].name: round(float(value), 2)
            for d, value in zip(members, served, strict=True)
        },
        "jain": round(jain(weighted), 5),
    }


def waiting(
    played: Played, organisation: Sequence[Department], window: tuple[float, float]
) -> dict[str, Any]:
    """Time to first token of those that came in a window, by department."""
    found = {}
    for number, department in enumerate(organisation):
        came = [
            ask
            for ask in played.asks
            if ask.department == number and window[0] <= ask.arrived_s < window[1]
        ]
        if not came:
            continue
        took = [ask.first_s - ask.arrived_s for ask in came if ask.first_s >= 0]
        ended = [ask.ended_s - ask.arrived_s for ask in came if ask.ended_s >= 0]
        found[department.name] = {
            "requests": len(came),
            "refused": sum(ask.refused for ask in came),
            "ttft_p50_s": percentile(took, 50),
            "ttft_p99_s": percentile(took, 99),
            "ttft_max_s": round(max(took), 4) if took else None,
            "end_p99_s": percentile(ended, 99),
        }
    return found


def percentile(values: Sequence[float], rank: float) -> float | None:
    """A percentile, rounded; ``None`` of nothing."""
    return round(float(np.percentile(values, rank)), 4) if values else None


def throughput(played: Played, window: tuple[float, float]) -> dict[str, float]:
    """Tokens a second in a window, by the clock and by the devices' busy time."""
    begin, end = np.searchsorted(played.at_s, window)
    end = min(int(end), len(played.at_s) - 1)
    tokens = int(played.done_tokens[end] - played.done_tokens[begin])
    busy_s = float(played.busy_at_s[end] - played.busy_at_s[begin])
    span_s = float(played.at_s[end] - played.at_s[begin])
    return {
        "tokens_a_second": round(tokens / span_s, 1),
        "tokens_a_busy_second": round(tokens / busy_s, 1),
        "busy_share": round(busy_s / span_s, 4),
    }


def interval(values: Sequence[float], *, ratio: bool = False) -> dict[str, Any]:
    """Mean over seeds and its 95 % interval by Student's t; the values themselves.

    Args:
        values: One of each seed.
        ratio: They are ratios or waits, above 0: the mean is the geometric one, and the interval is
            that of the logarithms.
    """
    count = len(values)
    scaled = [math.log(value) for value in values] if ratio else list(values)
    back = math.exp if ratio else float
    mean = sum(scaled) / count
    half = math.nan
    if count > 1:
        spread = math.sqrt(sum((value - mean) ** 2 for value in scaled) / (count - 1))
        half = STUDENT[min(count - 1, len(STUDENT)) - 1] * spread / math.sqrt(count)
    return {
        "mean": round(back(mean), 5),
        "low": None if math.isnan(half) else round(back(mean - half), 5),
        "high": None if math.isnan(half) else round(back(mean + half), 5),
        "worst": round(max(values), 5),
        "values": [round(value, 5) for value in values],
    }


def lost(arm: Mapping[str, float], against: Mapping[str, float]) -> float:
    """Share of the throughput that an arm loses against another."""
    return 1 - arm["tokens_a_busy_second"] / against["tokens_a_busy_second"]
