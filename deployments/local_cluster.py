"""A Ray cluster of one machine inside this process, with Serve on it.

Ray listens on all interfaces whatever it is told, and whoever reaches its ports runs code; so a
random token is required of every connection (``RAY_AUTH_MODE=token``).
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import threading
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.machine import LocalMachine
from deployments.preflight import OBJECT_STORE_BYTES
from deployments.processes import ProcessId, descendants, identify, program
from deployments.serve_file import ServeFile

KEPT_SESSIONS = 3
"""Ray sessions whose logs stay; each start makes a new one."""
_VITAL = ("gcs_server", "raylet")


class ClusterError(Exception):
    """Ray or Serve did not come up, or ended; one line."""


@dataclass(frozen=True, slots=True)
class AppStatus:
    """Where the application stands."""

    state: str
    """Serve's name of it, such as ``DEPLOYING``, ``RUNNING``, ``DEPLOY_FAILED``."""
    deployments: dict[str, str]
    """Serve's name of the state of each deployment, such as ``UPDATING`` or ``HEALTHY``."""
    message: str
    """The last line of what Serve says, if it says anything."""

    @property
    def failed(self) -> bool:
        """Whether waiting longer is of no use."""
        return self.state in {"DEPLOY_FAILED", "UNHEALTHY"}


def set_environment(environ: MutableMapping[str, str]) -> None:
    """Settings that Ray reads when it is imported; a value that is already there wins.

    NOTE: ``RAY_SERVE_THROUGHPUT_OPTIMIZED`` is left to the user: it buffers 1000 lines of log,
    which on one machine costs more in search for errors than it gains.
    """
    environ.setdefault("RAYLLM_ENABLE_WORKER_PROCESS_SETUP_HOOK", "0")
    environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    environ.setdefault("RAY_AUTH_MODE", "token")
    if environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN_PATH" not in environ:
        environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # An address left over from another cluster must not pull ours there.
    environ.pop("RAY_ADDRESS", None)


def session_folder() -> Path:
    """Folder of Ray's sessions: short, since socket paths are, and this user's alone.

    Raises:
        ClusterError: Somebody else made a folder of that name.
    """
    folder = Path(os.environ.get("GATEHOUSE_RAY_TMP") or f"/tmp/gatehouse-{os.getuid()}")  # noqa: S108
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = folder.lstat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o022 or folder.is_symlink():
        raise ClusterError(f"{folder} can be written by others; set GATEHOUSE_RAY_TMP to another")
    # NOTE: one level down, because Ray opens its own folder to everybody.
    sessions = folder / "ray"
    # A session's name ends in the id of the process that started it.
    ended = [path for path in sessions.glob("session_20*_*_*") if identify(_starter(path)) is None]
    for old in sorted(ended)[: -KEPT_SESSIONS + 1]:
        shutil.rmtree(old, ignore_errors=True)
    return sessions


class LocalCluster:
    """Ray and Serve, started and stopped once."""

    def __init__(self) -> None:
        self._vital: list[ProcessId] = []
        self._started = False
        self._folder = Path()

    def start(self) -> None:
        """Start Ray on this machine.

        Raises:
            ClusterError: It did not start.
        """
        set_environment(os.environ)
        self._folder = session_folder()
        import ray

        self._started = True
        try:
            ray.init(
                address="local",
                num_cpus=max(2, LocalMachine().cpus),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(self._folder),
            )
        except (OSError, RuntimeError, ValueError, ConnectionError) as error:
            raise ClusterError(f"Ray did not start: {_last_line(str(error))}") from error
        self._vital = [
            p for p in descendants(os.getpid()) if Path(program(p.pid).split(" ")[0]).name in _VITAL
        ]

    @property
    def log_folder(self) -> Path:
        """Logs of the running session."""
        return (self._folder / "session_latest").resolve() / "logs"

    def deploy(self, file: ServeFile, application: Any) -> None:
        """Start Serve and hand it the application; returns before engines have loaded."""
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(
            proxy_location=file.proxy_location,
            http_options=file.http_options.model_dump(),
            logging_config=file.logging_config or None,
        )
        entry = file.application
        target = serve.RunTarget(
            application,
            name=entry.name,
            route_prefix=entry.route_prefix,
            logging_config=file.logging_config or None,
        )
        serve.run_many([target], wait_for_applications_running=False)

    def status(self, name: str) -> AppStatus:
        """Where the application stands."""
        from ray import serve

        app = serve.status().applications.get(name)
        if app is None:
            return AppStatus("DEPLOYING", {}, "")
        states = {key: str(each.status.value) for key, each in app.deployments.items()}
        messages = [each.message for each in app.deployments.values() if each.message]
        message = _last_line("\n".join([app.message, *messages]))
        return AppStatus(str(app.status.value), states, message)

    @property
    def alive(self) -> bool:
        """Whether the processes that everything depends on still run."""
        return all(process.alive for process in self._vital)

    def stop(self, serve_bound_s: float) -> None:
        """Stop Serve in an orderly way within a bound, then Ray with all its workers."""
        if not self._started:
            return
        import ray
        from ray import serve

        if self.alive and self._vital:
            # NOTE: a thread, since `serve.shutdown` waits for draining replicas without a bound.
            orderly = threading.Thread(target=serve.shutdown, daemon=True)
            orderly.start()
            orderly.join(serve_bound_s)
        ray.shutdown()


def _starter(session: Path) -> int:
    digits = session.name.rpartition("_")[2]
    return int(digits) if digits.isdigit() else os.getpid()


def _last_line(text: str) -> str:
    """The line of a traceback that says what happened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
