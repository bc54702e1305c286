"""GPUs that a configuration needs, against those a Ray cluster has or its autoscaler can add."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deployments.config import AppConfig

LOCAL_FILE = "serve_config.local.yaml"
_TYPE_PREFIX = "accelerator_type:"


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Nodes of one shape."""

    gpus: float
    """GPUs per node."""
    accelerator_types: frozenset[str]
    count: int
    """Nodes there are, or that the autoscaler may have at most."""


@dataclass(frozen=True, slots=True)
class GpuNeed:
    """What the least number of replicas of one model takes."""

    model: str
    accelerator_type: str | None
    gpus: int


def needs(config: AppConfig) -> list[GpuNeed]:
    """GPUs per model, and for scores; a model that scales to zero still has to fit once."""
    router = config.router
    scores = math.ceil(router.gpus * router.replicas.min)
    return [
        GpuNeed(
            model.id,
            model.accelerator.type,
            max(1, model.replicas.min)
            * model.accelerator.tensor_parallel
            * model.accelerator.pipeline_parallel,
        )
        for model in config.models
        if model.accelerator.kind == "gpu"
    ] + ([GpuNeed("router", None, scores)] if scores else [])


def shortfalls(wanted: Sequence[GpuNeed], groups: Sequence[NodeGroup]) -> list[str]:
    """One line for each type of GPU that the groups cannot supply; empty if all fit.

    Counts GPUs, not placements: a tensor-parallel replica may span nodes.
    """
    lines = []
    for kind in dict.fromkeys(need.accelerator_type for need in wanted if need.accelerator_type):
        asked = [need for need in wanted if need.accelerator_type == kind]
        have = sum(g.gpus * g.count for g in groups if kind in g.accelerator_types)
        if (total := sum(need.gpus for need in asked)) > have:
            models = ", ".join(need.model for need in asked)
            lines.append(f"{models}: {total} GPU(s) of type {kind} needed, {have:g} can be had")
    total = sum(need.gpus for need in wanted)
    have = sum(g.gpus * g.count for g in groups)
    if total > have and not lines:
        lines.append(f"{total} GPU(s) needed for all models, {have:g} can be had")
    return lines


def node_group(resources: Mapping[str, float], count: int = 1) -> NodeGroup:
    """The shape that Ray's resource names describe."""
    types = frozenset(
        name.removeprefix(_TYPE_PREFIX) for name in resources if name.startswith(_TYPE_PREFIX)
    )
    return NodeGroup(resources.get("GPU", 0.0), types, count)


def cluster_groups() -> list[NodeGroup]:
    """Node groups of the Ray cluster that this process is connected to.

    With an autoscaler, its node groups at their largest; else the nodes that are alive.
    """
    import ray
    from ray._private.state import state

    config = state.get_cluster_config()
    if config is not None and config.node_group_configs:
        return [
            node_group(dict(group.resources), max(0, group.max_count))
            for group in config.node_group_configs
        ]
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node_group(node["Resources"]) for node in nodes if node["Alive"]]
