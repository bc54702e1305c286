"""From a department's target to a threshold on the expected gain, and what came of it.

A threshold in units of the scorer means nothing to who owns the budget, and traffic drifts. So a
target is a share, and the threshold is a quantile of recent gains, as RouteLLM calibrates its
threshold to a share of strong calls on sample traffic (I. Ong et al., arXiv 2406.18665) - but over
the department's own newest requests, and continually:

1. The window (``routing.recent``) holds the newest 2,048 gains of one department, and no other's:
   crafted prompts move the sender's own threshold only. At first the scorer's reference counts,
   less with each gain that is seen.
2. A large share ``s`` cuts off the greatest ``s`` of the window. A quality ``q`` cuts off the
   least share whose gains sum to ``q`` of the sum of all: greedy, and exact for a sum.
3. Pressure of the budget takes its part off ``s`` or ``q``.
4. A window lags behind its traffic: of gains that rise all day each is above all before it. So the
   share is corrected by what was achieved: with each request ``correction += step * (aimed - was
   large)``. This is adaptive conformal inference (I. Gibbs and E. Candes, arXiv 2106.00263) with
   "went large" in the place of "was not covered", and inherits its bound: whatever the gains, over
   ``T`` requests the achieved share is off by at most about ``1 / (step * T)``.

The bound is for requests that could go either way: what only one tier can do, or could do at that
moment, is neither counted nor made up for. Otherwise an hour in which the large tier was down would
be followed by one in which everything goes there.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from routing.cards import Target
from routing.recent import Cut, Recent

STEP = 1 / 128
"""Of the correction. Smaller: the share wanders less (about ``sqrt(step * s * (1 - s) / 2)``);
larger: it is reached sooner."""
_BEYOND = 0.1
"""How far a corrected share may be below 0 or above 1. One step past the end is all that the bound
needs; what drives it further (conversations that stay) must not take hours to undo."""
_OUTCOMES = 2048


class Correction:
    """Holds an achieved share at the aimed one."""

    def __init__(self) -> None:
        self._offset = 0.0

    def applied(self, share: float) -> float:
        """The share to cut off so that, after what was, the aimed one comes out."""
        return share + self._offset

    def learn(self, share: float, inside: bool) -> None:
        """Take in one outcome.

        Args:
            share: What was aimed at.
            inside: Whether the request belongs to the share.
        """
        offset = self._offset + STEP * (share - inside)
        self._offset = max(-share - _BEYOND, min(1 - share + _BEYOND, offset))


@dataclass(frozen=True, slots=True)
class Aim:
    """What is aimed at for one request."""

    share: float
    """Share of large requests, after pressure, before correction."""
    cut: Cut
    free_cut: Cut
    """As ``cut``, without the budget's pressure."""


class Steering:
    """Keeps one department at its target.

    Args:
        target: What it wants.
        reference: What gains are like in general, in thousandths; may be empty.
    """

    def __init__(self, target: Target, reference: Sequence[int]) -> None:
        self.target = target
        self.text = target.text
        self._recent = Recent(reference)
        self._correction = Correction()
        self._outcomes = _Outcomes()

    def aim(self, pressure: float) -> Aim:
        """Where the threshold is now."""
        share = self._share(1 - pressure)
        cut = self._recent.cut(self._correction.applied(share))
        if pressure <= 0:
            return Aim(share, cut, cut)
        whole = self._recent.cut(self._correction.applied(self._share(1)))
        return Aim(share, cut, whole)

    def saw(self, gain_milli: int) -> None:
        """A request had this gain."""
        self._recent.add(gain_milli)

    def went(self, large: bool, aim: Aim | None) -> None:
        """Where a request went.

        Args:
            large: To the large tier.
            aim: What was aimed at, where it could go either way.
        """
        if aim is not None:
            self._correction.learn(aim.share, large)
        self._outcomes.add(large, aim)

    def outcomes(self) -> tuple[int, int, int, int, int]:
        """Of the newest requests: see ``_Outcomes.count``."""
        return self._outcomes.count()

    def _share(self, left: float) -> float:
        if self.target.quality is not None:
            return self._recent.least_share(self.target.quality * left)
        return (self.target.large_share or 0.0) * left


class _Outcomes:
    """A ring of what became of the newest requests."""

    def __init__(self) -> None:
        self._went = bytearray()
        self._aimed = array("h")
        self._next = 0

    def add(self, large: bool, aim: Aim | None) -> None:
        """Take in one request."""
        went = large | (aim is not None) << 1
        aimed = 0 if aim is None else round(1000 * aim.share)
        if len(self._went) < _OUTCOMES:
            self._went.append(went)
            self._aimed.append(aimed)
        else:
            self._went[self._next] = went
            self._aimed[self._next] = aimed
            self._next = (self._next + 1) % _OUTCOMES

    def count(self) -> tuple[int, int, int, int, int]:
        """Requests, large ones, free ones, large free ones, sum of what was aimed at for those."""
        free_large = self._went.count(3)
        free = free_large + self._went.count(2)
        return (
            len(self._went),
            free_large + self._went.count(1),
            free,
            free_large,
            sum(self._aimed),
        )
