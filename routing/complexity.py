"""The complexity scorer: how likely a weak and a strong model are to answer a prompt correctly.

    prompt -> hand features -----------------------> trees, ridge, tuned head
           -> encoder: frozen, tuned vector -------> ridge, tuned head

Three members estimate the gain of the strong model, that is P(strong right) - P(weak right):

1. the heads that were fine-tuned together with the encoder;
2. ridge regression on the encoder's frozen lower layer and the hand features;
3. boosted trees on the hand features and principal components of the frozen vector.

Their sum, weighted on questions that none of them had seen (apart for open questions and for those
with options), is shrunk towards the mean gain of the pair of models, the more the less the prompt
resembles the training data: far away the members are noise, and routing by noise is worse than
routing by load and cost. The shrinkage was fitted on sources that were left out of training. What a
score is not: a judgement about answers (it sees prompts only), or valid for models whose strengths
differ from those of the pair.

A score is a pure function of the prompt and the artefact; other prompts of the batch change nothing
but its last bits, by the order in which floats are summed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from routing import artefact, heads
from routing.artefact import Artefact, ArtefactError
from routing.drift import Reference as Reference
from routing.encoder import Encoded, Encoder
from routing.features import FEATURE_NAMES, feature_matrix

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

HEADS_FILE = "heads.npz"

HAND_SCALE = np.float32(3)
"""Factor on the hand features in the ridge."""

_OPTIONS = FEATURE_NAMES.index("options")


@dataclass(frozen=True, slots=True)
class Scores:
    """What the scorer says of each prompt; arrays of one length."""

    weak: Floats
    """Chance that the weak model answers correctly, 0 to 1."""
    strong: Floats
    """Chance that the strong model answers correctly, 0 to 1."""
    gain: Floats
    """Expected gain of the strong model, -1 to 1; sort by this."""
    trust: Floats
    """How far the prompt's own estimate counts, 0 to 1; the rest is the mean of the pair."""
    ridge: Floats
    """What the linear member alone would say of the gain: what a simple method reaches."""
    cluster: Indices
    """Nearest centre of the training data, 0 to the number of centres less one."""
    similarity: Floats
    """Cosine to that centre, -1 to 1."""


@dataclass(frozen=True, slots=True)
class Members(heads.Arrays):
    """Constants of standardising, combining, shrinking and calibrating."""

    hand_mean: Floats
    hand_deviation: Floats
    components: Floats
    """``(components, width)``: principal axes of the normalised frozen vector, for the trees."""
    component_mean: Floats
    weights: Floats
    """``(2, 3)``: slopes of the three members' gains over the pair's mean, for open questions and
    for those that offer options. Fine-tuning saw mostly the latter and is worth more there."""
    mean_gain: Floats
    """``(pairs,)``"""
    mean_half: Floats
    """``(pairs,)``: mean of (weak + strong) / 2."""
    centroids: Floats
    """``(centroids, width)``: centres of the training data, unit length."""
    far: Floats
    """``(2,)``: similarity to the nearest centre from which trust is full, and at which it is
    least."""
    least_trust: Floats
    """``(1,)``: what is left of the estimate far from everything."""


class ComplexityScorer:
    """Scores prompts; safe to call from several threads."""

    def __init__(
        self,
        checked: Artefact,
        *,
        threads: int = 1,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        """Load from an artefact whose digests were checked.

        Args:
            checked: What `routing.artefact.load` gave.
            threads: Threads that the encoder may use, at least 1.
            providers: What onnxruntime may compute the encoder with, best first.

        Raises:
            ArtefactError: Something is missing or does not fit.

        """
        self.digest = checked.digest
        self.pairs: tuple[str, ...] = tuple(checked.settings.get("pairs", ()))
        self.default_pair = str(checked.settings.get("default_pair"))
        if tuple(checked.settings.get("features", ())) != FEATURE_NAMES:
            raise ArtefactError("heads: made for other hand features; train the scorer anew")
        if self.default_pair not in self.pairs:
            raise ArtefactError("manifest: default_pair is not among pairs; restore the folder")
        arrays = arrays_of(checked.file(HEADS_FILE))
        self._members = Members.read(arrays, "members")
        self.reference = Reference.read(arrays, "reference")
        self._tuned = heads.TunedHead.read(arrays, "tuned")
        self._ridge = heads.RidgeHead.read(arrays, "ridge")
        self._trees = heads.TreesHead.read(arrays, "trees")
        self._encoder = Encoder(checked, threads=threads, providers=providers)

    @classmethod
    def load(cls, folder: Path, *, threads: int = 1) -> ComplexityScorer:
        """Check and load a folder.

        Raises:
            ArtefactError: A file is missing, changed, or unexpected.

        """
        return cls(artefact.load(folder), threads=threads)

    def score(self, prompts: Sequence[str], pair: str | Sequence[str] | None = None) -> Scores:
        """Score prompts.

        Args:
            prompts: Any texts; none gives empty arrays.
            pair: Which pair of models is meant, for all or for each; one that the scorer was not
                trained on, or ``None``, is taken as the default pair.

        Raises:
            ValueError: As many pairs as prompts were expected.

        """
        if pair is None or isinstance(pair, str):
            pair = [pair or self.default_pair] * len(prompts)
        index = self._index(prompts, pair)
        return self._combine(prompts, index)

    def members(self, prompts: Sequence[str], pair: Sequence[str]) -> tuple[Floats, Indices]:
        """Gain over the pair's mean by each member, ``(prompts, 3)``, for fitting their weights.

        And for each prompt whether it offers options, 0 or 1.
        """
        found = self._judge(prompts, self._index(prompts, pair))
        return found.gains, found.offered

    def _index(self, prompts: Sequence[str], pair: Sequence[str]) -> Indices:
        if len(pair) != len(prompts):
            raise ValueError(f"{len(pair)} pairs for {len(prompts)} prompts")
        known = {name: index for index, name in enumerate(self.pairs)}
        default = known[self.default_pair]
        return np.asarray([known.get(name, default) for name in pair], dtype=np.int64)

    def _combine(self, prompts: Sequence[str], index: Indices) -> Scores:
        own = self._members
        found = self._judge(prompts, index)
        trust = trust_of(own, found.similarity)
        joint = (found.gains * own.weights[found.offered]).sum(axis=1)
        gain = np.clip(own.mean_gain[index] + trust * joint, -1, 1)
        half = own.mean_half[index]
        half = half + trust * (found.chances.mean(axis=1) - half)
        return Scores(
            weak=np.clip(half - gain / 2, 0, 1),
            strong=np.clip(half + gain / 2, 0, 1),
            gain=gain,
            trust=trust,
            ridge=own.mean_gain[index] + found.gains[:, 1],
            cluster=found.cluster,
            similarity=found.similarity,
        )

    def _judge(self, prompts: Sequence[str], pair: Indices) -> Judged:
        encoded = self._encoder.encode(prompts)
        hand = feature_matrix(prompts)
        return judge(self._members, self._tuned, self._ridge, self._trees, encoded, hand, pair)


@dataclass(frozen=True, slots=True)
class Judged:
    """What the members say, before it is combined."""

    gains: Floats
    """``(prompts, 3)``: gain over the pair's mean by each member."""
    chances: Floats
    """``(prompts, 2)``: chances of weak and strong by the tuned head, 0 to 1."""
    cluster: Indices
    """``(prompts,)``: nearest centre."""
    similarity: Floats
    """``(prompts,)``: cosine to it."""
    offered: Indices
    """``(prompts,)``: whether the prompt offers options, 0 or 1."""


def judge(
    own: Members,
    tuned: heads.TunedHead,
    ridge: heads.RidgeHead,
    trees: heads.TreesHead,
    encoded: Encoded,
    hand: Floats,
    pair: Indices,
) -> Judged:
    """Ask every member.

    Args:
        own: Constants of the scorer.
        tuned: First member.
        ridge: Second member.
        trees: Third member.
        encoded: Vectors of the prompts.
        hand: Their hand features as they are, ``(prompts, features)``.
        pair: Index of the pair of each prompt, ``(prompts,)``.

    """
    general = heads.normalise(encoded.frozen)
    scaled = heads.standardise(hand, own.hand_mean, own.hand_deviation)
    chances = tuned.chances(encoded.tuned, scaled, pair)
    gains = [
        chances[:, 1] - chances[:, 0] - own.mean_gain[pair],
        ridge.gain(linear_inputs(general, scaled, hand), pair),
        trees.gain(tree_inputs(own, general, scaled, pair)),
    ]
    cluster, similarity = nearest(own.centroids, general)
    return Judged(np.stack(gains, axis=1), chances, cluster, similarity, offers_options(hand))


def offers_options(hand: Floats) -> Indices:
    """1 where a prompt offers options to choose from, 0 where it is open."""
    return (hand[:, _OPTIONS] > 0).astype(np.int64)


def linear_inputs(general: Floats, scaled: Floats, hand: Floats) -> Floats:
    """What the ridge looks at: the frozen vector, and the hand features once for each kind.

    A question with options and an open one have slopes of their own: length means something else
    where ten options are part of it. The hand features are scaled up, which is to say penalised
    less than the many directions of the vector.
    """
    offered = offers_options(hand)[:, None].astype(np.float32)
    kinds = [scaled * offered, scaled * (1 - offered), offered - 0.5]
    return np.concatenate([general, *(HAND_SCALE * kind for kind in kinds)], axis=1)


def tree_inputs(own: Members, general: Floats, scaled: Floats, pair: Indices) -> Floats:
    """What the trees look at: hand features, principal components, which pair it is."""
    parts = (general - own.component_mean) @ own.components.T
    which = np.eye(len(own.mean_gain), dtype=np.float32)[pair]
    return np.concatenate([scaled, parts, which], axis=1)


def nearest(centroids: Floats, general: Floats) -> tuple[Indices, Floats]:
    """The nearest centre of each vector, and the cosine to it.

    Args:
        centroids: ``(centres, width)``, unit length.
        general: ``(prompts, width)``, of any length but zero.

    Returns:
        Index of the centre, and -1 to 1; both ``(prompts,)``.

    """
    unit = general / np.linalg.norm(general, axis=1, keepdims=True)
    cosines = unit @ centroids.T
    return cosines.argmax(axis=1), np.clip(cosines.max(axis=1), -1, 1)


def trust_of(own: Members, similarity: Floats) -> Floats:
    """How far an estimate counts: 1 near the training data, least far away, linear between."""
    near, far = own.far
    reach = np.clip((similarity - far) / (near - far), 0, 1)
    trust: Floats = (own.least_trust[0] + (1 - own.least_trust[0]) * reach).astype(np.float32)
    return trust


def arrays_of(content: bytes) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a file of heads; half precision becomes single.

    Raises:
        ArtefactError: It is no such file.

    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            return {
                name: stored[name].astype(np.float32)
                if stored[name].dtype == np.float16
                else stored[name]
                for name in stored.files
            }
    except (ValueError, OSError, KeyError):
        raise ArtefactError("heads: cannot be read; restore the folder") from None
