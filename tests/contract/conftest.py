"""The HTTP application on a real port, with the real request path and a scripted engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from benchmarks.platform import free_port
from deployments.api.admin import AdminApi
from deployments.api.app import create_app
from deployments.api.completions import BodyLimits
from deployments.api.usage import UsageApi
from governance.admission.limits import RateLimiter
from governance.budget.messages import AccountState
from governance.errors import NotPermitted
from governance.gateway import Gateway
from governance.nulls import FixedRouter, NullInspector, NullLedger
from governance.policy.engine import CompiledPolicy
from governance.policy.load import load_policy
from governance.types import Amount, ModelInfo, Operation, Principal
from tests.doubles import RecordingAudit, ScriptedEngine, TokenTable, principal

ROOT = Path(__file__).resolve().parents[2]
GENERATE = frozenset({Operation.CHAT, Operation.COMPLETIONS})
MODELS = (
    ModelInfo("small", "small", GENERATE, 1024, "small"),
    ModelInfo("large", "large", GENERATE, 1024, "large"),
    ModelInfo("vectors", "embedding", frozenset({Operation.EMBEDDINGS}), 512, "vectors"),
)
TOKENS = {
    "hr-analyst": principal("hr-analyst", "hr", ("employee", "analyst")),
    "data-scientist": principal("data-scientist", "data-science", ("employee", "data-scientist")),
    "marketing-intern": principal("marketing-intern", "marketing", ("employee", "intern")),
    "platform-admin": principal("platform-admin", "platform", ("employee", "platform-admin")),
}
MAX_BODY_BYTES = 1 << 20


@dataclass
class Server:
    """A running gateway and its parts."""

    url: str
    engine: ScriptedEngine
    audit: RecordingAudit
    gateway: Gateway
    app: Any
    admin_calls: list[tuple[str, Any]] = field(default_factory=list)

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"


@pytest.fixture
def server() -> Iterator[Server]:
    """A gateway of its own for each test: tests change its engine."""
    engine, audit = ScriptedEngine(), RecordingAudit()
    policy = CompiledPolicy(load_policy(ROOT / "config" / "policy.yaml", MODELS), MODELS)
    gateway = Gateway(
        models=MODELS,
        authenticator=TokenTable(TOKENS),
        policy=policy,
        limiter=RateLimiter(time.monotonic),
        inspector=NullInspector(),
        router=FixedRouter(),
        ledger=NullLedger(),
        audit=audit,
        engine=engine,
        clock=lambda: time.time_ns() // 1000,
        max_answer_tokens=64,
    )

    def authorize(who: Principal, permission: str) -> None:
        if not policy.permits(who, permission):
            raise NotPermitted()

    app = create_app(
        gateway,
        AdminApi(NoControl(), authorize),
        BodyLimits(MAX_BODY_BYTES, 2.0, 1.0),
        ready=lambda: {"models": True},
        created_s=1,
        version="test",
        usage=UsageApi(StillLedger(), authorize),
    )
    port = free_port()
    config = uvicorn.Config(
        app, host="127.0.0.1", port=port, log_level="warning", ws="none", lifespan="off"
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(running.serve()), daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.005)
    yield Server(f"http://127.0.0.1:{port}", engine, audit, gateway, app)
    running.should_exit = True
    running.force_exit = True
    thread.join(10)
    assert not thread.is_alive()


class StillLedger:
    """Accounts in which nothing happens; these tests change no budgets."""

    async def state(
        self, account: str | None = None, users: bool = False
    ) -> tuple[AccountState, ...]:
        now_us, nothing = time.time_ns() // 1000, Amount()
        hr = AccountState(
            account="hr",
            window="hour",
            window_start_us=now_us,
            reset_us=now_us + 60_000_000,
            limit_us=60_000_000,
            limit_tokens=None,
            spent=nothing,
            leased=nothing,
            open=nothing,
            overridden_until_us=None,
        )
        accounts = (hr, replace(hr, account="data-science", limit_us=None, limit_tokens=1000))
        return tuple(a for a in accounts if account in (None, a.account))

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"ledger called: {name}")


class NoControl:
    """A control plane that is never reached: these tests stop before it."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"control plane called: {name}")
