"""How fast a budget is used up, and when it would be gone if that went on. Plain arithmetic.

A rate is an amount per hour. Where nothing is known of the past but what was spent since the
window began, the average since then stands in (``since_start``); ``governance.finops.forecast``
knows more.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

HOUR_US = 3_600_000_000
SPARKS = "▁▂▃▄▅▆▇█"
NEVER: None = None


def since_start(spent: int, start_us: int, now_us: int) -> float:
    """Average rate since a window began, per hour; the first minute counts as a whole one."""
    return spent * HOUR_US / max(now_us - start_us, 60_000_000)


def exhaustion_us(left: int | None, per_hour: float, now_us: int, reset_us: int) -> int | None:
    """When an amount is used up at a constant rate.

    Args:
        left: What is left; ``None`` where there is no limit.
        per_hour: Rate.
        now_us: Wall time.
        reset_us: When the window ends.

    Returns:
        Microseconds since 1970, ``now_us`` where nothing is left; ``None`` where the window ends
        first.
    """
    if left is None:
        return NEVER
    if left <= 0:
        return now_us
    if per_hour <= 0:
        return NEVER
    when_us = now_us + left / per_hour * HOUR_US
    return int(when_us) if when_us < reset_us else NEVER


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """A row of blocks whose heights are the values; the largest is full, zero is lowest.

    More values than ``width`` are added up in groups that differ by one value at most, so that no
    peak is lost and the newest value is in the last block.
    """
    if not values:
        return ""
    width = max(1, min(width, len(values)))
    edges = [round(place * len(values) / width) for place in range(width + 1)]
    groups = [sum(values[begin:end]) / (end - begin) for begin, end in pairwise(edges)]
    top = max(groups)
    if top <= 0:
        return SPARKS[0] * width
    last = len(SPARKS) - 1
    return "".join(SPARKS[min(last, int(max(value, 0) / top * last + 0.5))] for value in groups)
