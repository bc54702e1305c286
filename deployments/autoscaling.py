"""How many replicas a deployment has: from the load that its replicas push.

Requests to engines do not pass through Serve, so Serve cannot count them. Replicas report the
requests that run or wait in them (``record_autoscaling_stats``); a deployment that reports nothing,
such as the gateway, is judged by the requests that Serve sees.
"""

# NOTE: Serve ships the policy to its controller by value, so this module imports nothing of ours
# at run time.
from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

    from deployments.config import ReplicasConfig

LOAD = "load"
"""Name of the metric: requests running or waiting in a replica."""


def load_policy(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Replicas so that each has the target load; Serve applies delays and bounds.

    A replica that has not reported yet (it has just started) counts with the average of the others,
    so that a new one neither hides load nor adds any.
    """
    running = context.current_num_replicas
    if running == 0:
        return context.target_num_replicas, {}
    reported = (context.aggregated_metrics or {}).get(LOAD)
    if reported:
        total = sum(reported.values()) * max(1.0, running / len(reported))
    else:
        total = float(context.total_num_requests)
    target = context.config.get_target_ongoing_requests()  # type: ignore[union-attr]
    return total / target, {}


def load_autoscaling(replicas: ReplicasConfig) -> dict[str, Any]:
    """Options of ``serve.deployment``: a fixed number of replicas, or a range."""
    if replicas.min == replicas.max:
        return {"num_replicas": replicas.min}
    return {
        "autoscaling_config": {
            "min_replicas": replicas.min,
            "initial_replicas": max(1, replicas.min),
            "max_replicas": replicas.max,
            "target_ongoing_requests": replicas.target_load,
            "look_back_period_s": 15.0,
            # Loading weights takes minutes, so grow soon and shrink late.
            "upscale_delay_s": 10.0,
            "downscale_delay_s": 600.0,
            "policy": {"policy_function": "deployments.autoscaling:load_policy"},
        }
    }
