"""How an account's budget is shown: as headers of each answer, and as JSON.

``remaining`` is what an account has left of its own: the limit less what is spent and less what
requests in flight have reserved. ``available`` is what new requests may still take, all accounts
above and borrowing counted; headers tell this one. They come from the copy that a gateway keeps for
its leases, at most two seconds old while the ledger is reached, and are sent before the answer is
generated, so they do not include it.
"""

from __future__ import annotations

import functools
import time
from datetime import UTC, datetime
from typing import Any

from governance.budget.messages import AccountState, Tight
from governance.stopping import stop_object
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
    """Headers that tell a client what is left of its budget; a few microseconds.

    OpenAI's names for tokens, so that its SDKs and their users find them; ours for device time.
    A quantity that nothing limits has no headers; the tokens' limit and reset are those of the
    account on the path that leaves least of them.

    Args:
        state: The account.
        now_us: Wall clock, microseconds; ``None`` for the system's.
    """
    headers = {ACCOUNT: state.account, RESET: iso(state.reset_us)}
    left_us = _available(state.reach_us, state.limit_us, state.spent.gpu_us + state.open.gpu_us)
    if left_us is not None:
        headers[REMAINING_GPU_MS] = str(left_us // 1000)
    left = _available(
        state.reach_tokens, state.limit_tokens, state.spent.tokens + state.open.tokens
    )
    if left is not None:
        tight = state.tight_tokens
        limit = state.limit_tokens if tight is None else tight.limit
        reset_us = state.reset_us if tight is None else tight.reset_us
        now_us = time.time_ns() // 1000 if now_us is None else now_us
        headers[LIMIT_TOKENS] = str(limit)
        headers[REMAINING_TOKENS] = str(left)
        headers[RESET_TOKENS] = duration(reset_us - now_us)
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
    if turn.stopped is not None:
        cost["stopped"] = stop_object(turn.stopped)
    if turn.route is not None and turn.route.instead_of is not None:
        cost["instead_of"] = {"model": turn.route.instead_of, "why": turn.route.reason}
    return cost


def account_object(state: AccountState, age_ms: int) -> Json:
    """An account as the interface shows it; amounts are integers, times ISO 8601 and Unix."""
    until_us = state.overridden_until_us
    left = Amount(*(value or 0 for value in _remaining(state)))
    return {
        "object": "usage",
        "account": state.account,
        "parent": state.parent,
        "cohort": state.cohort,
        "owner": state.owner,
        "mode": state.mode,
        "class": state.priority_class,
        "weight_milli": state.weight_milli,
        "window": state.window,
        "start": iso(state.window_start_us),
        "start_at": state.window_start_us // _SECOND_US,
        "reset": iso(state.reset_us),
        "reset_at": state.reset_us // _SECOND_US,
        "limit": {"gpu_us": state.limit_us, "tokens": state.limit_tokens},
        "spent": _amount(state.spent),
        "leased": _amount(state.leased),
        "open": _amount(state.open),
        "remaining": dict(zip(("gpu_us", "tokens"), _remaining(state), strict=True)),
        "available": {
            "gpu_us": _available(
                state.reach_us, state.limit_us, state.spent.gpu_us + state.open.gpu_us
            ),
            "tokens": _available(
                state.reach_tokens, state.limit_tokens, state.spent.tokens + state.open.tokens
            ),
        },
        "moved": _amount(state.moved),
        "overdraft": _amount(state.overdraft),
        "borrow": _amount(state.borrow),
        "borrowed": _amount(state.borrowed),
        "lend": _amount(state.lend),
        "lent": {
            "gpu_us": _lent(state, state.tight_us, left.gpu_us, state.reach_us),
            "tokens": _lent(state, state.tight_tokens, left.tokens, state.reach_tokens),
        },
        "total": _amount(state.total),
        "limited_by": {"gpu_us": _tight(state.tight_us), "tokens": _tight(state.tight_tokens)},
        "exhausted": state.over,
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


def _remaining(state: AccountState) -> tuple[int | None, int | None]:
    taken = state.spent + state.open
    return _left(state.limit_us, taken.gpu_us), _left(state.limit_tokens, taken.tokens)


def _available(reach: int | None, limit: int | None, taken: int) -> int | None:
    """What the ledger says of the whole path; of the account alone where it said nothing."""
    return _left(limit, taken) if reach is None else reach


def _lent(state: AccountState, tight: Tight | None, left: int, reach: int | None) -> int:
    """What of an account's own budget is out with others of its cohort, and so not available."""
    if state.cohort is None or reach is None or tight is None or tight.account != state.account:
        return 0
    return max(0, left - reach)


def _tight(tight: Tight | None) -> Json | None:
    """The account on the path that leaves least of a quantity."""
    if tight is None:
        return None
    return {
        "account": tight.account,
        "window": tight.window,
        "reset_at": -(-tight.reset_us // _SECOND_US),
        "limit": tight.limit,
        "spent": tight.spent,
        "owner": tight.owner,
    }
