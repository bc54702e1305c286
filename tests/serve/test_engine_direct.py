"""Real vLLM behind the data plane's ``Backend``: what it answers, and what it refuses."""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from deployments.checkpoints import build_apart
from deployments.config import ModelConfig
from deployments.engine_config import engine_environment
from tests.serve.engine_host import ADAPTER_VERSION, VERSION, EngineHost

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ROOT / "build" / "checkpoints"
ENGINE = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 1024,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 12}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def cluster(ray_local: None) -> None:
    """Ray, and checkpoints."""
    build_apart(CHECKPOINTS)


def host(**fields: Any) -> Any:
    model = ModelConfig(
        id="small",
        tier="small",
        source=str(CHECKPOINTS / "small"),
        context_tokens=1024,
        accelerator={"kind": "cpu"},
        **fields,
    )
    environment = {**engine_environment(model), "PYTHONPATH": str(ROOT)}
    actor: Any = ray.remote(EngineHost)
    handle = actor.options(
        num_cpus=0, max_concurrency=100, runtime_env={"env_vars": environment}
    ).remote(model.model_dump(mode="json"))
    assert ray.get(handle.ready.remote(), timeout=180) == "small"
    return handle


@pytest.fixture(scope="module")
def engine(cluster: None) -> Iterator[Any]:
    handle = host(
        engine={**ENGINE, "enable_auto_tool_choice": True, "tool_call_parser": "hermes"},
        adapters=[{"id": "small-adapter", "source": str(CHECKPOINTS / "small-adapter")}],
    )
    yield handle
    ray.kill(handle)


@pytest.fixture
def ask(engine: Any) -> Ask:
    def ask(operation: str = "chat", content: str = "Hello", **fields: Any) -> dict[str, Any]:
        ticket = fields.pop("ticket", {})
        body: dict[str, Any] = {"model": "small", **fields}
        if operation == "chat":
            body.setdefault("messages", [{"role": "user", "content": content}])
            body.setdefault("max_completion_tokens", 30)
        answer: dict[str, Any] = ray.get(engine.ask.remote(operation, body, **ticket), timeout=60)
        return answer

    return ask


def events(answer: dict[str, Any]) -> list[dict[str, Any]]:
    assert answer["error"] is None
    return [json.loads(chunk.removeprefix(b"data: ")) for chunk in answer["chunks"]]


def text(answer: dict[str, Any], index: int = 0) -> str:
    parts = []
    for event in events(answer):
        for choice in event["choices"]:
            if choice["index"] == index:
                parts.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
    return "".join(parts)


def arguments(answer: dict[str, Any]) -> str:
    calls = [
        call
        for event in events(answer)
        for call in event["choices"][0]["delta"].get("tool_calls") or ()
    ]
    assert "".join(call["function"].get("name") or "" for call in calls) == "get_weather"
    return "".join(call["function"].get("arguments") or "" for call in calls)


def test_chat_is_a_stream_that_carries_ids_usage_and_weights(ask: Ask) -> None:
    answer = ask(temperature=0, ticket={"request_id": "r-77"})
    assert text(answer) == "Hello! How can I help you today?"
    assert answer["started"] == ("replica-1", VERSION)
    assert {event["id"] for event in events(answer)} == {"chatcmpl-r-77"}
    assert {event["model"] for event in events(answer)} == {"small"}
    assert events(answer)[-1]["choices"][0]["finish_reason"] == "stop"
    assert events(answer)[-1]["system_fingerprint"] == VERSION
    usage_event = json.loads(answer["usage_event"].removeprefix(b"data: "))
    assert usage_event["choices"] == []
    assert usage_event["usage"]["total_tokens"] == answer["usage"].total_tokens
    assert answer["usage"].prompt_tokens > 10 < answer["usage"].completion_tokens
    assert not any(b"[DONE]" in chunk for chunk in answer["chunks"])


def test_completions_of_several_prompts(ask: Ask) -> None:
    answer = ask("completions", prompt=["The capital of", "One, two"], n=2, max_tokens=4)
    assert {c["index"] for event in events(answer) for c in event["choices"]} == {0, 1, 2, 3}
    assert answer["usage"].completion_tokens <= 16


def test_an_adapter_answers_under_its_own_id_and_version(ask: Ask) -> None:
    answer = ask(model="small-adapter", temperature=0, logprobs=True)
    base = ask(temperature=0, logprobs=True)
    assert answer["started"] == ("replica-1", ADAPTER_VERSION)
    assert events(answer)[-1]["system_fingerprint"] == ADAPTER_VERSION
    assert {event["model"] for event in events(answer)} == {"small-adapter"}

    def logprobs(of: dict[str, Any]) -> list[float]:
        choices = [event["choices"][0] for event in events(of)]
        return [t["logprob"] for c in choices for t in (c["logprobs"] or {}).get("content", ())]

    assert logprobs(answer) != logprobs(base)


def test_json_schema_binds_the_answer(ask: Ask) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": schema, "strict": True}}
    value = json.loads(text(ask(response_format=form, max_completion_tokens=100)))
    assert set(value) == {"name", "age"}
    assert 0 <= value["age"] <= 99


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_required_tool_call_has_valid_arguments(ask: Ask, choice: Any) -> None:
    answer = ask(tools=TOOLS, tool_choice=choice, max_completion_tokens=200, temperature=0)
    assert set(json.loads(arguments(answer))) == {"city"}


def test_tool_results_are_read(ask: Ask) -> None:
    call = {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    messages = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    assert ask(messages=messages, tools=TOOLS)["error"] is None


def test_logprobs_choices_stop_and_seed(ask: Ask) -> None:
    answer = ask(logprobs=True, top_logprobs=3, max_completion_tokens=3)
    first = next(e["choices"][0]["logprobs"] for e in events(answer) if e["choices"][0]["logprobs"])
    assert len(first["content"][0]["top_logprobs"]) == 3

    two = ask(n=2, temperature=1.5)
    assert text(two, 0) != text(two, 1)

    assert text(ask(stop=["help"], temperature=0)) == "Hello! How can I "

    seeded = [text(ask(seed=7, temperature=1.3, content="Tell me")) for _ in range(2)]
    assert seeded[0] == seeded[1] != ""


def test_the_ticket_bounds_the_answer_whatever_the_body_says(ask: Ask) -> None:
    long = {"ignore_eos": True, "max_completion_tokens": 500}
    assert ask(**long, ticket={"max_tokens": 7})["usage"].completion_tokens == 7
    assert ask(**long, n=2, ticket={"max_tokens": 8})["usage"].completion_tokens == 8
    assert ask(**long, min_tokens=400, ticket={"max_tokens": 5})["usage"].completion_tokens == 5
    answer = ask("completions", prompt=["a", "b", "c"], max_tokens=4, ticket={"max_tokens": 8})
    assert answer["error"][0] == "limit_exceeded"


def test_the_ticket_bounds_the_context(ask: Ask) -> None:
    answer = ask(ignore_eos=True, max_completion_tokens=500, ticket={"context_tokens": 40})
    assert answer["usage"].total_tokens == 40
    refused = ask(content="word " * 60, ticket={"context_tokens": 40})
    assert refused["error"][0] == "context_length_exceeded"
    assert refused["started"] is None


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"content": "word " * 3000}, "context_length_exceeded", None),
        ({"temperature": -1}, "invalid_request", "temperature"),
        ({"logit_bias": {"999999": 1}}, "invalid_request", "logit_bias"),
        ({"logprobs": True, "top_logprobs": 99}, "invalid_request", "logprobs"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "invalid_request", None),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "p", "schema": {"type": "nonsense"}},
                }
            },
            "invalid_request",
            None,
        ),
        ({"n": "many"}, "invalid_request", "n"),
    ],
)
def test_refusals_come_before_the_start_in_our_words(
    ask: Ask, fields: dict[str, Any], code: str, param: str | None
) -> None:
    answer = ask(**fields)
    assert answer["started"] is None
    assert answer["chunks"] == []
    assert (answer["error"][0], answer["error"][2]) == (code, param)
    assert not re.search(r"vllm|/|Traceback|999999|nonsense|wizard", answer["error"][1])


def test_the_ticket_must_be_for_the_model_of_the_body(ask: Ask) -> None:
    assert ask(ticket={"audience": "small-adapter"})["error"][0] == "engine_failed"


def test_without_a_ticket_the_engine_serves_nothing(engine: Any) -> None:
    assert ray.get(engine.bypass.remote()) == "engine_failed"


def test_a_generating_model_does_not_embed(ask: Ask) -> None:
    assert ask("embeddings", input="x")["error"][0] == "invalid_request"


def test_token_ids_become_text_within_the_vocabulary(engine: Any) -> None:
    texts = ray.get(engine.detokenize.remote([[1], [1, 2], []]))
    assert texts == ["<|im_start|>", "<|im_start|><|im_end|>", ""]
    for bad in ([[10**6]], [[-1]], [["a"]], [[True]]):
        assert ray.get(engine.detokenize.remote(bad)) == "invalid_request"


LONG = {
    "model": "small",
    "messages": [{"role": "user", "content": "Hello"}],
    "max_completion_tokens": 900,
    "ignore_eos": True,
}


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_leaving_an_answer_stops_the_work(engine: Any, how: str) -> None:
    before, seconds = ray.get(engine.leave.remote(LONG, how), timeout=60)
    assert before == 1
    assert seconds < 1


def test_the_load_is_what_runs_and_waits(engine: Any) -> None:
    body = {**LONG, "max_completion_tokens": 60}
    *during, after = ray.get(engine.loads.remote(body, 12), timeout=60)
    assert max(running for running, _, _ in during) == 8
    assert max(waiting for _, waiting, _ in during) == 4
    assert max(usage for _, _, usage in during) > 0
    assert after == (0, 0, 0)


def test_a_killed_engine_process_is_an_error_and_known(engine: Any) -> None:
    """Last of those that share the engine: it is dead afterwards."""
    first, second, dead = ray.get(engine.kill_engine.remote(LONG), timeout=60)
    assert first[0] == "engine_failed"
    assert second[0] == "engine_unavailable"
    assert dead


def test_embeddings(cluster: None) -> None:
    handle = host(engine=ENGINE, operations=["embeddings"])
    try:
        body = {"model": "small", "input": ["a desk", "a chair"]}
        answer = ray.get(handle.ask.remote("embeddings", body, request_id="r-5"), timeout=60)
        assert answer["error"] is None
        (whole,) = (json.loads(chunk) for chunk in answer["chunks"])
        assert whole["id"] == "embd-r-5"
        assert whole["model"] == "small"
        assert len(whole["data"][0]["embedding"]) == 128
        assert whole["data"][0]["embedding"] != whole["data"][1]["embedding"]
        assert answer["usage"].prompt_tokens == whole["usage"]["prompt_tokens"] > 0

        coded = {**body, "encoding_format": "base64"}
        packed = json.loads(ray.get(handle.ask.remote("embeddings", coded))["chunks"][0])
        values = struct.unpack("<128f", base64.b64decode(packed["data"][0]["embedding"]))
        assert values == pytest.approx(whole["data"][0]["embedding"], abs=1e-3)

        long = {"model": "small", "input": "word " * 3000}
        error = ray.get(handle.ask.remote("embeddings", long))["error"]
        assert error[0] == "context_length_exceeded"
    finally:
        ray.kill(handle)
