"""The request path in this process, with engines that answer at once.

What is real: the application, the gateway with policy and the sample rules, the router, the trail
on disk. What is not: engines, network, and identity, which is a table of one token.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from deployments.api.admin import AdminApi
from deployments.api.app import create_app
from deployments.api.completions import BodyLimits
from governance.admission.limits import Lease, RateLimiter
from governance.audit.keystore import FileKeystore
from governance.audit.segments import read_records
from governance.audit.turns import TurnAudit
from governance.audit.writer import AuditWriter
from governance.errors import GatehouseError, Unauthenticated
from governance.gateway import Gateway
from governance.nulls import NullInspector, NullLedger
from governance.policy.engine import CompiledPolicy
from governance.policy.load import load_policy
from governance.ports import AuditLog, Policy, Router
from governance.types import (
    Dispatch,
    EngineChunk,
    EngineEvent,
    EngineFinished,
    EngineStarted,
    Limits,
    ModelInfo,
    Operation,
    Principal,
    PrincipalKind,
    Usage,
)
from routing.types import ModelLoad

ROOT = Path(__file__).resolve().parents[2]
GENERATE = frozenset({Operation.CHAT, Operation.COMPLETIONS})
MODELS = (
    ModelInfo("small", "small", GENERATE, 4096, "small"),
    ModelInfo("large", "large", GENERATE, 4096, "large"),
)
WHO = Principal(
    PrincipalKind.USER,
    "analyst",
    "proof",
    "hr",
    frozenset({"employee", "analyst"}),
    "pseudonym-of-analyst",
)


@dataclass
class InstantEngines:
    """Both models: each says its own name some times, or what it is told to; or fails."""

    answers: dict[str, str] = field(default_factory=dict)
    """Text of a model; its name, six times, where there is none."""
    logprob: float = -0.05
    """Of every token."""
    before: dict[str, GatehouseError] = field(default_factory=dict)
    """Raised by a model before it takes the request."""
    taken: dict[str, GatehouseError] = field(default_factory=dict)
    """Raised after it has taken the request, before the first piece."""
    midway: dict[str, GatehouseError] = field(default_factory=dict)
    """Raised after the first piece."""
    running: dict[str, int] = field(default_factory=dict)
    """Requests that a model says it works on for others."""
    calls: list[str] = field(default_factory=list)

    def ready(self, base_model: str) -> bool:
        """Always."""
        return True

    def load(self, base_model: str) -> ModelLoad:
        """As it is told."""
        return ModelLoad(replicas=1, running=self.running.get(base_model, 0), slots=256)

    async def detokenize(self, base_model: str, prompts: list[list[int]]) -> list[str]:
        """Not part of the proof."""
        return ["" for _ in prompts]

    async def stream(self, dispatch: Dispatch) -> AsyncGenerator[EngineEvent, None]:
        """Answer."""
        name = dispatch.model
        self.calls.append(name)
        if name in self.before:
            raise self.before[name]
        yield EngineStarted(f"{name}-1", "sha256:" + "0" * 64, "instant", 9)
        if name in self.taken:
            raise self.taken[name]
        words = self.answers.get(name, f"{name} " * 6).split()
        for number, word in enumerate(words):
            if number and name in self.midway:
                raise self.midway[name]
            piece = self._piece(dispatch, f"{word} ", last=number == len(words) - 1)
            yield EngineChunk(piece, 1, 1000 * (number + 1))
            await asyncio.sleep(0)
        yield EngineFinished(Usage(9, len(words)), b"", 1000 * len(words))

    def _piece(self, dispatch: Dispatch, text: str, *, last: bool) -> bytes:
        token = {"token": "x", "logprob": self.logprob, "bytes": None, "top_logprobs": []}
        asked = json.loads(dispatch.body).get("logprobs")
        choice = {
            "index": 0,
            "delta": {"content": text},
            "logprobs": {"content": [token]} if asked else None,
            "finish_reason": "stop" if last else None,
        }
        body = {
            "id": f"chatcmpl-{dispatch.request_id}",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": dispatch.model,
            "choices": [choice],
        }
        return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


class OneToken:
    """Knows one caller."""

    async def authenticate(self, authorization: str | None) -> Principal:
        """Give the caller, or refuse."""
        if authorization != "Bearer proof":
            raise Unauthenticated()
        return WHO


class NoControl:
    """Administration is not part of the proof."""

    def __getattr__(self, name: str) -> Any:
        """Fail."""
        raise AssertionError(f"control plane called: {name}")


@dataclass
class RequestPath:
    """What a proof holds: a client, the engines, the trail."""

    client: httpx.AsyncClient
    engines: InstantEngines
    gateway: Gateway
    wal: Path

    async def ask(self, text: str, *, stream: bool = False, **fields: Any) -> Answered:
        """One chat request to ``auto``."""
        body = {
            "model": "auto",
            "messages": [{"role": "user", "content": text}],
            "stream": stream,
            **fields,
        }
        began, busy = time.perf_counter(), time.thread_time()
        answer = await self.client.post(
            "/v1/chat/completions", json=body, headers={"authorization": "Bearer proof"}
        )
        took_ms, cpu_ms = (
            1000 * (now - then)
            for now, then in ((time.perf_counter(), began), (time.thread_time(), busy))
        )
        headers = dict(answer.headers)
        return Answered(answer.status_code, headers, answer.content, stream, took_ms, cpu_ms)

    def records(self, request_id: str) -> list[dict[str, Any]]:
        """What the trail holds of a request, in order; ``route`` is the detail of the choice."""
        found = [r for r in read_records(self.wal) if r.get("request_id") == request_id]
        for record in found:
            record["route"] = json.loads(record["detail"] or "{}").get("route", {})
        return found


@dataclass(frozen=True, slots=True)
class Answered:
    """What a client got."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    streamed: bool
    took_ms: float
    cpu_ms: float
    """Of the thread in which client and gateway run."""

    @property
    def request_id(self) -> str:
        """As the headers say."""
        return self.headers["x-gatehouse-request-id"]

    @property
    def text(self) -> str:
        """The answer's text."""
        if not self.streamed:
            return str(json.loads(self.body)["choices"][0]["message"]["content"])
        parts = [p[6:] for p in self.body.decode().split("\n\n") if p.startswith("data: {")]
        events = [json.loads(part) for part in parts]
        choices = [choice for event in events for choice in event.get("choices") or ()]
        return "".join(choice["delta"].get("content") or "" for choice in choices)


@asynccontextmanager
async def request_path(
    folder: Path,
    router: Router,
    engines: InstantEngines,
    tapped: Callable[[TurnAudit, Policy], AuditLog] | None = None,
) -> AsyncIterator[RequestPath]:
    """A gateway with its application and its trail; the router and the engines are given.

    Args:
        folder: For the trail and its keys.
        router: Chooses.
        engines: Answer.
        tapped: Puts something between gateway and trail.
    """

    def clock() -> int:
        return time.time_ns() // 1000

    writer = AuditWriter.open(folder / "wal", "proof", clock=clock)
    audit = TurnAudit(writer, FileKeystore(folder / "keys", clock=clock), clock)
    policy = CompiledPolicy(load_policy(ROOT / "config" / "policy.yaml", MODELS), MODELS)
    gateway = Gateway(
        models=MODELS,
        authenticator=OneToken(),
        policy=policy,
        limiter=_Unlimited(time.monotonic),
        inspector=NullInspector(),
        router=router,
        ledger=NullLedger(),
        audit=audit if tapped is None else tapped(audit, policy),
        engine=engines,
        clock=clock,
        max_answer_tokens=256,
    )
    app = create_app(
        gateway,
        AdminApi(NoControl(), lambda who, permission: None),  # type: ignore[arg-type]
        BodyLimits(1 << 20, 2.0, 1.0),
        ready=lambda: {"models": True},
        created_s=1,
        version="proof",
    )
    transport = httpx.ASGITransport(app)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://proof") as client:
            yield RequestPath(client, engines, gateway, folder / "wal")
    finally:
        await gateway.drain()
        await audit.close()
        await writer.close()


class _Unlimited(RateLimiter):
    """The sample policy lets a person ask once a second; a proof asks faster."""

    def acquire(self, key: str, limits: Limits) -> Lease:
        """Admit everything; what runs is still counted."""
        return super().acquire(key, Limits())
