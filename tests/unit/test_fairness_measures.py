"""What the fairness benchmarks judge by: hand-computed cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.fairness import flood, measures, summary
from benchmarks.fairness.asks import Ask
from benchmarks.fairness.lines import Fcfs, Vtc
from benchmarks.fairness.machine import Machine
from benchmarks.fairness.traffic import BATCH, STANDARD, Department, Traffic
from benchmarks.fairness.world import Played, play

TRIO = (
    Department("one", STANDARD, 1000, 0.4),
    Department("two", STANDARD, 2000, 0.4),
    Department("slow", BATCH, 1000, 0.2),
)


def played(
    at_s: list[float], cost_s: list[list[float]], waiting: list[list[int]], asks: Any = ()
) -> Played:
    cost = np.asarray(cost_s) * 1e9
    count = len(at_s)
    return Played(
        asks=list(asks),
        busy_s=1.0,
        ended_s=at_s[-1],
        tokens=0,
        put_back=0,
        steps=count,
        longest_step_s=0.1,
        at_s=np.asarray(at_s),
        cost_ns=cost.astype(np.int64),
        vtc_tokens=(cost / 1e6).astype(np.int64),
        waiting=np.asarray(waiting),
        done_tokens=np.arange(count) * 100,
        busy_at_s=np.asarray(at_s) * 0.5,
    )


def some_traffic(longest: int = 100) -> Traffic:
    ones = np.ones(1, dtype=np.int64)
    return Traffic(np.zeros(1), longest * ones, ones, 0 * ones, TRIO)


def test_stretches_are_maximal_runs() -> None:
    on = np.asarray([True, True, False, True, False, False, True])
    assert [(run.start, run.stop) for run in measures.stretches(on)] == [(0, 2), (3, 4), (6, 7)]
    assert list(measures.stretches(np.zeros(3, dtype=bool))) == []


def test_a_gap_counts_only_while_both_wait_and_is_by_weight() -> None:
    # Weighted: 1.0 and 2.0 a second while both wait; what the first gets alone does not count.
    found = measures.gaps(
        played(
            at_s=[0.0, 1.0, 2.0, 3.0, 9.0],
            cost_s=[[0, 0, 0], [1, 4, 0], [2, 8, 0], [90, 8, 0], [91, 8, 0]],
            waiting=[[1, 1, 0], [2, 1, 0], [1, 1, 0], [3, 0, 0], [1, 0, 0]],
        ),
        some_traffic(),
        Machine(kv_tokens=1000),
    )
    (row,) = found["gpu_us"]["pairs"]
    assert row["pair"] == ["one", "two"]
    assert (row["stretches"], row["backlogged_s"]) == (1, 2.0)
    # 1 - 4/2 = -1 after one second, 2 - 8/2 = -2 after two.
    assert row["largest gap"] == 2e6


def test_a_gap_is_the_widest_part_of_a_stretch_and_not_its_end() -> None:
    found = measures.gaps(
        played(
            at_s=[0.0, 1.0, 2.0, 3.0],
            cost_s=[[0, 0, 0], [3, 0, 0], [3, 10, 0], [5, 10, 0]],
            waiting=[[1, 1, 0]] * 4,
        ),
        some_traffic(),
        Machine(kv_tokens=1000),
    )
    # The difference goes 0, 3, -2, 0: from its top to its bottom.
    assert found["gpu_us"]["pairs"][0]["largest gap"] == 5e6


def test_the_bound_is_the_papers_and_what_is_over_it_is_counted() -> None:
    machine = Machine(kv_tokens=1000)
    assert measures.bound(machine, 100, (1, 2), (1000, 1000)) == 4000
    assert measures.bound(machine, 9000, (1, 2), (1000, 1000)) == 18_000
    assert measures.bound(machine, 100, (1, 2), (500, 1000)) == 8000
    run = played(
        at_s=[0.0, 1.0, 2.0],
        cost_s=[[0, 0, 0], [0.001, 9, 0], [0.002, 9.001, 0]],
        waiting=[[1, 1, 0]] * 3,
    )
    tokens = measures.gaps(run, some_traffic(), machine)["tokens"]
    # 9,000 tokens at twice the weight: 4,500 against 1,000 places of a token at price 2, twice.
    assert tokens["pairs"][0]["bound"] == 4000
    assert (tokens["violations"], tokens["stretches"]) == (1, 1)
    two = measures.gaps(run, some_traffic(), machine, engines=2, late_s=2.0)
    one = measures.gaps(run, some_traffic(), machine)
    assert two["tokens"]["pairs"][0]["bound"] == 8000
    own = one["gpu_us"]["pairs"][0]["bound"]
    # Twice the bound, and twice what two engines do in two seconds.
    assert two["gpu_us"]["pairs"][0]["bound"] == pytest.approx(2 * own + 8e6, abs=1)


def test_the_stake_is_what_started_requests_still_cost() -> None:
    asks = []
    for number, (who, started_s, cost_s) in enumerate([(0, 0.0, 3.0), (0, 1.0, 2.0), (1, 0.0, 8)]):
        ask = Ask(number, 0.0, who, STANDARD, 1, 1)
        ask.started_s, ask.cost_ns = started_s, cost_s * 1e9
        asks.append(ask)
    run = played(
        at_s=[0.0, 1.0, 2.0],
        cost_s=[[0, 0, 0], [1, 7, 0], [5, 8, 0]],
        waiting=[[1, 1, 0]] * 3,
        asks=asks,
    )
    # The first: 3, then 3 + 2 - 1, then nothing; the second: 8 at half price.
    assert measures.stake_us(run, some_traffic()) == pytest.approx(4e6)


def test_vtc_keeps_the_bound_where_first_come_first_served_does_not() -> None:
    rng = np.random.default_rng(2)
    size = 1_500
    # The first department asks for four times as much as the second.
    who = (rng.random(size) < 0.2).astype(np.int64)
    asked = Traffic(
        np.linspace(0, 30, size),
        rng.integers(50, 400, size),
        rng.integers(10, 80, size),
        who,
        (TRIO[0], Department("two", STANDARD, 1000, 0.4)),
    )
    machine = Machine(max_seqs=8, kv_tokens=4_000, step_tokens=256)
    fcfs = measures.gaps(play(asked, machine, Fcfs), asked, machine)
    vtc = measures.gaps(play(asked, machine, lambda: Vtc(asked.organisation)), asked, machine)
    assert fcfs["tokens"]["violations"] == 1
    assert vtc["tokens"]["violations"] == 0
    assert vtc["tokens"]["largest share of bound"] < 0.5


def test_jains_index() -> None:
    assert measures.jain([2.0, 2.0, 2.0]) == 1
    assert measures.jain([5.0, 0.0]) == 0.5
    assert measures.jain([1.0, 3.0]) == pytest.approx(16 / 20)
    assert measures.jain([0.0, 0.0]) == 1


def test_evenness_is_by_weight_while_all_of_the_class_wait() -> None:
    found = measures.evenness(
        played(
            at_s=[0.0, 10.0, 20.0],
            cost_s=[[0, 0, 0], [2, 4, 9], [3, 4, 9]],
            waiting=[[1, 1, 0], [1, 1, 0], [1, 0, 0]],
        ),
        TRIO,
        STANDARD,
    )
    assert found == {"seconds": 10.0, "service_s": {"one": 2.0, "two": 4.0}, "jain": 1.0}


def test_waiting_is_of_those_that_came_in_the_window() -> None:
    asks = []
    for number, (at_s, first_s) in enumerate([(0.5, 9.0), (1.0, 1.5), (1.5, 2.5), (3.0, 9.0)]):
        ask = Ask(number, at_s, 0, STANDARD, 1, 1)
        ask.first_s = ask.ended_s = first_s
        asks.append(ask)
    refused = Ask(9, 1.2, 0, STANDARD, 1, 1)
    refused.refused = True
    run = played([0.0, 9.0], [[0, 0, 0]] * 2, [[0, 0, 0]] * 2, [*asks, refused])
    found = measures.waiting(run, TRIO, (1.0, 3.0))
    assert list(found) == ["one"]
    assert (found["one"]["requests"], found["one"]["refused"]) == (3, 1)
    assert found["one"]["ttft_max_s"] == 1.0


def test_throughput_is_over_the_window() -> None:
    run = played([0.0, 1.0, 2.0, 3.0, 4.0], [[0, 0, 0]] * 5, [[0, 0, 0]] * 5)
    found = measures.throughput(run, (1.0, 3.0))
    assert found == {"tokens_a_second": 100, "tokens_a_busy_second": 200, "busy_share": 0.5}
    assert measures.lost({"tokens_a_busy_second": 98}, {"tokens_a_busy_second": 100}) == (
        pytest.approx(0.02)
    )


def test_an_interval_is_students() -> None:
    found = measures.interval([1.0, 2.0, 3.0])
    # A standard error of 1/sqrt(3), times 4.303.
    assert found["mean"] == 2
    assert found["high"] - found["mean"] == pytest.approx(4.303 / 3**0.5, abs=1e-4)
    assert found["worst"] == 3
    assert measures.interval([5.0])["low"] is None


def test_an_interval_of_ratios_is_that_of_their_logarithms() -> None:
    found = measures.interval([1.0, 4.0, 16.0], ratio=True)
    assert found["mean"] == 4
    # The logarithms' standard error is log 4 over the root of 3, times 4.303.
    half = 4 ** (4.303 / 3**0.5)
    assert found["high"] == pytest.approx(4 * half, rel=1e-4)
    assert found["low"] == pytest.approx(4 / half, abs=1e-4)


def row(arm: str, seed: int, p99: float, tokens: float) -> dict[str, Any]:
    gap = {"largest share of bound": 0.1, "violations": 1, "stretches": 2}
    return {
        "trace": "t",
        "scenario": "flood",
        "arm": arm,
        "seed": seed,
        "requests": 10,
        "refused": 0,
        "tokens": 100,
        "busy_s": 100 / tokens,
        "waiting": {"support-desk": {"ttft_p99_s": p99, "ttft_max_s": p99}},
        "throughput": {"tokens_a_busy_second": tokens},
        "gaps": {"gpu_us": gap, "tokens": gap},
        "evenness": {"seconds": 0.0, "jain": 1.0},
    }


def test_a_summary_pairs_arms_by_seed() -> None:
    rows = [
        row("alone", 1, 1.0, 5),
        row("alone", 2, 2.0, 5),
        row("fcfs", 1, 30.0, 100),
        row("fcfs", 2, 40.0, 200),
        row("ours", 1, 1.1, 99),
        row("ours", 2, 2.4, 196),
    ]
    cell = summary.summarise(rows)["t"]["flood"]["ours"]
    assert cell["critical p99 TTFT against alone"]["values"] == [1.1, 1.2]
    assert cell["critical p99 TTFT, FCFS against it"]["values"] == pytest.approx(
        [27.27273, 16.66667]
    )
    assert cell["throughput lost against FCFS"]["values"] == [0.01, 0.02]
    assert cell["gap, gpu_us"]["violations"] == 2
    assert cell["jain"] is None


def test_a_schedule_asks_for_what_its_shares_say() -> None:
    rate, span_s = 400.0, 200.0
    shots = flood.schedule(rate, span_s, 3)
    assert [shot.at_s for shot in shots] == sorted(shot.at_s for shot in shots)
    assert [shot.number for shot in shots] == list(range(len(shots)))
    for kind in flood.SHAPE:
        asked = sum(
            flood.work(shot.prompt_words, shot.answer_tokens)
            for shot in shots
            if shot.department == kind.department
        )
        assert asked / (rate * span_s) == pytest.approx(kind.share * kind.times, rel=0.15)
    assert flood.schedule(rate, span_s, 3) == shots
    assert flood.schedule(rate, span_s, 4) != shots
