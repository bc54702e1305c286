"""Metrics of routing, over any scores and outcomes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from routing import metrics

OUTCOMES = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 4)
    ),
    min_size=1,
    max_size=30,
)


def columns(rows: list[tuple[float, float, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weak, strong, score = zip(*rows, strict=True)
    return np.asarray(score, float), np.asarray(weak), np.asarray(strong)


@given(OUTCOMES, st.randoms(use_true_random=False))
def test_figures_do_not_depend_on_the_order_of_rows(
    rows: list[tuple[float, float, int]], rng: object
) -> None:
    score, weak, strong = columns(rows)
    order = np.arange(len(rows))
    rng.shuffle(order)  # type: ignore[attr-defined]

    one = metrics.curve(score, weak, strong)
    two = metrics.curve(score[order], weak[order], strong[order])

    assert one.share == pytest.approx(two.share)
    assert one.value == pytest.approx(two.value)
    for fraction in (0.5, 0.8):
        assert metrics.cpt(one, fraction) == pytest.approx(metrics.cpt(two, fraction), nan_ok=True)


@given(OUTCOMES)
def test_ties_are_the_mean_over_their_orders(rows: list[tuple[float, float, int]]) -> None:
    score, weak, strong = columns(rows)
    assume(abs(strong.mean() - weak.mean()) > 1e-6)
    rng = np.random.default_rng(0)
    broken = [
        metrics.apgr(score + rng.permutation(len(rows)) * 1e-6, weak, strong) for _ in range(300)
    ]
    tied = metrics.apgr(score, weak, strong)
    error = np.std(broken) / np.sqrt(len(broken))
    assert abs(np.mean(broken) - tied) <= 5 * error + 1e-9


@given(OUTCOMES)
def test_a_perfect_order_beats_every_other(rows: list[tuple[float, float, int]]) -> None:
    score, weak, strong = columns(rows)
    assume(strong.mean() - weak.mean() > 1e-6)
    perfect = metrics.curve(strong - weak, weak, strong)
    other = metrics.curve(score, weak, strong)

    assert metrics.apgr(strong - weak, weak, strong) >= metrics.apgr(score, weak, strong) - 1e-12
    for share in np.linspace(0, 1, 11):
        assert perfect.at(share) >= other.at(share) - 1e-12


@given(OUTCOMES)
def test_one_score_for_all_is_random(rows: list[tuple[float, float, int]]) -> None:
    _, weak, strong = columns(rows)
    assume(strong.mean() - weak.mean() > 1e-6)
    line = metrics.curve(np.zeros(len(rows)), weak, strong)

    assert metrics.apgr(np.zeros(len(rows)), weak, strong) == pytest.approx(0.5)
    assert metrics.cpt(line, 0.5) == pytest.approx(0.5)
    assert metrics.cpt(line, 0.8) == pytest.approx(0.8)


@given(OUTCOMES)
def test_the_reverse_order_mirrors_the_area(rows: list[tuple[float, float, int]]) -> None:
    score, weak, strong = columns(rows)
    assume(abs(strong.mean() - weak.mean()) > 1e-6)
    there, back = metrics.apgr(score, weak, strong), metrics.apgr(-score, weak, strong)

    assert there + back == pytest.approx(1.0)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_random_orders_average_one_half(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weak = (rng.random(60) < 0.4).astype(float)
    strong = (rng.random(60) < 0.8).astype(float)
    assume(strong.mean() - weak.mean() > 0.1)
    found = [metrics.apgr(rng.random(60), weak, strong) for _ in range(400)]

    assert np.mean(found) == pytest.approx(0.5, abs=5 * np.std(found) / 20)


@given(OUTCOMES)
def test_bootstrap_with_every_row_once_is_the_figure_itself(
    rows: list[tuple[float, float, int]],
) -> None:
    score, weak, strong = columns(rows)
    found = metrics.bootstrap(score, weak, strong, np.ones((1, len(rows)), dtype=np.int32))
    line = metrics.curve(score, weak, strong)

    assert found["apgr"][0] == pytest.approx(metrics.apgr(score, weak, strong), nan_ok=True)
    assert found["cpt80"][0] == pytest.approx(metrics.cpt(line, 0.8), nan_ok=True)
    assert found["accuracy30"][0] == pytest.approx(line.at(0.3))
