"""Figures that other parts keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from deployments.data_plane.backend import EngineLoad
from deployments.telemetry import names
from deployments.telemetry.registry import Registry
from deployments.telemetry.sources import (
    MAX_AGE_US,
    DiskSource,
    EngineSource,
    GatewaySource,
    LeaseSource,
    SealSource,
    WalSource,
)
from governance.budget.leases import LeaseStats
from governance.budget.lines import Line
from governance.budget.messages import AccountState, MeterReport
from governance.types import Amount


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


def account(spent: Amount, limit_us: int | None, limit_tokens: int | None) -> AccountState:
    return AccountState(
        "hr", "day", 0, 5_000_000, limit_us, limit_tokens, spent, Amount(), Amount(), None
    )


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


@dataclass
class Book:
    lines: list[Line]
    stats: LeaseStats = field(default_factory=LeaseStats)
    since_s: float = 0.5

    def age_s(self) -> float:
        return self.since_s


def test_leases_budgets_and_their_end() -> None:
    registry = Registry()
    line = Line("hr", hold_us=1000, open_us=300, hold_tokens=50, open_tokens=60)
    line.state = account(Amount(950, 10), 1000, None)
    book = Book([line], LeaseStats(renewals=3, failures=1, renew_us=900, waiting=2), float("inf"))
    source = LeaseSource(registry, book, lambda: 2_000_000)
    source()
    gpu = registry.gauge(names.LEASE).levels
    assert gpu == {("hr", "hold"): 1000, ("hr", "open"): 300, ("hr", "free"): 700}
    assert registry.gauge(names.LEASE_TOKENS).levels["hr", "free"] == 0
    assert registry.gauge(names.BUDGET_USED).levels == {("hr", "gpu"): 950}
    assert registry.gauge(names.BUDGET_RESET).levels == {("hr",): 3_000_000}
    assert registry.gauge(names.LEDGER_AGE).levels == {(): MAX_AGE_US}
    assert registry.gauge(names.RENEW).levels == {(): 900}
    assert registry.gauge(names.LEASE_WAITING).levels == {(): 2}
    assert registry.counter(names.RENEW_FAILURES).totals == {(): 1}
    book.lines = []
    source()
    assert not gpu, "a lease that is gone is not shown as held"


def test_what_has_no_limit_shows_no_lease() -> None:
    registry = Registry()
    line = Line("hr", hold_us=1 << 60, limited_us=False, limited_tokens=False)
    LeaseSource(registry, Book([line]))()
    assert not registry.gauge(names.LEASE).levels
    assert not registry.gauge(names.LEASE_TOKENS).levels


def test_a_limit_of_nothing_is_used_up() -> None:
    registry = Registry()
    line = Line("hr")
    line.state = account(Amount(), 0, None)
    LeaseSource(registry, Book([line]))()
    assert registry.gauge(names.BUDGET_USED).levels == {("hr", "gpu"): 1000}


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
