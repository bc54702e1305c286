"""Schemas that are small to send and large to compile."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governance.errors import InvalidRequest
from governance.protocol.schemas import pattern_cost
from governance.request import parse_request
from governance.types import Operation

ORDINARY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "date": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
        "iban": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{2}[A-Z0-9]{11,30}$"},
        "mail": {"type": "string", "pattern": r"^[\w.+-]{1,64}@[\w-]{1,63}(\.[\w-]{1,63}){1,4}$"},
        "pattern": {"type": "string"},
        "items": {"type": "array", "items": {"enum": [f"e{i}" for i in range(500)]}},
        **{f"field_{i}": {"type": "string"} for i in range(200)},
    },
    "required": ["date"],
    "additionalProperties": False,
}
BOMBS: dict[str, dict[str, Any]] = {
    "nested repetition": {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
    "nested repetition without upper bound": {"pattern": "((a{9999,}){9999,})"},
    "many levels": {"pattern": "^" + "(" * 9 + "a" + "{1,9})" * 9 + "$"},
    "a class": {"pattern": "([a-z)]{1,300}){1,300}"},
    "an escape": {"pattern": r"(\({1,300}){1,300}"},
    "in a key": {"patternProperties": {"^(a{1,300}){1,300}$": {"type": "string"}}},
    "length alone": {"pattern": "a?" * 8000},
    "many small ones": {"anyOf": [{"pattern": f"^(ab{{1,40}}){{1,{i}}}$"} for i in range(2, 90)]},
    "optional properties": {"properties": {f"k{i}": {"type": "string"} for i in range(2000)}},
}


def body(place: str, schema: dict[str, Any]) -> bytes:
    request: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    if place == "response_format":
        request["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema},
        }
    else:
        request["tools"] = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
        request["tool_choice"] = "required"
    return json.dumps(request).encode()


@pytest.mark.parametrize("place", ["response_format", "tools"])
def test_ordinary_schemas_go_through(place: str) -> None:
    parse_request(Operation.CHAT, body(place, ORDINARY))


@pytest.mark.parametrize("place", ["response_format", "tools"])
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_an_engine_sees_them(place: str, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(Operation.CHAT, body(place, BOMBS[name]))
    assert caught.value.param in (
        "response_format.json_schema.schema",
        "tools",
    )


@pytest.mark.parametrize(
    ("pattern", "cost"),
    [
        ("", 0),
        ("abc", 3),
        ("a{3}", 3),
        ("a{1,3}b", 4),
        ("(ab){10}", 20),
        ("((a{2}){2}){2}", 8),
        ("[a-z]{5}", 5),
        (r"\{{2}", 2),
        ("[" * 9, 9),
        ("[[]{3}", 3),
        ("(a|b){3}", 9),
    ],
)
def test_cost_is_what_a_pattern_amounts_to(pattern: str, cost: int) -> None:
    assert pattern_cost(pattern) == cost


@given(st.text("(){}[]\\,0123456789ab*+?|^$", max_size=200))
def test_any_text_has_a_cost(pattern: str) -> None:
    assert pattern_cost(pattern) >= 0


def test_the_cost_itself_is_cheap() -> None:
    start = time.process_time()
    for hostile in ("(" * 200_000, "[" * 20_000, "a{" * 100_000, "\\" * 200_001, "[]" * 100_000):
        pattern_cost(hostile)
    assert time.process_time() - start < 3


def test_tools_share_one_budget() -> None:
    parameters = {"properties": {"code": {"type": "string", "pattern": "^[A-Z]{1,200}$"}}}
    tools = [
        {"type": "function", "function": {"name": f"f{i}", "parameters": parameters}}
        for i in range(100)
    ]
    request = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": tools}
    with pytest.raises(InvalidRequest):
        parse_request(Operation.CHAT, json.dumps(request).encode())
