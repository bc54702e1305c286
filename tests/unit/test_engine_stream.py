"""What vLLM writes, read as our events; each way a stream can go wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.engine_stream import StreamReader, engine_error
from governance.errors import (
    ContextLengthExceeded,
    EngineFailed,
    EngineUnavailable,
    InvalidRequest,
    ModelNotFound,
)
from governance.types import Usage

VERSION = "sha256:" + "ab" * 32
SECRET = "the prompt of somebody else"


def event(**fields: Any) -> str:
    return f"data: {json.dumps(fields, separators=(',', ':'))}\n\n"


def delta(text: str, index: int = 0, finish: str | None = None) -> str:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": finish}
    return event(id="chatcmpl-1", choices=[choice])


USAGE = event(
    id="chatcmpl-1",
    choices=[],
    usage={
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 4},
    },
)


def error(code: int, param: str | None = None) -> str:
    return event(error={"message": SECRET, "type": "X", "param": param, "code": code})


def payload(data: bytes) -> Any:
    return json.loads(data.removeprefix(b"data: "))


def test_a_stream_in_order() -> None:
    reader = StreamReader(VERSION, 1)
    first = reader.feed(delta("Good"))
    last = reader.feed(delta(" day", finish="stop"))
    assert reader.feed(USAGE) is None
    assert reader.feed("data: [DONE]\n\n") is None
    finished = reader.finish()

    assert first is not None
    assert last is not None
    assert "system_fingerprint" not in payload(first.data)
    assert payload(last.data)["system_fingerprint"] == VERSION
    assert payload(last.data)["choices"][0]["finish_reason"] == "stop"
    assert finished.usage == Usage(7, 3, 4)
    assert payload(finished.usage_event)["system_fingerprint"] == VERSION
    assert finished.usage_event.endswith(b"\n\n")


def test_each_chunk_says_what_was_generated_and_spent_by_then() -> None:
    """Tokens are counted elsewhere: one event may stand for several, or for none."""
    told = iter([(0, 100), (3, 250), (1, 300)])
    reader = StreamReader(VERSION, 1, lambda: next(told))

    chunks = [reader.feed(delta("")), reader.feed(delta("Good day")), reader.feed(USAGE)]
    chunks.append(reader.feed(delta("", finish="stop")))

    assert [(c.tokens, c.gpu_us) for c in chunks if c] == [(0, 100), (3, 250), (1, 300)]
    assert reader.finish().gpu_us is None


def test_text_cannot_imitate_the_end() -> None:
    reader = StreamReader(VERSION, 1)
    for text in ('"finish_reason":"stop"', '"choices":[]', "data: [DONE]", 'data: {"error":1}'):
        assert reader.feed(delta(text)) is not None
    with pytest.raises(EngineFailed):
        reader.finish()


@pytest.mark.parametrize(
    "events",
    [
        [],
        ["data: [DONE]\n\n"],
        [delta("Good"), "data: [DONE]\n\n"],
        [delta("Good"), USAGE, "data: [DONE]\n\n"],
        [delta("Good", finish="stop"), "data: [DONE]\n\n"],
    ],
)
def test_a_stream_that_stops_early_failed(events: list[str]) -> None:
    reader = StreamReader(VERSION, 1)
    for item in events:
        reader.feed(item)
    with pytest.raises(EngineFailed):
        reader.finish()


def test_every_choice_must_end() -> None:
    reader = StreamReader(VERSION, 2)
    reader.feed(delta("a", 0, "stop"))
    reader.feed(USAGE)
    with pytest.raises(EngineFailed):
        reader.finish()


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_aborted_choice_is_a_failure(reason: str) -> None:
    with pytest.raises(EngineFailed):
        StreamReader(VERSION, 1).feed(delta("", finish=reason))


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (error(400), InvalidRequest),
        (error(400, "logit_bias"), InvalidRequest),
        (error(400, "input_tokens"), ContextLengthExceeded),
        (error(404, "model"), ModelNotFound),
        (error(500), EngineFailed),
        (error(503), EngineUnavailable),
        ('data: {"error": "words"}\n\n', EngineFailed),
        ('data: {"error"\n\n', EngineFailed),
    ],
)
def test_an_error_before_the_answer_is_told_by_its_code(
    item: str, expected: type[Exception]
) -> None:
    with pytest.raises(expected) as caught:
        StreamReader(VERSION, 1).feed(item)
    assert SECRET not in str(caught.value)


def test_an_error_in_mid_stream_is_the_engine_failing() -> None:
    reader = StreamReader(VERSION, 1)
    reader.feed(delta("Good"))
    with pytest.raises(EngineFailed):
        reader.feed(error(400))


def test_only_fields_of_requests_are_named() -> None:
    assert engine_error(400, "logit_bias").param == "logit_bias"
    for foreign in ("vllm_internal", "messages -> 0 -> secret", "", None):
        assert engine_error(400, foreign).param is None


def test_fields_that_are_always_empty_are_left_out() -> None:
    item = (
        'data: {"id":"1","choices":[{"index":0,"delta":{"content":"a"},"token_ids":null}],'
        '"prompt_token_ids":null,"prompt_text":null}\n\n'
    )
    chunk = StreamReader(VERSION, 1).feed(item)
    assert chunk is not None
    assert payload(chunk.data) == {
        "id": "1",
        "choices": [{"index": 0, "delta": {"content": "a"}}],
    }
