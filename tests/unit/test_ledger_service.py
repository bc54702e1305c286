"""The ledger as a service: group commit, bad calls, configuration, overrides on record."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deployments import __version__, ledger_actor, ledger_audit
from deployments.config import ModelConfig
from deployments.ledger_audit import LedgerAudit, with_id
from deployments.ledger_budgets import CONFIG_NAME, Budgets, replace_file
from deployments.ledger_calls import DEADLINE_US, RENEW_TIMEOUT_S, LedgerCalls
from deployments.ledger_service import LedgerService
from governance.audit.record import check_record
from governance.audit.schema import BY_NAME
from governance.budget.config import BudgetsConfig
from governance.budget.leases import WAIT_S
from governance.budget.ledger import BudgetLedger
from governance.budget.messages import LeaseAsk, RenewRequest, Settlement
from governance.budget.renewals import CALL_S
from governance.budget.store import LedgerStore, LedgerStoreError
from governance.errors import (
    AuditUnavailable,
    InternalError,
    InvalidRequest,
    LedgerUnavailable,
    ObjectNotFound,
)
from governance.types import Amount

BY = "f" * 64
MODEL = {"tier": "small", "source": "./model", "context_tokens": 64}
HOUR_US = 3_600_000_000


def now_us() -> int:
    return time.time_ns() // 1000


def budgets(gpu_seconds: int = 60, built_us: int = 1, **accounts: Any) -> dict[str, Any]:
    config = BudgetsConfig.model_validate(
        {"accounts": accounts or {"hr": {"window": "day", "gpu_seconds": gpu_seconds}}}
    )
    return Budgets(config, built_us).dump()


def soon() -> int:
    return now_us() + 10_000_000


def renewal(seq: int, gateway: str = "gw-1", used_us: int = 0, number: int = 0) -> RenewRequest:
    used = Amount(used_us, 1)
    settlements = ()
    if used_us:
        settlements = (
            Settlement(f"rsv_{gateway}_{number}", "hr", "req", "m", "m", used_us, used, True),
        )
    nothing = Amount()
    return RenewRequest(
        gateway, seq, (LeaseAsk("hr", nothing, nothing, nothing),), settlements, False
    )


def service(root: Path) -> LedgerService:
    return LedgerService(
        root / "ledger" / "ledger.sqlite", root / "wal", clock=now_us, monotonic=time.monotonic
    )


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[LedgerService]:
    found = service(tmp_path)
    found.start()
    await found.configure(budgets())
    await found.audit.flush()
    yield found
    await found.stop()


@pytest.fixture
def trail(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Events in the order in which they became durable."""
    written: list[dict[str, Any]] = []
    original = ledger_audit.AuditWriter.write

    async def write(self: Any, event: Mapping[str, Any], cells: Any = ()) -> str:
        event_id = await original(self, event, cells)
        written.append(dict(event))
        return event_id

    monkeypatch.setattr(ledger_audit.AuditWriter, "write", write)
    return written


# Group commit


async def test_calls_that_wait_share_a_batch(
    ledger: LedgerService, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = 0
    original = LedgerStore.save

    def save(self: LedgerStore, *args: Any) -> None:
        nonlocal saves
        saves += 1
        original(self, *args)

    monkeypatch.setattr(LedgerStore, "save", save)
    answers = await asyncio.gather(
        *(ledger.renew(renewal(1, f"gw-{i}", 1000, i)) for i in range(1, 201))
    )
    assert len(answers) == 200
    assert saves < 20
    (state,) = await ledger.state("hr")
    assert state.spent == Amount(200_000, 200)


async def test_an_answer_comes_after_the_disk_and_the_loop_does_not_wait(
    ledger: LedgerService, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    original = LedgerStore.save

    def slow(self: LedgerStore, *args: Any) -> None:
        time.sleep(0.2)
        original(self, *args)
        order.append("stored")

    monkeypatch.setattr(LedgerStore, "save", slow)
    renewing = asyncio.create_task(ledger.renew(renewal(1, used_us=1000)))
    renewing.add_done_callback(lambda _: order.append("answered"))
    longest_s = 0.0
    while not renewing.done():
        began_s = time.monotonic()
        await asyncio.sleep(0.005)
        longest_s = max(longest_s, time.monotonic() - began_s)
    await asyncio.sleep(0)
    assert order[:2] == ["stored", "answered"]
    assert longest_s < 0.15, "the event loop went on while the disk worked"


async def test_a_bad_call_is_its_own_answer(ledger: LedgerService) -> None:
    bad = replace(renewal(1, "gw-bad"), seq=-1)
    good = [ledger.renew(renewal(1, f"gw-{i}", 1000, i)) for i in range(1, 6)]
    answers = await asyncio.gather(ledger.renew(bad), *good, return_exceptions=True)
    assert isinstance(answers[0], InvalidRequest)
    assert not any(isinstance(answer, BaseException) for answer in answers[1:])
    (state,) = await ledger.state("hr")
    assert state.spent.gpu_us == 5000


async def test_a_fault_in_one_call_undoes_that_call_alone(ledger: LedgerService) -> None:
    def faulty(found: BudgetLedger) -> None:
        found.renew(renewal(1, "gw-faulty", 7000, 9))
        raise KeyError("a secret")

    good = [ledger.renew(renewal(1, f"gw-{i}", 1000, i)) for i in range(1, 6)]
    answers = await asyncio.gather(*good, ledger._call(faulty), return_exceptions=True)
    assert isinstance(answers[-1], InternalError)
    assert "secret" not in str(answers[-1])
    assert not any(isinstance(answer, BaseException) for answer in answers[:-1])
    (state,) = await ledger.state("hr")
    assert state.spent.gpu_us == 5000


async def test_a_full_disk_refuses_and_changes_nothing(
    ledger: LedgerService, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def full(self: LedgerStore, *args: Any) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        patch.setattr(LedgerStore, "save", full)
        answers = await asyncio.gather(
            *(ledger.renew(renewal(1, f"gw-{i}", 1000, i)) for i in range(1, 6)),
            return_exceptions=True,
        )
        assert {type(answer) for answer in answers} == {LedgerUnavailable}
    (state,) = await ledger.state("hr")
    assert state.spent == Amount()
    await ledger.renew(renewal(1, "gw-1", 1000, 1))
    (state,) = await ledger.state("hr")
    assert state.spent.gpu_us == 1000


async def test_a_caller_that_went_away_changes_nothing_for_others(ledger: LedgerService) -> None:
    calls = [
        asyncio.create_task(ledger.renew(renewal(1, f"gw-{i}", 1000, i))) for i in range(1, 11)
    ]
    await asyncio.sleep(0)
    calls[3].cancel()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(answer, BaseException) for answer in answers) == 1


async def test_a_queue_that_is_full_refuses(
    ledger: LedgerService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.ledger_batches.MAX_QUEUE", 3)
    answers = await asyncio.gather(
        *(ledger.renew(renewal(1, f"gw-{i}")) for i in range(20)), return_exceptions=True
    )
    assert sum(isinstance(answer, LedgerUnavailable) for answer in answers) >= 15


# Configuration


async def test_nothing_is_served_before_there_are_budgets(tmp_path: Path) -> None:
    empty = service(tmp_path)
    empty.start()
    for call in (empty.state(), empty.renew(renewal(1))):
        with pytest.raises(LedgerUnavailable):
            await call
    await empty.configure(budgets())
    assert [state.account for state in await empty.state()] == ["hr"]
    await empty.stop()


async def test_a_restart_has_the_latest_budgets(tmp_path: Path) -> None:
    first = service(tmp_path)
    first.start()
    await first.configure(budgets(60, built_us=1))
    await first.renew(renewal(1, used_us=1000))
    await first.configure(budgets(90, built_us=2))
    await first.stop()
    again = service(tmp_path)
    again.start()
    (state,) = await again.state()
    assert (state.limit_us, state.spent.gpu_us) == (90_000_000, 1000)
    await again.stop()
    assert (tmp_path / "ledger" / CONFIG_NAME).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"config": {}, "built_us": 1}'])
async def test_budgets_that_cannot_be_read_wait_for_a_gateway(tmp_path: Path, text: str) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / CONFIG_NAME).write_text(text)
    found = service(tmp_path)
    found.start()
    with pytest.raises(LedgerUnavailable):
        await found.state()
    await found.configure(budgets())
    assert len(await found.state()) == 1
    await found.stop()


async def test_of_two_builds_the_later_holds(
    ledger: LedgerService, trail: list[dict[str, Any]]
) -> None:
    before = now_us()
    await ledger.configure(budgets(90, built_us=before))
    await ledger.configure(budgets(60, built_us=before - 1))
    await ledger.configure(budgets(90, built_us=before))
    await ledger.configure(budgets(90, built_us=before + 1))
    (state,) = await ledger.state("hr")
    assert state.limit_us == 90_000_000
    await ledger.audit.flush()
    loaded = [event for event in trail if event["event_type"] == "budget.loaded"]
    assert len(loaded) == 1, "only a file that differs is on record"
    digest = Budgets.load(budgets(90)).config.digest
    assert json.loads(loaded[0]["detail"])["digest"] == digest


async def test_the_first_requests_weigh_what_later_ones_do(tmp_path: Path) -> None:
    models = [
        ModelConfig.model_validate({**MODEL, "id": name, "accelerator": accelerator})
        for name, accelerator in (
            ("big", {"kind": "gpu", "type": "H100"}),
            ("tiny", {"kind": "cpu"}),
            ("any", {"kind": "gpu"}),
        )
    ]
    config = BudgetsConfig.model_validate(
        {"accounts": {"hr": {"tokens": 1}}, "accelerators": {"H100": 2.5, "cpu": 0.1}}
    )
    found = service(tmp_path)
    found.start()
    await found.configure(Budgets.of(config, models, built_us=now_us()).dump())
    prices = (await found.renew(renewal(1))).prices
    assert {p.base_model: p.weight_milli for p in prices} == {"big": 2500, "tiny": 100}
    assert all(p.observations == 0 and p.decode_p99_ns > 0 for p in prices)
    settled = replace(renewal(2, used_us=9, number=1).settlements[0], base_model="big")
    learnt = replace(settled, prompt_bytes=1024, prompt_tokens=300)
    prices = (await found.renew(replace(renewal(2), settlements=(learnt,)))).prices
    assert {p.base_model: p.weight_milli for p in prices} == {"big": 2500, "tiny": 100}
    await found.stop()


async def test_a_build_from_the_future_does_not_hold_for_ever(ledger: LedgerService) -> None:
    await ledger.configure(budgets(90, built_us=now_us() + 10**12))
    await ledger.configure(budgets(30, built_us=now_us()))
    (state,) = await ledger.state("hr")
    assert state.limit_us == 30_000_000


async def test_one_database_one_service(ledger: LedgerService, tmp_path: Path) -> None:
    with pytest.raises(LedgerStoreError, match="in use"):
        service(tmp_path)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for data in (b"1" * 100_000, b"2"):
        replace_file(path, data)
        assert path.read_bytes() == data
    assert [each.name for each in tmp_path.iterdir()] == ["x"]


# Overrides and their record


async def test_an_override_is_on_record_before_its_answer(
    ledger: LedgerService, trail: list[dict[str, Any]]
) -> None:
    until_us = now_us() + HOUR_US
    state = await ledger.set_override("hr", 5, 7, until_us, "quarter end", BY, soon())
    (event,) = trail
    assert (state.limit_us, state.limit_tokens, state.overridden_until_us) == (5, 7, until_us)
    assert event["subject_key"] == BY
    assert event["reason_code"] == "quarter end"
    assert event["due_us"] == until_us
    cleared = await ledger.clear_override("hr", BY, soon())
    assert cleared.overridden_until_us is None
    assert [each["state"] for each in trail] == ["overridden", "cleared"]


async def test_no_record_no_override(
    ledger: LedgerService, monkeypatch: pytest.MonkeyPatch, trail: list[dict[str, Any]]
) -> None:
    with monkeypatch.context() as patch:

        def refuse(self: Any) -> None:
            raise AuditUnavailable

        patch.setattr(ledger_audit.AuditWriter, "check_room", refuse)
        with pytest.raises(AuditUnavailable):
            await ledger.set_override("hr", 5, None, now_us() + HOUR_US, "x", BY, soon())
        with pytest.raises(AuditUnavailable):
            await ledger.clear_override("hr", BY, soon())
    await ledger.audit.flush()
    assert trail == [], "it was refused before anything was done"

    with monkeypatch.context() as patch:

        async def fail(self: Any, event: Any, cells: Any = ()) -> str:
            raise AuditUnavailable

        patch.setattr(ledger_audit.AuditWriter, "write", fail)
        with pytest.raises(AuditUnavailable):
            await ledger.set_override("hr", 5, None, now_us() + HOUR_US, "x", BY, soon())
        (state,) = await ledger.state("hr")
        assert (state.limit_us, state.overridden_until_us) == (60_000_000, None)
    await ledger.audit.flush()
    assert [each["state"] for each in trail] == ["overridden", "cleared"], "both are recorded later"


async def test_a_record_that_hangs_takes_the_override_back(
    ledger: LedgerService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(self: Any, event: Any, cells: Any = ()) -> str:
        await asyncio.sleep(60)
        return ""

    monkeypatch.setattr(ledger_audit.AuditWriter, "write", hang)
    monkeypatch.setattr(ledger_audit, "FLUSH_TIMEOUT_S", 0.2)
    with pytest.raises(AuditUnavailable):
        await ledger.set_override("hr", 5, None, now_us() + HOUR_US, "x", BY, soon())
    (state,) = await ledger.state("hr")
    assert state.limit_us == 60_000_000


async def test_what_comes_too_late_is_not_done(
    ledger: LedgerService, trail: list[dict[str, Any]]
) -> None:
    with pytest.raises(LedgerUnavailable):
        await ledger.set_override("hr", 5, None, now_us() + HOUR_US, "x", BY, now_us() - 1)
    with pytest.raises(LedgerUnavailable):
        await ledger.clear_override("hr", BY, now_us() - 1)
    await ledger.audit.flush()
    assert trail == []


async def test_unknown_accounts_and_impossible_values(ledger: LedgerService) -> None:
    with pytest.raises(ObjectNotFound):
        await ledger.set_override("nowhere", 5, None, now_us() + HOUR_US, "x", BY, soon())
    with pytest.raises(ObjectNotFound):
        await ledger.clear_override("nowhere", BY, soon())
    with pytest.raises(InvalidRequest):
        await ledger.set_override("hr", 5, None, now_us() - HOUR_US, "x", BY, soon())


async def test_events_survive_a_crash_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trail: list[dict[str, Any]]
) -> None:
    first = service(tmp_path)
    first.start()
    await first.configure(budgets())
    await first.audit.flush()
    trail.clear()
    with monkeypatch.context() as patch:
        patch.setattr(ledger_audit.LedgerAudit, "flush", _no_flush)
        await first.set_override("hr", 5, None, now_us() + HOUR_US, "x", BY, soon())
        for task in first._tasks:
            task.cancel()
        assert first._ledger is not None
        first._ledger._store.close()  # as a kill does: nothing more is written
    assert trail == []
    again = service(tmp_path)
    again.start()
    (state,) = await again.state("hr")
    assert state.limit_us == 5
    await again.audit.flush()
    assert [event["event_type"] for event in trail] == ["budget.set"]
    await again.audit.flush()
    assert len(trail) == 1
    await again.stop()


async def _no_flush(self: LedgerAudit) -> None:
    """As if the process died before."""


async def test_a_repeat_has_the_same_id(ledger: LedgerService, trail: list[dict[str, Any]]) -> None:
    await ledger.set_override("hr", 5, None, now_us() + HOUR_US, "x", BY, soon())
    (event,) = trail
    assert with_id({k: v for k, v in event.items() if k != "event_id"}) == event
    assert with_id({**event, "reason_code": "y"})["event_id"] == event["event_id"]
    bare = {k: v for k, v in event.items() if k != "event_id"}
    assert with_id({**bare, "reason_code": "y"})["event_id"] != event["event_id"]


async def test_events_fit_the_audit_record(
    ledger: LedgerService, trail: list[dict[str, Any]]
) -> None:
    await ledger.set_override("hr", 5, None, now_us() + HOUR_US, "x", BY, soon())
    await ledger.clear_override("hr", BY, soon())
    blank = {name: None for name, column in BY_NAME.items() if not column.derived}
    frame = {"schema_version": 1, "writer_id": "w", "writer_epoch": 1, "writer_seq": 1}
    for event in trail:
        check_record({**blank, **event, **frame, "prev_hash": "0" * 64})


async def test_a_broken_writer_is_replaced(
    ledger: LedgerService, trail: list[dict[str, Any]]
) -> None:
    broken = ledger.audit._writer
    assert broken is not None
    broken._thread.fail(OSError(5, "x"))
    await ledger.set_override("hr", 5, None, now_us() + HOUR_US, "x", BY, soon())
    assert ledger.audit._writer is not broken
    assert len(trail) == 1


async def test_an_event_that_does_not_fit_holds_nothing_up(
    ledger: LedgerService, trail: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    def poison(found: BudgetLedger) -> None:
        with found.batch():
            found._books.changes.events.append(
                {"event_type": "budget.set", "ts_us": 1, "no_such_column": "a secret"}
            )

    await ledger._call(poison)
    await ledger.set_override("hr", 5, None, now_us() + HOUR_US, "x", BY, soon())
    assert [event["event_type"] for event in trail] == ["budget.set"]
    assert "does not fit" in caplog.text
    assert "secret" not in caplog.text


# Calls from afar


class Link:
    """Calls a service directly; ``down`` for a while."""

    def __init__(self, found: LedgerService) -> None:
        self.found = found
        self.down = 0
        self.calls: list[str] = []

    async def __call__(self, method: str, *args: Any) -> Any:
        self.calls.append(method)
        if self.down:
            self.down -= 1
            raise LedgerUnavailable
        return await getattr(self.found, method)(*args)


async def test_calls_find_the_ledger_again_and_configure_it_each_time(
    ledger: LedgerService,
) -> None:
    link = Link(ledger)
    found = 0

    async def resolve() -> Link:
        nonlocal found
        found += 1
        return link

    calls = LedgerCalls(resolve, budgets(90, built_us=now_us()))
    await calls.ready()
    assert link.calls == ["configure", "state"]
    (state,) = await calls.state("hr")
    assert state.limit_us == 90_000_000
    link.down = 1
    with pytest.raises(LedgerUnavailable):
        await calls.renew(renewal(1))
    assert (await calls.renew(renewal(1))).seq == 1
    assert found == 2
    link.down = 3
    answer = await calls.set_override("hr", 5, None, now_us() + HOUR_US, "x", BY)
    assert answer.limit_us == 5
    assert (await calls.clear_override("hr", BY)).limit_us == 90_000_000
    with pytest.raises(ObjectNotFound):
        await calls.clear_override("nowhere", BY)


async def test_whatever_a_link_raises_is_unavailable() -> None:
    async def resolve() -> Link:
        raise RuntimeError("a path, a secret")

    calls = LedgerCalls(resolve)
    with pytest.raises(LedgerUnavailable) as failed:
        await calls.state()
    assert "secret" not in str(failed.value)


@pytest.mark.parametrize("method", ["renew", "report", "state"])
async def test_a_caller_that_gives_up_sooner_gives_the_link_up(method: str) -> None:
    found = 0

    async def hangs(*_: Any) -> Any:
        await asyncio.sleep(100)

    async def resolve() -> Any:
        nonlocal found
        found += 1
        return hangs

    calls = LedgerCalls(resolve)
    args: dict[str, Any] = {"renew": [renewal(1)], "report": [None], "state": []}
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await getattr(calls, method)(*args[method])
    assert found == 3


def test_a_renewal_ends_where_the_ledger_is_looked_for_again() -> None:
    assert RENEW_TIMEOUT_S < CALL_S < WAIT_S


async def test_a_renewal_that_comes_too_late_is_not_done(ledger: LedgerService) -> None:
    with pytest.raises(LedgerUnavailable):
        await ledger.renew(renewal(1, used_us=5, number=1), now_us() - 1)
    assert (await ledger.stats())["late"] == 1
    (state,) = await ledger.state("hr")
    assert state.spent == Amount()
    assert (await ledger.renew(renewal(1, used_us=5, number=1), now_us() + 10**6)).seq == 1

    late = -DEADLINE_US - 10**6

    async def resolve() -> Link:
        return Link(ledger)

    with pytest.raises(LedgerUnavailable):
        await LedgerCalls(resolve, clock=lambda: now_us() + late).renew(renewal(2))


# A ledger that an earlier deployment left


class Handle:
    """A detached actor, as Ray gives it."""

    def __init__(self, **identity: str) -> None:
        self.identity = SimpleNamespace(remote=lambda: identity)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"state_root": "/old"}, "state root /old, not /state"),
        ({"version": "0.0.9"}, f"version 0.0.9, not {__version__}"),
        ({"messages": "0"}, "messages 0, not"),
        ({"file": "1"}, "file 1, not"),
        (None, "version unknown"),
    ],
)
async def test_another_deployments_ledger_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, str] | None,
    said: str,
) -> None:
    monkeypatch.setattr(ledger_actor.ray, "get", lambda found, timeout: found)
    ours = {**ledger_actor.IDENTITY, "state_root": "/state"}
    ledger_actor.check_identity(Handle(**ours), "/state")
    ledger_actor.check_identity(Handle(**{**ours, "state_root": "/any"}), None)
    left = SimpleNamespace() if change is None else Handle(**{**ours, **change})
    with pytest.raises(ledger_actor.LedgerStartError, match=said) as refused:
        ledger_actor.check_identity(left, "/state")
    assert ledger_actor.ACTOR_NAME in str(refused.value)

    if change is None or "state_root" not in change:
        # An engine, which looks for it only, says so and calls nothing.
        monkeypatch.setattr(ledger_actor.ray, "get_actor", lambda name, namespace: left)
        with pytest.raises(LedgerUnavailable):
            await ledger_actor.LedgerClient(None).state()
        assert said in caplog.text
