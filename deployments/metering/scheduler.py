"""vLLM's schedulers with a meter and a fair queue in them. Imports vLLM: engine core only.

``deployments.vllm_engine`` names one of the two classes as ``scheduler_cls`` of the resolved
configuration: the one whose base vLLM would have taken, so that metering decides nothing. Who is
next is decided by ``deployments.scheduling.fair``, which is charged what is metered here. Four
public methods are wrapped and little is read besides; ``tests/contract/test_vllm_interface.py``
holds vLLM to all of it:

    add_request          who pays: a number in the parameters' extra arguments
    schedule             who is in the step, with how many tokens over how much context
    update_from_output   the step has ended, and who with it
    finish_requests      aborts

An output is processed with the very object that ``schedule`` gave, in the order of scheduling;
its identity names the step. Where to send comes from the environment, because vLLM hashes its
configuration to find compiled graphs, and a socket's path in it would compile them anew at
every start.
"""

from __future__ import annotations

import os
import secrets
import time
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from deployments.metering.channel import MeterChannel
from deployments.metering.cost import CostModel, model_shape
from deployments.metering.devices import accelerator_name, device
from deployments.metering.keys import ACCELERATOR_VARIABLE, METER_KEY, SOCKET_VARIABLE
from deployments.metering.meter import StepMeter
from deployments.metering.wire import Totals, pack_work
from deployments.scheduling.fair import FairMixin

if TYPE_CHECKING:

    class _Base(FairMixin, Scheduler):
        """What the hooks stand over."""

else:
    _Base = object

SEND_INTERVAL_NS = 100_000_000
"""Longest age of a running request's figure at the replica, while steps end."""

_QUANTISED_BYTES = {"fp8": 1.0, "awq": 0.5, "gptq": 0.5, "awq_marlin": 0.5, "gptq_marlin": 0.5}
"""Bytes per weight by method; others count as 1."""


def cost_of(config: VllmConfig, accelerator: str) -> CostModel:
    """Cost model of what an engine serves on what it runs on."""
    model, lora = config.model_config, config.lora_config
    number: Any = model.dtype
    weight_bytes = number_bytes = float(number.itemsize)
    if model.quantization is not None:
        weight_bytes = _QUANTISED_BYTES.get(str(model.quantization), 1.0)
    cache = str(config.cache_config.cache_dtype)
    shape = model_shape(
        model.hf_text_config,
        weight_bytes=weight_bytes,
        kv_bytes=1.0 if cache.startswith("fp8") else number_bytes,
        adapter_rank=lora.max_lora_rank if lora is not None else 0,
    )
    return CostModel.of(shape, device(accelerator))


def reported_accelerator() -> str:
    """What the platform calls its device."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return "cpu"
    return str(current_platform.get_device_name())


class MeteredMixin(_Base):
    """The hooks, over either scheduler."""

    clock = staticmethod(time.monotonic_ns)
    """Time of steps; the accuracy benchmark takes another one."""

    def __init__(self, vllm_config: VllmConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(vllm_config, *arguments, **options)
        accelerator = accelerator_name(
            os.environ.get(ACCELERATOR_VARIABLE) or None, reported_accelerator()
        )
        self.meter = StepMeter(
            cost_of(vllm_config, accelerator), vllm_config.parallel_config.world_size
        )
        self.hooks_ns = 0
        self._channel = MeterChannel(os.environ[SOCKET_VARIABLE])
        self._core = secrets.token_bytes(8)
        self._sent_ns = 0

    def add_request(self, request: Request) -> None:
        """Note who pays."""
        self.meter.added(
            request.request_id, _key(request), adapter=request.lora_request is not None
        )
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule, and note who is in the step."""
        start_ns = self.clock()
        output = super().schedule(throttle_prefills)
        if output.num_scheduled_tokens:
            begin_ns = time.monotonic_ns()
            requests = self.requests
            parts = []
            for name, tokens in output.num_scheduled_tokens.items():
                request = requests[name]
                # NOTE: ``schedule`` has already counted the tokens of this step as computed.
                context = max(0, request.num_computed_tokens - tokens)
                parts.append((name, tokens, context, context < request.num_prompt_tokens))
            self.meter.scheduled(id(output), start_ns, parts)
            self.hooks_ns += time.monotonic_ns() - begin_ns
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, *arguments: Any) -> Any:
        """Process the output, and charge the step; who ended is told before the outputs go."""
        begin_ns = time.monotonic_ns()
        requests = self.requests
        scheduled = [
            request
            for name in scheduler_output.num_scheduled_tokens
            if (request := requests.get(name)) is not None
        ]
        self.hooks_ns += time.monotonic_ns() - begin_ns
        outputs = super().update_from_output(scheduler_output, *arguments)
        begin_ns, now_ns = time.monotonic_ns(), self.clock()
        stopped = [request.request_id for request in scheduled if request.is_finished()]
        urgent = self.meter.updated(id(scheduler_output), now_ns, stopped)
        self.charged(scheduled)
        self.hooks_ns += time.monotonic_ns() - begin_ns
        if urgent or now_ns - self._sent_ns >= SEND_INTERVAL_NS:
            self._send(now_ns)
        return outputs

    def finish_requests(self, *arguments: Any, **options: Any) -> list[Request]:
        """End requests from outside: those that are in a step pay for it first."""
        requests = super().finish_requests(*arguments, **options)
        if requests and self.meter.aborted([request.request_id for request in requests]):
            self._send(self.clock())
        return requests

    def shutdown(self) -> None:
        """Stop."""
        super().shutdown()
        self._channel.close()

    def _send(self, now_ns: int) -> None:
        # NOTE: CPU time here: sending wakes the replica, which on a busy machine runs first.
        begin_ns = time.thread_time_ns()
        meter = self.meter
        self._sent_ns = now_ns
        totals = Totals(
            self._core,
            meter.steps,
            meter.busy_ns,
            meter.attributed_ns,
            meter.unattributed_ns,
            meter.overrun_ns,
            self.hooks_ns,
            meter.running,
        )
        changed = meter.changed
        meter.changed = {}
        self._channel.send(totals, [(work.row, pack_work(work)) for work in changed.values()])
        self.hooks_ns += time.thread_time_ns() - begin_ns


class MeteredScheduler(MeteredMixin, FairMixin, Scheduler):
    """For engines that run one step at a time."""


class MeteredAsyncScheduler(MeteredMixin, FairMixin, AsyncScheduler):
    """For engines that schedule ahead.

    NOTE: vLLM tells by ``AsyncScheduler`` whether a custom class can; see ``keys``.
    """


def _key(request: Request) -> int:
    params: Any = request.sampling_params
    extra = params.extra_args if params is not None else None
    if params is None and (pooling := request.pooling_params) is not None:
        extra = pooling.extra_kwargs
    key = (extra or {}).get(METER_KEY)
    return key if isinstance(key, int) and key > 0 else 0
