"""Windows, cuts, shares and their correction."""

from __future__ import annotations

import math
import random

import pytest

from routing.cards import Target
from routing.recent import EVERYTHING, NOTHING, Cut, Recent, thousandths
from routing.targets import Correction, Steering


def filled(values: list[int], **more: int) -> Recent:
    recent = Recent(**more)
    for value in values:
        recent.add(value)
    return recent


def test_a_cut_parts_the_values_at_its_level() -> None:
    recent = filled([10, 20, 20, 30])
    assert recent.cut(0.25) == Cut(30, 1.0)
    assert recent.cut(0.5) == Cut(20, 0.5)
    assert recent.cut(0.875) == Cut(10, 0.5)
    assert recent.cut(0) is recent.cut(-1) is NOTHING
    assert recent.cut(1) is recent.cut(7) is EVERYTHING
    assert [Cut(20, 0.5).admits(*each) for each in ((21, 1), (20, 0.49), (20, 0.5), (19, 0))] == [
        True, True, False, False,
    ]  # fmt: skip


def test_the_ends_admit_nothing_and_everything() -> None:
    assert not NOTHING.admits(1000, 0.0)
    assert EVERYTHING.admits(-1000, 0.999)


def test_the_oldest_values_leave() -> None:
    recent = filled([900] * 5 + [-5] * 100, size=100)
    assert len(recent) == 100
    assert recent.cut(0.01).level == -5


def test_values_are_kept_within_bounds() -> None:
    recent = filled([5000, -5000])
    assert recent.cut(0.5).level == 1000
    assert recent.cut(0.9).level == -1000


def test_a_reference_fades_as_values_come() -> None:
    recent = Recent([0, 100], seed=4)
    assert recent.cut(0.5) == Cut(100, 1.0)
    recent.add(500)
    assert recent.cut(0.25) == Cut(500, 1.0)
    for _ in range(3):
        recent.add(500)
    assert recent.cut(0.99).level == 500


def test_an_empty_window_draws_the_share() -> None:
    cut = Recent().cut(0.3)
    assert [cut.admits(0, draw) for draw in (0.0, 0.29, 0.31)] == [True, True, False]


def test_a_reference_is_read_as_thousandths() -> None:
    assert thousandths([-2.0, 0.1234, math.nan, math.inf, 3.0]) == (-1000, 123, 1000)


@pytest.mark.parametrize(
    ("values", "part", "share"),
    [
        ([100, 100, 100, 100], 0.5, 0.5),
        ([300, 100, 0, 0], 0.75, 0.25),
        ([300, 100, 0, 0], 1.0, 0.5),
        ([300, 100, 0, 0], 0.875, 0.375),
        # Sending the last one to the large model loses: all of the sum is had without it.
        ([300, 100, -100], 1.0, 1 / 3),
        ([100, -200], 1.0, 0.0),
        ([-100, -100], 0.5, 0.0),
        ([0, 0], 0.5, 0.0),
        ([100, 50], 0.0, 0.0),
    ],
)
def test_the_least_share_that_keeps_a_part_of_the_sum(
    values: list[int], part: float, share: float
) -> None:
    assert filled(values).least_share(part) == pytest.approx(share)


def test_a_correction_makes_up_for_what_was_and_no_more() -> None:
    correction = Correction()
    for _ in range(10_000):
        correction.learn(0.3, True)
    assert -0.11 <= correction.applied(0.3) <= 0
    for _ in range(10_000):
        correction.learn(0.3, False)
    assert 1 <= correction.applied(0.3) <= 1.11


def run(target: Target, gains: list[int], pressure: float = 0.0) -> tuple[float, float]:
    """Shares achieved and aimed at over the later half."""
    steering, rng = Steering(target, range(0, 400, 4)), random.Random(1)
    large, aimed = [], []
    for gain in gains:
        aim = steering.aim(pressure)
        large.append(aim.cut.admits(gain, rng.random()))
        aimed.append(aim.share)
        steering.saw(gain)
        steering.went(large[-1], aim)
    half = len(gains) // 2
    return sum(large[half:]) / half, sum(aimed[half:]) / half


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("kind", ["normal", "constant", "rising", "falling", "two", "waves"])
def test_a_share_is_achieved_whatever_the_gains_are(share: float, kind: str) -> None:
    rng, size = random.Random(2), 4000
    gains = {
        "normal": [round(rng.gauss(200, 80)) for _ in range(size)],
        "constant": [123] * size,
        "rising": [i // 4 for i in range(size)],
        "falling": [-i // 4 for i in range(size)],
        "two": [rng.choice([0, 300]) for _ in range(size)],
        "waves": [round(300 * math.sin(i / 90)) for i in range(size)],
    }[kind]
    achieved, _ = run(Target(departments=("*",), large_share=share), gains)
    assert achieved == pytest.approx(share, abs=0.03)


def test_pressure_takes_its_part_of_the_share() -> None:
    rng = random.Random(3)
    gains = [round(rng.gauss(200, 80)) for _ in range(4000)]
    achieved, aimed = run(Target(departments=("*",), large_share=0.4), gains, 0.5)
    assert aimed == pytest.approx(0.2)
    assert achieved == pytest.approx(0.2, abs=0.03)


def test_a_quality_is_kept_with_as_few_as_need_be() -> None:
    rng = random.Random(4)
    gains = [rng.choice([0, 0, 0, 400]) for _ in range(4000)]
    achieved, aimed = run(Target(departments=("*",), quality=0.8), gains)
    assert aimed == pytest.approx(0.2, abs=0.02)
    assert achieved == pytest.approx(0.2, abs=0.03)
    harmful = [-50] * 2000
    assert run(Target(departments=("*",), quality=0.8), harmful) == (0.0, 0.0)


def test_outcomes_are_counted_over_the_newest() -> None:
    steering = Steering(Target(departments=("*",), large_share=0.5), ())
    aim = steering.aim(0.0)
    for number in range(5000):
        steering.went(number % 2 == 0, aim if number % 4 < 2 else None)
    assert steering.outcomes() == (2048, 1024, 1024, 512, 512_000)
