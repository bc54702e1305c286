"""Ridge, trees, weights of members: against closed forms and planted signals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from routing import fitting
from routing.artefact import ArtefactError
from routing.heads import RidgeHead, TreesHead, gelu, normalise, sigmoid, standardise


def planted(rows: int = 1_500, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, gain and pair: a step in input 0, a slope in input 1 that differs between pairs."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(rows, 6)).astype(np.float32)
    pair = rng.integers(0, 2, rows)
    gain = 0.5 * (inputs[:, 0] > 0.3) + np.where(pair == 0, 0.3, -0.1) * inputs[:, 1]
    gain = gain - np.asarray([gain[pair == k].mean() for k in (0, 1)])[pair]
    return inputs, gain + rng.normal(0, 0.1, rows), pair


def test_ridge_is_the_closed_form() -> None:
    inputs, gain, _ = planted()
    pair, weight = np.zeros(len(gain), dtype=np.int64), np.ones(len(gain))
    head = fitting.ridge(inputs, gain, pair, 1, weight, strength=1e-6)

    centred = inputs - inputs.mean(axis=0)
    expected = np.linalg.lstsq(centred, gain, rcond=None)[0]
    assert head.weight[0] == pytest.approx(expected, abs=1e-4)
    assert head.gain(inputs, pair) == pytest.approx(centred @ expected, abs=1e-4)


def test_ridge_learns_what_pairs_share_and_what_is_their_own() -> None:
    inputs, gain, pair = planted()
    head = fitting.ridge(inputs, gain, pair, 3, np.ones(len(gain)), strength=20)

    assert head.weight[0, 1] == pytest.approx(0.3, abs=0.05)
    assert head.weight[1, 1] == pytest.approx(-0.1, abs=0.05)
    # A pair without rows gets what the others share.
    assert min(head.weight[:2, 1]) < head.weight[2, 1] < max(head.weight[:2, 1])


def test_ridge_adds_to_where_it_starts() -> None:
    inputs, gain, _ = planted()
    pair, weight = np.zeros(len(gain), dtype=np.int64), np.ones(len(gain))
    free = fitting.ridge(inputs, gain, pair, 1, weight, strength=1e-6)
    held = fitting.ridge(inputs, gain, pair, 1, weight, strength=1e9, start=free.weight)
    moved = fitting.ridge(inputs, gain, pair, 1, weight, strength=1e-6, start=free.weight + 1)

    assert held.weight == pytest.approx(free.weight, abs=1e-4)
    assert moved.weight == pytest.approx(free.weight, abs=1e-3)


def test_calibration_finds_slope_and_offset_and_few_rows_change_little() -> None:
    rng = np.random.default_rng(7)
    logits = rng.normal(0, 2, 20_000)
    came = (rng.random(20_000) < 1 / (1 + np.exp(-(0.5 * logits - 1)))).astype(float)

    assert fitting.platt(logits, came, 40) == pytest.approx((0.5, -1), abs=0.05)
    assert fitting.platt(logits[:3], came[:3], 1e6) == pytest.approx((1, 0), abs=1e-3)
    assert fitting.platt(logits[:0], came[:0], 40) == pytest.approx((1, 0))
    # An order is never turned round.
    assert fitting.platt(logits, 1 - came, 40)[0] == pytest.approx(0.05)


def test_members_that_say_nothing_weigh_the_same() -> None:
    slopes = fitting.combination(np.zeros((9, 3), dtype=np.float32), np.ones(9), np.ones(9), 300)

    assert slopes == pytest.approx([1 / 3] * 3)


def test_trees_find_the_step_and_score_new_rows() -> None:
    inputs, gain, pair = planted()
    how = fitting.Boosting(trees=80, depth=3, rate=0.2, least_leaf=20, shrink=1, inputs=1.0)
    head = fitting.boost(
        np.column_stack([inputs, pair]).astype(np.float32), gain, np.ones(len(gain)), how
    )
    fresh, target, other = planted(seed=2)
    found = head.gain(np.column_stack([fresh, other]).astype(np.float32))

    assert np.corrcoef(found, target)[0, 1] > 0.9


def test_every_row_ends_in_a_leaf_with_enough_rows() -> None:
    inputs, gain, _ = planted()
    how = fitting.Boosting(trees=1, depth=3, least_leaf=100, shrink=0.0, rows=1.0, inputs=1.0)
    head = fitting.boost(inputs, gain, np.ones(len(gain)), how)
    values, counts = np.unique(head.gain(inputs), return_counts=True)

    assert len(values) > 2
    assert counts.min() >= 100
    # Without shrinkage a leaf holds the mean of its rows, times the rate.
    for value in values:
        mean = gain[head.gain(inputs) == value].mean()
        assert value == pytest.approx(how.rate * mean, abs=1e-6)


def test_fitting_twice_gives_the_same_arrays() -> None:
    inputs, gain, _ = planted()
    weight = np.ones(len(gain))
    one, two = (
        fitting.boost(inputs, gain, weight, fitting.Boosting(trees=5)).arrays("t") for _ in range(2)
    )
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert np.array_equal(fitting.clusters(inputs, 8, seed=3), fitting.clusters(inputs, 8, seed=3))


def test_principal_parts_are_white() -> None:
    inputs, _, _ = planted()
    skewed = (inputs * np.arange(1, 7)).astype(np.float32)
    mean, axes = fitting.principal(skewed, 3)
    parts = (skewed - mean) @ axes.T

    assert np.cov(parts.T) == pytest.approx(np.eye(3), abs=0.01)


def test_weights_of_members_are_not_negative_and_prefer_the_better() -> None:
    rng = np.random.default_rng(4)
    gain = rng.normal(size=4_000)
    good, bad = gain + rng.normal(0, 1, 4_000), -gain + rng.normal(0, 3, 4_000)
    members = np.stack([good, rng.normal(size=4_000), bad], axis=1)
    slopes = fitting.combination(members, gain, np.ones(4_000), prior=10)

    assert slopes[0] == pytest.approx(0.5, abs=0.05)
    assert slopes[1] == pytest.approx(0, abs=0.05)
    assert slopes[2] == 0


def test_few_rows_leave_members_near_their_mean() -> None:
    rng = np.random.default_rng(5)
    members = rng.normal(size=(5, 3))
    slopes = fitting.combination(members, rng.normal(size=5), np.ones(5), prior=1e6)

    assert slopes == pytest.approx([1 / 3] * 3, abs=0.01)


def test_activations_are_exact() -> None:
    values = np.linspace(-6, 6, 101).astype(np.float32)

    assert gelu(values) == pytest.approx(
        [value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in values.tolist()], abs=2e-6
    )
    assert sigmoid(np.asarray([-1e4, 0, 1e4], dtype=np.float32)).tolist() == [0, 0.5, 1]


def test_scaling_has_the_stated_moments() -> None:
    rng = np.random.default_rng(6)
    rows = normalise(rng.normal(3, 7, (5, 384)).astype(np.float32))

    assert rows.mean(axis=1) == pytest.approx(np.zeros(5), abs=1e-5)
    assert rows.std(axis=1) == pytest.approx(np.ones(5), abs=1e-4)
    one = np.ones(1, dtype=np.float32)
    assert standardise(np.asarray([[99.0]], dtype=np.float32), one, one).tolist() == [[4.0]]


def test_heads_survive_storage_and_miss_nothing() -> None:
    inputs, gain, _ = planted()
    head = fitting.boost(inputs, gain, np.ones(len(gain)), fitting.Boosting(trees=3))
    again = TreesHead.read(head.arrays("trees"), "trees")

    assert np.array_equal(again.gain(inputs[:9]), head.gain(inputs[:9]))
    with pytest.raises(ArtefactError, match=r"no array ridge\.centre"):
        RidgeHead.read(head.arrays("trees"), "ridge")
