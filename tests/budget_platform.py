"""A platform without engines: the HTTP application over a real ledger, for what only asks of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from benchmarks.platform import free_port
from deployments.api.admin import AdminApi
from deployments.api.app import create_app
from deployments.api.completions import BodyLimits
from deployments.api.usage import UsageApi
from deployments.ledger_budgets import Budgets
from deployments.ledger_calls import LedgerCalls
from deployments.ledger_service import LedgerService
from governance.admission.limits import RateLimiter
from governance.budget.config import BudgetsConfig
from governance.errors import NotPermitted
from governance.gateway import Gateway
from governance.nulls import FixedRouter, NullInspector, NullLedger
from governance.policy.engine import CompiledPolicy
from governance.policy.load import load_policy
from governance.types import Principal
from tests.contract.conftest import MODELS, ROOT, TOKENS, NoControl
from tests.doubles import RecordingAudit, ScriptedEngine, TokenTable


class BudgetPlatform:
    """Ledger and gateway in one thread's event loop; tokens are those of ``TOKENS``.

    Args:
        config: The budgets file.
        state: State root: the ledger's database and the logs of its audit events.
    """

    def __init__(self, config: BudgetsConfig, state: Path) -> None:
        self.url = ""
        self._budgets = Budgets(config, time.time_ns() // 1000)
        self._state = state
        self._server: uvicorn.Server | None = None
        self._failure: BaseException | None = None

    async def _serve(self) -> None:
        service = LedgerService(
            self._state / "ledger" / "ledger.sqlite",
            self._state / "wal",
            clock=_now_us,
            monotonic=time.monotonic,
        )
        service.start()

        async def link(method: str, *args: Any) -> Any:
            return await getattr(service, method)(*args)

        async def resolve() -> Any:
            return link

        calls = LedgerCalls(resolve, self._budgets.dump())
        await calls.ready()
        ledger = service._ledger
        assert ledger is not None
        self._server = uvicorn.Server(
            uvicorn.Config(
                _app(calls, lambda: ledger.tree), host="127.0.0.1", port=self._port(),
                log_level="warning", ws="none", lifespan="off",
            )
        )  # fmt: skip
        try:
            await self._server.serve()
        finally:
            await service.stop()

    def _port(self) -> int:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        return port

    @contextmanager
    def running(self) -> Iterator[BudgetPlatform]:
        """Serve until the end of the block."""

        def work() -> None:
            try:
                asyncio.run(self._serve())
            except BaseException as error:
                self._failure = error

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        until_s = time.monotonic() + 60
        while self._server is None or not self._server.started:
            if self._failure is not None:
                raise self._failure
            assert time.monotonic() < until_s, "it does not start"
            time.sleep(0.01)
        yield self
        self._server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()

    def environment(self, who: str) -> Mapping[str, str]:
        """Of a command line that asks it."""
        return {"GATEHOUSE_URL": self.url, "GATEHOUSE_TOKEN": who}


def _app(calls: LedgerCalls, tree: Any) -> Any:
    policy = CompiledPolicy(load_policy(ROOT / "config" / "policy.yaml", MODELS), MODELS)

    def authorize(who: Principal, permission: str) -> None:
        if not policy.permits(who, permission):
            raise NotPermitted

    gateway = Gateway(
        models=MODELS,
        authenticator=TokenTable(TOKENS),
        policy=policy,
        limiter=RateLimiter(time.monotonic),
        inspector=NullInspector(),
        router=FixedRouter(),
        ledger=NullLedger(),
        audit=RecordingAudit(),
        engine=ScriptedEngine(),
        clock=_now_us,
        max_answer_tokens=64,
    )
    return create_app(
        gateway,
        AdminApi(NoControl(), authorize),
        BodyLimits(1 << 20, 2.0, 1.0),
        ready=lambda: {"models": True},
        created_s=1,
        version="test",
        usage=UsageApi(calls, authorize, tree=tree),
    )


def _now_us() -> int:
    return time.time_ns() // 1000
