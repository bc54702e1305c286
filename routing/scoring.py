"""Asks for a score and never fails: a score, or the reason why there is none."""

from __future__ import annotations

import asyncio
from math import isfinite

from routing.reasons import Reason
from routing.targets import Aim
from routing.types import Score, Scorer, ScorerUnavailable

_UNAVAILABLE = {
    "late": Reason.DEFAULT_LATE,
    "unreachable": Reason.DEFAULT_UNREACHABLE,
    "failed": Reason.DEFAULT_FAILED,
}
_GUARD_S = 0.05
"""A scorer keeps to its time by itself; one that does not is left alone this much later."""


async def score_or_reason(scorer: Scorer, text: str, timeout_ms: int) -> Score | Reason:
    """The score of a text, or why there is none.

    Args:
        scorer: Keeps to the time, or raises.
        text: What is scored.
        timeout_ms: Longest wait, in milliseconds.
    """
    try:
        async with asyncio.timeout(timeout_ms / 1000 + _GUARD_S):
            score = await scorer.score(text)
        return score if isfinite(score.gain) else Reason.DEFAULT_FAILED
    except ScorerUnavailable as error:
        return _UNAVAILABLE.get(error.reason, Reason.DEFAULT_FAILED)
    except TimeoutError:
        return Reason.DEFAULT_LATE
    except Exception:
        # Whatever is wrong with the scorer, the request has an answer without it.
        return Reason.DEFAULT_FAILED


def described(score: Score, gain_milli: int, aim: Aim) -> dict[str, int | str | bool | None]:
    """Score and threshold, for the record."""
    detail: dict[str, int | str | bool | None] = {
        "gain_milli": gain_milli,
        "threshold_milli": aim.cut.level,
        "aimed_milli": milli(aim.share),
        "weak_milli": milli(score.weak),
        "strong_milli": milli(score.strong),
        "trust_milli": milli(score.trust),
        "similarity_milli": milli(score.similarity),
        "cluster": score.cluster,
        "scorer": score.scorer,
    }
    if gain_milli == aim.cut.level:
        # Of the requests with exactly this gain, so many go to the large tier.
        detail["tie_milli"] = milli(aim.cut.part)
    return detail


def milli(value: float) -> int:
    """Thousandths; -1000 to 1000, and 0 for what is no number."""
    return round(1000 * min(1.0, max(-1.0, value))) if isfinite(value) else 0
