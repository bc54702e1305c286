"""Reading the machine: processor, memory, disk, ports. Nothing is judged here."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from deployments.processes import program


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has a port."""

    pid: int | None
    """``None`` where the kernel does not tell us, as for another user's process."""
    command: str


class Machine(Protocol):
    """What the checks ask of a machine."""

    architecture: str
    cpus: int

    def cpu_flags(self) -> frozenset[str]:
        """Instruction sets, as in ``/proc/cpuinfo``."""
        ...

    def available_memory_bytes(self) -> int:
        """Memory that can be had without swapping."""
        ...

    def free_disk_bytes(self, folder: Path) -> int:
        """Free space where ``folder`` is or would be."""
        ...

    def free_shared_memory_bytes(self) -> int:
        """Free space of ``/dev/shm``."""
        ...

    def file_limit(self) -> int:
        """Most file descriptors that a process may allow itself."""
        ...

    def gpus(self) -> int:
        """GPUs that the driver knows."""
        ...

    def port_holder(self, host: str, port: int) -> Holder | None:
        """Who listens there, or ``None`` if the port is free."""
        ...


class LocalMachine:
    """Answers from ``/proc`` of the machine we run on."""

    def __init__(self) -> None:
        self.architecture = platform.machine()
        self.cpus = len(os.sched_getaffinity(0))

    def cpu_flags(self) -> frozenset[str]:
        """Instruction sets, as in ``/proc/cpuinfo``."""
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
        return frozenset()

    def available_memory_bytes(self) -> int:
        """Memory that can be had without swapping, within the limit of a container."""
        available = psutil.virtual_memory().available
        group = Path("/sys/fs/cgroup")
        try:
            limit = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text())
        except (OSError, ValueError):  # No cgroup v2 here, or the limit is "max".
            return int(available)
        return min(int(available), max(0, limit - used))

    def free_disk_bytes(self, folder: Path) -> int:
        """Free space where ``folder`` is or would be."""
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def free_shared_memory_bytes(self) -> int:
        """Free space of ``/dev/shm``."""
        shared = Path("/dev/shm")  # noqa: S108 - looked at, not written to
        return shutil.disk_usage(shared).free if shared.exists() else 0

    def file_limit(self) -> int:
        """Most file descriptors that this process may allow itself."""
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        return 1 << 30 if hard == resource.RLIM_INFINITY else hard

    def gpus(self) -> int:
        """NVIDIA GPUs that the kernel driver knows."""
        driver = Path("/proc/driver/nvidia/gpus")
        if driver.exists():
            return len(list(driver.iterdir()))
        return len([d for d in Path("/dev").glob("nvidia[0-9]*") if d.name[6:].isdigit()])

    def port_holder(self, host: str, port: int) -> Holder | None:
        """Who listens where we want to, or ``None`` if the port is free."""
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return None
            except OSError:
                pass
        for connection in psutil.net_connections(kind="tcp"):
            local = connection.laddr
            if local and local.port == port and connection.status == psutil.CONN_LISTEN:
                pid = connection.pid
                return Holder(pid, program(pid) if pid else "")
        return Holder(None, "")


def raise_file_limit() -> None:
    """Allow this process and its children as many open files as the machine lets them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
