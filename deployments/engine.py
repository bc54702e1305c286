"""The Serve deployment of one model's engine replicas.

The process that builds the application imports this, so it imports neither vLLM nor Ray Serve's
LLM package (seconds, and half a gigabyte): a replica does that when it starts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import ray
from ray import serve

from deployments.autoscaling import LOAD
from deployments.config import ModelConfig
from deployments.control_actor import ControlClient
from deployments.data_plane.handle_replica import HandleReplica, WireEvent
from deployments.data_plane.server import DataPlaneServer
from deployments.data_plane.tickets import TicketVerifier
from deployments.data_plane.tls import server_context
from deployments.engine_config import DRAIN_TIMEOUT_S, llm_config
from deployments.logs import join_serve_log
from deployments.weights import DigestCache, adapter_version, digest_directory, local_directory
from governance.control.snapshot import ControlSnapshot, ReplicaAddress

log = logging.getLogger("gatehouse.engine")

DEATH_CHECK_INTERVAL_S = 0.2


def now_us() -> int:
    """Wall clock in microseconds."""
    return time.time_ns() // 1000


def model_versions(model: ModelConfig, cache: DigestCache) -> dict[str, str]:
    """Version of the model and of each adapter, by served id. Reads the files; blocks.

    Raises:
        WeightsError: The files are missing, changing or damaged.
    """
    base = digest_directory(local_directory(model.source, model.revision), cache)
    versions = {model.id: base}
    for adapter in model.adapters:
        own = digest_directory(local_directory(adapter.source), cache)
        versions[adapter.id] = adapter_version(base, own)
    return versions


class EngineDeployment:
    """One replica: vLLM, the data plane's server in front of it, and a place in the control plane.

    It is registered, and so found by gateways, when it can answer.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, model: dict[str, Any], state_dir: str, host: str | None = None
    ) -> None:
        """Start everything.

        Args:
            model: Dump of ``ModelConfig`` with absolute directories (``located``).
            state_dir: State root: the control plane's storage, and remembered digests.
            host: Address to listen on; ``None`` for the node's, which Ray knows.
        """
        join_serve_log()
        self.model = ModelConfig.model_validate(model)
        self.replica_id = serve.get_replica_context().replica_id.unique_id
        self._gateway_keys: dict[str, bytes] = {}
        self.control = ControlClient(state_dir)
        self.control.on_change(self._learn_gateways)
        await self.control.start()
        await self._start_engine(DigestCache(Path(state_dir) / "weights.json"))
        served = tuple(info.id for info in self.model.infos())
        verifier = TicketVerifier(served, lambda: self._gateway_keys, now_us)
        self.handles = HandleReplica(self.engine, verifier)
        self.data_plane = DataPlaneServer(
            self.engine, verifier, self.replica_id, max_in_flight=self.model.max_in_flight
        )
        address: str = host or ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        port = await self.data_plane.start(address, 0, server_context(os.environ))
        await self.control.set_registration(
            ReplicaAddress(
                self.replica_id,
                self.model.id,
                served,
                address,
                port,
                self.versions[self.model.id],
                self.engine_version,
            )
        )
        self._watcher = asyncio.create_task(self._leave_when_dead())
        self._report_costs()
        log.info("serving %s as %s", self.model.id, self.versions[self.model.id])

    async def _start_engine(self, cache: DigestCache) -> None:
        """Start vLLM; weigh the files meanwhile, or afterwards if vLLM has to fetch them."""
        weighing = None if self.model.is_hub else self._weigh(cache)
        from deployments.vllm_server import ENGINE_VERSION, VLLMBackend

        self.engine_version = ENGINE_VERSION
        self.engine = await VLLMBackend.create(llm_config(self.model))
        self.versions = await (weighing or self._weigh(cache))
        self.engine.identify(self.replica_id, self.versions)

    def _report_costs(self) -> None:
        """Tell the ledger what the engine's work costs, from now on."""
        from deployments.ledger_actor import ledger_shards
        from deployments.telemetry.actors import EngineTelemetry

        self.telemetry = EngineTelemetry(self.model.id, self.engine.load, lambda: self.engine.dead)
        # Gateways start the ledger and start it again; an engine only looks for it.
        self.engine.report_to(ledger_shards().report, self.telemetry.source)

    def _weigh(self, cache: DigestCache) -> asyncio.Future[dict[str, str]]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(None, model_versions, self.model, cache)

    def _learn_gateways(self, snapshot: ControlSnapshot) -> None:
        self._gateway_keys = {g.gateway_id: g.public_key for g in snapshot.gateways}

    async def _leave_when_dead(self) -> None:
        """Tell gateways at once that the engine is dead; Serve's health checks take seconds."""
        while not self.engine.dead:  # noqa: ASYNC110  vLLM has no event for it
            await asyncio.sleep(DEATH_CHECK_INTERVAL_S)
        log.error("the engine of %s is dead", self.model.id)
        await self.data_plane.drain(0)
        await self.control.set_registration(None)
        await self.engine.engine_died()

    # -- called by Serve ----------------------------------------------------------------------

    async def check_health(self) -> None:
        """Raise when the engine is dead, so that Serve replaces the replica."""
        await self.engine.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Requests that run or wait here, for ``autoscaling.load_policy``."""
        load = self.engine.load()
        return {LOAD: load.running + load.waiting}

    async def __del__(self) -> None:
        """Leave in order: found no more, requests in flight finished, engine stopped."""
        if hasattr(self, "_watcher"):
            self._watcher.cancel()
            await self.control.set_registration(None)
            left = await self.data_plane.drain(DRAIN_TIMEOUT_S)
            if left:
                log.warning("%d requests cut off after %.0f s", left, DRAIN_TIMEOUT_S)
            await self.data_plane.close()
        if hasattr(self, "engine"):
            await self.engine.stop()
        if hasattr(self, "telemetry"):
            await self.telemetry.close()
        await self.control.stop()

    # -- called by gateways through handles, the fallback of the data plane ---------------------

    async def run(
        self, ticket: bytes, operation: str, body: bytes
    ) -> AsyncGenerator[WireEvent, None]:
        """See ``HandleReplica.run``."""
        async with aclosing(self.handles.run(ticket, operation, body)) as events:
            async for event in events:
                yield event

    async def detokenize(self, ticket: bytes, body: bytes) -> list[str]:
        """See ``HandleReplica.detokenize``."""
        return await self.handles.detokenize(ticket, body)
