"""One vLLM engine in a process of its own (a Ray actor), without Serve and without a gateway."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import secrets
import time
from contextlib import aclosing
from typing import Any

import orjson
import psutil

from deployments.config import ModelConfig
from deployments.data_plane.ticket_form import Ticket
from deployments.engine_config import llm_config
from governance.budget.messages import MeterReport
from governance.errors import GatehouseError, LedgerUnavailable
from governance.types import EngineChunk, EngineFinished, EngineStarted

VERSION = "sha256:" + "ab" * 32
ADAPTER_VERSION = VERSION + "+sha256:" + "cd" * 32


class EngineHost:
    """Runs requests as the data plane's server would; gives plain values."""

    async def __init__(self, model: dict[str, Any]) -> None:  # type: ignore[misc]
        from deployments.vllm_server import VLLMBackend

        self.model = ModelConfig.model_validate(model)
        self.backend = await VLLMBackend.create(llm_config(self.model))
        versions = {info.id: VERSION for info in self.model.infos()[:1]}
        versions |= {adapter.id: ADAPTER_VERSION for adapter in self.model.adapters}
        self.backend.identify("replica-1", versions)
        self.numbers = itertools.count()
        self.reports: list[MeterReport] = []
        self.ledger_up = True
        self.backend.report_to(self._take_report)

    async def _take_report(self, report: MeterReport, shard: int = 0) -> None:
        if not self.ledger_up:
            raise LedgerUnavailable
        self.reports.append(report)

    async def meter(self, *, wait: int = 0) -> dict[str, Any]:
        """What the engine has told of costs: the last report, and the last row by request id.

        Args:
            wait: Until so many requests have ended and been reported.
        """
        end = time.monotonic() + 10
        while True:
            rows = {row.request_id: row for report in self.reports for row in report.rows}
            ended = sum(row.ended for row in rows.values())
            if (ended >= wait and not self.backend.meter.exchanges) or time.monotonic() > end:
                break
            await asyncio.sleep(0.05)
        self.backend.meter.drain()
        totals = self.backend.meter.totals
        return {"rows": rows, "reports": self.reports, "totals": totals}

    async def engine_died(self) -> None:
        """As the deployment does when it finds the engine dead."""
        await self.backend.engine_died()

    async def ledger(self, up: bool) -> None:
        """Let reports through, or not."""
        self.ledger_up = up

    async def ask_all(self, asks: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
        """Run requests at once."""
        return await asyncio.gather(*(self.ask(operation, body) for operation, body in asks))

    async def ready(self) -> str:
        return self.model.id

    def _ticket(self, operation: str, model: str, body: bytes, **fields: Any) -> Ticket:
        values = {
            "gateway_id": "gateway",
            "audience": model,
            "operation": operation,
            "request_id": f"r{next(self.numbers)}",
            "decision_id": "d",
            "reservation_id": f"v{next(self.numbers)}",
            "principal_key": "p",
            "department": "hr",
            "account": "hr",
            "priority": 0,
            "max_tokens": 4096,
            "context_tokens": None,
            "issued_at_us": 0,
            "ticket_id": secrets.token_bytes(16),
            "body_sha256": hashlib.sha256(body).digest(),
            **fields,
        }
        return Ticket(**values)

    async def ask(self, operation: str, body: dict[str, Any], **ticket: Any) -> dict[str, Any]:
        """Run one request to its end; the error's code and message where it failed."""
        model = ticket.pop("audience", body["model"])
        raw = orjson.dumps({**body, "cache_salt": "hr"})
        answer: dict[str, Any] = {
            "chunks": [],
            "progress": [],
            "started": None,
            "error": None,
        }
        try:
            sealed = self._ticket(operation, model, raw, **ticket)
            async with aclosing(self.backend.run(operation, raw, sealed)) as events:
                async for event in events:
                    if isinstance(event, EngineStarted):
                        answer["started"] = (event.replica_id, event.model_version)
                        answer["prompt_tokens"] = event.prompt_tokens
                    elif isinstance(event, EngineChunk):
                        answer["chunks"].append(event.data)
                        answer["progress"].append((event.tokens, event.gpu_us))
                    elif isinstance(event, EngineFinished):
                        answer["usage"] = event.usage
                        answer["usage_event"] = event.usage_event
                        answer["gpu_us"] = event.gpu_us
            self.backend.delivered(sealed)
        except GatehouseError as error:
            answer["error"] = (error.code, error.message, error.param)
        return answer

    async def leave(self, body: dict[str, Any], how: str) -> tuple[int, float]:
        """Start a long answer, leave it by ``close`` or ``cancel``.

        Returns:
            Requests that ran before, and seconds until none did.
        """
        raw = orjson.dumps(body)
        begun = asyncio.Event()

        async def consume() -> None:
            events = self.backend.run("chat", raw, self._ticket("chat", body["model"], raw))
            async with aclosing(events):
                count = 0
                async for _ in events:
                    count += 1
                    if count == 5:
                        begun.set()
                    if count == 10 and how == "close":
                        return

        task = asyncio.create_task(consume())
        await begun.wait()
        before = self.backend.load().running
        started = time.monotonic()
        if how == "cancel":
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        # The engine's own count: a request that came after it was told of the abort.
        await self.ask("chat", {**body, "max_completion_tokens": 1})
        while self.backend.load().running or self._engine_running():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return before, time.monotonic() - started

    def _engine_running(self) -> int:
        return sum(logger.last.num_running_reqs for logger in self.backend.engine._loggers)

    async def loads(self, body: dict[str, Any], requests: int) -> list[tuple[int, int, int]]:
        """Loads seen while so many requests run at once."""
        tasks = [asyncio.create_task(self.ask("chat", body)) for _ in range(requests)]
        seen = []
        while not all(task.done() for task in tasks):
            load = self.backend.load()
            seen.append((load.running, load.waiting, load.kv_usage_milli))
            await asyncio.sleep(0.01)
        load = self.backend.load()
        return [*seen, (load.running, load.waiting, load.kv_usage_milli)]

    async def detokenize(self, prompts: list[list[int]]) -> list[str] | str:
        try:
            return await self.backend.detokenize(self.model.id, prompts)
        except GatehouseError as error:
            return error.code

    async def bypass(self) -> str:
        """Ask Ray's own method, without a ticket."""
        from ray.serve.llm.openai_api_models import ChatCompletionRequest

        request = ChatCompletionRequest(
            model=self.model.id, messages=[{"role": "user", "content": "Hello"}]
        )
        try:
            async for item in await self.backend.server.chat(request):
                return str(item)
        except GatehouseError as error:
            return error.code
        return "nothing"

    async def kill_engine(self, body: dict[str, Any]) -> tuple[Any, Any, bool]:
        """Kill vLLM's process under a running answer.

        Returns:
            Error of that answer, error of the next, whether the death is known.
        """
        running = asyncio.create_task(self.ask("chat", body))
        while not self.backend.load().running:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for process in psutil.Process(os.getpid()).children(recursive=True):
            if "EngineCore" in " ".join(process.cmdline()):
                process.kill()
        first = (await running)["error"]
        second = (await self.ask("chat", body))["error"]
        return first, second, self.backend.dead
