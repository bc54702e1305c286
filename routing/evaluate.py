"""Measure a router on real outcomes: ``python -m routing.evaluate FILE.parquet``.

For every pair of models in the file, pooled and per source, it prints APGR, CPT50, CPT80 and the
mean score with 30 and 50 % strong calls (`routing.metrics`) of

* ``scorer``: the artefact, or the scores of ``--scores``;
* ``ridge``: the artefact's linear member alone, what a simple method reaches;
* ``length``: number of words, longest first;
* ``source``: the mean gain of the row's source, taken from this very file, so an upper bound for
  knowing only where a question comes from;
* ``random``: the expectation of a random order, exactly;
* ``shuffled``: the scorer's scores dealt out anew, a control that must stay near 0.5;
* ``shuffled in source``: dealt out anew within each source, which keeps what the source gives and
  destroys the rest.

Intervals are 95 % bootstrap intervals over questions. ``scorer - length`` and ``scorer - ridge``
are paired on the same draws: only where such an interval excludes zero is the scorer better.

Exit codes: 0 measured, 2 wrong usage, 3 a file cannot be used, 4 the artefact cannot be used.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from routing import metrics
from routing.artefact import ArtefactError
from routing.dataset import DataError, Outcomes, read
from routing.metrics import Figures, Interval

Doubles = npt.NDArray[np.float64]

ARTEFACT = Path(__file__).parent / "artefacts" / "complexity-v1"
LEAST_ROWS = 50
"""Sources with fewer rows are pooled only: intervals would span everything."""

EXIT_DATA = 3
EXIT_ARTEFACT = 4


@dataclass(frozen=True, slots=True)
class Report:
    """One set of questions, measured."""

    pair: str
    source: str
    """Name of the source, or ``all``."""
    rows: int
    weak: float
    strong: float
    gap: Interval
    """``strong - weak``; where its interval holds zero, APGR and CPT mean nothing."""
    routers: Mapping[str, Figures]
    differences: Mapping[str, Interval]
    """APGR of the scorer minus that of another router, paired."""


def word_counts(prompts: Sequence[str]) -> Doubles:
    """Words of each prompt, by white space."""
    return np.asarray([len(prompt.split()) for prompt in prompts], dtype=np.float64)


def measure(
    rows: Outcomes,
    scores: Mapping[str, npt.ArrayLike],
    *,
    source: str = "all",
    rounds: int = 1_000,
    seed: int = 1,
) -> Report:
    """Measure routers on rows of one pair.

    Args:
        rows: The questions, at least one.
        scores: Router name to one number per row; ``scorer`` is the one under test, ``ridge`` and
            ``current`` are compared with it where they are there.
        source: Name to report.
        rounds: Bootstrap rounds.
        seed: Of the bootstrap and of the shuffled controls.

    """
    rng = np.random.default_rng(seed)
    own = np.asarray(scores["scorer"], dtype=np.float64)
    everything = {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}
    everything["length"] = word_counts(rows.prompt)
    names, place = np.unique(np.asarray(rows.source), return_inverse=True)
    if len(names) > 1:
        everything["source"] = (np.bincount(place, rows.gain) / np.bincount(place))[place]
        within = own.copy()
        for index in range(len(names)):
            here = np.flatnonzero(place == index)
            within[here] = own[rng.permutation(here)]
        everything["shuffled in source"] = within
    everything["shuffled"] = rng.permutation(own)
    everything["random"] = np.zeros(len(rows))
    draws = metrics.resamples(len(rows), rounds, seed)
    found = {
        name: metrics.bootstrap(values, rows.weak, rows.strong, draws)
        for name, values in everything.items()
    }
    routers = {
        name: metrics.figures(values, rows.weak, rows.strong, found[name])
        for name, values in everything.items()
    }
    differences = {
        f"scorer - {other}": metrics.interval(
            routers["scorer"].apgr.value - routers[other].apgr.value,
            found["scorer"]["apgr"] - found[other]["apgr"],
        )
        for other in ("length", "ridge", "current")
        if other in routers
    }
    weak, strong = float(rows.weak.mean()), float(rows.strong.mean())
    gap = metrics.interval(strong - weak, draws @ rows.gain / len(rows))
    return Report(rows.pair[0], source, len(rows), weak, strong, gap, routers, differences)


def measure_all(
    rows: Outcomes, scores: Mapping[str, npt.ArrayLike], *, rounds: int, seed: int
) -> list[Report]:
    """One report per pair, and per source where a pair has several with enough rows."""
    pairs, sources = np.asarray(rows.pair), np.asarray(rows.source)
    reports = []
    for pair in sorted(set(rows.pair)):
        wanted = [("all", pairs == pair)]
        inside = sorted(set(sources[pairs == pair].tolist()))
        if len(inside) > 1:
            wanted += [(name, (pairs == pair) & (sources == name)) for name in inside]
        for name, mask in wanted:
            if name != "all" and mask.sum() < LEAST_ROWS:
                continue
            chosen = {router: np.asarray(values)[mask] for router, values in scores.items()}
            reports.append(
                measure(rows.select(mask), chosen, source=name, rounds=rounds, seed=seed)
            )
    return reports


def read_scores(path: Path, rows: int) -> Doubles:
    """Scores of another router, one per row in the order of the outcome file.

    A Parquet file with a column ``score``, or text with one number a line.

    Raises:
        DataError: The file cannot be read or does not fit the rows.

    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; give scores as Parquet or one number a line")
    if path.suffix == ".parquet":
        try:
            values = pq.read_table(path, columns=["score"]).column("score").to_pylist()
        except (pa.ArrowException, OSError, KeyError):
            raise DataError(f"{path}: has no readable column score; name the column so") from None
    else:
        try:
            values = list(path.read_text().split("\n"))
        except (OSError, UnicodeDecodeError):
            raise DataError(f"{path}: cannot be read as text; write one number a line") from None
        if values and values[-1] == "":
            values.pop()
    found = np.empty(len(values), dtype=np.float64)
    for place, value in enumerate(values, start=1):
        try:
            found[place - 1] = float(value)
        except (TypeError, ValueError):
            found[place - 1] = math.nan
        if not math.isfinite(found[place - 1]):
            raise DataError(
                f"{path}: line or row {place}: not a finite number; every row needs one"
            )
    if len(found) != rows:
        raise DataError(
            f"{path}: {len(found)} scores for {rows} rows; write one score per row, in their order"
        )
    return found


def render(reports: Sequence[Report]) -> str:
    """The reports as text."""
    lines = []
    for report in reports:
        lines.append(
            f"{report.pair}, {report.source}: {report.rows} questions, weak {report.weak:.4f}, "
            f"strong {report.strong:.4f}"
        )
        if report.gap.low <= 0:
            lines.append(
                f"  NOTE: the gap of {report.gap.value:.4f} [{report.gap.low:.4f}, "
                f"{report.gap.high:.4f}] may be zero, so APGR and CPT mean little here"
            )
        lines.append(
            f"  {'router':<19}{'APGR':<24}{'CPT50 %':<20}{'CPT80 %':<20}"
            f"{'score at 30 %':<24}{'score at 50 %'}"
        )
        for name, figures in sorted(
            report.routers.items(), key=lambda item: _ORDER.get(item[0], len(_ORDER))
        ):
            lines.append(
                f"  {name:<19}{_shown(figures.apgr):<24}{_shown(figures.cpt50, 100, 1):<20}"
                f"{_shown(figures.cpt80, 100, 1):<20}{_shown(figures.accuracy30, 1, 4):<24}"
                f"{_shown(figures.accuracy50, 1, 4)}"
            )
        for name, difference in report.differences.items():
            verdict = "better" if difference.low > 0 else "worse" if difference.high < 0 else "even"
            lines.append(f"  {name}: {_shown(difference)} {verdict}")
        lines.append("")
    return "\n".join(lines)


_ORDER = {
    name: place
    for place, name in enumerate(
        (
            "scorer",
            "current",
            "ridge",
            "length",
            "source",
            "random",
            "shuffled",
            "shuffled in source",
        )
    )
}


def _shown(value: Interval, factor: float = 1, digits: int = 3) -> str:
    if math.isnan(value.value):
        return "-"
    return (
        f"{value.value * factor:.{digits}f} "
        f"[{value.low * factor:.{digits}f}, {value.high * factor:.{digits}f}]"
    )


def plain(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """The reports as values for JSON; what means nothing is null."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(inner) for key, inner in value.items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    return [clean(asdict(report)) for report in reports]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m routing.evaluate", description="Measure a router on real outcomes."
    )
    parser.add_argument("file", type=Path, help="outcome file (Parquet)")
    parser.add_argument("--artefact", type=Path, default=ARTEFACT, help="folder of the scorer")
    parser.add_argument("--scores", type=Path, help="scores of another router, to measure instead")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rounds", type=int, default=1_000, help="bootstrap rounds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    if given.rounds < 1 or given.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    try:
        rows = read(given.file)
        scores = _scores(rows, given.artefact, given.scores, given.threads)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_DATA
    except ArtefactError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ARTEFACT
    reports = measure_all(rows, scores, rounds=given.rounds, seed=given.seed)
    print(json.dumps(plain(reports), indent=1) if given.json else render(reports))
    return 0


def _scores(
    rows: Outcomes, artefact: Path, given: Path | None, threads: int
) -> dict[str, npt.ArrayLike]:
    if given is not None:
        return {"scorer": read_scores(given, len(rows))}
    # Imported here: measuring given scores needs no encoder.
    from routing.complexity import ComplexityScorer

    scorer = ComplexityScorer.load(artefact, threads=threads)
    scores = scorer.score(rows.prompt, rows.pair)
    return {"scorer": scores.gain, "ridge": scores.ridge}


if __name__ == "__main__":
    sys.exit(main())
