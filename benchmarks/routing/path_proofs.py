"""Proofs of routing through the whole request path: late scores, fallback, cascade, shadows."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.proof import Proof
from benchmarks.routing import online
from benchmarks.routing.request_path import Answered, InstantEngines, request_path
from deployments.routing.guarded_scorer import GuardedScorer
from deployments.routing.local_scorer import LocalScorer
from deployments.routing.micro_batch import MicroBatcher
from governance.audit.turns import TurnAudit
from governance.budget.prices import COLD
from governance.errors import EngineFailed, EngineUnavailable
from governance.nulls import NullLedger
from governance.ports import AuditLog, Policy
from governance.routes import AutoRouting
from governance.shadow import ShadowRunner
from governance.shadow_tap import ShadowTap
from routing.auto import AutoRouter
from routing.cards import Cascade, RoutingConfig
from routing.types import Score, Scorer, ScorerUnavailable

TIMEOUT_MS = 40
SHADOWED = 30
REFUSAL = "I'm sorry, but I can't help with that."


def late(proof: Proof, figures: dict[str, Any]) -> None:
    """A score that does not come in time, and one that cannot be had."""
    found: dict[str, Any] = {}
    figures["late"] = found
    for why, scorer in (("late", _Slow()), ("unreachable", _Gone())):
        with proof.goal(
            f"a score that is {why}: the default tier answers, header and record say why, and at "
            f"least 19 of 20 requests wait {TIMEOUT_MS} ms for it at most (10 ms allowed)"
        ) as done:
            answers, records = asyncio.run(_late(scorer))
            reason = f"auto:small default scorer {why}"
            waited = [(record[0]["route"].get("score_us") or 0) / 1000 for record in records]
            prompt = sum(value <= TIMEOUT_MS + 10 for value in waited)
            right = sum(
                answer.status == 200
                and answer.headers["x-gatehouse-route-reason"] == reason
                and bool(record)
                and all(one["route_reason"] == reason for one in record)
                and all(one["route"].get("default") for one in record)
                for answer, record in zip(answers, records, strict=True)
            )
            found[why] = {"waited_ms": waited, "right": right}
            done(
                f"{right} of {len(answers)} with '{reason}', {prompt} in time, longest wait "
                f"{max(waited):.0f} ms",
                right == len(answers) and prompt >= len(answers) - 1,
            )


class _Slow:
    """Takes a second for each call, in the thread in which scores are made."""

    def __call__(self, prompts: Sequence[str]) -> list[Score]:
        time.sleep(1.0)
        return [Score(0.9, 0.1, 1.0, 1.0, 0, 1.0, "slow") for _ in prompts]


class _Gone:
    """Nobody is there."""

    def __call__(self, prompts: Sequence[str]) -> list[Score]:
        raise ScorerUnavailable("unreachable")


async def _late(score: Any) -> tuple[list[Answered], list[list[dict[str, Any]]]]:
    """Twenty requests through the whole path; what clients got, and what is on record."""
    batcher = MicroBatcher(score, max_batch=8, max_waiting=64)
    inner: Scorer = LocalScorer(batcher, TIMEOUT_MS) if isinstance(score, _Slow) else _Refusing()
    guarded = GuardedScorer(inner, lambda result, took_us: None)
    with tempfile.TemporaryDirectory() as folder:
        engines = InstantEngines()
        config = RoutingConfig(score_timeout_ms=TIMEOUT_MS)
        async with request_path(Path(folder), auto(guarded, config, engines), engines) as path:
            await path.ask("warm up")
            answers = [await path.ask(f"question {number}") for number in range(20)]
            records = [path.records(answer.request_id) for answer in answers]
    await batcher.close()
    return answers, records


class _Refusing:
    """A scorer that cannot be reached."""

    async def score(self, prompt: str) -> Score:
        """Refuse."""
        raise ScorerUnavailable("unreachable")


class _Says:
    """A scorer that says of each prompt what stands in front of it: ``easy`` or ``hard``."""

    async def score(self, prompt: str) -> Score:
        """High for ``hard``."""
        gain = 0.9 if prompt.startswith("hard") else -0.5
        return Score(gain, 0.5, 0.5, 1.0, 0, 1.0, "says")


def auto(scorer: Scorer, config: RoutingConfig, engines: InstantEngines) -> AutoRouting:
    """The platform's router over a scorer."""
    reference = [number / 100 - 0.5 for number in range(101)]
    router = AutoRouter(online.CARDS, config, scorer, reference, time.monotonic)
    clock = lambda: time.time_ns() // 1000  # noqa: E731
    choices = frozenset(card.id for card in online.CARDS)
    return AutoRouting(router, engines.load, lambda base: COLD, online.CARDS, choices, clock)


def fallback(proof: Proof, figures: dict[str, Any]) -> None:
    """The other model answers while nothing was released, and never afterwards."""
    cases = {
        "small, before it took the request": ("easy", "before", "small", "large"),
        "small, after it took the request": ("easy", "taken", "small", "large"),
        "large, before it took the request": ("hard", "before", "large", "small"),
        "large, after it took the request": ("hard", "taken", "large", "small"),
    }
    with proof.goal(
        "a model that fails before its first piece: the other one answers, header and record say so"
    ) as done:
        found = {
            f"{name}{', streamed' if stream else ''}": asyncio.run(_fallback(*case, stream))
            for name, case in cases.items()
            for stream in (False, True)
        }
        figures["fallback"] = found
        wrong = {name: why for name, why in found.items() if why}
        done(f"{len(found) - len(wrong)} of {len(found)} cases{_but(wrong)}", not wrong)
    with proof.goal(
        "a model that fails after its first piece: an error, and no second model"
    ) as done:
        why = asyncio.run(_midway())
        done(why or "error event, one model asked, no [DONE]", not why)


async def _fallback(prompt: str, when: str, broken: str, other: str, stream: bool) -> str:
    """What is wrong with one case; empty where nothing is."""
    error = EngineUnavailable() if when == "before" else EngineFailed()
    engines = InstantEngines(**{when: {broken: error}})
    with tempfile.TemporaryDirectory() as folder:
        router = auto(_Says(), RoutingConfig(score_timeout_ms=1000), engines)
        async with request_path(Path(folder), router, engines) as path:
            answer = await path.ask(f"{prompt} question", stream=stream)
            records = path.records(answer.request_id)
    said = [
        (record["event_type"], record["response_model"], record["route"].get("superseded"))
        for record in records
    ]
    expected = [
        ("inference.decided", broken, None),
        ("inference.completed", broken, "fallback"),
        ("inference.decided", other, None),
        ("inference.completed", other, None),
    ]
    checks = {
        "status": answer.status == 200,
        "text": set(answer.text.split()) == {other},
        "model header": answer.headers["x-gatehouse-model"] == other,
        "attempts header": answer.headers.get("x-gatehouse-attempts")
        == f"{broken}={error.code},{other}",
        "records": said == expected,
    }
    return ", ".join(name for name, holds in checks.items() if not holds)


async def _midway() -> str:
    engines = InstantEngines(midway={"small": EngineFailed()})
    with tempfile.TemporaryDirectory() as folder:
        router = auto(_Says(), RoutingConfig(score_timeout_ms=1000), engines)
        async with request_path(Path(folder), router, engines) as path:
            answer = await path.ask("easy question", stream=True)
    checks = {
        "an error event": b'"error"' in answer.body,
        "one model": engines.calls == ["small"],
        "no end": b"[DONE]" not in answer.body,
    }
    return ", ".join(f"not {name}" for name, holds in checks.items() if not holds)


def cascade(proof: Proof, figures: dict[str, Any]) -> None:
    """A cascade shows its client one answer."""
    with proof.goal(
        "a cascade gives its client one answer: the large model's where the small one's was given "
        "up, else the small one's; both are on record"
    ) as done:
        found = {
            f"{name}{', streamed' if stream else ''}": asyncio.run(_cascade(text, stream))
            for name, text in (("given up", REFUSAL), ("kept", "small small small"))
            for stream in (False, True)
        }
        figures["cascade"] = found
        wrong = {name: why for name, why in found.items() if why}
        done(f"{len(found) - len(wrong)} of {len(found)} cases{_but(wrong)}", not wrong)


async def _cascade(text: str, stream: bool) -> str:
    """What is wrong with one case; empty where nothing is."""
    engines = InstantEngines(answers={"small": text})
    config = RoutingConfig(
        score_timeout_ms=1000,
        cascade=Cascade(departments=("*",), escalate_share=0.1, hold_tokens=64),
    )
    with tempfile.TemporaryDirectory() as folder:
        async with request_path(Path(folder), auto(_Says(), config, engines), engines) as path:
            answer = await path.ask("easy question", stream=stream)
            records = path.records(answer.request_id)
    given_up = text == REFUSAL
    models = ["small", "large"] if given_up else ["small"]
    ends = [r for r in records if r["event_type"] == "inference.completed"]
    checks = {
        "status": answer.status == 200,
        "text": set(answer.text.split()) == {models[-1]},
        "model header": answer.headers["x-gatehouse-model"] == models[-1],
        "engines asked": engines.calls == models,
        "log-probabilities left out": b'"logprob":' not in answer.body,
        "records": [r["response_model"] for r in ends] == models,
        "superseded": [r["route"].get("superseded") for r in ends]
        == (["cascade", None] if given_up else [None]),
        "content of both": all(r["response_commit"] for r in ends),
    }
    return ", ".join(name for name, holds in checks.items() if not holds)


def _but(wrong: dict[str, str]) -> str:
    return "".join(f"; {name}: {why}" for name, why in wrong.items())


def shadow(proof: Proof, figures: dict[str, Any]) -> None:
    """Shadow traffic waits for an idle moment, and then compares what it should."""
    with proof.goal(
        "with every small answer offered for comparison: nothing runs while the large model works "
        "for others, and a request takes at most 0.2 ms more CPU (median); once it is idle each "
        "comparison is on record"
    ) as done:
        rounds = [(tapped, asyncio.run(_shadow(tapped))) for tapped in (False, True) * 4]
        took = {
            tapped: [float(np.median(found[0])) for which, found in rounds if which is tapped]
            for tapped in (False, True)
        }
        early, events = rounds[-1][1][1:]
        agreed = [event["shadow"]["agreement_milli"] for event in events]
        figures["shadow"] = {
            "cpu_without_ms": took[False],
            "cpu_with_ms": took[True],
            "agreed": agreed,
        }
        more = min(took[True]) - min(took[False])
        done(
            f"{early} runs early, {more:+.2f} ms on {min(took[False]):.2f}, {len(agreed)} of "
            f"{SHADOWED} compared",
            early == 0 and more <= 0.2 and len(agreed) == SHADOWED,
        )


async def _shadow(tapped: bool) -> tuple[list[float], int, list[dict[str, Any]]]:
    """CPU of requests in ms, runs while the large model was busy, details of comparisons."""
    engines = InstantEngines(answers={"small": "the answer is 4", "large": "It is 4. #### 4"})
    runners: list[ShadowRunner] = []

    def tap(audit: TurnAudit, policy: Policy) -> AuditLog:
        runner = ShadowRunner(
            share_milli=1000,
            account="platform",
            max_per_minute=600,
            max_answer_tokens=64,
            policy=policy,
            ledger=NullLedger(),
            audit=audit,
            shadow_log=audit,
            engine=engines,
            clock=lambda: time.time_ns() // 1000,
            monotonic=time.monotonic,
        )
        runner.start()
        runners.append(runner)
        return ShadowTap(audit, runner)

    with tempfile.TemporaryDirectory() as folder:
        router = auto(_Says(), RoutingConfig(score_timeout_ms=1000), engines)
        whole = request_path(Path(folder), router, engines, tap if tapped else None)
        async with whole as path:
            for _ in range(5):
                await path.ask("hard warm-up")
            engines.calls.clear()
            engines.running["large"] = 3
            asked = range(SHADOWED)
            answers = [await path.ask(f"easy: what is {n} - {n} + 4?") for n in asked]
            early = engines.calls.count("large")
            engines.running.clear()
            for runner in runners:
                async with asyncio.timeout(20):
                    while runner.stats.compared + runner.stats.dropped.total() < SHADOWED:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                await runner.close()
            records = [r for answer in answers for r in path.records(answer.request_id)]
    events = [json.loads(r["detail"]) for r in records if r["event_type"] == "route.shadow"]
    return [answer.cpu_ms for answer in answers], early, events


PARTS: dict[str, Callable[[Proof, dict[str, Any]], None]] = {
    "late": late,
    "fallback": fallback,
    "cascade": cascade,
    "shadow": shadow,
}
