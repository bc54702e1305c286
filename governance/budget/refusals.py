"""A refusal for want of budget, in words and figures: what ran out, until when, and who can help.

An account on the path above the one that is charged may be what ran out, so the figures are those
of ``AccountState.tight_us`` and ``tight_tokens``. What would still be allowed depends on what a
model costs: ``largest_answer`` says how long an answer to a given prompt may be at most.
"""

from __future__ import annotations

from datetime import UTC, datetime

from governance.budget.holds import PROMPT_MIN_TOKENS
from governance.budget.messages import AccountState, ModelPrice, Tight
from governance.budget.prices import KIB
from governance.errors import BudgetExhausted, Shortage
from governance.types import Amount, BudgetAsk

TOKENS, GPU_TIME = "tokens", "gpu_time"
"""What can run out."""


def budget_refusal(
    state: AccountState, rest: Amount, now_us: int, need: Amount | None = None
) -> BudgetExhausted:
    """The refusal of a request that an account cannot cover.

    Args:
        state: The account that would have been charged.
        rest: What a smaller request could still have; looked at where there is a limit.
        now_us: Wall clock, microseconds.
        need: What was wanted, where that is known: it tells which quantity is short.
    """
    quantity, tight = _short(state, rest, need)
    left = Shortage(
        account=tight.account,
        reset_us=tight.reset_us,
        gpu_us=None if _of(state, GPU_TIME) is None else max(0, rest.gpu_us),
        tokens=None if _of(state, TOKENS) is None else max(0, rest.tokens),
        window=tight.window,
        quantity=quantity,
        limit=tight.limit,
        spent=tight.spent,
        owner=tight.owner,
    )
    retry_after_s = max(1, -(-(tight.reset_us - now_us) // 1_000_000))
    return BudgetExhausted(_message(left), None, retry_after_s, (), left)


def largest_answer(ask: BudgetAsk, price: ModelPrice, rest: Amount, limited: Amount) -> int:
    """The longest answer per choice, in tokens, that an account can still cover at this prompt.

    By the median price, as requests at the edge of a budget are admitted by; an estimate, since
    nobody has counted the prompt. 0 where not even the prompt fits.

    Args:
        ask: The request; its ``max_tokens`` is the most that is given.
        price: Of the model.
        rest: What is left.
        limited: Not 0 in the quantities that are limited at all.
    """
    per_kib = price.prompt_tokens_per_kib_p50
    prompt = max(-(-ask.prompt_bytes * per_kib // KIB), PROMPT_MIN_TOKENS)
    most = ask.max_tokens * ask.choices
    if limited.tokens:
        most = min(most, rest.tokens - prompt)
    if limited.gpu_us:
        # Whole nanoseconds of charged time, so that nothing is rounded before the division.
        left_ns = rest.gpu_us * 1_000_000 - prompt * price.prefill_p50_ns * price.weight_milli
        each_ns = price.decode_p50_ns * price.weight_milli
        if left_ns < 0:
            return 0
        if each_ns > 0:
            most = min(most, left_ns // each_ns)
    return max(0, most // ask.choices)


def limited(state: AccountState) -> Amount:
    """1 in each quantity that something on the account's path limits, else 0."""
    return Amount(
        int(_of(state, GPU_TIME) is not None),
        int(_of(state, TOKENS) is not None),
    )


def _short(state: AccountState, rest: Amount, need: Amount | None) -> tuple[str, Tight]:
    """The quantity that is short, and the account that limits it."""
    candidates = []
    for quantity, left, wanted in (
        (GPU_TIME, rest.gpu_us, need.gpu_us if need else 0),
        (TOKENS, rest.tokens, need.tokens if need else 0),
    ):
        tight = _of(state, quantity)
        if tight is not None:
            # The one that lacks most of what is wanted; without a need, that is most used up.
            measure = max(wanted, 1) if need is not None else max(tight.limit, 1)
            candidates.append((left / measure, quantity, tight))
    if not candidates:
        return TOKENS, Tight(state.account, state.window, state.reset_us, 0, 0, state.owner)
    _, quantity, tight = min(candidates, key=lambda found: found[0])
    return quantity, tight


def _of(state: AccountState, quantity: str) -> Tight | None:
    """What limits a quantity; the account alone where the ledger said nothing of its path."""
    tight = state.tight_us if quantity == GPU_TIME else state.tight_tokens
    if tight is not None:
        return tight
    limit = state.limit_us if quantity == GPU_TIME else state.limit_tokens
    if limit is None:
        return None
    spent = state.spent.gpu_us if quantity == GPU_TIME else state.spent.tokens
    return Tight(state.account, state.window, state.reset_us, limit, spent, state.owner)


def _message(left: Shortage) -> str:
    reset = datetime.fromtimestamp(left.reset_us // 1_000_000, UTC)
    room = []
    if left.tokens is not None:
        room.append(f"{left.tokens} tokens")
    if left.gpu_us is not None:
        room.append(f"{left.gpu_us // 1000} ms of GPU time")
    used = (
        f"{left.spent} of {left.limit} tokens"
        if left.quantity == TOKENS
        else f"{(left.spent or 0) // 1000} of {(left.limit or 0) // 1000} ms of GPU time"
    )
    text = (
        f"The budget of account {left.account} cannot cover this request. Left until it resets at "
        f"{reset:%Y-%m-%dT%H:%M:%SZ}: {' and '.join(room) or 'nothing'}; used in this "
        f"{left.window}: {used}."
    )
    return f"{text} {left.owner} owns this budget." if left.owner else text
