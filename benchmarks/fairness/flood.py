"""What is asked of a real engine: critical requests, data science, and marketing's flood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests of one department."""

    department: str
    priority: int
    """As a ticket has it: -10 critical, 0 standard, 10 batch."""
    share: float
    """Of what the engine can do, in an ordinary hour."""
    times: float
    """Of that share, what it asks for now."""
    prompt_words: tuple[int, int]
    """Least and most."""
    answer_tokens: tuple[int, int]


SHAPE = (
    Kind("support-desk", -10, 0.08, 1.0, (20, 60), (4, 12)),
    Kind("data-science", 0, 0.24, 1.0, (40, 160), (16, 48)),
    Kind("marketing", 0, 0.15, 10.0, (40, 160), (16, 48)),
)
"""Marketing alone asks for one and a half times what the engine can do."""


@dataclass(frozen=True, slots=True)
class Shot:
    """One request and when it comes."""

    number: int
    at_s: float
    department: str
    priority: int
    prompt_words: int
    answer_tokens: int


def sizes(kind: Kind, rng: np.random.Generator) -> tuple[int, int]:
    """Words of the prompt and tokens of the answer; uniform."""
    words = int(rng.integers(kind.prompt_words[0], kind.prompt_words[1] + 1))
    tokens = int(rng.integers(kind.answer_tokens[0], kind.answer_tokens[1] + 1))
    return words, tokens


def work(words: float, tokens: float) -> float:
    """Rough work of a request, in answer tokens; only sets how often a kind comes.

    A prompt token is taken for a tenth of an answer token.
    """
    return words / 10 + tokens


def schedule(rate: float, span_s: float, seed: int, shape: Sequence[Kind] = SHAPE) -> list[Shot]:
    """Poisson arrivals of each kind.

    Args:
        rate: Work a second that the engine can do, see ``work``.
        span_s: Length in seconds.
        seed: Of times and sizes.
        shape: Who asks.
    """
    found = []
    for place, kind in enumerate(shape):
        rng = np.random.default_rng([seed, place])
        mean = work(sum(kind.prompt_words) / 2, sum(kind.answer_tokens) / 2)
        count = int(rng.poisson(rate * kind.share * kind.times * span_s / mean))
        for at_s in np.sort(rng.random(count)) * span_s:
            found.append((float(at_s), kind, *sizes(kind, rng)))
    found.sort(key=lambda one: one[0])
    return [
        Shot(number, at_s, kind.department, kind.priority, words, tokens)
        for number, (at_s, kind, words, tokens) in enumerate(found)
    ]


def everybody_at_once(count: int, seed: int, shape: Sequence[Kind] = SHAPE) -> list[Shot]:
    """Requests of all kinds in equal numbers, all at the start: how much the engine can do."""
    rng = np.random.default_rng([seed, 99])
    found = []
    for number in range(count):
        kind = shape[number % len(shape)]
        found.append(Shot(number, 0.0, kind.department, 0, *sizes(kind, rng)))
    return found
