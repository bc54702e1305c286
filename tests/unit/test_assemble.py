"""Folding a stream must give what a non-streaming answer would have been."""

from __future__ import annotations

import json
from typing import Any

from deployments.api.assemble import Assembler
from governance.types import Operation, Usage
from tests.doubles import sse


def chunk(*choices: dict[str, Any], **extra: Any) -> bytes:
    return sse(
        {"id": "chatcmpl-1", "created": 7, "model": "small", "choices": list(choices), **extra}
    )


def delta(index: int = 0, finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"index": index, "delta": fields, "finish_reason": finish}


def fold(operation: Operation, *chunks: bytes) -> dict[str, Any]:
    assembler = Assembler(operation)
    for data in chunks:
        assembler.feed(data)
    body: dict[str, Any] = json.loads(assembler.finish(Usage(3, 5, 2), {"gpu_us": 7}))
    return body


def test_text_of_all_choices_in_order_of_index() -> None:
    body = fold(
        Operation.CHAT,
        chunk(delta(1, role="assistant", content="")) + chunk(delta(0, role="assistant")),
        chunk(delta(1, content="b")),
        chunk(delta(0, content="a"), delta(1, content="B")),
        chunk(delta(0, "stop", content="A")) + chunk(delta(1, "length")),
    )
    assert [c["message"]["content"] for c in body["choices"]] == ["aA", "bB"]
    assert [c["finish_reason"] for c in body["choices"]] == ["stop", "length"]
    assert body["object"] == "chat.completion"
    assert body["id"] == "chatcmpl-1"
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_tool_calls_merge_by_index() -> None:
    first = {"index": 0, "id": "c0", "type": "function", "function": {"name": "find"}}
    body = fold(
        Operation.CHAT,
        chunk(delta(tool_calls=[first])),
        chunk(delta(tool_calls=[{"index": 0, "function": {"arguments": '{"a"'}}])),
        chunk(delta(tool_calls=[{"index": 0, "function": {"arguments": ":1}"}}])),
        chunk(delta(tool_calls=[{"index": 1, "id": "c1", "function": {"name": "go"}}])),
        chunk(delta(finish="tool_calls")),
    )
    message = body["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [
        {"id": "c0", "type": "function", "function": {"name": "find", "arguments": '{"a":1}'}},
        {"id": "c1", "type": "function", "function": {"name": "go", "arguments": ""}},
    ]


def test_logprobs_are_concatenated_in_chat_and_completions() -> None:
    one = {**delta(content="a"), "logprobs": {"content": [{"token": "a", "logprob": -1}]}}
    two = {**delta(content="b"), "logprobs": {"content": [{"token": "b", "logprob": -2}]}}
    chat = fold(Operation.CHAT, chunk(one), chunk(two))
    assert [p["token"] for p in chat["choices"][0]["logprobs"]["content"]] == ["a", "b"]
    text = [
        {"index": 0, "text": t, "finish_reason": None, "logprobs": {"tokens": [t]}} for t in "xy"
    ]
    body = fold(Operation.COMPLETIONS, chunk(text[0]), chunk(text[1]))
    assert body["choices"][0]["logprobs"]["tokens"] == ["x", "y"]
    assert body["choices"][0]["text"] == "xy"
    assert body["object"] == "text_completion"


def test_fingerprint_of_the_last_chunk_counts() -> None:
    body = fold(
        Operation.CHAT,
        chunk(delta(content="a")),
        chunk(delta(finish="stop"), system_fingerprint="sha256:1"),
    )
    assert body["system_fingerprint"] == "sha256:1"


def test_an_empty_answer_has_empty_content() -> None:
    body = fold(Operation.CHAT, chunk(delta(finish="stop")))
    assert body["choices"][0]["message"]["content"] == ""
    assert body["choices"][0]["logprobs"] is None


def test_text_that_looks_like_an_event_boundary_stays_text() -> None:
    hostile = 'data: {"x":1}\n\ndata: [DONE]\n\n"finish_reason":"stop"'
    body = fold(Operation.CHAT, chunk(delta(content=hostile)))
    assert body["choices"][0]["message"]["content"] == hostile
