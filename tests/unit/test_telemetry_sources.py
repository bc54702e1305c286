"""Figures that other parts keep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deployments.data_plane.backend import EngineLoad
from deployments.telemetry import names
from deployments.telemetry.registry import Registry
from deployments.telemetry.sources import (
    DiskSource,
    EngineSource,
    GatewaySource,
    SealSource,
    WalSource,
)
from governance.budget.messages import MeterReport


@dataclass
class Wal:
    records: int = 0
    bytes: int = 0
    syncs: int = 0
    sync_us: int = 0
    refused: int = 0
    queued: int = 0


@dataclass
class Seal:
    records: int = 0
    faults_seen: int = 0
    lag_us: int = 0


def test_a_log_that_does_not_move_lags_and_one_that_moves_does_not() -> None:
    registry, stats, now = Registry(), Wal(), [100.0]
    source = WalSource(registry, "gateway", stats, lambda: now[0])
    lag = registry.gauge(names.WAL_LAG).levels
    now[0] = 200.0
    source()
    assert lag[("gateway",)] == 0, "nothing waits"
    stats.queued = 4
    now[0] = 203.0
    source()
    assert lag[("gateway",)] == 3_000_000
    stats.syncs, stats.records = 1, 2
    now[0] = 204.0
    source()
    assert lag[("gateway",)] == 0
    now[0] = 206.5
    source()
    assert lag[("gateway",)] == 2_500_000
    assert registry.counter(names.WAL_RECORDS).totals[("gateway",)] == 2


def test_a_refusal_of_the_log_is_seen_from_the_first_on() -> None:
    registry, stats = Registry(), Wal()
    source = WalSource(registry, "ledger", stats)
    assert registry.counter(names.WAL_REFUSED).totals == {("ledger",): 0}
    stats.refused = 1
    source()
    assert registry.counter(names.WAL_REFUSED).totals == {("ledger",): 1}


def test_device_time_adds_up_and_never_goes_back() -> None:
    registry = Registry()
    source = EngineSource(registry, "small", lambda: EngineLoad(2, 1, 250), lambda: False)
    source()

    def report(elapsed: int, attributed: int, unattributed: int) -> MeterReport:
        return MeterReport(
            replica_id="r",
            base_model="small",
            accelerator="cpu",
            epoch="e",
            seq=1,
            devices=1,
            elapsed_us=elapsed,
            busy_us=attributed + unattributed,
            attributed_us=attributed,
            unattributed_us=unattributed,
            running=1,
            dead=False,
            rows=(),
        )

    source.metered(report(1000, 600, 100))
    source.metered(report(1100, 900, 100))
    device = registry.counter(names.ENGINE_TIME).totals
    assert device["small", "attributed"] == 900
    assert device["small", "idle"] == 300, "known late, not taken back"
    assert registry.gauge(names.ENGINE_KV).levels == {("small",): 250}
    assert registry.gauge(names.ENGINE_DEAD).levels == {("small",): 0}


def test_what_a_gateway_sees() -> None:
    registry = Registry()
    GatewaySource(registry, ["small", "large"], lambda m: m == "small", lambda: 0.5)()
    assert registry.gauge(names.MODEL_READY).levels == {("small",): 1, ("large",): 0}
    assert registry.gauge(names.CONTROL_AGE).levels == {(): 500_000}


def test_disk_room_of_what_is_there(tmp_path: Path) -> None:
    registry = Registry()
    roots = [("state", tmp_path, 7), ("evidence", tmp_path / "gone", None)]
    DiskSource(registry, roots)()
    assert set(registry.gauge(names.DISK_FREE).levels) == {("state",)}
    assert registry.gauge(names.DISK_RESERVE).levels == {("state",): 7}


def test_a_sealer() -> None:
    registry = Registry()
    SealSource(registry).take(Seal(3, 2, 60))
    assert registry.gauge(names.SEAL_LAG).levels == {(): 60}
    assert registry.counter(names.SEALED_ROWS).totals == {(): 3}
    assert registry.counter(names.SEAL_FAULTS).totals == {(): 2}
