"""What metering relies on in vLLM, none of which vLLM promises.

When a test here fails after an upgrade, its message says what to look at. ``MeteredMixin`` in
``deployments/metering/scheduler.py`` is all the code there is to change, besides ``AdmittedLLM``
in ``deployments/vllm_engine.py``.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deployments.metering.collector import MeterCollector
from deployments.metering.cost import model_shape
from deployments.metering.exchange import MeteredExchange
from deployments.metering.keys import METER_KEY, SOCKET_VARIABLE, scheduler_class
from tests.unit.test_meter_collector import ticket

with warnings.catch_warnings():
    # torch warns of itself while vLLM is imported, and a warning is an error here.
    warnings.simplefilter("ignore")
    import vllm
    from vllm.config import (
        CacheConfig,
        DeviceConfig,
        ModelConfig,
        ParallelConfig,
        SchedulerConfig,
        VllmConfig,
    )
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.parallel_sampling import ParentRequest
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.metrics.perf import ExecutionContext, ModelMetrics
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request, RequestStatus
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
    from vllm.v1.structured_output import StructuredOutputManager

    from deployments.metering import scheduler as metered

VERSION = "0.29."
BLOCK = 16
STOP_TOKEN = 2


def test_the_version_is_the_one_that_was_read() -> None:
    assert vllm.__version__.startswith(VERSION), (
        f"vLLM is {vllm.__version__}. Read vllm/v1/core/sched/scheduler.py and "
        "vllm/v1/engine/core.py again with the list at the top of "
        "deployments/metering/scheduler.py, run tests/serve/test_metering.py, then change VERSION."
    )


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (Scheduler.schedule, ["self", "throttle_prefills"]),
        (Scheduler.update_from_output, ["self", "scheduler_output", "model_runner_output"]),
        (Scheduler.finish_requests, ["self", "request_ids", "finished_status"]),
        (Scheduler.add_request, ["self", "request"]),
        (Scheduler.shutdown, ["self"]),
        (
            AsyncLLM._add_request,
            ["self", "request", "prompt", "parent_req", "index", "queue"],
        ),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_what_is_wrapped_has_the_form_it_had(method: Any, parameters: list[str]) -> None:
    found = list(inspect.signature(method).parameters)
    assert found == parameters, (
        f"{method.__qualname__} takes {found}: adapt the method of the same name in "
        "MeteredMixin (or AdmittedLLM._add_request, which counts the requests given to the core)."
    )


def test_the_asynchronous_scheduler_changes_nothing_that_is_wrapped() -> None:
    own = {"schedule", "update_from_output", "finish_requests", "add_request"} & set(
        vars(AsyncScheduler)
    )
    assert issubclass(AsyncScheduler, Scheduler)
    assert not own, f"AsyncScheduler has its own {own}: check what MeteredMixin wraps there."


def test_outputs_are_processed_with_the_object_that_was_scheduled() -> None:
    step, ahead = inspect.getsource(EngineCore.step), inspect.getsource(
        EngineCore.step_with_batch_queue
    )  # fmt: skip
    why = (
        "The engine core no longer passes on the SchedulerOutput that schedule() returned, in "
        "order: id(output) is the key of a step in MeteredMixin."
    )
    for source in (step, ahead):
        assert "scheduler_output = self.scheduler.schedule(" in source, why
        assert "self.scheduler.update_from_output(" in source, why
    assert "batch_queue.appendleft((future, scheduler_output, exec_future))" in ahead, why
    assert "future, scheduler_output, exec_model_fut = batch_queue.pop()" in ahead, why


def test_steps_tell_who_is_in_them() -> None:
    fields = set(SchedulerOutput.__dataclass_fields__)
    assert {"num_scheduled_tokens", "total_num_scheduled_tokens"} <= fields


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_class_is_found_by_name(asynchronous: bool) -> None:
    config = SchedulerConfig.default_factory()
    config.async_scheduling = asynchronous
    config.scheduler_cls = scheduler_class(asynchronous)
    found = config.get_scheduler_cls()
    assert issubclass(found, AsyncScheduler) is asynchronous
    assert issubclass(found, metered.MeteredMixin)


def request_of(params: Any) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id="r-1",
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=params if isinstance(params, SamplingParams) else None,
        pooling_params=params if isinstance(params, PoolingParams) else None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id="r-1",
    )


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(extra_args={METER_KEY: 17}),
        SamplingParams(n=3, seed=5, extra_args={METER_KEY: 17}),
        PoolingParams(extra_kwargs={METER_KEY: 17}),
    ],
    ids=["one", "three", "pooling"],
)
def test_the_key_reaches_the_core(params: Any) -> None:
    """Through a child per choice, and through the encoding between processes."""
    sent = request_of(params)
    if isinstance(params, SamplingParams) and params.n > 1:
        sent.sampling_params = ParentRequest(sent).get_child_info(1)[1]
    decoded = MsgpackDecoder(EngineCoreRequest).decode(MsgpackEncoder().encode(sent))
    request = Request.from_engine_core_request(decoded, None)
    assert metered._key(request) == 17, (
        "The extra arguments of a request do not reach the core: without them everything is "
        "unattributed. Find another field for METER_KEY in AdmittedLLM and MeteredMixin."
    )


@pytest.mark.parametrize("value", [None, 0, -1, "17", 1.5, [1]])
def test_an_odd_key_pays_for_nothing(value: Any) -> None:
    params = SamplingParams(extra_args={METER_KEY: value})
    assert metered._key(Request.from_engine_core_request(request_of(params), None)) == 0


# -- real schedulers, without a model -----------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    folder: Path = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "num_hidden_layers": 3,
                "vocab_size": 1000,
                "max_position_embeddings": 4096,
                "torch_dtype": "float32",
            }
        )
    )
    model = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="float32", seed=1)
    scheduler = SchedulerConfig(
        max_num_seqs=16,
        max_num_batched_tokens=256,
        max_model_len=4096,
        enable_chunked_prefill=True,
        async_scheduling=False,
        is_encoder_decoder=False,
    )
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
    cache.num_gpu_blocks = 2000
    return VllmConfig(
        model_config=model,
        scheduler_config=scheduler,
        cache_config=cache,
        parallel_config=ParallelConfig(),
        device_config=DeviceConfig("cpu"),
    )


class Core:
    """Drives a metered scheduler as the engine core does, ``depth`` steps ahead."""

    def __init__(self, scheduler: Any, meter: MeterCollector, depth: int) -> None:
        self.scheduler = scheduler
        self.meter = meter
        self.depth = depth
        self.flying: deque[tuple[SchedulerOutput, set[str]]] = deque()
        self.exchanges: list[MeteredExchange] = []
        init_none_hash(sha256)

    def add(
        self,
        prompt: int,
        answer: int,
        *,
        exchange: MeteredExchange | None = None,
        first: int | None = None,
    ) -> str:
        if exchange is None:
            exchange = self.meter.open(ticket(len(self.exchanges) + 1))
            self.exchanges.append(exchange)
        exchange.submitted += 1
        name = f"r{exchange.key}-{exchange.submitted}"
        params = SamplingParams(max_tokens=answer, extra_args={METER_KEY: exchange.key})
        params.update_from_generation_config({}, eos_token_id=STOP_TOKEN)
        hasher = get_request_block_hasher(BLOCK, sha256)
        start = 1000 * exchange.key if first is None else first
        tokens = list(range(start, start + prompt))
        self.scheduler.add_request(Request(name, tokens, params, None, block_hasher=hasher))
        return name

    def schedule(self) -> bool:
        output = self.scheduler.schedule()
        requests = self.scheduler.requests
        partly = {name for name in output.num_scheduled_tokens if requests[name].is_prefill_chunk}
        self.flying.append((output, partly))
        return bool(output.num_scheduled_tokens)

    def update(self, stop: tuple[str, ...] = ()) -> None:
        output, partly = self.flying.popleft()
        names = list(output.num_scheduled_tokens)
        sampled: list[list[int]] = [
            [] if name in partly else [STOP_TOKEN if name in stop else 7] for name in names
        ]
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=sampled,
                logprobs=None,
                prompt_logprobs_dict={},
                pooler_output=[],
            ),
        )

    def run(self, most: int = 500) -> None:
        for _ in range(most):
            while len(self.flying) < self.depth and self.scheduler.has_requests():
                if not self.schedule() and len(self.flying) > 1:
                    break
            if not self.flying:
                return
            self.update()
        raise AssertionError("does not end")

    def check(self) -> None:
        self.meter.drain()
        meter = self.scheduler.meter
        assert meter.busy_ns == meter.attributed_ns + meter.unattributed_ns > 0
        assert meter.attributed_ns == sum(x.prefill_ns + x.decode_ns for x in self.exchanges)
        assert self.meter.totals.busy_ns == meter.busy_ns
        assert meter.running == 0
        for exchange in self.exchanges:
            assert exchange.ended_requests == exchange.submitted


@pytest.fixture(params=["sync", "ahead"])
def core(
    request: pytest.FixtureRequest, config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Core]:
    meter = MeterCollector("small")
    monkeypatch.setenv(SOCKET_VARIABLE, meter.path)
    ahead = request.param == "ahead"
    cls = metered.MeteredAsyncScheduler if ahead else metered.MeteredScheduler
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=16, dtype=torch.float32)
    monkeypatch.setattr(config.scheduler_config, "async_scheduling", ahead)
    scheduler = cls(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=2000,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        hash_block_size=BLOCK,
        log_stats=True,
    )
    yield Core(scheduler, meter, 2 if ahead else 1)
    scheduler.shutdown()
    meter.close()


def test_real_schedulers_keep_exact_books(core: Core) -> None:
    for number in range(8):
        core.add(10 + 60 * number, 3 + number)
    core.run()
    core.check()
    assert core.scheduler.meter.unattributed_ns == 0
    computed = [
        sum(row.prefill_tokens for row in exchange._rows.values()) for exchange in core.exchanges
    ]
    assert computed == [10 + 60 * number for number in range(8)]


def test_choices_are_charged_to_their_exchange(core: Core) -> None:
    core.add(20, 5)
    core.add(20, 5, exchange=core.exchanges[0])
    core.add(30, 5)
    core.run()
    core.check()
    assert len(core.exchanges) == 2
    assert core.exchanges[0].ended_requests == 2


def test_an_abort_in_flight_is_charged_and_then_over(core: Core) -> None:
    names = [core.add(30, 50) for _ in range(2)]
    core.schedule()
    core.update()
    for _ in range(core.depth):
        core.schedule()
    core.scheduler.finish_requests(names[0], RequestStatus.FINISHED_ABORTED)
    core.meter.drain()
    assert not core.exchanges[0].ended_requests
    core.update()
    if core.depth > 1:
        core.update()
    core.meter.drain()
    assert core.exchanges[0].ended_requests == 1
    spent = core.exchanges[0].total_us
    core.run()
    core.check()
    assert core.exchanges[0].total_us == spent > 0
    assert core.exchanges[1].total_us > spent


def test_an_abort_of_what_never_ran_costs_nothing(core: Core) -> None:
    name = core.add(30, 50)
    core.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)
    core.meter.drain()
    assert core.exchanges[0].ended_requests == 1
    assert core.exchanges[0].total_us == 0


def test_a_stop_token_ends_at_once_and_its_overrun_is_nobodys(core: Core) -> None:
    name = core.add(30, 50)
    core.schedule()
    core.update()
    for _ in range(core.depth):
        core.schedule()
    core.update(stop=(name,))
    core.meter.drain()
    assert core.exchanges[0].ended_requests == 1
    spent = core.exchanges[0].total_us
    core.run()
    core.check()
    assert core.exchanges[0].total_us == spent
    overrun = core.scheduler.meter.overrun_ns
    assert (overrun > 0) is (core.depth > 1)
    assert core.scheduler.meter.unattributed_ns == overrun


def test_the_final_figure_lies_in_the_socket_when_the_output_leaves(core: Core) -> None:
    core.add(30, 1)
    core.schedule()
    core.update()
    (exchange,) = core.exchanges

    async def final() -> int | None:
        return await exchange.final(0)

    assert asyncio.run(final()) == exchange.total_us > 0
    assert exchange.complete


def test_a_prefix_that_is_cached_is_not_computed_again(core: Core) -> None:
    core.add(200, 2, first=5)
    core.run()
    core.add(200, 2, first=5)
    core.run()
    core.check()
    (fresh,), (cached,) = (exchange._rows.values() for exchange in core.exchanges)
    assert fresh.cached_tokens == 0
    assert cached.cached_tokens == 192
    assert cached.prefill_tokens == 8


# -- weights ------------------------------------------------------------------------------------


def test_weights_count_as_vllm_counts(config: VllmConfig) -> None:
    """Against vLLM's own analytic model; it counts attention of prompts without causality."""
    theirs = ModelMetrics(config)
    shape = model_shape(config.model_config.hf_text_config, weight_bytes=4, kv_bytes=4)
    for tokens, context in ((1, 0), (1, 100), (1, 3000), (2, 500)):
        step = ExecutionContext.from_single_request(tokens, context + tokens, is_prefill=False)
        ours = (
            2 * shape.token_params * tokens
            + 4 * shape.layers * shape.heads * shape.head_size * tokens * (context + tokens)
            + 2 * shape.hidden * shape.vocabulary * tokens
        )
        assert ours == theirs.get_num_flops(step, per_gpu=False)
    longer, shorter = (
        ExecutionContext.from_single_request(1, context, is_prefill=False)
        for context in (2000, 1000)
    )
    read = theirs.get_read_bytes(longer, False) - theirs.get_read_bytes(shorter, False)
    assert read == 1000 * shape.kv_token_bytes


def test_the_cost_model_follows_the_configuration(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = metered.cost_of(config, "H100")
    monkeypatch.setattr(config.cache_config, "cache_dtype", "fp8")
    monkeypatch.setattr(config, "lora_config", SimpleNamespace(max_lora_rank=16))
    other = metered.cost_of(config, "H100")
    assert plain.adapter_token_s == 0 < other.adapter_token_s
    assert other.context_s == plain.context_s / 4
