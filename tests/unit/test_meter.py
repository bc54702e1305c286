"""Splitting the time of steps: exact sums, overlap, aborts, overrun."""

from __future__ import annotations

import math

import pytest

from deployments.metering.cost import FLAT, CostModel
from deployments.metering.meter import StepMeter, Work


def part(name: str, tokens: int = 1, context: int = 0, prompt: bool = False) -> tuple:  # type: ignore[type-arg]
    return name, tokens, context, prompt


def metered(*names: str, devices: int = 1, cost: CostModel = FLAT) -> tuple[StepMeter, list[Work]]:
    meter = StepMeter(cost, devices)
    return meter, [meter.added(name, number) for number, name in enumerate(names, 1)]


def books(meter: StepMeter, works: list[Work]) -> None:
    assert meter.busy_ns == meter.attributed_ns + meter.unattributed_ns
    assert meter.attributed_ns == sum(w.prefill_ns + w.decode_ns for w in works if w.key)


def test_a_step_is_split_by_weight() -> None:
    meter, (a, b) = metered("a", "b")
    meter.scheduled("s", 100, [part("a", 30, 0, True), part("b", 10)])
    meter.updated("s", 1100)
    assert (a.prefill_ns, a.decode_ns) == (750, 0)
    assert (b.prefill_ns, b.decode_ns) == (0, 250)
    assert meter.busy_ns == meter.attributed_ns == 1000


def test_odd_parts_still_add_up() -> None:
    names = [str(n) for n in range(7)]
    meter, works = metered(*names)
    meter.scheduled(1, 0, [part(name) for name in names])
    meter.updated(1, 100)
    assert sum(w.decode_ns for w in works) == 100
    assert {w.decode_ns for w in works} == {14, 15}


def test_devices_multiply() -> None:
    meter, (a,) = metered("a", devices=8)
    meter.scheduled(1, 0, [part("a")])
    meter.updated(1, 1000)
    assert a.decode_ns == meter.busy_ns == 8000


def test_steps_that_overlap_count_once() -> None:
    meter, (a, b) = metered("a", "b")
    meter.scheduled(1, 0, [part("a")])
    meter.scheduled(2, 10, [part("b")])
    meter.updated(1, 100)
    meter.scheduled(3, 110, [part("a")])
    meter.updated(2, 150)
    meter.updated(3, 210)
    assert meter.busy_ns == 210
    assert (a.decode_ns, b.decode_ns) == (160, 50)
    meter.scheduled(4, 1000, [part("a")])
    meter.updated(4, 1010)
    assert meter.busy_ns == 220  # idle between is nobody's
    books(meter, [a, b])


def test_an_abort_between_steps_ends_at_once() -> None:
    meter, (a,) = metered("a")
    meter.scheduled(1, 0, [part("a", 5, 0, True)])
    meter.updated(1, 50)
    assert meter.aborted(["a"])
    assert a.ended
    assert a.prefill_ns == 50
    assert meter.running == 0


def test_an_abort_in_mid_step_pays_for_the_steps_under_way() -> None:
    meter, (a, b) = metered("a", "b")
    meter.scheduled(1, 0, [part("a"), part("b")])
    meter.scheduled(2, 10, [part("a"), part("b")])
    assert not meter.aborted(["a"])
    assert not meter.updated(1, 100)
    assert not a.ended
    assert meter.updated(2, 200)
    assert a.ended
    assert a.decode_ns == b.decode_ns == 100
    meter.scheduled(3, 200, [part("b")])
    meter.updated(3, 300)
    assert a.decode_ns == 100
    books(meter, [a, b])


def test_what_runs_ahead_of_a_stop_is_nobodys() -> None:
    meter, (a, b) = metered("a", "b")
    meter.scheduled(1, 0, [part("a"), part("b")])
    meter.scheduled(2, 10, [part("a"), part("b")])
    assert meter.updated(1, 100, ["a"])
    assert a.ended
    assert a.decode_ns == 50
    meter.updated(2, 200)
    assert a.decode_ns == 50
    assert b.decode_ns == 100
    assert meter.unattributed_ns == meter.overrun_ns == 50
    books(meter, [a, b])


def test_whoever_ended_was_charged_for_the_step_it_ended_in() -> None:
    meter, (a,) = metered("a")
    meter.scheduled(1, 0, [part("a")])
    assert meter.updated(1, 70, ["a"])
    assert a.decode_ns == 70
    assert meter.changed == {a.row: a}


def test_a_request_without_a_key_is_unattributed() -> None:
    meter = StepMeter(FLAT)
    warm, paid = meter.added("warm-up", 0), meter.added("paid", 9)
    meter.scheduled(1, 0, [part("warm-up"), part("paid"), part("unheard-of")])
    meter.updated(1, 90, ["warm-up", "paid", "unheard-of"])
    assert meter.unattributed_ns == 60
    assert paid.decode_ns == meter.attributed_ns == 30
    assert meter.running == 0
    assert warm.row not in meter.changed


def test_an_empty_step_and_an_unknown_one_are_idle() -> None:
    meter, _ = metered("a")
    meter.scheduled(1, 0, [])
    meter.updated(1, 1000)
    meter.updated("never seen", 2000)
    assert meter.busy_ns == meter.unattributed_ns == 0


def test_a_clock_that_stands_still_or_slips_costs_nothing() -> None:
    meter, (a,) = metered("a")
    meter.scheduled(1, 100, [part("a")])
    meter.updated(1, 100)
    meter.scheduled(2, 100, [part("a")])
    meter.updated(2, 90)
    assert meter.busy_ns == a.decode_ns == 0


def test_cached_tokens_are_what_lay_there_at_first() -> None:
    meter, (a,) = metered("a")
    meter.scheduled(1, 0, [part("a", 10, 64, True)])
    meter.updated(1, 10)
    meter.scheduled(2, 10, [part("a", 6, 74, True)])
    meter.updated(2, 20)
    meter.scheduled(3, 20, [part("a", 80, 0, True)])  # preempted, and computed again
    meter.updated(3, 30)
    assert (a.cached_tokens, a.prefill_tokens) == (64, 96)


def test_an_id_may_come_back_while_its_abort_is_under_way() -> None:
    meter, (old,) = metered("a")
    meter.scheduled(1, 0, [part("a")])
    meter.aborted(["a"])
    new = meter.added("a", 2)
    meter.updated(1, 100, ["nobody"])
    assert new is not old
    assert (old.decode_ns, old.ended, new.decode_ns, new.ended) == (100, True, 0, False)


@pytest.mark.parametrize("span_ns", [1, 10**9, 2**53 + 1, 2**70, 10**25 + 7])
def test_huge_spans_add_up_exactly(span_ns: int) -> None:
    names = [str(n) for n in range(301)]
    meter, works = metered(*names, devices=16)
    meter.scheduled(1, 5, [part(name, 1 + n % 97, n * 1000) for n, name in enumerate(names)])
    meter.updated(1, 5 + span_ns)
    assert sum(w.decode_ns for w in works) == meter.busy_ns == 16 * span_ns
    assert all(w.decode_ns >= 0 for w in works)


@pytest.mark.parametrize("token_s", [0.0, -1.0, math.inf, math.nan, 1e-320, 1e307])
def test_weights_that_make_no_sense_split_equally_or_add_up(token_s: float) -> None:
    meter, works = metered("a", "b", "c", cost=CostModel(0.0, 0.0, token_s, 0.0, 0.0))
    meter.scheduled(1, 0, [part("a", 9), part("b", 1), part("c", 10**6)])
    meter.updated(1, 1000)
    assert sum(w.decode_ns for w in works) == 1000
    assert all(w.decode_ns >= 0 for w in works)
