"""Everything of training that needs no gradient: questions, split, members, trust, the folder.

`routing.train` (all of it, with the fine-tuned encoder) and `routing.retrain` (an organisation's
own outcomes) share it. Needs neither PyTorch nor onnx.

As a command it describes the training prompts of an artefact that was made before artefacts did so:
``python -m routing.assembly --artefact FOLDER --data FOLDER``; everything else stays as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from routing import artefact, drift, fitting, heads
from routing.artefact import Artefact, ArtefactError
from routing.complexity import (
    HEADS_FILE,
    ComplexityScorer,
    Members,
    arrays_of,
    linear_inputs,
    nearest,
    tree_inputs,
)
from routing.dataset import DataError, Outcomes, read_folder
from routing.encoder import Cut, tokenize
from routing.evaluate import EXIT_ARTEFACT, EXIT_DATA
from routing.features import feature_matrix

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

LEARN, CHOOSE, TEST, UNSEEN = range(4)

LEFT_OUT_SOURCES = frozenset({"math_l5"})
LEFT_OUT_SUBJECTS = frozenset({("mmlu_pro", "history"), ("mmlu_pro", "philosophy")})
"""Sources and subjects that the estimate never learns from, under any pair."""

RIDGE_STRENGTH = 20_000.0
COMPONENTS = 24
CENTROIDS = 64
COMBINE_PRIOR = 300.0
LEAST_PER_CENTRE = 10
"""With fewer questions than this for each of `CENTROIDS`, there are fewer centres."""


@dataclass(frozen=True, slots=True)
class Material:
    """Rows, the distinct questions behind them, and everything computed from a question's text."""

    rows: Outcomes
    pairs: tuple[str, ...]
    pair: Indices
    """Index into ``pairs`` of each row."""
    question: Indices
    """Index of the question of each row."""
    tokens: list[list[int]]
    hand: Floats
    """Hand features as they are, ``(questions, features)``."""
    prompts: list[str]
    """The distinct questions, in order of first appearance."""
    pair_weight: Doubles
    """How much a row of each pair counts, ``(pairs,)``, above 0."""

    @property
    def weight(self) -> Doubles:
        """How much each row counts, ``(rows,)``."""
        weights: Doubles = self.pair_weight[self.pair]
        return weights


def prepare(
    rows: Outcomes,
    tokenizer: Any,
    *,
    cut: Cut | None = None,
    weights: Mapping[str, float] | None = None,
    others: float = 1.0,
) -> Material:
    """Distinct questions, in order of first appearance, and their features.

    Args:
        rows: At least one.
        tokenizer: Of the encoder.
        cut: How much of a question the encoder reads.
        weights: How much a row of each pair counts, above 0.
        others: The same of pairs that ``weights`` does not name.

    """
    places: dict[str, int] = {}
    question = np.asarray(
        [places.setdefault(prompt, len(places)) for prompt in rows.prompt], dtype=np.int64
    )
    pairs = tuple(sorted(set(rows.pair)))
    pair = np.asarray([pairs.index(name) for name in rows.pair], dtype=np.int64)
    prompts = list(places)
    each = [(weights or {}).get(name, others) for name in pairs]
    return Material(
        rows,
        pairs,
        pair,
        question,
        tokenize(tokenizer, prompts, cut),
        feature_matrix(prompts),
        prompts,
        np.asarray(each, dtype=np.float64),
    )


def bucket(key: str) -> int:
    """Place of a question in the split, 0 to 99, the same on every machine."""
    digest = hashlib.blake2b(b"fold-1\0" + key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100


def parts(material: Material, *, leave_out: bool = True) -> Indices:
    """The part of each question, ``(questions,)``: `LEARN`, `CHOOSE`, `TEST` or `UNSEEN`.

    Args:
        material: All rows and questions.
        leave_out: Whether `LEFT_OUT_SOURCES` and `LEFT_OUT_SUBJECTS` are a part of their own.

    """
    rows = material.rows
    unseen = {
        key
        for key, source, subject in zip(rows.question_key, rows.source, rows.subject, strict=True)
        if leave_out and (source in LEFT_OUT_SOURCES or (source, subject) in LEFT_OUT_SUBJECTS)
    }
    found = np.full(len(material.tokens), LEARN, dtype=np.int64)
    for question, key in zip(material.question, rows.question_key, strict=True):
        place = bucket(key)
        if key in unseen:
            found[question] = UNSEEN
        else:
            found[question] = TEST if place < 20 else CHOOSE if place < 30 else LEARN
    return found


UNKNOWN = drift.Reference(
    gain_quantiles=np.zeros(101, dtype=np.float32),
    cluster_share=np.zeros(0, dtype=np.float32),
    similarity_edges=np.linspace(-1, 1, drift.BINS + 1, dtype=np.float32),
    similarity_share=np.zeros(drift.BINS, dtype=np.float32),
)
"""Stands in until `described` has scored the training prompts."""


@dataclass(frozen=True, slots=True)
class Combination:
    """What only held-out questions can tell: weights of the members, and trust far away."""

    weights: Floats = field(default_factory=lambda: np.full((2, 3), 1 / 3, dtype=np.float32))
    far: Floats = field(default_factory=lambda: np.asarray([0.0, -1.0], dtype=np.float32))
    least_trust: Floats = field(default_factory=lambda: np.ones(1, dtype=np.float32))


@dataclass(frozen=True, slots=True)
class Fitted:
    """Everything that scores, before it is written."""

    members: Members
    tuned: heads.TunedHead
    ridge: heads.RidgeHead
    trees: heads.TreesHead
    reference: drift.Reference = UNKNOWN

    def arrays(self) -> bytes:
        """The content of the file of heads."""
        found = {
            **self.members.arrays("members"),
            **self.tuned.arrays("tuned"),
            **self.ridge.arrays("ridge"),
            **self.trees.arrays("trees"),
            **self.reference.arrays("reference"),
        }
        return packed(found)


def packed(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Arrays as the content of the file of heads."""
    found = dict(arrays)
    # Directions need no more than half precision; scales, means and thresholds keep theirs.
    for name in ("members.components", "members.centroids", "tuned.weight", "ridge.weight"):
        found[name] = found[name].astype(np.float16)
    content = io.BytesIO()
    np.savez_compressed(content, **found)  # type: ignore[arg-type]
    return content.getvalue()


@dataclass(frozen=True, slots=True)
class Kept:
    """What a fit takes over from an earlier one instead of fitting it."""

    hand_mean: Floats
    hand_deviation: Floats
    """Both ``(features,)``; the tuned heads were trained with them and need the same."""
    component_mean: Floats
    components: Floats
    ridge: Floats
    """``(pairs, inputs)``: where the ridge starts; only what it leaves over is fitted."""


def fit(
    material: Material,
    learn: Indices,
    frozen: Floats,
    head: heads.TunedHead,
    how: Combination,
    *,
    kept: Kept | None = None,
    boosting: fitting.Boosting | None = None,
) -> Fitted:
    """Fit ridge, trees, means and centres on the questions ``learn``.

    Args:
        material: All rows and questions.
        learn: Indices of the questions to fit on.
        frozen: Frozen vectors of all questions, ``(questions, width)``.
        head: The heads that were fine-tuned with the encoder.
        how: Weights of members and trust.
        kept: What is not fitted anew.
        boosting: How trees are grown.

    """
    chosen = np.isin(material.question, learn)
    question, pair = material.question[chosen], material.pair[chosen]
    rows, weight = material.rows.select(chosen), material.weight[chosen]
    general = heads.normalise(frozen)
    if kept is None:
        mean, deviation = scale_of(material.hand[learn])
        component_mean, components = fitting.principal(general[learn], COMPONENTS)
    else:
        mean, deviation = kept.hand_mean, kept.hand_deviation
        component_mean, components = kept.component_mean, kept.components
    pairs = len(material.pairs)
    mean_gain = _means(rows.gain, pair, pairs)
    members = Members(
        hand_mean=mean,
        hand_deviation=deviation,
        components=components,
        component_mean=component_mean,
        weights=how.weights,
        mean_gain=mean_gain,
        mean_half=_means((rows.weak + rows.strong) / 2, pair, pairs),
        centroids=fitting.clusters(general[learn], centres_for(len(learn)), seed=1),
        far=how.far,
        least_trust=how.least_trust,
    )
    over = rows.gain - mean_gain[pair]
    scaled = heads.standardise(material.hand, mean, deviation)[question]
    ridge = fitting.ridge(
        linear_inputs(general[question], scaled, material.hand[question]),
        over,
        pair,
        pairs,
        weight,
        RIDGE_STRENGTH,
        start=None if kept is None else kept.ridge,
    )
    trees = fitting.boost(
        tree_inputs(members, general[question], scaled, pair),
        over,
        weight,
        boosting or fitting.Boosting(),
    )
    return Fitted(members, head, ridge, trees)


def centres_for(questions: int) -> int:
    """How many centres this many questions support, 1 to `CENTROIDS`."""
    return max(1, min(CENTROIDS, questions // LEAST_PER_CENTRE))


def trust(material: Material, learn: Indices, frozen: Floats) -> tuple[Floats, Floats]:
    """How much an estimate is worth far from what was learned, from sources left out in turn.

    Each source (for the largest, each subject) is left out of a ridge fit, which then predicts it.
    The slope of outcomes on predictions says what a prediction is worth; it is taken among the
    fifth of rows that is least like the rest, relative to predictions inside the folds.

    Returns:
        Similarities between which trust falls, and the least trust.

    """
    chosen = np.isin(material.question, learn)
    question, pair = material.question[chosen], material.pair[chosen]
    rows, weight = material.rows.select(chosen), material.weight[chosen]
    mean, deviation = scale_of(material.hand[learn])
    general = heads.normalise(frozen)
    scaled = heads.standardise(material.hand, mean, deviation)
    inputs = linear_inputs(general, scaled, material.hand)[question]
    over = rows.gain - _means(rows.gain, pair, len(material.pairs))[pair]
    names = [
        f"{source}/{subject}" if source == "mmlu_pro" else source
        for source, subject in zip(rows.source, rows.subject, strict=True)
    ]
    folds = np.asarray([bucket(key) % 5 for key in rows.question_key])
    seen = _left_out(material, question, inputs, over, pair, weight, folds, general)
    unseen = _left_out(material, question, inputs, over, pair, weight, np.asarray(names), general)
    inside = _slope(seen.predicted, over, weight)
    low = unseen.similarity <= np.quantile(unseen.similarity, 0.2)
    outside = _slope(unseen.predicted[low], over[low], weight[low])
    near = float(np.quantile(seen.similarity, 0.25))
    far = min(float(np.quantile(unseen.similarity, 0.05)), near - 0.01)
    least = float(np.clip(outside / inside, 0.1, 1.0)) if inside > 0 else 1.0
    print(f"slope inside {inside:.2f}, far outside {outside:.2f}", file=sys.stderr)
    return np.asarray([near, far], dtype=np.float32), np.asarray([least], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class _LeftOut:
    predicted: Doubles
    similarity: Doubles


def _left_out(
    material: Material,
    question: Indices,
    inputs: Floats,
    over: Doubles,
    pair: Indices,
    weight: Doubles,
    group: npt.NDArray[Any],
    general: Floats,
) -> _LeftOut:
    """Predict every group from the others; a question of the group is in none of its others."""
    predicted, similarity = np.zeros(len(over)), np.zeros(len(over))
    for name in np.unique(group):
        inside = group == name
        rest = ~np.isin(question, question[inside])
        ridge = fitting.ridge(
            inputs[rest], over[rest], pair[rest], len(material.pairs), weight[rest], RIDGE_STRENGTH
        )
        predicted[inside] = ridge.gain(inputs[inside], pair[inside])
        known = general[np.unique(question[rest])]
        centres = fitting.clusters(known, centres_for(len(known)), seed=1, rounds=4)
        similarity[inside] = nearest(centres, general[question[inside]])[1]
    return _LeftOut(predicted, similarity)


def _slope(predicted: Doubles, over: Doubles, weight: Doubles) -> float:
    size = float((weight * predicted**2).sum())
    return float((weight * predicted * over).sum()) / size if size > 0 else 0.0


def scale_of(hand: Floats) -> tuple[Floats, Floats]:
    """Mean and deviation of each hand feature, ``(features,)``; no deviation is 0."""
    return hand.mean(axis=0), hand.std(axis=0) + np.float32(1e-6)


def _means(values: Doubles, pair: Indices, pairs: int) -> Floats:
    total = np.bincount(pair, values, minlength=pairs)
    count = np.maximum(np.bincount(pair, minlength=pairs), 1)
    return np.asarray(total / count, dtype=np.float32)


def weigh(
    gains: Floats, offered: Indices, over: Doubles, weight: Doubles, prior: float = COMBINE_PRIOR
) -> Floats:
    """Weights of the members for open questions and for those with options, ``(2, 3)``.

    Args:
        gains: What each member says, ``(rows, 3)``, on rows that none was fitted on.
        offered: 1 where options are offered, 0 where not, ``(rows,)``.
        over: What came out, over the mean of the pair, ``(rows,)``.
        weight: How much each row counts, ``(rows,)``.
        prior: Pull towards equal weights, in rows; all that decides where a kind has no rows.

    """
    found = []
    for kind in (0, 1):
        here = offered == kind
        if here.any():
            found.append(fitting.combination(gains[here], over[here], weight[here], prior))
        else:
            found.append(np.full(gains.shape[1], 1 / gains.shape[1], dtype=np.float32))
    return np.stack(found)


def described(checked: Artefact, prompts: Sequence[str]) -> bytes:
    """The heads of an artefact, with the reference that its training prompts give.

    Args:
        checked: The artefact, with a reference or without.
        prompts: The training prompts, each once; at least one.

    """
    arrays = arrays_of(checked.file(HEADS_FILE))
    plain = {**UNKNOWN.arrays("reference"), **arrays}
    bare = Artefact(checked.digest, checked.settings, {**checked.files, HEADS_FILE: packed(plain)})
    scorer = ComplexityScorer(bare)
    gain, cluster, similarity = [], [], []
    for start in range(0, len(prompts), 500):
        scores = scorer.score(prompts[start : start + 500])
        gain.append(scores.gain)
        cluster.append(scores.cluster)
        similarity.append(scores.similarity)
        print(f"reference {start + len(scores.gain)}/{len(prompts)}", file=sys.stderr, flush=True)
    found = drift.reference_of(
        np.concatenate(gain),
        np.concatenate(cluster),
        np.concatenate(similarity),
        len(arrays["members.centroids"]),
    )
    return packed({**arrays, **found.arrays("reference")})


def describe(folder: Path, prompts: Sequence[str]) -> str:
    """Score the training prompts with an artefact and store their reference in it.

    Returns:
        The new digest.

    Raises:
        ArtefactError: The folder cannot be used.

    """
    checked = artefact.load(folder)
    files = {**checked.files, HEADS_FILE: described(checked, prompts)}
    return artefact.save(folder, checked.settings, files)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m routing.assembly",
        description="Store in an artefact what its training prompts look like.",
    )
    parser.add_argument("--artefact", type=Path, required=True, help="folder of the scorer")
    parser.add_argument("--data", type=Path, required=True, help="outcome files it was made of")
    given = parser.parse_args(arguments)
    try:
        rows = read_folder(given.data)
        print(describe(given.artefact, list(dict.fromkeys(rows.prompt))))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_DATA
    except ArtefactError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ARTEFACT
    return 0


if __name__ == "__main__":
    sys.exit(main())
