"""The complexity scorer as the platform runs it: which artefact, on what, with which result.

Nothing here imports onnxruntime until a scorer is opened, so that the process that builds the
application, and a gateway whose scorer is elsewhere, stay small.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import routing
from governance.yaml_config import ConfigError
from routing import artefact
from routing.artefact import Artefact, ArtefactError
from routing.drift import Reference
from routing.types import Score

BUILT_IN = Path(routing.__file__).parent / "artefacts" / "complexity-v1"

HEADS_FILE = "heads.npz"
MAX_CHARS = 16_384
"""Of a longer prompt, half of this from either end is scored: the scorer reads no more of it, and
the middle would only be carried around."""

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
WARM_UP = "What is the capital of France?"

ScoreMany = Callable[[Sequence[str]], list[Score]]
"""Scores of prompts, in their order; blocks."""


@dataclass(frozen=True, slots=True)
class ScorerFacts:
    """What a gateway knows of a scorer that runs elsewhere."""

    folder: str | None
    """Folder of the artefact; ``None`` for the one that the package brings along."""
    digest: str
    """Names the artefact exactly; every replica refuses another one."""
    quantiles: tuple[float, ...]
    """101 quantiles of the gains of its training prompts."""

    @property
    def name(self) -> str:
        """Short, for logs and records."""
        return self.digest.removeprefix("sha256:")[:12]

    @classmethod
    def load(cls, dump: Mapping[str, Any]) -> ScorerFacts:
        """What ``dataclasses.asdict`` gave."""
        return cls(dump["folder"], dump["digest"], tuple(dump["quantiles"]))


def inspect_artefact(root: Path, named: str | None) -> ScorerFacts:
    """Check an artefact and read what a gateway needs of it.

    Args:
        root: Directory that a relative folder starts from.
        named: Folder as configured; ``None`` for the built-in one.

    Raises:
        ArtefactError: It is missing, changed, or not of this version.
    """
    folder = BUILT_IN if named is None else (root / named).resolve()
    checked = artefact.load(folder)
    quantiles = tuple(_reference(checked).gain_quantiles.tolist())
    return ScorerFacts(None if named is None else str(folder), checked.digest, quantiles)


def open_scorer(facts: ScorerFacts, *, threads: int, gpu: bool) -> ScoreMany:
    """Load the scorer and warm it up; imports onnxruntime, blocks for a good second.

    Args:
        facts: Which one.
        threads: Threads of one call.
        gpu: Whether to compute on the GPU that Ray has given to this process.

    Raises:
        ArtefactError: The artefact of this node is missing, changed, or another one.
        ConfigError: There is no GPU support in this process's onnxruntime.
    """
    checked = artefact.load(BUILT_IN if facts.folder is None else Path(facts.folder))
    if checked.digest != facts.digest:
        raise ArtefactError(
            f"{facts.folder or BUILT_IN}: is {checked.digest} on this node, and {facts.digest} "
            "where the application was built; install the same files on all nodes"
        )
    from routing.complexity import ComplexityScorer

    scorer = ComplexityScorer(checked, threads=threads, providers=_providers(gpu))

    def score(prompts: Sequence[str]) -> list[Score]:
        return _unpacked(scorer.score(prompts), facts.name)

    score([WARM_UP])
    return score


def shortened(prompt: str) -> str:
    """What of a prompt is scored, as text that can be encoded.

    JSON can carry lone surrogates, which are no text to a tokenizer or a serializer.
    """
    half = MAX_CHARS // 2
    if len(prompt) > MAX_CHARS:
        prompt = f"{prompt[: half - 1]} {prompt[-half:]}"
    return prompt if prompt.isascii() else prompt.encode("utf-8", "replace").decode()


def _providers(gpu: bool) -> tuple[str, ...]:
    if not gpu:
        return (CPU,)
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        raise ConfigError(
            "serve file",
            None,
            "router.gpus",
            "onnxruntime has no CUDA support here; install onnxruntime-gpu in place of "
            "onnxruntime on the nodes with GPUs, or set gpus to 0",
        )
    return (CUDA, CPU)


def _unpacked(scores: Any, name: str) -> list[Score]:
    """Arrays as one value a prompt.

    Raises:
        ValueError: A score is not a number.
    """
    found = [
        Score(gain, weak, strong, trust, cluster, similarity, name)
        for gain, weak, strong, trust, cluster, similarity in zip(
            scores.gain.tolist(),
            scores.weak.tolist(),
            scores.strong.tolist(),
            scores.trust.tolist(),
            scores.cluster.tolist(),
            scores.similarity.tolist(),
            strict=True,
        )
    ]
    if not all(math.isfinite(score.gain) for score in found):
        raise ValueError("a score is not finite")
    return found


def _reference(checked: Artefact) -> Reference:
    """As ``ComplexityScorer.reference``, without loading the scorer.

    Raises:
        ArtefactError: It has none.
    """
    try:
        with np.load(io.BytesIO(checked.file(HEADS_FILE)), allow_pickle=False) as stored:
            arrays = {
                name: stored[name].astype(np.float32)
                for name in stored.files
                if name.startswith("reference.")
            }
    except (ValueError, OSError):
        raise ArtefactError(f"{HEADS_FILE}: cannot be read; restore the folder") from None
    return Reference.read(arrays, "reference")
