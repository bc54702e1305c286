"""Fine-tune the sentence encoder to predict which of two models answers a question correctly.

The only module of this package that needs PyTorch, and only training imports it.

A question is encoded once and judged for every pair of models that answered it. From the mean of
the last hidden states (normalised) and a small layer over the hand features come, per pair, the
logits of "the weak model is right" and "the strong model is right": a vector shared by all pairs
plus one of the pair's own, which starts at zero and is decayed towards it, so that pairs with few
rows borrow from the others. Two more heads predict how other small and other large models fare;
they are targets that teach difficulty, and no input. The loss is the cross-entropy of all four
plus the squared error of the difference, which is what routing sorts by.

Labels are single greedy answers and noisy, so the number of epochs is small. Word embeddings stay
as they are: rare words would otherwise move by a few noisy labels.

Sources: W. Wang et al., "MiniLM", NeurIPS 2020; N. Reimers and I. Gurevych, "Sentence-BERT",
EMNLP 2019; I. Ong et al., "RouteLLM", arXiv 2406.18665 (routing by predicted win probability);
I. Loshchilov and F. Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

Floats = npt.NDArray[np.float32]

Weights = Mapping[str, npt.NDArray[np.float32]]

HEADS = 12
"""Attention heads of a layer of all-MiniLM-L6-v2."""

HAND_WIDTH = 64
"""Width of the layer over the hand features."""


@dataclass(frozen=True, slots=True)
class Questions:
    """Training material: each question once, with its results under every pair.

    Unknown results are NaN and take no part in the loss.
    """

    tokens: list[list[int]]
    """Token ids of each question, already cut to length."""
    hand: Floats
    """Standardised hand features, ``(questions, features)``."""
    weak: Floats
    """``(questions, pairs)``, 0 to 1 or NaN."""
    strong: Floats
    """``(questions, pairs)``, 0 to 1 or NaN."""
    aux_small: Floats
    """``(questions, pairs)``, 0 to 1 or NaN: other small models, the pair's own left out."""
    aux_large: Floats
    """``(questions, pairs)``, 0 to 1 or NaN."""

    def __len__(self) -> int:
        """Number of questions."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Settings:
    """How to fine-tune; the defaults are those of the committed artefact."""

    epochs: int = 3
    batch: int = 32
    encoder_rate: float = 1e-4
    """Peak learning rate of the top encoder layer."""
    layer_decay: float = 0.85
    """Each layer below learns at this fraction of the rate of the one above it."""
    head_rate: float = 1e-3
    layers: int = 4
    """Transformer layers that are used, 1 to 6; those above are dropped. Frozen states of the
    middle layers predict correctness better than those of the last, which were trained to bring
    paraphrases together."""
    frozen_layers: int = 1
    """Lowest transformer layers that stay as they are."""
    token_dropout: float = 0.15
    """Share of tokens that each step leaves out above the frozen layers."""
    warmup: float = 0.1
    """Share of the steps over which rates rise; after that they fall linearly to zero."""
    weight_decay: float = 0.02
    pair_decay: float = 0.2
    """Weight decay of what a pair has of its own."""
    gain_weight: float = 1.0
    """Weight of the squared error of the difference, beside cross-entropies of weight 1."""
    aux_weight: float = 1.0
    dropout: float = 0.1
    seed: int = 1


def use_threads(threads: int) -> None:
    """Threads that PyTorch may use for one operation, at least 1."""
    torch.set_num_threads(threads)


class Layer(nn.Module):
    """One transformer layer of BERT, post-norm, as in the checkpoint; no dropout.

    The usual dropout inside the layers costs a third of a step on a CPU; what regularises here is
    dropping tokens, which makes steps cheaper instead.
    """

    def __init__(self, weights: Weights, number: int) -> None:
        super().__init__()
        prefix = f"encoder.layer.{number}."
        own = f"{prefix}attention.self."
        names = ("query", "key", "value")
        self.joint = _linear(
            np.concatenate([weights[f"{own}{name}.weight"] for name in names]),
            np.concatenate([weights[f"{own}{name}.bias"] for name in names]),
        )
        self.out = _linear_of(weights, f"{prefix}attention.output.dense")
        self.first_norm = _norm_of(weights, f"{prefix}attention.output.LayerNorm")
        self.up = _linear_of(weights, f"{prefix}intermediate.dense")
        self.down = _linear_of(weights, f"{prefix}output.dense")
        self.last_norm = _norm_of(weights, f"{prefix}output.LayerNorm")
        self.prefix = prefix

    def forward(self, hidden: torch.Tensor, hide: torch.Tensor) -> torch.Tensor:
        """States ``(batch, length, width)``; ``hide`` is true at padding, ``(batch, length)``."""
        batch, length, width = hidden.shape
        joint = self.joint(hidden).view(batch, length, 3, HEADS, width // HEADS)
        query, key, value = joint.permute(2, 0, 3, 1, 4)
        # NOTE: spelled out, because the fused kernel's backward pass is several times slower on
        # a CPU at these lengths.
        weight = query @ key.transpose(-1, -2) / math.sqrt(width // HEADS)
        weight = weight.masked_fill(hide[:, None, None, :], -1e4).softmax(-1)
        mixed = (weight @ value).transpose(1, 2).reshape(batch, length, width)
        hidden = self.first_norm(self.out(mixed) + hidden)
        narrow: torch.Tensor = self.down(functional.gelu(self.up(hidden)))
        result: torch.Tensor = self.last_norm(narrow + hidden)
        return result

    def weights(self) -> dict[str, Floats]:
        """The parameters under their names in the checkpoint."""
        found: dict[str, Floats] = {}
        own = f"{self.prefix}attention.self."
        width = self.joint.in_features
        for place, name in enumerate(("query", "key", "value")):
            rows = slice(place * width, (place + 1) * width)
            found[f"{own}{name}.weight"] = self.joint.weight.detach().numpy()[rows]
            found[f"{own}{name}.bias"] = self.joint.bias.detach().numpy()[rows]
        for name, part in (
            ("attention.output.dense", self.out),
            ("attention.output.LayerNorm", self.first_norm),
            ("intermediate.dense", self.up),
            ("output.dense", self.down),
            ("output.LayerNorm", self.last_norm),
        ):
            found[f"{self.prefix}{name}.weight"] = part.weight.detach().numpy()
            found[f"{self.prefix}{name}.bias"] = part.bias.detach().numpy()
        return found


class Scorer(nn.Module):
    """Encoder and heads.

    The embeddings and the lowest layers stay as they are, so what they give is computed once per
    question (`trunk`) and kept; only the layers above are run and learn in every step.
    """

    def __init__(self, weights: Weights, pairs: int, features: int, settings: Settings) -> None:
        super().__init__()
        self.base = weights
        self.words = torch.tensor(weights["embeddings.word_embeddings.weight"])
        self.places = torch.tensor(
            weights["embeddings.position_embeddings.weight"]
            + weights["embeddings.token_type_embeddings.weight"][0]
        )
        self.lowest = _norm_of(weights, "embeddings.LayerNorm")
        layers = [Layer(weights, number) for number in range(settings.layers)]
        self.fixed = nn.ModuleList(layers[: settings.frozen_layers])
        self.top = nn.ModuleList(layers[settings.frozen_layers :])
        width = self.words.shape[1]
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.hand = nn.Sequential(nn.Linear(features, HAND_WIDTH), nn.GELU())
        self.dropout = nn.Dropout(settings.dropout)
        self.shared = nn.Linear(width + HAND_WIDTH, 4)
        self.own = nn.Parameter(torch.zeros(pairs, 4, width + HAND_WIDTH))
        self.bias = nn.Parameter(torch.zeros(pairs, 4))
        nn.init.zeros_(self.shared.weight)
        nn.init.zeros_(self.shared.bias)

    @torch.no_grad()
    def trunk(self, tokens: Sequence[Sequence[int]], batch: int = 64) -> list[torch.Tensor]:
        """States of each question after the frozen layers, ``(tokens, width)`` in bfloat16."""
        order = np.argsort([len(values) for values in tokens], kind="stable")
        found: list[torch.Tensor] = [torch.empty(0)] * len(tokens)
        for start in range(0, len(order), batch):
            index = order[start : start + batch]
            longest = max(len(tokens[i]) for i in index)
            ids = torch.zeros(len(index), longest, dtype=torch.long)
            hide = torch.ones(len(index), longest, dtype=torch.bool)
            for row, i in enumerate(index):
                ids[row, : len(tokens[i])] = torch.tensor(tokens[i])
                hide[row, : len(tokens[i])] = False
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = self.lowest(self.words[ids] + self.places[:longest])
                for layer in self.fixed:
                    hidden = layer(hidden, hide)
            for row, i in enumerate(index):
                found[i] = hidden[row, : len(tokens[i])].to(torch.bfloat16).clone()
        return found

    def pooled(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Mean of the last states of each question, from what `trunk` gave."""
        longest = max(map(len, states))
        hidden = torch.zeros(len(states), longest, states[0].shape[1])
        hide = torch.ones(len(states), longest, dtype=torch.bool)
        for row, values in enumerate(states):
            hidden[row, : len(values)] = values
            hide[row, : len(values)] = False
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for layer in self.top:
                hidden = layer(hidden, hide)
        weight = (~hide).unsqueeze(-1).float()
        return (hidden.float() * weight).sum(1) / weight.sum(1)

    def logits(self, pooled: torch.Tensor, hand: torch.Tensor) -> torch.Tensor:
        """Logits of weak, strong, other small, other large: ``(batch, pairs, 4)``."""
        joint = self.dropout(torch.cat([self.norm(pooled), self.hand(hand)], 1))
        own = torch.einsum("bd,phd->bph", joint, self.own)
        logits: torch.Tensor = self.shared(joint)[:, None, :] + own + self.bias
        return logits

    def weights(self) -> dict[str, Floats]:
        """All encoder weights under their names in the checkpoint, tuned where they were."""
        found = {name: np.asarray(value) for name, value in self.base.items()}
        for layer in self.top:
            assert isinstance(layer, Layer)
            found.update(layer.weights())
        return found


def _linear(weight: Floats, bias: Floats) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0])
    made.weight.data = torch.tensor(weight)
    made.bias.data = torch.tensor(bias)
    return made


def _linear_of(weights: Weights, prefix: str) -> nn.Linear:
    return _linear(weights[f"{prefix}.weight"], weights[f"{prefix}.bias"])


def _norm_of(weights: Weights, prefix: str) -> nn.LayerNorm:
    made = nn.LayerNorm(len(weights[f"{prefix}.weight"]), eps=1e-12)
    made.weight.data = torch.tensor(weights[f"{prefix}.weight"])
    made.bias.data = torch.tensor(weights[f"{prefix}.bias"])
    return made


def loss_of(
    logits: torch.Tensor, target: torch.Tensor, pair_weight: torch.Tensor, settings: Settings
) -> torch.Tensor:
    """Mean loss over the known results of a batch.

    Args:
        logits: ``(batch, pairs, 4)``.
        target: Same shape; NaN where unknown.
        pair_weight: ``(pairs,)``, how much a row of the pair counts.
        settings: Weights of the terms.

    """
    known = ~torch.isnan(target)
    filled = torch.nan_to_num(target)
    entropy = functional.binary_cross_entropy_with_logits(logits, filled, reduction="none")
    kind = torch.tensor([1.0, 1.0, settings.aux_weight, settings.aux_weight])
    weight = known * kind * pair_weight[None, :, None]
    chance = torch.sigmoid(logits)
    error = (chance[..., 1] - chance[..., 0]) - (filled[..., 1] - filled[..., 0])
    both = known[..., 0] & known[..., 1]
    squared = (error.square() * both * pair_weight).sum()
    rows = (both * pair_weight).sum().clamp(min=1.0)
    return ((entropy * weight).sum() + settings.gain_weight * 2.0 * squared) / rows


def batches(
    lengths: npt.NDArray[np.int64], size: int, rng: np.random.Generator
) -> Iterator[npt.NDArray[np.int64]]:
    """Random batches of questions of like length: pools of 16 batches are sorted, then cut."""
    order = rng.permutation(len(lengths))
    cut = []
    for start in range(0, len(order), 16 * size):
        pool = order[start : start + 16 * size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        cut += [pool[i : i + size] for i in range(0, len(pool), size)]
    for index in rng.permutation(len(cut)):
        yield cut[index]


def tune(
    base: Weights,
    questions: Questions,
    pair_weight: Floats,
    settings: Settings,
    checkpoint: Path,
    after_epoch: Callable[[int, Scorer], None] | None = None,
) -> Scorer:
    """Fine-tune; continues from ``checkpoint`` where it is of the same settings and questions.

    Args:
        base: Parameters of the pretrained encoder, under their names in its checkpoint.
        questions: What to learn from.
        pair_weight: ``(pairs,)``, how much a row of the pair counts.
        settings: How.
        checkpoint: File that every epoch replaces; holds weights, optimiser and random state.
        after_epoch: Called with the number of epochs done and the model.

    """
    torch.manual_seed(settings.seed)
    model = Scorer(base, questions.weak.shape[1], questions.hand.shape[1], settings)
    _set_bias(model, questions)
    optimiser = torch.optim.AdamW(_groups(model, settings))
    steps_an_epoch = -(-len(questions) // settings.batch)
    total = steps_an_epoch * settings.epochs
    warm = max(1, int(settings.warmup * total))

    def rate(step: int) -> float:
        return min((step + 1) / warm, max(0.0, (total - step) / (total - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    of = fingerprint(questions, pair_weight, settings)
    done = _resume(checkpoint, of, model, optimiser, schedule)
    if done < settings.epochs:
        print("frozen layers, once for every question", file=sys.stderr, flush=True)
        states = model.trunk(questions.tokens)
    target = torch.tensor(
        np.stack(
            [questions.weak, questions.strong, questions.aux_small, questions.aux_large], axis=2
        )
    )
    hand = torch.tensor(questions.hand)
    weight = torch.tensor(pair_weight)
    lengths = np.asarray([len(tokens) for tokens in questions.tokens], dtype=np.int64)
    started, first = time.monotonic(), done * steps_an_epoch
    for epoch in range(done, settings.epochs):
        model.train()
        rng = np.random.default_rng([settings.seed, epoch])
        mean = 0.0
        for step, index in enumerate(batches(lengths, settings.batch, rng), start=1):
            kept = [_thin(states[i], settings.token_dropout, rng) for i in index]
            logits = model.logits(model.pooled(kept), hand[index])
            loss = loss_of(logits, target[index], weight, settings)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
            mean += (float(loss.detach()) - mean) / min(step, 100)
            if step % 25 == 0 or step == steps_an_epoch:
                at = epoch * steps_an_epoch + step
                left = (time.monotonic() - started) / (at - first) * (total - at)
                print(
                    f"epoch {epoch + 1}/{settings.epochs} step {step}/{steps_an_epoch} "
                    f"loss {mean:.4f}, {left / 60:.1f} min left",
                    file=sys.stderr,
                    flush=True,
                )
        _save(checkpoint, of, epoch + 1, model, optimiser, schedule)
        if after_epoch is not None:
            after_epoch(epoch + 1, model)
    return model.eval()


def _thin(states: torch.Tensor, share: float, rng: np.random.Generator) -> torch.Tensor:
    """The states without a random share of tokens; the first one always stays."""
    kept = np.flatnonzero(rng.random(len(states)) >= share)
    return states[np.union1d(0, kept)]


@torch.no_grad()
def predict(
    model: Scorer, tokens: Sequence[Sequence[int]], hand: Floats, batch: int = 32
) -> tuple[Floats, Floats]:
    """Logits ``(questions, pairs, 4)`` and pooled states ``(questions, width)``, in float32."""
    model.eval()
    states = model.trunk(tokens)
    order = np.argsort([len(values) for values in tokens], kind="stable")
    logits: list[Any] = [None] * len(tokens)
    pooled: list[Any] = [None] * len(tokens)
    given = torch.tensor(hand)
    for start in range(0, len(order), batch):
        index = order[start : start + batch]
        found = model.pooled([states[i] for i in index])
        heads = model.logits(found, given[index])
        for row, i in enumerate(index):
            logits[i] = heads[row].numpy()
            pooled[i] = found[row].numpy()
    return np.stack(logits), np.stack(pooled)


def _set_bias(model: Scorer, questions: Questions) -> None:
    """Start each head at the mean of its labels, so that the first steps teach differences."""
    for head, labels in enumerate(
        (questions.weak, questions.strong, questions.aux_small, questions.aux_large)
    ):
        for pair in range(labels.shape[1]):
            column = labels[:, pair]
            known = column[~np.isnan(column)]
            mean = float(np.clip(known.mean(), 0.02, 0.98)) if len(known) else 0.5
            model.bias.data[pair, head] = float(np.log(mean / (1 - mean)))


def _groups(model: Scorer, settings: Settings) -> list[dict[str, Any]]:
    for parameter in [*model.lowest.parameters(), *model.fixed.parameters()]:
        parameter.requires_grad_(False)
    groups: list[dict[str, Any]] = []
    for below, layer in enumerate(reversed(model.top)):
        rate = settings.encoder_rate * settings.layer_decay**below
        matrices = [parameter for parameter in layer.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in layer.parameters() if parameter.ndim == 1]
        groups.append({"params": matrices, "lr": rate, "weight_decay": settings.weight_decay})
        groups.append({"params": vectors, "lr": rate, "weight_decay": 0.0})
    heads = [*model.shared.parameters(), *model.hand.parameters()]
    rate = settings.head_rate
    groups.append({"params": heads, "lr": rate, "weight_decay": settings.weight_decay})
    groups.append({"params": [model.own], "lr": rate, "weight_decay": settings.pair_decay})
    groups.append({"params": [model.bias], "lr": rate, "weight_decay": 0.0})
    return groups


def fingerprint(questions: Questions, pair_weight: Floats, settings: Settings) -> str:
    """Names material and settings: a checkpoint of others is not gone on from."""
    found = hashlib.sha256(repr((settings, questions.tokens)).encode())
    for values in (
        questions.hand,
        questions.weak,
        questions.strong,
        questions.aux_small,
        questions.aux_large,
        pair_weight,
    ):
        found.update(np.ascontiguousarray(values).tobytes())
    return found.hexdigest()


def _save(path: Path, of: str, done: int, model: Scorer, optimiser: Any, schedule: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(
        {
            "of": of,
            "done": done,
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "schedule": schedule.state_dict(),
            "random": torch.get_rng_state(),
        },
        partial,
    )
    partial.replace(path)


def _resume(path: Path, of: str, model: Scorer, optimiser: Any, schedule: Any) -> int:
    """Epochs already done according to the checkpoint; 0 where there is none that fits."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state.get("of") != of:
        print(f"{path}: of other settings or questions, starting anew", file=sys.stderr)
        return 0
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["random"])
    print(f"{path}: continuing after epoch {state['done']}", file=sys.stderr)
    return int(state["done"])
