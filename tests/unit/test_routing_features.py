"""Hand features: what they count, and that no text breaks them."""

from __future__ import annotations

import numpy as np
import pytest

from routing.features import FEATURE_NAMES, MAX_CHARS, feature_matrix, features

QUESTION = (
    "A shop sells 3 pens at $1.50 each. How many dollars do 12 pens cost?\n"
    "A. 18\nB. 6\nC. 4.5\nD. Not enough is known"
)


def named(prompt: str) -> dict[str, float]:
    return dict(zip(FEATURE_NAMES, features(prompt).tolist(), strict=True))


def counted(prompt: str, name: str) -> float:
    """A count as it was before it was compressed."""
    return round(float(np.expm1(named(prompt)[name])), 3)


def test_counts_of_a_word_problem() -> None:
    assert counted(QUESTION, "chars") == len(QUESTION)
    assert counted(QUESTION, "lines") == 4
    assert counted(QUESTION, "options") == 4
    assert counted(QUESTION, "numbers") == 6
    assert counted(QUESTION, "stem_numbers") == 3
    assert counted(QUESTION, "decimals") == 2
    assert counted(QUESTION, "largest_number") == 18
    assert counted(QUESTION, "question_marks") == 1
    assert counted(QUESTION, "how_many") == 1
    assert named(QUESTION)["numeric_option_share"] == 0.75


def test_code_and_formulas_are_seen() -> None:
    assert counted("def add(a, b):\n    return a + b", "code") == 2
    assert counted(r"Prove that $\sqrt{2}$ is irrational.", "latex") == 3
    assert counted("Fill in: the ____ of", "blank") > 0


def test_shares_lie_between_0_and_1() -> None:
    for prompt in (QUESTION, "ÄÖÜ ß 漢字", "!!!!", "12345"):
        for name, value in named(prompt).items():
            if name.endswith("_share"):
                assert 0 <= value <= 1, name


@pytest.mark.parametrize(
    "prompt",
    ["", " ", "\n\n", "\0", "\ud800", "9" * 5_000, "1,2.3,4..5", "a" * 100_000, "٣" * 20, "²" * 20],
)
def test_no_text_breaks_them(prompt: str) -> None:
    values = features(prompt)

    assert values.shape == (len(FEATURE_NAMES),)
    assert values.dtype == np.float32
    assert np.isfinite(values).all()


def test_nothing_is_zero() -> None:
    assert not features("").any()


def test_text_beyond_the_limit_counts_for_length_only() -> None:
    short, long = named("a " * (MAX_CHARS // 2)), named("a " * MAX_CHARS)

    assert {name for name in FEATURE_NAMES if short[name] != long[name]} == {"chars"}


def test_many_are_the_same_as_one_by_one() -> None:
    prompts = [QUESTION, "", "Why?"]

    assert np.array_equal(feature_matrix(prompts), np.stack([features(p) for p in prompts]))
    assert feature_matrix([]).shape == (0, len(FEATURE_NAMES))


def test_names_are_unique() -> None:
    assert len(set(FEATURE_NAMES)) == len(FEATURE_NAMES)
