"""What is asked of simulated engines, and how much they can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.fairness.lines import Fcfs
from benchmarks.fairness.machine import Machine
from benchmarks.fairness.traffic import ORGANISATION, Flood, Traffic, draw
from benchmarks.fairness.world import play
from benchmarks.routing.traffic import Trace

SAMPLE = 3_000
"""Requests of a trace by which an engine's capacity is measured."""
MARKETING, ARCHIVE = 3, 4
TIMES = 10.0
ENGINES = 2


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is asked of the engines."""

    name: str
    load: float
    """Of an ordinary day, as a share of what the engines can do."""
    floods: int | None = None
    """Department that floods."""
    arms: tuple[str, ...] = ()
    engines: int = 1
    shuffled: bool = False


SCENARIOS = (
    Scenario(
        "flood",
        0.5,
        MARKETING,
        ("fcfs", "classes", "rpm", "vtc", "ours", "ours, no floors"),
    ),
    Scenario("batch flood", 0.5, ARCHIVE, ("fcfs", "classes", "rpm", "vtc", "ours")),
    Scenario("peak", 2.0, None, ("fcfs", "rpm", "vtc", "ours")),
    Scenario("engines", 2.0, None, ("fcfs", "vtc", "ours", "ours, not told"), engines=ENGINES),
    Scenario("shuffled", 0.5, MARKETING, ("fcfs", "vtc", "ours"), shuffled=True),
)


def shortened(scenario: Scenario, arms: Sequence[str]) -> Scenario:
    """The scenario with some of its arms."""
    return replace(scenario, arms=tuple(arm for arm in scenario.arms if arm in arms))


def capacity(trace: Trace, machine: Machine) -> float:
    """Requests a second that one engine does when there is always enough to do."""
    size = min(SAMPLE, len(trace))
    place = np.linspace(0, len(trace) - 1, size).astype(np.int64)
    asked = Traffic(
        np.zeros(size),
        np.maximum(1, trace.prompt_tokens[place]),
        np.maximum(1, trace.answer_tokens[place]),
        np.zeros(size, dtype=np.int64),
        ORGANISATION,
    )
    return size / play(asked, machine, Fcfs).busy_s


def rotated(trace: Trace, seed: int) -> Trace:
    """The trace from a place that the seed chooses, round to the same place."""
    at = int(np.random.default_rng([seed, 7]).integers(len(trace)))
    span = float(trace.at_s[-1])
    at_s = np.concatenate([trace.at_s[at:], trace.at_s[:at] + span]) - trace.at_s[at]
    turned = [np.concatenate([v[at:], v[:at]]) for v in (trace.prompt_tokens, trace.answer_tokens)]
    return Trace(trace.name, at_s, *turned)


def traffic_of(scenario: Scenario, trace: Trace, rate: float, seed: int, span_s: float) -> Traffic:
    """Requests of a scenario.

    Args:
        scenario: Which.
        trace: Sizes and times.
        rate: Requests a second that one engine can do.
        seed: Of departments, flood, and place in the trace.
        span_s: Length.
    """
    own_rate = len(trace) / float(trace.at_s[-1])
    factor = own_rate / (rate * scenario.load * scenario.engines)
    turned = rotated(trace, seed)
    quick = replace(turned, at_s=turned.at_s * factor)
    floods = []
    if scenario.floods is not None:
        floods = [Flood(scenario.floods, TIMES, *window(span_s))]
    return draw(quick, seed, span_s=span_s, floods=floods, shuffled=scenario.shuffled)


def window(span_s: float) -> tuple[float, float]:
    """The part of a run that is judged; a flood fills it."""
    return 0.2 * span_s, 0.8 * span_s


def limits(rate: float) -> list[int]:
    """Requests a minute of each department: the engines' capacity, cut by weight."""
    total = sum(department.weight_milli for department in ORGANISATION)
    return [round(60 * rate * one.weight_milli / total) for one in ORGANISATION]
