"""The ``Router`` port over ``routing.auto``: from a request to a question about text and needs.

Named models go through untouched. What the router learns of a request is its last question, what
an answer needs, and how busy and how expensive the permitted models are; nothing of who asks but
the department, whose target and budget count, and a key of the conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import orjson

from governance.budget.messages import AccountState, ModelPrice
from governance.budget.prices import MIN_OBSERVATIONS
from governance.ports import Clock
from governance.request import opening, question
from governance.types import InferenceRequest, ModelInfo, Route, RouteAsk
from routing.auto import AutoAsk, AutoRouter, Candidate
from routing.cards import ModelCard
from routing.conversation import affinity_key
from routing.need import Need, fits
from routing.types import ModelLoad

QUESTION_CHARS = 4_096
"""A longer question is cut to half of this from either end: the scorer reads less, and a score may
be asked of another process."""

_HOUR_US = 3_600_000_000
_MONTH_US = 30 * 24 * _HOUR_US
_LENGTH_US = {"hour": _HOUR_US, "day": 24 * _HOUR_US, "week": 7 * 24 * _HOUR_US}

_JSON_FORMATS = ("json_object", "json_schema")


class AutoRouting:
    """Implements ``governance.ports.Router``.

    Args:
        router: Chooses.
        load: How busy a base model is.
        price: What a token of a base model has cost of late.
        cards: Models' cards; a price on a card, which somebody measured, comes before that.
        choices: Ids of the models that it chooses among.
        clock: Wall clock, microseconds.
    """

    def __init__(
        self,
        router: AutoRouter,
        load: Callable[[str], ModelLoad],
        price: Callable[[str], ModelPrice],
        cards: Sequence[ModelCard],
        choices: frozenset[str],
        clock: Clock,
    ) -> None:
        self.router = router
        self.choices = choices
        self._load = load
        self._price = price
        self._cards = {card.id: card for card in cards}
        self._on_card = {card.id: card.price for card in cards if card.price is not None}
        self._clock = clock

    async def route(self, ask: RouteAsk) -> Route:
        """The model that was named, or the router's choice with what it rests on."""
        if not ask.auto:
            return Route(ask.permitted[0], "named", fallbacks=self._able(ask))
        models = {model.id: model for model in ask.permitted}
        choice = await self.router.choose(
            AutoAsk(
                text=scored_text(ask.request),
                need=need_of(ask.request, self._tokens_per_kib(ask.permitted)),
                candidates=tuple(
                    Candidate(m.id, m.tier, m.context_tokens, self._load(m.base))
                    for m in ask.permitted
                ),
                department=ask.department,
                conversation=affinity_key(ask.principal_key, opening(ask.request)),
                request_id=ask.request_id,
                pressure_milli=pressure_milli(ask.account, self._clock()),
                priority_class=ask.priority_class,
            )
        )
        return Route(
            model=models[choice.model_id],
            reason=choice.reason,
            auto=True,
            fallbacks=tuple(models[model_id] for model_id in choice.fallbacks),
            draft=choice.draft,
            may_rise=choice.may_rise,
            detail={**choice.detail, **self._large_price(ask.permitted)},
        )

    def _able(self, ask: RouteAsk) -> tuple[ModelInfo, ...]:
        """Of the models that may stand in for a named one, those that can do the request.

        One without a card may be able to, and is left in.
        """
        if not ask.stand_ins:
            return ()
        need = need_of(ask.request, self._tokens_per_kib(ask.stand_ins))
        return tuple(
            model
            for model in ask.stand_ins
            if (card := self._cards.get(model.id)) is None
            or fits(card, model.context_tokens, need) is None
        )

    def _tokens_per_kib(self, models: Sequence[ModelInfo]) -> int:
        """Prompt tokens per 1,024 bytes of body, for the model that needs most of them."""
        return max(self._price(model.base).prompt_tokens_per_kib_p50 for model in models)

    def _large_price(self, models: Sequence[ModelInfo]) -> Mapping[str, str | int]:
        """What a token would cost at the large model, for the report of savings.

        Device-nanoseconds weighted by the accelerator, as accounts are charged.
        """
        large = next((model for model in models if model.tier == "large"), None)
        if large is None:
            return {}
        learned, card = self._price(large.base), self._on_card.get(large.id)
        if card is not None:
            prefill_ns, decode_ns = card.prefill_ns, card.decode_ns
        elif learned.observations >= MIN_OBSERVATIONS:
            prefill_ns, decode_ns = learned.prefill_p50_ns, learned.decode_p50_ns
        else:
            # What stands in for a price is made for reserving, and would be a fine saving.
            return {"large_model": large.id}
        return {
            "large_model": large.id,
            "large_prefill_ns": prefill_ns * learned.weight_milli // 1000,
            "large_decode_ns": decode_ns * learned.weight_milli // 1000,
        }


def scored_text(request: InferenceRequest) -> str:
    """What the complexity of a request is judged by: its question.

    Earlier messages count through the conversation, which keeps to its model.
    """
    text, half = question(request), QUESTION_CHARS // 2
    return text if len(text) <= QUESTION_CHARS else f"{text[:half]} {text[-half:]}"


def need_of(request: InferenceRequest, tokens_per_kib: int) -> Need:
    """What a model must be able to do for this request.

    Args:
        request: Parsed, its token-id prompts decoded.
        tokens_per_kib: Prompt tokens per 1,024 bytes of body.
    """
    body = request.body
    wanted = body.get("response_format") or {}
    return Need(
        # Of what the engine will get: white space around it is the client's own affair.
        prompt_tokens_estimate=len(orjson.dumps(body)) * tokens_per_kib // 1024,
        answer_tokens=request.max_tokens or 0,
        tools=bool(body.get("tools")),
        json_mode=wanted.get("type") in _JSON_FORMATS,
        choices=request.choices,
    )


def pressure_milli(account: AccountState | None, now_us: int) -> int:
    """How much of its budget a department uses, against how much of the window is gone.

    1000 is on pace to use the budget up exactly at the window's end; 0 where there is no limit. Of
    the limits of the account, and of what limits it from above, the tightest counts.
    """
    if account is None:
        return 0
    start_us, reset_us = account.window_start_us, account.reset_us
    paces = [
        _pace_milli(limit, spent + held, start_us, reset_us, now_us)
        for limit, spent, held in (
            (account.limit_us, account.spent.gpu_us, account.open.gpu_us),
            (account.limit_tokens, account.spent.tokens, account.open.tokens),
        )
        if limit
    ]
    for tight in (account.tight_us, account.tight_tokens):
        if tight is not None and tight.account != account.account and tight.limit > 0:
            # Only its end is known here; months are taken for one length.
            start_us = tight.reset_us - _LENGTH_US.get(tight.window, _MONTH_US)
            paces.append(_pace_milli(tight.limit, tight.spent, start_us, tight.reset_us, now_us))
    return max(paces, default=0)


def _pace_milli(limit: int, used: int, start_us: int, reset_us: int, now_us: int) -> int:
    """Use of one limit against its pace."""
    window_us = max(1, reset_us - start_us)
    gone = max(0, min(window_us, now_us - start_us))
    # A tenth of the window at least: one large request in its first minute is no trend.
    return (1000 * used // limit) * window_us // max(gone, window_us // 10, 1)
