"""What vLLM answers, read as the events of the data plane. Pure: knows vLLM's words, not its code.

Errors are told apart by status and field, never by text; vLLM's text goes nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from governance.errors import (
    ContextLengthExceeded,
    EngineFailed,
    EngineUnavailable,
    GatehouseError,
    InvalidRequest,
    ModelNotFound,
)
from governance.protocol.fields import FORWARDED
from governance.types import EngineChunk, EngineFinished, Usage

_EVENT = "data: "
_DONE = "data: [DONE]"
_ERROR = 'data: {"error"'
# NOTE: these cannot be imitated by generated text, in which JSON escapes the quotes.
_USAGE = '"choices":[]'
_FINISH = '"finish_reason":"'
_ABORTED = ('"finish_reason":"abort"', '"finish_reason":"error"')

_NOISE = (',"token_ids":null', ',"prompt_token_ids":null', ',"prompt_text":null')
"""Fields of vLLM's own that clients may not ask for, so they are always empty."""

_PROMPT_TOO_LONG = frozenset({"input_text", "input_tokens"})
"""Where vLLM says that prompt and answer do not fit into the context."""
_FIELDS = frozenset(name for fields in FORWARDED.values() for name in fields)
_RETRY_AFTER_S = 2


def engine_error(status: int, field: str | None = None) -> GatehouseError:
    """Our error for a refusal of vLLM before it has answered anything.

    Args:
        status: HTTP status that vLLM gives.
        field: Its ``param``.
    """
    if field in _PROMPT_TOO_LONG:
        return ContextLengthExceeded()
    if status == 404:
        return ModelNotFound("", "model")
    if status == 503:
        return EngineUnavailable("", None, _RETRY_AFTER_S)
    if 400 <= status < 500 or status == 501:
        if field in _FIELDS:
            return InvalidRequest(f"The engine does not accept this value of {field}.", field)
        return InvalidRequest("The engine does not accept this request.")
    return EngineFailed()


class StreamReader:
    """Turns the server-sent events of one answer into our events.

    Args:
        model_version: Becomes ``system_fingerprint`` of the events that end a choice, and of the
            usage event.
        choices: Answers that were asked for.
        progress: Gives, for each chunk, answer tokens since the last one and device-microseconds
            so far. NOTE: events are not tokens: one may stand for several, or for none.
    """

    def __init__(
        self,
        model_version: str,
        choices: int,
        progress: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        self._stamp = f'data: {{"system_fingerprint":"{model_version}",'
        self._unfinished = choices
        self._progress = progress
        self._usage_event = b""
        self._usage = Usage()
        self._started = False

    def feed(self, event: str) -> EngineChunk | None:
        """Take one event; gives what is to be sent on, if anything.

        Raises:
            GatehouseError: The event is an error.
        """
        if event.startswith(_ERROR):
            raise self._error(event)
        if _USAGE in event:
            self._read_usage(event)
            return None
        if event.startswith(_DONE):
            return None
        self._started = True
        for noise in _NOISE:
            event = event.replace(noise, "")
        if _FINISH in event:
            if any(mark in event for mark in _ABORTED):
                raise EngineFailed()
            self._unfinished -= 1
            event = self._stamp + event.removeprefix(_EVENT).removeprefix("{")
        return EngineChunk(event.encode(), *self._progress())

    def finish(self) -> EngineFinished:
        """The end of the stream.

        Raises:
            EngineFailed: Not every choice ended, or usage is missing. A stream whose engine
                process was killed ends in order, with ``[DONE]``.
        """
        if self._unfinished > 0 or not self._usage_event:
            raise EngineFailed()
        return EngineFinished(self._usage, self._usage_event)

    def _read_usage(self, event: str) -> None:
        stamped = self._stamp + event.removeprefix(_EVENT).removeprefix("{")
        self._usage = usage_of(orjson.loads(event.removeprefix(_EVENT))["usage"])
        self._usage_event = stamped.encode()

    def _error(self, event: str) -> GatehouseError:
        if self._started:
            return EngineFailed()
        try:
            error = orjson.loads(event.removeprefix(_EVENT))["error"]
            return engine_error(int(error["code"]), error.get("param"))
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            return EngineFailed()


def usage_of(usage: dict[str, Any]) -> Usage:
    """Usage from OpenAI's object."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Usage(usage["prompt_tokens"], usage.get("completion_tokens") or 0, cached)
