"""The ``Engine`` port over Ray Serve handles: the fallback, and the reference for the sockets.

It costs three to seven times the CPU of ``DataPlaneEngine``. Serve picks the replica; affinity and
department share do not apply. NOTE: Serve's streaming calls have no back pressure: when a client
reads slowly, the rest of its answer waits in Ray's memory. What bounds it is ``max_tokens``.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import orjson

from deployments.data_plane.handle_replica import from_wire
from deployments.data_plane.session import DETOKENIZE
from deployments.data_plane.tickets import TicketSigner
from deployments.errors import map_error
from governance.errors import EngineFailed, EngineTimeout, EngineUnavailable, Overloaded
from governance.types import Dispatch, EngineEvent, EngineFinished, EngineStarted
from routing.types import ModelLoad


class HandleEngine:
    """Calls ``run`` and ``detokenize`` of an engine deployment.

    Args:
        handles: ``DeploymentHandle`` of each base model.
        signer: Mints a ticket per request.
        start_timeout_s: Time until an engine has taken the request.
        chunk_timeout_s: Longest silence in mid-answer.
        max_in_flight: Requests that this gateway has open at once, over all models.

    """

    def __init__(
        self,
        handles: Mapping[str, Any],
        signer: TicketSigner,
        *,
        start_timeout_s: float = 30.0,
        chunk_timeout_s: float = 120.0,
        max_in_flight: int = 1024,
    ) -> None:
        self._streams = {model: h.options(stream=True) for model, h in handles.items()}
        self._handles = dict(handles)
        self._signer = signer
        self._start_timeout_s = start_timeout_s
        self._chunk_timeout_s = chunk_timeout_s
        self._max_in_flight = max_in_flight
        self.in_flight = 0

    def ready(self, base_model: str) -> bool:
        """Whether there is a handle; whether a replica answers, only Serve knows."""
        return base_model in self._handles

    def load(self, base_model: str) -> ModelLoad:
        """What this gateway has open, over all models; how busy replicas are, only Serve knows."""
        replicas = 1 if base_model in self._handles else 0
        return ModelLoad(replicas, slots=self._max_in_flight, in_flight=self.in_flight)

    async def close(self) -> None:
        """Nothing is held open between requests."""

    async def stream(self, dispatch: Dispatch) -> AsyncGenerator[EngineEvent, None]:
        """Run a request; see ``governance.ports.Engine.stream``.

        Raises:
            EngineUnavailable: The model has no deployment, or none of its replicas can answer.
            Overloaded: Serve's queue, or this gateway, is full.
            EngineFailed: The replica died.
            EngineTimeout: It was silent for too long.
            GatehouseError: As the engine reported it.

        """
        handle = self._streams.get(dispatch.base_model)
        if handle is None:
            raise EngineUnavailable("", None, 2)
        if self.in_flight >= self._max_in_flight:
            raise Overloaded("", None, 1)
        ticket = self._signer.mint(dispatch, hashlib.sha256(dispatch.body).digest())
        self.in_flight += 1
        response = handle.run.remote(ticket, dispatch.operation.value, dispatch.body)
        limit_s, finished = self._start_timeout_s, False
        try:
            while not finished:
                try:
                    async with asyncio.timeout(limit_s):
                        event = from_wire(await anext(response))
                except StopAsyncIteration:
                    # NOTE: after an engine process is killed a stream can end as if it were whole.
                    raise EngineFailed() from None
                except TimeoutError:
                    raise EngineTimeout() from None
                except Exception as error:
                    raise map_error(error) from None
                if isinstance(event, EngineStarted):
                    limit_s = self._chunk_timeout_s
                finished = isinstance(event, EngineFinished)
                yield event
        finally:
            self.in_flight -= 1
            if not finished:
                response.cancel()

    async def detokenize(self, base_model: str, prompts: list[list[int]]) -> list[str]:
        """Text of token-id prompts; see ``governance.ports.Engine.detokenize``.

        Raises:
            InvalidRequest: An id is outside the vocabulary.
            EngineUnavailable: The model has no deployment, or no replica answers.
            EngineTimeout: It took longer than ``start_timeout_s``.

        """
        handle = self._handles.get(base_model)
        if handle is None:
            raise EngineUnavailable("", None, 2)
        body = orjson.dumps(prompts)
        ticket = self._signer.mint_internal(DETOKENIZE, base_model, body)
        try:
            async with asyncio.timeout(self._start_timeout_s):
                texts: list[str] = await handle.detokenize.remote(ticket, body)
        except Exception as error:
            raise map_error(error) from None
        if not isinstance(texts, list) or len(texts) != len(prompts):
            raise EngineFailed()
        return texts
