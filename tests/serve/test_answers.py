"""Real vLLM behind the whole path, through the official SDK."""

from __future__ import annotations

import json

import openai
import pytest

from tests.serve.conftest import Platform

HELLO: list[dict[str, str]] = [{"role": "user", "content": "Good morning"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Find a person's desk.",
        "parameters": {
            "type": "object",
            "properties": {"floor": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["floor"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("model", ["small", "large"])
def test_both_tiers_answer_with_their_own_weights(platform: Platform, model: str) -> None:
    client = platform.openai("data-scientist")
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=HELLO, max_tokens=8, seed=1
    )
    answer = raw.parse()
    assert answer.model == model
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 8
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.startswith("sha256:")
    assert raw.headers["x-gatehouse-model-version"] == answer.system_fingerprint
    assert raw.headers["x-gatehouse-engine-version"]


@pytest.mark.parametrize("identity", ["marketing-intern", "hr-analyst"])
def test_auto_chooses_among_what_the_caller_may_use(platform: Platform, identity: str) -> None:
    raw = platform.openai(identity).chat.completions.with_raw_response.create(
        model="auto", messages=HELLO, max_tokens=8
    )
    model, reason = raw.headers["x-gatehouse-model"], raw.headers["x-gatehouse-route-reason"]
    assert raw.parse().model == model
    assert reason.startswith(f"auto:{model} ")
    if identity == "marketing-intern":
        assert reason == "auto:small only tier permitted"


def test_tiers_have_different_versions(platform: Platform) -> None:
    client = platform.openai("data-scientist")
    versions = {
        client.chat.completions.create(model=model, messages=HELLO, max_tokens=2).system_fingerprint
        for model in ("small", "large")
    }
    assert len(versions) == 2


def test_stream_and_whole_answer_agree(platform: Platform) -> None:
    client = platform.openai("data-scientist")
    whole = client.chat.completions.create(
        model="small", messages=HELLO, max_tokens=12, temperature=0
    )
    chunks = list(
        client.chat.completions.create(
            model="small",
            messages=HELLO,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert [r for r in reasons if r] == [whole.choices[0].finish_reason]


def test_json_schema(platform: Platform) -> None:
    schema = TOOL["function"]["parameters"]  # type: ignore[index]
    answer = platform.openai("data-scientist").chat.completions.create(
        model="small",
        messages=HELLO,
        max_tokens=60,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "desk", "schema": schema, "strict": True},
        },
    )
    content = answer.choices[0].message.content
    assert content is not None
    assert set(json.loads(content)) == {"floor"}


@pytest.mark.parametrize("stream", [False, True])
def test_required_tool_call(platform: Platform, stream: bool) -> None:
    client = platform.openai("data-scientist")
    request = {
        "model": "small",
        "messages": HELLO,
        "max_tokens": 120,
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "lookup"}},
    }
    if not stream:
        call = client.chat.completions.create(**request).choices[0].message.tool_calls[0]  # type: ignore[call-overload]
        name, arguments = call.function.name, call.function.arguments
    else:
        name = arguments = ""
        for chunk in client.chat.completions.create(**request, stream=True):  # type: ignore[call-overload]
            for part in chunk.choices[0].delta.tool_calls or []:
                name += part.function.name or ""
                arguments += part.function.arguments or ""
    assert name == "lookup"
    assert set(json.loads(arguments)) == {"floor"}


def test_choices_logprobs_seed_and_stop(platform: Platform) -> None:
    client = platform.openai("data-scientist")
    two = client.chat.completions.create(
        model="small", messages=HELLO, max_tokens=5, n=2, logprobs=True, top_logprobs=2, seed=7
    )
    assert [c.index for c in two.choices] == [0, 1]
    for choice in two.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert len(choice.logprobs.content[0].top_logprobs) == 2
    again = client.chat.completions.create(model="small", messages=HELLO, max_tokens=5, n=2, seed=7)
    assert [c.message.content for c in again.choices] == [c.message.content for c in two.choices]
    text = two.choices[0].message.content or ""
    if len(text) > 3:
        stopped = client.chat.completions.create(
            model="small", messages=HELLO, max_tokens=5, seed=7, n=2, stop=text[2]
        )
        assert text[2] not in (stopped.choices[0].message.content or "")


def test_completions_take_text_and_tokens_alike(platform: Platform) -> None:
    client = platform.openai("data-scientist")
    answer = client.completions.create(
        model="small", prompt="Good", max_tokens=4, temperature=0, logprobs=1
    )
    assert answer.choices[0].logprobs is not None
    tokens = client.completions.create(model="small", prompt=[50, 51, 52], max_tokens=4)
    assert tokens.usage is not None
    assert tokens.usage.completion_tokens >= 1
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="small", prompt=[10**9], max_tokens=4)


def test_embeddings(platform: Platform) -> None:
    answer = platform.openai("data-scientist").embeddings.create(
        model="vectors", input=["a desk", "a chair"]
    )
    assert len(answer.data) == 2
    assert len(answer.data[0].embedding) == len(answer.data[1].embedding) > 8
    assert answer.data[0].embedding != answer.data[1].embedding


def test_a_prompt_beyond_the_context_is_the_clients_error(platform: Platform) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        platform.openai("data-scientist").chat.completions.create(
            model="small", messages=[{"role": "user", "content": "word " * 5000}], max_tokens=4
        )
    assert caught.value.code == "context_length_exceeded"
    assert "vllm" not in str(caught.value).lower()


def test_identities_see_different_models(platform: Platform) -> None:
    seen = {
        identity: {m.id for m in platform.openai(identity).models.list()}
        for identity in ("marketing-intern", "hr-analyst", "data-scientist")
    }
    assert seen["marketing-intern"] == {"auto", "small"}
    assert seen["hr-analyst"] == {"auto", "small", "large"}
    assert seen["data-scientist"] == {"auto", "small", "large", "vectors"}
