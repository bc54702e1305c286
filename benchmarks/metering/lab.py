"""A real engine on a CPU in a Ray actor, asked through the data plane's ``Backend``."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import secrets
import time
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil

from deployments.config import ModelConfig
from deployments.data_plane.ticket_form import Ticket
from deployments.engine_config import llm_config
from governance.types import EngineFinished


@dataclass(frozen=True)
class Ask:
    """One request of a workload."""

    number: int
    prompt_words: int
    answer_tokens: int
    department: str


@dataclass(frozen=True)
class Told:
    """What one request came to."""

    number: int
    gpu_us: int
    prompt_tokens: int
    answer_tokens: int
    latency_us: int


class Lab:
    """One engine."""

    async def __init__(self, model: dict[str, Any], scheduler: str | None = None) -> None:  # type: ignore[misc]
        """Start it.

        Args:
            model: Dump of ``ModelConfig``.
            scheduler: Class of the scheduler instead of the usual one.
        """
        from deployments import vllm_engine
        from deployments.vllm_server import VLLMBackend

        if scheduler is not None:
            vllm_engine.scheduler_class = lambda asynchronous: scheduler
        self.model = ModelConfig.model_validate(model)
        self.backend = await VLLMBackend.create(llm_config(self.model))
        self.backend.identify("lab", {self.model.id: "sha256:" + "0" * 64})
        self._numbers = itertools.count()
        self._rows: dict[str, Any] = {}
        self.backend.report_to(self._keep)
        (self._core,) = (
            process
            for process in psutil.Process(os.getpid()).children(recursive=True)
            if "EngineCore" in " ".join(process.cmdline())
        )

    async def _keep(self, report: Any, shard: int = 0) -> None:
        self._rows |= {row.reservation_id: row for row in report.rows}

    async def one(self, ask: Ask) -> Told:
        """Run a request to its end; no two share a prefix."""
        words = [f"w{(7 * ask.number + 13 * place) % 97}" for place in range(ask.prompt_words)]
        body = orjson.dumps(
            {
                "model": self.model.id,
                "prompt": " ".join(words),
                "max_tokens": ask.answer_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "cache_salt": secrets.token_hex(8),
            }
        )
        name = f"r{next(self._numbers)}"
        ticket = Ticket(
            gateway_id="lab",
            audience=self.model.id,
            operation="completions",
            request_id=name,
            decision_id="",
            reservation_id=name,
            principal_key="",
            department=ask.department,
            priority=0,
            max_tokens=4096,
            context_tokens=None,
            issued_at_us=0,
            ticket_id=secrets.token_bytes(16),
            body_sha256=hashlib.sha256(body).digest(),
        )
        started = time.monotonic_ns()
        last: EngineFinished | None = None
        async with aclosing(self.backend.run("completions", body, ticket)) as events:
            async for event in events:
                if isinstance(event, EngineFinished):
                    last = event
        self.backend.delivered(ticket)
        if last is None or last.gpu_us is None:
            raise RuntimeError("an answer without its cost")
        return Told(
            ask.number,
            last.gpu_us,
            last.usage.prompt_tokens,
            last.usage.completion_tokens,
            (time.monotonic_ns() - started) // 1000,
        )

    async def together(self, asks: list[Ask], at_once: int) -> list[Told]:
        """So many at once; the next one starts when one ends."""
        room = asyncio.Semaphore(at_once)

        async def run(ask: Ask) -> Told:
            async with room:
                return await self.one(ask)

        return await asyncio.gather(*(run(ask) for ask in asks))

    async def alone(self, asks: list[Ask]) -> list[Told]:
        """One after the other."""
        return [await self.one(ask) for ask in asks]

    async def clocks(self) -> dict[str, int]:
        """Cumulative figures: the meter's, and the operating system's of the core's main thread.

        ``cpu_ns`` is time on a CPU and ``queued_ns`` time in which the thread could run and no CPU
        was free; both from ``/proc/<pid>/schedstat``.
        """
        end = time.monotonic() + 3
        while self.backend.meter.exchanges and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        self.backend.meter.drain()
        totals = self.backend.meter.totals
        schedstat = Path(f"/proc/{self._core.pid}/schedstat").read_text()  # noqa: ASYNC240
        cpu_ns, queued_ns, _ = map(int, schedstat.split())
        return {
            "steps": totals.steps,
            "busy_ns": totals.busy_ns,
            "attributed_ns": totals.attributed_ns,
            "unattributed_ns": totals.unattributed_ns,
            "hooks_ns": totals.hooks_ns,
            "rows": len(self._rows),
            "rows_us": sum(row.gpu_us for row in self._rows.values()),
            "cpu_ns": cpu_ns,
            "queued_ns": queued_ns,
            "wall_ns": time.monotonic_ns(),
        }

    async def stop(self) -> None:
        """Stop the engine."""
        await self.backend.stop()
