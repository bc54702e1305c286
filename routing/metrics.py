"""How good an order of questions is: the share of the gain that early strong calls bring.

Questions are sorted by a router's score and the top share ``c`` goes to the strong model. With
``r(c)`` the mean score that results, ``W`` that of the weak and ``S`` that of the strong model
alone (I. Ong et al., "RouteLLM", arXiv 2406.18665, section 3.2):

* PGR(c) = (r(c) - W) / (S - W), the share of the gap that is recovered;
* APGR = area under PGR over c in 0 to 1, by the trapezoid rule over every point: a random order
  gives 0.5, the best order may pass 1, because questions that only the weak model gets right lift
  it above S;
* CPT(x) = least share of strong calls at which PGR reaches x.

Equal scores: a router that gives many questions one score has not ordered them, so every order of
them counts alike. The curve through a group of ties is the straight line between its ends, which
is the mean over all orders of the group; no figure depends on the order of rows.

Intervals are percentile bootstrap intervals over questions (B. Efron, 1979), drawn once per
set and shared by all routers, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MIN_GAP = 1e-9
"""Least difference between strong and weak mean for which a share of it means anything."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Mean score against share of strong calls: points of a piecewise straight line."""

    share: Floats
    """Share of questions that go to the strong model; from 0 to 1, increasing."""
    value: Floats
    """Mean score at that share."""

    def at(self, share: float) -> float:
        """Mean score with this share (0 to 1) of strong calls."""
        return float(np.interp(share, self.share, self.value))

    @property
    def weak(self) -> float:
        """Mean score of the weak model alone."""
        return float(self.value[0])

    @property
    def strong(self) -> float:
        """Mean score of the strong model alone."""
        return float(self.value[-1])


def curve(score: npt.ArrayLike, weak: npt.ArrayLike, strong: npt.ArrayLike) -> Curve:
    """The cost-quality curve of an order.

    Args:
        score: One number per question; the highest goes to the strong model first.
        weak: Score of the weak model's answer.
        strong: Score of the strong model's answer.

    Raises:
        ValueError: No questions, arrays of different length, or a score that is not finite.

    """
    scores, low, high = _checked(score, weak, strong)
    _, group = np.unique(-scores, return_inverse=True)
    gain = np.bincount(group, weights=high - low)
    count = np.bincount(group)
    size = len(scores)
    share = np.concatenate([[0.0], np.cumsum(count) / size])
    value = low.mean() + np.concatenate([[0.0], np.cumsum(gain) / size])
    share[-1] = 1.0
    return Curve(share, value)


def apgr(score: npt.ArrayLike, weak: npt.ArrayLike, strong: npt.ArrayLike) -> float:
    """Average performance gap recovered; 0.5 is random, NaN where the two models tie."""
    line = curve(score, weak, strong)
    gap = line.strong - line.weak
    if abs(gap) < MIN_GAP:
        return float("nan")
    return float((np.trapezoid(line.value, line.share) - line.weak) / gap)


def cpt(line: Curve, fraction: float) -> float:
    """Least share of strong calls at which a fraction (0 to 1) of the gap is recovered.

    NaN where the two models tie or the strong one is worse: there is no gap to recover.
    """
    gap = line.strong - line.weak
    if gap < MIN_GAP:
        return float("nan")
    recovered = (line.value - line.weak) / gap
    reached = np.flatnonzero(recovered >= fraction - 1e-12)
    first = int(reached[0])
    if first == 0:
        return 0.0
    x0, x1 = line.share[first - 1], line.share[first]
    y0, y1 = recovered[first - 1], recovered[first]
    return float(x1 if y1 == y0 else x0 + (x1 - x0) * (fraction - y0) / (y1 - y0))


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with the middle 95 % of its bootstrap distribution."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What is reported of one router on one set."""

    apgr: Interval
    cpt50: Interval
    cpt80: Interval
    accuracy30: Interval
    """Mean score with 30 % strong calls."""
    accuracy50: Interval
    """Mean score with 50 % strong calls."""


def resamples(size: int, rounds: int, seed: int) -> npt.NDArray[np.int32]:
    """How often each question is drawn in each round; shape ``(rounds, size)``.

    Weights instead of indices: one set of them serves every router, which pairs the differences.
    """
    rng = np.random.default_rng(seed)
    return np.stack(
        [
            np.bincount(rng.integers(0, size, size), minlength=size).astype(np.int32)
            for _ in range(rounds)
        ]
    )


def bootstrap(
    score: npt.ArrayLike,
    weak: npt.ArrayLike,
    strong: npt.ArrayLike,
    draws: npt.NDArray[np.int32],
) -> dict[str, Floats]:
    """Each figure in each round of resampling: name of `Figures` to an array over rounds.

    Rounds in which the two models tie give NaN.
    """
    scores, low, high = _checked(score, weak, strong)
    _, group = np.unique(-scores, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(group[order])) + 1])
    gain = (high - low)[order]
    names = ("apgr", "cpt50", "cpt80", "accuracy30", "accuracy50")
    found: dict[str, list[float]] = {name: [] for name in names}
    for drawn in draws:
        weights = drawn[order].astype(np.float64)
        size = weights.sum()
        share = np.concatenate([[0.0], np.cumsum(np.add.reduceat(weights, starts)) / size])
        steps = np.add.reduceat(weights * gain, starts) / size
        value = float(low @ drawn) / size + np.concatenate([[0.0], np.cumsum(steps)])
        line = Curve(share, value)
        gap = line.strong - line.weak
        area = float(np.trapezoid(value, share)) - line.weak
        found["apgr"].append(area / gap if abs(gap) >= MIN_GAP else float("nan"))
        found["cpt50"].append(cpt(line, 0.5))
        found["cpt80"].append(cpt(line, 0.8))
        found["accuracy30"].append(line.at(0.3))
        found["accuracy50"].append(line.at(0.5))
    return {name: np.asarray(values) for name, values in found.items()}


def figures(
    score: npt.ArrayLike,
    weak: npt.ArrayLike,
    strong: npt.ArrayLike,
    rounds: Mapping[str, Floats],
) -> Figures:
    """Figures of a router with intervals from `bootstrap`."""
    line = curve(score, weak, strong)
    values = {
        "apgr": apgr(score, weak, strong),
        "cpt50": cpt(line, 0.5),
        "cpt80": cpt(line, 0.8),
        "accuracy30": line.at(0.3),
        "accuracy50": line.at(0.5),
    }
    return Figures(**{name: interval(value, rounds[name]) for name, value in values.items()})


def interval(value: float, rounds: Floats) -> Interval:
    """A value with the 2.5 and 97.5 percentiles of its rounds; NaN where there are none."""
    known = rounds[~np.isnan(rounds)]
    if len(known) == 0:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.percentile(known, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def _checked(
    score: npt.ArrayLike, weak: npt.ArrayLike, strong: npt.ArrayLike
) -> tuple[Floats, Floats, Floats]:
    scores = np.asarray(score, dtype=np.float64)
    low = np.asarray(weak, dtype=np.float64)
    high = np.asarray(strong, dtype=np.float64)
    if not len(scores) == len(low) == len(high):
        raise ValueError(f"{len(scores)} scores for {len(low)} weak and {len(high)} strong results")
    if len(scores) == 0:
        raise ValueError("no questions")
    if not np.isfinite(scores).all():
        raise ValueError(f"score {int(np.flatnonzero(~np.isfinite(scores))[0])} is not finite")
    return scores, low, high
