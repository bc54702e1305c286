"""The two sides of ``benchmarks.gateway.books``: an instant engine with a meter, a gateway without.

The meter is the real one, from the step to the ledger: ``StepMeter`` charges a step for the prompt
and one for the answer, the core's channel sends both over its socket, the replica's collector and
reporter do the rest. What the hooks of a real scheduler cost per step is measured where there are
steps (``benchmarks.metering``).
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from benchmarks.gateway.instant import InstantBackend, InstantEngine
from deployments.data_plane.ticket_form import Ticket
from deployments.ingress import GatewayIngress
from deployments.ledger_actor import ledger_shards
from deployments.metering.channel import MeterChannel
from deployments.metering.collector import MeterCollector
from deployments.metering.cost import CostModel
from deployments.metering.meter import StepMeter
from deployments.metering.reporter import MeterReporter
from deployments.metering.wire import Totals, pack_work
from governance.nulls import NullAudit, NullLedger
from governance.types import EngineChunk, EngineEvent, EngineFinished, EngineStarted


class MeteredBackend(InstantBackend):
    """Charges each request two steps."""

    def __init__(self, replica_id: str, meter: MeterCollector) -> None:
        super().__init__(replica_id)
        self.meter = meter
        self._steps = StepMeter(CostModel(0.0, 0.0, 1e-6, 0.0, 0.0))
        self._channel = MeterChannel(meter.path)
        self._names = 0

    async def run(
        self, operation: str, body: bytes, ticket: Ticket
    ) -> AsyncGenerator[EngineEvent, None]:
        """Answer as ``InstantBackend`` does, metered."""
        exchange = self.meter.open(ticket)
        exchange.submitted, exchange.prompt_tokens = 1, 32
        self._names += 1
        name = str(self._names)
        self._steps.added(name, exchange.key)
        self._step(name, 32, prompt=True)
        try:
            async for event in super().run(operation, body, ticket):
                if type(event) is EngineStarted:
                    yield replace(event, prompt_tokens=32)
                elif type(event) is EngineChunk:
                    exchange.answer_tokens += event.tokens
                    yield replace(event, gpu_us=exchange.total_us)
                else:
                    self._step(name, 24, prompt=False)
                    gpu_us = await exchange.final()
                    exchange.finished = True
                    yield replace(event, gpu_us=gpu_us) if type(event) is EngineFinished else event
        finally:
            exchange.close()

    def delivered(self, ticket: Ticket) -> None:
        """The end is on its way."""
        self.meter.delivered(ticket)

    def _step(self, name: str, tokens: int, *, prompt: bool) -> None:
        meter = self._steps
        meter.scheduled(name, time.monotonic_ns(), [(name, tokens, 0 if prompt else 32, prompt)])
        if meter.updated(name, time.monotonic_ns(), () if prompt else (name,)):
            rows, meter.changed = list(meter.changed.values()), {}
            totals = Totals(
                b"instant0", meter.steps, meter.busy_ns, meter.attributed_ns, running=meter.running
            )
            self._channel.send(totals, [(work.row, pack_work(work)) for work in rows])


class MeteredInstantEngine(InstantEngine):
    """``InstantEngine`` whose work is metered and reported to the ledger."""

    def make_backend(self, replica_id: str, model: dict[str, Any], state_dir: str) -> Any:
        """The backend; its meter reports from now on."""
        meter = MeterCollector(model["id"])
        meter.start()
        self.reporter = MeterReporter(
            meter,
            ledger_shards(state_dir).report,
            replica_id=replica_id,
            accelerator="cpu",
            devices=1,
        )
        self.reporter.start()
        return MeteredBackend(replica_id, meter)


class NoBooks:
    """Neither ledger nor audit."""

    ledger = NullLedger()
    audit = NullAudit()
    ledger_client: Any = None

    def check(self) -> None:
        """Nothing can break."""

    async def close(self) -> None:
        """Nothing was opened."""


class UnbookedIngress(GatewayIngress):
    """The gateway as it would be without ledger and audit; for comparison only."""

    async def _open_books(self, budgets: dict[str, Any]) -> Any:
        return NoBooks()
