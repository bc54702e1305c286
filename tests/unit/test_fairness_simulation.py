"""The simulator of continuous batching: what it computes is what a hand computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.fairness import traffic
from benchmarks.fairness.asks import Ask, Part
from benchmarks.fairness.batching import Engine
from benchmarks.fairness.lines import Classes, Fcfs, Gate, Vtc
from benchmarks.fairness.machine import LLAMA_8B, Machine, Share
from benchmarks.fairness.traffic import BATCH, CRITICAL, STANDARD, Department, Flood, Traffic
from benchmarks.fairness.world import Books, Played, play
from benchmarks.routing.traffic import Trace
from deployments.metering.devices import Device

TWO = (Department("one", STANDARD, 1000, 0.5), Department("two", STANDARD, 1000, 0.5))


def asked(*rows: tuple[float, int, int, int], organisation: Sequence[Department] = TWO) -> Traffic:
    """Requests: when, department, prompt tokens, answer tokens."""
    at_s, who, prompt, answer = zip(*rows, strict=True)
    return Traffic(
        np.asarray(at_s, dtype=np.float64),
        np.asarray(prompt, dtype=np.int64),
        np.asarray(answer, dtype=np.int64),
        np.asarray(who, dtype=np.int64),
        tuple(organisation),
    )


def steady(**fields: int) -> Machine:
    """A machine on which every step takes 10 ms, whatever is in it."""
    idle = Device("none", 1e30, 1e30)
    return replace(Machine(device=idle, fixed_s=0.01), **fields)


def firsts(played: Played) -> list[float]:
    return [round(ask.first_s, 6) for ask in played.asks]


def ends(played: Played) -> list[float]:
    return [round(ask.ended_s, 6) for ask in played.asks]


# -- the machine ----------------------------------------------------------------------------------


def test_a_step_takes_the_longer_of_arithmetic_and_memory() -> None:
    shape = LLAMA_8B
    # 32 layers of 4096 x (32 + 32 + 8 + 8) x 128 attention and 3 x 4096 x 14336 feed-forward.
    assert shape.token_params == 32 * (4096 * 80 * 128 + 3 * 4096 * 14_336)
    assert shape.kv_token_bytes == 2 * 2 * 32 * 8 * 128
    machine = Machine(device=Device("d", 1e15, 1e12), flops_share=0.5, bytes_share=0.5, fixed_s=0.0)
    small = [Share(1, 1, 100.0, 101)]
    assert machine.step_s(small) == pytest.approx(
        (shape.weight_bytes + 101 * shape.kv_token_bytes) / 0.5e12
    )
    large = [Share(1, 8192, 8192 * 4096.5, 8192)]
    flops = 2 * shape.token_params * 8192 + 4 * 32 * 32 * 128 * 8192 * 4096.5 + 2 * 4096 * 128_256
    assert machine.step_s(large) == pytest.approx(flops / 0.5e15)


def test_parts_of_a_step_add_up_to_it_and_follow_the_meters_weights() -> None:
    machine = Machine()
    shares = [Share(1, 500, 500 * 250.5, 500), Share(3, 3, 3 * 701.0, 3 * 701)]
    parts, scale = machine.divide(shares, 1_000_003)
    assert sum(parts) == 1_000_003
    weigh = machine.cost.weight
    alone, answers = weigh(500, 0, 4), 3 * weigh(1, 700, 4)
    assert parts[0] / parts[1] == pytest.approx(alone / answers, rel=1e-4)
    assert scale == pytest.approx(1_000_003 / (alone + answers))


# -- one engine -----------------------------------------------------------------------------------


def test_an_answer_takes_a_step_for_its_prompt_and_one_for_each_further_token() -> None:
    played = play(asked((1.0, 0, 100, 5)), steady(), Fcfs)
    assert firsts(played) == [1.01]
    assert ends(played) == [1.05]
    assert played.steps == 5
    assert played.busy_s == pytest.approx(0.05)
    assert played.tokens == 105
    assert played.done_tokens[-1] == 100 + 4  # the moment before the last step ended


def test_a_long_prompt_is_cut_to_the_tokens_of_a_step_and_answers_go_before_it() -> None:
    # The first answers while the second's prompt of 250 is computed: 100, then 99, then 51.
    rows = asked((0.0, 0, 50, 10), (0.005, 1, 250, 1))
    played = play(rows, steady(step_tokens=100), Fcfs)
    assert firsts(played) == [0.01, 0.04]
    short = play(asked((0.0, 1, 250, 1)), steady(step_tokens=100), Fcfs)
    assert firsts(short) == [0.03]


def test_no_more_run_than_there_are_places() -> None:
    rows = asked(*((0.0, 0, 10, 3) for _ in range(5)))
    played = play(rows, steady(max_seqs=2), Fcfs)
    # The first begins alone, since nobody else is there yet; each stays for three steps.
    assert firsts(played) == [0.01, 0.02, 0.04, 0.05, 0.07]


def test_a_prompt_waits_until_the_kv_cache_has_room_for_all_of_it() -> None:
    rows = asked((0.0, 0, 60, 3), (0.0, 1, 60, 3))
    played = play(rows, steady(kv_tokens=100), Fcfs)
    assert firsts(played) == [0.01, 0.04]
    assert played.put_back == 0


def test_who_is_put_back_computes_its_tokens_again_and_loses_none() -> None:
    # Both prompts fit, both answers do not. After two steps they hold 41 + 40; nine more of two
    # tokens each leave one token of room, which is not enough for the next.
    rows = asked((0.0, 0, 40, 30), (0.0, 1, 40, 30))
    played = play(rows, steady(kv_tokens=100), Fcfs)
    assert played.put_back == 1
    assert ends(played)[0] == 0.3
    second = played.asks[1]
    # It had its first token and nine more; the prompt and those ten are computed again.
    assert (second.given, second.to_compute) == (10, 50)
    # There is room when the first has ended; a step for 50 tokens gives the eleventh.
    assert ends(played)[1] == 0.5
    assert played.tokens == 140


def test_what_requests_cost_adds_up_to_what_departments_were_charged() -> None:
    rng = np.random.default_rng(5)
    rows = asked(
        *(
            (at, int(rng.integers(2)), int(rng.integers(1, 3000)), int(rng.integers(1, 200)))
            for at in np.sort(rng.random(60) * 2).tolist()
        )
    )
    played = play(rows, Machine(kv_tokens=20_000), Fcfs)
    assert played.put_back > 0
    whole = sum(ask.cost_ns for ask in played.asks)
    assert whole == pytest.approx(played.busy_s * 1e9, rel=1e-6)
    first = sum(ask.cost_ns for ask in played.asks if ask.department == 0)
    # The last moment lies before the last step, which is one answer token.
    assert first == pytest.approx(float(played.cost_ns[-1, 0]), rel=0.02)


def test_sums_over_answers_are_what_one_by_one_gives() -> None:
    """The contexts that a step reads, kept in sums, against a count of every request."""
    machine = steady(step_tokens=64, max_seqs=8)
    engine = Engine(machine, Fcfs(), 2)
    rng = np.random.default_rng(3)
    asks = [
        Ask(n, 0.0, n % 2, STANDARD, int(rng.integers(1, 90)), int(rng.integers(1, 40)))
        for n in range(12)
    ]
    for ask in asks:
        engine.arrive(ask, 0, 0)
    now_s, given = 0.0, {ask.number: 0 for ask in asks}
    while (step := engine.begin(now_s)) is not None:
        chunked = {ask.number: (tokens, before) for ask, tokens, before in step.chunks}
        for place, department in enumerate(step.departments):
            tokens = context = 0
            pairs = 0.0
            for ask in asks:
                if ask.department != department or ask.started_s < 0 or ask.ended_s >= 0:
                    continue
                chunk, before = chunked.get(ask.number, (1, ask.prompt + given[ask.number] - 1))
                if ask.number not in chunked and not given[ask.number]:
                    continue  # its prompt has begun and got nothing in this step
                tokens += chunk
                context += before + chunk
                pairs += chunk * (before + (chunk + 1) / 2)
            share = step.shares[place]
            assert (share.tokens, share.context) == (tokens, context)
            assert share.pairs == pytest.approx(pairs)
        for ask in asks:
            ends_prompt = ask in step.finishing
            if (given[ask.number] and ask.ended_s < 0) or ends_prompt:
                given[ask.number] += 1
        now_s += 0.01
        engine.end(step, now_s)
    assert [given[ask.number] for ask in asks] == [ask.answer for ask in asks]
    assert engine.free_kv == machine.kv_tokens


def test_a_request_that_can_never_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than the KV cache"):
        play(asked((0.0, 0, 90, 20)), steady(kv_tokens=100), Fcfs)


# -- lines ----------------------------------------------------------------------------------------


def test_classes_go_before_each_other_and_fcfs_knows_none() -> None:
    organisation = (
        Department("c", CRITICAL, 1000, 0.3),
        Department("s", STANDARD, 1000, 0.3),
        Department("b", BATCH, 1000, 0.3),
    )
    rows = asked(
        (0.0, 1, 10, 2),
        (0.001, 2, 10, 1),
        (0.002, 1, 10, 1),
        (0.003, 0, 10, 1),
        organisation=organisation,
    )
    machine = steady(max_seqs=1)
    # The step under way ends first; each of the others then has a step of its own.
    assert firsts(play(rows, machine, Fcfs)) == [0.01, 0.03, 0.04, 0.05]
    assert firsts(play(rows, machine, Classes)) == [0.01, 0.05, 0.04, 0.03]


def test_plain_vtc_serves_the_department_with_the_least_counter() -> None:
    weighted = (Department("one", STANDARD, 1000, 0.5), Department("two", STANDARD, 2000, 0.5))
    line = Vtc(weighted)
    for number in range(6):
        line.arrive(Ask(number, 0.0, number % 2, STANDARD, 100, 10), 0, 0)
    engine = Engine(steady(), line, 2)
    order = []
    for _ in range(6):
        ask = line.head(0, engine)
        assert ask is not None
        line.take(ask)
        order.append(ask.department)
    # Prompts of 100 count 100 for the first department and 50 for the second.
    assert order == [0, 1, 1, 0, 1, 0]
    line.charge(0, Part(0, 0, 7, []))
    assert line.counters == [(300 + 14) * 1000, 150 * 1000]


def test_plain_vtc_lifts_a_department_that_comes_back() -> None:
    line = Vtc(TWO)
    first = Ask(0, 0.0, 0, STANDARD, 500, 10)
    line.arrive(first, 0, 0)
    line.take(first)
    # Nobody waits: the newcomer is lifted to who started last, and gets no credit for its absence.
    line.arrive(Ask(1, 0.0, 1, STANDARD, 10, 10), 0, 0)
    assert line.counters[1] == line.counters[0] == 500_000
    line.charge(0, Part(0, 0, 50, []))
    line.arrive(Ask(2, 0.0, 0, STANDARD, 10, 10), 0, 0)
    # Somebody waits, and has less: one who has more keeps it.
    assert line.counters == [600_000, 500_000]


def test_a_limit_a_minute_counts_by_department_and_window() -> None:
    gate = Gate([2, 1])
    passed = [
        gate.passes(Ask(number, at_s, who, STANDARD, 1, 1))
        for number, (at_s, who) in enumerate(
            [(0.0, 0), (1.0, 0), (2.0, 0), (3.0, 1), (59.0, 1), (60.0, 0), (61.0, 1)]
        )
    ]
    assert passed == [True, True, False, True, False, True, True]
    rows = asked((0.0, 0, 5, 1), (0.1, 0, 5, 1), (0.2, 0, 5, 1))
    played = play(rows, steady(), Fcfs, gate=Gate([2, 2]))
    assert [ask.refused for ask in played.asks] == [False, False, True]
    assert firsts(played)[2] == -1


# -- several engines ------------------------------------------------------------------------------


def test_gateways_hear_of_service_as_it_was() -> None:
    books = Books(1)
    for second in range(5):
        books.cost_ns[0] = second * 1_000_000
        books.keep(float(second))
    assert books.heard(0, -1.0) == 0
    assert books.heard(0, 2.5) == 2_000
    assert books.heard(0, 99.0) == 4_000


def test_a_bound_department_uses_one_engine_and_others_all_in_turn() -> None:
    rows = asked(*((0.0, number % 2, 10, 1) for number in range(4)))
    machine = steady(max_seqs=1)
    shared = play(rows, machine, Fcfs, engines=2)
    assert firsts(shared) == [0.01, 0.01, 0.02, 0.02]
    bound = play(rows, machine, Fcfs, engines=2, bound={0: 0, 1: 0})
    assert firsts(bound) == [0.01, 0.02, 0.03, 0.04]


def test_moments_can_be_cut_at_a_time() -> None:
    played = play(asked((0.0, 0, 10, 5)), steady(), Fcfs)
    assert played.at_s.tolist() == pytest.approx([0.0, 0.01, 0.02, 0.03, 0.04])
    cut = played.until(0.025)
    assert len(cut.at_s) == len(cut.waiting) == len(cut.cost_ns) == 3
    assert cut.asks is played.asks


# -- traffic --------------------------------------------------------------------------------------


def trace(size: int = 4_000) -> Trace:
    rng = np.random.default_rng(1)
    return Trace(
        "t",
        np.sort(rng.random(size)) * 400,
        rng.integers(1, 900, size),
        rng.integers(0, 90, size),
    )


def test_a_flood_is_ten_times_the_share_and_leaves_the_others_as_they_were() -> None:
    plain = traffic.draw(trace(), 4, span_s=400)
    flooded = traffic.draw(trace(), 4, span_s=400, floods=[Flood(3, 10.0, 100, 300)])
    others = flooded.only(flooded.department != 3)
    assert others.at_s.tolist() == plain.only(plain.department != 3).at_s.tolist()
    inside = (flooded.at_s >= 100) & (flooded.at_s < 300) & (flooded.department == 3)
    # 4,000 requests in 400 s, a fifth of them marketing's: 400 in 200 s, ten times 4,000.
    assert 3_700 < inside.sum() < 4_300
    assert (np.diff(flooded.at_s) >= 0).all()
    assert flooded.answer_tokens.min() >= 1
    again = traffic.draw(trace(), 4, span_s=400, floods=[Flood(3, 10.0, 100, 300)])
    assert again.department.tolist() == flooded.department.tolist()


def test_shuffled_asks_as_much_and_nobody_floods() -> None:
    flood = [Flood(3, 10.0, 100, 300)]
    flooded = traffic.draw(trace(), 4, span_s=400, floods=flood)
    shuffled = traffic.draw(trace(), 4, span_s=400, floods=flood, shuffled=True)
    assert shuffled.at_s.tolist() == flooded.at_s.tolist()
    share = (shuffled.department == 3).mean()
    assert 0.17 < share < 0.23 < (flooded.department == 3).mean()
