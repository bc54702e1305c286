"""What a router learns of a request, and what comes back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import orjson
import pytest

from governance.budget.messages import AccountState, ModelPrice, Tight
from governance.request import parse_request, question
from governance.routes import QUESTION_CHARS, AutoRouting, need_of, pressure_milli, scored_text
from governance.types import Amount, InferenceRequest, ModelInfo, Operation, RouteAsk
from routing.auto import AutoAsk, AutoChoice
from routing.cards import ModelCard, Price
from routing.types import ModelLoad

GENERATE = frozenset({Operation.CHAT, Operation.COMPLETIONS})
SMALL = ModelInfo("small", "small", GENERATE, 512, "small")
LARGE = ModelInfo("large", "large", GENERATE, 1024, "large-base")
DAY_US = 86_400_000_000
HOUR_US = 3_600_000_000
TOOL = {"type": "function", "function": {"name": "look"}}


def chat(*messages: tuple[str, Any], **fields: Any) -> InferenceRequest:
    body = {
        "model": "auto",
        "messages": [{"role": role, "content": content} for role, content in messages],
        **fields,
    }
    return parse_request(Operation.CHAT, json.dumps(body).encode())


def price(base_model: str) -> ModelPrice:
    return ModelPrice(base_model, 2000, 10, 20, 300, 600, 256, 400, 50)


class Chooser:
    def __init__(self, choice: AutoChoice) -> None:
        self.choice = choice
        self.asks: list[AutoAsk] = []

    async def choose(self, ask: AutoAsk) -> AutoChoice:
        self.asks.append(ask)
        return self.choice


def routing(chooser: Chooser, *cards: ModelCard) -> AutoRouting:
    def load(base_model: str) -> ModelLoad:
        return ModelLoad(replicas=len(base_model))

    choices = frozenset({"small", "large"})
    return AutoRouting(chooser, load, price, cards, choices, lambda: 0)  # type: ignore[arg-type]


def ask(request: InferenceRequest, **fields: Any) -> RouteAsk:
    values: dict[str, Any] = {
        "request_id": "r",
        "request": request,
        "permitted": (SMALL, LARGE),
        "auto": True,
        "department": "hr",
        "principal_key": "someone",
        "priority_class": "batch",
    }
    return RouteAsk(**(values | fields))


def account(**fields: Any) -> AccountState:
    values: dict[str, Any] = {
        "account": "hr",
        "window": "day",
        "window_start_us": 0,
        "reset_us": DAY_US,
        "limit_us": 1000,
        "limit_tokens": None,
        "spent": Amount(),
        "leased": Amount(),
        "open": Amount(),
        "overridden_until_us": None,
    }
    return AccountState(**(values | fields))


async def test_a_named_model_is_taken_without_a_question() -> None:
    chooser = Chooser(AutoChoice("small", "auto:small", (), None))
    route = await routing(chooser).route(ask(chat(("user", "hi")), auto=False, permitted=(LARGE,)))
    assert (route.model, route.reason, route.auto) == (LARGE, "named", False)
    assert chooser.asks == []


@pytest.mark.parametrize(
    ("cards", "fields", "able"),
    [
        ((), {}, ["small"]),
        ((ModelCard(id="small"),), {}, ["small"]),
        ((ModelCard(id="small", tools=False),), {}, ["small"]),
        ((ModelCard(id="small", tools=False),), {"tools": [TOOL]}, []),
        ((ModelCard(id="small"),), {"max_tokens": 600}, []),
        ((ModelCard(id="large", tools=False),), {"tools": [TOOL]}, ["small"]),
    ],
)
async def test_a_stand_in_can_do_what_the_request_needs(
    cards: tuple[ModelCard, ...], fields: dict[str, Any], able: list[str]
) -> None:
    chooser = Chooser(AutoChoice("small", "auto:small", (), None))
    request = chat(("user", "hi"), **fields)
    named = ask(request, auto=False, permitted=(LARGE,), stand_ins=(SMALL,))
    route = await routing(chooser, *cards).route(named)
    assert (route.model, route.reason, route.auto) == (LARGE, "named", False)
    assert [model.id for model in route.fallbacks] == able


async def test_what_the_router_is_told() -> None:
    chooser = Chooser(
        AutoChoice("large", "auto:large gain above threshold", ("small",), None, {"gain_milli": 9})
    )
    request = chat(("system", "Be brief."), ("user", "Why?"), max_tokens=9)

    route = await routing(chooser).route(ask(request))

    (told,) = chooser.asks
    assert told.text == "Why?"
    assert [(c.id, c.tier, c.context_tokens) for c in told.candidates] == [
        ("small", "small", 512),
        ("large", "large", 1024),
    ]
    assert told.candidates[1].load.replicas == len("large-base")
    assert (told.department, told.priority_class, told.pressure_milli) == ("hr", "batch", 0)
    assert told.need.answer_tokens == 9
    assert (route.model, route.fallbacks, route.auto) == (LARGE, (SMALL,), True)
    assert route.may_rise
    assert route.detail == {
        "gain_milli": 9,
        "large_model": "large",
        "large_prefill_ns": 20,
        "large_decode_ns": 600,
    }


async def test_a_measured_price_comes_before_a_learned_one() -> None:
    chooser = Chooser(AutoChoice("small", "auto:small", ("large",), None))
    card = ModelCard(id="large", price=Price(prefill_ns=7, decode_ns=70, measured_on="a bench"))
    route = await routing(chooser, card).route(ask(chat(("user", "hi"))))
    assert (route.detail["large_prefill_ns"], route.detail["large_decode_ns"]) == (14, 140)


async def test_what_stands_in_for_a_price_is_not_recorded_as_one() -> None:
    chooser = Chooser(AutoChoice("small", "auto:small", ("large",), None))

    def cold(base_model: str) -> ModelPrice:
        return replace(price(base_model), observations=19)

    routes = routing(chooser)
    routes._price = cold
    route = await routes.route(ask(chat(("user", "hi"))))
    assert route.detail == {"large_model": "large"}


async def test_without_a_large_model_there_is_nothing_to_compare_with() -> None:
    chooser = Chooser(AutoChoice("small", "auto:small", (), None))
    route = await routing(chooser).route(ask(chat(("user", "hi")), permitted=(SMALL,)))
    assert route.detail == {}


async def test_conversations_of_two_callers_are_two() -> None:
    chooser = Chooser(AutoChoice("small", "auto:small", (), None))
    first = chat(("user", "hi"))
    later = chat(("user", "hi"), ("assistant", "hello"), ("user", "and now?"))
    for request, who in ((first, "a"), (first, "b")):
        await routing(chooser).route(ask(request, principal_key=who))
    keys = [told.conversation for told in chooser.asks]
    assert len(set(keys)) == 2
    assert question(later) == "and now?"


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (chat(("user", "one"), ("assistant", "two"), ("user", "three")), "three"),
        (chat(("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])), "a\nb"),
        (chat(("system", "only a system prompt")), "only a system prompt"),
        (parse_request(Operation.COMPLETIONS, b'{"model":"auto","prompt":"p"}'), "p"),
        (parse_request(Operation.COMPLETIONS, b'{"model":"auto","prompt":["q","r"]}'), "q"),
    ],
)
def test_the_question(request_: InferenceRequest, expected: str) -> None:
    assert question(request_) == expected


def test_a_huge_question_is_cut_from_both_ends() -> None:
    text = scored_text(chat(("user", "a" * 100_000 + "b" * 100_000)))
    assert len(text) == QUESTION_CHARS + 1
    assert text.startswith("aa")
    assert text.endswith("bb")


def test_needs() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    request = chat(("user", "x" * 1000), tools=[tool], max_tokens=5, n=2)
    need = need_of(request, 256)
    assert need.prompt_tokens_estimate == len(orjson.dumps(request.body)) // 4
    padded = parse_request(Operation.CHAT, b" " * 9000 + b'{"model":"auto","messages":[{"role":'
                           b'"user","content":"hi"}]}')  # fmt: skip
    assert need_of(padded, 1024).prompt_tokens_estimate < 100
    assert (need.tools, need.json_mode, need.answer_tokens, need.choices) == (True, False, 5, 2)
    assert need_of(chat(("user", "x"), response_format={"type": "json_object"}), 256).json_mode
    assert not need_of(chat(("user", "x"), response_format={"type": "text"}), 256).json_mode


@pytest.mark.parametrize(
    ("state", "now_us", "expected"),
    [
        (None, 0, 0),
        (account(limit_us=None), DAY_US // 2, 0),
        (account(spent=Amount(500, 0)), DAY_US // 2, 1000),
        (account(spent=Amount(400, 0), open=Amount(100, 0)), DAY_US // 2, 1000),
        (account(spent=Amount(1000, 0)), DAY_US // 2, 2000),
        (account(spent=Amount(100, 0)), 0, 1000),
        (account(spent=Amount(100, 80), limit_tokens=100), DAY_US // 2, 1600),
        (account(spent=Amount(1000, 0)), 5 * DAY_US, 1000),
        (account(spent=Amount(1000, 0)), -5, 10_000),
        (account(limit_us=0), DAY_US // 2, 0),
        (account(reset_us=0, spent=Amount(10, 0)), 5, 10),
    ],
)
def test_pressure_is_use_against_pace(
    state: AccountState | None, now_us: int, expected: int
) -> None:
    assert pressure_milli(state, now_us) == expected


@pytest.mark.parametrize(
    ("own", "above", "expected"),
    [
        # Half of the day is gone; of the department's budget above, all but a tenth is used.
        ({"limit_us": None}, ("hr", "day", DAY_US, 1000, 900), 1800),
        ({"spent": Amount(100, 0)}, ("hr", "day", DAY_US, 1000, 900), 1800),
        ({"spent": Amount(990, 0)}, ("hr", "day", DAY_US, 1000, 900), 1980),
        # The hour ends in six minutes.
        ({"limit_us": None}, ("hr@hour", "hour", DAY_US // 2 + HOUR_US // 10, 1000, 900), 1000),
        # The account's own limit is counted once, from its own figures.
        ({"spent": Amount(100, 0)}, ("hr/team", "day", DAY_US, 1000, 900), 200),
        ({"limit_us": None}, ("hr", "day", DAY_US, 0, 900), 0),
    ],
)
def test_pressure_comes_from_above_as_well(
    own: dict[str, Any], above: tuple[str, str, int, int, int], expected: int
) -> None:
    state = account(account="hr/team", tight_us=Tight(*above, None), **own)
    assert pressure_milli(state, DAY_US // 2) == expected
