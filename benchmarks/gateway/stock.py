"""Ray's own OpenAI ingress (``ray.serve.llm``) over an instant engine, for comparison.

Everything in front of the engine interface is Ray's, with its defaults; tokens of a stream are
thus put together for up to 50 ms (``MODEL_RESPONSE_BATCH_TIMEOUT_MS``). Imported in Ray workers
through ``RAYLLM_VLLM_ENGINE_CLS``; needs vLLM, as Ray's ingress does.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import Any

import orjson
from ray.llm._internal.serve.core.engine.protocol import LLMEngine
from ray.serve.llm.openai_api_models import ChatCompletionResponse

from benchmarks.gateway.instant import _FIRST, _LAST, _USAGE, PLAIN_WORDS, STREAM_WORDS, chunk

_EVENTS = [
    part.decode()
    for part in (_FIRST, *(chunk({"content": word}) for word in STREAM_WORDS), _LAST, _USAGE)
] + ["data: [DONE]\n\n"]
_PACE = re.compile(r"pace=(\d+)")
_ANSWER = {
    "id": "chatcmpl-mock",
    "object": "chat.completion",
    "created": 1700000000,
    "model": "mock-8b",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(PLAIN_WORDS)},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 32, "completion_tokens": 24, "total_tokens": 56},
}


class InstantStockEngine(LLMEngine):  # type: ignore[misc]
    """Answers like ``InstantBackend`` behind Ray's engine interface."""

    def __init__(self, llm_config: Any) -> None:
        super().__init__(llm_config)

    async def start(self) -> None:
        """Nothing to load."""

    async def shutdown(self) -> None:
        """Nothing to stop."""

    async def check_health(self) -> None:
        """Always well."""

    def routing_stats(self) -> dict[str, Any]:
        """None."""
        return {}

    async def resolve_lora(self, lora_model: Any) -> None:
        """No adapters."""

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        """The fixed answer; ``pace=N`` in the prompt waits N ms before each word."""
        if request.stream:
            pace = _PACE.search(str(request.messages[-1]))
            for index, event in enumerate(_EVENTS):
                if pace and 0 < index <= len(STREAM_WORDS):
                    await asyncio.sleep(int(pace[1]) / 1000)
                yield event
        else:
            yield ChatCompletionResponse.model_validate(orjson.loads(orjson.dumps(_ANSWER)))

    async def completions(self, request: Any, info: Any = None) -> AsyncGenerator[Any, None]:
        """Not part of the measurement."""
        raise NotImplementedError
        yield

    async def embeddings(self, request: Any, info: Any = None) -> AsyncGenerator[Any, None]:
        """Not part of the measurement."""
        raise NotImplementedError
        yield

    async def transcriptions(self, request: Any, info: Any = None) -> AsyncGenerator[Any, None]:
        """Not part of the measurement."""
        raise NotImplementedError
        yield

    async def reset_prefix_cache(self) -> None:
        """There is none."""
