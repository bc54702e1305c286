"""How many replicas: the policy, and the options it travels in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.serve.config import AutoscalingConfig

from deployments.autoscaling import load_autoscaling, load_policy
from deployments.config import ReplicasConfig


def context(running: int, loads: dict[str, float] | None, requests: float = 0.0) -> Any:
    options = load_autoscaling(ReplicasConfig(min=1, max=8, target_load=10))
    return SimpleNamespace(
        current_num_replicas=running,
        target_num_replicas=running,
        aggregated_metrics=None if loads is None else {"load": loads},
        total_num_requests=requests,
        config=AutoscalingConfig(**options["autoscaling_config"]),
    )


@pytest.mark.parametrize(
    ("running", "loads", "wanted"),
    [
        (2, {"a": 10.0, "b": 10.0}, 2.0),
        (2, {"a": 30.0, "b": 10.0}, 4.0),
        (2, {"a": 0.0, "b": 0.0}, 0.0),
        (3, {"a": 20.0}, 6.0),  # the two that have not reported count as the one that has
    ],
)
def test_replicas_follow_the_load_that_they_push(
    running: int, loads: dict[str, float], wanted: float
) -> None:
    assert load_policy(context(running, loads, requests=999.0))[0] == wanted


@pytest.mark.parametrize("loads", [None, {}])
def test_a_deployment_that_pushes_nothing_is_judged_by_requests(loads: Any) -> None:
    assert load_policy(context(1, loads, requests=25.0))[0] == 2.5


def test_nothing_running_keeps_the_target() -> None:
    assert load_policy(context(0, {"a": 50.0}))[0] == 0


def test_a_fixed_number_has_no_autoscaling() -> None:
    assert load_autoscaling(ReplicasConfig(min=2, max=2)) == {"num_replicas": 2}


def test_the_policy_travels_to_the_controller_by_value() -> None:
    options = load_autoscaling(ReplicasConfig(min=1, max=4, target_load=10))
    config = AutoscalingConfig(**options["autoscaling_config"])
    policy = cloudpickle.loads(config.policy.get_serialized_policy_def())
    assert policy(context(2, {"a": 30.0, "b": 10.0}))[0] == 4.0
