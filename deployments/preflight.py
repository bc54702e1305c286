"""What must hold on this machine before anything is started: each check a line and a remedy.

Judging only; ``deployments.machine`` reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from deployments.capacity import LOCAL_FILE, needs
from deployments.config import AppConfig
from deployments.machine import Machine

GB = 1e9
ENGINE_GB = 1.4
"""Memory of one CPU engine with a small checkpoint: 1.1 GB measured, two processes."""
BASE_GB = 1.2
"""Memory of Ray, Serve, gateway, control plane and identity provider: 1.0 GB measured."""
DISK_GB = 2.0
"""Checkpoints, state, logs of Ray sessions."""
OBJECT_STORE_BYTES = 256 << 20
"""Ray's object store; requests do not pass through it."""
FILES = 8192
"""File descriptors for some hundred streams: each takes up to three per process."""


class Status(StrEnum):
    """Outcome of a check."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    detail: str
    remedy: str = ""
    """What to do; empty when all is well."""


def check_machine(config: AppConfig, machine: Machine, data: Path) -> list[Check]:
    """Processor, memory, disk, shared memory, file limit, GPUs.

    Args:
        config: What shall run.
        machine: Where.
        data: Folder that state is written to.
    """
    engines = sum(max(1, m.replicas.min) for m in config.models if m.accelerator.kind == "cpu")
    checks = []
    if engines:
        checks.append(_check_cpu(machine))
    if wanted := needs(config):
        checks.append(_check_gpus(sum(need.gpus for need in wanted), machine.gpus()))
    checks += [
        _check_memory(BASE_GB + ENGINE_GB * engines, machine.available_memory_bytes() / GB),
        _check_disk(machine.free_disk_bytes(data) / GB),
        _check_shared_memory(machine.free_shared_memory_bytes()),
        _check_files(machine.file_limit()),
    ]
    return checks


def check_port(name: str, host: str, port: int, machine: Machine, remedy: str) -> Check:
    """Whether a port can be listened on; if not, who has it."""
    holder = machine.port_holder(host, port)
    if holder is None:
        return Check(name, Status.OK, f"{host}:{port} is free")
    if holder.pid is None:
        return Check(
            name,
            Status.FAIL,
            f"{host}:{port} is held by a process of another user, or reserved",
            remedy,
        )
    detail = f"{host}:{port} is held by process {holder.pid} ({holder.command})"
    if holder.command.startswith("ray::"):
        # Ray would start a killed worker again.
        return Check(name, Status.FAIL, detail, f"stop the Ray Serve it belongs to, or {remedy}")
    return Check(name, Status.FAIL, detail, f"stop it (`kill {holder.pid}`), or {remedy}")


def failures(checks: Iterable[Check]) -> list[Check]:
    """Those that stop a start."""
    return [check for check in checks if check.status is Status.FAIL]


def _check_cpu(machine: Machine) -> Check:
    name = "processor"
    if machine.architecture not in {"x86_64", "AMD64"}:
        return Check(name, Status.OK, f"{machine.cpus} CPUs, {machine.architecture}")
    flags = machine.cpu_flags()
    if "avx2" not in flags:
        return Check(
            name,
            Status.FAIL,
            "this CPU lacks AVX2, which vLLM's CPU build needs",
            "use a machine with AVX2 (most since 2013; in a VM, pass the host's CPU model through)",
        )
    if "avx512f" not in flags:
        detail = f"{machine.cpus} CPUs, AVX2 without AVX-512: engines work, but slower"
        return Check(name, Status.OK, detail)
    return Check(name, Status.OK, f"{machine.cpus} CPUs, AVX-512")


def _check_gpus(wanted: int, have: int) -> Check:
    if have >= wanted:
        return Check("GPUs", Status.OK, f"{have} here, {wanted} needed")
    return Check(
        "GPUs",
        Status.FAIL,
        f"the configuration needs {wanted}, this machine has {have}",
        f"without GPUs use {LOCAL_FILE} (`make serve`); for a cluster, `serve run` the file there",
    )


def _check_memory(wanted_gb: float, have_gb: float) -> Check:
    detail = f"{have_gb:.1f} GB available, about {wanted_gb:.1f} GB needed"
    if have_gb >= wanted_gb:
        return Check("memory", Status.OK, detail)
    return Check(
        "memory",
        Status.FAIL,
        detail,
        f"stop other programs, raise the container's limit, or drop a model from {LOCAL_FILE}",
    )


def _check_disk(have_gb: float) -> Check:
    detail = f"{have_gb:.1f} GB free for state, about {DISK_GB:g} GB needed"
    if have_gb >= DISK_GB:
        return Check("disk", Status.OK, detail)
    remedy = "free some space, or point GATEHOUSE_STATE to a larger disk"
    return Check("disk", Status.FAIL, detail, remedy)


def _check_shared_memory(have_bytes: int) -> Check:
    detail = f"{have_bytes / GB:.2f} GB free in /dev/shm"
    if have_bytes >= 2 * OBJECT_STORE_BYTES:
        return Check("shared memory", Status.OK, detail)
    return Check(
        "shared memory",
        Status.WARN,
        f"{detail}; Ray will use slower files instead",
        "give the container more, such as `docker run --shm-size=1g`",
    )


def _check_files(limit: int) -> Check:
    if limit >= FILES:
        return Check("open files", Status.OK, f"up to {min(limit, 1 << 20)} per process")
    return Check(
        "open files",
        Status.FAIL,
        f"at most {limit} per process, {FILES} needed",
        f"raise the limit (`ulimit -Hn {FILES}` as root, or LimitNOFILE= of the service)",
    )
