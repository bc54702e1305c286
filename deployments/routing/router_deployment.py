"""``Router``: the Serve deployment with the complexity scorer.

Batches are formed by our own batcher and not by ``@serve.batch``. That one forms the next batch
while the last one still runs, so without a wait nearly every prompt is a batch of its own, and with
one an idle replica makes everybody wait; a prompt on which the scorer fails would fail its whole
batch; and it works on what nobody waits for any more. Figures: ``benchmarks/routing/latency.py``.
"""

from __future__ import annotations

import asyncio
from typing import Any

from deployments.autoscaling import load_autoscaling
from deployments.config import RouterConfig
from deployments.logs import join_serve_log
from deployments.routing.local_scorer import batcher_for
from deployments.routing.micro_batch import Backlogged
from deployments.routing.remote_scorer import BACKLOGGED
from deployments.routing.scoring import ScorerFacts, open_scorer
from routing.types import Score, ScorerUnavailable

NAME = "Router"
STUCK_S = 10.0
"""A batch that takes longer never ends; the replica is replaced."""


class RouterDeployment:
    """One replica: an encoder, and a batcher in front of it."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: dict[str, Any], facts: ScorerFacts
    ) -> None:
        """Load and warm up.

        Args:
            config: Dump of ``RouterConfig``.
            facts: Which scorer, as checked where the application was built.

        Raises:
            ArtefactError: This node has no such artefact.
            ConfigError: A GPU is configured that onnxruntime cannot use.
        """
        join_serve_log()
        settings = RouterConfig.model_validate(config)
        score = await asyncio.to_thread(
            open_scorer, facts, threads=settings.threads, gpu=settings.gpus > 0
        )
        self.batcher = batcher_for(settings, score)
        from deployments.telemetry.actors import RouterTelemetry

        self.telemetry = RouterTelemetry(self.batcher)

    async def score(self, prompt: str, timeout_ms: int) -> Score | str:
        """Score a prompt; or say why not, as text: an exception costs a traceback on the way.

        Args:
            prompt: Shortened.
            timeout_ms: How long the caller waits.
        """
        try:
            return await self.batcher.submit(prompt, timeout_ms / 1000)
        except Backlogged:
            return BACKLOGGED
        except ScorerUnavailable as error:
            return error.reason

    async def check_health(self) -> None:
        """Raise when a batch does not end, so that Serve replaces the replica."""
        if self.batcher.stuck_s > STUCK_S:
            raise RuntimeError("scoring does not end")

    async def __del__(self) -> None:
        """Finish what is being scored."""
        if hasattr(self, "batcher"):
            await self.batcher.close()
            await self.telemetry.close()


def router_options(config: RouterConfig) -> dict[str, Any]:
    """Options of ``serve.deployment``."""
    actor: dict[str, Any] = {"num_cpus": config.cpus}
    if config.gpus:
        actor["num_gpus"] = config.gpus
    return {
        "name": NAME,
        # More than the batcher takes, so that it is the batcher that turns prompts away.
        "max_ongoing_requests": 2 * (config.max_waiting + config.max_batch),
        # What waits in front of the replicas is late before its turn.
        "max_queued_requests": config.max_waiting,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 5.0,
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": 5.0,
        "ray_actor_options": actor,
        **load_autoscaling(config.replicas),
    }
