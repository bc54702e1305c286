"""Fakes of the engine side: a backend that really generates, a handle that behaves as Serve does.

``FakeBackend`` implements ``deployments.data_plane.backend.Backend`` and takes its orders from the
request body, so that a test in one process can steer a replica in another.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from ray.exceptions import ActorDiedError, RayTaskError

from deployments.data_plane.backend import EngineLoad
from deployments.data_plane.handle_replica import HandleReplica
from deployments.data_plane.ticket_form import Ticket
from governance import errors
from governance.errors import GatehouseError, InvalidRequest
from governance.types import (
    Dispatch,
    EngineChunk,
    EngineEvent,
    EngineFinished,
    EngineStarted,
    Operation,
    Usage,
)

MODEL_VERSION = "sha256:" + "ab" * 32
VOCABULARY = 100
TOKEN_US = 1000


def dispatch_of(
    body: Mapping[str, object] | bytes | None = None,
    *,
    model: str = "small",
    base_model: str = "small",
    request_id: str = "r-1",
    operation: Operation = Operation.CHAT,
    department: str = "hr",
    account: str | None = None,
    affinity: str | None = None,
) -> Dispatch:
    """A request for ``FakeBackend``; ``body`` is its orders."""
    raw = body if isinstance(body, bytes) else json.dumps(body or {"count": 3}).encode()
    return Dispatch(
        request_id=request_id,
        decision_id="d-1",
        model=model,
        base_model=base_model,
        operation=operation,
        body=raw,
        principal_key="principal",
        department=department,
        account=department if account is None else account,
        priority=0,
        max_tokens=64,
        reservation_id="v-1",
        affinity=affinity,
        context_tokens=1024,
    )


def event_bytes(request_id: str, number: int, size: int = 0) -> bytes:
    """The server-sent event that ``FakeBackend`` gives as its ``number``-th."""
    payload = {"id": request_id, "n": number, "text": "x" * size}
    return b"data: " + json.dumps(payload, separators=(",", ":")).encode() + b"\n\n"


class FakeBackend:
    """Generates ``count`` events of ``size`` bytes of text, ``delay_s`` apart.

    Further orders: ``start_delay_s`` before the first event; ``raise_at`` n with ``error`` (class
    name in ``governance.errors``, or ``foreign``), -1 for before the start; ``hang_at`` n;
    ``raw_bytes`` for one long body; ``truncate`` ends without ``EngineFinished``; ``burst`` gives
    all events without suspending. Each event stands for one token and costs ``TOKEN_US``; so does
    the prompt. ``unmetered`` gives no total.
    """

    def __init__(self, replica_id: str = "replica-1") -> None:
        self.replica_id = replica_id
        self.calls: Counter[str] = Counter()
        self.running = 0
        self.waiting = 0
        self.ended = 0
        self.produced_bytes = 0
        self.tickets: list[Ticket] = []
        self.delivered_tickets: list[Ticket] = []

    def delivered(self, ticket: Ticket) -> None:
        self.delivered_tickets.append(ticket)

    def load(self) -> EngineLoad:
        return EngineLoad(self.running, self.waiting, min(1000, 10 * self.running))

    async def detokenize(self, model: str, prompts: list[list[int]]) -> list[str]:
        self.calls["detokenize"] += 1
        if any(token >= VOCABULARY for prompt in prompts for token in prompt):
            raise InvalidRequest("A token id is outside the vocabulary.", "prompt")
        return [" ".join(f"t{token}" for token in prompt) for prompt in prompts]

    async def run(
        self, operation: str, body: bytes, ticket: Ticket
    ) -> AsyncGenerator[EngineEvent, None]:
        self.calls[operation] += 1
        self.tickets.append(ticket)
        self.running += 1
        try:
            async for event in self._run(json.loads(body), ticket):
                if isinstance(event, EngineChunk):
                    self.produced_bytes += len(event.data)
                yield event
        finally:
            self.running -= 1
            self.ended += 1

    async def _run(
        self, orders: dict[str, Any], ticket: Ticket
    ) -> AsyncGenerator[EngineEvent, None]:
        await asyncio.sleep(orders.get("start_delay_s", 0))
        self._maybe_raise(orders, -1)
        yield EngineStarted(self.replica_id, MODEL_VERSION, "fake-1", 7)
        if "raw_bytes" in orders:
            yield EngineChunk(b"e" * orders["raw_bytes"], 0, TOKEN_US)
        count = orders.get("count", 0)
        for number in range(count):
            self._maybe_raise(orders, number)
            if orders.get("hang_at") == number:
                await asyncio.Event().wait()
            if not orders.get("burst"):
                await asyncio.sleep(orders.get("delay_s", 0))
            data = event_bytes(ticket.request_id, number, orders.get("size", 0))
            yield EngineChunk(data, 1, (number + 2) * TOKEN_US)
        if not orders.get("truncate"):
            gpu_us = None if orders.get("unmetered") else (count + 1) * TOKEN_US
            yield EngineFinished(Usage(7, count, 2), b"data: {}\n\n", gpu_us)

    @staticmethod
    def _maybe_raise(orders: dict[str, Any], number: int) -> None:
        if orders.get("raise_at") != number:
            return
        if orders["error"] == "foreign":
            raise RuntimeError("/secret/path: the prompt was ...")
        error: type[GatehouseError] = getattr(errors, orders["error"])
        raise error(orders.get("message", ""), "messages")


class FakeHandle:
    """A ``DeploymentHandle`` to a ``HandleReplica`` in this process.

    Like Serve's: a stream runs ahead of its reader, exceptions arrive inside a ``RayTaskError``
    with a traceback for text, and a replica that dies is an ``ActorDiedError``.
    """

    def __init__(self, replica: HandleReplica) -> None:
        self._replica = replica
        self._responses: set[_FakeStream] = set()

    def options(self, *, stream: bool) -> FakeHandle:
        return self

    @property
    def run(self) -> _FakeMethod:
        return _FakeMethod(self._start)

    @property
    def detokenize(self) -> _FakeMethod:
        return _FakeMethod(self._call)

    def _start(self, ticket: bytes, operation: str, body: bytes) -> _FakeStream:
        response = _FakeStream(self._replica.run(ticket, operation, body))
        self._responses.add(response)
        return response

    async def _call(self, ticket: bytes, body: bytes) -> list[str]:
        try:
            return await self._replica.detokenize(ticket, body)
        except Exception as error:
            raise _as_ray_does(error) from None

    async def die(self) -> None:
        """Kill the replica's process, as far as callers can tell."""
        for response in self._responses:
            response.fail(ActorDiedError())


class _FakeMethod:
    def __init__(self, call: Any) -> None:
        self.remote = call


class _FakeStream:
    def __init__(self, generator: AsyncGenerator[Any, None]) -> None:
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self._task = asyncio.get_running_loop().create_task(self._produce(generator))

    async def _produce(self, generator: AsyncGenerator[Any, None]) -> None:
        try:
            async for item in generator:
                await self._items.put(item)
        except asyncio.CancelledError:
            await generator.aclose()
            raise
        except Exception as error:
            await self._items.put(_as_ray_does(error))
        else:
            await self._items.put(StopAsyncIteration())

    def fail(self, error: Exception) -> None:
        self._task.cancel()
        self._items.put_nowait(error)

    def cancel(self) -> None:
        self._task.cancel()

    def __aiter__(self) -> _FakeStream:
        return self

    async def __anext__(self) -> Any:
        item = await self._items.get()
        if isinstance(item, BaseException):
            raise item
        return item


def _as_ray_does(error: Exception) -> Exception:
    text = f"Traceback (most recent call last): ... {error!r}"
    wrapped: Exception = RayTaskError(
        "run", text, error, "ray::engine", 1, "127.0.0.1"
    ).as_instanceof_cause()
    return wrapped
