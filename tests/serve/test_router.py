"""The scorer's deployment on a local Ray, asked as a gateway asks it."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray import serve

from deployments.config import RouterConfig
from deployments.routing.guarded_scorer import GuardedScorer
from deployments.routing.micro_batch import UNREACHABLE
from deployments.routing.remote_scorer import RemoteScorer
from deployments.routing.router_deployment import NAME, RouterDeployment, router_options
from deployments.routing.scoring import ScorerFacts, inspect_artefact, open_scorer, shortened
from routing.types import ScorerUnavailable

CONFIG = RouterConfig(cpus=0.1)
TIMEOUT_MS = 2000
"""Long, because a test machine is busy; that it is kept is tested while nobody answers."""
PROMPTS = [
    "Hi",
    "What is 17 * 23?",
    "Prove that every finite integral domain is a field.",
    "half \ud83d of a character",
    "x " * 200_000,
    "",
]


def application(facts: ScorerFacts) -> Any:
    deployment: Any = serve.deployment
    return deployment(RouterDeployment, **router_options(CONFIG)).bind(
        CONFIG.model_dump(mode="json"), facts
    )


@pytest.fixture(scope="module")
def facts() -> ScorerFacts:
    return inspect_artefact(Path(), None)


@pytest.fixture(scope="module")
def handle(ray_local: None, facts: ScorerFacts) -> Iterator[Any]:
    serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False})
    yield serve.run(application(facts), name="scores", route_prefix=None)
    serve.shutdown()


async def test_scores_are_those_of_the_scorer_itself(handle: Any, facts: ScorerFacts) -> None:
    here = open_scorer(facts, threads=1, gpu=False)
    scorer = RemoteScorer(handle.score.remote, TIMEOUT_MS)
    found = await asyncio.gather(*(scorer.score(prompt) for prompt in PROMPTS))
    expected = here([shortened(prompt) for prompt in PROMPTS])
    for one, other in zip(found, expected, strict=True):
        # Whoever else is in the batch, which moves the last bits of a float.
        assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(other), abs=1e-5)


async def test_many_at_once_are_all_answered_or_told_at_once(handle: Any) -> None:
    scorer = RemoteScorer(handle.score.remote, TIMEOUT_MS)
    began = time.monotonic()
    done = await asyncio.gather(
        *(scorer.score(f"How much is {n} times {n + 1}?") for n in range(300)),
        return_exceptions=True,
    )
    assert time.monotonic() - began < TIMEOUT_MS / 1000 + 1
    scored = [d for d in done if not isinstance(d, BaseException)]
    assert len(scored) >= CONFIG.max_waiting
    assert {d.reason for d in done if isinstance(d, ScorerUnavailable)} <= {"late"}
    assert len(scored) + sum(isinstance(d, ScorerUnavailable) for d in done) == 300


async def test_a_replica_that_dies_costs_no_request_more_than_the_limit(handle: Any) -> None:
    """And the next replica is found without anything being restarted."""
    notes: list[str] = []
    limit_ms = 300
    scorer = GuardedScorer(
        RemoteScorer(handle.score.remote, limit_ms), lambda result, _: notes.append(result)
    )
    (replica,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if f":{NAME}" in " ".join(process.cmdline()) and process.cmdline()[0].startswith("ray::")
    ]
    replica.kill()
    reasons, slowest, until = [], 0.0, time.monotonic() + 60
    while True:
        began = time.monotonic()
        try:
            await scorer.score("Hi")
            if reasons:
                break
        except ScorerUnavailable as error:
            reasons.append(error.reason)
            slowest = max(slowest, time.monotonic() - began)
        assert time.monotonic() < until, notes
        await asyncio.sleep(0.05)
    assert set(reasons) <= {"late", UNREACHABLE}
    assert slowest < limit_ms / 1000 + 0.5
    assert notes[-1] == "scored"


def test_another_artefact_than_that_of_the_application_refuses_to_start(
    handle: Any, facts: ScorerFacts
) -> None:
    other = dataclasses.replace(facts, digest="sha256:" + "0" * 64)
    with pytest.raises(RuntimeError, match=NAME):
        serve.run(application(other), name="other", route_prefix=None)
    status = serve.status().applications["other"].deployments[NAME]
    assert "install the same files on all nodes" in status.message
    serve.delete("other")
