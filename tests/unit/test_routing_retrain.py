"""Retraining on outcomes of one's own: the gate, what is written, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from routing import artefact, retrain
from routing.assembly import LEARN, TEST, parts, prepare
from routing.complexity import ComplexityScorer
from routing.dataset import keyed, read_folder
from routing.encoder import TOKENIZER_FILE, open_tokenizer
from routing.evaluate import ARTEFACT, EXIT_DATA
from routing.retrain import EXIT_CURRENT, EXIT_REFUSED, main

PLACES = ("Rome", "Oslo", "Lima", "Cairo", "Delhi", "Perth", "Quito", "Seoul", "Tunis", "Lyon")
THINGS = ("train", "bridge", "market", "school", "river", "museum", "garden", "harbour")


def table(rows: int = 700, seed: int = 1, **changes: Any) -> pa.Table:
    """Outcomes in which the large model gains on questions of one kind; None drops a column."""
    rng = np.random.default_rng(seed)
    hard = rng.random(rows) < 0.5
    prompts = []
    for i in range(rows):
        place, thing = PLACES[rng.integers(10)], THINGS[rng.integers(8)]
        prompts.append(
            f"Derive the stress in {thing} {i} of {place} step by step."
            if hard[i]
            else f"Where is {thing} number {i} in {place}?"
        )
    weak = (rng.random(rows) < np.where(hard, 0.2, 0.85)).astype(float)
    strong = (rng.random(rows) < np.where(hard, 0.85, 0.87)).astype(float)
    columns: dict[str, Any] = {
        "prompt": prompts,
        "pair": ["ours"] * rows,
        "source": [("tickets", "manuals", "chat")[i % 3] for i in range(rows)],
        "weak_score": weak,
        "strong_score": strong,
        **changes,
    }
    return pa.table({name: values for name, values in columns.items() if values is not None})


def folder(path: Path, *tables: pa.Table) -> Path:
    path.mkdir()
    for index, one in enumerate(tables):
        pq.write_table(one, path / f"part-{index}.parquet")
    return path


def run(tmp_path: Path, *more: str) -> int:
    given = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "made")]
    return main([*given, "--work", str(tmp_path / "work"), *more])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("retrain")
    whole = table()
    folder(path / "data", whole.slice(0, 300), whole.slice(300))
    assert run(path) == 0
    return path


def test_a_better_scorer_is_written_with_its_evidence(made: Path) -> None:
    scorer = ComplexityScorer.load(made / "made")
    verdict = json.loads((made / "made.gate.json").read_text())
    card = (made / "made" / artefact.CARD).read_text()

    assert scorer.pairs == ("ours",)
    assert scorer.default_pair == "ours"
    assert verdict["passed"]
    assert verdict["why"] == []
    assert verdict["candidate"] == scorer.digest
    assert verdict["current"] == artefact.load(ARTEFACT).digest
    assert set(verdict["inputs"]) == {"part-0.parquet", "part-1.parquet"}
    assert verdict["held_out"]["routers"]["scorer"]["apgr"]["low"] > 0.5
    assert {"current", "length", "random"} <= set(verdict["held_out"]["routers"])
    assert verdict["held_out"]["differences"]["scorer - current"]["low"] > -0.02
    for digest in verdict["inputs"].values():
        assert digest in card
    assert "| ours | tickets | 234 |" in card
    # No prompt is kept outside the folder of vectors, and no folder of this machine is named.
    for text in (card, json.dumps(verdict)):
        assert "Derive" not in text
        assert str(made) not in text


def test_what_it_learned_is_its_own(made: Path) -> None:
    prompts = [
        "Where is lift number 9 in Bonn?",
        "Derive the stress in lift 9 of Bonn step by step.",
    ]
    scores = ComplexityScorer.load(made / "made").score(prompts)

    assert scores.gain[1] - scores.gain[0] > 0.2
    assert scores.weak[0] > scores.weak[1]


def test_the_reference_is_that_of_the_new_prompts(made: Path) -> None:
    rows = keyed(read_folder(made / "data", training=False))
    tokenizer = open_tokenizer((ARTEFACT / TOKENIZER_FILE).read_bytes())
    material = prepare(rows, tokenizer)
    part = parts(material, leave_out=False)
    learned = [material.prompts[i] for i in np.flatnonzero(part == LEARN)]
    scorer = ComplexityScorer.load(made / "made")
    scores = scorer.score(learned)

    known = scorer.reference
    assert known.gain_quantiles == pytest.approx(
        # Scored in other batches, which moves a score a little (see test_routing_artefact).
        np.quantile(scores.gain, np.linspace(0, 1, 101)),
        abs=0.01,
    )
    share = np.bincount(scores.cluster, minlength=len(known.cluster_share)) / len(learned)
    assert known.cluster_share == pytest.approx(share, abs=0.02)


def test_a_second_run_goes_on_from_stored_vectors(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = artefact.load(made / "made").digest
    assert run(made, "--dry-run") == 0
    shown = capsys.readouterr()

    assert "vectors" not in shown.err
    assert f"would be written as {before}" in shown.out
    assert (made / "work" / "gate.json").is_file()


def test_shuffled_labels_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = table()
    order = np.random.default_rng(3).permutation(whole.num_rows)
    weak, strong = (whole.column(name).to_numpy()[order] for name in ("weak_score", "strong_score"))
    folder(tmp_path / "data", table(weak_score=weak, strong_score=strong))

    assert run(tmp_path) == EXIT_REFUSED
    shown = capsys.readouterr().out
    assert "refused: no better than a random order" in shown
    assert not (tmp_path / "made").exists()
    verdict = json.loads((tmp_path / "made.gate.json").read_text())
    assert not verdict["passed"]
    assert len(verdict["why"]) >= 1


def test_a_strong_model_that_is_not_better_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = table()
    folder(tmp_path / "data", table(strong_score=whole.column("weak_score").to_numpy()))

    assert run(tmp_path) == EXIT_REFUSED
    assert "not measurably better" in capsys.readouterr().out


def test_what_stands_at_out_stays_when_refused(made: Path, tmp_path: Path) -> None:
    folder(tmp_path / "data", table(strong_score=[0.5] * 700, weak_score=[0.5] * 700))
    artefact.save(tmp_path / "made", {"kept": True}, {"x": b"x"})

    assert run(tmp_path) == EXIT_REFUSED
    assert artefact.load(tmp_path / "made").settings == {"kept": True}


def bad(**changes: Any) -> list[pa.Table]:
    return [table(), table(50, seed=2, **changes)]


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        (bad(weak_score=None), "part-1.parquet: lacks column weak_score"),
        (bad(strong_score=[7.0] * 50), "part-1.parquet: column strong_score, row 0: 7 is not in"),
        (bad(prompt=["x"] * 9 + [""] + ["x"] * 40), "part-1.parquet: column prompt, row 9: empty"),
        ([table(120)], "120 distinct questions, of which"),
        ([table(400, prompt=["the same"] * 400)], "1 distinct questions, of which"),
        ([], "holds no .parquet file"),
        (bad(pair=["theirs"] * 50), "say with --pair which one is served"),
    ],
)
def test_bad_data_is_refused_with_place_and_remedy(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tables: Sequence[pa.Table],
    says: str,
) -> None:
    folder(tmp_path / "data", *tables)

    assert run(tmp_path) == EXIT_DATA
    shown = capsys.readouterr().err
    assert says in shown
    assert f"error: {tmp_path / 'data'}" in shown
    assert not (tmp_path / "made").exists()


def test_a_pair_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path / "data", table())

    assert run(tmp_path, "--pair", "theirs") == EXIT_DATA
    assert "holds ours and no theirs" in capsys.readouterr().err


def test_a_bad_current_artefact_has_an_exit_code_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path / "data", table())

    assert run(tmp_path, "--current", str(tmp_path)) == EXIT_CURRENT
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [("--epochs", "2"), ("--fit", "all", "--epochs", "0"), ("--seed", "-1"), ("--fit", "some")],
)
def test_wrong_usage_is_2(tmp_path: Path, more: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *more)
    assert stopped.value.code == 2


def test_a_folder_that_is_no_artefact_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path / "made", table(5))

    with pytest.raises(SystemExit) as stopped:
        run(tmp_path)
    assert stopped.value.code == 2
    assert "is no artefact" in capsys.readouterr().err


def test_a_work_folder_that_cannot_be_made_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "work").write_text("a file")

    with pytest.raises(SystemExit) as stopped:
        run(tmp_path)
    assert stopped.value.code == 2
    assert f"{tmp_path / 'work'}: cannot be made" in capsys.readouterr().err


def test_missing_packages_of_the_whole_fit_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrain, "TRAINING", ("no_such_package",))
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--fit", "all")
    assert stopped.value.code == 2
    assert "no_such_package; install gatehouse[train]" in capsys.readouterr().err


def test_help_states_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "4 the gate refused" in " ".join(capsys.readouterr().out.split())


def test_a_question_stays_in_one_part_in_any_layout(tmp_path: Path) -> None:
    folder(
        tmp_path / "data",
        table(2, prompt=["What is the  capital?", "WHAT is the capital"]),
    )
    rows = keyed(read_folder(tmp_path / "data", training=False))

    assert rows.question_key[0] == rows.question_key[1]
    assert len(set(keyed(rows).question_key)) == 1


def test_held_out_questions_are_never_learned(made: Path) -> None:
    rows = keyed(read_folder(made / "data", training=False))
    material = prepare(rows, open_tokenizer((ARTEFACT / TOKENIZER_FILE).read_bytes()))
    part = parts(material, leave_out=False)
    keys = np.asarray(rows.question_key)
    held, learned = (set(keys[part[material.question] == which]) for which in (TEST, LEARN))

    assert not held & learned
    assert len(held) > 100
