"""Agreement of answers: what is firm is found, and what only looks alike is not taken for it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    "_I can't help with this._",
    "\n\n   I'm   sorry,   but I\u00a0 cannot    help with that.",
    " " * 1000 + "I cannot help with that.",
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


SIZE = 65_536
"""Characters of an answer that a shadow is made of at most; a request has as many bytes."""
LIMIT_S = 2.0
"""For one text: far above what it takes, far below what holds anybody up."""

REFUSAL_PIECES = (
    "i", "I ", " ", "  ", "\n", "\t", "\u00a0", "_", "*", "-", ",", ", ", "'", "’", ".", "i'm ",
    "am ", "we are ", "so ", "sorry", "sorry ", "afraid ", "apologize ", "unfortunately", "as a ",
    "as an x, ", "just ", "can", "can't", "cannot ", "could n't", "unable to ", "decline ",
    "help ", "provid", "es ", "tut mir leid ", "leider ", "ich kann ", "kann ich ", "nicht ",
    "nicht helfen", "{", "x",
)  # fmt: skip
ANSWER_PIECES = (
    *REFUSAL_PIECES, "A", "A, ", "A and ", "A.", "(", "[", "Answer ", "answer is ", "option ",
    "is ", ":", "=", "\\boxed", "\\boxed{", "{", "}", "{a}", "{{a}", "\\frac", "\\frac{", "\\text",
    "$", "1", "1,", "1,234", "1.", "1e", "-", "%", "/", "####", "result ", "how many ",
    "what is the ", "9", "**", "`", "*a ", "-*a", "**1.", "a-*a", "é", "ß", "\u0301", "\u0323",
    "\u0344", "\U0001d15f",
)  # fmt: skip

SLOW = (
    "i" + " " * 399,
    ((" " * 60) + "sorry " + "as a " * 14 + "," + " i" + " " * 400)[:250],
    "i" + " " * 2000,
    "{\n" + " " * 6000 + "x",
    "i" + " " * SIZE,
    "i" + " \n" * (SIZE // 2),
    "_" * SIZE + "i",
    " " * 60 + "sorry " + "as a " * 4000 + "," + " i" + " " * 4000,
    "sorry " + "as a i " * 9000,
    "tut mir leid " + "ich kann " * 7000 + "nicht " * 1000,
    "nicht" + " " * SIZE,
    "a" + "\u0301" * (SIZE // 2) + "\u0323" * (SIZE // 2),
    "a" + "\u0301\u0323" * (SIZE // 2),
    "\u0344\u0323" * (SIZE // 2),
    "-*a" * 20_000,
    "**1." * 16_000,
    "Answer " + "A, " * 20_000 + "a",
    "Answer" + "(" * SIZE,
    "\\boxed" + " " * SIZE,
    "\\boxed{" + "{{a}}" * 12_000,
    "\\boxed{{{a}" * 6000,
    ("\\boxed{" + "{" + "{" + "x" * 199 + "}") * 300,
    "\\frac{" + " " * SIZE,
    "####" + "\n" * SIZE,
    "answer:1\n" * 7000,
    "1,234" * 13_000,
)


def took_s(call: Callable[..., object], *given: object) -> float:
    """Time of the processor that a call takes."""
    began_s = time.process_time()
    call(*given)
    return time.process_time() - began_s


@pytest.mark.parametrize("text", SLOW, ids=[f"{text[:12]!r}" for text in SLOW])
def test_no_text_is_slow_to_judge(text: str) -> None:
    assert took_s(final_answer.refuses, text) < LIMIT_S / 10
    offered = {"A": text[:100], "B": text}
    for call in (final_answer.letters, final_answer.final_number):
        assert took_s(call, text, offered) < LIMIT_S
    for read in (final_answer.boxed, final_answer.options, final_answer.asks_for_number):
        assert took_s(read, text) < LIMIT_S
    assert took_s(words_in_common, text, text + "x") < LIMIT_S
    assert took_s(agreement, OPEN, text, text + "!x") < 2 * LIMIT_S
    assert took_s(agreement, text, text, "B 18") < 2 * LIMIT_S


runs = st.lists(
    st.tuples(st.sampled_from(REFUSAL_PIECES), st.sampled_from([1, 1, 2, 14, 60, 400, 3000])),
    min_size=1,
    max_size=8,
)


@settings(deadline=None, max_examples=300)
@given(runs=runs, cut=st.sampled_from([250, 400, SIZE]), repeats=st.sampled_from([1, 1, 30]))
def test_no_opening_is_slow_to_judge(runs: list[tuple[str, int]], cut: int, repeats: int) -> None:
    text = ("".join(piece * count for piece, count in runs) * repeats)[:cut]
    assert took_s(final_answer.refuses, text) < LIMIT_S / 10


@settings(deadline=None, max_examples=40)
@given(
    unit=st.lists(st.sampled_from(ANSWER_PIECES), min_size=1, max_size=4),
    before=st.lists(st.sampled_from(ANSWER_PIECES), max_size=3),
    after=st.lists(st.sampled_from(ANSWER_PIECES), max_size=3),
)
def test_no_answer_is_slow_to_compare(unit: list[str], before: list[str], after: list[str]) -> None:
    piece = "".join(unit)
    text = "".join(before) + piece * (SIZE // len(piece)) + "".join(after)
    for prompt in (OPEN, CHOICE):
        assert took_s(agreement, prompt, text, text + "x") < 2 * LIMIT_S


def test_long_runs_of_marks_are_compared_as_they_are_and_words_beside_them_in_one_form() -> None:
    marks = "\u0301\u0323" * 20
    assert compare(OPEN, f"Cafe\u0301 {marks}", f"Caf\u00e9 {marks}") == (1.0, "exact")
    assert compare(OPEN, f"x {marks}", f"x {marks[1:]}")[1] == "words"


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
