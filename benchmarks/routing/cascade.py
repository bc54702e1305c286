"""Is it worth letting the small model answer first? ``python -m benchmarks.routing.cascade``.

A router sees the prompt and calls one model. A cascade calls the small one, looks at its answer,
and calls the large one as well where the answer looks bad: it knows more, and pays twice for what
it escalates. Both are compared on held-out questions, at an equal share of large calls and at
equal cost.

What can be simulated: of the small model's answers only their length is stored (and whether they
were right), no text and no log-probabilities. So the evidence here is the length, alone and fitted
together with the prompt's score (ridge regression; unseen questions are scored by a fit on the
other four of five folds of them, unseen sources by a fit on all the unseen questions). What the
gateway's gate looks at besides (log-probabilities, refusals, invalid JSON) cannot be simulated with
this data; ``knows when it is wrong`` shows what perfect evidence about the small answer would
bring, which bounds any gate.

Cost: in units of the small model's call; a large call costs ``ratio`` times that. Routing costs
1 + c (ratio - 1) at a share c of large calls, a cascade 1 + c ratio. Answers are taken to be of
equal length whoever gives them. Intervals: 95 % bootstrap over questions, paired.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.routing import heldout
from benchmarks.routing.heldout import Heldout, rounded
from benchmarks.routing.prices import PARAMETERS, metered
from routing import metrics

RESULTS = Path(__file__).parent / "results"
PAIR = "llama31_8b_70b"
SHARES = np.linspace(0, 1, 201)
BUDGETS = (0.3, 0.5, 0.7, 0.9)
"""Cost of all requests, as a share of what it would be at the large model alone."""
FOLDS = 5
PENALTY = 30.0
RUN_ON_CHARS = 3_000
"""Length from which an answer was most likely cut and not ended."""
SEED = 1

Floats = npt.NDArray[np.float64]


def evidence(rows: Heldout) -> Floats:
    """What is known after the small answer: score of the prompt, length, whether it ran on."""
    size = np.log1p(rows.weak_chars) - 6.5
    kind = rows.options.astype(np.float64)
    # Answers that were cut before they came to an end are far longer than the rest.
    ran_on = rows.weak_chars > RUN_ON_CHARS
    columns = [rows.gain, size, size**2, ran_on, kind, kind * size, kind * rows.gain, kind * ran_on]
    return np.stack(columns, axis=1).astype(np.float64)


def fitted(known: Heldout, asked: Heldout) -> Floats:
    """Gain of the second rows, predicted by ridge regression on the first."""
    learn, inputs = evidence(known), evidence(asked)
    mean, deviation = learn.mean(axis=0), learn.std(axis=0) + 1e-9
    learn, inputs = (learn - mean) / deviation, (inputs - mean) / deviation
    gain = known.strong - known.weak
    square = learn.T @ learn + PENALTY * np.eye(learn.shape[1])
    weights: Floats = np.linalg.solve(square, learn.T @ (gain - gain.mean()))
    return inputs @ weights + gain.mean()


def crossfitted(rows: Heldout, seed: int) -> Floats:
    """``fitted``, each row by a fit on the folds that it is not in."""
    fold = np.random.default_rng(seed).permutation(len(rows)) % FOLDS
    found = np.zeros(len(rows))
    for number in range(FOLDS):
        found[fold == number] = fitted(rows.select(fold != number), rows.select(fold == number))
    return found


def routers(rows: Heldout, seed: int, known: Heldout | None = None) -> dict[str, Floats]:
    """Name to what is sorted by; all but the first know the small answer.

    Args:
        rows: The questions.
        seed: Of the folds.
        known: Other questions to fit on; folds of the questions themselves where there are none.
    """
    both = crossfitted(rows, seed) if known is None else fitted(known, rows)
    return {
        "prompt only": rows.gain,
        "cascade: length": rows.weak_chars,
        "cascade: length and prompt": both,
        "cascade: knows when it is wrong": 1.0 - rows.weak,
        "random": np.zeros(len(rows)),
    }


def lines(score: Floats, rows: Heldout, draws: npt.NDArray[np.int32], shares: Floats) -> Floats:
    """Mean score at each share of large calls, ``(1 + rounds, shares)``; first of all rows."""
    _, group = np.unique(-score, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(group[order])) + 1])
    gain = (rows.strong - rows.weak)[order]
    found = []
    for drawn in [np.ones(len(score)), *draws]:
        weights = np.asarray(drawn, dtype=np.float64)[order]
        size = weights.sum()
        share = np.concatenate([[0.0], np.cumsum(np.add.reduceat(weights, starts)) / size])
        steps = np.cumsum(np.add.reduceat(weights * gain, starts)) / size
        value = float(rows.weak @ drawn) / size + np.concatenate([[0.0], steps])
        found.append(np.interp(shares, share, value))
    return np.stack(found)


def share_at(budget: float, ratio: float, *, cascade: bool) -> float:
    """Share of large calls that a budget pays for; below 0 where not even the small calls fit.

    Args:
        budget: Cost as a share of all requests at the large model.
        ratio: Cost of a large call in units of a small one.
        cascade: Whether every request pays for the small call.
    """
    spare = budget * ratio - 1
    return min(1.0, spare / ratio if cascade else spare / (ratio - 1))


def measure(
    rows: Heldout,
    ratios: Mapping[str, float],
    rounds: int,
    seed: int,
    known: Heldout | None = None,
) -> dict[str, Any]:
    """All figures of one set of questions; ``known`` as for ``routers``."""
    draws = metrics.resamples(len(rows), rounds, seed)
    scores = routers(rows, seed, known)
    every = {name: lines(score, rows, draws, SHARES) for name, score in scores.items()}
    gap = every["random"][:, -1] - every["random"][:, 0]
    areas = {
        name: (np.trapezoid(line, SHARES, axis=1) - line[:, 0]) / gap
        for name, line in every.items()
    }
    alone = areas["prompt only"]
    return {
        "rows": len(rows),
        "small": float(rows.weak.mean()),
        "large": float(rows.strong.mean()),
        "apgr": {name: rounded(area) for name, area in areas.items()},
        "apgr minus prompt only": {
            name: rounded(area - alone) for name, area in areas.items() if area is not alone
        },
        "equal share": {
            f"{share:.0%}": {
                name: {
                    "score": rounded(line[:, _at(share)]),
                    "minus prompt only": rounded(
                        line[:, _at(share)] - every["prompt only"][:, _at(share)]
                    ),
                }
                for name, line in every.items()
            }
            for share in (0.1, 0.2, 0.3, 0.5)
        },
        "equal cost": {
            which: {"ratio": ratio, **_equal_cost(every, ratio)} for which, ratio in ratios.items()
        },
        "curves": {name: [round(float(v), 5) for v in line[0]] for name, line in every.items()},
    }


def _equal_cost(every: Mapping[str, Floats], ratio: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for budget in BUDGETS:
        plain = share_at(budget, ratio, cascade=False)
        paid = share_at(budget, ratio, cascade=True)
        if plain < 0:
            found[f"{budget:.0%}"] = "less than the small model alone costs"
            continue
        base = _value(every["prompt only"], plain)
        cells: dict[str, Any] = {
            "prompt only": {"large share": round(plain, 4), "score": rounded(base)}
        }
        for name, line in every.items():
            if name.startswith("cascade") and paid >= 0:
                value = _value(line, paid)
                cells[name] = {
                    "large share": round(paid, 4),
                    "score": rounded(value),
                    "minus prompt only": rounded(value - base),
                }
        found[f"{budget:.0%}"] = cells
    return found


def _at(share: float) -> int:
    return int(np.argmin(np.abs(SHARES - share)))


def _value(line: Floats, share: float) -> Floats:
    low = min(int(share * (len(SHARES) - 1)), len(SHARES) - 2)
    part = share * (len(SHARES) - 1) - low
    values: Floats = line[:, low] * (1 - part) + line[:, low + 1] * part
    return values


def _shown(cell: Mapping[str, Any]) -> str:
    parts = []
    for router, value in cell.items():
        score, less = value["score"]["value"], value.get("minus prompt only")
        gap = f" ({less['value']:+.3f} [{less['low']:+.3f}, {less['high']:+.3f}])" if less else ""
        parts.append(f"{router} {score:.3f} at {value['large share']:.0%} large{gap}")
    return "; ".join(parts)


STYLES: Mapping[str, Mapping[str, Any]] = {
    "prompt only": {"color": "#0b5cad", "linewidth": 2.2},
    "cascade: length": {"color": "#5f8f3e", "linewidth": 1.4},
    "cascade: length and prompt": {"color": "#d9822b", "linewidth": 2.2},
    "cascade: knows when it is wrong": {"color": "#9467bd", "linewidth": 1.2, "linestyle": ":"},
    "random": {"color": "#777777", "linewidth": 1.0, "linestyle": "--"},
}


def draw(sets: Mapping[str, Mapping[str, Any]], ratio: float, path: Path) -> None:
    """Score against share of large calls, and against cost, for each set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(sets), 2, figsize=(10.5, 4.0 * len(sets)), squeeze=False)
    for row, (title, found) in zip(axes, sets.items(), strict=True):
        for name, style in STYLES.items():
            curve = np.asarray(found["curves"][name])
            row[0].plot(SHARES * 100, curve, label=name, **style)
            paid = ratio if name.startswith("cascade") else ratio - 1
            row[1].plot((1 + SHARES * paid) / ratio * 100, curve, **style)
        row[0].set_title(f"{title} ({found['rows']} questions): equal share", fontsize=10)
        row[1].set_title(f"equal cost, a large call at {ratio:.1f} small ones", fontsize=10)
        row[0].set_xlabel("large calls, % of requests")
        row[1].set_xlabel("cost, % of all requests at the large model")
        row[1].axvline(100, color="#bbbbbb", linewidth=0.8)
        row[0].set_xlim(0, 100)
        row[1].set_xlim(0, 115)
        for axis in row:
            axis.set_ylabel("mean score")
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(fontsize=8, loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    """Simulate, print one line per set and budget, and keep figures and picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing.cascade")
    parser.add_argument("--outcomes", type=Path, default=heldout.HELDOUT, help="see heldout.py")
    parser.add_argument("--rounds", type=int, default=1_000, help="bootstrap rounds")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    ratios = {
        "parameters of Llama-3.1 8B and 70B (assumed)": PARAMETERS.ratio(1155, 211),
        "local checkpoints (metered)": metered().ratio(1155, 211),
    }
    seen, far = (heldout.load(part, PAIR, given.outcomes) for part in ("test", "unseen"))
    found = {
        "unseen questions": measure(seen, ratios, given.rounds, given.seed),
        "unseen sources": measure(far, ratios, given.rounds, given.seed, seen),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    report = {
        "what": "a cascade against routing by the prompt, on held-out questions",
        "method": (__doc__ or "").strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": given.seed,
        "rounds": given.rounds,
        "pair": PAIR,
        "scores": {k: v for k, v in heldout.facts(given.outcomes).items() if k != "reference"},
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "pyarrow", "gatehouse")},
        "sets": found,
    }
    (given.out / "cascade.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(found, next(iter(ratios.values())), given.out / "cascade.png")
    for name, one in found.items():
        areas = "; ".join(f"{router} {area['value']:.3f}" for router, area in one["apgr"].items())
        print(f"{name}: APGR: {areas}")
        for which, cells in one["equal cost"].items():
            for budget, cell in cells.items():
                if isinstance(cell, dict):
                    print(f"{name}, {which}, cost {budget}: {_shown(cell)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
