"""Runs one Ray Serve target of the benchmark until it is stopped; prints one JSON line when ready.

python -m benchmarks.gateway.serve_target gatehouse|stock --port 8000 --state DIR

SIGTERM stops it in order; nothing is left running.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.gateway.ports import free_port
from deployments.local_cluster import set_environment
from deployments.processes import adopt_orphans, descendants, end

MODELS = ("mock-8b", "mock-paced")
STOP_S = 45.0
"""Bound on Serve's orderly stop."""


def environment(state: Path) -> None:
    """What a cluster in production sets, and ports of its own so that two targets run at once."""
    folder = state / "h"  # short: Serve adds 57 characters to the socket's, of 97 at most
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(
        RAY_SERVE_ENABLE_HA_PROXY="1",
        RAY_SERVE_THROUGHPUT_OPTIMIZED="1",
        RAY_SERVE_HAPROXY_CONFIG_FILE_LOC=str(folder / "haproxy.cfg"),
        RAY_SERVE_HAPROXY_SOCKET_PATH=str(folder / "admin.sock"),
        RAY_SERVE_HAPROXY_SERVER_STATE_BASE=str(folder),
        RAY_SERVE_HAPROXY_SERVER_STATE_FILE=str(folder / "server-state"),
        RAY_SERVE_HAPROXY_METRICS_PORT=str(free_port()),
        RAY_SERVE_HAPROXY_STATS_PORT=str(free_port()),
        RAY_SERVE_HAPROXY_NBTHREAD="1",
        # Clients are gone when a target stops; by default it would drain for 30 s.
        RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S="1",
        # Ray runs its workers at niceness 15; the other targets run at 0.
        RAY_worker_niceness="0",
        GATEHOUSE_STATE=str(state),
        GATEHOUSE_EVIDENCE=str(state / "evidence"),
    )
    set_environment(os.environ)


def gatehouse(options: argparse.Namespace) -> tuple[object, str, Callable[[], None]]:
    """Our application around instant engines, a real access token, and what stops the issuer."""
    from benchmarks.gateway.instant import InstantEngine
    from benchmarks.gateway.metered import MeteredInstantEngine, UnbookedIngress
    from deployments.app import assemble
    from deployments.config import AppConfig
    from deployments.dev_process import DevIdentityProvider
    from deployments.dev_token import fetch_token

    state: Path = options.state
    issuer = f"http://127.0.0.1:{free_port()}"
    provider = DevIdentityProvider(issuer, state)
    provider.start()
    identity = state / "identity.yaml"
    local = Path("config/identity.local.yaml").read_text()
    identity.write_text(local.replace("http://127.0.0.1:8100", issuer))
    policy = state / "policy.yaml"
    policy.write_text(
        Path("config/policy.yaml")
        .read_text()
        .replace("requests_per_minute: 600,", "requests_per_minute: 100000,")
        .replace("parallel_requests: 64}", f"parallel_requests: {options.parallel_requests}}}")
    )
    args = AppConfig.model_validate(
        {
            "mode": "local",
            "identity": str(identity),
            "policy": str(policy),
            "gateway": {
                "cpus": 0.2,
                "replicas": {"min": options.replicas, "max": options.replicas},
                "data_plane": options.data_plane,
                "max_ongoing_requests": options.max_ongoing_requests,
                "max_queued_requests": options.max_queued_requests,
            },
            "models": [
                {
                    "id": model,
                    "tier": "small",
                    "source": str(state),
                    "context_tokens": 4096,
                    "max_in_flight": 4096,
                    "accelerator": {"kind": "cpu", "cpus": 0.2},
                }
                for model in MODELS
            ],
        }
    )
    if options.books == "off":
        app = assemble(args, InstantEngine, UnbookedIngress)
    else:
        app = assemble(args, MeteredInstantEngine)
    return app, fetch_token(issuer, "data-scientist"), provider.stop


def stock() -> tuple[object, str, Callable[[], None]]:
    """Ray's own ingress around an instant engine; it knows no tokens."""
    os.environ["RAYLLM_VLLM_ENGINE_CLS"] = "benchmarks.gateway.stock.InstantStockEngine"
    from ray.serve.llm import LLMConfig, build_openai_app

    config = LLMConfig(
        model_loading_config={"model_id": "mock-8b", "model_source": "mock"},
        accelerator_config={"kind": "cpu"},
        placement_group_config={"bundle_per_worker": {"CPU": 0.1}},
        deployment_config={"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.1}},
        runtime_env={"env_vars": {"RAYLLM_VLLM_ENGINE_CLS": os.environ["RAYLLM_VLLM_ENGINE_CLS"]}},
    )
    ingress = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.1}}
    app = build_openai_app({"llm_configs": [config], "ingress_deployment_config": ingress})
    return app, "none", lambda: None


def stop() -> None:
    """Stop Serve in order within a bound, then Ray, then what is left below us."""
    import ray
    from ray import serve

    # NOTE: a thread, since `serve.shutdown` waits for draining replicas without a bound.
    orderly = threading.Thread(target=serve.shutdown, daemon=True)
    orderly.start()
    orderly.join(STOP_S)
    ray.shutdown()
    end(descendants(os.getpid()), 5.0)


def main() -> int:
    """Start the target, say so, and wait for a signal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=["gatehouse", "stock"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--data-plane", choices=["socket", "handle"], default="socket")
    parser.add_argument(
        "--books", choices=["on", "off"], default="on", help="ledger, audit and metering"
    )
    parser.add_argument("--replicas", type=int, default=1, help="gateways")
    parser.add_argument("--max-ongoing-requests", type=int, default=2000)
    parser.add_argument("--max-queued-requests", type=int, default=256)
    parser.add_argument("--parallel-requests", type=int, default=1000, help="of one caller")
    options = parser.parse_args()
    options.state.mkdir(parents=True, exist_ok=True)
    environment(options.state)
    # HAProxy's parent ends before it does; so it stays below us, in every count and at the end.
    adopt_orphans()
    import ray
    from ray import serve

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    stop_issuer: Callable[[], None] = lambda: None  # noqa: E731
    try:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
        quiet = {"enable_access_log": False}
        serve.start(http_options={"host": "127.0.0.1", "port": options.port}, logging_config=quiet)
        app, token, stop_issuer = gatehouse(options) if options.target == "gatehouse" else stock()
        serve.run(app, name="bench", route_prefix="/", logging_config=quiet)  # type: ignore[arg-type]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # Ray has set one of its own
        print(json.dumps({"pid": os.getpid(), "token": token}), flush=True)
        while True:
            time.sleep(3600)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop_issuer()
        stop()


if __name__ == "__main__":
    raise SystemExit(main())
