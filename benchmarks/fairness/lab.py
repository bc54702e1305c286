"""A real vLLM engine on a CPU in a Ray actor, with a schedule of requests played on it."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson

from benchmarks.fairness.flood import Shot
from benchmarks.metering.lab import Lab
from deployments.data_plane.ticket_form import Ticket
from governance.types import EngineChunk, EngineFinished

WORDS = ("what", "who", "model", "large", "small", "may", "use", "the")


@dataclass(frozen=True, slots=True)
class Landed:
    """What became of one request; seconds since it came."""

    number: int
    department: str
    at_s: float
    first_s: float
    end_s: float
    prompt_tokens: int
    answer_tokens: int
    gpu_us: int


class FloodLab(Lab):
    """One engine that is asked by many at once."""

    async def play(self, shots: list[Shot]) -> dict[str, Any]:
        """Send each request when its time comes; ends when all have ended.

        Returns:
            ``landed``, and the difference of ``clocks`` over the whole time.
        """
        before = await self.clocks()
        begin_s = time.monotonic()
        landed = await asyncio.gather(*(self._shoot(shot, begin_s) for shot in shots))
        after = await self.clocks()
        return {"landed": landed, "clocks": {key: after[key] - before[key] for key in after}}

    async def _shoot(self, shot: Shot, begin_s: float) -> Landed:
        await asyncio.sleep(max(0.0, begin_s + shot.at_s - time.monotonic()))
        words = [WORDS[(shot.number + 7 * at) % len(WORDS)] for at in range(shot.prompt_words)]
        body = orjson.dumps(
            {
                "model": self.model.id,
                "prompt": " ".join(words),
                "max_tokens": shot.answer_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
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
            department=shot.department,
            priority=shot.priority,
            max_tokens=4096,
            context_tokens=None,
            issued_at_us=0,
            ticket_id=secrets.token_bytes(16),
            body_sha256=hashlib.sha256(body).digest(),
            account=shot.department,
        )
        came_s, first_s = time.monotonic(), -1.0
        last: EngineFinished | None = None
        async with aclosing(self.backend.run("completions", body, ticket)) as events:
            async for event in events:
                if isinstance(event, EngineChunk) and event.tokens and first_s < 0:
                    first_s = time.monotonic()
                elif isinstance(event, EngineFinished):
                    last = event
        self.backend.delivered(ticket)
        if last is None or last.gpu_us is None or first_s < 0:
            raise RuntimeError("an answer without an end")
        if last.usage.completion_tokens != shot.answer_tokens:
            raise RuntimeError("an answer of another length than was asked")
        return Landed(
            shot.number,
            shot.department,
            round(came_s - begin_s, 4),
            round(first_s - came_s, 5),
            round(time.monotonic() - came_s, 5),
            last.usage.prompt_tokens,
            last.usage.completion_tokens,
            last.gpu_us,
        )
