"""What an answer says about itself, and which answers are given up."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from governance.ports import Draft
from routing.evidence import (
    MAX_CHARS,
    MAX_TOKENS,
    AnswerEvidence,
    CascadeDraft,
    EscalationGate,
    Evidence,
)
from routing.reasons import Judgement
from routing.types import Verdict


def evidence(
    text: str = "An answer.",
    logprobs: Sequence[float] = (-0.1,) * 10,
    finish: str | None = "stop",
    *,
    json_mode: bool = False,
) -> Evidence:
    answer = AnswerEvidence(json_mode)
    answer.feed(text, logprobs)
    return answer.verdict(finish)


def test_confidence_is_the_geometric_mean_and_the_weakest_that_of_the_least_sure_tenth() -> None:
    probabilities = [0.9] * 18 + [0.5, 0.02]
    answer = AnswerEvidence()
    for probability in probabilities:
        answer.feed("a", [math.log(probability)])
    found = answer.verdict(None)
    mean = math.prod(probabilities) ** (1 / 20)
    assert found.confidence_milli == round(1000 * mean)
    assert found.weakest_milli == 100
    assert (found.tokens, found.ended) == (20, "held")
    assert found.detail == {
        "confidence_milli": found.confidence_milli,
        "weakest_milli": 100,
        "draft_tokens": 20,
        "draft_ended": "held",
    }


def test_one_token_is_its_own_weakest_and_none_is_unknown() -> None:
    assert evidence(logprobs=[math.log(0.25)]).weakest_milli == 250
    nothing = evidence(logprobs=[])
    assert (nothing.confidence_milli, nothing.weakest_milli, nothing.tokens) == (None, None, 0)


def test_numbers_that_cannot_be_are_bounded() -> None:
    odd = [-math.inf, math.inf, math.nan, -9999.0, 3.0]
    found = evidence(logprobs=odd)
    assert found.tokens == 4
    assert (found.confidence_milli, found.weakest_milli) == (0, 0)


def test_memory_is_bounded() -> None:
    answer = AnswerEvidence(json_mode=True)
    for _ in range(200):
        answer.feed("x" * 1000, [-0.1] * 100)
    found = answer.verdict("stop")
    assert found.tokens == MAX_TOKENS
    assert sum(map(len, answer._parts)) == MAX_CHARS
    assert not found.broken_json


@pytest.mark.parametrize(
    ("text", "finish", "broken"),
    [
        ('{"a": 1}', "stop", False),
        ('{"a": 1', "stop", True),
        ("Sure: {}", "stop", True),
        ('{"a": 1', None, False),
        ('{"a": 1', "length", False),
        ("[" * 50_000, "stop", True),
    ],
)
def test_json_is_judged_where_it_has_ended(text: str, finish: str | None, broken: bool) -> None:
    assert evidence(text, finish=finish, json_mode=True).broken_json is broken
    assert not evidence(text, finish=finish).broken_json


def judge(
    gate: EscalationGate, found: Evidence, left: float = 1.0, *, cut_asked: bool = False
) -> Verdict:
    return gate.judge(found, 0.5, left, cut_asked=cut_asked)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (evidence("", logprobs=(-0.1,)), Judgement.EMPTY),
        (evidence(" \n", logprobs=()), Judgement.EMPTY),
        (evidence("I'm sorry, but I can't help with that."), Judgement.REFUSAL),
        (evidence("It goes on", finish="length"), Judgement.LENGTH),
        (evidence("no json", json_mode=True), Judgement.JSON),
        (evidence("", logprobs=()), Judgement.EMPTY),
    ],
)
def test_some_answers_are_given_up_at_once(found: Evidence, why: Judgement) -> None:
    verdict = judge(EscalationGate(0.1), found)
    assert (verdict.escalate, verdict.reason) == (True, why.value)
    # What the budget has no room for is kept.
    assert not judge(EscalationGate(0.1), found, left=0.0).escalate
    assert not judge(EscalationGate(0.0), found).escalate


def test_an_answer_whose_tokens_are_seen_is_not_empty() -> None:
    """Reasoning comes without text, and with log-probabilities."""
    answer = AnswerEvidence()
    assert not answer.verdict(None).empty, "nothing has come yet"
    for _ in range(20):
        answer.feed("", [-0.1])
    assert not answer.verdict(None).empty
    assert not answer.verdict("stop").empty
    assert judge(EscalationGate(0.5), answer.verdict(None)).reason == Judgement.LEARNING
    assert evidence("", logprobs=()).empty
    assert evidence("", logprobs=(-0.1,)).empty, "the token that ends an answer has one as well"
    assert not evidence("", logprobs=(), finish=None).empty
    assert not evidence("text", logprobs=()).empty


REFUSAL = "I cannot help with that"
FAULTS = (
    evidence(REFUSAL),
    evidence("", logprobs=()),
    evidence("It goes on", finish="length"),
    evidence("no json", json_mode=True),
)
BURST = 8


@pytest.mark.parametrize("share", [0.05, 0.1, 0.4])
@pytest.mark.parametrize("fault", FAULTS)
def test_who_makes_every_answer_bad_gets_no_more_than_the_stated_share(
    share: float, fault: Evidence
) -> None:
    gate = EscalationGate(share)
    verdicts = [judge(gate, fault) for _ in range(1000)]
    given_up = sum(verdict.escalate for verdict in verdicts)
    assert 2 * share * 1000 - 1 <= given_up <= 2 * share * 1000 + BURST
    kept = [verdict for verdict in verdicts if not verdict.escalate]
    assert {verdict.reason for verdict in kept} == {Judgement.SHARE_USED}
    assert {verdict.detail["draft_kept"] for verdict in kept} == {verdicts[0].reason}


def ordinary(gate: EscalationGate, rng: random.Random, count: int) -> int:
    """Judge answers of all kinds of sureness; how many were given up."""
    return sum(
        gate.judge(
            evidence(logprobs=[-2 * rng.random()] * 5), rng.random(), 1.0, cut_asked=False
        ).escalate
        for _ in range(count)
    )


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("logprob", [-0.01, -9.0])
@pytest.mark.parametrize("attack", [500, 20_000])
def test_after_a_stream_of_refusals_others_get_their_share_again_soon(
    share: float, logprob: float, attack: int
) -> None:
    gate, rng = EscalationGate(share), random.Random(7)
    ordinary(gate, rng, 2000)
    refusal = evidence(REFUSAL, [logprob] * 10)
    for _ in range(attack):
        judge(gate, refusal)
    ordinary(gate, rng, 300)
    assert ordinary(gate, rng, 1000) / 1000 == pytest.approx(share, abs=0.03)


@settings(deadline=None, max_examples=60)
@given(
    share=st.floats(0.001, 0.9),
    pieces=st.lists(
        st.tuples(st.sampled_from([*FAULTS, None]), st.floats(-9, 0), st.integers(1, 300)),
        min_size=1,
        max_size=8,
    ),
    left=st.floats(0, 1),
    rng=st.randoms(use_true_random=False),
)
def test_no_order_of_answers_gets_more_than_twice_the_share(
    share: float,
    pieces: list[tuple[Evidence | None, float, int]],
    left: float,
    rng: random.Random,
) -> None:
    gate, given_up, unsure = EscalationGate(share), [0.0], 0
    for fault, logprob, count in pieces:
        found = fault or evidence(logprobs=[logprob])
        for _ in range(count):
            verdict = gate.judge(found, rng.random(), left, cut_asked=False)
            given_up.append(given_up[-1] + verdict.escalate)
            unsure += verdict.reason == Judgement.UNSURE
    # Of any answers in a row: the sum since the point where it was furthest below its bound.
    lowest = math.inf
    for number, total in enumerate(given_up):
        over = total - 2 * share * left * number
        lowest = min(lowest, over)
        assert over - lowest <= BURST + 1e-6
    assert unsure <= share * left * (len(given_up) - 1 + 128) + 2


def test_a_cut_that_was_asked_for_says_nothing() -> None:
    found = evidence(finish="length")
    assert not judge(EscalationGate(0.1), found, cut_asked=True).escalate


def test_nothing_is_unsure_before_enough_was_seen() -> None:
    gate = EscalationGate(0.5)
    assert judge(gate, evidence(logprobs=())).reason == Judgement.NO_EVIDENCE
    for _ in range(32):
        assert judge(gate, evidence()).reason == Judgement.LEARNING
    unsure = judge(gate, evidence(logprobs=[-5.0]))
    assert (unsure.escalate, unsure.reason) == (True, Judgement.UNSURE)
    assert unsure.detail["unsure_below_milli"] == 905
    assert unsure.detail["weakest_milli"] == 7


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("kind", ["spread", "constant", "refusals"])
def test_the_share_of_given_up_answers_is_the_stated_one(share: float, kind: str) -> None:
    gate, rng, given_up = EscalationGate(share), random.Random(5), []
    for number in range(3000):
        logprob = -2 * rng.random() if kind != "constant" else -0.7
        refuses = kind == "refusals" and number % 40 == 0
        text = "I can't help with that." if refuses else "text"
        verdict = gate.judge(evidence(text, [logprob] * 5), rng.random(), 1.0, cut_asked=False)
        given_up.append(verdict.escalate)
    assert sum(given_up[1000:]) / 2000 == pytest.approx(share, abs=0.02)


def test_the_least_sure_are_given_up() -> None:
    gate, rng = EscalationGate(0.2), random.Random(6)
    kept, dropped = [], []
    for _ in range(2000):
        found = evidence(logprobs=[-3 * rng.random()])
        verdict = gate.judge(found, rng.random(), 1.0, cut_asked=False)
        (dropped if verdict.escalate else kept).append(found.weakest_milli or 0)
    assert sum(dropped) / len(dropped) < 150 < 300 < sum(kept) / len(kept)


def test_a_draft_is_what_the_gateway_expects() -> None:
    draft: Draft = CascadeDraft(EscalationGate(0.5), 64, 0.5, 1.0, json_mode=True, cut_asked=False)
    assert draft.hold_tokens == 64
    draft.feed('{"a"', [-0.1, -0.2])
    draft.feed(": 1}", [-0.1])
    assert not draft.verdict("stop").escalate
    broken: Draft = CascadeDraft(EscalationGate(0.5), 64, 0.5, 1.0, json_mode=True, cut_asked=False)
    broken.feed("Well,", [-0.1])
    assert broken.verdict("stop").reason == "json"


@pytest.mark.parametrize("text", ["i" + " " * 399, " " * 60 + "sorry " + "as a " * 14 + ", i" * 99])
def test_a_hostile_beginning_does_not_hold_the_event_loop(text: str) -> None:
    began_s = time.process_time()
    evidence(text)
    assert time.process_time() - began_s < 0.05


def test_a_verdict_takes_no_time_to_speak_of() -> None:
    gate = EscalationGate(0.1)
    answer = AnswerEvidence()
    answer.feed("I " * 2000, [-0.1] * 128)
    began_s = time.perf_counter()
    for _ in range(100):
        judge(gate, answer.verdict("stop"))
    assert (time.perf_counter() - began_s) / 100 < 0.003
