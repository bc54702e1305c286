"""The sentence encoder at run time: text to two vectors, on one CPU thread if asked.

The lower layers of all-MiniLM-L6-v2, partly fine-tuned, 8-bit (`routing.graph`). A prompt longer
than the limit is represented by its beginning and its end: instructions stand in either place, and
the middle of a long prompt is mostly material.

The prompts of a batch are run one after the other. The range of an 8-bit activation is that of the
whole tensor, so in a common tensor a prompt's vector, and with it a routing decision, would depend
on who else asked at that moment. On a CPU it costs nothing: a prompt alone needs no padding and no
mask, and the matrices are large enough to fill a core.

Source of the base model: W. Wang et al., "MiniLM", NeurIPS 2020; sentence-transformers
all-MiniLM-L6-v2 (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from tokenizers import Tokenizer

from routing.artefact import Artefact, ArtefactError

Floats = npt.NDArray[np.float32]

MODEL_FILE = "encoder.onnx"
TOKENIZER_FILE = "tokenizer.json"

MAX_TOKENS = 128
"""Tokens that the encoder reads of a prompt, its two markers among them, unless the artefact says
otherwise."""

HEAD_TOKENS = 80
"""Of a longer prompt, this many tokens from the beginning, unless the artefact says otherwise; the
rest comes from the end."""

MOST_TOKENS = 512
"""Positions that the base model knows."""

MAX_CHARS = 16_384
"""A longer text is cut to half of this from either end before it is tokenised, because tokenising
costs time per character. It holds far more than `MAX_TOKENS` tokens in any language."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How much of a prompt the encoder reads."""

    limit: int = MAX_TOKENS
    """Tokens in all, the two markers among them; 3 to 512."""
    head: int = HEAD_TOKENS
    """Of a longer prompt, this many tokens from the beginning; 1 to ``limit - 2``."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Cut:
        """What the manifest of an artefact states under ``tokens``, or the usual.

        Raises:
            ArtefactError: It states something impossible.

        """
        stated = settings.get("tokens", {"limit": MAX_TOKENS, "head": HEAD_TOKENS})
        try:
            found = cls(int(stated["limit"]), int(stated["head"]))
        except (TypeError, KeyError, ValueError):
            raise ArtefactError("manifest: tokens is malformed; restore the folder") from None
        if not (3 <= found.limit <= MOST_TOKENS and 1 <= found.head <= found.limit - 2):
            raise ArtefactError("manifest: tokens is out of range; restore the folder")
        return found


@dataclass(frozen=True, slots=True)
class Encoded:
    """Vectors of a batch, ``(prompts, 384)`` each, not normalised."""

    frozen: Floats
    """Mean state after the layers that fine-tuning left alone: general, not specialised."""
    tuned: Floats
    """Mean state after the last layer, fine-tuned on outcomes."""


def open_tokenizer(content: bytes) -> Tokenizer:
    """The tokenizer from its file, without truncation or padding of its own."""
    tokenizer = Tokenizer.from_str(content.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenize(
    tokenizer: Tokenizer, prompts: Sequence[str], cut: Cut | None = None
) -> list[list[int]]:
    """Token ids of each prompt, cut to beginning and end where it is too long."""
    half = MAX_CHARS // 2
    shortened = [
        prompt if len(prompt) <= MAX_CHARS else f"{prompt[:half]} {prompt[-half:]}"
        for prompt in prompts
    ]
    # Lone surrogates, which JSON can carry, are no text to the tokenizer.
    clean = [prompt.encode("utf-8", "replace").decode() for prompt in shortened]
    how = cut or Cut()
    return [_cut(encoding.ids, how) for encoding in tokenizer.encode_batch(clean)]


def _cut(ids: list[int], cut: Cut) -> list[int]:
    if len(ids) <= cut.limit:
        return ids
    tail = cut.limit - 2 - cut.head
    return [*ids[: cut.head + 1], *ids[-1 - tail :]]


class Encoder:
    """Turns prompts into vectors. Safe to call from several threads."""

    def __init__(
        self,
        artefact: Artefact,
        *,
        threads: int = 1,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        """Load the model.

        Args:
            artefact: A checked artefact.
            threads: Threads that one call may use, at least 1.
            providers: What onnxruntime may compute with, best first.

        Raises:
            ArtefactError: A file is missing or is no model.

        """
        self.cut = Cut.of(artefact.settings)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(
                artefact.file(MODEL_FILE), options, providers=list(providers)
            )
            self._tokenizer = open_tokenizer(artefact.file(TOKENIZER_FILE))
        except ArtefactError:
            raise
        except Exception as error:  # both libraries raise their own, undocumented kinds
            raise ArtefactError(
                f"the encoder cannot be loaded ({type(error).__name__}); train the scorer anew"
            ) from None

    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Vectors of prompts, in their order; no prompts give arrays without rows."""
        tokens = tokenize(self._tokenizer, prompts, self.cut)
        width = self._session.get_outputs()[0].shape[1]
        frozen = np.zeros((len(tokens), width), dtype=np.float32)
        tuned = np.zeros_like(frozen)
        for row, ids in enumerate(tokens):
            found = self._session.run(["frozen", "tuned"], {"input_ids": np.asarray([ids])})
            frozen[row], tuned[row] = found[0][0], found[1][0]
        return Encoded(frozen, tuned)
