"""Read this first: ``build_app`` turns the configuration into the Serve application.

``serve run serve_config.yaml`` calls it with the ``args`` of the file. It validates everything
before anything starts, and imports neither vLLM nor torch: each engine replica does that itself.
"""

# NOTE: no ``from __future__ import annotations`` here: Serve looks the builder's argument type up
# at run time to validate ``args``; with postponed annotations it would pass a plain dict.
import time
from typing import Any

from ray import serve
from ray.serve import Application

from deployments.autoscaling import load_autoscaling
from deployments.config import AppConfig
from deployments.engine import EngineDeployment
from deployments.engine_config import engine_options, located
from deployments.ingress import GatewayIngress
from deployments.ledger_budgets import Budgets
from deployments.routing.plan import RoutingPlan
from deployments.routing.router_deployment import RouterDeployment, router_options
from deployments.settings import from_environment
from governance.budget.config import load_budgets
from governance.identity.config import load_identity
from governance.policy.load import load_policy

DRAIN_TIMEOUT_S = 60.0
"""Given to a gateway that stops, in seconds. Below 60 Serve may kill one that still drains."""


def build_app(args: AppConfig) -> Application:
    """Build the application: one deployment per model, one for scores, and the gateway in front.

    Args:
        args: What runs.

    Raises:
        ConfigError: A file is wrong; names the file, the place and the remedy.
    """
    return assemble(args, EngineDeployment)


def assemble(args: AppConfig, engine: type, ingress: type = GatewayIngress) -> Application:
    """The application around a class of engine deployments.

    Args:
        args: What runs.
        engine: Constructed with (model, state_dir, host); benchmarks pass one without a model.
        ingress: The gateway; benchmarks pass one without some of its stages.

    Raises:
        ConfigError: As ``build_app``.
    """
    settings = from_environment()
    root = settings.config_root
    identity = load_identity(root / args.identity, local=args.mode == "local")
    policy = load_policy(root / args.policy, args.model_infos())
    limits = load_budgets(root / args.budgets)
    budgets = Budgets.of(limits, args.models, built_us=time.time_ns() // 1000)
    state = str(settings.state)
    deployment: Any = serve.deployment
    # Ray replaces a loopback node address by an outer one, so local mode names it here.
    host = "127.0.0.1" if args.mode == "local" else None
    routing = RoutingPlan.of(args, root, limits)
    models = [located(model, root) for model in args.models]
    engines = {
        model.id: deployment(engine, **engine_options(model)).bind(
            model.model_dump(mode="json"), state, host
        )
        for model in models
    }
    gateway = args.gateway
    front = deployment(
        serve.ingress()(ingress),
        name="GatewayIngress",
        max_ongoing_requests=gateway.max_ongoing_requests,
        max_queued_requests=gateway.max_queued_requests,
        graceful_shutdown_timeout_s=DRAIN_TIMEOUT_S,
        ray_actor_options={"num_cpus": gateway.cpus},
        **load_autoscaling(gateway.replicas),
    )
    application: Application = front.bind(
        args.model_dump(mode="json"),
        identity.model_dump(mode="json"),
        policy.model_dump(mode="json"),
        budgets.dump(),
        settings.dump(),
        engines,
        routing.dump(),
        _scorer(args, routing),
    )
    return application


def _scorer(args: AppConfig, routing: RoutingPlan) -> Application | None:
    """The scorer's deployment, where it has one."""
    if routing.scorer is None or args.router.place == "gateway":
        return None
    deployment: Any = serve.deployment
    scorer: Application = deployment(RouterDeployment, **router_options(args.router)).bind(
        args.router.model_dump(mode="json"), routing.scorer
    )
    return scorer
