"""Places where text can hide in a request."""

from __future__ import annotations

import json
from typing import Any

import pytest

from governance.inspection.walker import walk
from governance.request import parse_request
from governance.types import Operation, Surface


def leaves(operation: Operation = Operation.CHAT, **fields: Any) -> dict[tuple[str, str], Surface]:
    request = parse_request(operation, json.dumps({"model": "m", **fields}).encode())
    return {(leaf.path, leaf.text): leaf.surface for leaf in walk(request)}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_each_role_has_its_surface() -> None:
    found = leaves(
        messages=[
            {"role": "system", "content": "s"},
            {"role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "text", "text": "u"}], "name": "n"},
            {"role": "assistant", "content": "a", "reasoning": "r"},
            {"role": "tool", "content": "t", "tool_call_id": "c"},
        ]
    )
    assert found == {
        ("/messages/0/content", "s"): Surface.SYSTEM,
        ("/messages/1/content", "d"): Surface.SYSTEM,
        ("/messages/2/content/0/text", "u"): Surface.PROMPT,
        ("/messages/2/name", "n"): Surface.PROMPT,
        ("/messages/3/content", "a"): Surface.ASSISTANT,
        ("/messages/3/reasoning", "r"): Surface.ASSISTANT,
        ("/messages/4/content", "t"): Surface.TOOL_OUTPUT,
        ("/messages/4/tool_call_id", "c"): Surface.TOOL_OUTPUT,
    }


def test_escapes_in_arguments_hide_nothing() -> None:
    hidden = '{"a": "\\u0073\\u0065\\u0063\\u0072\\u0065\\u0074", "k\\u0065y": [{"b": 4111}]}'
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": hidden}}
    found = leaves(messages=[{"role": "assistant", "tool_calls": [call]}])
    arguments = "/messages/0/tool_calls/0/function/arguments"
    assert set(found.values()) == {Surface.TOOL_CALL}
    assert {
        (arguments, hidden),
        (f"{arguments}/a", "secret"),
        (f"{arguments}/key", "key"),
        (f"{arguments}/key/0/b", "4111"),
    } <= found.keys()


def test_keys_strings_and_numbers_of_tools_and_schemas_are_seen() -> None:
    parameters = {"properties": {"a/b~c": {"enum": ["x", 4111111111111111, 1.5, True, None]}}}
    function = {"name": "f", "description": "d", "parameters": parameters}
    found = leaves(
        messages=[user("hi")],
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "f"}},
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "n", "description": "e", "schema": {"title": "t"}},
        },
    )
    place = "/tools/0/function/parameters/properties/a~1b~0c"
    for leaf in (
        (place, "a/b~c"),
        (f"{place}/enum/0", "x"),
        (f"{place}/enum/1", "4111111111111111"),
    ):
        assert found[leaf] is Surface.TOOL_DEFINITION
    assert found["/tools/0/function/description", "d"] is Surface.TOOL_DEFINITION
    assert found["/tool_choice/function/name", "f"] is Surface.TOOL_DEFINITION
    for leaf in (
        ("/name", "n"),
        ("/description", "e"),
        ("/schema/title", "t"),
        ("/schema", "schema"),
    ):
        assert found[f"/response_format/json_schema{leaf[0]}", leaf[1]] is Surface.SCHEMA


def test_prompts_inputs_and_stops_are_seen() -> None:
    assert leaves(Operation.COMPLETIONS, prompt=["a", "b"], stop="END") == {
        ("/prompt/0", "a"): Surface.PROMPT,
        ("/prompt/1", "b"): Surface.PROMPT,
        ("/stop/0", "END"): Surface.METADATA,
    }
    assert leaves(Operation.EMBEDDINGS, input="a") == {("/input", "a"): Surface.PROMPT}


@pytest.mark.parametrize("prompt", [[1, 2], [[1], [2]]])
def test_token_ids_are_not_walked_before_they_are_text(prompt: Any) -> None:
    with pytest.raises(ValueError, match="decoded"):
        leaves(Operation.COMPLETIONS, prompt=prompt)


def test_very_deep_arguments_do_not_exhaust_the_stack() -> None:
    deep = '{"a":' * 60 + '"x"' + "}" * 60
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": deep}}
    found = leaves(messages=[{"role": "assistant", "tool_calls": [call]}])
    assert any(text == "x" for _, text in found)
