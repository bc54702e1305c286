"""Agreement of answers: what is firm is found, and what only looks alike is not taken for it."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from routing import final_answer
from routing.agreement import Agreement, agreement, cosine, words_in_common

CHOICE = "Which is the capital of France?\nA. Berlin\nB. Paris\nC. Rome\nD. Oslo\nAnswer:"
SUM = "Tom has 3 boxes of 6 eggs. How many eggs does he have?"
OPEN = "Tell me about our travel rules."


def compare(prompt: str, one: str, other: str) -> tuple[float, str]:
    """Both ways round; they must say the same."""
    found = agreement(prompt, one, other)
    assert agreement(prompt, other, one) == found
    return found.agreement, found.method


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("", "", (1.0, "empty")),
        ("", "18", (0.0, "empty")),
        (" \n\t", "anything", (0.0, "empty")),
        ("***", "anything at all", (0.0, "words")),
        ("Yes.", "yes", (1.0, "exact")),
        ("**Yes**", "Yes!", (1.0, "exact")),
        ("It  is\nallowed.", "it is allowed", (1.0, "exact")),
        ("Cafe\u0301", "Caf\u00e9", (1.0, "exact")),
    ],
)
def test_texts(one: str, other: str, expected: tuple[float, str]) -> None:
    assert compare(OPEN, one, other) == expected


def test_emphasis_is_not_arithmetic() -> None:
    assert compare(OPEN, "2**3**4 eggs, he said to me again", "234 eggs, he said to me again") != (
        1.0,
        "exact",
    )
    assert compare("What is 2*3?", "-5", "5") == (0.0, "number")


REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I’m sorry, I can’t assist with that request.",
    "Sorry, I cannot provide that information.",
    "I cannot comply.",
    "As an AI language model, I am unable to answer this question.",
    "Unfortunately, I'm not able to share salary data.",
    "I must decline to answer.",
    "I won't do that.",
    "**I can't help with this.**",
    "I apologize, but I cannot fulfill this request.",
    "Es tut mir leid, ich kann dabei nicht helfen.",
    "Leider kann ich diese Frage nicht beantworten.",
    "I can't.",
)
NO_REFUSALS = (
    "18",
    "I'm sorry for the delay; the answer is 18.",
    "I can't find an error in this function: it looks right.",
    "I cannot see why the sum would differ from 18.",
    "The company cannot provide a car to interns.",
    "You can't assist without a badge.",
    "Sorry, that is 18.",
    "He said: I cannot help you.",
    "I think the answer is B.",
    "",
)


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text: str) -> None:
    assert final_answer.refuses(text)
    assert compare(SUM, text, "He has 18 eggs.") == (0.0, "refusal")
    assert compare(CHOICE, text, "B") == (0.0, "refusal")


@pytest.mark.parametrize("text", NO_REFUSALS)
def test_no_refusals(text: str) -> None:
    assert not final_answer.refuses(text)


def test_two_refusals_agree_however_they_are_worded() -> None:
    for one, other in itertools.combinations(REFUSALS, 2):
        assert compare(OPEN, one, other) in ((1.0, "refusal"), (1.0, "exact"))


B_ANSWERS = (
    "B",
    "B.",
    "(B)",
    "b)",
    "**B**",
    "B. Paris",
    "B) Paris is the capital of France.",
    "The answer is (B)",
    "The answer is B.",
    "The correct answer is: B. Paris",
    "Let's think. A is Germany's capital, so not A. The answer is (B).",
    "Final Answer: **B**",
    "Option B is correct.",
    r"Thus \boxed{B}.",
    r"\boxed{\text{B}}",
    "Paris",
    "Paris.",
    "Berlin is in Germany. B is the correct choice.",
)


def test_letters_in_every_form_agree() -> None:
    for one, other in itertools.combinations(B_ANSWERS, 2):
        value, method = compare(CHOICE, one, other)
        assert (value, method in ("choice", "exact")) == (1.0, True), (one, other, method)


@pytest.mark.parametrize("one", B_ANSWERS)
@pytest.mark.parametrize("other", ["A", "The answer is (C).", "D. Oslo", "Rome"])
def test_other_letters_differ(one: str, other: str) -> None:
    assert compare(CHOICE, one, other) == (0.0, "choice")


@pytest.mark.parametrize(
    "text",
    [
        "A good question; nobody knows.",
        "I think so.",
        "The answer is a matter of taste.",
        "The answer is A matter of taste",
        "E",
        "The answer is (H).",
        "",
    ],
)
def test_articles_and_letters_that_are_not_offered_name_nothing(text: str) -> None:
    assert final_answer.letters(text, final_answer.options(CHOICE)) is None


def test_several_letters_are_one_answer() -> None:
    assert compare(CHOICE, "The answer is A and C.", "A, C")[0] == 1.0
    assert compare(CHOICE, "The answer is A or B.", "A") == (0.0, "choice")


def test_without_options_a_letter_is_only_a_text() -> None:
    assert compare(OPEN, "The answer is A.", "The answer is B.")[1] == "words"
    assert final_answer.options("A. Einstein was born where?") == {}


EIGHTEEN = (
    "18",
    "18.",
    "18.0",
    "18 eggs",
    "He has 18 eggs.",
    "3 * 6 = 18",
    "3 boxes of 6 eggs make 3*6 = 18 eggs.\n#### 18",
    "The answer is 18.",
    "The answer is: 3 x 6 = 18 eggs. It took me 2 steps.",
    r"So the total is $\boxed{18}$.",
    r"\boxed{18\text{ eggs}}",
    r"\boxed{\frac{36}{2}}",
    "**18**",
)


def test_one_number_in_every_form_agrees() -> None:
    for one, other in itertools.combinations(EIGHTEEN, 2):
        value, method = compare(SUM, one, other)
        assert (value, method in ("number", "exact")) == (1.0, True), (one, other, method)


@pytest.mark.parametrize("one", EIGHTEEN)
@pytest.mark.parametrize("other", ["17", "-18", "The answer is 180.", "#### 1,8000", "1.8"])
def test_other_numbers_differ(one: str, other: str) -> None:
    assert compare(SUM, one, other) == (0.0, "number")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,234", "1234", True),
        ("1,234,567", "1234567", True),
        ("1'234", "1234", True),
        ("$1,234.50", "1234.5", True),
        ("-5", "−5", True),
        ("-5", "5", False),
        ("-$5", "$-5", True),
        ("10-5", "-5", False),
        ("3,5", "3.5", True),
        ("1.0", "1", True),
        ("3/4", "0.75", True),
        (r"\frac{3}{4}", "0.75", True),
        ("2e3", "2000", True),
        ("2 million", "2,000,000", True),
        ("50%", "50", True),
        ("50%", "50 percent", True),
        ("50%", "$50", False),
        ("5 km", "5000 m", True),
        ("5 km", "5 m", False),
        ("5 km", "5 kg", False),
        ("5 hours", "300 minutes", True),
        ("5 apples", "5", True),
        ("3.33", "3.3333", True),
        ("3.33", "3.34", False),
        ("3", "3.3", False),
        ("1000", "1001", False),
        ("0.1", "0.10", True),
    ],
)
def test_numbers(one: str, other: str, same: bool) -> None:
    assert compare("Calculate the result.", one, other)[0] == float(same)


def test_numbers_in_prose_are_no_final_number() -> None:
    one = "Travel is booked 14 days ahead, in class 2, through the portal."
    other = "Book through the portal; you need the approval of 3 people."
    assert compare(OPEN, one, other)[1] == "words"


def test_what_is_in_a_box_need_not_be_a_number() -> None:
    assert compare(OPEN, r"\boxed{x^2 + 1}", r"so \boxed{x^2+1}")[0] == 1.0
    assert compare(OPEN, r"\boxed{yes}", r"\boxed{no}") == (0.0, "final")


def test_a_zero_denominator_is_no_error() -> None:
    assert compare(SUM, "3/0", "3")[1] == "number"


def test_similarity_that_was_given_is_used_last_and_cut_to_its_range() -> None:
    calls: list[tuple[str, str]] = []

    def similarity(one: str, other: str) -> float:
        calls.append((one, other))
        return 1.7

    assert agreement(OPEN, "one text", "another", similarity) == Agreement(1.0, "cosine")
    assert agreement(OPEN, "another", "one text", similarity) == Agreement(1.0, "cosine")
    assert calls[0] == calls[1]
    agreement(SUM, "18", "17", similarity)
    assert len(calls) == 2
    assert agreement(OPEN, "a b", "c d", lambda *_: float("nan")) == Agreement(0.0, "cosine")


def test_cosine_starts_at_what_unrelated_texts_have() -> None:
    table = {"x": [1.0, 0.0], "same": [2.0, 0.0], "far": [0.5, 0.75**0.5], "nothing": [0.0, 0.0]}

    def vectors(texts: object) -> np.ndarray:
        return np.asarray([table[text] for text in texts], dtype=np.float32)  # type: ignore[attr-defined]

    similarity = cosine(vectors, unrelated=0.5)
    assert similarity("x", "same") == pytest.approx(1.0)
    assert similarity("x", "far") == pytest.approx(0.0, abs=1e-6)
    assert similarity("x", "nothing") == 0.0


def test_words_in_common() -> None:
    assert words_in_common("a b c", "a b c") == 1.0
    assert words_in_common("a b", "c d") == 0.0
    assert words_in_common("a a b", "a b b") == pytest.approx(2 / 3)
    assert words_in_common("...", "!!!") == 0.0


def test_agreement_is_in_thousandths_for_the_record() -> None:
    assert Agreement(2 / 3, "words").milli == 667


@pytest.mark.parametrize(
    "text",
    [
        "*a " * 60_000,
        "I'm sorry, " * 30_000,
        r"\boxed{" * 30_000,
        "{" * 200_000,
        "answer is " * 40_000,
        "9" * 200_000,
        "9," * 100_000,
        "1,234" * 50_000,
        "A, " * 70_000,
        "A.\n" * 70_000,
        " " * 300_000,
        "#### " * 40_000,
        r"\boxed{" + "{a}" * 10_000,
    ],
)
def test_hostile_texts_take_no_time(text: str) -> None:
    began = time.process_time()
    for prompt in (SUM, CHOICE, text):
        agreement(prompt, text, "B 18")
        agreement(prompt, text, text + "!x")
    assert time.process_time() - began < 2
