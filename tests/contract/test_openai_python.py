"""The official Python SDK, unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import openai
import pytest
from openai import OpenAI

from governance.errors import EngineFailed, EngineUnavailable
from tests.contract.conftest import Server
from tests.doubles import VERSION

HELLO: list[dict[str, str]] = [{"role": "user", "content": "hello"}]


Connect = Callable[..., OpenAI]


@pytest.fixture
def client(server: Server) -> Iterator[Connect]:
    """Clients by identity; closed at the end."""
    with ExitStack() as opened:

        def connect(identity: str = "data-scientist") -> OpenAI:
            return opened.enter_context(OpenAI(base_url=server.v1, api_key=identity, max_retries=0))

        yield connect


def test_chat(client: Connect) -> None:
    raw = client().chat.completions.with_raw_response.create(model="small", messages=HELLO)
    answer = raw.parse()
    assert answer.choices[0].message.content == "Good morning"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 5
    assert answer.system_fingerprint == VERSION
    assert raw.headers["x-gatehouse-model"] == "small"
    assert raw.headers["x-gatehouse-model-version"] == VERSION
    assert raw.headers["x-gatehouse-request-id"] in answer.id
    assert raw.headers["x-gatehouse-decision-id"].startswith("dec_")


def test_stream(client: Connect) -> None:
    chunks = list(client().chat.completions.create(model="small", messages=HELLO, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Good morning"
    assert all(c.usage is None for c in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_stream_with_usage(client: Connect) -> None:
    chunks = list(
        client().chat.completions.create(
            model="small", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2


def test_completions(client: Connect) -> None:
    answer = client().completions.create(model="small", prompt="hello")
    assert answer.choices[0].text == "Good morning"


def test_embeddings(client: Connect) -> None:
    answer = client().embeddings.create(model="vectors", input=["a"], encoding_format="float")
    assert answer.data[0].embedding == [0.5, 1.0]


def test_models_differ_by_identity(client: Connect) -> None:
    assert {m.id for m in client("marketing-intern").models.list()} == {"small"}
    assert {m.id for m in client().models.list()} == {"small", "large", "vectors"}
    assert client().models.retrieve("large").id == "large"
    with pytest.raises(openai.NotFoundError):
        client("marketing-intern").models.retrieve("large")


def test_errors_become_the_sdks_exceptions(client: Connect) -> None:
    with pytest.raises(openai.AuthenticationError):
        client("nobody").chat.completions.create(model="small", messages=HELLO)
    with pytest.raises(openai.NotFoundError) as missing:
        client("marketing-intern").chat.completions.create(model="large", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.PermissionDeniedError) as blocked:
        client("marketing-intern").completions.create(model="small", prompt="x")
    assert blocked.value.code == "blocked_by_policy"
    with pytest.raises(openai.BadRequestError) as invalid:
        client().chat.completions.create(model="small", messages=HELLO, n=99)
    assert invalid.value.param == "n"
    with pytest.raises(openai.BadRequestError) as forbidden:
        client().chat.completions.create(
            model="small", messages=HELLO, extra_body={"priority": -100}
        )
    assert forbidden.value.code == "forbidden_field"


def test_a_failure_in_mid_stream_is_an_error_and_no_end(server: Server, client: Connect) -> None:
    server.engine.fail_at, server.engine.failure = 1, EngineFailed()
    stream = client().chat.completions.create(model="small", messages=HELLO, stream=True)
    seen = []
    with pytest.raises(openai.APIError) as caught:
        seen.extend(stream)
    assert "".join(c.choices[0].delta.content or "" for c in seen) == "Good"
    assert caught.value.code == "engine_failed"


def test_a_failure_before_the_first_chunk_is_a_status(server: Server, client: Connect) -> None:
    server.engine.failure = EngineUnavailable("", None, 3)
    with pytest.raises(openai.InternalServerError) as caught:
        client().chat.completions.create(model="small", messages=HELLO)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "3"
