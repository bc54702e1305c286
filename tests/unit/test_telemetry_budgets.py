"""Figures of budgets, alerts, shedding and fairness."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.alerts.delivery import DeliveryStats
from deployments.data_plane.backend import EngineLoad
from deployments.telemetry import budget_names as names
from deployments.telemetry import budgets, classes
from deployments.telemetry.budgets import (
    FAULTS,
    AccountSource,
    AlertSource,
    LeaseSource,
    LedgerWatch,
    ShedSource,
    chosen,
)
from deployments.telemetry.classes import ClassSource, ServedCounts
from deployments.telemetry.names import SPECS
from deployments.telemetry.registry import Registry
from deployments.telemetry.sources import MAX_AGE_US
from governance.admission.shedding import REASONS
from governance.budget.config import BudgetsConfig
from governance.budget.leases import LeaseStats
from governance.budget.ledger import BudgetLedger
from governance.budget.lines import Line
from governance.budget.messages import AccountState, LeaseAsk, RenewRequest, Settlement
from governance.budget.store import LedgerStore
from governance.classes import PRIORITY_CLASSES
from governance.errors import LedgerUnavailable
from governance.types import Amount
from tests.budget_world import row

USER = "hr~" + "f" * 64
NOW_US = 1_796_126_400_000_000
ZERO = Amount()


def account(name: str, spent: Amount = ZERO, **given: Any) -> AccountState:
    values: dict[str, Any] = {"limit_us": 1000, "limit_tokens": None, **given}
    return AccountState(
        name, "day", 0, 5_000_000, values.pop("limit_us"), values.pop("limit_tokens"), spent,
        Amount(), Amount(), None, **values,
    )  # fmt: skip


@dataclass
class Book:
    lines: list[Line]
    stats: LeaseStats = field(default_factory=LeaseStats)
    since_s: float = 0.5

    def age_s(self) -> float:
        return self.since_s


# -- gateways ---------------------------------------------------------------------------------


def test_leases_count_for_the_department_and_name_no_user() -> None:
    registry = Registry()
    lines = [
        Line("hr", hold_us=1000, open_us=300, hold_tokens=50, open_tokens=60),
        Line(USER, hold_us=10, open_us=4, limited_tokens=False),
        Line("hr/recruiting", hold_us=100, open_us=0, limited_tokens=False),
        Line("mk", hold_us=1, limited_tokens=False),
    ]
    book = Book(lines, LeaseStats(renewals=3, failures=1, renew_us=900, waiting=2), float("inf"))
    source = LeaseSource(registry, book)
    source()
    source()
    gpu = registry.gauge(names.LEASE).levels
    assert gpu["hr", "hold"] == 1110
    assert gpu["hr", "open"] == 304
    assert gpu["hr", "free"] == 806
    assert gpu["mk", "free"] == 1
    assert len(gpu) == 6
    assert registry.gauge(names.LEASE_TOKENS).levels["hr", "free"] == 0
    assert registry.gauge(names.LEDGER_AGE).levels == {(): MAX_AGE_US}
    assert registry.gauge(names.RENEW).levels == {(): 900}
    assert registry.gauge(names.LEASE_WAITING).levels == {(): 2}
    assert registry.counter(names.RENEWALS).totals == {(): 3}
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


def test_shed_requests_are_there_before_the_first() -> None:
    registry, counts = Registry(), {("small", "batch", "queue"): 0}
    source = ShedSource(registry, lambda: counts)
    source()
    assert registry.counter(names.SHED).totals == {("small", "batch", "queue"): 0}
    counts["small", "batch", "queue"] = 7
    source()
    assert registry.counter(names.SHED).totals == {("small", "batch", "queue"): 7}


def test_the_help_names_each_reason_for_shedding() -> None:
    told = SPECS[names.SHED].help
    assert not [each for each in (*REASONS, *PRIORITY_CLASSES) if f"`{each}`" not in told]


# -- the ledger -------------------------------------------------------------------------------


def test_accounts_parts_and_windows_but_no_users() -> None:
    registry = Registry()
    source = AccountSource(registry, lambda: 2_000_000)
    hr = account("hr", Amount(950, 10), moved=Amount(-5, 0), total=Amount(5000, 10))
    source.take([hr, account("hr/x", parent="hr"), account("hr@hour"), account(USER)])
    gpu = registry.gauge(names.BUDGET_GPU).levels
    assert {name for name, _ in gpu} == {"hr", "hr/x", "hr@hour"}
    assert {of: level for (name, of), level in gpu.items() if name == "hr"} == {
        "limit": 1000,
        "spent": 950,
        "leased": 0,
        "open": 0,
        "moved": -5,
    }
    assert ("hr", "limit") not in registry.gauge(names.BUDGET_TOKENS).levels, "there is none"
    assert registry.gauge(names.BUDGET_TOKENS).levels["hr", "spent"] == 10
    assert registry.gauge(names.BUDGET_USED).levels["hr", "gpu"] == 950
    assert ("hr", "tokens") not in registry.gauge(names.BUDGET_USED).levels
    assert registry.gauge(names.BUDGET_RESET).levels["hr",] == 3_000_000
    assert registry.gauge(names.WEIGHT).levels == {("hr",): 1000}
    source.take([])
    assert not gpu


def test_spent_ever_is_counted_from_the_start_of_the_process() -> None:
    registry = Registry()
    source = AccountSource(registry)
    counter = registry.counter(names.SPENT_GPU).totals
    source.take([account("hr", total=Amount(5000, 7))])
    assert counter == {("hr",): 0}, "no jump by what an earlier process counted"
    source.take([account("hr", total=Amount(5600, 9))])
    assert counter == {("hr",): 600}
    source.take([account("hr", total=Amount(5500, 9))])
    assert counter == {("hr",): 600}, "a charge that was lowered"
    assert registry.counter(names.SPENT_TOKENS).totals == {("hr",): 2}


def test_cohorts_lend() -> None:
    registry = Registry()
    hr = account("hr", cohort="c", borrowed=Amount(30, 1), borrow=Amount(50, 0))
    mk = account("mk", cohort="c", borrowed=Amount(5, 0), lend=Amount(200, 9))
    AccountSource(registry).take([hr, mk, account("data")])
    assert registry.gauge(names.COHORT_GPU).levels == {("c", "lent"): 35, ("c", "lendable"): 200}
    assert registry.gauge(names.COHORT_TOKENS).levels == {("c", "lent"): 1, ("c", "lendable"): 9}
    gpu = registry.gauge(names.BUDGET_GPU).levels
    assert (gpu["hr", "borrowed"], gpu["hr", "borrow"], gpu["mk", "lend"]) == (30, 50, 200)
    assert ("data", "borrowed") not in gpu


@pytest.mark.parametrize(("limit", "used"), [(0, 1000), (-5, 1000), (100, 2500), (1000, 250)])
def test_a_limit_of_nothing_is_used_up_and_borrowing_exceeds_one(limit: int, used: int) -> None:
    registry = Registry()
    AccountSource(registry).take([account("hr", Amount(250, 0), limit_us=limit)])
    assert registry.gauge(names.BUDGET_USED).levels == {("hr", "gpu"): used}


def test_labels_are_bounded_and_departments_come_first() -> None:
    parts = [account(f"d/p{n}", total=Amount(10**6, 0), parent="d") for n in range(2000)]
    departments = [account(f"d{n}", total=Amount(n, 0)) for n in range(900)]
    found = chosen([*parts, *departments])
    assert len(found) == names.MAX_ACCOUNTS
    assert {state.account for state in departments} <= {state.account for state in found}


def test_what_a_real_ledger_says_arrives(tmp_path: Path) -> None:
    registry, now_s = Registry(), [0.0]
    config = BudgetsConfig.model_validate(
        {
            "cohorts": {"c": {"window": "day"}},
            "accounts": {
                "hr": {
                    "window": "day", "gpu_seconds": 10, "cohort": "c",
                    "borrow": {"gpu_seconds": 5}, "per_user": {"window": "day", "gpu_seconds": 9},
                    "also": [{"window": "hour", "gpu_seconds": 20}],
                },
                "mk": {
                    "window": "day", "gpu_seconds": 10, "cohort": "c", "lend": {"gpu_seconds": 8},
                },
            },
        }
    )  # fmt: skip
    ledger = BudgetLedger(
        LedgerStore(tmp_path / "l.sqlite"), config, clock=lambda: NOW_US, monotonic=lambda: now_s[0]
    )
    source = AccountSource(registry, lambda: NOW_US)
    source.take(ledger.state())
    said = Settlement("rsv_g_1", USER, "req", "m", "m", 8_000_000, Amount(8_000_000, 3), True)
    ask = LeaseAsk(USER, Amount(), Amount(), Amount())
    ledger.renew(RenewRequest("g", 1, (ask,), (said,), False))
    source.take(ledger.state(users=True))
    gpu = registry.gauge(names.BUDGET_GPU).levels
    assert gpu["hr", "spent"] == gpu["hr@hour", "spent"] == 8_000_000
    assert registry.gauge(names.BUDGET_USED).levels["hr", "gpu"] == 800
    assert registry.counter(names.SPENT_GPU).totals["hr",] == 8_000_000
    assert registry.gauge(names.COHORT_GPU).levels["c", "lendable"] == 8_000_000
    assert not [labels for labels in gpu if "~" in labels[0]]
    ledger.close()


class Service:
    """A ledger's process."""

    def __init__(self) -> None:
        self.telling = SimpleNamespace(stats=DeliveryStats())
        self.down = False
        self.asked = 0

    async def state(self, account_: str | None = None) -> tuple[AccountState, ...]:
        self.asked += 1
        if self.down:
            raise LedgerUnavailable
        return (account("hr", Amount(self.asked, 0)),)

    async def stats(self) -> dict[str, int]:
        return {"queued": 4, **dict.fromkeys(FAULTS, 2)}


async def test_the_ledger_is_asked_again_after_it_did_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budgets, "POLL_S", 0.001)
    registry, service, noted = Registry(), Service(), list[Exception]()
    watch = LedgerWatch(registry, service)
    assert registry.counter(names.LEDGER_FAULTS).totals == {(kind,): 0 for kind in FAULTS}
    service.down = True
    task = asyncio.create_task(watch.run(noted.append))
    await until(lambda: len(noted) > 1)
    service.down = False
    await until(lambda: bool(registry.gauge(names.BUDGET_GPU).levels))
    task.cancel()
    assert registry.gauge(names.LEDGER_QUEUED).levels == {(): 4}
    assert registry.counter(names.LEDGER_FAULTS).totals == {(kind,): 2 for kind in FAULTS}
    assert {type(each) for each in noted} == {LedgerUnavailable}


async def test_a_slow_ledger_is_asked_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    now_s = [0.0]

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            raise asyncio.CancelledError

    class Slow(Service):
        async def stats(self) -> dict[str, int]:
            now_s[0] += 2.0 if self.asked else 0.001
            return await super().stats()

    monkeypatch.setattr("deployments.telemetry.budgets.asyncio.sleep", sleep)
    watch = LedgerWatch(Registry(), Slow(), lambda: now_s[0])
    with pytest.raises(asyncio.CancelledError):
        await watch.run(lambda _: None)
    assert slept == [budgets.POLL_S, 40.0]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)


def test_alerts() -> None:
    registry, stats = Registry(), DeliveryStats()
    source = AlertSource(registry, stats, lambda: 100)
    source()
    totals = registry.counter(names.ALERTS).totals
    assert set(totals.values()) == {0}
    assert registry.gauge(names.ALERTS_AGE).levels == {(): 0}
    stats.delivered, stats.expired, stats.waiting, stats.oldest_us = 5, 1, 2, 40
    source()
    assert (totals["delivered",], totals["expired",], totals["refused",]) == (5, 1, 0)
    assert registry.gauge(names.ALERTS_WAITING).levels == {(): 2}
    assert registry.gauge(names.ALERTS_AGE).levels == {(): 60}


# -- engines ----------------------------------------------------------------------------------


def test_classes_are_there_also_when_nobody_waits() -> None:
    registry = Registry()
    ClassSource(registry, "small", EngineLoad)()
    zero = {("small", name): 0 for name in ("critical", "standard", "batch")}
    assert registry.gauge(names.CLASS_WAITING).levels == zero
    assert registry.gauge(names.CLASS_WAIT).levels == zero


def test_who_waits() -> None:
    registry = Registry()
    load = EngineLoad(waiting=6, waiting_by_class=(1, 2, 3), oldest_wait_us=(10, 20, 30))
    ClassSource(registry, "small", lambda: load)()
    assert registry.gauge(names.CLASS_WAITING).levels["small", "batch"] == 3
    assert registry.gauge(names.CLASS_WAIT).levels["small", "critical"] == 10


def test_who_was_served_by_department_repeats_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classes, "MAX_ROWS", 3)
    registry = Registry()
    counts = ServedCounts(registry, "small")
    served = registry.counter(names.SERVED).totals
    counts.take([row(1, account=USER, gpu_us=50), row(2, account="hr/x", gpu_us=7)])
    counts.take([row(1, account=USER, gpu_us=50), row(3, account="mk", gpu_us=0)])
    assert served == {("small", "hr"): 57}
    counts.take([row(1, account=USER, gpu_us=80, ended=True), row(3, account="mk", gpu_us=4)])
    counts.take([row(1, account=USER, gpu_us=80, ended=True)])  # it was not taken: told again
    assert served == {("small", "hr"): 87, ("small", "mk"): 4}
    counts.take([row(n, account="mk", gpu_us=1) for n in range(10, 20)])
    assert len(counts._last) == 3
