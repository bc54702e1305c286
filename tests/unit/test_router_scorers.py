"""Scorers in and out of process: time limits, the breaker, counts, artefacts."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from ray import exceptions as ray_errors
from ray.serve import exceptions as serve_errors

from deployments.config import AppConfig, RouterConfig
from deployments.routing.breaker import FAILURES, LONGEST_PAUSE_S, Breaker
from deployments.routing.guarded_scorer import GuardedScorer
from deployments.routing.local_scorer import LocalScorer
from deployments.routing.micro_batch import Backlogged, MicroBatcher
from deployments.routing.remote_scorer import MAX_OPEN, RemoteScorer
from deployments.routing.router_deployment import router_options
from deployments.routing.scoring import (
    BUILT_IN,
    MAX_CHARS,
    inspect_artefact,
    open_scorer,
    shortened,
)
from governance.yaml_config import ConfigError
from routing.artefact import ArtefactError
from routing.types import Score, ScorerUnavailable

SCORE = Score(0.1, 0.5, 0.6, 1.0, 3, 0.9, "0123456789ab")


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Scripted:
    """A scorer that says what is next on its list."""

    def __init__(self, *answers: Score | BaseException) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def score(self, prompt: str) -> Score:
        self.asked += 1
        answer = self.answers.pop(0) if self.answers else SCORE
        if isinstance(answer, BaseException):
            raise answer
        return answer


async def ask(scorer: GuardedScorer, times: int = 1) -> list[str]:
    """``scored``, or why not."""
    found = []
    for _ in range(times):
        try:
            await scorer.score("hello")
            found.append("scored")
        except ScorerUnavailable as error:
            found.append(error.reason)
    return found


def guarded(inner: Scripted) -> tuple[GuardedScorer, Clock, list[str]]:
    clock, notes = Clock(), list[str]()
    return GuardedScorer(inner, lambda result, _: notes.append(result), clock), clock, notes


# -- the breaker --------------------------------------------------------------------------------


def test_the_breaker_opens_after_failures_in_a_row_only() -> None:
    breaker = Breaker(Clock())
    for _ in range(10):
        for _ in range(FAILURES - 1):
            assert breaker.admits()
            breaker.failed()
        breaker.succeeded()
    assert not breaker.is_open
    for _ in range(FAILURES):
        breaker.failed()
    assert breaker.is_open
    assert not breaker.admits()


def test_after_a_pause_one_tries_and_the_pause_grows_to_a_bound() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(FAILURES):
        breaker.failed()
    pauses = []
    for _ in range(8):
        began = clock.now
        while not breaker.admits():
            clock.now += 0.1
        pauses.append(round(clock.now - began, 1))
        assert not breaker.admits(), "one at a time"
        breaker.failed()
    assert pauses[0] <= 0.6
    assert pauses == sorted(pauses)
    assert pauses[-1] <= LONGEST_PAUSE_S + 0.2
    clock.now += LONGEST_PAUSE_S
    assert breaker.admits()
    breaker.succeeded()
    assert not breaker.is_open
    assert all(breaker.admits() for _ in range(5))


def test_stragglers_from_before_do_not_prolong_the_pause() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(FAILURES):
        breaker.failed()
    for _ in range(100):
        breaker.failed()
    clock.now += 0.6
    assert breaker.admits()


async def test_no_request_waits_for_a_scorer_that_does_not_answer() -> None:
    inner = Scripted(*[ScorerUnavailable("late")] * FAILURES)
    scorer, clock, notes = guarded(inner)
    assert await ask(scorer, FAILURES + 100) == ["late"] * (FAILURES + 100)
    assert inner.asked == FAILURES
    assert notes.count("spared") == 100
    clock.now += 0.6
    assert await ask(scorer) == ["scored"]
    assert await ask(scorer, 3) == ["scored"] * 3


async def test_poisoned_prompts_cannot_switch_scoring_off() -> None:
    inner = Scripted(*[ScorerUnavailable("failed")] * 50)
    scorer, _, notes = guarded(inner)
    assert await ask(scorer, 51) == ["failed"] * 50 + ["scored"]
    assert "spared" not in notes


async def test_being_turned_away_does_not_open_the_breaker() -> None:
    scorer, _, notes = guarded(Scripted(*[Backlogged() for _ in range(50)]))
    assert await ask(scorer, 51) == ["late"] * 50 + ["scored"]
    assert "spared" not in notes


async def test_a_cancelled_attempt_does_not_keep_the_breaker_open() -> None:
    inner = Scripted(*[ScorerUnavailable("late")] * FAILURES, asyncio.CancelledError())
    scorer, clock, _ = guarded(inner)
    await ask(scorer, FAILURES)
    clock.now += 1
    with pytest.raises(asyncio.CancelledError):
        await scorer.score("hello")
    assert await ask(scorer) == ["scored"], "the next one may try"


async def test_a_defect_costs_the_score_and_not_the_request() -> None:
    scorer, _, notes = guarded(Scripted(*[RuntimeError("secret")] * FAILURES))
    assert await ask(scorer, FAILURES + 1) == ["failed"] * (FAILURES + 1)
    assert notes == ["failed"] * FAILURES + ["spared"]


# -- in this process ----------------------------------------------------------------------------


async def test_the_local_scorer_keeps_its_time_limit() -> None:
    def work(prompts: Sequence[str]) -> list[Score]:
        time.sleep(0.2)
        return [SCORE for _ in prompts]

    scorer = LocalScorer(MicroBatcher(work, max_batch=4), timeout_ms=30)
    began = time.monotonic()
    with pytest.raises(ScorerUnavailable, match="late"):
        await scorer.score("hello")
    assert time.monotonic() - began < 0.15
    await scorer.close()


# -- in a deployment ----------------------------------------------------------------------------


async def test_the_remote_scorer_keeps_its_time_limit_and_cancels_the_call() -> None:
    ended = []

    async def hangs(prompt: str, timeout_ms: int) -> Score:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(timeout_ms)
        raise AssertionError

    scorer = RemoteScorer(hangs, timeout_ms=40)
    began = time.monotonic()
    with pytest.raises(ScorerUnavailable, match="late"):
        await scorer.score("hello")
    assert 0.03 < time.monotonic() - began < 0.5
    assert ended == [38], "the replica is told a little less"


@pytest.mark.parametrize(
    ("answer", "reason", "at_once"),
    [
        (serve_errors.DeploymentUnavailableError("Router"), "unreachable", False),
        (ray_errors.ActorDiedError(), "unreachable", False),
        (serve_errors.BackPressureError(1, 1), "late", True),
        ("backlogged", "late", True),
        ("late", "late", False),
        ("failed", "failed", False),
    ],
)
async def test_what_a_call_ends_with_becomes_a_reason(
    answer: str | Exception, reason: str, at_once: bool
) -> None:
    async def call(prompt: str, timeout_ms: int) -> str:
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(ScorerUnavailable) as caught:
        await RemoteScorer(call, 100).score("hello")
    assert caught.value.reason == reason
    assert isinstance(caught.value, Backlogged) is at_once


async def test_calls_on_their_way_are_bounded_and_cancelling_frees_them() -> None:
    async def hangs(prompt: str, timeout_ms: int) -> Score:
        await asyncio.Event().wait()
        raise AssertionError

    scorer = RemoteScorer(hangs, timeout_ms=60_000)
    for _ in range(3):
        tasks = [asyncio.create_task(scorer.score("x")) for _ in range(MAX_OPEN)]
        await asyncio.sleep(0)
        with pytest.raises(Backlogged):
            await scorer.score("x")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_warming_up_makes_nobody_wait_and_may_fail() -> None:
    asked = []

    async def call(prompt: str, timeout_ms: int) -> Score:
        asked.append(timeout_ms)
        raise serve_errors.DeploymentUnavailableError("Router")

    scorer = RemoteScorer(call, 100)
    scorer.warm_up()
    assert not asked
    await asyncio.sleep(0)
    assert asked == [60_000]
    await asyncio.sleep(0)
    await scorer.close()


async def test_a_huge_prompt_does_not_travel() -> None:
    seen = []

    async def call(prompt: str, timeout_ms: int) -> Score:
        seen.append(prompt)
        return SCORE

    await RemoteScorer(call, 100).score("begin " + "x" * (8 << 20) + " end")
    (sent,) = seen
    assert len(sent) == MAX_CHARS
    assert sent.startswith("begin ")
    assert sent.endswith(" end")


def test_what_is_sent_can_be_encoded() -> None:
    assert shortened("plain") == "plain"
    assert shortened("grüße 👋") == "grüße 👋"
    assert shortened("half \ud83d of it") == "half ? of it"
    assert len(shortened("\ud83d" * (MAX_CHARS + 1)).encode()) == MAX_CHARS


# -- the artefact -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUILT_IN, tmp_path / "scorer"))


def test_the_built_in_scorer_scores_as_it_says(tmp_path: Path) -> None:
    facts = inspect_artefact(tmp_path, None)
    score = open_scorer(facts, threads=1, gpu=False)
    hard = "Prove that every finite integral domain is a field, and give a counterexample."
    found = score(["Hi", hard, "", "\x00", "x" * 20_000, "half \ud83d"])
    assert len(found) == 6
    assert {each.scorer for each in found} == {facts.digest.removeprefix("sha256:")[:12]}
    assert all(-1 <= s.gain <= 1 and 0 <= s.trust <= 1 and s.cluster >= 0 for s in found)
    assert found[1].gain > found[0].gain
    assert type(found[0].gain) is float
    assert len(facts.quantiles) == 101
    assert np.all(np.diff(facts.quantiles) >= 0)
    assert score([]) == []


def test_another_artefact_is_named_by_its_folder(folder: Path) -> None:
    facts = inspect_artefact(folder.parent, "scorer")
    assert facts.folder == str(folder)
    assert facts.digest == inspect_artefact(folder, None).digest
    assert len(open_scorer(facts, threads=1, gpu=False)(["Hi"])) == 1


def test_a_changed_artefact_is_refused_by_name(folder: Path) -> None:
    facts = inspect_artefact(folder.parent, "scorer")
    heads = folder / "heads.npz"
    raw = bytearray(heads.read_bytes())
    raw[1000] ^= 1
    heads.write_bytes(raw)
    for attempt in (
        lambda: inspect_artefact(folder.parent, "scorer"),
        lambda: open_scorer(facts, threads=1, gpu=False),
    ):
        with pytest.raises(ArtefactError, match=r"heads\.npz: is not the file"):
            attempt()


def test_a_node_with_another_artefact_refuses_to_score(folder: Path) -> None:
    facts = inspect_artefact(folder.parent, "scorer")
    manifest = folder / "manifest.json"
    stated = json.loads(manifest.read_text())
    stated["settings"]["seed_of_another_day"] = 7
    manifest.write_text(json.dumps(stated))
    with pytest.raises(ArtefactError, match="same files on all nodes"):
        open_scorer(facts, threads=1, gpu=False)


def test_a_gpu_that_onnxruntime_cannot_use_is_an_error_that_says_what_to_do() -> None:
    facts = inspect_artefact(Path(), None)
    with pytest.raises(ConfigError, match=r"router\.gpus: .* install onnxruntime-gpu"):
        open_scorer(facts, threads=1, gpu=True)


def test_who_does_not_score_does_not_import_the_engine_of_scoring() -> None:
    script = (
        "import sys, deployments.app\n"
        "from pathlib import Path\n"
        "from deployments.routing.scoring import inspect_artefact\n"
        "inspect_artefact(Path(), None)\n"
        "loaded = {'onnxruntime', 'tokenizers', 'torch', 'vllm'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# -- configuration ------------------------------------------------------------------------------


def test_options_of_the_deployment() -> None:
    config = RouterConfig.model_validate(
        {"replicas": {"min": 1, "max": 4, "target_load": 4}, "cpus": 2, "gpus": 0.5}
    )
    options = router_options(config)
    assert options["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0.5}
    assert options["autoscaling_config"]["max_replicas"] == 4
    assert options["max_ongoing_requests"] > config.max_waiting
    assert "num_gpus" not in router_options(RouterConfig())["ray_actor_options"]


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        ({"place": "gateway", "gpus": 1}, "a gateway has no GPU"),
        ({"replicas": {"min": 0, "max": 1}}, "at least 1"),
        ({"max_batch": 0}, "greater than or equal to 1"),
        ({"place": "elsewhere"}, "'gateway' or 'deployment'"),
    ],
)
def test_what_cannot_be_is_refused(router: dict[str, object], reason: str) -> None:
    model = {"id": "a", "tier": "small", "source": "./a", "context_tokens": 64}
    with pytest.raises(ValueError, match=reason):
        AppConfig.model_validate({"mode": "local", "models": [model], "router": router})


def test_auto_is_nobodys_name() -> None:
    model = {"id": "auto", "tier": "small", "source": "./a", "context_tokens": 64}
    with pytest.raises(ValueError, match="no model may be called 'auto'"):
        AppConfig.model_validate({"mode": "local", "models": [model]})
