"""Folds the events of a stream into the body of a non-streaming answer.

The gateway always consumes a stream, so that it can stop at a chunk; a client that did not ask
for one gets the same content in one piece. Fields follow OpenAI's chat completion and completion
objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from governance.stopping import usage_object
from governance.types import Operation, Usage

_PREFIX = b"data: "


def events(data: bytes) -> Iterator[dict[str, Any]]:
    """The JSON payloads of complete server-sent events.

    Args:
        data: ``data: {...}`` events, each ended by a blank line.
    """
    for event in data.split(b"\n\n"):
        if event:
            yield orjson.loads(event[len(_PREFIX) :])


def with_field(data: bytes, closing: bytes, name: str, value: object) -> bytes:
    """JSON with one more field at its end, without parsing it.

    Args:
        data: A JSON object with at least one field, and what may stand before it.
        closing: What ``data`` ends in; unless it does, it is returned as it is.
        name: Name of the field.
        value: Its value.
    """
    if not data.endswith(closing):
        return data
    field = orjson.dumps({name: value})[1:-1]
    return b"".join([data[: -len(closing)], b",", field, closing])


class Assembler:
    """Collects the chunks of one answer."""

    def __init__(self, operation: Operation) -> None:
        self._chat = operation is Operation.CHAT
        self._head: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._texts: dict[tuple[int, str], list[str]] = {}

    def feed(self, data: bytes) -> None:
        """Take the events of one chunk in."""
        for event in events(data):
            if not self._head:
                self._head = event
            if event.get("system_fingerprint"):
                self._head["system_fingerprint"] = event["system_fingerprint"]
            for choice in event["choices"]:
                index = choice["index"]
                whole = self._choices.setdefault(index, {"index": index, "finish_reason": None})
                if self._chat:
                    self._fold_delta(whole, choice.get("delta") or {})
                elif choice.get("text"):
                    self._text(index, "text", choice["text"])
                if choice.get("logprobs"):
                    _fold_logprobs(whole, choice["logprobs"])
                for field in ("finish_reason", "stop_reason"):
                    if choice.get(field) is not None:
                        whole[field] = choice[field]

    def finish(self, usage: Usage, cost: dict[str, Any]) -> bytes:
        """The body of the whole answer; ``cost`` is its ``gatehouse`` object."""
        choices = [self._choices[index] for index in sorted(self._choices)]
        for choice in choices:
            self._complete(choice)
        body = {
            "id": self._head.get("id"),
            "object": "chat.completion" if self._chat else "text_completion",
            "created": self._head.get("created"),
            "model": self._head.get("model"),
            "system_fingerprint": self._head.get("system_fingerprint"),
            "choices": choices,
            "usage": usage_object(usage),
            "gatehouse": cost,
        }
        return orjson.dumps(body)

    def _text(self, index: int, field: str, text: str) -> None:
        self._texts.setdefault((index, field), []).append(text)

    def _fold_delta(self, whole: dict[str, Any], delta: dict[str, Any]) -> None:
        index = whole["index"]
        for field in ("content", "reasoning", "reasoning_content", "refusal"):
            if delta.get(field):
                self._text(index, field, delta[field])
        for call in delta.get("tool_calls") or ():
            _fold_tool_call(whole.setdefault("tool_calls", {}), call)

    def _complete(self, choice: dict[str, Any]) -> None:
        index = choice["index"]
        choice.setdefault("logprobs", None)
        if not self._chat:
            choice["text"] = "".join(self._texts.get((index, "text"), ()))
            return
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        for field in ("content", "reasoning", "reasoning_content", "refusal"):
            if parts := self._texts.get((index, field)):
                message[field] = "".join(parts)
        calls = choice.pop("tool_calls", None)
        if calls:
            message["tool_calls"] = [_close_call(calls[position]) for position in sorted(calls)]
        elif message["content"] is None:
            message["content"] = ""
        choice["message"] = message


def _fold_tool_call(calls: dict[int, dict[str, Any]], part: dict[str, Any]) -> None:
    call = calls.setdefault(
        part.get("index", 0), {"id": None, "type": "function", "name": "", "arguments": []}
    )
    if part.get("id"):
        call["id"] = part["id"]
    function = part.get("function") or {}
    if function.get("name"):
        call["name"] += function["name"]
    if function.get("arguments"):
        call["arguments"].append(function["arguments"])


def _close_call(call: dict[str, Any]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": "".join(call["arguments"])}
    return {"id": call["id"], "type": call["type"], "function": function}


def _fold_logprobs(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Lists of log-probabilities grow chunk by chunk, in chat and completions alike."""
    logprobs = whole.setdefault("logprobs", {})
    for field, values in part.items():
        if isinstance(values, list):
            logprobs.setdefault(field, []).extend(values)
        else:
            logprobs.setdefault(field, values)
