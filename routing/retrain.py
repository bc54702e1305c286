"""Fit the scorer to an organisation's own outcomes: ``python -m routing.retrain``.

    outcome files -> checked -> learn | choose | held out -> new scorer -> gate -> artefact

The files are those of `routing.dataset`: one row per question that both models answered, columns
``prompt``, ``weak_score``, ``strong_score``, ``pair``, ``source``; ``subject`` and
``question_key`` where there are any. Every question falls into one part by a hash of its key, the
same in every run: 70 % to learn from, 10 % to weigh the members on, 20 % held out.

``--fit heads``, the default, keeps the encoder of the current scorer and fits what stands on it:
ridge (from where the current one is), trees, the calibration of the tuned heads, weights of the
members, trust, and the reference that thresholds and drift start from. Minutes; no PyTorch.
``--fit all`` fine-tunes the encoder anew from the pretrained one, on what is in ``--data`` and
nothing else, so put the public outcomes there too; it needs the extra ``train``.

The gate: the new scorer is written to ``--out`` only if, on held-out questions of ``--pair``,

* the strong model is better than the weak one at all (95 % interval of the gap above 0),
* the order of the new scorer is better than a random one (95 % interval of its APGR above 0.5),
* it is not worse than the current scorer (95 % interval of the difference of APGR, paired, above
  -0.02).

What is written is what was measured: it is not fitted again with the held-out rows. If the current
scorer was trained on some of these questions, the comparison favours it.

The verdict with all figures goes to ``gate.json`` beside the folder (``OUT.gate.json``), and with a
description of the run into the folder's MODEL_CARD.md. No prompt is stored in either. Progress goes
to stderr; vectors and checkpoints stay in ``--work``, from where an interrupted run goes on.

Exit codes: 0 written (or would be, with --dry-run), 2 wrong usage, 3 the data cannot be used, 4 the
gate refused, 5 the current artefact cannot be used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from routing import artefact, evaluate, fitting, heads
from routing.artefact import CARD, MANIFEST, Artefact, ArtefactError
from routing.assembly import (
    CHOOSE,
    LEARN,
    TEST,
    Combination,
    Fitted,
    Kept,
    Material,
    describe,
    fit,
    parts,
    prepare,
    trust,
    weigh,
)
from routing.complexity import (
    HEADS_FILE,
    ComplexityScorer,
    Members,
    arrays_of,
    nearest,
)
from routing.complexity import judge as judge_members
from routing.dataset import DataError, Outcomes, files_of, keyed, read_folder
from routing.encoder import MODEL_FILE, TOKENIZER_FILE, Encoded, Encoder, open_tokenizer
from routing.evaluate import Report, plain

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

EXIT_REFUSED = 4
EXIT_CURRENT = 5

LEAST_QUESTIONS: Mapping[int, int] = {LEARN: 200, CHOOSE: 20, TEST: 60}
"""Fewest distinct questions of the pair in each part."""

MARGIN = 0.02
"""By how much APGR may be worse than the current one, at the lower end of the interval."""

CALIBRATION_PRIOR = 40.0
"""Rows that pull the calibration towards leaving the tuned heads as they are."""

LEAST_GROUP = 30
"""Sources with fewer rows are not left out by themselves to learn what trust is worth."""

ROUNDS = 2_000


@dataclass(frozen=True, slots=True)
class Gate:
    """Whether the new scorer may replace the current one, and on what evidence."""

    passed: bool
    why: tuple[str, ...]
    """What it failed, in words; empty where it passed."""
    report: Report
    """Figures on the held-out questions; ``current`` is the scorer that would be replaced."""


def judge(
    rows: Outcomes, new: ComplexityScorer, current: ComplexityScorer, *, seed: int = 1
) -> Gate:
    """Measure both scorers on held-out rows of one pair and decide.

    Args:
        rows: Rows that the new scorer has not seen, at least one, all of one pair.
        new: The candidate.
        current: What it would replace.
        seed: Of the bootstrap, 0 or more.

    """
    scores = new.score(rows.prompt, rows.pair)
    own = current.score(rows.prompt, rows.pair)
    report = evaluate.measure(
        rows,
        {"scorer": scores.gain, "ridge": scores.ridge, "current": own.gain},
        rounds=ROUNDS,
        seed=seed,
    )
    found = report.routers["scorer"].apgr
    difference = report.differences["scorer - current"]
    why = []
    # Written so that NaN, where the models tie, refuses.
    if not report.gap.low > 0:
        why.append(
            "the strong model is not measurably better than the weak one: gap "
            f"{report.gap.value:.4f} [{report.gap.low:.4f}, {report.gap.high:.4f}]; gather more "
            "outcomes, or do not route"
        )
    if not found.low > 0.5:
        why.append(
            f"no better than a random order: APGR {found.value:.3f} [{found.low:.3f}, "
            f"{found.high:.3f}] must lie above 0.5; gather more outcomes"
        )
    if not difference.low > -MARGIN:
        why.append(
            f"may be worse than the current scorer: difference of APGR {difference.value:+.3f} "
            f"[{difference.low:+.3f}, {difference.high:+.3f}] must lie above {-MARGIN}; keep the "
            "current one, or gather more outcomes"
        )
    return Gate(not why, tuple(why), report)


def pair_of(rows: Outcomes, named: str | None, current: str, folder: Path) -> str:
    """Which pair the new scorer is for: the named one, the only one, or the current default.

    Args:
        rows: All rows, at least one.
        named: What was asked for, if anything.
        current: Default pair of the current scorer.
        folder: Where the rows come from, for messages.

    Raises:
        DataError: The data does not hold it, or holds several and none is named.

    """
    held = sorted(set(rows.pair))
    if named is not None and named not in held:
        raise DataError(
            f"{folder}: column pair holds {', '.join(held)} and no {named}; name one of them"
        )
    if named is not None:
        return named
    if len(held) == 1:
        return held[0]
    if current in held:
        return current
    raise DataError(
        f"{folder}: column pair holds {', '.join(held)}; say with --pair which one is served"
    )


def enough(material: Material, part: Indices, pair: str, folder: Path) -> None:
    """Check that every part has enough questions of the pair.

    Args:
        material: All rows and questions.
        part: The part of each question, ``(questions,)``.
        pair: Which pair is served.
        folder: Where the rows come from, for messages.

    Raises:
        DataError: One has too few.

    """
    rows = material.pair == material.pairs.index(pair)
    for index, name in ((LEARN, "to learn from"), (CHOOSE, "to weigh on"), (TEST, "held out")):
        questions = len(np.unique(material.question[rows & (part[material.question] == index)]))
        if questions < LEAST_QUESTIONS[index]:
            whole = len(np.unique(material.question[rows]))
            raise DataError(
                f"{folder}: pair {pair}: {whole} distinct questions, of which {questions} are "
                f"{name}, where {LEAST_QUESTIONS[index]} are needed; add outcomes, about 600 "
                "questions in all"
            )


def vectors(current: Artefact, prompts: Sequence[str], cache: Path) -> tuple[Floats, Floats]:
    """Frozen and tuned vectors of prompts, ``(prompts, width)`` each, by the current encoder.

    Kept in ``cache`` every thousand prompts, for an interrupted run to go on from.
    """
    named = hashlib.sha256(current.digest.encode())
    for prompt in prompts:
        named.update(hashlib.sha256(prompt.encode("utf-8", "replace")).digest())
    done: list[tuple[Floats, Floats]] = []
    count = 0
    if cache.exists():
        with np.load(cache, allow_pickle=False) as stored:
            if str(stored["of"]) == named.hexdigest():
                done.append((stored["frozen"], stored["tuned"]))
                count = len(stored["frozen"])
    encoder = Encoder(current)
    while count < len(prompts) or not done:
        found = encoder.encode(prompts[count : count + 1_000])
        done.append((found.frozen, found.tuned))
        count += len(found.frozen)
        whole = tuple(np.concatenate(values) for values in zip(*done, strict=True))
        partial = cache.with_name(f"{cache.stem}.partial.npz")
        np.savez(partial, of=named.hexdigest(), frozen=whole[0], tuned=whole[1])
        partial.replace(cache)
        print(f"vectors {count}/{len(prompts)}", file=sys.stderr, flush=True)
    frozen, tuned = (np.concatenate(values) for values in zip(*done, strict=True))
    return frozen, tuned


def calibrated(
    head: heads.TunedHead, tuned: Floats, scaled: Floats, rows: Outcomes, pair: Indices
) -> heads.TunedHead:
    """The tuned heads with slope and offset of each pair's two logits fitted to outcomes.

    Args:
        head: One head per pair.
        tuned: Tuned vectors of the rows, ``(rows, width)``.
        scaled: Their standardised hand features, ``(rows, features)``.
        rows: Outcomes.
        pair: Index of the pair of each row, ``(rows,)``.

    """
    chances = np.clip(head.chances(tuned, scaled, pair).astype(np.float64), 1e-6, 1 - 1e-6)
    logits = np.log(chances / (1 - chances))
    weight, bias = head.weight.copy(), head.bias.copy()
    for index in range(len(weight)):
        here = pair == index
        for place, scores in enumerate((rows.weak, rows.strong)):
            slope, offset = fitting.platt(logits[here, place], scores[here], CALIBRATION_PRIOR)
            weight[index, place] *= np.float32(slope)
            bias[index, place] = np.float32(slope) * bias[index, place] + np.float32(offset)
    return replace(head, weight=weight, bias=bias)


def refit(
    current: Artefact,
    material: Material,
    part: Indices,
    frozen: Floats,
    tuned: Floats,
) -> Fitted:
    """Fit everything but the encoder on the part to learn from, and weigh on the part to choose.

    Args:
        current: Whose encoder, scales, components and ridge are taken over.
        material: All rows and questions.
        part: The part of each question.
        frozen: Frozen vectors of all questions, ``(questions, width)``.
        tuned: Tuned vectors of all questions, ``(questions, width)``.

    Raises:
        ArtefactError: The current artefact lacks something.

    """
    arrays = arrays_of(current.file(HEADS_FILE))
    own = Members.read(arrays, "members")
    known = list(current.settings["pairs"])
    default = known.index(current.settings["default_pair"])
    source = [known.index(name) if name in known else default for name in material.pairs]
    kept = Kept(
        own.hand_mean,
        own.hand_deviation,
        own.component_mean,
        own.components,
        heads.RidgeHead.read(arrays, "ridge").weight[source],
    )
    head = heads.TunedHead.read(arrays, "tuned")
    head = replace(head, weight=head.weight[source], bias=head.bias[source])
    learn = np.flatnonzero(part == LEARN)
    inside = part[material.question] == LEARN
    scaled = heads.standardise(material.hand, own.hand_mean, own.hand_deviation)
    question = material.question[inside]
    head = calibrated(
        head,
        tuned[question],
        scaled[question],
        material.rows.select(inside),
        material.pair[inside],
    )
    least_leaf = int(np.clip(inside.sum() // 25, 10, fitting.Boosting().least_leaf))
    boosting = replace(fitting.Boosting(), least_leaf=least_leaf)
    far, least = _trust(material, part, frozen, own)
    how = Combination(far=far, least_trust=least)
    fitted = fit(material, learn, frozen, head, how, kept=kept, boosting=boosting)
    chosen = part[material.question] == CHOOSE
    rows, pair, question = (
        material.rows.select(chosen),
        material.pair[chosen],
        material.question[chosen],
    )
    found = judge_members(
        fitted.members,
        fitted.tuned,
        fitted.ridge,
        fitted.trees,
        Encoded(frozen[question], tuned[question]),
        material.hand[question],
        pair,
    )
    over = rows.gain - fitted.members.mean_gain[pair]
    weights = weigh(found.gains, found.offered, over, material.weight[chosen])
    print(f"weights of tuned, ridge, trees, open and with options: {weights}", file=sys.stderr)
    return replace(fitted, members=replace(fitted.members, weights=weights))


def _trust(
    material: Material, part: Indices, frozen: Floats, own: Members
) -> tuple[Floats, Floats]:
    """Trust from sources left out in turn; where there are too few, what the current scorer has.

    How near is near is a matter of the new centres, and is taken from the new data in either case.
    """
    learn = np.flatnonzero(part == LEARN)
    inside = part[material.question] == LEARN
    _, counts = np.unique(np.asarray(material.rows.source)[inside], return_counts=True)
    if (counts >= LEAST_GROUP).sum() >= 3:
        return trust(material, learn, frozen)
    general = heads.normalise(frozen[learn])
    halves = np.random.default_rng(1).permutation(len(learn)) % 2
    near = []
    for half in (0, 1):
        rest = general[halves != half]
        centres = fitting.clusters(rest, max(1, len(rest) // 20), seed=1, rounds=4)
        near.append(nearest(centres, general[halves == half])[1])
    similarity = np.concatenate(near)
    full = float(np.quantile(similarity, 0.25))
    far = min(float(np.quantile(similarity, 0.01)), full - 0.05)
    return np.asarray([full, far], dtype=np.float32), own.least_trust


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every outcome file of a folder, by name.

    Raises:
        DataError: There is no file.

    """
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files_of(folder)}


def card(name: str, run: Mapping[str, Any], gate: Gate) -> str:
    """The model card of a retrained scorer, from what the run knows."""
    report = gate.report
    counts = "\n".join(
        f"| {pair} | {source} | {rows} |" for (pair, source), rows in sorted(run["rows"].items())
    )
    inputs = "\n".join(f"- `{file}`: `{digest}`" for file, digest in run["inputs"].items())
    figures = "\n".join(
        f"| {router} | {_interval(report.routers[router].apgr)} | "
        f"{_interval(report.routers[router].cpt50, 100, 1)} | "
        f"{_interval(report.routers[router].accuracy30, 1, 4)} |"
        for router in ("scorer", "current", "ridge", "length", "random")
    )
    differences = "\n".join(
        f"- {other}: {_interval(value)}" for other, value in report.differences.items()
    )
    return f"""# {name}

Says how likely a weak and a strong language model are to answer a prompt correctly, from the prompt
alone. Retrained on outcomes of an organisation by `python -m routing.retrain`, which wrote this
page. What the scorer is and where it fails in general: the card of the scorer that it was made
from, `{run["current"]}`.

- Fitted with `--fit {run["fit"]}`. Seed {run["seed"]}. {run["date"]}.
- Pair served: `{report.pair}`; all pairs: {", ".join(run["pairs"])}.
- {run["parts"]["learn"]} questions to learn from, {run["parts"]["choose"]} to weigh the members on,
  {run["parts"]["held_out"]} held out, split by a hash of the question's key.

## Data

| pair | source | rows |
|---|---|---|
{counts}

SHA-256 of the files:

{inputs}

## Figures

{report.rows} held-out rows of `{report.pair}`: weak {report.weak:.4f}, strong {report.strong:.4f},
gap {_interval(report.gap, 1, 4)}. APGR: 0.5 is random. 95 % bootstrap intervals, {ROUNDS} rounds.

| | APGR | CPT50 % | score at 30 % strong calls |
|---|---|---|---|
{figures}

Paired differences of APGR:

{differences}

The gate passed: better than a random order, and not worse than the current scorer by {MARGIN} or
more.

## Limits

It knows the questions above and others like them. Trust falls with distance from them, and
`routing.drift` says when traffic has moved away. Held-out questions come from the same sources:
what happens on a new one is not in these figures.
"""


def _interval(value: Any, factor: float = 1, digits: int = 3) -> str:
    if np.isnan(value.value):
        return "-"
    shown = (f"{each * factor:.{digits}f}" for each in (value.value, value.low, value.high))
    return "{} [{}, {}]".format(*shown)


def replace_folder(candidate: Path, out: Path, text: str) -> None:
    """Put a candidate and its card where ``out`` is, whole or not at all."""
    fresh, old = out.with_name(f"{out.name}.new"), out.with_name(f"{out.name}.old")
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(candidate, fresh)
    (fresh / CARD).write_text(text)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _heads(
    current: Artefact, rows: Outcomes, data: Path, work: Path, pair: str, stated: Mapping[str, Any]
) -> tuple[Material, Indices]:
    """Fit on the current encoder; the candidate is in ``WORK/candidate``."""
    encoder = Encoder(current)
    tokenizer = open_tokenizer(current.file(TOKENIZER_FILE))
    material = prepare(rows, tokenizer, cut=encoder.cut)
    part = parts(material, leave_out=False)
    enough(material, part, pair, data)
    frozen, tuned = vectors(current, material.prompts, work / "vectors.npz")
    fitted = refit(current, material, part, frozen, tuned)
    settings = {
        **current.settings,
        "pairs": list(material.pairs),
        "default_pair": pair,
        "retrained": dict(stated),
    }
    files = {
        MODEL_FILE: current.file(MODEL_FILE),
        TOKENIZER_FILE: current.file(TOKENIZER_FILE),
        HEADS_FILE: fitted.arrays(),
    }
    shutil.rmtree(work / "candidate", ignore_errors=True)
    artefact.save(work / "candidate", settings, files)
    describe(work / "candidate", _prompts(material, part))
    return material, part


def _all(
    rows: Outcomes,
    data: Path,
    work: Path,
    pair: str,
    epochs: int | None,
    base: Path | None,
    stated: Mapping[str, Any],
) -> tuple[Material, Indices]:
    """Fine-tune too; the candidate is in ``WORK/candidate``."""
    from safetensors.numpy import load_file

    from routing import train, tuning

    settings = tuning.Settings() if epochs is None else tuning.Settings(epochs=epochs)
    folder = base or train.base_folder()
    tokenizer = (folder / TOKENIZER_FILE).read_bytes()
    weights = load_file(folder / "model.safetensors")
    material = prepare(
        rows,
        open_tokenizer(tokenizer),
        cut=train.CUT,
        weights={**train.PAIR_WEIGHT, pair: 1.0},
        others=train.OTHER_WEIGHT,
    )
    part = parts(material, leave_out=False)
    enough(material, part, pair, data)
    tuning.use_threads(1)
    frozen = train.frozen_vectors(weights, material.tokens, work / "frozen.npz", settings)
    train.estimate(material, part, weights, frozen, tokenizer, work, settings, pair)
    made = artefact.load(work / "estimate")
    shutil.rmtree(work / "candidate", ignore_errors=True)
    artefact.save(work / "candidate", {**made.settings, "retrained": dict(stated)}, made.files)
    return material, part


def _prompts(material: Material, part: Indices) -> list[str]:
    return [material.prompts[index] for index in np.flatnonzero(part == LEARN)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m routing.retrain",
        description="Fit the scorer to an organisation's own outcomes, and replace the current one "
        "only if the new one is not worse on held-out questions.",
        epilog="Exit codes: 0 written (or would be, with --dry-run), 2 wrong usage, 3 the data "
        "cannot be used, 4 the gate refused, 5 the current artefact cannot be used.",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of outcome files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new artefact")
    parser.add_argument(
        "--current",
        type=Path,
        default=evaluate.ARTEFACT,
        help="artefact that it must not fall behind",
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/retrain"), help="vectors, checkpoints, candidate"
    )
    parser.add_argument(
        "--fit",
        choices=("heads", "all"),
        default="heads",
        help="heads: keep the encoder (minutes); all: fine-tune it too (needs the extra train)",
    )
    parser.add_argument("--epochs", type=int, help="of fine-tuning, with --fit all")
    parser.add_argument("--base", type=Path, help="pretrained encoder, with --fit all")
    parser.add_argument("--pair", help="which pair of the data is served; the only one by default")
    parser.add_argument("--seed", type=int, default=1, help="of the bootstrap of the gate")
    parser.add_argument(
        "--dry-run", action="store_true", help="fit and judge, but leave --out as it is"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.fit == "heads" and (given.epochs is not None or given.base is not None):
        parser.error("--epochs and --base belong to --fit all")
    if given.epochs is not None and given.epochs < 1:
        parser.error("--epochs must be at least 1")
    if given.seed < 0:
        parser.error("--seed must be 0 or more")
    if given.fit == "all" and (missing := [name for name in TRAINING if find_spec(name) is None]):
        parser.error(f"--fit all needs {', '.join(missing)}; install gatehouse[train]")
    if given.out.exists() and not (given.out / MANIFEST).is_file() and not _empty(given.out):
        parser.error(f"--out {given.out}: exists and is no artefact; give another folder")
    try:
        current = artefact.load(given.current)
        own = ComplexityScorer(current)
    except ArtefactError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CURRENT
    try:
        given.work.mkdir(parents=True, exist_ok=True)
        given.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{error.filename}: cannot be made ({error.strerror}); give another folder")
    try:
        rows = keyed(read_folder(given.data, training=False))
        pair = pair_of(rows, given.pair, own.default_pair, given.data)
        stated = {
            "current": current.digest,
            "fit": given.fit,
            "inputs": digests(given.data),
            "seed": given.seed,
        }
        print(f"{len(rows)} rows, pair {pair}", file=sys.stderr, flush=True)
        if given.fit == "all":
            material, part = _all(
                rows, given.data, given.work, pair, given.epochs, given.base, stated
            )
        else:
            material, part = _heads(current, rows, given.data, given.work, pair, stated)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return evaluate.EXIT_DATA
    except ArtefactError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CURRENT
    candidate = given.work / "candidate"
    new = ComplexityScorer.load(candidate)
    held = (part[material.question] == TEST) & (material.pair == material.pairs.index(pair))
    gate = judge(material.rows.select(held), new, own, seed=given.seed)
    run = {
        **stated,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "pairs": list(material.pairs),
        "parts": {
            name: int((part == index).sum())
            for index, name in ((LEARN, "learn"), (CHOOSE, "choose"), (TEST, "held_out"))
        },
    }
    counts: dict[tuple[str, str], int] = {}
    for key in zip(rows.pair, rows.source, strict=True):
        counts[key] = counts.get(key, 0) + 1
    verdict = {
        **run,
        "rows": [
            {"pair": name, "source": source, "rows": count}
            for (name, source), count in sorted(counts.items())
        ],
        "candidate": new.digest,
        "passed": gate.passed,
        "why": list(gate.why),
        "held_out": plain([gate.report])[0],
    }
    beside = (
        given.work / "gate.json"
        if given.dry_run
        else given.out.with_name(f"{given.out.name}.gate.json")
    )
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(json.dumps(verdict, indent=1) + "\n")
    print(evaluate.render([gate.report]))
    if not gate.passed:
        for reason in gate.why:
            print(f"refused: {reason}")
        print(f"{given.out}: left as it is; figures in {beside}")
        return EXIT_REFUSED
    if given.dry_run:
        print(f"{given.out}: would be written as {new.digest}; figures in {beside}")
        return 0
    replace_folder(candidate, given.out, card(given.out.name, {**run, "rows": counts}, gate))
    print(f"{given.out}: {new.digest}; figures in {beside}")
    return 0


TRAINING = ("torch", "onnx", "safetensors")
"""Packages of the extra ``train``."""


def _empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


if __name__ == "__main__":
    sys.exit(main())
