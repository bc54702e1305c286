"""Doubles of the ports, for tests that need the request path and no network.

``ScriptedEngine`` implements ``governance.ports.Engine`` and answers deterministically; it is held
to the same port contract as the real adapters where that matters.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping

from governance.errors import GatehouseError, Unauthenticated
from governance.types import (
    Dispatch,
    EngineChunk,
    EngineEvent,
    EngineFinished,
    EngineStarted,
    Operation,
    Principal,
    PrincipalKind,
    Turn,
    Usage,
)
from routing.types import ModelLoad

VERSION = "sha256:" + "ab" * 32


def sse(payload: object) -> bytes:
    """One server-sent event, as vLLM writes it (compact JSON)."""
    return b"data: " + json.dumps(payload, separators=(",", ":")).encode() + b"\n\n"


def principal(
    subject: str = "someone", department: str = "hr", roles: tuple[str, ...] = ("employee",)
) -> Principal:
    """A user."""
    return Principal(
        kind=PrincipalKind.USER,
        subject=subject,
        issuer="test",
        department=department,
        roles=frozenset(roles),
        key=f"key-of-{subject}",
    )


class TokenTable:
    """Authenticator over a fixed table of bearer tokens."""

    def __init__(self, table: Mapping[str, Principal]) -> None:
        self.table = table

    async def authenticate(self, authorization: str | None) -> Principal:
        token = (authorization or "").removeprefix("Bearer ")
        if token not in self.table:
            raise Unauthenticated()
        return self.table[token]


class RecordingAudit:
    """Audit log that keeps what it was told, in order."""

    def __init__(self, refuse: GatehouseError | None = None) -> None:
        self.entries: list[tuple[str, Turn]] = []
        self.refuse = refuse
        self.outputs: dict[str, bytes] = {}

    async def decided(self, turn: Turn) -> None:
        if self.refuse:
            raise self.refuse
        turn.decided_event_id = f"event-{len(self.entries)}"
        self.entries.append(("decided", turn))

    def output(self, turn: Turn, data: bytes) -> None:
        self.outputs[turn.request_id] = self.outputs.get(turn.request_id, b"") + data

    async def completed(self, turn: Turn) -> None:
        await asyncio.sleep(0)
        self.entries.append(("completed", turn))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.entries]


class ScriptedEngine:
    """Answers with ``words``, one chunk each; can fail or hang at a given chunk."""

    def __init__(
        self,
        words: tuple[str, ...] = ("Good", " morning"),
        *,
        fail_at: int | None = None,
        failure: GatehouseError | None = None,
        hang_at: int | None = None,
        delay_s: float = 0.0,
    ) -> None:
        self.words = words
        self.fail_at, self.failure, self.hang_at = fail_at, failure, hang_at
        self.delay_s = delay_s
        self.dispatched: list[Dispatch] = []
        self.closed = 0

    def ready(self, base_model: str) -> bool:
        return True

    def load(self, base_model: str) -> ModelLoad:
        return ModelLoad(replicas=1, slots=256)

    async def detokenize(self, base_model: str, prompts: list[list[int]]) -> list[str]:
        return [" ".join(f"t{token}" for token in prompt) for prompt in prompts]

    async def stream(self, dispatch: Dispatch) -> AsyncGenerator[EngineEvent, None]:
        self.dispatched.append(dispatch)
        try:
            if self.failure and self.fail_at is None:
                raise self.failure
            yield EngineStarted("replica-1", VERSION, "test", 3)
            if dispatch.operation is Operation.EMBEDDINGS:
                yield EngineChunk(
                    json.dumps(
                        {
                            "object": "list",
                            "model": dispatch.model,
                            "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 1.0]}],
                            "usage": {"prompt_tokens": 2, "total_tokens": 2},
                        }
                    ).encode()
                )
                yield EngineFinished(Usage(2, 0))
                return
            for number, word in enumerate(self.words):
                if self.fail_at == number and self.failure:
                    raise self.failure
                if self.hang_at == number:
                    await asyncio.Event().wait()
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                metered = (number + 1) * 1000
                yield EngineChunk(sse(self._chunk(dispatch, number, word)), 1, metered)
            count = len(self.words)
            usage = {
                "prompt_tokens": 3,
                "completion_tokens": count,
                "total_tokens": 3 + count,
            }
            event = sse({**self._head(dispatch), "choices": [], "usage": usage})
            yield EngineFinished(Usage(3, count), event, (count + 1) * 1000)
        finally:
            self.closed += 1

    def _head(self, dispatch: Dispatch) -> dict[str, object]:
        chat = dispatch.operation is Operation.CHAT
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{dispatch.request_id}",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": 1,
            "model": dispatch.model,
        }

    def _chunk(self, dispatch: Dispatch, number: int, word: str) -> dict[str, object]:
        last = number == len(self.words) - 1
        choice: dict[str, object] = {"index": 0, "finish_reason": "stop" if last else None}
        if dispatch.operation is Operation.CHAT:
            choice["delta"] = {"content": word, **({"role": "assistant"} if not number else {})}
        else:
            choice["text"] = word
        chunk = {**self._head(dispatch), "choices": [choice]}
        if last:
            chunk["system_fingerprint"] = VERSION
        return chunk
