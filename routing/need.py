"""What a request needs of a model, and whether a model has it.

What the caller states counts (tools, JSON, lengths); the language is guessed from the text by
py3langid (BSD-3-Clause; naive Bayes over byte sequences with a model in the package, a fork of
langid.py: M. Lui and T. Baldwin, "langid.py: An Off-the-shelf Language Identification Tool", ACL
2012 demonstrations), and only where some model's card names languages.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from routing.cards import ModelCard

LANGUAGE_CHARS = 128
"""A language shows in its first sentences, and a guess takes time in proportion."""
LEAST_CHARS = 16
"""Shorter texts are names, numbers and greetings: any guess would be one."""
LEAST_SURE = 0.9
"""Probability from which a guess counts. Of 8,000 English questions of public benchmarks none was
taken for another language with it, and 93 % for English."""

_SAME = {"nn": "no"}


@dataclass(frozen=True, slots=True)
class Need:
    """What a model must be able to do for a request."""

    prompt_tokens_estimate: int
    """Tokens of the prompt, estimated from its bytes."""
    answer_tokens: int
    """Answer tokens asked for per choice; 0 where the client left it to the platform."""
    tools: bool = False
    json_mode: bool = False
    choices: int = 1
    """Answers asked for."""
    language: str | None = None
    """ISO 639-1; ``None`` is found from the text where a card names languages."""
    data_class: str | None = None
    """Class of the data in it; ``None`` where nobody has said."""


LACKS = ("language", "json", "tools", "context", "data_class")
"""What a model may lack, the least severe first. Where no model has everything, those that lack
the least severe thing are taken: an answer in a weaker language is worth more than a refusal."""


def fits(card: ModelCard, context_tokens: int, need: Need) -> str | None:
    """What the model lacks for the request, most severe first; ``None`` where it fits.

    Args:
        card: What the model can do.
        context_tokens: Longest prompt plus answer that is served.
        need: What is needed.
    """
    context = min(context_tokens, card.context_tokens or context_tokens)
    if need.data_class is not None and need.data_class not in card.data_classes:
        return "data_class"
    if need.prompt_tokens_estimate + max(1, need.answer_tokens) > context:
        return "context"
    if need.tools and not card.tools:
        return "tools"
    if need.json_mode and not card.json_mode:
        return "json"
    if need.language is not None and not card.any_language and need.language not in card.languages:
        return "language"
    return None


def severity(lack: str | None) -> int:
    """0 where nothing is lacking, else more for what is worse."""
    return 0 if lack is None else 1 + LACKS.index(lack)


def names_languages(cards: Sequence[ModelCard]) -> bool:
    """Whether the language of a request makes a difference among these models."""
    return len({card.languages for card in cards}) > 1


def language_of(text: str) -> str | None:
    """Language of a text as ISO 639-1, or ``None`` where it is short or a guess would be unsure.

    Takes some 50 microseconds; the first call loads the model, see ``warm_up``.
    """
    begin = text[: 2 * LANGUAGE_CHARS].strip()[:LANGUAGE_CHARS]
    if len(begin) < LEAST_CHARS and begin.isascii():
        return None
    code, sure = _identifier().classify(begin)
    code = _SAME.get(code, code)
    return code if sure >= LEAST_SURE and len(code) == 2 else None


def warm_up() -> None:
    """Load what guesses languages: half a second, and 70 MiB."""
    _identifier()


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import LanguageIdentifier  # slow, and seldom wanted

    return LanguageIdentifier.from_model_file("data/model.npz.xz", norm_probs=True)
