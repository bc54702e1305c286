"""Fit the heads that need no gradient descent: ridge, boosted trees, weights, trust.

Training only, numpy only, deterministic: the same rows and seed give the same arrays.

Sources: A. Hoerl and R. Kennard, "Ridge Regression", Technometrics 12(1), 1970. J. Friedman,
"Greedy Function Approximation: A Gradient Boosting Machine", Annals of Statistics 29(5), 2001, and
"Stochastic Gradient Boosting", 2002. G. Ke et al., "LightGBM", NeurIPS 2017 (histograms).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from routing.heads import RidgeHead, TreesHead

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def ridge(
    inputs: Floats,
    gain: Doubles,
    pair: Indices,
    pairs: int,
    weight: Doubles,
    strength: float,
    start: Floats | None = None,
) -> RidgeHead:
    """Ridge on gain over the pair's mean: first what all pairs share, then each pair's remainder.

    Args:
        inputs: ``(rows, inputs)``.
        gain: Gain over the mean of the row's pair, ``(rows,)``.
        pair: Index of the pair of each row.
        pairs: How many pairs there are.
        weight: How much each row counts in the shared part.
        strength: Penalty on squared weights, in rows.
        start: ``(pairs, inputs)``: weights to start from; the penalty is on what is added to them.

    """
    centre = inputs.mean(axis=0)
    centred = (inputs - centre).astype(np.float64)
    if start is None:
        start = np.zeros((pairs, inputs.shape[1]), dtype=np.float32)
    gain = gain - np.einsum("nd,nd->n", centred, start[pair])
    shared = _solve(centred, gain, weight, strength)
    left = gain - centred @ shared
    found = shared + start.astype(np.float64)
    for index in range(pairs):
        rows = pair == index
        if rows.any():
            one = np.ones(int(rows.sum()))
            found[index] += _solve(centred[rows], left[rows], one, strength)
    return RidgeHead(centre.astype(np.float32), found.astype(np.float32))


def _solve(inputs: Doubles, target: Doubles, weight: Doubles, strength: float) -> Doubles:
    weighted = inputs * weight[:, None]
    square = weighted.T @ inputs
    square[np.diag_indices_from(square)] += strength
    return np.asarray(np.linalg.solve(square, weighted.T @ target), dtype=np.float64)


def principal(vectors: Floats, components: int) -> tuple[Floats, Floats]:
    """Mean and leading principal axes ``(components, width)``, scaled to unit variance."""
    mean = vectors.mean(axis=0)
    centred = (vectors - mean).astype(np.float64)
    values, axes = np.linalg.eigh(centred.T @ centred / len(vectors))
    order = np.argsort(values)[::-1][:components]
    chosen = axes[:, order]
    # The sign of an axis is arbitrary; fixed, so that every machine gives the same arrays.
    chosen = chosen * np.sign(chosen[np.abs(chosen).argmax(axis=0), np.arange(components)])
    scaled = (chosen / np.sqrt(values[order] + 1e-9)).T
    return mean.astype(np.float32), scaled.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Boosting:
    """How trees are grown."""

    trees: int = 300
    depth: int = 3
    rate: float = 0.05
    least_leaf: int = 80
    """Fewest rows of a leaf."""
    shrink: float = 30.0
    """Rows of zero residual that every leaf is averaged with."""
    rows: float = 0.6
    """Share of rows that a tree sees."""
    inputs: float = 0.4
    """Share of inputs that a tree may split on."""
    bins: int = 32
    seed: int = 1


def boost(inputs: Floats, gain: Doubles, weight: Doubles, how: Boosting) -> TreesHead:
    """Boosted regression trees on gain over the pair's mean, squared loss.

    Args:
        inputs: ``(rows, inputs)``.
        gain: ``(rows,)``.
        weight: How much each row counts.
        how: Sizes, rates and seed.

    """
    rng = np.random.default_rng(how.seed)
    edges = [
        np.unique(np.quantile(column, np.linspace(0, 1, how.bins + 1)[1:-1]).astype(np.float32))
        for column in inputs.T
    ]
    binned = np.stack(
        [np.searchsorted(edge, column) for edge, column in zip(edges, inputs.T, strict=True)],
        axis=1,
    )
    nodes = 2 ** (how.depth + 1) - 1
    shape = (how.trees, nodes)
    self_index = np.arange(nodes, dtype=np.int16)
    feature = np.zeros(shape, dtype=np.int16)
    threshold = np.zeros(shape, dtype=np.float32)
    left, right = np.tile(self_index, (how.trees, 1)), np.tile(self_index, (how.trees, 1))
    value = np.zeros(shape, dtype=np.float32)
    predicted = np.zeros(len(gain))
    for tree in range(how.trees):
        rows = np.flatnonzero(rng.random(len(gain)) < how.rows)
        columns = np.flatnonzero(rng.random(inputs.shape[1]) < how.inputs)
        if len(columns) == 0:
            continue
        residual = gain - predicted
        splits = _grow(binned[np.ix_(rows, columns)], residual[rows], weight[rows], how)
        at = np.zeros(len(gain), dtype=np.int64)
        for node, (column, cut) in splits.items():
            source = columns[column]
            feature[tree, node] = source
            threshold[tree, node] = edges[source][cut]
            left[tree, node], right[tree, node] = 2 * node + 1, 2 * node + 2
            here = at == node
            at[here] = 2 * node + 1 + (binned[here, source] > cut)
        total = np.bincount(at[rows], weight[rows] * residual[rows], minlength=nodes)
        count = np.bincount(at[rows], weight[rows], minlength=nodes)
        value[tree] = how.rate * total / (count + max(how.shrink, 1e-9))
        predicted += value[tree][at]
    depth = np.asarray([how.depth], dtype=np.int16)
    return TreesHead(feature, threshold, left, right, value, depth)


def _grow(
    binned: Indices, residual: Doubles, weight: Doubles, how: Boosting
) -> dict[int, tuple[int, int]]:
    """Splits of one tree by node, parents before children: (column, highest bin that goes left)."""
    columns = binned.shape[1]
    splits: dict[int, tuple[int, int]] = {}
    at = np.zeros(len(residual), dtype=np.int64)
    offsets = np.arange(columns) * how.bins
    for level in range(how.depth):
        first, width = 2**level - 1, 2**level
        inside = at >= first
        place = ((at[inside] - first)[:, None] * columns * how.bins + offsets) + binned[inside]
        cells = width * columns * how.bins
        each = np.broadcast_to((weight * residual)[inside][:, None], place.shape)
        rows = np.broadcast_to(weight[inside][:, None], place.shape)
        grid = (width, columns, how.bins)
        total = np.bincount(place.ravel(), each.ravel(), cells).reshape(grid).cumsum(axis=2)
        count = np.bincount(place.ravel(), rows.ravel(), cells).reshape(grid).cumsum(axis=2)
        whole, size = total[:, :, -1:], count[:, :, -1:]
        # Without shrinkage an empty side would divide by zero; it is not allowed anyway.
        shrink = max(how.shrink, 1e-9)
        better = (
            total**2 / (count + shrink)
            + (whole - total) ** 2 / (size - count + shrink)
            - whole**2 / (size + shrink)
        )
        allowed = (count >= how.least_leaf) & (size - count >= how.least_leaf)
        better = np.where(allowed, better, 0.0).reshape(width, -1)
        for index in range(width):
            best = int(better[index].argmax())
            if better[index, best] <= 1e-9:
                continue
            node = first + index
            column, cut = divmod(best, how.bins)
            splits[node] = (column, cut)
            here = at == node
            at[here] = 2 * node + 1 + (binned[here, column] > cut)
    return splits


def clusters(vectors: Floats, count: int, seed: int, rounds: int = 12) -> Floats:
    """Centres of spherical k-means, unit length, ``(count, width)``."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    centres = unit[rng.choice(len(unit), count, replace=False)]
    for _ in range(rounds):
        nearest = (unit @ centres.T).argmax(axis=1)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, unit)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        # A centre that lost all its points stays where it was.
        centres = np.where(norms > 0, sums / np.maximum(norms, 1e-9), centres)
    return np.asarray(centres, dtype=np.float32)


def combination(gains: Floats, gain: Doubles, weight: Doubles, prior: float) -> Floats:
    """Non-negative slopes of the members by least squares, drawn towards their plain mean.

    Args:
        gains: What each member says, ``(rows, members)``, on rows that no member was fitted on.
        gain: What came out.
        weight: How much each row counts.
        prior: Strength of the pull to equal slopes, in rows.

    Returns:
        Slopes, ``(members,)``, 0 or more; equal ones where no member says anything.

    """
    members = gains.shape[1]
    scale = gains.std(axis=0).mean()
    if scale == 0:
        return np.full(members, 1.0 / members, dtype=np.float32)
    inputs = gains.astype(np.float64)
    square = (inputs * weight[:, None]).T @ inputs
    moment = (inputs * weight[:, None]).T @ gain
    square[np.diag_indices_from(square)] += prior * scale**2
    moment += prior * scale**2 / members
    slopes = np.full(members, 1.0 / members)
    # Coordinate descent: a convex problem in a handful of unknowns.
    for _ in range(500):
        for i in range(members):
            rest = square[i] @ slopes - square[i, i] * slopes[i]
            slopes[i] = max(0.0, (moment[i] - rest) / square[i, i])
    return slopes.astype(np.float32)


def platt(logits: Doubles, target: Doubles, prior: float) -> tuple[float, float]:
    """Slope and offset that make logits fit outcomes best, drawn towards 1 and 0.

    J. Platt, "Probabilistic Outputs for Support Vector Machines", 1999; Newton steps.

    Args:
        logits: ``(rows,)``, finite.
        target: What came out, 0 to 1, ``(rows,)``.
        prior: Strength of the pull, in rows.

    Returns:
        Slope, never below 0.05, so that no order is turned round, and offset.

    """
    found = np.asarray([1.0, 0.0])
    inputs = np.stack([logits, np.ones_like(logits)], axis=1)
    penalty = prior / 4  # a row counts for at most a quarter in the curvature
    for _ in range(30):
        chance = 0.5 * (1 + np.tanh(inputs @ found / 2))
        slope = inputs.T @ (chance - target) + penalty * (found - [1.0, 0.0])
        curvature = (inputs * (chance * (1 - chance))[:, None]).T @ inputs + penalty * np.eye(2)
        step = np.linalg.solve(curvature, slope)
        found = found - np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-9:
            break
    return max(float(found[0]), 0.05), float(found[1])
