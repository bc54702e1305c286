"""vLLM's engine under Ray, with two changes: nothing runs without admission, and load is known.

Imports vLLM, which takes seconds and half a gigabyte: for engine replicas only.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from ray.llm._internal.serve.engines.vllm.vllm_engine import (
    VLLMEngine,
    _clear_current_platform_cache,
)
from ray.serve.llm.deployment import LLMServer
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.pooling_params import PoolingParams
from vllm.renderers.inputs.preprocess import extract_prompt_len
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor.abstract import Executor
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from deployments.data_plane.backend import EngineLoad
from deployments.data_plane.ticket_form import Ticket
from deployments.metering.devices import accelerator_name
from deployments.metering.exchange import MeteredExchange
from deployments.metering.keys import (
    ACCELERATOR_VARIABLE,
    FAIR_KEY,
    METER_KEY,
    SOCKET_VARIABLE,
    scheduler_class,
)
from deployments.scheduling.terms import Departments, Terms, rank_of
from governance.errors import ContextLengthExceeded, EngineFailed, LimitExceeded


@dataclass(slots=True)
class Admission:
    """What one verified ticket lets the engine do; used up by the generations it admits."""

    ticket: Ticket
    metered: MeteredExchange
    """What the engine's work for it costs."""
    answer_tokens: int
    """Answer tokens asked for per choice."""
    min_tokens: int = 0
    accepted: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    """Done when the engine has taken the first prompt."""
    streams: list[AsyncGenerator[Any, None]] = field(default_factory=list)
    left_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.left_tokens = self.ticket.max_tokens

    def room(self, prompt_tokens: int, model_tokens: int) -> int:
        """Answer tokens that fit behind a prompt.

        Raises:
            ContextLengthExceeded: None.
        """
        context = min(model_tokens, self.ticket.context_tokens or model_tokens)
        if prompt_tokens >= context:
            raise ContextLengthExceeded(
                f"The prompt has {prompt_tokens} tokens; prompt and answer together may have "
                f"{context}."
            )
        return context - prompt_tokens

    def bound(self, params: SamplingParams, prompt_tokens: int, model_tokens: int) -> None:
        """Set the answer length: what was asked, what is left on the ticket, what fits.

        Raises:
            ContextLengthExceeded: The prompt leaves no room.
            LimitExceeded: The ticket is used up.
        """
        fits = self.room(prompt_tokens, model_tokens)
        most = min(self.answer_tokens, self.left_tokens // params.n, fits)
        if most < 1:
            raise LimitExceeded("The request asks for more answers than were admitted.", "n")
        self.left_tokens -= most * params.n
        params.max_tokens = most
        params.min_tokens = min(self.min_tokens, most)


ADMISSION: ContextVar[Admission | None] = ContextVar("admission", default=None)
"""Set for the task that starts a request; vLLM's own layers stand between it and the engine."""


def _admission() -> Admission:
    admission = ADMISSION.get()
    if admission is None:
        raise EngineFailed()
    return admission


_DEPARTMENTS = Departments()


def _terms(ticket: Ticket) -> list[int]:
    """What the core's queue must know, by the ticket."""
    return Terms(
        _DEPARTMENTS.number(ticket.department),
        rank_of(ticket.priority),
        ticket.weight_milli,
        ticket.served_us,
    ).dump()


class AdmittedLLM(AsyncLLM):
    """Refuses whatever comes without an ``Admission``, and keeps to it."""

    def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generate within the ticket's bounds, at the ticket's priority."""
        admission = _admission()
        tokens = extract_prompt_len(self.model_config, prompt)
        admission.bound(sampling_params, tokens, self.model_config.max_model_len)
        metered = admission.metered
        metered.prompt_tokens += tokens
        # Goes with the parameters to each choice, and through them to the meter in the core.
        sampling_params.extra_args = {
            **(sampling_params.extra_args or {}),
            METER_KEY: metered.key,
            FAIR_KEY: _terms(admission.ticket),
        }
        stream = _counted(
            super().generate(
                prompt, sampling_params, request_id, priority=admission.ticket.priority, **options
            ),
            metered,
        )
        admission.streams.append(stream)
        return stream

    def encode(  # type: ignore[override]
        self,
        prompt: Any,
        pooling_params: PoolingParams,
        request_id: str,
        *,
        priority: int = 0,
        **options: Any,
    ) -> AsyncGenerator[PoolingRequestOutput, None]:
        """Embed within the ticket's context, at the ticket's priority."""
        admission = _admission()
        tokens = extract_prompt_len(self.model_config, prompt)
        # One less, because an embedding needs no room for an answer.
        admission.room(tokens - 1, self.model_config.max_model_len)
        admission.metered.prompt_tokens += tokens
        # A copy: vLLM gives the same parameters to each prompt of a request.
        pooling_params = copy(pooling_params)
        pooling_params.extra_kwargs = {
            **(pooling_params.extra_kwargs or {}),
            METER_KEY: admission.metered.key,
            FAIR_KEY: _terms(admission.ticket),
        }
        stream: AsyncGenerator[PoolingRequestOutput, None] = super().encode(
            prompt, pooling_params, request_id, priority=admission.ticket.priority, **options
        )
        admission.streams.append(stream)
        return stream

    async def add_request(self, request_id: str, *arguments: Any, **options: Any) -> Any:
        """Hand a prompt to the engine, and say so."""
        admission = _admission()
        queue = await super().add_request(request_id, *arguments, **options)
        if not admission.accepted.done():
            admission.accepted.set_result(None)
        return queue

    async def _add_request(self, *arguments: Any, **options: Any) -> None:
        """Count what the core is given: one request a prompt and choice."""
        metered = _admission().metered
        metered.submitted += 1
        try:
            await super()._add_request(*arguments, **options)
        except BaseException:  # A client that leaves now is among them.
            metered.submitted -= 1
            raise


async def _counted(
    stream: AsyncGenerator[RequestOutput, None], metered: MeteredExchange
) -> AsyncGenerator[RequestOutput, None]:
    """Count the tokens of each output on its way.

    NOTE: the layer that asked has set the kind of output to deltas, because it streams.
    """
    async with aclosing(stream) as outputs:
        async for output in outputs:
            for choice in output.outputs:
                metered.answer_tokens += len(choice.token_ids)
            yield output


class LoadLogger(StatLoggerBase):
    """Keeps the last scheduler statistics."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.last = SchedulerStats()

    def record(self, scheduler_stats: SchedulerStats | None, *others: Any, **more: Any) -> None:
        """Called by vLLM after each step that gave output."""
        if scheduler_stats is not None:
            self.last = scheduler_stats

    def log_engine_initialized(self) -> None:
        """Nothing to log."""


class GovernedVLLMEngine(VLLMEngine):
    """``VLLMEngine`` with ``AdmittedLLM`` inside.

    On a CPU the engine process does the work itself (``uni`` executor), where Ray's default starts
    another process for it, which costs 0.6 GB and ten seconds more.
    """

    client: AdmittedLLM
    meter_path: str
    """Socket for what the engine core meters; set before ``start``."""
    devices: int = 1
    """Devices of one replica."""

    @property
    def accelerator(self) -> str:
        """Kind of device: the configured type, or what its driver calls it."""
        from deployments.metering.scheduler import reported_accelerator

        return accelerator_name(self.llm_config.accelerator_type, reported_accelerator())

    async def start(self) -> None:
        """Start without the task by which Ray prepares a node.

        It fetches weights from cloud URIs, which we have none of, in one more process with vLLM.
        """
        callback = self.llm_config.get_or_create_callback()
        if callback is not None:
            callback.ctx.run_init_node = False
        await super().start()

    def _start_async_llm_engine(
        self,
        vllm_engine_args: AsyncEngineArgs,
        vllm_engine_config: VllmConfig,
        placement_group: Any,
    ) -> AdmittedLLM:
        parallel = vllm_engine_config.parallel_config
        parallel.placement_group = placement_group
        if vllm_engine_config.device_config.device_type == "cpu":
            parallel.distributed_executor_backend = "uni"
        scheduler = vllm_engine_config.scheduler_config
        if scheduler.scheduler_cls is not None:
            raise ValueError("engine.scheduler_cls: the scheduler is the one that meters")
        # Now that vLLM has decided how it schedules; the class follows, never leads.
        scheduler.scheduler_cls = scheduler_class(bool(scheduler.async_scheduling))
        os.environ[SOCKET_VARIABLE] = self.meter_path
        os.environ[ACCELERATOR_VARIABLE] = self.llm_config.accelerator_type or ""
        self.devices = parallel.world_size * parallel.data_parallel_size
        _clear_current_platform_cache()  # type: ignore[no-untyped-call]
        loggers: list[LoadLogger] = []

        def logger(config: VllmConfig, index: int = 0) -> LoadLogger:
            loggers.append(LoadLogger(config, index))
            return loggers[-1]

        self.client = AdmittedLLM(
            vllm_config=vllm_engine_config,
            executor_class=Executor.get_class(vllm_engine_config),
            log_requests=False,
            log_stats=not vllm_engine_args.disable_log_stats,
            stat_loggers=[logger],
        )
        self._loggers = loggers
        return self.client

    def load(self) -> EngineLoad:
        """Current load.

        NOTE: vLLM reports after a step, so after an abort that leaves nothing to do the last
        report is stale; how many requests there are is known here.
        """
        total = self.client.get_num_unfinished_requests()
        if not total:
            return EngineLoad()
        stats = [logger.last for logger in self._loggers]
        waiting = min(total, sum(item.num_waiting_reqs for item in stats))
        places = self.client.scheduler_config.max_num_seqs * max(1, len(stats))
        waiting = max(waiting, total - places)
        usage = max((item.kv_cache_usage for item in stats), default=0.0)
        return EngineLoad(total - waiting, waiting, round(usage * 1000))

    async def shutdown(self) -> None:
        """Stop the engine's processes."""
        await super().shutdown()
        if client := getattr(self, "client", None):
            client.shutdown()


class GovernedLLMServer(LLMServer):
    """``LLMServer`` around ``GovernedVLLMEngine``.

    Its own methods (``chat`` and the like) know no tickets, so the engine refuses what they ask;
    ``VLLMBackend`` goes past them.
    """

    _default_engine_cls = GovernedVLLMEngine  # type: ignore[assignment]
    engine: GovernedVLLMEngine
    meter_path: str
    """See ``GovernedVLLMEngine.meter_path``; set before ``start``."""

    async def _start_engine(self) -> None:
        """Without Ray's usage telemetry, whose actor takes 340 MB."""
        self.engine.meter_path = self.meter_path
        await self.engine.start()

    def __del__(self) -> None:  # type: ignore[override]
        """Nothing: the base class has a coroutine here, which only Serve would await."""
