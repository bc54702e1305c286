"""Metrics of routing, against a brute-force reference and cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from routing import metrics


def brute_force(score: list[float], weak: list[float], strong: list[float]) -> list[float]:
    """Mean score after sending the 0, 1, ... n highest scores to the strong model; no ties."""
    order = sorted(range(len(score)), key=lambda i: -score[i])
    means = []
    for sent in range(len(score) + 1):
        chosen = set(order[:sent])
        means.append(
            sum(strong[i] if i in chosen else weak[i] for i in range(len(score))) / len(score)
        )
    return means


def test_curve_and_area_agree_with_brute_force() -> None:
    rng = np.random.default_rng(7)
    for size in (1, 2, 5, 40):
        score = rng.permutation(size).astype(float)
        weak, strong = rng.random(size), rng.random(size)
        means = brute_force(list(score), list(weak), list(strong))
        line = metrics.curve(score, weak, strong)

        assert line.value == pytest.approx(means)
        assert line.share == pytest.approx(np.arange(size + 1) / size)
        pgr = [(mean - means[0]) / (means[-1] - means[0]) for mean in means]
        area = sum((pgr[i] + pgr[i + 1]) / 2 for i in range(size)) / size
        assert metrics.apgr(score, weak, strong) == pytest.approx(area)


def test_area_agrees_with_the_sum_over_ranks() -> None:
    rng = np.random.default_rng(8)
    score = rng.permutation(50).astype(float)
    weak = (rng.random(50) < 0.5).astype(float)
    strong = (rng.random(50) < 0.8).astype(float)
    gain = strong - weak
    rank = np.empty(50)
    rank[np.argsort(-score)] = np.arange(1, 51)

    # The mean height of a question's step over the trapezoid: 1 - (rank - 1/2) / n.
    expected = (gain * (1 - (rank - 0.5) / 50)).sum() / gain.sum()
    assert metrics.apgr(score, weak, strong) == pytest.approx(expected)


def test_four_questions_by_hand() -> None:
    # Gains 1, 0, 0, 1 in the router's order: W = .25, S = .75; PGR 0, .5, .5, .5, 1.
    score, weak, strong = [4, 3, 2, 1], [0, 1, 0, 0], [1, 1, 0, 1]
    line = metrics.curve(score, weak, strong)

    assert line.value.tolist() == [0.25, 0.5, 0.5, 0.5, 0.75]
    assert metrics.apgr(score, weak, strong) == pytest.approx(0.5)
    assert metrics.cpt(line, 0.5) == pytest.approx(0.25)
    assert metrics.cpt(line, 0.8) == pytest.approx(0.75 + 0.25 * 0.6)
    assert line.at(0.3) == pytest.approx(0.5)


def test_ties_are_a_straight_line() -> None:
    # The two highest share a score: their gains 1 and 0 come in at one half each.
    line = metrics.curve([5, 5, 1], [0, 0, 0], [1, 0, 1])

    assert line.share.tolist() == pytest.approx([0, 2 / 3, 1])
    assert line.at(1 / 3) == pytest.approx(1 / 6)


def test_models_that_tie_have_no_area() -> None:
    assert np.isnan(metrics.apgr([1, 2], [1, 0], [0, 1]))
    assert np.isnan(metrics.cpt(metrics.curve([1, 2], [1, 0], [0, 1]), 0.5))


def test_a_worse_strong_model_has_no_threshold() -> None:
    assert np.isnan(metrics.cpt(metrics.curve([1, 2], [1, 1], [0, 1]), 0.5))


def test_the_oracle_may_pass_one() -> None:
    assert metrics.apgr([1, 0, -1, 1], [0, 1, 1, 0], [1, 1, 0, 1]) > 1


@pytest.mark.parametrize(
    ("score", "weak", "strong", "says"),
    [
        ([], [], [], "no questions"),
        ([1], [1, 0], [1, 0], "1 scores for 2 weak and 2 strong"),
        ([1, float("nan")], [0, 0], [1, 1], "score 1 is not finite"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    score: list[float], weak: list[float], strong: list[float], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        metrics.curve(score, weak, strong)


def test_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(9)
    weak = (rng.random(400) < 0.5).astype(float)
    strong = np.maximum(weak, (rng.random(400) < 0.5).astype(float))
    score = strong - weak + rng.normal(0, 1, 400)
    draws = metrics.resamples(400, 300, seed=1)
    found = metrics.figures(score, weak, strong, metrics.bootstrap(score, weak, strong, draws))

    assert found.apgr.low < found.apgr.value < found.apgr.high
    assert found.apgr.high - found.apgr.low < 0.25
    assert (draws.sum(axis=1) == 400).all()
