"""Keeps a conversation on its model, unless its prompts say clearly otherwise.

Each turn is scored by itself, and a follow-up such as "and in Python?" scores like the easy prompt
that it is. Changing the model costs the prefix that the replica has cached, and the user sees
another voice. So a conversation's tier changes with hysteresis:

* the first turn goes by the threshold;
* a small one becomes large with a gain of the threshold plus the margin;
* a large one becomes small after two turns in a row below the threshold less the margin.

Gains within the margin of a threshold at rest therefore never change a tier. The memory is bounded:
the conversation that was silent longest goes first, and idle ones are forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from routing.cards import Hysteresis
from routing.recent import Cut

_TURNS_BELOW = 2


@dataclass(frozen=True, slots=True)
class Stay:
    """Where a conversation is after a turn."""

    large: bool
    below: int
    """Turns in a row of a large conversation that were clearly easy."""
    kept: bool
    """It stayed, though the prompt alone would have gone elsewhere."""


class Conversations:
    """Memory of one department's conversations at one gateway."""

    def __init__(self, config: Hysteresis) -> None:
        self._config = config
        self._known: OrderedDict[str, tuple[bool, int, float]] = OrderedDict()

    def __len__(self) -> int:
        """Conversations remembered."""
        return len(self._known)

    def judge(self, key: str, gain_milli: int, cut: Cut, draw: float, now_s: float) -> Stay:
        """Which tier the next turn wants; remembers nothing.

        Args:
            key: Conversation; empty for none.
            gain_milli: Expected gain of the turn.
            cut: The threshold.
            draw: Number of the request for gains at the threshold; see ``Cut.admits``.
            now_s: Monotonic clock.
        """
        alone = cut.admits(gain_milli, draw)
        known = self._known.get(key) if key else None
        if known is None or now_s - known[2] > self._config.idle_s:
            return Stay(alone, 0, False)
        large, below, _ = known
        margin = self._config.margin_milli
        if not large:
            rises = gain_milli >= cut.level + margin if margin else alone
            return Stay(rises, 0, alone and not rises)
        falls = gain_milli < cut.level - margin if margin else not alone
        below = below + 1 if falls else 0
        if below >= _TURNS_BELOW:
            return Stay(False, 0, False)
        return Stay(True, below, not alone)

    def remember(self, key: str, stay: Stay, now_s: float) -> None:
        """Keep where a conversation is."""
        if not key or not self._config.conversations:
            return
        self._known[key] = (stay.large, stay.below, now_s)
        self._known.move_to_end(key)
        # At the front stands what was silent longest. Two a turn, so that memory also shrinks.
        for _ in range(2):
            oldest = next(iter(self._known))
            idle = now_s - self._known[oldest][2] > self._config.idle_s
            if idle or len(self._known) > self._config.conversations:
                del self._known[oldest]
