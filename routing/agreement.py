"""How far two answers to one prompt agree, without a judge.

Agreement is evidence, not correctness: two models may agree on what is wrong, and differ in words
while both are right. What it is good for: where a small and a large model end in the same number or
letter, the large one would have gained nothing; how often that happens, against the predicted gain,
says whether a router's scores mean anything on one's own traffic. ``method`` says what was
compared, so that the firm kinds can be counted apart from the soft ones:

| method | compared | agreement |
|---|---|---|
| ``empty`` | one of them, or both, say nothing | 0, or 1 for both |
| ``exact`` | the texts, but for case, spacing, emphasis and a full stop | 1 |
| ``refusal`` | one declines and the other answers, or both decline | 0, or 1 for both |
| ``choice`` | the letters, where the prompt offers options | 0 or 1 |
| ``number`` | the numbers that they end in | 0 or 1 |
| ``final`` | what both put into a box, where it is no number | 0 or 1 |
| ``cosine`` | the texts, by the similarity that was given | 0 to 1, soft |
| ``words`` | the texts, by words in common (F1), where none was given | 0 to 1, soft |

Soft kinds say little about truth: "it is" and "it is not" are neighbours by any of them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from routing import final_answer

Similarity = Callable[[str, str], float]
"""Two texts to 0..1; what lies outside is cut off."""

MAX_CHARS = 32_768
"""Of a longer text its beginning and its end are compared."""

UNRELATED = 0.64
"""Cosine of the encoder's general vectors for texts that have nothing to do with each other:
median over pairs of different exam questions."""

_EMPHASIS = re.compile(r"(?<![\w*`])(\*\*|__|\*|_|`)(\S(?:[^\n]{0,200}?\S)?)\1(?![\w*`])")
_MANY_MARKS = re.compile(r"([^\w\s\x00-\x7f]{31,}+)")
"""Among others every run of more combining marks than any script has (UAX 15, stream-safe text)."""
_WORD = re.compile(r"\w+(?:[.,]\d+)*")


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two answers agree, and by what that was found."""

    agreement: float
    """0 to 1."""
    method: str

    @property
    def milli(self) -> int:
        """In thousandths, for the record."""
        return round(self.agreement * 1000)


def agreement(prompt: str, one: str, other: str, similarity: Similarity | None = None) -> Agreement:
    """Compare two answers; the order of the two does not matter.

    Args:
        prompt: What both answer; its options and whether it asks for a number are looked at.
        one: An answer.
        other: Another.
        similarity: For texts of which nothing firmer can be said; words in common without it.
    """
    one, other = _bounded(one), _bounded(other)
    first, second = _plain(one), _plain(other)
    if not first or not second:
        return Agreement(float(first == second), "empty")
    if first == second:
        return Agreement(1.0, "exact")
    refused = final_answer.refuses(one), final_answer.refuses(other)
    if any(refused):
        return Agreement(float(all(refused)), "refusal")
    return (
        _by_letters(prompt, one, other)
        or _by_final(prompt, one, other)
        or _by_text(first, second, one, other, similarity)
    )


def _by_letters(prompt: str, one: str, other: str) -> Agreement | None:
    offered = final_answer.options(prompt)
    if not offered:
        return None
    first, second = final_answer.letters(one, offered), final_answer.letters(other, offered)
    if first is None or second is None:
        return None
    return Agreement(float(first == second), "choice")


def _by_final(prompt: str, one: str, other: str) -> Agreement | None:
    asked = final_answer.asks_for_number(prompt)
    first, second = final_answer.final_number(one, asked), final_answer.final_number(other, asked)
    boxes = final_answer.boxed(one), final_answer.boxed(other)
    if all(boxes) and boxes[0] == boxes[1]:
        return Agreement(1.0, "final" if first is None else "number")
    if first is not None and second is not None:
        return Agreement(float(final_answer.same(first, second)), "number")
    return Agreement(0.0, "final") if all(boxes) else None


def _by_text(
    first: str, second: str, one: str, other: str, similarity: Similarity | None
) -> Agreement:
    if similarity is None:
        return Agreement(words_in_common(first, second), "words")
    # In a fixed order, so that the result does not depend on which is which.
    value = similarity(min(one, other), max(one, other))
    return Agreement(min(1.0, max(0.0, float(value))) if value == value else 0.0, "cosine")


def words_in_common(one: str, other: str) -> float:
    """F1 over the words of two texts, each as often as it stands there; 0 where one has none."""
    first, second = Counter(_WORD.findall(one.casefold())), Counter(_WORD.findall(other.casefold()))
    size = first.total() + second.total()
    return 2 * (first & second).total() / size if size else 0.0


def cosine(
    vectors: Callable[[Sequence[str]], npt.NDArray[np.float32]], unrelated: float = UNRELATED
) -> Similarity:
    """A similarity out of an encoder.

    Vectors of a small encoder's lower layers all point one way: texts that share nothing have a
    cosine far above 0. That floor is subtracted, so that 0 means unrelated.

    Args:
        vectors: One vector per text, such as ``Encoder.encode(texts).frozen``.
        unrelated: Cosine of texts that share nothing, below 1.
    """

    def similarity(one: str, other: str) -> float:
        pair = np.asarray(vectors([one, other]), dtype=np.float64)
        length = float(np.linalg.norm(pair[0]) * np.linalg.norm(pair[1]))
        found = float(pair[0] @ pair[1]) / length if length else 0.0
        return min(1.0, max(0.0, (found - unrelated) / (1 - unrelated)))

    return similarity


def _bounded(text: str) -> str:
    half = MAX_CHARS // 2
    return text if len(text) <= MAX_CHARS else f"{text[:half]}\n{text[-half:]}"


def _plain(text: str) -> str:
    """What does not change the meaning taken away."""
    text = _EMPHASIS.sub(r"\2", _composed(text))
    text = text.replace("’", "'").replace("−", "-")
    return re.sub(r"\s+", " ", text).strip().rstrip(".!").rstrip().casefold()


def _composed(text: str) -> str:
    """The text in NFC, but for long runs of marks, which take the square of their number."""
    parts = _MANY_MARKS.split(text)
    return "".join(
        part if number % 2 else unicodedata.normalize("NFC", part)
        for number, part in enumerate(parts)
    )
