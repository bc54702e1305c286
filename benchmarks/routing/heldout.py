"""Scores and outcomes of held-out questions, without the questions.

    python -m benchmarks.routing.heldout --work WORK --data DIR

``python -m routing.train --work WORK`` leaves there the rows that its estimate was not fitted on
(``test.parquet``, ``unseen.parquet``) and the estimate itself. This scores those rows with that
estimate, adds the length of both answers from the outcome files in DIR, and keeps the numbers in
``results/heldout.parquet``: enough to compute every figure again, on any machine, and no text.

The committed artefact was fitted on all rows, so it must not be used here, and is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from routing import metrics
from routing.complexity import ComplexityScorer, offers_options
from routing.dataset import Outcomes, read
from routing.evaluate import ARTEFACT, word_counts
from routing.features import feature_matrix

HELDOUT = Path(__file__).parent / "results" / "heldout.parquet"
PARTS = ("test", "unseen")
PAIRS = ("llama31_8b_70b", "mixtral_gpt4")
"""Pairs that goals are set for."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Heldout:
    """Rows of one part and pair, column by column."""

    source: npt.NDArray[np.str_]
    gain: Floats
    """Predicted by the estimate."""
    ridge: Floats
    """Predicted by its linear member alone."""
    words: Floats
    weak: Floats
    strong: Floats
    weak_chars: Floats
    """Characters of the small model's answer; NaN where the answers are not stored."""
    options: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.gain)

    def select(self, rows: npt.NDArray[Any]) -> Heldout:
        """The rows of a mask or index array."""
        return Heldout(*(getattr(self, name)[rows] for name in self.__slots__))


def load(part: str, pair: str, path: Path = HELDOUT) -> Heldout:
    """Rows of one part (``test``: unseen questions; ``unseen``: unseen sources) and pair."""
    table = pq.read_table(path, filters=[("part", "=", part), ("pair", "=", pair)])
    column = {
        name: table.column(name).to_numpy(zero_copy_only=False) for name in table.schema.names
    }
    return Heldout(
        source=column["source"].astype(str),
        gain=column["gain"].astype(np.float64),
        ridge=column["ridge"].astype(np.float64),
        words=column["words"].astype(np.float64),
        weak=column["weak_score"].astype(np.float64),
        strong=column["strong_score"].astype(np.float64),
        weak_chars=column["weak_out_chars"].astype(np.float64),
        options=column["options"].astype(bool),
    )


def facts(path: Path = HELDOUT) -> dict[str, Any]:
    """Where the rows come from: digest of the estimate, date, versions.

    ``reference`` has the percentiles of the estimate's own gains on what it was fitted on.
    """
    stored = pq.read_schema(path).metadata or {}
    found: dict[str, Any] = json.loads(stored[b"heldout"])
    return found


def rounded(values: Floats) -> dict[str, float]:
    """A figure with its 95 % interval: the first value, then those of the bootstrap rounds."""
    found = metrics.interval(float(values[0]), values[1:])
    return {name: round(getattr(found, name), 4) for name in ("value", "low", "high")}


def lengths(folder: Path) -> dict[tuple[str, str], float]:
    """Characters of the small model's answer, by pair and prompt, where they are stored."""
    found: dict[tuple[str, str], float] = {}
    for path in sorted(folder.glob("*.parquet")):
        if "weak_out_chars" not in pq.read_schema(path).names:
            continue
        table = pq.read_table(path, columns=["pair", "prompt", "weak_out_chars"])
        rows = zip(*(table.column(name).to_pylist() for name in table.schema.names), strict=True)
        found |= {(pair, prompt): chars for pair, prompt, chars in rows if chars is not None}
    return found


def score(scorer: ComplexityScorer, rows: Outcomes, part: str, chars: Any) -> pa.Table:
    """One part, scored."""
    scores = scorer.score(rows.prompt, rows.pair)
    known = [chars.get(key) for key in zip(rows.pair, rows.prompt, strict=True)]
    return pa.table(
        {
            "part": pa.array([part] * len(rows)).dictionary_encode(),
            "pair": pa.array(rows.pair).dictionary_encode(),
            "source": pa.array(rows.source).dictionary_encode(),
            "gain": scores.gain,
            "ridge": scores.ridge,
            "words": word_counts(rows.prompt).astype(np.int32),
            "options": offers_options(feature_matrix(rows.prompt)).astype(bool),
            "weak_score": rows.weak.astype(np.float32),
            "strong_score": rows.strong.astype(np.float32),
            "weak_out_chars": pa.array(known, pa.float32()),
        }
    )


def main() -> int:
    """Score the held-out rows; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing.heldout")
    parser.add_argument("--work", type=Path, required=True, help="WORK of routing.train")
    parser.add_argument("--data", type=Path, required=True, help="folder of the outcome files")
    parser.add_argument("--out", type=Path, default=HELDOUT)
    given = parser.parse_args()
    scorer = ComplexityScorer.load(given.work / "estimate")
    if scorer.digest == ComplexityScorer.load(ARTEFACT).digest:
        parser.error("this is the artefact that was fitted on all rows: nothing is held out")
    chars = lengths(given.data)
    tables = []
    for part in PARTS:
        rows = read(given.work / f"{part}.parquet")
        tables.append(score(scorer, rows.select(np.isin(rows.pair, PAIRS)), part, chars))
    table = pa.concat_tables(tables, promote_options="default").unify_dictionaries()
    described = {
        "estimate": scorer.digest,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "split": "routing.train.parts; the estimate was fitted and weighed on other questions",
        "onnxruntime": version("onnxruntime"),
        "rows": table.num_rows,
        "reference": [round(float(value), 5) for value in scorer.reference.gain_quantiles],
    }
    table = table.replace_schema_metadata({"heldout": json.dumps(described)})
    pq.write_table(table, given.out, compression="zstd", compression_level=19)
    print(json.dumps(described))
    return 0


if __name__ == "__main__":
    sys.exit(main())
