"""The scorer in this process: for one machine, and for gateways that shall not depend on another.

Scoring takes a thread of the gateway's process, and milliseconds of a core for each request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deployments.config import RouterConfig
from deployments.routing.micro_batch import MicroBatcher
from deployments.routing.scoring import shortened
from routing.types import Score


def batcher_for(
    config: RouterConfig, score: Callable[[Sequence[str]], Sequence[Score]]
) -> MicroBatcher[str, Score]:
    """The batcher that the configuration asks for, in whichever process."""
    return MicroBatcher(
        score,
        max_batch=config.max_batch,
        wait_s=config.batch_wait_ms / 1000,
        max_waiting=config.max_waiting,
    )


class LocalScorer:
    """Scores through a batcher of this process.

    Args:
        batcher: What does the work.
        timeout_ms: Time that a score may take.
    """

    def __init__(self, batcher: MicroBatcher[str, Score], timeout_ms: int) -> None:
        self.batcher = batcher
        self._timeout_s = timeout_ms / 1000

    async def score(self, prompt: str) -> Score:
        """See ``routing.types.Scorer``."""
        return await self.batcher.submit(shortened(prompt), self._timeout_s)

    async def close(self) -> None:
        """Score no more."""
        await self.batcher.close()
