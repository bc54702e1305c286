"""Our queue and its floors in the simulated engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fairness import goals, measures, scenarios, summary
from benchmarks.fairness.asks import Ask
from benchmarks.fairness.batching import Engine
from benchmarks.fairness.machine import Machine
from benchmarks.fairness.ours import LEAST_PROMPT_TOKENS, Ours
from benchmarks.fairness.traffic import (
    BATCH,
    CRITICAL,
    ORGANISATION,
    STANDARD,
    Department,
    Flood,
    Traffic,
    draw,
)
from benchmarks.fairness.world import play
from benchmarks.proof import Proof
from benchmarks.routing.traffic import Trace
from deployments.metering.devices import Device
from routing.fairness import FairSettings

TRIO = (
    Department("urgent", CRITICAL, 1000, 0.2),
    Department("plain", STANDARD, 1000, 0.4),
    Department("slow", BATCH, 1000, 0.4),
)
URGENT, PLAIN, SLOW = 0, 1, 2
SETTINGS = FairSettings(
    reserved_slots_milli=250,
    reserved_kv_milli=200,
    reserved_tokens_milli=750,
    critical_seen_us=1_000_000,
    batch_age_us=200_000,
)


def steady(**fields: int) -> Machine:
    """Every step takes 10 ms."""
    return replace(Machine(device=Device("none", 1e30, 1e30), fixed_s=0.01), **fields)


def engine(machine: Machine, *, floors: bool = True) -> Engine:
    return Engine(machine, Ours(TRIO, SETTINGS, floors=floors), len(TRIO))


class Host:
    """Feeds an engine by hand."""

    def __init__(self, machine: Machine, *, floors: bool = True) -> None:
        self.engine = engine(machine, floors=floors)
        self.now_s = 0.0
        self.asks: list[Ask] = []

    def ask(self, department: int, prompt: int, answer: int = 50) -> Ask:
        rank = TRIO[department].rank
        ask = Ask(len(self.asks), self.now_s, department, rank, prompt, answer)
        self.asks.append(ask)
        self.engine.arrive(ask, round(self.now_s * 1e6), 0)
        return ask

    def step(self) -> dict[int, int]:
        """One step; tokens of prompts computed in it, by request."""
        step = self.engine.begin(self.now_s)
        assert step is not None
        self.now_s += 0.01
        self.engine.end(step, self.now_s)
        return {ask.number: tokens for ask, tokens, _ in step.chunks}


def test_others_get_every_token_while_no_critical_request_was_seen() -> None:
    host = Host(steady(step_tokens=1000))
    host.ask(PLAIN, 1500)
    assert host.step() == {0: 1000}


def test_a_step_is_kept_short_for_a_while_after_a_critical_request() -> None:
    host = Host(steady(step_tokens=1000))
    host.ask(URGENT, 10, 1)
    assert host.step() == {0: 10}
    host.ask(PLAIN, 5000)
    assert host.step() == {1: 250}
    host.now_s += 1.1
    assert host.step() == {1: 1000}


def test_the_least_is_left_for_prompts_however_many_answers_run() -> None:
    host = Host(steady(step_tokens=400))
    for _ in range(60):
        host.ask(PLAIN, 1)
    host.step()
    host.ask(URGENT, 10, 1)
    host.step()
    host.ask(PLAIN, 900)
    # A quarter of 400 less 60 answers would be 40.
    assert host.step() == {61: LEAST_PROMPT_TOKENS}


def test_prompts_of_others_pause_beside_a_critical_one() -> None:
    host = Host(steady(step_tokens=1000))
    host.ask(PLAIN, 3000)
    assert host.step() == {0: 1000}
    host.ask(PLAIN, 100)
    host.ask(URGENT, 1200)
    assert host.step() == {2: 1000}
    assert host.step() == {2: 200}
    # Its answer takes one token of the quarter that is left to others.
    assert host.step() == {0: 249}


def test_places_are_kept_for_critical_requests_and_only_while_they_come() -> None:
    host = Host(steady(max_seqs=4, step_tokens=1000))
    host.ask(URGENT, 10, 1)
    host.step()
    for _ in range(4):
        host.ask(PLAIN, 10)
    host.step()
    assert host.engine.running == 3
    host.ask(URGENT, 10, 5)
    host.step()
    assert host.engine.running == 4
    later = Host(steady(max_seqs=4, step_tokens=1000))
    for _ in range(4):
        later.ask(PLAIN, 10)
    later.step()
    assert later.engine.running == 4


def test_room_of_the_kv_cache_is_kept_and_never_blocks_an_idle_engine() -> None:
    host = Host(steady(kv_tokens=1000, step_tokens=2000))
    host.ask(URGENT, 10, 1)
    host.step()
    host.ask(PLAIN, 500)
    host.ask(PLAIN, 320)
    host.step()
    # 500 leaves 500; 320 more would leave less than the fifth that is kept.
    assert host.engine.running == 1
    alone = Host(steady(kv_tokens=1000, step_tokens=2000))
    alone.ask(URGENT, 10, 1)
    alone.step()
    alone.ask(PLAIN, 900)
    alone.step()
    assert alone.engine.running == 1


def test_a_batch_request_starts_when_it_has_aged() -> None:
    # Standard requests come faster than the one place serves them.
    count = 60
    rows = [(0.01 * number, PLAIN) for number in range(count)]
    rows.append((0.005, SLOW))
    rows.sort()
    at_s, who = zip(*rows, strict=True)
    size = len(rows)
    traffic = Traffic(
        np.asarray(at_s),
        np.full(size, 10),
        np.full(size, 3),
        np.asarray(who, dtype=np.int64),
        TRIO,
    )
    played = play(traffic, steady(max_seqs=1), lambda: Ours(TRIO, SETTINGS))
    (slow,) = (ask for ask in played.asks if ask.department == SLOW)
    # Its department has had nothing, so it is next as soon as it counts as standard.
    assert 0.2 <= slow.started_s - slow.arrived_s <= 0.2 + 0.03 + 1e-9


def test_an_ordinary_hour_gives_nobody_credit_against_a_flood() -> None:
    """Who had little to ask does not get everything when it asks for much."""
    rng = np.random.default_rng(1)
    size = 1_500
    trace = Trace(
        "t", np.linspace(0, 60, size), rng.integers(100, 500, size), rng.integers(5, 40, size)
    )
    machine = Machine(max_seqs=32, step_tokens=512, kv_tokens=40_000)
    rate = scenarios.capacity(trace, machine)
    # Half of what the engine can do; then one department asks for ten times its share.
    slow = replace(trace, at_s=trace.at_s * (size / 60) / (0.5 * rate))
    span_s = float(slow.at_s[-1])
    flood = Flood(3, 10.0, 0.6 * span_s, span_s)
    traffic = draw(slow, 2, span_s=span_s, floods=[flood])
    played = play(traffic, machine, lambda: Ours(ORGANISATION))
    waits = measures.waiting(played, ORGANISATION, (flood.from_s, flood.to_s))
    assert waits["marketing"]["ttft_p99_s"] > 5 * waits["data-science"]["ttft_p99_s"]
    found = measures.gaps(played.until(span_s), traffic, machine)
    assert found["gpu_us"]["violations"] == 0
    assert found["stake"]["largest share of bound"] < 1


def recorded(tmp_path: Path, ratio: float) -> Path:
    def row(arm: str, scenario: str, p99: float) -> dict[str, Any]:
        gap = {"largest share of bound": 0.1, "violations": int(arm == "fcfs"), "stretches": 3}
        return {
            "trace": "t",
            "scenario": scenario,
            "arm": arm,
            "seed": 1,
            "requests": 10,
            "refused": 0,
            "tokens": 100,
            "busy_s": 1.0,
            "waiting": {"support-desk": {"ttft_p99_s": p99, "ttft_max_s": p99}},
            "throughput": {"tokens_a_busy_second": 100.0},
            "gaps": {"gpu_us": gap, "tokens": gap},
            "evenness": {"seconds": 60.0, "jain": 0.9},
        }

    rows = []
    for scenario in ("flood", "batch flood", "peak", "engines"):
        rows += [row("fcfs", scenario, 30.0), row("ours", scenario, ratio)]
        if "flood" in scenario:
            rows.append(row("alone", scenario, 1.0))
    path = tmp_path / "simulation.json"
    path.write_text(
        json.dumps({"date": "2026-12-01T", "seeds": [1], "summary": summary.summarise(rows)})
    )
    return path


def test_goals_judge_what_was_recorded(tmp_path: Path, monkeypatch: Any) -> None:
    figures: dict[str, Any] = {}
    for ratio, holds in ((1.15, True), (1.25, False)):
        monkeypatch.setattr(goals, "RECORDED", recorded(tmp_path, ratio))
        proof = Proof()
        goals.simulation(proof, figures)
        assert [result.holds for result in proof.results] == [holds, holds, True, True]
        assert all("recorded 2026-12-01" in result.measured for result in proof.results)
    assert "0 violations in 12 stretches" in proof.results[2].measured
    assert "FCFS: 4 violations" in proof.results[2].measured


def test_a_scenario_shortened_keeps_the_arms_that_goals_need() -> None:
    for scenario in scenarios.SCENARIOS:
        short = scenarios.shortened(scenario, goals.QUICK_ARMS)
        assert set(short.arms) == set(goals.QUICK_ARMS)
