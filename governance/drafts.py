"""Holds back the beginning of an answer until it is known whether it will be kept.

In a cascade the small model answers first. Its tokens' log-probabilities are asked for even where
the client did not, read here, and taken out again before anything is released.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson

from governance.errors import EngineFailed
from governance.ports import Draft
from governance.types import EngineChunk, InferenceRequest, Operation
from routing.types import Verdict

_DATA = b"data: "
_END = b"\n\n"


class Escalated(Exception):
    """The answer was judged and is not kept; the next model answers."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.reason)
        self.verdict = verdict


def can_draft(request: InferenceRequest) -> bool:
    """Whether an answer to this request can be held back and judged: one choice of text."""
    return request.operation in (Operation.CHAT, Operation.COMPLETIONS) and request.choices == 1


def with_logprobs(request: InferenceRequest) -> InferenceRequest:
    """The same request, whose answer carries the log-probability of each token."""
    if _asks_for_logprobs(request):
        return request
    asked: bool | int = True if request.operation is Operation.CHAT else 0
    return replace(request, body={**request.body, "logprobs": asked})


def _asks_for_logprobs(request: InferenceRequest) -> bool:
    """In completions 0 asks for those of the answer's own tokens."""
    asked = request.body.get("logprobs")
    return asked is not None and asked is not False


class DraftReader:
    """Feeds an answer to its judge, and gives it back as the client asked for it.

    Args:
        draft: The judge.
        request: As the client sent it.
    """

    def __init__(self, draft: Draft, request: InferenceRequest) -> None:
        self._draft = draft
        self._strip = not _asks_for_logprobs(request)
        self._chat = request.operation is Operation.CHAT
        self._finish_reason: str | None = None
        self._tokens = 0
        self.judged = False

    @property
    def due(self) -> bool:
        """Whether enough of an answer that goes on is there for a verdict.

        One that has ended is judged when the engine has said what it took, a frame later.
        """
        return self._finish_reason is None and self._tokens >= self._draft.hold_tokens

    def read(self, chunk: EngineChunk) -> EngineChunk:
        """Take in a chunk; gives it without what the client did not ask for."""
        if self.judged and not self._strip:
            return chunk
        self._tokens += chunk.tokens
        try:
            events = [self._event(part) for part in chunk.data.split(_END) if part]
        except (ValueError, TypeError, AttributeError, KeyError):
            raise EngineFailed from None  # no text of it: an exception may quote the answer
        return replace(chunk, data=b"".join(events)) if self._strip else chunk

    def judge(self) -> Verdict:
        """Ask for the verdict, once.

        Raises:
            Escalated: The answer is not kept.
        """
        self.judged = True
        verdict = self._draft.verdict(self._finish_reason)
        if verdict.escalate:
            raise Escalated(verdict)
        return verdict

    def _event(self, part: bytes) -> bytes:
        if not part.startswith(_DATA):
            return part + _END  # a comment, which keeps a connection alive
        event: dict[str, Any] = orjson.loads(part.removeprefix(_DATA))
        for choice in event.get("choices") or ():
            if not self.judged:
                self._finish_reason = choice.get("finish_reason") or self._finish_reason
                self._draft.feed(self._text(choice), _logprobs(choice))
            if self._strip and "logprobs" in choice:
                choice["logprobs"] = None
        return _DATA + orjson.dumps(event) + _END

    def _text(self, choice: Mapping[str, Any]) -> str:
        text = (choice.get("delta") or {}).get("content") if self._chat else choice.get("text")
        return text or ""


def _logprobs(choice: Mapping[str, Any]) -> list[float]:
    """Log-probability of each token of a piece, in either form of the interface."""
    found = choice.get("logprobs") or {}
    if (content := found.get("content")) is not None:
        values = [token.get("logprob") for token in content]
    else:
        values = found.get("token_logprobs") or []
    return [float(value) for value in values if isinstance(value, int | float)]
