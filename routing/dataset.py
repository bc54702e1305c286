"""Outcome files: one row per question that a weak and a strong model both answered.

A file is Parquet with the columns below; further columns are ignored. Scores lie in 0 to 1.

| column | needed for | meaning |
|---|---|---|
| ``prompt`` | all | what a router sees |
| ``weak_score``, ``strong_score`` | all | what the two models' answers were worth |
| ``pair`` | all | which two models; chooses the head of the scorer |
| ``source`` | all | where the question comes from; figures are printed per source |
| ``subject`` | training | finer than ``source``; lets whole subjects be left out |
| ``question_key`` | training | equal for one question in any wording; folds never split it |
| ``aux_small_mean``, ``aux_large_mean`` | training | mean score of other models; targets only |

Whatever is wrong with a file is a `DataError` that names the file, the column, the first bad row,
and what to do; no prompt is ever quoted, because outcome files may hold real users' text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

NEEDED = ("prompt", "weak_score", "strong_score", "pair", "source")
"""Columns without which a file cannot be evaluated."""

NEEDED_FOR_TRAINING = (*NEEDED, "subject", "question_key", "aux_small_mean", "aux_large_mean")
"""Columns without which a file cannot be trained on."""

_WORD = re.compile(r"\w+")
_TEXT = {"prompt", "pair", "source", "subject", "question_key"}
_MAY_BE_NULL = {"aux_small_mean", "aux_large_mean", "subject"}


class DataError(Exception):
    """An outcome file cannot be used; the message says where and what to do about it."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Rows of one or more outcome files, column by column, all of one length."""

    prompt: list[str]
    pair: list[str]
    source: list[str]
    weak: npt.NDArray[np.float64]
    """Score of the weak model's answer, 0 to 1."""
    strong: npt.NDArray[np.float64]
    """Score of the strong model's answer, 0 to 1."""
    subject: list[str]
    """Empty strings where the file has none."""
    question_key: list[str]
    """Empty strings where the file has none."""
    aux_small: npt.NDArray[np.float64]
    """Mean score of other small models, 0 to 1; NaN where unknown. Never an input of a router."""
    aux_large: npt.NDArray[np.float64]
    """Mean score of other large models, 0 to 1; NaN where unknown. Never an input of a router."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.prompt)

    @property
    def gain(self) -> npt.NDArray[np.float64]:
        """What the strong model adds: ``strong - weak``, -1 to 1."""
        return self.strong - self.weak

    def select(self, rows: npt.NDArray[Any]) -> Outcomes:
        """The rows of a mask or index array, in its order."""
        index = np.flatnonzero(rows) if rows.dtype == bool else rows

        def pick(values: list[str]) -> list[str]:
            return [values[i] for i in index]

        return Outcomes(
            prompt=pick(self.prompt),
            pair=pick(self.pair),
            source=pick(self.source),
            weak=self.weak[index],
            strong=self.strong[index],
            subject=pick(self.subject),
            question_key=pick(self.question_key),
            aux_small=self.aux_small[index],
            aux_large=self.aux_large[index],
        )


def read(path: Path, *, training: bool = False) -> Outcomes:
    """Read one outcome file.

    Args:
        path: A Parquet file.
        training: Whether the columns that only training needs must be there.

    Raises:
        DataError: The file is missing, no Parquet, lacks a column, is empty, or holds a value
            that cannot be.

    """
    needed = NEEDED_FOR_TRAINING if training else NEEDED
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give one Parquet file of it")
    try:
        schema = pq.read_schema(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the path of a Parquet file") from None
    except (pa.ArrowInvalid, OSError):
        raise DataError(
            f"{path}: cannot be read as Parquet; write it with pyarrow, pandas or DuckDB"
        ) from None
    missing = [name for name in needed if name not in schema.names]
    if missing:
        raise DataError(
            f"{path}: lacks column {', '.join(missing)}; it has {', '.join(schema.names) or 'none'}"
            f"; rename or add columns so that {', '.join(needed)} are there"
        )
    wanted = [name for name in NEEDED_FOR_TRAINING if name in schema.names]
    try:
        table = pq.read_table(path, columns=wanted)
    except (pa.ArrowInvalid, OSError):
        raise DataError(f"{path}: is damaged; its data cannot be read, write it again") from None
    if table.num_rows == 0:
        raise DataError(f"{path}: has no rows; nothing can be measured on it")
    columns = {name: _column(path, table, name) for name in wanted}
    rows = table.num_rows

    def text(name: str) -> list[str]:
        return columns[name] if name in columns else [""] * rows

    def numbers(name: str) -> npt.NDArray[np.float64]:
        return columns[name] if name in columns else np.full(rows, np.nan)

    return Outcomes(
        prompt=text("prompt"),
        pair=text("pair"),
        source=text("source"),
        weak=numbers("weak_score"),
        strong=numbers("strong_score"),
        subject=text("subject"),
        question_key=text("question_key"),
        aux_small=numbers("aux_small_mean"),
        aux_large=numbers("aux_large_mean"),
    )


def read_folder(folder: Path, *, training: bool = True) -> Outcomes:
    """Read every ``*.parquet`` of a folder, in the order of their names.

    Args:
        folder: Where the files are.
        training: Whether the columns that only training needs must be there.

    Raises:
        DataError: There is none, or one of them cannot be used.

    """
    return join([read(path, training=training) for path in files_of(folder)])


def files_of(folder: Path) -> list[Path]:
    """The outcome files of a folder, in the order of their names, at least one.

    Raises:
        DataError: There is none.

    """
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        raise DataError(f"{folder}: holds no .parquet file; give the folder of the outcome files")
    return paths


def keyed(rows: Outcomes) -> Outcomes:
    """The rows with a key for every question that has none: a hash of its words.

    Upper and lower case, white space and punctuation do not count, so the same question in another
    layout stays in the same fold. Different wordings of one question do need a key of their own in
    the file.
    """
    keys = [
        key
        or hashlib.sha256(
            " ".join(_WORD.findall(prompt.lower())).encode("utf-8", "replace")
        ).hexdigest()[:32]
        for key, prompt in zip(rows.question_key, rows.prompt, strict=True)
    ]
    return replace(rows, question_key=keys)


def join(parts: Sequence[Outcomes]) -> Outcomes:
    """Rows of several files, one after the other."""
    return Outcomes(
        prompt=[value for part in parts for value in part.prompt],
        pair=[value for part in parts for value in part.pair],
        source=[value for part in parts for value in part.source],
        weak=np.concatenate([part.weak for part in parts]),
        strong=np.concatenate([part.strong for part in parts]),
        subject=[value for part in parts for value in part.subject],
        question_key=[value for part in parts for value in part.question_key],
        aux_small=np.concatenate([part.aux_small for part in parts]),
        aux_large=np.concatenate([part.aux_large for part in parts]),
    )


def _column(path: Path, table: pa.Table, name: str) -> Any:
    column = table.column(name)
    if name in _TEXT:
        return _text_column(path, column, name)
    return _score_column(path, column, name)


def _text_column(path: Path, column: pa.ChunkedArray, name: str) -> list[str]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise DataError(f"{path}: column {name} is {column.type}; it must be text")
    values: list[str | None] = column.to_pylist()
    for row, value in enumerate(values):
        if value is None and name not in _MAY_BE_NULL:
            raise DataError(f"{path}: column {name}, row {row}: no value; fill it or drop the row")
        if value == "" and name == "prompt":
            raise DataError(f"{path}: column prompt, row {row}: empty; drop the row")
    return [value or "" for value in values]


def _score_column(path: Path, column: pa.ChunkedArray, name: str) -> npt.NDArray[np.float64]:
    kind = column.type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"{path}: column {name} is {kind}; it must be a number from 0 to 1")
    values = np.asarray(
        [np.nan if value is None else float(value) for value in column.to_pylist()],
        dtype=np.float64,
    )
    unknown = np.isnan(values)
    if name not in _MAY_BE_NULL and unknown.any():
        row = int(np.flatnonzero(unknown)[0])
        raise DataError(f"{path}: column {name}, row {row}: no value; fill it or drop the row")
    outside = ~unknown & ((values < 0) | (values > 1))
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise DataError(
            f"{path}: column {name}, row {row}: {values[row]:g} is not in 0 to 1; "
            "divide scores by their maximum"
        )
    return values
