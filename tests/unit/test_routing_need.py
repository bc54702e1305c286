"""What a request needs, what a model lacks, and in which language a text is."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from routing.cards import ModelCard
from routing.need import LACKS, Need, fits, language_of, names_languages, severity

PLAIN = Need(prompt_tokens_estimate=100, answer_tokens=0)
CARD = ModelCard(
    id="m",
    context_tokens=1000,
    tools=False,
    json_mode=False,
    languages=("en", "de"),
    data_classes=("public",),
)


@pytest.mark.parametrize(
    ("need", "lack"),
    [
        (PLAIN, None),
        (replace(PLAIN, language="de"), None),
        (replace(PLAIN, language="pl"), "language"),
        (replace(PLAIN, json_mode=True), "json"),
        (replace(PLAIN, json_mode=True, tools=True), "tools"),
        (replace(PLAIN, tools=True, answer_tokens=900), "tools"),
        (replace(PLAIN, tools=True, answer_tokens=901), "context"),
        (replace(PLAIN, prompt_tokens_estimate=1000), "context"),
        (replace(PLAIN, prompt_tokens_estimate=999), None),
        (replace(PLAIN, data_class="public"), None),
        (replace(PLAIN, data_class="restricted", tools=True), "data_class"),
        # Each choice is an answer of its own beside the prompt; they do not add up.
        (replace(PLAIN, answer_tokens=800, choices=50), None),
    ],
)
def test_the_most_severe_lack_is_named(need: Need, lack: str | None) -> None:
    assert fits(CARD, 4096, need) == lack


def test_what_is_served_bounds_the_context_and_a_card_cannot_lengthen_it() -> None:
    need = replace(PLAIN, answer_tokens=500)
    assert fits(CARD, 599, need) == "context"
    assert fits(ModelCard(id="m"), 600, need) is None


def test_severities_are_ordered() -> None:
    assert [severity(lack) for lack in (None, *LACKS)] == list(range(6))


def test_languages_matter_where_cards_differ() -> None:
    other = CARD.model_copy(update={"languages": ("en",)})
    assert names_languages([CARD, other])
    assert not names_languages([CARD, CARD])
    assert not names_languages([])


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the capital of France, and how many people live there?", "en"),
        ("Schreibe eine kurze E-Mail an meinen Vermieter wegen der Heizung.", "de"),
        ("Napisz krótki wiersz o jesieni w Warszawie.", "pl"),
        ("東京の天気はどうですか", "ja"),
        ("", None),
        ("hello", None),
        ("12 * 13 + 5 = ?", None),
        ("0" * 5000, None),
        ("\ud800" * 40, None),
        ("\0" * 40, None),
        ("def f(x):\n    return [i * i for i in range(x) if i % 2]\n", None),
    ],
)
def test_a_language_is_named_where_it_is_sure(text: str, language: str | None) -> None:
    assert language_of(text) == language


def test_a_guess_takes_the_same_time_for_a_long_text() -> None:
    text = "What is the capital of France? " * 40_000
    language_of(text)
    best_s = min(_timed(text) for _ in range(20))
    assert best_s < 0.002


def _timed(text: str) -> float:
    began_s = time.perf_counter()
    language_of(text)
    return time.perf_counter() - began_s
