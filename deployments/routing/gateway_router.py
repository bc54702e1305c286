"""The ``Router`` port of one gateway: the choice, and the scorer behind it, wherever that is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from deployments.config import RouterConfig
from deployments.routing.guarded_scorer import GuardedScorer, Note
from deployments.routing.local_scorer import LocalScorer, batcher_for
from deployments.routing.micro_batch import UNREACHABLE, MicroBatcher
from deployments.routing.plan import RoutingPlan
from deployments.routing.remote_scorer import RemoteScorer
from deployments.routing.scoring import open_scorer
from governance.budget.messages import ModelPrice
from governance.nulls import FixedRouter
from governance.ports import Clock, Router
from governance.routes import AutoRouting
from governance.types import ModelInfo
from routing.auto import Achieved, AutoRouter
from routing.cards import Shadow
from routing.types import ModelLoad, Score, Scorer, ScorerUnavailable

log = logging.getLogger("gatehouse.routing")


class NoScorer:
    """For an application that has nothing to score for."""

    async def score(self, prompt: str) -> Score:
        """Never has a score."""
        raise ScorerUnavailable(UNREACHABLE)

    async def close(self) -> None:
        """Nothing was opened."""


class GatewayRouter:
    """Opens the scorer, builds the router, closes both.

    Args:
        plan: How ``auto`` works.
        config: Where and how prompts are scored.
        served: All served models.
    """

    def __init__(
        self, plan: RoutingPlan, config: RouterConfig, served: Sequence[ModelInfo]
    ) -> None:
        self._plan = plan
        self._config = config
        self._eligible = plan.eligible(served)
        self._cards = plan.cards(served)
        self._inner: LocalScorer | RemoteScorer | NoScorer = NoScorer()
        self._auto: AutoRouter | None = None

    async def open(self, handle: Any, note: Note) -> None:
        """Load the scorer, or take the handle of its deployment.

        Args:
            handle: Serve handle of ``RouterDeployment``; ``None`` where there is none.
            note: Hears of every score.

        Raises:
            ArtefactError: This node has no such artefact.
        """
        facts, timeout_ms = self._plan.scorer, self._plan.models.routing.score_timeout_ms
        if facts is not None and handle is not None:
            self._inner = remote = RemoteScorer(handle.score.remote, timeout_ms)
            remote.warm_up()
        elif facts is not None:
            score = await asyncio.to_thread(
                open_scorer, facts, threads=self._config.threads, gpu=False
            )
            self._inner = LocalScorer(batcher_for(self._config, score), timeout_ms)
        scorer: Scorer = GuardedScorer(self._inner, note)
        # In a thread, because it may load a model of languages.
        self._auto = await asyncio.to_thread(
            AutoRouter,
            self._cards,
            self._plan.models.routing,
            scorer,
            () if facts is None else facts.quantiles,
            time.monotonic,
        )

    def port(
        self,
        load: Callable[[str], ModelLoad],
        price: Callable[[], Callable[[str], ModelPrice]],
        clock: Clock,
    ) -> Router:
        """The ``Router`` port; callers name their model where no served model has a card.

        Args:
            load: How busy a base model is.
            price: Gives what says what a token of a base model costs; asked where it is needed.
            clock: Wall clock, microseconds.
        """
        if not self._eligible or self._auto is None:
            return FixedRouter()
        log.info("%s", self.announce)
        choices = frozenset(model.id for model in self._eligible)
        return AutoRouting(self._auto, load, price(), self._cards, choices, clock)

    @property
    def announce(self) -> str:
        """One line for the log."""
        names = ", ".join(model.id for model in self._eligible)
        if self._plan.scorer is None:
            return f"routing: 'auto' is offered, among one tier only: {names}"
        where = "in this process" if self.batcher is not None else "in the deployment Router"
        return f"routing: 'auto' among {names}; {self._plan.scorer.name} {where}"

    @property
    def batcher(self) -> MicroBatcher[str, Score] | None:
        """That of the scorer, where it is in this process."""
        return self._inner.batcher if isinstance(self._inner, LocalScorer) else None

    @property
    def shadow(self) -> Shadow | None:
        """How answers are compared in idle time; ``None`` where they are not, or cannot be."""
        return None if self._plan.scorer is None else self._plan.models.routing.shadow

    def achieved(self) -> tuple[Achieved, ...]:
        """What became of each department's latest requests."""
        return () if self._auto is None else self._auto.achieved()

    async def close(self) -> None:
        """Score no more."""
        await self._inner.close()
