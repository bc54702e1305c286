"""Nothing that an engine gets was unseen: what is forwarded is what is walked."""

from __future__ import annotations

import fnmatch
import json
from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from governance.errors import InvalidRequest
from governance.inspection.walker import CONSTANTS, walk
from governance.request import forward_body, parse_request
from governance.types import Operation

OURS = {"/model", "/cache_salt"}
"""Strings of the forwarded body that the gateway writes itself."""

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
scalars = text | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
trees = st.recursive(
    scalars | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(text, trees, max_size=4)
names = st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True)
parts = st.fixed_dictionaries({"type": st.sampled_from(["text", "input_text"]), "text": text})
contents = text | st.lists(parts, min_size=1, max_size=3)
arguments = (
    objects.map(json.dumps) | objects.map(lambda o: json.dumps(o, ensure_ascii=False)) | text
)
calls = st.fixed_dictionaries(
    {
        "id": text,
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": names, "arguments": arguments}),
    }
)
messages = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user"]), "content": contents},
        optional={"name": text},
    ),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": contents},
        optional={
            "tool_calls": st.lists(calls, max_size=2),
            "reasoning": text,
            "refusal": text,
            "name": text,
        },
    ),
    st.fixed_dictionaries({"role": st.just("tool"), "content": contents, "tool_call_id": text}),
)


def _tool_name(tool: dict[str, Any]) -> str:
    name: str = tool["function"]["name"]
    return name


tools = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": names}, optional={"description": text, "parameters": objects}
            ),
        }
    ),
    min_size=1,
    max_size=3,
    unique_by=_tool_name,
)
formats = st.just({"type": "json_object"}) | st.fixed_dictionaries(
    {
        "type": st.just("json_schema"),
        "json_schema": st.fixed_dictionaries(
            {"name": text, "schema": objects}, optional={"description": text}
        ),
    }
)
stops = text.filter(bool) | st.lists(text.filter(bool), max_size=3)
chats = st.fixed_dictionaries(
    {"model": names, "messages": st.lists(messages, min_size=1, max_size=4)},
    optional={
        "tools": tools,
        "tool_choice": st.sampled_from(["auto", "none"]),
        "response_format": formats,
        "stop": stops,
        "user": text,
        "metadata": objects,
        "reasoning_effort": st.just("low"),
        "logit_bias": st.just({"17": 1}),
    },
)
prompts = text | st.lists(text, min_size=1, max_size=3)
completions = st.fixed_dictionaries(
    {"model": names, "prompt": prompts}, optional={"stop": stops, "response_format": formats}
)
embeddings = st.fixed_dictionaries(
    {"model": names, "input": prompts}, optional={"encoding_format": st.just("float")}
)


def check(operation: Operation, body: dict[str, Any]) -> None:
    request = parse_request(operation, orjson.dumps(body))
    sent = orjson.loads(forward_body(request, model="m", max_tokens=5, cache_salt="s", priority=0))
    seen = {(leaf.path, leaf.text) for leaf in walk(request)}
    missing = [place for place in places(sent, "") if place not in seen and not excepted(place)]
    assert not missing


def places(value: Any, path: str) -> list[tuple[str, str]]:
    """Every key and string of a JSON value, at its JSON Pointer."""
    found: list[tuple[str, str]] = []
    if isinstance(value, str):
        found.append((path, value))
    elif isinstance(value, dict):
        for key, child in value.items():
            where = f"{path}/{key.replace('~', '~0').replace('/', '~1')}"
            found += [(where, key), *places(child, where)]
    elif isinstance(value, list):
        for i, child in enumerate(value):
            found += places(child, f"{path}/{i}")
    return found


ENVELOPE = {
    "model", "messages", "role", "content", "type", "text", "name", "tool_calls", "id", "function",
    "arguments", "tool_call_id", "reasoning", "tools", "tool_choice", "parameters", "description",
    "response_format", "json_schema", "schema", "stop", "prompt", "input", "encoding_format",
    "reasoning_effort", "logit_bias", "stream", "stream_options", "include_usage", "cache_salt",
    "max_tokens", "max_completion_tokens",
}  # fmt: skip
"""Keys of our own making, outside of free-form objects."""
FREE_FORM = ("/tools/*/function/parameters/*", "/response_format/json_schema/schema/*")


def excepted(place: tuple[str, str]) -> bool:
    path, value = place
    if any(fnmatch.fnmatchcase(path, pattern) for pattern in FREE_FORM):
        return False
    key = path.rpartition("/")[2]
    if value == key and (value in ENVELOPE or path.startswith("/logit_bias/")):
        return True
    return path in OURS or any(fnmatch.fnmatchcase(path, pattern) for pattern in CONSTANTS)


@given(chats)
def test_every_string_of_a_forwarded_chat_is_walked(body: dict[str, Any]) -> None:
    if "tools" not in body:
        body.pop("tool_choice", None)
    check(Operation.CHAT, body)


@given(completions)
def test_every_string_of_a_forwarded_completion_is_walked(body: dict[str, Any]) -> None:
    check(Operation.COMPLETIONS, body)


@given(embeddings)
def test_every_string_of_a_forwarded_embedding_is_walked(body: dict[str, Any]) -> None:
    check(Operation.EMBEDDINGS, body)


@given(objects)
def test_everything_that_arguments_decode_to_is_walked(tree: dict[str, Any]) -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": json.dumps(tree)}}
    body = {"model": "m", "messages": [{"role": "assistant", "tool_calls": [call]}]}
    seen = {leaf.text for leaf in walk(parse_request(Operation.CHAT, orjson.dumps(body)))}
    assert {value for _, value in places(tree, "")} <= seen


odd_keys = st.sampled_from(sorted(ENVELOPE | {"priority", "image_url", "x"}))
odd = st.recursive(
    scalars | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_keys | text, inner, max_size=4),
    max_leaves=15,
)


@given(st.sampled_from(Operation), st.dictionaries(odd_keys, odd), st.binary(max_size=60))
def test_any_body_is_refused_properly_or_forwarded_seen(
    operation: Operation, body: dict[str, Any], noise: bytes
) -> None:
    body.setdefault("model", "m")
    body.setdefault("messages", [{"role": "user", "content": "x"}])
    for data in (orjson.dumps(body), noise):
        try:
            request = parse_request(operation, data)
        except InvalidRequest:
            continue
        else:
            list(walk(request))
            forward_body(request, model="m", max_tokens=1, cache_salt="s", priority=1)
