"""The scorer in a deployment of its own, asked through its Serve handle."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from ray import exceptions as ray_errors
from ray.serve import exceptions as serve_errors

from deployments.routing.micro_batch import LATE, UNREACHABLE, Backlogged
from deployments.routing.scoring import WARM_UP, shortened
from routing.types import Score, ScorerUnavailable

BACKLOGGED = "backlogged"
"""What a replica says instead of a score when it turns a prompt away at once."""

MAX_OPEN = 512
"""Prompts that one gateway has on their way at once."""
HEAD_START_MS = 2
"""By this a replica gives up earlier than the gateway, so that it works on nothing in vain."""
WARM_UP_MS = 60_000
"""Time that the first call has, which no request waits for."""

Ask = Callable[[str, int], Awaitable[Score | str]]
"""A prompt and how long it may take, in milliseconds; a score, or why there is none."""


class RemoteScorer:
    """Asks a replica, for a bounded time.

    Serve holds a call back while there is no replica, so a deployment that is dead is ``late``
    more often than ``unreachable``; either opens the breaker around this.

    Args:
        ask: Sends a prompt to some replica.
        timeout_ms: Time that a score may take, the way included.
    """

    def __init__(self, ask: Ask, timeout_ms: int) -> None:
        self._ask = ask
        self._timeout_ms = timeout_ms
        self._open = 0
        self._warming: asyncio.Task[None] | None = None

    def warm_up(self) -> None:
        """Ask once, in the background: Serve makes its way to the replicas at the first call."""
        self._warming = asyncio.create_task(self._ask_once())

    async def score(self, prompt: str) -> Score:
        """See ``routing.types.Scorer``."""
        if self._open >= MAX_OPEN:
            raise Backlogged()
        self._open += 1
        try:
            async with asyncio.timeout(self._timeout_ms / 1000):
                # Leaving by time-out cancels the call: what comes later is dropped on the way.
                answer = await self._ask(
                    shortened(prompt), max(1, self._timeout_ms - HEAD_START_MS)
                )
        except TimeoutError:
            raise ScorerUnavailable(LATE) from None
        except serve_errors.BackPressureError:
            raise Backlogged() from None
        except (ray_errors.RayError, serve_errors.RayServeException):
            raise ScorerUnavailable(UNREACHABLE) from None
        finally:
            self._open -= 1
        if isinstance(answer, Score):
            return answer
        raise Backlogged() if answer == BACKLOGGED else ScorerUnavailable(answer)

    async def close(self) -> None:
        """Nothing else is held open between requests."""
        if self._warming is not None:
            self._warming.cancel()

    async def _ask_once(self) -> None:
        with suppress(ray_errors.RayError, serve_errors.RayServeException):
            await self._ask(WARM_UP, WARM_UP_MS)
