"""Bodies of clients, hostile ones first."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest

from governance.errors import (
    ForbiddenField,
    GatehouseError,
    InvalidRequest,
    MediaRefused,
    UnsupportedField,
)
from governance.protocol.fields import FORBIDDEN
from governance.protocol.values import RequestLimits
from governance.request import forward_body, parse_request, token_prompts, with_text_prompts
from governance.types import InferenceRequest, Operation

SECRET = "sk-do-not-repeat-me"


def chat(**fields: Any) -> bytes:
    body = {"model": "small", "messages": [{"role": "user", "content": "hi"}], **fields}
    return json.dumps(body).encode()


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "small", "prompt": "hi", **fields}).encode()


def embedding(**fields: Any) -> bytes:
    return json.dumps({"model": "small", "input": "hi", **fields}).encode()


def parse_chat(**fields: Any) -> InferenceRequest:
    return parse_request(Operation.CHAT, chat(**fields))


def forwarded(request: InferenceRequest, max_tokens: int = 64, priority: int = 0) -> dict[str, Any]:
    data = forward_body(
        request, model="m", max_tokens=max_tokens, cache_salt="hr", priority=priority
    )
    body = orjson.loads(data)
    assert type(body) is dict
    return body


def message(content: Any, role: str = "user", **more: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content, **more}]


def tool(name: str = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


# -- not JSON, or not ours ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"\xef\xbb\xbf" + chat(),
        chat() + b"x",
        b'{"model": "small", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b'{"model": "small", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "small", "messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
        b'{"model": "small", "messages": [{"role": "user", "content": "a"}], "top_p": Infinity}',
        b'{"model": "small", "messages": [{"role": "user", "content": "a"}], "top_p": 1e999}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(Operation.CHAT, body)
    assert caught.value.status == 400
    assert "orjson" not in caught.value.message
    assert "column" not in caught.value.message


@pytest.mark.parametrize(
    ("operation", "make"),
    [
        (Operation.CHAT, chat),
        (Operation.COMPLETIONS, completion),
        (Operation.EMBEDDINGS, embedding),
    ],
)
def test_every_field_of_the_platform_is_refused_by_name(operation: Operation, make: Any) -> None:
    for name in FORBIDDEN[operation]:
        for value in (SECRET, 1, {"a": SECRET}, True):
            with pytest.raises(ForbiddenField) as caught:
                parse_request(operation, make(**{name: value}))
            assert caught.value.param == name
            assert SECRET not in caught.value.message


@pytest.mark.parametrize(
    "name",
    [
        "Priority",
        "PRIORITY",
        "priority ",
        "guided_json",
        "best_of_n",
        "chatTemplate",
        "",
        "a" * 999,
    ],
)
def test_spellings_beside_the_table_are_unsupported(name: str) -> None:
    with pytest.raises(UnsupportedField) as caught:
        parse_chat(**{name: SECRET})
    assert len(caught.value.param or "") <= 64
    assert SECRET not in caught.value.message


def test_a_field_name_with_odd_characters_is_not_repeated() -> None:
    with pytest.raises(UnsupportedField) as caught:
        parse_chat(**{"x\r\nSet-Cookie: a=b": 1})
    assert caught.value.param == "?"
    assert "Cookie" not in caught.value.message


def test_the_last_of_two_equal_keys_counts_for_the_engine_and_for_us() -> None:
    body = (
        b'{"model": "large", "model": "small", '
        b'"messages": [{"role": "user", "content": "a", "content": "b"}]}'
    )
    request = parse_request(Operation.CHAT, body)
    assert request.model == "small"
    assert forwarded(request)["messages"] == [{"role": "user", "content": "b"}]
    data = forward_body(request, model="m", max_tokens=1, cache_salt="hr", priority=0)
    assert data.count(b'"content"') == 1


# -- messages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}},
        {"type": "input_image", "image_url": "http://host/"},
        {"type": "image_embeds", "image_embeds": "AA=="},
        {"type": "image_pil", "image_pil": "x"},
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": "file:///etc/passwd"}},
        {"type": "video_url", "video_url": {"url": "http://host/"}},
        {"type": "prompt_embeds", "data": "AA=="},
        {"type": "file", "file": {"file_id": "f"}},
        {"type": "input_file", "file_url": "http://host/"},
        {"image_url": "http://host/"},
        {"image_url": "http://host/", "uuid": "u"},
        {"type": "text", "text": "a", "image_url": "http://host/"},
        {"type": "text", "text": "a", "uuid": "u", "image_url": {"url": "http://host/"}},
    ],
)
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_media_is_refused_in_every_role(part: dict[str, Any], role: str) -> None:
    content = [{"type": "text", "text": "look"}, part]
    with pytest.raises(MediaRefused) as caught:
        parse_chat(
            messages=message(content, role, **{"tool_call_id": "c"} if role == "tool" else {})
        )
    assert caught.value.param == "messages.0.content.1"


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ("text", "messages.0.content.0"),
        (None, "messages.0.content.0"),
        ({}, "messages.0.content.0.type"),
        ({"type": "text"}, "messages.0.content.0.text"),
        ({"type": "text", "text": None}, "messages.0.content.0.text"),
        ({"type": "text", "text": ["a"]}, "messages.0.content.0.text"),
        ({"type": ["text"], "text": "a"}, "messages.0.content.0.type"),
        ({"type": "tool_reference", "name": "x"}, "messages.0.content.0.type"),
        ({"type": "thinking", "thinking": "x"}, "messages.0.content.0.type"),
        ({"type": "refusal", "refusal": "x"}, "messages.0.content.0.type"),
        ({"type": "text", "text": "a", "uuid": "u"}, "messages.0.content.0.uuid"),
        ({"text": "a"}, "messages.0.content.0.type"),
    ],
)
def test_odd_parts_are_refused_with_their_place(part: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(messages=message([part]))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hi", "messages"),
        ({"role": "user", "content": "hi"}, "messages"),
        (["hi"], "messages.0"),
        ([{"content": "hi"}], "messages.0.role"),
        ([{"role": "root", "content": "hi"}], "messages.0.role"),
        ([{"role": "function", "content": "hi", "name": "f"}], "messages.0.role"),
        ([{"role": ["user"], "content": "hi"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ([{"role": "user", "content": {"text": "hi"}}], "messages.0.content"),
        ([{"role": "user", "content": []}], "messages.0.content"),
        ([{"role": "assistant", "content": None}], "messages.0.content"),
        ([{"role": "assistant"}], "messages.0.content"),
        ([{"role": "tool", "content": "x"}], "messages.0.tool_call_id"),
        ([{"role": "user", "content": "x", "name": {"a": 1}}], "messages.0.name"),
        ([{"role": "user", "content": "x", "task": "t"}], "messages.0.task"),
        ([{"role": "developer", "content": "x", "tools": []}], "messages.0.tools"),
        ([{"role": "user", "content": "x", "tool_calls": []}], "messages.0.tool_calls"),
        ([{"role": "assistant", "content": "x", "audio": {"id": "a"}}], "messages.0.audio"),
        ([{"role": "assistant", "tool_calls": {}, "content": 1}], "messages.0.content"),
        ([{"role": "assistant", "tool_calls": ["x"]}], "messages.0.tool_calls.0"),
    ],
)
def test_malformed_messages_are_refused_with_their_place(messages: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(messages=messages)
    assert caught.value.param == param


def call(arguments: Any = "{}", **more: Any) -> dict[str, Any]:
    return {
        "id": "c1",
        "type": "function",
        "function": {"name": "f", "arguments": arguments},
        **more,
    }


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"a": 1}, "arguments"),
        (5, "arguments"),
        ('{"a": "\\ud800"}', "arguments"),
        ('{"\\udc00": 1}', "arguments"),
        ("[" * 5_000, "arguments"),
        ('{"a":' * 70 + "1" + "}" * 70, "arguments"),
        ('{"a": ' + "9" * 5_000 + "}", "arguments"),
    ],
)
def test_arguments_that_the_engine_reads_and_we_cannot_are_refused(
    arguments: Any, param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(messages=message(None, "assistant", tool_calls=[call(arguments)]))
    assert caught.value.param == f"messages.0.tool_calls.0.function.{param}"


def test_arguments_that_are_no_json_stay_as_they_are() -> None:
    request = parse_chat(messages=message(None, "assistant", tool_calls=[call("{broken")]))
    calls = forwarded(request)["messages"][0]["tool_calls"]
    assert calls[0]["function"]["arguments"] == "{broken"


def test_an_answer_that_a_client_sends_back_is_accepted() -> None:
    answer = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [call('{"city": "Köln"}', index=0)],
        "reasoning_content": "think",
    }
    result = {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "ok"}]}
    request = parse_chat(messages=[{"role": "user", "content": "hi"}, answer, result])
    sent = forwarded(request)["messages"]
    assert sent[1] == {
        "role": "assistant",
        "reasoning": "think",
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "f", "arguments": '{"city": "Köln"}'},
            }
        ],
    }
    assert sent[2] == {
        "role": "tool",
        "content": [{"type": "text", "text": "ok"}],
        "tool_call_id": "c1",
    }


def test_parts_of_other_dialects_become_text() -> None:
    request = parse_chat(messages=message([{"type": "input_text", "text": "hi"}]))
    assert forwarded(request)["messages"][0]["content"] == [{"type": "text", "text": "hi"}]


# -- types and ranges --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("model", [None, "", 5, ["small"], "x" * 300]),
        ("temperature", ["1", -0.1, 2.1, True, [1]]),
        ("top_p", [0, 1.01, "1", False]),
        ("top_k", [-2, 1.0, True, 2**31]),
        ("min_p", [-1, 2]),
        ("n", [0, 17, 1.0, "2", True, -1]),
        ("max_tokens", [0, -1, 1.5, "9", True, 10**9, 123456789012345678901234567890]),
        ("max_completion_tokens", [0, -5, "x"]),
        ("seed", [1.5, "1", 2**63, True]),
        ("stop", [5, "", ["a", 5], ["a"] * 17, "x" * 257, [""], {"a": 1}]),
        ("presence_penalty", [-2.1, "0"]),
        ("repetition_penalty", [0, -1]),
        ("logit_bias", [[], {"a": 1}, {"1": "x"}, {"1": 101}, {"-1": 1}, {"²": 1}, {"": 1}]),
        ("logprobs", [1, "true"]),
        ("stream", [1, "true", []]),
        ("parallel_tool_calls", ["yes"]),
        ("reasoning_effort", ["huge", 1]),
        ("user", [5, {"id": 1}]),
        ("store", ["yes"]),
        ("metadata", ["x"]),
        ("service_tier", ["priority", "flex"]),
        ("modalities", [["text", "audio"], "text"]),
        (
            "response_format",
            ["json", {"type": "structural_tag", "format": {}}, {"type": "grammar"}],
        ),
        ("tools", [[], {}, ["f"], [{"type": "web_search"}], [tool("bad name")], [tool("")]]),
    ],
)
def test_wrong_types_and_ranges_are_refused_with_their_place(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest) as caught:
            parse_chat(**{field: value})
        assert (caught.value.param or "").split(".")[0] == field, value


def test_no_error_repeats_a_value() -> None:
    bodies = [
        chat(temperature=SECRET),
        chat(messages=[{"role": SECRET, "content": "x"}]),
        chat(messages=message([{"type": SECRET}])),
        chat(tools=[tool(SECRET + " ")]),
        chat(stop=[SECRET, 5]),
        chat(logit_bias={SECRET: 1}),
        chat(tool_choice=SECRET),
        chat(response_format={"type": SECRET}),
        chat(reasoning_effort=SECRET),
        chat(stream_options={SECRET + " ": True}, stream=True),
    ]
    for body in bodies:
        with pytest.raises(GatehouseError) as caught:
            parse_request(Operation.CHAT, body)
        assert SECRET not in repr(caught.value.args)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": tool("f")}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": tool("g")}, "tool_choice.function.name"),
        ({"tools": [tool("f"), tool("f")]}, "tools"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(**fields)
    assert caught.value.param == param


def nested(levels: int) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for _ in range(levels):
        tree = {"a": tree}
    return tree


def test_depth_and_number_of_values_of_a_schema_are_bounded() -> None:
    parse_chat(tools=[tool(parameters=nested(64))])
    for parameters in (nested(65), {"a": list(range(20_001))}):
        with pytest.raises(InvalidRequest) as caught:
            parse_chat(tools=[tool(parameters=parameters)])
        assert caught.value.param == "tools.0.function.parameters"
    schema = {"name": "s", "schema": nested(200)}
    with pytest.raises(InvalidRequest):
        parse_chat(response_format={"type": "json_schema", "json_schema": schema})


def test_counts_are_bounded() -> None:
    few = RequestLimits(max_messages=2, max_parts=2, max_tools=1, max_tool_calls=1)
    part = {"type": "text", "text": "x"}
    for body in (
        chat(messages=message("x") * 3),
        chat(messages=message([part] * 3)),
        chat(tools=[tool("a"), tool("b")]),
        chat(messages=message(None, "assistant", tool_calls=[call(), call()])),
    ):
        with pytest.raises(InvalidRequest):
            parse_request(Operation.CHAT, body, few)
    with pytest.raises(InvalidRequest) as caught:
        parse_request(Operation.COMPLETIONS, completion(prompt=["x"] * 20, n=10))
    assert caught.value.param == "n"


# -- what is forwarded -------------------------------------------------------------------------


def test_a_full_chat_is_forwarded_field_by_field() -> None:
    fields: dict[str, Any] = {
        "messages": message("hi", name="analyst"),
        "tools": [tool("f", description="d", parameters={"z": 1, "a": {}}, strict=True)],
        "tool_choice": tool("f"),
        "parallel_tool_calls": False,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "s", "schema": {"type": "object"}, "strict": True},
        },
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "n": 2,
        "stop": ["END"],
        "seed": 7,
        "presence_penalty": 0.1,
        "frequency_penalty": -0.1,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": -100},
        "logprobs": True,
        "top_logprobs": 3,
        "reasoning_effort": "low",
        "min_tokens": 1,
        "ignore_eos": True,
        "include_stop_str_in_output": True,
    }
    ignored = {"user": "u", "metadata": {"a": "b"}, "store": True, "safety_identifier": "s"}
    request = parse_chat(max_tokens=9, stream=True, **fields, **ignored)
    body = forwarded(request, max_tokens=9, priority=-10)
    assert body == {
        "model": "m",
        **fields,
        "max_completion_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": "hr",
        "priority": -10,
    }
    assert request.choices == 2
    assert request.max_tokens == 9
    assert request.stream
    assert not request.include_usage
    assert list(body["tools"][0]["function"]["parameters"]) == ["z", "a"], "order steers answers"


def test_nothing_that_the_client_says_about_streaming_reaches_the_engine() -> None:
    for stream in (False, True, None):
        body = forwarded(parse_chat(stream=stream))
        assert body["stream"] is True
        assert body["stream_options"] == {"include_usage": True}
    request = parse_chat(stream=True, stream_options={"include_usage": True})
    assert request.include_usage


def test_null_stands_for_not_given() -> None:
    names = ("temperature", "tools", "max_tokens", "stop", "user", "stream_options", "logit_bias")
    assert parse_chat(**dict.fromkeys(names)).body == parse_chat().body


def test_without_tools_the_choice_of_none_is_dropped() -> None:
    body = parse_chat(tool_choice="auto", parallel_tool_calls=True).body
    assert body.keys() == {"messages"}


def test_a_least_length_never_exceeds_the_length_that_policy_leaves() -> None:
    assert forwarded(parse_chat(min_tokens=100), max_tokens=10)["min_tokens"] == 10


def test_equal_requests_give_equal_bytes_whatever_the_order_of_fields() -> None:
    one = parse_request(Operation.COMPLETIONS, b'{"model":"m","prompt":"x","seed":1,"top_p":1}')
    two = parse_request(Operation.COMPLETIONS, b'{"top_p":1,"seed":1,"prompt":"x", "model":"m"}')
    made = [
        forward_body(r, model="m", max_tokens=3, cache_salt="s", priority=0) for r in (one, two)
    ]
    assert made[0] == made[1]


def test_embeddings_are_not_streamed_and_have_no_answer_length() -> None:
    request = parse_request(
        Operation.EMBEDDINGS, embedding(input=["a", "b"], encoding_format="base64", user="u")
    )
    assert forwarded(request) == {
        "model": "m",
        "input": ["a", "b"],
        "encoding_format": "base64",
        "cache_salt": "hr",
    }
    refused: list[dict[str, Any]] = [
        {"stream": True},
        {"messages": []},
        {"encoding_format": "bytes"},
    ]
    for fields in refused:
        with pytest.raises(InvalidRequest):
            parse_request(Operation.EMBEDDINGS, embedding(**fields))


def test_completions_accept_what_sdks_send_by_default() -> None:
    request = parse_request(
        Operation.COMPLETIONS, completion(echo=False, best_of=1, suffix=None, logprobs=2)
    )
    assert request.body == {"prompt": "hi", "logprobs": 2}
    for fields in ({"echo": True}, {"best_of": 2}, {"suffix": "x"}):
        with pytest.raises(InvalidRequest):
            parse_request(Operation.COMPLETIONS, completion(**fields))


# -- token ids ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [("x", []), (["x", "y"], []), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_token_prompts_are_found(prompt: Any, tokens: list[list[int]]) -> None:
    for operation, body in (
        (Operation.COMPLETIONS, completion(prompt=prompt)),
        (Operation.EMBEDDINGS, embedding(input=prompt)),
    ):
        assert token_prompts(parse_request(operation, body)) == tokens


def test_token_prompts_are_not_forwarded_before_they_are_text() -> None:
    request = parse_request(Operation.COMPLETIONS, completion(prompt=[[1], [2]], n=3))
    assert request.choices == 6
    with pytest.raises(ValueError, match="decoded"):
        forwarded(request)
    with pytest.raises(ValueError, match="1 texts for 2"):
        with_text_prompts(request, ["a"])
    decoded = with_text_prompts(request, ["a", "b"])
    assert forwarded(decoded)["prompt"] == ["a", "b"]
    assert decoded.choices == 6
    single = parse_request(Operation.COMPLETIONS, completion(prompt=[1, 2]))
    assert forwarded(with_text_prompts(single, ["ab"]))["prompt"] == "ab"
    with pytest.raises(ValueError, match="0 token-id"):
        with_text_prompts(decoded, ["a", "b"])


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        [[]],
        [1, "a"],
        ["a", 1],
        ["a", [1]],
        [[1], "a"],
        [1, [2]],
        [[1], 2],
        [-1],
        [2**31],
        [1.0],
        [True],
        [[True]],
        [None],
        {"ids": [1]},
        [[[1]]],
        5,
    ],
)
def test_mixed_and_odd_prompts_are_refused(prompt: Any) -> None:
    for operation, body, field in (
        (Operation.COMPLETIONS, completion(prompt=prompt), "prompt"),
        (Operation.EMBEDDINGS, embedding(input=prompt), "input"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            parse_request(operation, body)
        assert (caught.value.param or "").startswith(field)


def test_token_ids_of_one_request_are_bounded_in_total() -> None:
    limits = RequestLimits(max_prompt_tokens=10)
    parse_request(Operation.COMPLETIONS, completion(prompt=[[1] * 5, [1] * 5]), limits)
    with pytest.raises(InvalidRequest):
        parse_request(Operation.COMPLETIONS, completion(prompt=[[1] * 5, [1] * 6]), limits)


def test_forwarding_needs_a_salt_and_a_length() -> None:
    request = parse_chat()
    with pytest.raises(ValueError, match="cache_salt"):
        forward_body(request, model="m", max_tokens=1, cache_salt="", priority=0)
    with pytest.raises(ValueError, match="max_tokens"):
        forward_body(request, model="m", max_tokens=0, cache_salt="s", priority=0)
