"""Checks before a start: each failing one says what is wrong and what to do."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from deployments.capacity import GpuNeed, needs, node_group, shortfalls
from deployments.machine import Holder, LocalMachine
from deployments.preflight import GB, Check, Status, check_machine, check_port, failures
from deployments.serve_file import load_serve_file

ROOT = Path(__file__).resolve().parents[2]
LOCAL = load_serve_file(ROOT / "serve_config.local.yaml").app
CLUSTER = load_serve_file(ROOT / "serve_config.yaml").app


@dataclass
class FakeMachine:
    """A machine on which all is well, unless told otherwise."""

    architecture: str = "x86_64"
    cpus: int = 2
    flags: frozenset[str] = frozenset({"avx2", "avx512f"})
    memory_bytes: int = int(64 * GB)
    disk_bytes: int = int(100 * GB)
    shared_bytes: int = int(8 * GB)
    files: int = 65_536
    gpu_count: int = 0
    holders: dict[int, Holder] = field(default_factory=dict)

    def cpu_flags(self) -> frozenset[str]:
        return self.flags

    def available_memory_bytes(self) -> int:
        return self.memory_bytes

    def free_disk_bytes(self, folder: Path) -> int:
        return self.disk_bytes

    def free_shared_memory_bytes(self) -> int:
        return self.shared_bytes

    def file_limit(self) -> int:
        return self.files

    def gpus(self) -> int:
        return self.gpu_count

    def port_holder(self, host: str, port: int) -> Holder | None:
        return self.holders.get(port)


def check_of(machine: FakeMachine, name: str, app=LOCAL) -> Check:
    return next(c for c in check_machine(app, machine, Path("/state")) if c.name == name)


def test_a_good_machine_passes() -> None:
    checks = check_machine(LOCAL, FakeMachine(), Path("/state"))
    assert [c.status for c in checks] == [Status.OK] * 5
    assert all(not c.remedy for c in checks)


@pytest.mark.parametrize(
    ("machine", "name", "words"),
    [
        (FakeMachine(flags=frozenset({"sse4_2"})), "processor", "AVX2"),
        (FakeMachine(memory_bytes=int(3 * GB)), "memory", "3.0 GB available"),
        (FakeMachine(disk_bytes=int(1 * GB)), "disk", "1.0 GB free"),
        (FakeMachine(files=1024), "open files", "1024"),
    ],
)
def test_what_is_missing_stops_the_start_with_a_remedy(
    machine: FakeMachine, name: str, words: str
) -> None:
    failed = failures(check_machine(LOCAL, machine, Path("/state")))
    assert [c.name for c in failed] == [name]
    assert words in failed[0].detail
    assert failed[0].remedy


def test_memory_needed_grows_with_the_engines() -> None:
    four = LOCAL.model_copy(
        update={"models": tuple(m.model_copy(update={"id": f"{m.id}-2"}) for m in LOCAL.models) * 2}
    )
    machine = FakeMachine(memory_bytes=int(5 * GB))
    assert check_of(machine, "memory").status is Status.OK
    assert check_of(machine, "memory", four).status is Status.FAIL


def test_little_shared_memory_and_missing_avx512_do_not_stop_the_start() -> None:
    small = FakeMachine(shared_bytes=64 << 20, flags=frozenset({"avx2"}))
    assert check_of(small, "shared memory").status is Status.WARN
    assert "slower" in check_of(small, "processor").detail
    assert not failures(check_machine(LOCAL, small, Path("/state")))


def test_other_processors_are_not_asked_for_avx() -> None:
    arm = FakeMachine(architecture="aarch64", flags=frozenset())
    assert check_of(arm, "processor").status is Status.OK


def test_gpus_are_missed_at_once_and_the_local_file_is_named() -> None:
    failed = failures(check_machine(CLUSTER, FakeMachine(gpu_count=1), Path("/state")))
    assert [c.name for c in failed] == ["GPUs"]
    assert "needs 5" in failed[0].detail
    assert "serve_config.local.yaml" in failed[0].remedy


def test_a_busy_port_names_the_process_that_holds_it() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        check = check_port("port", "127.0.0.1", port, LocalMachine(), "take another")
    assert check.status is Status.FAIL
    assert f"process {os.getpid()} " in check.detail
    assert check.remedy == f"stop it (`kill {os.getpid()}`), or take another"
    assert check_port("port", "127.0.0.1", port, LocalMachine(), "").status is Status.OK


def test_a_port_of_ray_is_not_to_be_killed_by_worker() -> None:
    machine = FakeMachine(holders={8000: Holder(77, "ray::ProxyActor")})
    check = check_port("port", "127.0.0.1", 8000, machine, "take another")
    assert "process 77" in check.detail
    assert "kill" not in check.remedy


def test_a_port_of_another_user_still_has_a_remedy() -> None:
    machine = FakeMachine(holders={80: Holder(None, "")})
    check = check_port("port", "0.0.0.0", 80, machine, "take another")
    assert check.status is Status.FAIL
    assert check.remedy == "take another"


def test_this_machine_can_be_read() -> None:
    machine = LocalMachine()
    assert machine.cpus >= 1
    assert machine.available_memory_bytes() > 0
    assert machine.free_disk_bytes(Path("/no/such/folder")) > 0
    assert machine.file_limit() > 0
    assert machine.gpus() >= 0
    if machine.architecture == "x86_64":
        assert "sse2" in machine.cpu_flags()


def test_needs_of_the_cluster_file() -> None:
    assert needs(CLUSTER) == [
        GpuNeed("llama-3.1-8b", "L40S", 1),
        GpuNeed("llama-3.3-70b", "H100", 4),
    ]
    assert needs(LOCAL) == []


def test_shortfalls_by_type_and_in_total() -> None:
    wanted = needs(CLUSTER)
    enough = [
        node_group({"CPU": 8, "GPU": 4, "accelerator_type:H100": 1}),
        node_group({"CPU": 8, "GPU": 1, "accelerator_type:L40S": 1}, count=2),
    ]
    assert shortfalls(wanted, enough) == []
    assert shortfalls(wanted, enough[:1]) == [
        "llama-3.1-8b: 1 GPU(s) of type L40S needed, 0 can be had"
    ]
    assert len(shortfalls(wanted, [])) == 2
    untyped = [GpuNeed("a", None, 2), GpuNeed("b", None, 1)]
    assert shortfalls(untyped, [node_group({"GPU": 2})]) == [
        "3 GPU(s) needed for all models, 2 can be had"
    ]
    # An autoscaler's group counts at its largest.
    assert shortfalls(untyped, [node_group({"GPU": 1}, count=3)]) == []
