"""What every scorer has around it: a circuit breaker, a count, and one kind of exception."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from deployments.routing.breaker import Breaker
from deployments.routing.micro_batch import FAILED, LATE, UNREACHABLE, Backlogged
from governance.tracebacks import without_messages
from routing.types import Score, Scorer, ScorerUnavailable

log = logging.getLogger("gatehouse.routing")

SCORED, SPARED = "scored", "spared"
RESULTS = (SCORED, LATE, FAILED, UNREACHABLE, SPARED)
"""What can become of a wish for a score; ``spared``: not asked, the breaker is open."""

Note = Callable[[str, int], None]
"""Hears of each: one of ``RESULTS``, and microseconds."""


class GuardedScorer:
    """A scorer that no request waits for in vain, and of which every answer is counted.

    A prompt on which the scorer fails does not open the breaker: its sender could otherwise switch
    scoring off for everybody. Neither does being turned away at once, which costs nothing.

    Args:
        scorer: The one that is guarded.
        note: Hears of every result.
        clock_s: Monotonic seconds.
    """

    def __init__(
        self, scorer: Scorer, note: Note, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._scorer = scorer
        self._note = note
        self._clock_s = clock_s
        self._breaker = Breaker(clock_s)
        self._reason = UNREACHABLE

    async def score(self, prompt: str) -> Score:
        """See ``routing.types.Scorer``; raises nothing but ``ScorerUnavailable``."""
        if not self._breaker.admits():
            self._note(SPARED, 0)
            raise ScorerUnavailable(self._reason)
        began = self._clock_s()
        reason = None
        try:
            score = await self._scorer.score(prompt)
        except ScorerUnavailable as error:
            reason = error.reason
            self._judge(error)
            raise
        except Exception as error:
            # A defect of ours. The request goes on without a score.
            log.error("a scorer failed\n%s", without_messages(error))
            reason = self._reason = FAILED
            self._breaker.failed()
            raise ScorerUnavailable(FAILED) from None
        except BaseException:
            self._breaker.withdrawn()
            raise
        else:
            reason = SCORED
            self._breaker.succeeded()
            return score
        finally:
            if reason is not None:
                self._note(reason, int((self._clock_s() - began) * 1e6))

    def _judge(self, error: ScorerUnavailable) -> None:
        if isinstance(error, Backlogged):
            self._breaker.withdrawn()
        elif error.reason == FAILED:
            self._breaker.succeeded()  # it answered
        else:
            was_open = self._breaker.is_open
            self._reason = error.reason
            self._breaker.failed()
            if self._breaker.is_open and not was_open:
                log.warning("scores are %s: requests go on without, for a while", error.reason)
