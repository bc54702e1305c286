"""A flood on a real engine: who is served when, by the order of service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from deployments.checkpoints import build_apart
from deployments.config import ModelConfig
from deployments.engine_config import engine_environment
from deployments.metering.keys import FAIRNESS_VARIABLE
from tests.serve.fair_host import FairHost

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ROOT / "build" / "checkpoints"
PLACES = 4
BODY = {
    "model": "small",
    "messages": [{"role": "user", "content": "Hello"}],
    "max_completion_tokens": 40,
    "ignore_eos": True,
    "stream": True,
}
CRITICAL = {"department": "support", "priority": -10}


def engine(**variables: str) -> Any:
    build_apart(CHECKPOINTS)
    model = ModelConfig(
        id="small",
        tier="small",
        source=str(CHECKPOINTS / "small"),
        context_tokens=1024,
        accelerator={"kind": "cpu"},
        engine={
            "enforce_eager": True,
            "kv_cache_memory_bytes": 64 << 20,
            "max_num_seqs": PLACES,
            "max_num_batched_tokens": 512,
        },
    )
    environment = {**engine_environment(model), "PYTHONPATH": str(ROOT), **variables}
    actor: Any = ray.remote(FairHost)
    handle = actor.options(
        num_cpus=0, max_concurrency=100, runtime_env={"env_vars": environment}
    ).remote(model.model_dump(mode="json"))
    assert ray.get(handle.ready.remote(), timeout=180) == "small"
    return handle


@pytest.fixture(scope="module")
def fair(ray_local: None) -> Iterator[Any]:
    handle = engine()
    yield handle
    ray.kill(handle)


def ask(handle: Any, *arguments: Any) -> tuple[list[str], dict[str, str]]:
    order, errors = ray.get(handle.begun.remote(*arguments), timeout=120)
    return order, errors


def test_a_flood_does_not_delay_a_critical_request(fair: Any) -> None:
    order, errors = ask(fair, 40, 6, BODY, [CRITICAL])
    assert not errors
    assert len(order) == 41
    # Those that ran may begin before it, and at most one that took a place as it was on its way.
    assert order.index("support") <= 6 + PLACES + 1


def test_a_place_is_free_for_a_critical_request_where_one_came_lately(fair: Any) -> None:
    order, errors = ask(fair, 24, 6, {**BODY, "max_completion_tokens": 150}, [CRITICAL], [CRITICAL])
    assert not errors
    assert order.index("support") <= 6 + PLACES


def test_departments_take_turns_behind_a_flood(fair: Any) -> None:
    late = [{"department": "hr"}] * 6
    order, errors = ask(fair, 40, 6, BODY, late)
    assert not errors
    last = max(at for at, name in enumerate(order) if name == "hr")
    # All six are served while the flood has hardly more turns than they have.
    assert last <= 6 + PLACES + 2 * len(late) + PLACES


def test_batch_work_is_last(fair: Any) -> None:
    order, errors = ask(fair, 20, 4, BODY, [{"department": "archive", "priority": 10}])
    assert not errors
    assert order[-PLACES:].count("archive") == 1


def test_who_waits_too_long_is_told_so_and_costs_nothing(fair: Any) -> None:
    impatient = {"department": "hr", "account": "hr/impatient", "patience_ms": 50}
    order, errors = ask(fair, 16, 4, {**BODY, "max_completion_tokens": 300}, [impatient])
    assert errors == {"hr": "overloaded"}
    assert order == ["marketing"] * 16
    rows = ray.get(fair.meter.remote(), timeout=30)["rows"].values()
    assert all(row.ended for row in rows)
    spent = {row.account: row.gpu_us for row in rows}
    assert spent["hr"] > 0
    assert not spent.get("hr/impatient")


def test_first_come_first_served_is_there_to_compare(ray_local: None) -> None:
    handle = engine(**{FAIRNESS_VARIABLE: "fcfs"})
    try:
        order, errors = ask(handle, 20, 4, BODY, [CRITICAL])
        assert not errors
        assert order.index("support") >= 16
    finally:
        ray.kill(handle)
