"""Whether recent prompts still look like those that the scorer was trained on.

A scorer knows its training data and little else, so the question is not whether its scores moved
but whether the prompts did. Two marginals are compared with the training data's, which travel in
the artefact (`Reference`): which centre of the data a prompt is nearest to (what is asked), and how
near it is (how much of it was never seen). Neither holds any text.

The measure is the population stability index, ``sum((p - q) * ln(p / q))`` over the bins, with the
customary limits of 0.1 and 0.25 (N. Siddiqi, "Credit Risk Scorecards", Wiley, 2006). A sample of
an unmoved population has an index above zero, the more so the smaller it is and the more bins
there are: about ``(bins - 1) / prompts`` (B. Yurdakul and J. Naranjo, "Statistical properties of
the population stability index", Journal of Risk Model Validation 14(4), 2020). With 64 centres and
300 prompts that alone passes 0.1. So samples of the same size are drawn from the reference, what
they give on average is taken off, and what does not pass the greatest hundredth of them is no
drift, however large it looks. (That the reference is a sample too is left out; it is a large one.)

Prompts are taken as independent. The turns of one conversation are not, and neither are the
requests of a batch job over one template: pass one prompt of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from routing.heads import Arrays

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

Verdict = Literal["too_few", "stable", "moving", "moved"]

LEAST_PROMPTS = 200
"""With fewer prompts no verdict is given."""

MOVING, MOVED = 0.1, 0.25
"""Index beyond chance from which a shift is worth a look, and from which it asks for retraining."""

ROUNDS = 500
"""Samples drawn to see what chance gives."""

CHANCE = 0.99
"""Share of those samples that a shift must pass."""

PSEUDO = 0.5
"""Added to the count of each bin, so that an empty one gives no infinite index."""

SEED = 1
BINS = 10


@dataclass(frozen=True, slots=True)
class Reference(Arrays):
    """What the scorer says of its own training prompts, each once; part of the artefact."""

    gain_quantiles: Floats
    """``(101,)``: percentiles 0 to 100 of the gain under the default pair, -1 to 1, rising. What a
    threshold starts from before there is traffic to take quantiles of."""
    cluster_share: Floats
    """``(centres,)``: share of the prompts that is nearest to each centre; sums to 1."""
    similarity_edges: Floats
    """``(11,)``: bounds of the bins of similarity, rising from -1 to 1; bin i holds what is at
    least bound i and below bound i + 1, the last also 1 itself. Inside, deciles of the training
    prompts."""
    similarity_share: Floats
    """``(10,)``: share of the prompts in each bin; sums to 1."""


@dataclass(frozen=True, slots=True)
class Drift:
    """How far recent prompts are from the reference."""

    psi_cluster: float
    """Index over the nearest centres, 0 or more; NaN without prompts."""
    psi_similarity: float
    """Index over the bins of similarity, 0 or more; NaN without prompts."""
    expected_psi: float
    """What ``psi_cluster`` is on average where nothing moved, with this many prompts; NaN without
    prompts. That of ``psi_similarity`` is smaller, as there are fewer bins."""
    prompts: int
    """How many prompts were compared."""
    verdict: Verdict
    """``too_few``: no verdict. ``stable``: within chance, or too small a shift to matter.
    ``moving``: a shift of at least `MOVING` beyond chance in either marginal. ``moved``: of at
    least `MOVED`; measure the scorer on outcomes of one's own, and retrain it."""


def reference_of(
    gain: npt.ArrayLike, clusters: npt.ArrayLike, similarities: npt.ArrayLike, centres: int
) -> Reference:
    """Describe the training prompts.

    Args:
        gain: Gain under the default pair of each prompt, -1 to 1; at least one.
        clusters: Nearest centre of each, 0 to ``centres - 1``.
        similarities: Cosine to it, -1 to 1.
        centres: How many centres there are, at least 1.

    Raises:
        ValueError: No prompts, lengths that differ, or a centre that does not exist.

    """
    gains = np.asarray(gain, dtype=np.float64)
    which, near = _checked(clusters, similarities, centres)
    if len(gains) != len(which) or len(gains) == 0:
        raise ValueError(f"{len(gains)} gains for {len(which)} prompts; at least one is needed")
    edges = np.quantile(near, np.linspace(0, 1, BINS + 1)).astype(np.float32)
    edges[0], edges[-1] = -1.0, 1.0
    return Reference(
        gain_quantiles=np.quantile(gains, np.linspace(0, 1, 101)).astype(np.float32),
        cluster_share=_share(np.bincount(which, minlength=centres)),
        similarity_edges=edges,
        similarity_share=_share(_histogram(near, edges)),
    )


def drift(clusters: npt.ArrayLike, similarities: npt.ArrayLike, reference: Reference) -> Drift:
    """Compare recent prompts with the reference.

    Args:
        clusters: ``Scores.cluster`` of each prompt.
        similarities: ``Scores.similarity`` of each, -1 to 1; as many.
        reference: That of the very scorer that gave both.

    Returns:
        Indices and verdict; the same input gives the same result.

    Raises:
        ValueError: Lengths differ, a centre does not exist, or a similarity is not finite.

    """
    which, near = _checked(clusters, similarities, len(reference.cluster_share))
    prompts = len(which)
    if prompts == 0:
        nothing = float("nan")
        return Drift(nothing, nothing, nothing, 0, "too_few")
    counts = np.bincount(which, minlength=len(reference.cluster_share))
    one, by_chance, sure_one = _against_chance(counts, reference.cluster_share)
    binned = _histogram(near, reference.similarity_edges)
    two, beside, sure_two = _against_chance(binned, reference.similarity_share)
    beyond = max(one - by_chance if sure_one else 0.0, two - beside if sure_two else 0.0)
    verdict: Verdict = "moved" if beyond >= MOVED else "moving" if beyond >= MOVING else "stable"
    return Drift(one, two, by_chance, prompts, "too_few" if prompts < LEAST_PROMPTS else verdict)


def stability_index(counts: npt.NDArray[np.int64], share: npt.NDArray[np.floating]) -> Doubles:
    """Population stability index of counts against expected shares.

    Args:
        counts: ``(..., bins)``: how many fell into each bin.
        share: ``(bins,)``: expected shares; they need not sum to 1 exactly.

    Returns:
        ``(...)``, 0 or more. `PSEUDO` is added to every count, and as much to what is expected of
        that many, so equal shares give 0 and no bin gives infinity.

    """
    bins = counts.shape[-1]
    total = counts.sum(axis=-1, keepdims=True)
    expected = np.asarray(share, dtype=np.float64) / float(np.sum(share, dtype=np.float64))
    seen = (counts + PSEUDO) / (total + PSEUDO * bins)
    known = (expected * total + PSEUDO) / (total + PSEUDO * bins)
    found: Doubles = ((seen - known) * np.log(seen / known)).sum(axis=-1)
    return found


def _against_chance(
    counts: npt.NDArray[np.int64], share: npt.NDArray[np.floating]
) -> tuple[float, float, bool]:
    """The index, its mean where nothing moved, and whether it passes what chance gives."""
    exact = np.asarray(share, dtype=np.float64)
    drawn = np.random.default_rng(SEED).multinomial(
        int(counts.sum()), exact / exact.sum(), size=ROUNDS
    )
    chance = stability_index(drawn, share)
    index = float(stability_index(counts, share))
    return index, float(chance.mean()), index > float(np.quantile(chance, CHANCE))


def _checked(
    clusters: npt.ArrayLike, similarities: npt.ArrayLike, centres: int
) -> tuple[npt.NDArray[np.int64], Doubles]:
    which = np.asarray(clusters, dtype=np.int64)
    near = np.asarray(similarities, dtype=np.float64)
    if which.shape != near.shape or which.ndim != 1:
        raise ValueError(f"{which.shape} clusters for {near.shape} similarities")
    if len(which) and (which.min() < 0 or which.max() >= centres):
        raise ValueError(f"cluster {int(which.max())} of {centres}; of another scorer?")
    if not np.isfinite(near).all():
        raise ValueError("a similarity is not finite")
    return which, near


def _histogram(near: Doubles, edges: Floats) -> npt.NDArray[np.int64]:
    """How many lie in each bin; what is beyond the bounds counts for the outermost bins."""
    place = np.searchsorted(edges[1:-1].astype(np.float64), near, side="right")
    return np.bincount(place, minlength=len(edges) - 1)


def _share(counts: npt.NDArray[np.int64]) -> Floats:
    return np.asarray(counts / counts.sum(), dtype=np.float32)
