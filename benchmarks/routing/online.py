"""Plays requests in time order through the platform's own ``AutoRouter``.

The scorer is a table: the "prompt" of a request is the number of a question, and its score is what
was recorded for it. Everything behind the scorer is the code that a gateway runs: windows of recent
gains, thresholds, conversations, pressure of the budget. Both models are idle all the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.routing.prices import Prices
from benchmarks.routing.traffic import DEPARTMENTS, Traffic
from routing.auto import AutoAsk, AutoRouter, Candidate
from routing.cards import Hysteresis, ModelCard, Pressure, RoutingConfig, Target
from routing.need import Need
from routing.types import ModelLoad, Score

Floats = npt.NDArray[np.float64]

CONTEXT_TOKENS = 131_072
CANDIDATES = tuple(
    Candidate(tier, tier, CONTEXT_TOKENS, ModelLoad(replicas=1, slots=1_000))
    for tier in ("small", "large")
)
CARDS = tuple(ModelCard(id=one.id) for one in CANDIDATES)
ON = Hysteresis()
OFF = Hysteresis(conversations=0)
LEAST_GONE = 0.1
"""As a gateway has it: a tenth of the window at least is taken to be gone."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How requests are routed."""

    large_share: float | None = None
    quality: float | None = None
    hysteresis: bool = False
    budget: float | None = None
    """Budget of the whole trace, as a share of what all requests cost at the large model; no bound
    where it is ``None``."""

    def described(self) -> dict[str, Any]:
        """For the file of results."""
        return {k: v for k, v in asdict(self).items() if v is not None}


class Recorded:
    """A scorer that looks scores up."""

    def __init__(self, gains: Floats) -> None:
        self._gains = gains

    async def score(self, prompt: str) -> Score:
        """Score of the question with this number."""
        gain = float(self._gains[int(prompt)])
        return Score(gain, 0.5 - gain / 2, 0.5 + gain / 2, 1.0, 0, 1.0, "recorded")


class Clock:
    """Time of the trace."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now_s


def new_router(
    setting: Setting, gains: Floats, clock: Clock, reference: Sequence[float] = ()
) -> AutoRouter:
    """A router over recorded gains, for all departments alike."""
    target = Target(departments=("*",), large_share=setting.large_share, quality=setting.quality)
    config = RoutingConfig(targets=(target,), hysteresis=ON if setting.hysteresis else OFF)
    return AutoRouter(CARDS, config, Recorded(gains), reference, clock)


def ask(question: int, department: str, conversation: str, request_id: str, **more: Any) -> AutoAsk:
    """One request that either model could answer."""
    values: dict[str, Any] = {
        "need": Need(prompt_tokens_estimate=500, answer_tokens=200),
        "pressure_milli": 0,
        "priority_class": "standard",
        **more,
    }
    return AutoAsk(
        text=str(question),
        candidates=CANDIDATES,
        department=department,
        conversation=conversation,
        request_id=request_id,
        **values,
    )


async def play(
    traffic: Traffic,
    gains: Floats,
    setting: Setting,
    prices: Prices,
    reference: Sequence[float] = (),
) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Route a trace.

    Args:
        traffic: In time order.
        gains: Recorded gain of each question.
        setting: How to route.
        prices: What counts against the budget, where there is one.
        reference: 101 quantiles of gains that the router begins with.

    Returns:
        Which requests went to the large model; and the share that the target stood for at each,
        less the pressure of the budget, NaN where the target is a quality.
    """
    trace, clock = traffic.trace, Clock()
    router = new_router(setting, gains, clock, reference)
    costs = np.stack(
        [
            price.seconds(trace.prompt_tokens, trace.answer_tokens)
            for price in (prices.small, prices.large)
        ]
    )
    budget_s = np.bincount(traffic.department, costs[1], minlength=len(DEPARTMENTS))
    budget_s *= setting.budget or np.inf
    spent_s = np.zeros(len(DEPARTMENTS))
    whole_s = max(float(trace.at_s[-1]), 1e-9)
    large = np.zeros(len(trace), dtype=bool)
    wanted = np.full(len(trace), np.nan)
    for number in range(len(trace)):
        clock.now_s = float(trace.at_s[number])
        who = int(traffic.department[number])
        gone = max(clock.now_s / whole_s, LEAST_GONE)
        pressure_milli = int(1000 * spent_s[who] / budget_s[who] / gone)
        choice = await router.choose(
            ask(
                int(traffic.question[number]),
                DEPARTMENTS[who],
                f"c{traffic.conversation[number]}",
                f"{trace.name}-{number}",
                pressure_milli=pressure_milli,
                need=Need(int(trace.prompt_tokens[number]), int(trace.answer_tokens[number])),
            )
        )
        large[number] = choice.model_id == "large"
        spent_s[who] += costs[int(large[number]), number]
        if setting.large_share is not None:
            wanted[number] = setting.large_share * (1 - Pressure().share(pressure_milli))
    return large, wanted
