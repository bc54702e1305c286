"""What turns vectors into scores, as plain arrays: no pickle, nothing that loading could execute.

Three kinds: the heads that were trained with the encoder, ridge regression on the frozen vector
with the hand features, and boosted regression trees on the hand features with a few principal
components. Training fits them (`routing.fitting`, `routing.tuning`); this module only applies
them, with numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from routing.artefact import ArtefactError

Floats = npt.NDArray[np.float32]

CLIP = 4.0
"""Standardised features are cut here, so that one odd prompt cannot swing a linear score."""


def standardise(values: Floats, mean: Floats, deviation: Floats) -> Floats:
    """``(values - mean) / deviation``, cut to plus or minus `CLIP`."""
    scaled: Floats = np.clip((values - mean) / deviation, -CLIP, CLIP)
    return scaled


def normalise(vectors: Floats) -> Floats:
    """Each row brought to mean 0 and deviation 1, as a layer norm without parameters does."""
    centred = vectors - vectors.mean(axis=1, keepdims=True)
    scaled: Floats = centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + 1e-5)
    return scaled


def gelu(values: Floats) -> Floats:
    """Gaussian error linear unit, exact up to 2e-7.

    The error function is the approximation 7.1.26 of M. Abramowitz and I. Stegun, "Handbook of
    Mathematical Functions", 1964.
    """
    size = np.abs(values) / np.sqrt(np.float32(2))
    t = 1 / (1 + 0.3275911 * size)
    series = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    erf = np.sign(values) * (1 - series * np.exp(-np.square(size)))
    active: Floats = (values * (1 + erf) / 2).astype(np.float32)
    return active


def sigmoid(values: Floats) -> Floats:
    """Logistic function, without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(values / 2)), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Arrays:
    """Base of a head: its fields are arrays, stored under ``prefix.field``."""

    def arrays(self, prefix: str) -> dict[str, npt.NDArray[Any]]:
        """The fields by the names that `read` expects."""
        return {f"{prefix}.{field.name}": getattr(self, field.name) for field in fields(self)}

    @classmethod
    def read(cls, arrays: Mapping[str, npt.NDArray[Any]], prefix: str) -> Self:
        """Build from stored arrays.

        Raises:
            ArtefactError: One is missing.

        """
        try:
            return cls(*(arrays[f"{prefix}.{field.name}"] for field in fields(cls)))
        except KeyError as error:
            raise ArtefactError(f"heads: no array {error.args[0]}; train the scorer anew") from None


@dataclass(frozen=True, slots=True)
class TunedHead(Arrays):
    """Heads trained together with the encoder, for every pair of models."""

    hand_weight: Floats
    """``(hidden, features)``: the small layer over the hand features."""
    hand_bias: Floats
    weight: Floats
    """``(pairs, 2, width + hidden)``: weak and strong."""
    bias: Floats
    """``(pairs, 2)``"""

    def chances(self, tuned: Floats, hand: Floats, pair: npt.NDArray[np.int64]) -> Floats:
        """Chances that the weak and the strong model are right, ``(prompts, 2)``.

        Args:
            tuned: Vectors of the fine-tuned encoder.
            hand: Standardised hand features.
            pair: Index of the pair of each prompt.

        """
        hidden = gelu(hand @ self.hand_weight.T + self.hand_bias)
        joint = np.concatenate([normalise(tuned), hidden], axis=1)
        logits = np.einsum("nd,nhd->nh", joint, self.weight[pair]) + self.bias[pair]
        return sigmoid(logits)


@dataclass(frozen=True, slots=True)
class RidgeHead(Arrays):
    """Linear prediction of the gain: a vector shared by all pairs plus one of the pair's own."""

    centre: Floats
    """``(width + features,)``: mean of the inputs."""
    weight: Floats
    """``(pairs, width + features)``"""

    def gain(self, inputs: Floats, pair: npt.NDArray[np.int64]) -> Floats:
        """Expected gain over the mean of the pair, ``(prompts,)``."""
        found: Floats = np.einsum("nd,nd->n", inputs - self.centre, self.weight[pair])
        return found


@dataclass(frozen=True, slots=True)
class TreesHead(Arrays):
    """Sum of regression trees; a leaf is its own child, so all trees are walked in step."""

    feature: npt.NDArray[np.int16]
    """``(trees, nodes)``: which input a node looks at."""
    threshold: Floats
    """``(trees, nodes)``: up to and including this value goes left."""
    left: npt.NDArray[np.int16]
    right: npt.NDArray[np.int16]
    value: Floats
    """``(trees, nodes)``: already multiplied by the learning rate; read at leaves."""
    depth: npt.NDArray[np.int16]
    """``(1,)``: steps from a root to the deepest leaf."""

    def gain(self, inputs: Floats) -> Floats:
        """Expected gain over the mean of the pair, ``(prompts,)``."""
        trees = np.arange(len(self.feature))
        found = np.empty(len(inputs), dtype=np.float32)
        for row, values in enumerate(inputs):
            node = np.zeros(len(trees), dtype=np.int64)
            for _ in range(int(self.depth[0])):
                goes_left = values[self.feature[trees, node]] <= self.threshold[trees, node]
                node = np.where(goes_left, self.left[trees, node], self.right[trees, node])
            found[row] = self.value[trees, node].sum()
        return found
