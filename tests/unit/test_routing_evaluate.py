"""The evaluation command: figures, controls, and errors that say where and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from routing import evaluate
from routing.dataset import DataError, read, read_folder
from routing.evaluate import main, measure


def table(rows: int = 120, seed: int = 3, **changes: Any) -> pa.Table:
    """Outcomes in which longer questions gain more; ``changes`` replace or (None) drop columns."""
    rng = np.random.default_rng(seed)
    words = rng.integers(1, 40, rows)
    weak = (rng.random(rows) < 0.5).astype(float)
    strong = np.maximum(weak, (rng.random(rows) < words / 45).astype(float))
    columns: dict[str, Any] = {
        "prompt": ["word " * int(count) for count in words],
        "pair": ["llama31_8b_70b"] * rows,
        "source": ["odd" if i % 2 else "even" for i in range(rows)],
        "weak_score": weak,
        "strong_score": strong,
        **changes,
    }
    return pa.table({name: values for name, values in columns.items() if values is not None})


@pytest.fixture
def outcomes(tmp_path: Path) -> Path:
    path = tmp_path / "outcomes.parquet"
    pq.write_table(table(), path)
    return path


def test_json_names_every_router_with_intervals(
    outcomes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(outcomes), "--json", "--rounds", "50"]) == 0
    reports = json.loads(capsys.readouterr().out)

    assert [report["source"] for report in reports] == ["all", "even", "odd"]
    whole = reports[0]
    assert set(whole["routers"]) == {
        "scorer", "ridge", "length", "source", "random", "shuffled", "shuffled in source",
    }  # fmt: skip
    for figures in whole["routers"].values():
        for value in figures.values():
            assert value["low"] <= value["high"]
    assert whole["routers"]["random"]["apgr"]["value"] == pytest.approx(0.5)
    assert whole["routers"]["random"]["cpt80"]["value"] == pytest.approx(0.8)
    assert whole["routers"]["length"]["apgr"]["value"] > 0.55
    assert set(whole["differences"]) == {"scorer - length", "scorer - ridge"}


def test_text_is_printed_with_counts(outcomes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(outcomes), "--rounds", "20"]) == 0
    shown = capsys.readouterr().out

    assert "llama31_8b_70b, all: 120 questions" in shown
    assert "scorer - length:" in shown


def test_the_same_file_gives_the_same_figures(
    outcomes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for _ in range(2):
        assert main([str(outcomes), "--rounds", "20", "--seed", "5"]) == 0
        shown.append(capsys.readouterr().out)

    assert shown[0] == shown[1]


@pytest.mark.parametrize("kind", ["text", "parquet"])
def test_scores_of_another_router_are_measured(
    tmp_path: Path, outcomes: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    rows = read(outcomes)
    path = tmp_path / ("scores.parquet" if kind == "parquet" else "scores.txt")
    if kind == "parquet":
        pq.write_table(pa.table({"score": rows.gain}), path)
    else:
        path.write_text("".join(f"{value}\n" for value in rows.gain))

    assert main([str(outcomes), "--scores", str(path), "--json", "--rounds", "20"]) == 0
    routers = json.loads(capsys.readouterr().out)[0]["routers"]
    assert "ridge" not in routers
    assert routers["scorer"]["apgr"]["value"] > max(
        routers[name]["apgr"]["value"] for name in ("length", "shuffled", "shuffled in source")
    )


def test_shuffled_scores_are_random_on_average() -> None:
    rows = read_rows(table(400))
    found = [
        measure(rows, {"scorer": rows.gain}, rounds=1, seed=seed).routers["shuffled"].apgr.value
        for seed in range(60)
    ]
    assert np.mean(found) == pytest.approx(0.5, abs=0.05)


def read_rows(made: pa.Table) -> Any:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes.parquet"
        pq.write_table(made, path)
        return read(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weak_score": None}, "lacks column weak_score; it has prompt, pair"),
        ({"prompt": None, "pair": None}, "lacks column prompt, pair;"),
        ({"prompt": [1] * 120}, "column prompt is int64; it must be text"),
        ({"prompt": ["x"] * 7 + [""] + ["x"] * 112}, "column prompt, row 7: empty"),
        ({"prompt": ["x"] * 7 + [None] + ["x"] * 112}, "column prompt, row 7: no value"),
        ({"strong_score": ["1"] * 120}, "column strong_score is string; it must be a number"),
        ({"strong_score": [0.0] * 9 + [1.5] + [0.0] * 110}, "row 9: 1.5 is not in 0 to 1"),
        ({"weak_score": [float("nan")] + [0.0] * 119}, "column weak_score, row 0: no value"),
        ({"weak_score": [float("inf")] + [0.0] * 119}, "row 0: inf is not in 0 to 1"),
    ],
)
def test_a_bad_file_is_refused_with_place_and_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], says: str
) -> None:
    path = tmp_path / "bad.parquet"
    pq.write_table(table(**changes), path)

    assert main([str(path)]) == evaluate.EXIT_DATA
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {path}: ")
    assert says in shown.err
    assert ";" in shown.err


def test_files_that_are_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.parquet"
    text.write_text("prompt,weak_score\n")
    empty = tmp_path / "empty.parquet"
    pq.write_table(table().slice(0, 0), empty)
    for path, says in (
        (tmp_path / "absent.parquet", "no such file"),
        (tmp_path, "is a folder"),
        (text, "cannot be read as Parquet"),
        (empty, "has no rows"),
    ):
        assert main([str(path)]) == evaluate.EXIT_DATA
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("1\n2\n", "2 scores for 120 rows"),
        ("1\nx\n", "line or row 2: not a finite number"),
        ("1\nnan\n", "line or row 2: not a finite number"),
        ("\n" * 120, "line or row 1: not a finite number"),
    ],
)
def test_bad_scores_are_refused(
    tmp_path: Path, outcomes: Path, capsys: pytest.CaptureFixture[str], content: str, says: str
) -> None:
    path = tmp_path / "scores.txt"
    path.write_text(content)

    assert main([str(outcomes), "--scores", str(path)]) == evaluate.EXIT_DATA
    assert says in capsys.readouterr().err
    assert main([str(outcomes), "--scores", str(tmp_path / "absent")]) == evaluate.EXIT_DATA


def test_a_bad_artefact_has_an_exit_code_of_its_own(
    tmp_path: Path, outcomes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(outcomes), "--artefact", str(tmp_path)]) == evaluate.EXIT_ARTEFACT
    assert "no such file" in capsys.readouterr().err


def test_wrong_usage_is_2(outcomes: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(outcomes), "--rounds", "0"])
    assert stopped.value.code == 2


def test_models_that_tie_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tie.parquet"
    weak = np.arange(120) % 2
    pq.write_table(table(weak_score=weak, strong_score=1 - weak), path)

    assert main([str(path), "--rounds", "50"]) == 0
    assert "NOTE: the gap" in capsys.readouterr().out
    assert main([str(path), "--rounds", "20", "--json"]) == 0
    json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def test_training_needs_more_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.parquet file"):
        read_folder(tmp_path)
    pq.write_table(table(), tmp_path / "one.parquet")
    with pytest.raises(DataError, match="lacks column subject, question_key"):
        read_folder(tmp_path)
