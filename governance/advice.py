"""What a caller whose budget cannot cover a request could ask for instead.

Looked for only once a request is refused, and by estimate: the prompt is not counted yet, and the
median price stands for what this answer would cost.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from governance.errors import Allowed, BudgetExhausted
from governance.ports import Ledger
from governance.selection import Option
from governance.types import BudgetAsk


def advised(
    error: BudgetExhausted, ledger: Ledger, ask: BudgetAsk, others: Iterable[Option]
) -> BudgetExhausted:
    """The same refusal with what would still be allowed, where the ledger can tell.

    Args:
        error: As the ledger gave it.
        ledger: Says how long an answer fits.
        ask: What was refused.
        others: Models of the small tier that the caller may use for the same request.
    """
    if error.shortage is None or ask.max_tokens < 1 or (own := ledger.fits(ask)) is None:
        return error
    allowed = Allowed(own)
    for option in others:
        model, most = option.model, option.decision.limits.max_tokens
        if model.id == ask.model:
            continue
        longest = ask.max_tokens if most is None else min(ask.max_tokens, most // ask.choices)
        fits = ledger.fits(replace(ask, model=model.id, base_model=model.base, max_tokens=longest))
        if fits is not None and fits > own:
            allowed = Allowed(own, model.id, fits)
            break
    return BudgetExhausted(
        f"{error.message} {_sentence(allowed)}",
        error.param,
        error.retry_after_s,
        error.rule_ids,
        replace(error.shortage, allowed=allowed),
    )


def _sentence(allowed: Allowed) -> str:
    ways = []
    if allowed.answer_tokens > 0:
        ways.append(f"an answer of up to about {allowed.answer_tokens} tokens to this prompt")
    if allowed.model is not None:
        ways.append(
            f"model {allowed.model}, with an answer of up to about {allowed.model_answer_tokens} "
            "tokens"
        )
    if not ways:
        return "Nothing as long as this prompt fits until then."
    return f"Still possible: {'; or '.join(ways)}."
