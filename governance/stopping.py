"""Ends an answer in order where its budget is used up, as if it had reached its length.

The engine is aborted, so nothing more comes from it, and the end that a client waits for is made
here: for each choice that has not ended, one event with ``finish_reason: "length"`` and, beside
OpenAI's fields, the reason. What was generated before is the client's: it is paid for.

Only where something was generated: before that, the request is refused as one that never fitted.
A limit that is met on the very last token ends nothing, since nothing more is to come.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import orjson

from governance.errors import BudgetExhausted, EngineFailed
from governance.types import (
    Charge,
    EngineChunk,
    EngineFinished,
    EngineStarted,
    InferenceRequest,
    Operation,
    Stop,
    Usage,
)

LENGTH = "length"

_FINISH = b'"finish_reason":"'
"""Cannot be imitated by generated text, in which JSON escapes the quotes."""
_DATA, _END = b"data: ", b"\n\n"
_OF_THE_HEAD = ("id", "object", "created", "model")


class Ending:
    """Follows one answer, so that it can be ended at any chunk; parses only what ends a choice.

    Args:
        request: What was asked.
    """

    def __init__(self, request: InferenceRequest) -> None:
        self._chat = request.operation is Operation.CHAT
        self._embeddings = request.operation is Operation.EMBEDDINGS
        self._choices = request.choices
        self._ended: set[int] = set()
        self._last = b""
        self._started: EngineStarted | None = None
        self._tokens = 0

    def began(self, started: EngineStarted) -> None:
        """An engine has taken the request."""
        self._started = started

    def saw(self, chunk: EngineChunk) -> None:
        """Take note of a chunk, as the engine gave it."""
        self._tokens += chunk.tokens
        self._last = chunk.data
        if _FINISH in chunk.data and not self._embeddings:
            for event in _events(chunk.data):
                for choice in event.get("choices") or ():
                    if choice.get("finish_reason"):
                        self._ended.add(choice.get("index", 0))

    @property
    def complete(self) -> bool:
        """Every choice has ended; only the engine's account is to come."""
        return len(self._ended) >= self._choices

    @property
    def possible(self) -> bool:
        """Whether there is an answer to end: something was generated."""
        return self._tokens > 0 and not self._embeddings

    @property
    def usage(self) -> Usage:
        """What was consumed, as far as the gateway knows."""
        prompt = self._started.prompt_tokens if self._started is not None else 0
        return Usage(prompt, self._tokens)

    def events(self, stop: Stop, request_id: str) -> EngineChunk:
        """The events that end every choice that has not ended.

        Raises:
            EngineFailed: The last chunk is no event of an answer.
        """
        extension = {"request_id": request_id, "stopped": stop_object(stop)}
        head = self._head()
        data = []
        for index in range(self._choices):
            if index in self._ended:
                continue
            choice: dict[str, Any] = {"index": index}
            choice["delta" if self._chat else "text"] = {} if self._chat else ""
            choice |= {"logprobs": None, "finish_reason": LENGTH, "stop_reason": None}
            data.append(_event({**head, "choices": [choice], "gatehouse": extension}))
        return EngineChunk(b"".join(data))

    def finished(self) -> EngineFinished:
        """The end, with the usage event that the engine will not send any more."""
        usage = self.usage
        event = {**self._head(), "choices": [], "usage": usage_object(usage)}
        return EngineFinished(usage, _event(event), None)

    def _head(self) -> dict[str, Any]:
        last = next(iter(_events(self._last)), {})
        head: dict[str, Any] = {name: last.get(name) for name in _OF_THE_HEAD}
        if self._started is not None:
            head["system_fingerprint"] = self._started.model_version
        return head


def stop_of(error: BudgetExhausted, charge: Charge | None) -> Stop:
    """Why an answer is ended, from the error that it would have been."""
    left = error.shortage
    if left is None:
        return Stop(error.code, None if charge is None else charge.account)
    return Stop(error.code, left.account, left.window, left.reset_us, left.owner)


def stop_object(stop: Stop) -> dict[str, Any]:
    """``stopped`` of the ``gatehouse`` object; what is not known is ``null``."""
    reset = reset_at = None
    if stop.reset_us is not None:
        reset_at = -(-stop.reset_us // 1_000_000)
        reset = f"{datetime.fromtimestamp(reset_at, UTC):%Y-%m-%dT%H:%M:%SZ}"
    return {
        "code": stop.code,
        "account": stop.account,
        "window": stop.window,
        "reset": reset,
        "reset_at": reset_at,
        "owner": stop.owner,
    }


def usage_object(usage: Usage) -> dict[str, Any]:
    """Usage as OpenAI's object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _event(payload: dict[str, Any]) -> bytes:
    return _DATA + orjson.dumps(payload) + _END


def _events(data: bytes) -> list[dict[str, Any]]:
    """Payloads of complete events; comments, which keep a connection alive, have none."""
    try:
        parts = [part for part in data.split(_END) if part.startswith(_DATA)]
        return [orjson.loads(part[len(_DATA) :]) for part in parts]
    except ValueError:
        raise EngineFailed from None  # no text of it: an exception may quote the answer
