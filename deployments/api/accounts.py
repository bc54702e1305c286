"""How an account's budget is shown: as headers of each answer, and as JSON.

``remaining`` is what new requests may still take: the limit less what is spent and less what
requests in flight have reserved. Headers come from the copy that a gateway keeps for its leases,
at most two seconds old while the ledger is reached. They are sent before the answer is generated,
so they do not include it.
"""

from __future__ import annotations

import functools
import time
from datetime import UTC, datetime
from typing import Any

from governance.budget.messages import AccountState
from governance.types import Amount, Turn

Json = dict[str, Any]

LIMIT_TOKENS = "x-ratelimit-limit-tokens"
REMAINING_TOKENS = "x-ratelimit-remaining-tokens"
RESET_TOKENS = "x-ratelimit-reset-tokens"
ACCOUNT = "x-gatehouse-budget-account"
REMAINING_GPU_MS = "x-gatehouse-budget-remaining-gpu-ms"
RESET = "x-gatehouse-budget-reset"
GPU_MS = "x-gatehouse-gpu-ms"
CHARGED_GPU_MS = "x-gatehouse-charged-gpu-ms"

_SECOND_US = 1_000_000


def budget_headers(state: AccountState, now_us: int | None = None) -> dict[str, str]:
    """Headers that tell a client what is left of its department's budget; a few microseconds.

    OpenAI's names for tokens, so that its SDKs and their users find them; ours for device time.
    A dimension without a limit has no headers.

    Args:
        state: The account.
        now_us: Wall clock, microseconds; ``None`` for the system's.
    """
    headers = {ACCOUNT: state.account, RESET: iso(state.reset_us)}
    if state.limit_us is not None:
        left_us = state.limit_us - state.spent.gpu_us - state.open.gpu_us
        headers[REMAINING_GPU_MS] = str(max(0, left_us) // 1000)
    if state.limit_tokens is not None:
        left = state.limit_tokens - state.spent.tokens - state.open.tokens
        now_us = time.time_ns() // 1000 if now_us is None else now_us
        headers[LIMIT_TOKENS] = str(state.limit_tokens)
        headers[REMAINING_TOKENS] = str(max(0, left))
        headers[RESET_TOKENS] = duration(state.reset_us - now_us)
    return headers


def cost_headers(turn: Turn) -> dict[str, str]:
    """What a finished request took; empty where the engine did not say."""
    headers = {}
    if (gpu_us := _metered_us(turn)) is not None:
        headers[GPU_MS] = milliseconds(gpu_us)
    if (charged := _charged(turn)) is not None:
        headers[CHARGED_GPU_MS] = milliseconds(charged.gpu_us)
    return headers


def cost_object(turn: Turn) -> Json:
    """The ``gatehouse`` object beside OpenAI's fields of an answer.

    ``gpu_us`` is metered device time, ``charged_us`` the same weighted by the accelerator; either
    is ``null`` where it is not known. Both are over all models that were tried: what was tried
    before the one that answered is in ``attempts``, where there was something.
    """
    charged = _charged(turn)
    cost: Json = {
        "request_id": turn.request_id,
        "gpu_us": _metered_us(turn),
        "charged_us": None if charged is None else charged.gpu_us,
    }
    if turn.earlier:
        cost["attempts"] = [
            {"model": attempt.model, "why": attempt.why, "gpu_us": attempt.gpu_us}
            for attempt in turn.earlier
        ]
    return cost


def account_object(state: AccountState, age_ms: int) -> Json:
    """An account as the interface shows it; amounts are integers, times ISO 8601 and Unix."""
    until_us = state.overridden_until_us
    return {
        "object": "usage",
        "account": state.account,
        "window": state.window,
        "start": iso(state.window_start_us),
        "start_at": state.window_start_us // _SECOND_US,
        "reset": iso(state.reset_us),
        "reset_at": state.reset_us // _SECOND_US,
        "limit": {"gpu_us": state.limit_us, "tokens": state.limit_tokens},
        "spent": _amount(state.spent),
        "leased": _amount(state.leased),
        "open": _amount(state.open),
        "remaining": {
            "gpu_us": _left(state.limit_us, state.spent.gpu_us + state.open.gpu_us),
            "tokens": _left(state.limit_tokens, state.spent.tokens + state.open.tokens),
        },
        "overridden_until": None if until_us is None else until_us // _SECOND_US,
        "age_ms": age_ms,
    }


@functools.lru_cache(maxsize=256)
def iso(time_us: int) -> str:
    """A moment in ISO 8601, UTC, whole seconds."""
    return f"{datetime.fromtimestamp(time_us // _SECOND_US, UTC):%Y-%m-%dT%H:%M:%SZ}"


def duration(span_us: int) -> str:
    """A time span as OpenAI writes them, ``6m0s`` or ``1h0m0s``; whole seconds, rounded up."""
    minutes, seconds = divmod(max(0, -(-span_us // _SECOND_US)), 60)
    if not minutes:
        return f"{seconds}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{seconds}s" if hours else f"{minutes}m{seconds}s"


def milliseconds(span_us: int) -> str:
    """Microseconds as milliseconds with three digits, without passing through a float."""
    return f"{span_us // 1000}.{span_us % 1000:03d}"


def _metered_us(turn: Turn) -> int | None:
    """Device time over all attempts, as far as engines have said; ``None`` if the last did not."""
    if turn.gpu_us is None:
        return None
    return turn.gpu_us + sum(attempt.gpu_us or 0 for attempt in turn.earlier)


def _charged(turn: Turn) -> Amount | None:
    """What was charged over all attempts; ``None`` where there is no account to charge."""
    if turn.reservation is None or turn.reservation.account is None or turn.charged is None:
        return None
    earlier = [attempt.charged for attempt in turn.earlier if attempt.charged is not None]
    return sum(earlier, turn.charged)


def _amount(amount: Amount) -> Json:
    return {"gpu_us": amount.gpu_us, "tokens": amount.tokens}


def _left(limit: int | None, taken: int) -> int | None:
    return None if limit is None else max(0, limit - taken)
