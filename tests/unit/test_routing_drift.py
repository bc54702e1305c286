"""Drift of prompts: a shift is seen, and chance is not taken for one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from routing.complexity import ComplexityScorer
from routing.drift import (
    LEAST_PROMPTS,
    Drift,
    Reference,
    drift,
    reference_of,
    stability_index,
)
from routing.evaluate import ARTEFACT

CENTRES = 64


def population(seed: int, prompts: int, *, moved: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Clusters and similarities; ``moved`` is the share that comes from elsewhere."""
    rng = np.random.default_rng(seed)
    usual = rng.integers(0, CENTRES, prompts)
    near = np.clip(rng.normal(0.9, 0.03, prompts), -1, 1)
    elsewhere = rng.random(prompts) < moved
    return (
        np.where(elsewhere, rng.integers(0, 6, prompts), usual),
        np.where(elsewhere, np.clip(rng.normal(0.75, 0.05, prompts), -1, 1), near),
    )


@pytest.fixture(scope="module")
def known() -> Reference:
    clusters, similarities = population(1, 20_000)
    return reference_of(np.linspace(-0.1, 0.4, 20_000), clusters, similarities, CENTRES)


def test_the_index_by_hand() -> None:
    # Large counts, so that what is added to each does not show.
    counts = np.asarray([500_000, 500_000])
    expected = (0.5 - 0.25) * math.log(0.5 / 0.25) + (0.5 - 0.75) * math.log(0.5 / 0.75)

    found = stability_index(counts, np.asarray([0.25, 0.75]))
    assert float(found) == pytest.approx(expected, abs=1e-5)
    assert float(stability_index(counts, np.asarray([0.5, 0.5]))) == 0


def test_an_empty_bin_gives_a_finite_index() -> None:
    assert math.isfinite(float(stability_index(np.asarray([0, 90]), np.asarray([0.5, 0.5]))))
    assert math.isfinite(float(stability_index(np.asarray([9, 90]), np.asarray([0.0, 1.0]))))


@pytest.mark.parametrize("prompts", [LEAST_PROMPTS, 500, 2_000, 20_000])
def test_chance_is_no_drift(known: Reference, prompts: int) -> None:
    found = [drift(*population(seed, prompts), known) for seed in range(10, 50)]

    assert {one.verdict for one in found} <= {"stable", "moving"}
    assert sum(one.verdict == "stable" for one in found) >= 38
    if prompts < 20_000:  # with as many as the reference has, its own chance counts too
        mean = np.mean([one.psi_cluster for one in found])
        assert mean == pytest.approx(found[0].expected_psi, rel=0.3)


def test_small_samples_would_alarm_without_the_floor(known: Reference) -> None:
    found = drift(*population(3, 250), known)

    assert found.psi_cluster > 0.1
    assert found.verdict == "stable"


def test_a_shift_is_seen_and_a_larger_one_is_worse(known: Reference) -> None:
    verdicts = [drift(*population(4, 2_000, moved=share), known) for share in (0.0, 0.15, 0.6)]

    assert [one.verdict for one in verdicts] == ["stable", "moving", "moved"]
    assert verdicts[0].psi_cluster < verdicts[1].psi_cluster < verdicts[2].psi_cluster
    assert verdicts[0].psi_similarity < verdicts[1].psi_similarity < verdicts[2].psi_similarity


def test_similarity_alone_can_tell(known: Reference) -> None:
    clusters, similarities = population(5, 1_000)
    found = drift(clusters, similarities - 0.1, known)

    assert found.psi_cluster < 0.2
    assert found.verdict == "moved"


def test_few_prompts_get_no_verdict(known: Reference) -> None:
    assert drift(*population(6, LEAST_PROMPTS - 1, moved=1.0), known).verdict == "too_few"
    nothing = drift([], [], known)
    assert nothing.prompts == 0
    assert nothing.verdict == "too_few"
    assert math.isnan(nothing.psi_cluster)


def test_the_same_prompts_give_the_same_figures(known: Reference) -> None:
    given = population(7, 700)

    one: Drift = drift(*given, known)
    assert one == drift(*given, known)


def test_what_does_not_fit_is_refused(known: Reference) -> None:
    with pytest.raises(ValueError, match="clusters for"):
        drift([1, 2], [0.9], known)
    with pytest.raises(ValueError, match="of another scorer"):
        drift([CENTRES], [0.9], known)
    with pytest.raises(ValueError, match="not finite"):
        drift([1], [float("nan")], known)
    with pytest.raises(ValueError, match="at least one is needed"):
        reference_of([], [], [], 4)


def test_the_reference_describes_its_prompts(known: Reference) -> None:
    assert known.gain_quantiles.shape == (101,)
    assert known.gain_quantiles[[0, 50, 100]] == pytest.approx([-0.1, 0.15, 0.4], abs=1e-4)
    assert known.cluster_share.sum() == pytest.approx(1, abs=1e-5)
    assert known.similarity_share == pytest.approx(np.full(10, 0.1), abs=0.01)
    assert known.similarity_edges[[0, -1]].tolist() == [-1, 1]


def test_the_committed_scorer_sees_prompts_unlike_its_own() -> None:
    scorer = ComplexityScorer.load(ARTEFACT)
    scores = scorer.score([f"Bestell mir bitte {i} Brötchen für morgen früh." for i in range(220)])

    assert drift(scores.cluster, scores.similarity, scorer.reference).verdict == "moved"
