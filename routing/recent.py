"""A bounded window of recent values, and where a share of them is cut off.

Values are integers from -1000 to 1000 and are kept as counts of each, so that a cut takes
microseconds however they are distributed, and can be repeated from the thousandths of a record.

The cut of a share is a level and a part: values above the level are in, those below are out, and
of those at the level the stated part is in. Without that part a mass of equal values (an
application that sends one prompt, a scorer that knows only the mean) would be in or out as a whole,
and no share between could be had.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LIMIT = 1000
"""Largest value; thousandths."""
NEVER = LIMIT + 1
"""Level of a cut that nothing passes."""

_LEVELS = np.arange(LIMIT, -LIMIT - 1, -1, dtype=np.float64)
"""Every value, the greatest first, as counts are kept."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a share of the values is cut off."""

    level: int
    part: float
    """Part of the values at the level that is in, 0 to 1."""

    def admits(self, value: int, draw: float) -> bool:
        """Whether a value is in.

        Args:
            value: The value.
            draw: Number from 0 to 1 that belongs to the request, for values at the level.
        """
        return value > self.level or (value == self.level and draw < self.part)


NOTHING = Cut(NEVER, 0.0)
EVERYTHING = Cut(-NEVER, 1.0)


class Recent:
    """The newest values.

    Args:
        reference: What values are like in general: equally likely ones, such as quantiles; they
            count as much as ``seed`` values less those seen. May be empty.
        size: Values that are kept.
        seed: Weight of the reference at the beginning, in values.
    """

    def __init__(self, reference: Sequence[int] = (), size: int = 2048, seed: int = 256) -> None:
        self._size = size
        self._ring = array("h")
        self._next = 0
        self._counts: Floats = np.zeros(2 * LIMIT + 1)
        self._seed = seed if reference else 0
        self._reference: Floats = np.zeros(2 * LIMIT + 1)
        for value in reference:
            self._reference[LIMIT - value] += 1 / len(reference)
        self._added = 0
        self._sums = _Sums(self._weighted())

    def __len__(self) -> int:
        """Values seen and kept."""
        return len(self._ring)

    def add(self, value: int) -> None:
        """Take in a value; the oldest goes where the window is full."""
        value = max(-LIMIT, min(LIMIT, value))
        if len(self._ring) < self._size:
            self._ring.append(value)
        else:
            self._counts[LIMIT - self._ring[self._next]] -= 1
            self._ring[self._next] = value
            self._next = (self._next + 1) % self._size
        self._counts[LIMIT - value] += 1
        self._added += 1

    def cut(self, share: float) -> Cut:
        """Where the greatest values are cut off that make up a share.

        Of an empty window without reference nothing is known: the share is drawn.
        """
        if share <= 0:
            return NOTHING
        if share >= 1:
            return EVERYTHING
        above = self._now().above
        if not above[-1]:
            return Cut(0, share)
        wanted = share * above[-1]
        place = min(bisect_left(above, wanted), 2 * LIMIT)
        before = above[place - 1] if place else 0.0
        here = above[place] - before
        part = (wanted - before) / here if here > 0 else 1.0
        return Cut(LIMIT - place, min(1.0, max(0.0, part)))

    def least_share(self, part: float) -> float:
        """Least share whose values sum to a part of the sum of all; 0 where that is not positive.

        The greatest values first: no other choice of as many has a greater sum.
        """
        now = self._now()
        wanted = part * now.total
        if wanted <= 0:
            return 0.0
        # Only positive values add to a sum, so the least share ends among them.
        place = min(bisect_left(now.gained, wanted), LIMIT - 1)
        before, above = (now.gained[place - 1], now.above[place - 1]) if place else (0.0, 0.0)
        inside = (wanted - before) / (LIMIT - place)
        return min(1.0, max(0.0, (above + inside) / now.above[-1]))

    def _weighted(self) -> Floats:
        left = self._seed - len(self._ring)
        return self._counts + left * self._reference if left > 0 else self._counts

    def _now(self) -> _Sums:
        """The sums; they lag behind by a thirty-second part of the window at most."""
        if self._added > len(self._ring) // 32:
            self._sums = _Sums(self._weighted())
            self._added = 0
        return self._sums


class _Sums:
    """Sums over counts, the greatest values first; lists, because bisection on them is faster."""

    def __init__(self, counts: Floats) -> None:
        self.above: list[float] = np.cumsum(counts).tolist()
        """Weight of the values down to each."""
        products = counts * _LEVELS
        self.gained: list[float] = np.cumsum(products[:LIMIT]).tolist()
        """Sum of the values down to each positive one."""
        self.total = float(products.sum())


def thousandths(quantiles: Sequence[float]) -> tuple[int, ...]:
    """Values of a reference, for ``Recent``; what is no number is left out."""
    return tuple(round(1000 * min(1.0, max(-1.0, value))) for value in quantiles if isfinite(value))
