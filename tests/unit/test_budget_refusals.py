"""What a refusal says ran out, and how long an answer still fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governance.budget.holds import PROMPT_MIN_TOKENS
from governance.budget.messages import AccountState, ModelPrice, Tight
from governance.budget.refusals import (
    GPU_TIME,
    TOKENS,
    budget_refusal,
    largest_answer,
    limited,
)
from governance.errors import Shortage
from governance.types import Amount, BudgetAsk, Operation

NOW_US = 1_700_000_000_000_000
HOUR_US = 3_600_000_000
STATE = AccountState(
    account="hr~someone",
    window="day",
    window_start_us=NOW_US,
    reset_us=NOW_US + 24 * HOUR_US,
    limit_us=None,
    limit_tokens=1000,
    spent=Amount(5_000_000, 300),
    leased=Amount(),
    open=Amount(),
    overridden_until_us=None,
    owner="team-lead",
)
MONTH = Tight("hr", "month", NOW_US + 400 * HOUR_US, 9000, 8990, "hr-lead")
HOURLY = Tight("hr@hour", "hour", NOW_US + HOUR_US, 8_000_000, 7_000_000, None)


def shortage(state: AccountState, rest: Amount, need: Amount | None = None) -> Shortage:
    left = budget_refusal(state, rest, NOW_US, need).shortage
    assert left is not None
    return left


def test_the_account_above_that_ran_out_is_named_with_its_window_and_owner() -> None:
    state = replace(STATE, tight_tokens=MONTH)
    error = budget_refusal(state, Amount(0, 10), NOW_US)
    assert error.shortage == Shortage(
        "hr", MONTH.reset_us, None, 10, "month", TOKENS, 9000, 8990, "hr-lead"
    )
    assert error.retry_after_s == 400 * 3600
    assert error.message == (
        "The budget of account hr cannot cover this request. Left until it resets at "
        "2023-12-01T14:13:20Z: 10 tokens; used in this month: 8990 of 9000 tokens. "
        "hr-lead owns this budget."
    )


def test_the_quantity_that_is_short_of_what_is_wanted_is_named() -> None:
    state = replace(STATE, tight_tokens=MONTH, tight_us=HOURLY)
    tokens = shortage(state, Amount(1_000_000, 10), Amount(500_000, 50))
    assert (tokens.quantity, tokens.account) == (TOKENS, "hr")
    time = shortage(state, Amount(1_000_000, 400), Amount(3_000_000, 50))
    assert (time.quantity, time.account, time.window) == (GPU_TIME, "hr@hour", "hour")
    assert (time.limit, time.spent, time.owner) == (8_000_000, 7_000_000, None)
    assert (time.gpu_us, time.tokens) == (1_000_000, 400)


def test_without_a_need_that_which_is_most_used_up_is_named() -> None:
    state = replace(STATE, tight_tokens=MONTH, tight_us=HOURLY)
    assert shortage(state, Amount(1_000_000, 10)).quantity == TOKENS
    assert shortage(state, Amount(1_000, 9000)).quantity == GPU_TIME


def test_where_the_ledger_says_nothing_of_the_path_the_account_stands_for_itself() -> None:
    left = shortage(STATE, Amount(0, 700))
    assert (left.account, left.window, left.limit, left.spent) == ("hr~someone", "day", 1000, 300)
    assert (left.gpu_us, left.tokens, left.owner) == (None, 700, "team-lead")


def test_an_account_without_limits_is_not_said_to_have_any() -> None:
    left = shortage(replace(STATE, limit_tokens=None), Amount())
    assert (left.gpu_us, left.tokens) == (None, None)


def test_device_time_is_told_in_milliseconds() -> None:
    state = replace(STATE, limit_tokens=None, limit_us=8_000_000)
    error = budget_refusal(state, Amount(1_234_567, 0), NOW_US)
    assert "1234 ms of GPU time; used in this day: 5000 of 8000 ms of GPU time." in error.message


def test_what_is_over_is_nothing_and_never_less() -> None:
    left = shortage(replace(STATE, limit_us=1), Amount(-5, -7))
    assert (left.gpu_us, left.tokens) == (0, 0)
    assert budget_refusal(STATE, Amount(), STATE.reset_us + 5).retry_after_s == 1


def test_what_is_limited_is_what_something_on_the_path_limits() -> None:
    assert limited(STATE) == Amount(0, 1)
    assert limited(replace(STATE, tight_us=HOURLY)) == Amount(1, 1)
    assert limited(replace(STATE, limit_tokens=None)) == Amount(0, 0)


PRICE = ModelPrice("m", 2000, 10_000, 20_000, 1_000_000, 2_000_000, 256, 512, 100)
ASK = BudgetAsk("r", "hr", "m", "m", Operation.CHAT, 4096, 1, 500)
PROMPT = 1024


@pytest.mark.parametrize(
    ("rest", "what", "longest"),
    [
        (Amount(0, PROMPT + 12), Amount(0, 1), 12),
        (Amount(0, PROMPT), Amount(0, 1), 0),
        (Amount(0, 3), Amount(0, 1), 0),
        (Amount(0, 10**9), Amount(0, 1), 500),
        (Amount(), Amount(), 500),
        # 1,024 tokens of prompt at 20 us charged, and 2 ms charged an answer token.
        (Amount(20_480 + 7 * 2000, 0), Amount(1, 0), 7),
        (Amount(20_480 + 7 * 2000 - 1, 0), Amount(1, 0), 6),
        (Amount(20_479, 0), Amount(1, 0), 0),
        (Amount(20_480 + 7 * 2000, PROMPT + 3), Amount(1, 1), 3),
        (Amount(20_480 + 2 * 2000, PROMPT + 3), Amount(1, 1), 2),
    ],
)
def test_the_longest_answer_that_fits(rest: Amount, what: Amount, longest: int) -> None:
    assert largest_answer(ASK, PRICE, rest, what) == longest


def test_choices_share_what_is_left() -> None:
    asked = replace(ASK, choices=4)
    assert largest_answer(asked, PRICE, Amount(0, PROMPT + 13), Amount(0, 1)) == 3


def test_a_short_prompt_is_never_taken_for_less_than_a_template() -> None:
    tiny = replace(ASK, prompt_bytes=1)
    rest = Amount(0, PROMPT_MIN_TOKENS + 5)
    assert largest_answer(tiny, PRICE, rest, Amount(0, 1)) == 5


@given(
    rest_us=st.integers(0, 10**9),
    rest_tokens=st.integers(0, 10**6),
    choices=st.integers(1, 16),
    most=st.integers(1, 5000),
    body=st.integers(0, 10**6),
)
def test_what_is_said_to_fit_fits(
    rest_us: int, rest_tokens: int, choices: int, most: int, body: int
) -> None:
    asked = replace(ASK, choices=choices, max_tokens=most, prompt_bytes=body)
    longest = largest_answer(asked, PRICE, Amount(rest_us, rest_tokens), Amount(1, 1))
    assert 0 <= longest <= most
    if longest:
        prompt = max(-(-body * 256 // 1024), PROMPT_MIN_TOKENS)
        assert prompt + longest * choices <= rest_tokens
        assert prompt * 20 + longest * choices * 2000 <= rest_us
