"""The way to the scorer's deployment, against this process and against ``@serve.batch``."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from benchmarks.routing.callers import LONG_S, Ask, Row, callers, merged, mixed_prompts
from deployments.config import RouterConfig
from deployments.routing.micro_batch import MicroBatcher
from deployments.routing.scoring import ScoreMany, ScorerFacts, open_scorer
from routing.types import Score


def serve_batch_class(max_batch: int, wait_s: float) -> type:
    """The same work behind Ray Serve's own batching."""
    from ray import serve

    class BatchedByServe:
        def __init__(self, facts: ScorerFacts) -> None:
            self.work = open_scorer(facts, threads=1, gpu=False)
            self.sizes: list[int] = []

        @serve.batch(max_batch_size=max_batch, batch_wait_timeout_s=wait_s)  # type: ignore[untyped-decorator]
        async def collected(self, prompts: list[str]) -> list[Score]:
            self.sizes.append(len(prompts))
            return await asyncio.to_thread(self.work, prompts)

        async def score(self, prompt: str, timeout_ms: int) -> Score:
            found: Score = await self.collected(prompt)
            return found

        async def mean_batch(self) -> float:
            sizes, self.sizes = self.sizes, []
            return sum(sizes) / max(1, len(sizes))

    return BatchedByServe


def hop(facts: ScorerFacts, score: ScoreMany, seconds: float, rounds: int, seed: int) -> list[Row]:
    """Deployments on a Ray of our own; the callers are in this process, as in a gateway's."""
    import ray
    from ray import serve

    from deployments.routing.router_deployment import RouterDeployment, router_options

    # Ray runs its workers at niceness 15, and we run at 0.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    deployment: Any = serve.deployment
    config = RouterConfig(cpus=0.2)
    options = {"max_ongoing_requests": 256, "ray_actor_options": {"num_cpus": 0.2}}
    makes = {
        "Router": deployment(RouterDeployment, **router_options(config)).bind(
            config.model_dump(mode="json"), facts
        )
    }
    for name, wait_s in (("serve.batch, no wait", 0.0), ("serve.batch, 10 ms", 0.01)):
        made = deployment(serve_batch_class(config.max_batch, wait_s), **options)
        makes[name] = made.options(name=f"Batch{len(makes)}").bind(facts)
    try:
        serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False})
        handles = {
            name: serve.run(app, name=f"app{place}", route_prefix=None)
            for place, (name, app) in enumerate(makes.items())
        }
        return asyncio.run(_hop(handles, score, seconds, rounds, seed))
    finally:
        serve.shutdown()
        ray.shutdown()


async def _hop(
    handles: dict[str, Any], score: ScoreMany, seconds: float, rounds: int, seed: int
) -> list[Row]:
    prompts = mixed_prompts(256, seed)
    batcher = MicroBatcher(score, max_batch=RouterConfig().max_batch, max_waiting=1024)

    async def here(prompt: str) -> Score:
        return await batcher.submit(prompt, LONG_S)

    def through(handle: Any) -> Ask:
        async def ask(prompt: str) -> Any:
            found = await handle.score.remote(prompt, int(1000 * LONG_S))
            assert isinstance(found, Score), found
            return found

        return ask

    asks: dict[str, Ask] = {"this process": here}
    asks |= {name: through(handle) for name, handle in handles.items()}
    for ask in asks.values():
        await callers(ask, prompts, 4, 0.5)
    found = []
    for count in (1, 16):
        rows: dict[str, list[Row]] = {name: [] for name in asks}
        for _ in range(rounds):
            for name, ask in asks.items():
                row = await callers(ask, prompts, count, seconds)
                if name.startswith("serve.batch"):
                    row["mean_batch"] = await handles[name].mean_batch.remote()
                rows[name].append(row)
        whole = {name: merged(many) for name, many in rows.items()}
        for name, row in whole.items():
            row.pop("scores_a_cpu_second")  # of the callers' process alone
            found.append(
                {
                    "place": name,
                    **row,
                    "ratio_to_this_process": round(
                        row["p50_ms"] / whole["this process"]["p50_ms"], 2
                    ),
                }
            )
    await batcher.close()
    return found
