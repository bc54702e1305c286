"""The committed scorer: what it says, and that a changed file is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from routing import artefact
from routing.artefact import ArtefactError
from routing.assembly import describe, packed
from routing.complexity import HEADS_FILE, ComplexityScorer, arrays_of
from routing.encoder import MAX_TOKENS, MODEL_FILE, TOKENIZER_FILE, Cut, open_tokenizer, tokenize
from routing.evaluate import ARTEFACT

EASY = "What is the capital of France?"
HARD = (
    "Find the number of ordered pairs of positive integers (a, b) such that a + b = 1000 and "
    "neither a nor b has a zero digit, and explain why the count is right."
)


@pytest.fixture(scope="module")
def scorer() -> ComplexityScorer:
    return ComplexityScorer.load(ARTEFACT)


def test_scores_are_chances(scorer: ComplexityScorer) -> None:
    prompts = [EASY, HARD, "", "\n", "漢字" * 900, "a" * 200_000, "\ud800", "\0"]
    for pair in scorer.pairs:
        scores = scorer.score(prompts, pair)
        for values in (scores.weak, scores.strong, scores.trust):
            assert values.shape == (len(prompts),)
            assert np.isfinite(values).all()
            assert ((values >= 0) & (values <= 1)).all()
        assert (np.abs(scores.gain) <= 1).all()


def test_a_prompt_has_a_centre_and_a_cosine_to_it(scorer: ComplexityScorer) -> None:
    scores = scorer.score([EASY, HARD, "", "漢字" * 900])

    assert scores.cluster.dtype == np.int64
    assert (scores.cluster >= 0).all()
    assert (scores.cluster < len(scorer.reference.cluster_share)).all()
    assert (np.abs(scores.similarity) <= 1).all()
    assert scores.similarity[1] > scores.similarity[3]


def test_the_reference_describes_the_training_prompts(scorer: ComplexityScorer) -> None:
    known = scorer.reference

    assert known.gain_quantiles.shape == (101,)
    assert (np.diff(known.gain_quantiles) >= 0).all()
    assert (np.abs(known.gain_quantiles) <= 1).all()
    assert known.similarity_edges.shape == (11,)
    assert known.similarity_edges[[0, -1]].tolist() == [-1, 1]
    assert (np.diff(known.similarity_edges) > 0).all()
    for share, bins in ((known.cluster_share, None), (known.similarity_share, 10)):
        assert share.sum() == pytest.approx(1, abs=1e-5)
        assert (share >= 0).all()
        assert bins is None or share.shape == (bins,)


def test_a_scorer_without_a_reference_is_refused(tmp_path: Path) -> None:
    whole = artefact.load(ARTEFACT)
    arrays = {
        name: values
        for name, values in arrays_of(whole.file(HEADS_FILE)).items()
        if not name.startswith("reference.")
    }
    artefact.save(tmp_path, whole.settings, {**whole.files, HEADS_FILE: packed(arrays)})
    with pytest.raises(ArtefactError, match=r"no array reference\.gain_quantiles"):
        ComplexityScorer.load(tmp_path)

    describe(tmp_path, [EASY, HARD])
    found = ComplexityScorer.load(tmp_path)
    assert found.reference.cluster_share.sum() == pytest.approx(1)
    assert found.score([HARD]).gain == ComplexityScorer.load(ARTEFACT).score([HARD]).gain


def test_a_hard_question_is_harder(scorer: ComplexityScorer) -> None:
    scores = scorer.score([EASY, HARD])

    assert scores.weak[0] > scores.weak[1]
    assert scores.strong[0] > scores.strong[1]


def test_the_same_prompt_scores_the_same_in_any_company(scorer: ComplexityScorer) -> None:
    alone = scorer.score([HARD])
    among = scorer.score([EASY, HARD, "a" * 5_000, HARD])
    again = ComplexityScorer.load(ARTEFACT).score([HARD])

    for name in ("weak", "strong", "gain", "trust"):
        value = getattr(alone, name)[0]
        assert getattr(again, name)[0] == value
        # Activations are quantised by the range of a batch, and a processor's 8-bit products are
        # rounded in a way of its own: a prompt's company moves its score a little.
        assert getattr(among, name)[1] == pytest.approx(value, abs=0.01)
        assert getattr(among, name)[3] == getattr(among, name)[1]


def test_an_unknown_pair_is_the_default_pair(scorer: ComplexityScorer) -> None:
    assert scorer.score([HARD], "unheard of").gain == scorer.score([HARD]).gain
    each = scorer.score([HARD, HARD], [scorer.default_pair, "mixtral_gpt4"])
    assert each.gain[0] != each.gain[1]


def test_pairs_and_prompts_must_match(scorer: ComplexityScorer) -> None:
    with pytest.raises(ValueError, match="1 pairs for 2 prompts"):
        scorer.score([EASY, HARD], ["mixtral_gpt4"])


def test_no_prompts_give_no_scores(scorer: ComplexityScorer) -> None:
    assert scorer.score([]).gain.shape == (0,)


def test_a_long_prompt_is_cut_to_beginning_and_end() -> None:
    tokenizer = open_tokenizer((ARTEFACT / TOKENIZER_FILE).read_bytes())
    whole = tokenizer.encode(" ".join(str(i) for i in range(500))).ids
    (cut,) = tokenize(tokenizer, [" ".join(str(i) for i in range(500))])

    assert len(cut) == MAX_TOKENS
    assert cut[:81] == whole[:81]
    assert cut[81:] == whole[-47:]


def test_an_artefact_says_how_much_is_read() -> None:
    tokenizer = open_tokenizer((ARTEFACT / TOKENIZER_FILE).read_bytes())
    whole = tokenizer.encode("x " * 500).ids
    (cut,) = tokenize(tokenizer, ["x " * 500], Cut(40, 30))

    assert cut == [*whole[:31], *whole[-9:]]
    assert Cut.of({}) == Cut()
    assert Cut.of({"tokens": {"limit": 96, "head": 60}}) == Cut(96, 60)
    for stated in ({"limit": 96}, "96", {"limit": 2, "head": 1}, {"limit": 96, "head": 95}):
        with pytest.raises(ArtefactError, match="tokens is"):
            Cut.of({"tokens": stated})


def test_the_digest_names_the_manifest(scorer: ComplexityScorer) -> None:
    assert scorer.digest == artefact.load(ARTEFACT).digest
    assert scorer.digest.startswith("sha256:")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ARTEFACT, tmp_path / "copy"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = folder / artefact.MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", [MODEL_FILE, HEADS_FILE, TOKENIZER_FILE])
def test_one_flipped_bit_is_refused(copy: Path, name: str) -> None:
    flip(copy / name)

    with pytest.raises(ArtefactError, match=f"{name}: is not the file"):
        ComplexityScorer.load(copy)


@pytest.mark.parametrize("name", [MODEL_FILE, HEADS_FILE, TOKENIZER_FILE])
def test_a_missing_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()

    with pytest.raises(ArtefactError, match=f"{name}: cannot be read"):
        ComplexityScorer.load(copy)


def test_an_unexpected_file_is_refused(copy: Path) -> None:
    (copy / "extra.onnx.data").write_bytes(b"")

    with pytest.raises(ArtefactError, match="not in the manifest"):
        ComplexityScorer.load(copy)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(format=2), "not of format 1"),
        (lambda m: m.pop("files"), "lacks files"),
        (lambda m: m.update(settings=[]), "lacks files or settings"),
        (lambda m: m["files"].update({"../x": {}}), "bad entry"),
        (lambda m: m["settings"].update(default_pair="none"), "default_pair"),
        (lambda m: m["settings"].update(features=["chars"]), "other hand features"),
        (lambda m: m["files"].pop(HEADS_FILE), "not in the manifest"),
    ],
)
def test_a_bad_manifest_is_refused(
    copy: Path, change: Callable[[dict[str, object]], object], says: str
) -> None:
    edit(copy, change)

    with pytest.raises(ArtefactError, match=says):
        ComplexityScorer.load(copy)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no such file"):
        ComplexityScorer.load(tmp_path / "nothing")
    (tmp_path / artefact.MANIFEST).write_text("{")
    with pytest.raises(ArtefactError, match="cannot be read as JSON"):
        ComplexityScorer.load(tmp_path)


def test_heads_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    whole = artefact.load(ARTEFACT)
    artefact.save(tmp_path, whole.settings, {**whole.files, HEADS_FILE: b"PK no archive"})
    with pytest.raises(ArtefactError, match="heads: cannot be read"):
        ComplexityScorer.load(tmp_path)


def test_an_encoder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    whole = artefact.load(ARTEFACT)
    artefact.save(tmp_path, whole.settings, {**whole.files, MODEL_FILE: b"no model"})
    with pytest.raises(ArtefactError, match="encoder cannot be loaded"):
        ComplexityScorer.load(tmp_path)


def test_serving_imports_no_training_library() -> None:
    import subprocess
    import sys

    code = (
        "import sys; import routing.complexity, routing.evaluate, routing.drift, routing.retrain; "
        "print(sorted({'torch', 'onnx', 'sklearn', 'transformers', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
