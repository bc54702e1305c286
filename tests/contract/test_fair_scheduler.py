"""Fair order and floors in vLLM's own schedulers, without a model; and what they rely on there.

When a test here fails after an upgrade, ``deployments/scheduling`` is all the code there is to
change.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from deployments.metering.collector import MeterCollector
from deployments.metering.keys import (
    FAIR_KEY,
    FAIRNESS_VARIABLE,
    METER_KEY,
    SOCKET_VARIABLE,
)
from deployments.scheduling.terms import Terms
from routing.fairness import BATCH, CRITICAL, STANDARD

with warnings.catch_warnings():
    # torch warns of itself while vLLM is imported, and a warning is an error here.
    warnings.simplefilter("ignore")
    from vllm.config import VllmConfig
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.core.sched.request_queue import RequestQueue
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request, RequestStatus
    from vllm.v1.structured_output import StructuredOutputManager

    from deployments.metering import scheduler as metered
    from deployments.scheduling import fair as scheduling
    from deployments.scheduling.queues import SkippedQueue, WaitingQueue
    from tests.contract.test_vllm_interface import BLOCK, STOP_TOKEN, Core, config, request_of
    from tests.unit.test_meter_collector import ticket

__all__ = ["config"]

WHO = {"hr": 1, "marketing": 2, "support": 3, "archive": 4}


class FairCore(Core):
    """Drives a scheduler, and keeps who started, in order."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.steps: list[dict[str, int]] = []
        self.started: list[str] = []

    def ask(
        self,
        department: str,
        rank: int = STANDARD,
        *,
        prompt: int = 20,
        answer: int = 4,
        weight: int = 1000,
        served: int = 0,
    ) -> str:
        exchange = self.meter.open(ticket(len(self.exchanges) + 1))
        self.exchanges.append(exchange)
        exchange.submitted += 1
        name = f"{department}-{exchange.key}"
        terms = Terms(WHO[department], rank, weight, served)
        params = SamplingParams(
            max_tokens=answer,
            extra_args={METER_KEY: exchange.key, FAIR_KEY: terms.dump()},
        )
        params.update_from_generation_config({}, eos_token_id=STOP_TOKEN)
        start = 4096 * exchange.key
        tokens = list(range(start, start + prompt))
        hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler.add_request(Request(name, tokens, params, None, block_hasher=hasher))
        return name

    def schedule(self) -> bool:
        worked = super().schedule()
        output, _ = self.flying[-1]
        self.steps.append(dict(output.num_scheduled_tokens))
        self.started += [new.req_id for new in output.scheduled_new_reqs]
        self.meter.drain()  # the socket holds few datagrams, and nobody else reads it
        return worked

    def departments(self) -> list[str]:
        return [name.split("-")[0] for name in self.started]


Build = Callable[..., FairCore]


@pytest.fixture(params=["sync", "ahead"])
def build(
    request: pytest.FixtureRequest, config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Build]:
    cores: list[FairCore] = []
    ahead = request.param == "ahead"

    def build(seqs: int = 4, tokens: int = 256, blocks: int = 2000) -> FairCore:
        meter = MeterCollector("small")
        monkeypatch.setenv(SOCKET_VARIABLE, meter.path)
        monkeypatch.setattr(config.scheduler_config, "policy", "priority")
        monkeypatch.setattr(config.scheduler_config, "max_num_seqs", seqs)
        monkeypatch.setattr(config.scheduler_config, "max_num_batched_tokens", tokens)
        monkeypatch.setattr(config.scheduler_config, "async_scheduling", ahead)
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=2, head_size=16, dtype=torch.float32
        )
        cls = metered.MeteredAsyncScheduler if ahead else metered.MeteredScheduler
        monkeypatch.setattr(config.cache_config, "num_gpu_blocks", blocks)
        scheduler = cls(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
            log_stats=True,
        )
        cores.append(FairCore(scheduler, meter, 2 if ahead else 1))
        return cores[-1]

    yield build
    for core in cores:
        core.scheduler.shutdown()
        core.meter.close()


# -- what is relied on ------------------------------------------------------------------------


def test_the_queues_are_vllms_queues() -> None:
    for ours in (WaitingQueue, SkippedQueue):
        assert issubclass(ours, RequestQueue)
        assert not inspect.isabstract(ours), (
            "vLLM's RequestQueue has a new method: add it to deployments/scheduling/queues.py."
        )


def test_the_loop_asks_what_the_floors_answer() -> None:
    source = inspect.getsource(Scheduler.schedule)
    for line in (
        "while (self.waiting or self.skipped_waiting) and token_budget > 0:",
        "request_queue = self._select_waiting_queue_for_scheduling()",
        "token_budget = self.max_num_scheduled_tokens",
        "while req_index < len(self.running) and token_budget > 0:",
        "key=lambda r: (r.priority, r.arrival_time),",
    ):
        assert line in source, (
            f"Scheduler.schedule has no {line!r} any more: a floor ends the loop through the truth "
            "of the queues, bounds a step through max_num_scheduled_tokens, and pauses prompts by "
            "taking them out of running. See deployments/scheduling/floors.py."
        )


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(n=2, seed=1, extra_args={FAIR_KEY: Terms(3, CRITICAL, 2000, 17).dump()}),
        PoolingParams(extra_kwargs={FAIR_KEY: Terms(3, CRITICAL, 2000, 17).dump()}),
    ],
    ids=["sampling", "pooling"],
)
def test_terms_reach_the_core(params: Any) -> None:
    request = Request.from_engine_core_request(request_of(params), None)
    found = Terms.load(scheduling._extra(request).get(FAIR_KEY))
    assert found == Terms(3, CRITICAL, 2000, 17)


@pytest.mark.parametrize(
    "value", [None, 7, [], [1, 1, 1], [1, 9, 1000, 0], [1, True, 1000, 0], [1, 1, "1000", 0]]
)
def test_odd_terms_are_a_strangers(value: Any) -> None:
    assert Terms.load(value) == Terms()


# -- order ------------------------------------------------------------------------------------


def test_departments_take_turns_behind_a_flood(build: Build) -> None:
    core = build(seqs=2)
    for _ in range(20):
        core.ask("marketing")
    for _ in range(5):
        core.ask("hr")
    core.run()
    core.check()
    hr = [at for at, name in enumerate(core.departments()) if name == "hr"]
    assert len(hr) == 5
    # Fairly every second one, but for what the meter finds one to cost more than the other.
    assert hr[-1] < 20
    assert core.departments()[-1] == "marketing"


def test_a_critical_request_is_next_whoever_waits(build: Build) -> None:
    core = build(seqs=4)
    for _ in range(30):
        core.ask("marketing", answer=20)
        core.ask("archive", BATCH)
    for _ in range(3):
        core.schedule()
        core.update()
    before = len(core.started)
    core.ask("support", CRITICAL)
    core.run()
    core.check()
    assert core.departments()[before] == "support"
    first_batch = core.departments().index("archive")
    assert "marketing" not in core.departments()[first_batch:]


def test_service_elsewhere_lets_others_go_first(build: Build) -> None:
    core = build(seqs=1)
    core.ask("marketing")
    core.ask("hr")
    core.ask("hr")
    core.ask("marketing", served=90_000_000)
    core.run()
    assert core.departments() == ["hr", "hr", "marketing", "marketing"]


def test_a_batch_request_grows_up(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    core = build(seqs=1)
    core.ask("archive", BATCH)
    core.ask("hr")
    now_us = scheduling._now_us() + 31_000_000
    monkeypatch.setattr(scheduling, "_now_us", lambda: now_us)
    core.ask("marketing")
    core.run()
    assert core.departments() == ["archive", "hr", "marketing"]


def test_fcfs_is_the_order_of_arrival(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAIRNESS_VARIABLE, "fcfs")
    core = build(seqs=1)
    order = [core.ask("marketing"), core.ask("archive", BATCH), core.ask("support", CRITICAL)]
    core.run()
    core.check()
    assert core.started == order


def test_who_is_aborted_leaves_no_trace(build: Build) -> None:
    core = build(seqs=2)
    names = [core.ask("marketing", answer=50), core.ask("support", CRITICAL), core.ask("hr")]
    core.schedule()
    core.update()
    core.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)
    core.run()
    assert not core.scheduler._bills
    assert not core.scheduler._floors.urgent
    assert core.scheduler.fair.virtual_us() == {}
    core.ask("hr")
    core.run()
    assert core.departments()[-1] == "hr"


def test_a_department_pays_what_the_meter_says(build: Build) -> None:
    core = build(seqs=4)
    for _ in range(3):
        core.ask("hr", answer=10)
        core.ask("marketing", answer=10, weight=2000)
    last = core.ask("hr", answer=400)
    for _ in range(40):
        core.schedule()
        core.update()
    fair = core.scheduler.fair
    assert last in fair
    paid = fair._departments["1"].total_us
    metered_us = sum(
        (exchange.prefill_ns + exchange.decode_ns) // 1000
        for exchange, name in zip(core.exchanges, "hmhmhmh", strict=True)
        if name == "h"
    )
    core.meter.drain()
    assert metered_us - paid >= 0 or paid - metered_us < 150_000
    core.run()
    core.check()
    total_us = sum(x.prefill_ns + x.decode_ns for x in core.exchanges[::2]) / 1000
    assert fair._departments["1"].total_us == pytest.approx(total_us, abs=5000)


# -- floors -----------------------------------------------------------------------------------


def test_a_place_stays_free_for_who_is_critical(build: Build) -> None:
    core = build(seqs=8)
    core.ask("support", CRITICAL, answer=2)
    core.run()
    for _ in range(20):
        core.ask("marketing", answer=50)
    for _ in range(6):
        core.schedule()
        core.update()
    assert len(core.scheduler.running) == 7
    core.ask("support", CRITICAL, answer=50)
    core.schedule()
    assert core.departments()[-1] == "support"
    assert len(core.scheduler.running) == 8
    core.run()
    core.check()


def test_without_critical_requests_every_place_is_taken(build: Build) -> None:
    core = build(seqs=8)
    for _ in range(20):
        core.ask("marketing", answer=50)
    for _ in range(3):
        core.schedule()
        core.update()
    assert len(core.scheduler.running) == 8
    core.run()
    core.check()


def test_cache_stays_free_for_who_is_critical(build: Build) -> None:
    core = build(seqs=8, blocks=100)
    core.ask("support", CRITICAL, answer=2)
    core.run()
    for _ in range(6):
        core.ask("marketing", prompt=30 * BLOCK, answer=50)
    for _ in range(20):
        core.schedule()
        core.update()
    assert sum(name.startswith("marketing") for name in core.started) == 2
    core.run(most=2000)
    core.check()


def test_a_prompt_too_long_for_the_floor_runs_alone(build: Build) -> None:
    core = build(seqs=8, blocks=100)
    core.ask("support", CRITICAL, answer=2)
    core.run()
    name = core.ask("marketing", prompt=95 * BLOCK, answer=4)
    core.schedule()
    assert core.started[-1] == name
    core.run()
    core.check()


def test_others_prompts_pause_for_a_critical_one(build: Build) -> None:
    core = build(seqs=8, tokens=256)
    running = core.ask("hr", answer=60)
    core.schedule()
    core.update()
    long = core.ask("marketing", prompt=2000)
    core.schedule()
    core.update()
    waits = core.ask("marketing", prompt=100)
    critical = core.ask("support", CRITICAL, prompt=300)
    at = len(core.steps)
    core.run()
    core.check()
    # Its prompt takes two steps, in which answers go on and nobody else's prompt is computed.
    for step in core.steps[at : at + 2]:
        assert critical in step
        assert running in step
        assert long not in step
        assert waits not in step
    assert long in core.steps[at + 2]


def test_steps_are_short_while_critical_requests_come(build: Build) -> None:
    core = build(seqs=8, tokens=256)
    long = core.ask("marketing", prompt=1000, answer=2)
    core.schedule()
    assert core.steps[-1] == {long: 256}
    core.run()
    core.ask("support", CRITICAL, answer=2)
    core.run()
    long = core.ask("marketing", prompt=1000, answer=2)
    core.schedule()
    assert core.steps[-1] == {long: 64}
    core.run()
    core.check()


def test_nobody_pauses_for_who_cannot_start(build: Build) -> None:
    """All places are taken, so others' prompts may as well go on."""
    core = build(seqs=2, tokens=256)
    core.ask("marketing", prompt=1500, answer=50)
    core.ask("marketing", prompt=1500, answer=50)
    core.schedule()
    core.update()
    critical = core.ask("support", CRITICAL)
    at = len(core.steps)
    core.run()
    core.check()
    assert critical in core.started
    assert sum(not step for step in core.steps[at : at + 12]) <= 2


def test_who_is_preempted_is_least_urgent_and_was_given_most(build: Build) -> None:
    core = build(seqs=8, blocks=64)
    core.ask("archive", BATCH, prompt=BLOCK * 12, answer=200)
    core.ask("hr", prompt=BLOCK * 12, answer=200)
    core.ask("support", CRITICAL, prompt=BLOCK * 12, answer=200)
    core.ask("support", CRITICAL, prompt=BLOCK * 12, answer=200)
    preempted: list[str] = []
    original = core.scheduler._preempt_request

    def preempt(request: Any, *arguments: Any, **options: Any) -> None:
        preempted.append(request.request_id.split("-")[0])
        original(request, *arguments, **options)

    core.scheduler._preempt_request = preempt
    core.run(most=3000)
    core.check()
    assert preempted
    assert "support" not in preempted
    assert preempted[0] == "archive"
