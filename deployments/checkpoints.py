"""Builds the two checkpoints and the adapter that ``serve_config.local.yaml`` serves.

They are real ones: Llama architecture, safetensors, a trained tokenizer, a chat template. So
small (1 and 4 million parameters), and taught so little (``checkpoint_corpus``), that they are
ready in half a minute and answer a few questions in plain English; they know nothing else.

    python -m deployments.checkpoints DIRECTORY

The same recipe gives the same bytes on the same machine. A directory is complete or absent: it is
built beside its place and renamed. What stands already, from the same recipe, is left alone.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deployments.checkpoint_corpus import CHAT_TEMPLATE, PROSE, SYSTEM_PROMPTS, TURNS

CONTEXT_TOKENS = 4096
_VOCABULARY = 2048
"""Tokens at most; the corpus gives rise to fewer."""
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKER = ".recipe"
RECIPE = 1
"""Raise it when the way of building changes, so that what was built before is built anew."""

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """One checkpoint: its shape, and how it is taught."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    steps: int
    """Optimiser steps of 16 conversations."""
    learning_rate: float
    seed: int = 20_250_101
    batch: int = 16
    initial_std: float = 0.05
    """At 0.02, the usual, models of this size take twice the steps to learn."""

    def config(self, vocabulary: int) -> dict[str, Any]:
        """``config.json`` for a tokenizer of so many tokens."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "intermediate_size": self.intermediate,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "initializer_range": self.initial_std,
            "max_position_embeddings": CONTEXT_TOKENS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "dtype": "bfloat16",
        }


RECIPES = (
    Recipe("small", 128, 4, 4, 2, 384, steps=80, learning_rate=5e-3),
    Recipe("large", 256, 4, 4, 2, 768, steps=60, learning_rate=3e-3),
)
ADAPTER = "small-adapter"
ADAPTER_RANK = 8


def build_all(root: Path, report: Report = print, recipes: Iterable[Recipe] = RECIPES) -> None:
    """Build what is missing: each recipe, and the adapter of the first.

    Args:
        root: Directory that holds one directory per checkpoint; created if absent.
        report: Takes lines of progress.
        recipes: The first one is the adapter's base.

    Raises:
        FileExistsError: A directory of that name was not built here; it is left alone.
    """
    recipes = tuple(recipes)
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for recipe in recipes:
            _place(root / recipe.name, _fingerprint(recipe), report, _Checkpoint(recipe, report))
        base = recipes[0]
        fingerprint = _fingerprint(base, ADAPTER, ADAPTER_RANK)
        _place(root / ADAPTER, fingerprint, report, lambda into: _write_adapter(into, base))


def _fingerprint(recipe: Recipe, *more: object) -> str:
    """Names everything that the bytes of a checkpoint depend on."""
    parts = [RECIPE, asdict(recipe), recipe.config(0), CHAT_TEMPLATE, TURNS, SYSTEM_PROMPTS, PROSE]
    return hashlib.sha256(json.dumps([*parts, *more], sort_keys=True).encode()).hexdigest()


def _place(target: Path, fingerprint: str, report: Report, build: Callable[[Path], None]) -> None:
    """Build beside ``target`` and rename, unless it stands already."""
    scratch = target.with_name(f".{target.name}.building")
    shutil.rmtree(scratch, ignore_errors=True)
    if target.exists():
        marker = target / MARKER
        if not marker.is_file():
            raise FileExistsError(f"{target} exists and was not built here; move it away")
        if json.loads(marker.read_text()).get("fingerprint") == fingerprint:
            report(f"{target.name}: there already")
            return
    started = time.monotonic()
    scratch.mkdir()
    build(scratch)
    _write_json(scratch / MARKER, {"fingerprint": fingerprint})
    if target.exists():
        shutil.rmtree(target)
    scratch.rename(target)
    report(f"{target.name}: built in {time.monotonic() - started:.0f} s")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


class _Checkpoint:
    """Writes all files of one checkpoint into a directory."""

    def __init__(self, recipe: Recipe, report: Report) -> None:
        self.recipe = recipe
        self.report = report

    def __call__(self, into: Path) -> None:
        from safetensors.torch import save_file

        tokenizer = train_tokenizer()
        tokenizer.save(str(into / "tokenizer.json"))
        _write_json(
            into / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": CONTEXT_TOKENS,
                "eos_token": END,
                "pad_token": PAD,
                "clean_up_tokenization_spaces": False,
            },
        )
        (into / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        _write_json(into / "config.json", self.recipe.config(tokenizer.get_vocab_size()))
        # What a request gets that names no temperature: what was learnt, with little variation.
        _write_json(
            into / "generation_config.json",
            {
                "eos_token_id": [2, 0],
                "pad_token_id": 0,
                "do_sample": True,
                "temperature": 0.3,
                "top_p": 0.9,
            },
        )
        (into / "README.md").write_text(_model_card(self.recipe))
        weights = _teach(self.recipe, tokenizer, self.report)
        save_file(weights, str(into / "model.safetensors"), metadata={"format": "pt"})


def train_tokenizer() -> Any:
    """A byte-level BPE tokenizer: it can write any text, though longer where words are new."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        min_frequency=2,
        special_tokens=[AddedToken(text, special=True) for text in (PAD, START, END)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [f"{question} {answer}" for question, answer in TURNS]
    tokenizer.train_from_iterator([*texts, *SYSTEM_PROMPTS, *PROSE], trainer)
    return tokenizer


def _teach(recipe: Recipe, tokenizer: Any, report: Report) -> dict[str, Any]:
    """Train from scratch on the corpus; gives bfloat16 weights by name."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(2)
    conversations = [
        _encode(tokenizer, system, question, answer)
        for question, answer in TURNS
        for system in SYSTEM_PROMPTS
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        config = LlamaConfig(**recipe.config(tokenizer.get_vocab_size()))
        model: Any = LlamaForCausalLM(config)
        model.float()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.95))
        schedule = torch.cos(torch.linspace(0, torch.pi, recipe.steps)) * 0.5 + 0.5
        for step in range(recipe.steps):
            warmup = min(1.0, (step + 1) / 10)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * warmup * float(schedule[step])
            picked = torch.randperm(len(conversations))[: recipe.batch].tolist()
            inputs, labels = _batch([conversations[i] for i in picked])
            loss = model(input_ids=inputs, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % 30 == 0:
                report(f"{recipe.name}: step {step + 1} of {recipe.steps}")
    return {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }


def _encode(tokenizer: Any, system: str, question: str, answer: str) -> tuple[list[int], list[int]]:
    """A conversation as the chat template writes it: what is given, and what is to be learnt."""
    head = f"{START}system\n{system}{END}\n" if system else ""
    given = f"{head}{START}user\n{question}{END}\n{START}assistant\n"
    return tokenizer.encode(given).ids, tokenizer.encode(f"{answer}{END}\n").ids


def _batch(conversations: list[tuple[list[int], list[int]]]) -> tuple[Any, Any]:
    import torch

    width = max(len(given) + len(learnt) for given, learnt in conversations)
    inputs = torch.zeros(len(conversations), width, dtype=torch.long)
    labels = torch.full_like(inputs, -100)
    for row, (given, learnt) in enumerate(conversations):
        end = len(given) + len(learnt)
        inputs[row, :end] = torch.tensor(given + learnt)
        labels[row, len(given) : end] = torch.tensor(learnt)
    return inputs, labels


def _write_adapter(into: Path, base: Recipe) -> None:
    """A LoRA adapter in PEFT's format; seeded noise, so that it can be told from its base."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(base.seed + 1)
    out = {"q_proj": base.hidden, "v_proj": base.hidden // base.heads * base.kv_heads}
    weights = {}
    for layer in range(base.layers):
        for module, width in out.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            down = torch.randn(ADAPTER_RANK, base.hidden, generator=generator) * 0.15
            up = torch.randn(width, ADAPTER_RANK, generator=generator) * 0.15
            weights[f"{name}.lora_A.weight"] = down.to(torch.bfloat16)
            weights[f"{name}.lora_B.weight"] = up.to(torch.bfloat16)
    save_file(weights, str(into / "adapter_model.safetensors"), metadata={"format": "pt"})
    _write_json(
        into / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base.name,
            "r": ADAPTER_RANK,
            "lora_alpha": ADAPTER_RANK,
            "lora_dropout": 0.0,
            "target_modules": sorted(out),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        },
    )


def _model_card(recipe: Recipe) -> str:
    return (
        f"# {recipe.name}\n\n"
        f"A Llama-architecture model of {recipe.layers} layers, {recipe.hidden} wide, built by\n"
        "`python -m deployments.checkpoints` to try, develop and test the platform without a GPU.\n"
        f"It was trained for seconds on {len(TURNS)} short conversations and repeats them; what\n"
        "else it says has no meaning. Do not use it for anything.\n"
    )


def build_apart(root: Path, report: Report = print) -> None:
    """``build_all`` in a process of its own, so that torch does not stay in the caller's memory.

    Raises:
        OSError: It failed; the message is the last line that it wrote.
    """
    command = [sys.executable, "-m", "deployments.checkpoints", str(root)]
    with subprocess.Popen(  # noqa: S603  our own module
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        line = ""
        for line in map(str.strip, process.stdout):
            report(line)
    if process.returncode:
        raise OSError(line.removeprefix("error: ") or f"exit status {process.returncode}")


def main(argv: list[str] | None = None) -> int:
    """Build into the directory given; 0 when all stands, 1 with a line on what to do."""
    parser = argparse.ArgumentParser(description="Build the checkpoints of the local mode.")
    parser.add_argument("directory", type=Path)
    started = time.monotonic()
    # Threads that wait for each other by spinning make this many times slower on busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    def report(line: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {line}", flush=True)

    try:
        build_all(parser.parse_args(argv).directory, report)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
