"""The ledger against wrong, repeated, overtaken and hostile messages; its windows and overrides."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from governance.audit.schema import BY_NAME, EventType
from governance.budget.config import BudgetsConfig
from governance.budget.messages import LeaseAsk, RenewRequest, Settlement
from governance.budget.meters import INTERVAL_US, SILENT_S
from governance.budget.store import LedgerStore, LedgerStoreError
from governance.errors import NoAccount
from governance.types import Amount
from tests.budget_desk import DAY_US, LIMIT, Desk, paid
from tests.budget_world import START_US, report, row


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.ledger._store.close()


# Hostile and wrong messages


@pytest.mark.parametrize("bad", [-1, 10**15 + 1, 1 << 70, 1.5, True, None])
def test_an_impossible_figure_changes_nothing(desk: Desk, bad: Any) -> None:
    with pytest.raises(ValueError, match="figure"):
        desk.renew(need=bad)
    with pytest.raises(ValueError, match="figure"):
        desk.renew("g1", paid(), open=bad)
    with pytest.raises(ValueError, match="figure"):
        desk.renew("g1", replace(paid(), used=Amount(0, bad)))
    with pytest.raises(ValueError, match="figure"):
        desk.ledger.report(report(row(1, answer=5), replace(row(2), decode_tokens=bad)))
    assert desk.spent() == Amount()
    assert desk.renew(need=10, seq=1).leases[0].hold.tokens == 10


@pytest.mark.parametrize("name", ["", "x" * 300, "a b", "a\n", "../x", "rsv\x00"])
def test_a_name_that_cannot_be_one_is_refused(desk: Desk, name: str) -> None:
    for call in (
        lambda: desk.renew(name),
        lambda: desk.renew(account=name),
        lambda: desk.ledger.report(report(row(account=name))),
    ):
        with pytest.raises(ValueError, match="name"):
            call()


def test_a_gateway_cannot_settle_what_another_reserved(desk: Desk) -> None:
    desk.renew(need=500)
    desk.ledger.report(report(row(1, answer=90)))
    desk.renew("g2", paid(1, 5000))
    assert desk.spent().tokens == 100
    assert desk.ledger.stats.conflicts == 1


@pytest.mark.parametrize("rsv", ["rsv_g1", "rsv_g1_", "rsv_g1_1_2", "rsv_g1_x", "g1_1", "rsv_g_1"])
def test_an_id_that_the_gateway_did_not_mint_is_not_charged(desk: Desk, rsv: str) -> None:
    desk.renew("g1", replace(paid(), reservation_id=rsv))
    desk.ledger.report(report(replace(row(answer=5), reservation_id=rsv)))
    assert desk.spent() == Amount()
    assert desk.ledger.stats.conflicts == 2


def test_a_reservation_stays_with_its_account(desk: Desk) -> None:
    desk.ledger.report(report(row(1, answer=90)))
    desk.renew("g1", replace(paid(1, 5000), account="it"))
    desk.ledger.report(report(row(1, answer=900, account="it"), seq=2))
    assert (desk.spent("hr").tokens, desk.spent("it").tokens) == (100, 0)


def test_an_account_twice_in_one_renewal_is_refused(desk: Desk) -> None:
    ask = LeaseAsk("hr", Amount(), Amount(0, 5), Amount())
    with pytest.raises(ValueError, match="twice"):
        desk.ledger.renew(RenewRequest("g1", 1, (ask, ask), (), False))


def test_an_unknown_account_gets_nothing_and_is_named(desk: Desk) -> None:
    reply = desk.renew(account="ghost", need=10)
    assert (reply.unknown, reply.leases, reply.accounts) == (("ghost",), (), ())
    assert desk.ledger.state("ghost") == ()
    with pytest.raises(NoAccount):
        desk.ledger.set_override("ghost", None, 5, START_US + 10**6, "me", "why")


def test_what_an_engine_charges_to_an_account_without_limits_is_counted(desk: Desk) -> None:
    desk.ledger.report(report(row(account="ghost", answer=90)))
    assert desk.ledger.totals()["ghost"].tokens == 100
    assert desk.renew(account="ghost", need=1).leases == ()


def test_default_account_gives_each_department_its_own(tmp_path: Path) -> None:
    budgets = BudgetsConfig.model_validate({"default_account": {"tokens": 100}})
    desk = Desk(tmp_path, budgets)
    assert desk.renew(account="a", need=100).leases[0].hold.tokens == 100
    assert desk.renew("g2", account="b", need=100).leases[0].hold.tokens == 100
    desk.ledger._store.close()


# Repeated and overtaken messages


def test_a_settlement_counts_once(desk: Desk) -> None:
    desk.renew("g1", paid(1), paid(1))
    desk.renew("g1", paid(1))
    desk.restart()
    desk.renew("g1", paid(1))
    assert desk.spent().tokens == 100


def test_engine_and_gateway_count_once_in_either_order(desk: Desk) -> None:
    desk.renew(need=1000)
    desk.ledger.report(report(row(1, answer=90, gpu_us=700)))
    desk.renew("g1", paid(1, 100, 700))
    desk.renew("g1", paid(2, 100, 700))
    desk.ledger.report(report(row(2, answer=90, gpu_us=700), seq=2))
    assert desk.spent() == Amount(1400, 200)


def test_a_repeated_renewal_is_answered_and_changes_nothing(desk: Desk) -> None:
    first = desk.renew("g1", paid(1), need=300, seq=1)
    again = desk.renew("g1", paid(1), paid(2), need=9000, seq=1)
    assert again.leases == first.leases
    assert desk.spent().tokens == 100


def test_an_old_renewal_names_the_newer_one(desk: Desk) -> None:
    desk.renew(need=300, seq=5)
    late = desk.renew("g1", paid(1), need=9000, seq=3)
    assert (late.seq, desk.spent().tokens) == (5, 0)
    desk.restart()
    assert desk.renew(need=9000, seq=4).seq == 5


def test_a_report_counts_once_and_never_backwards(desk: Desk) -> None:
    desk.ledger.report(report(row(1, answer=90), seq=2, busy_us=1000))
    desk.ledger.report(report(row(1, answer=50), seq=1, busy_us=9000))
    desk.ledger.report(report(row(1, answer=95), seq=2))
    desk.restart()
    desk.ledger.report(report(row(1, answer=99), seq=2))
    assert desk.spent().tokens == 100
    desk.ledger.report(report(row(1, answer=10), seq=3, busy_us=10))
    assert desk.spent().tokens == 100
    assert desk.ledger.meter_sums()["tiny"]["busy_us"] == 1000
    assert desk.ledger.stats.backwards == 1


def test_a_higher_late_report_is_adjusted(desk: Desk) -> None:
    desk.renew(need=1000)
    desk.renew("g1", paid(1, 100))
    desk.ledger.report(report(row(1, answer=120, ended=True, delivered=False)))
    reply = desk.renew()
    assert desk.spent().tokens == 130
    assert reply.leases == () or reply.leases[0].adjust.tokens == 30


# Leases


def test_leases_never_pass_the_limit(desk: Desk) -> None:
    assert desk.renew("g1", need=8000).leases[0].hold.tokens == 8000
    assert desk.renew("g2", need=8000).leases[0].hold.tokens == 2000
    assert desk.ledger.committed("hr").tokens == 10_000
    assert desk.renew("g3", need=1).leases == ()


def test_a_cushion_is_a_quarter_of_the_rest_by_gateway(desk: Desk) -> None:
    assert desk.renew("g1", need=2000, cushion=99_999).leases[0].hold.tokens == 2000 + 2000
    assert desk.renew("g2", cushion=99_999).leases[0].hold.tokens == 6000 // 8


def test_what_a_lease_held_before_counts_until_its_gateway_is_heard_again(desk: Desk) -> None:
    desk.renew("g1", need=10_000)
    assert desk.renew("g1").leases[0].hold.tokens == 0
    assert desk.renew("g2", need=10_000).leases == ()
    desk.renew("g1")
    assert desk.renew("g2", need=10_000).leases[0].hold.tokens == 10_000


def test_what_is_open_is_always_kept(desk: Desk) -> None:
    desk.renew("g1", need=4000)
    desk.ledger.set_override("hr", None, 10, desk.now_us + 10**9, "key", "stop")
    assert desk.renew("g1", open=4000).leases[0].hold.tokens == 4000


def test_spent_within_a_lease_does_not_count_twice(desk: Desk) -> None:
    desk.renew("g1", need=10_000)
    for done in (10, 500, 4000):
        desk.ledger.report(report(row(1, prompt=100, answer=done), seq=done))
        assert desk.ledger.committed("hr").tokens == 10_000
    desk.restart()
    assert desk.ledger.committed("hr").tokens == 10_000
    desk.renew("g1", paid(1, 4100), open=0)
    assert desk.renew("g1", need=9999).leases[0].hold.tokens == 5900


def test_a_silent_gateways_lease_returns_after_the_ttl(desk: Desk) -> None:
    desk.renew("g1", need=10_000)
    desk.pass_s(9.9)
    assert desk.renew("g2", need=1).leases == ()
    desk.pass_s(0.2)
    assert desk.renew("g2", need=10_000).leases[0].hold.tokens == 10_000
    assert desk.ledger.stats.conflicts == 0


def test_a_jump_of_the_wall_clock_ends_no_lease(desk: Desk) -> None:
    desk.renew("g1", need=10_000)
    for jump in (3_600_000_000, -7_200_000_000):
        desk.now_us += jump
        desk.ledger.sweep()
        assert desk.ledger.committed("hr").tokens == 10_000


def test_leases_live_a_full_ttl_after_a_restart(desk: Desk) -> None:
    desk.renew("g1", need=10_000)
    desk.pass_s(9)
    desk.restart()
    desk.pass_s(9)
    assert desk.renew("g2", need=1).leases == ()
    desk.pass_s(2)
    assert desk.renew("g2", need=1).leases[0].hold.tokens == 1


def test_closing_returns_everything_at_once(desk: Desk) -> None:
    desk.renew("g1", need=10_000)
    desk.renew("g1", paid(1), closing=True)
    assert desk.ledger.committed("hr").tokens == 100
    assert desk.renew("g2", need=9900).leases[0].hold.tokens == 9900


# Windows and overrides


def test_a_new_window_starts_at_nothing_and_keeps_what_is_in_flight(desk: Desk) -> None:
    desk.renew("g1", need=5000)
    desk.ledger.report(report(row(1, prompt=100, answer=2900)))
    (before,) = desk.ledger.state("hr")
    desk.now_us = before.reset_us
    (after,) = desk.ledger.state("hr")
    assert (after.spent, after.leased.tokens) == (Amount(), 2000)
    assert (after.window_start_us, after.reset_us) == (before.reset_us, before.reset_us + DAY_US)
    desk.renew("g1", paid(1, 3100))
    assert desk.spent().tokens == 100
    desk.restart()
    assert desk.spent().tokens == 100
    assert desk.ledger.totals()["hr"].tokens == 3100


def test_a_clock_that_goes_back_opens_no_new_window(desk: Desk) -> None:
    desk.renew("g1", paid(1, 100))
    desk.now_us -= 3 * DAY_US
    assert desk.spent().tokens == 100


def test_an_override_holds_until_it_expires(desk: Desk) -> None:
    until = desk.now_us + 60_000_000
    state = desk.ledger.set_override("hr", None, 50, until, "key1", "incident 7")
    assert (state.limit_tokens, state.limit_us) == (50, 1_000_000_000)
    assert state.overridden_until_us == until
    desk.restart()
    assert desk.renew("g1", need=100).leases[0].hold.tokens == 50
    desk.pass_s(60)
    assert desk.renew("g1", open=50, need=100).leases[0].hold.tokens == 150
    states = [(e["state"], e["reason_code"]) for e in desk.events(EventType.BUDGET_SET)]
    assert states == [("overridden", "incident 7"), ("expired", "incident 7")]


def test_an_override_can_be_cleared(desk: Desk) -> None:
    desk.ledger.set_override("hr", 0, 0, desk.now_us + 10**9, "key1", "stop")
    assert desk.renew("g1", need=5).leases == ()
    assert desk.ledger.clear_override("hr", "key2", "over").limit_tokens == 10_000
    assert desk.ledger.clear_override("hr", "key2", "over").overridden_until_us is None
    assert [e["state"] for e in desk.events(EventType.BUDGET_SET)] == ["overridden", "cleared"]


@pytest.mark.parametrize(
    ("gpu_us", "tokens", "in_us", "by", "reason"),
    [
        (None, None, 10**6, "k", "r"),
        (-1, None, 10**6, "k", "r"),
        (None, -1, 10**6, "k", "r"),
        (None, 10**16, 10**6, "k", "r"),
        (None, 5, 0, "k", "r"),
        (None, 5, 400 * DAY_US, "k", "r"),
        (None, 5, 10**6, "", "r"),
        (None, 5, 10**6, "k", ""),
    ],
)
def test_an_impossible_override_is_refused(
    desk: Desk, gpu_us: int | None, tokens: int | None, in_us: int, by: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=r"must be|give|say"):
        desk.ledger.set_override("hr", gpu_us, tokens, desk.now_us + in_us, by, reason)


# Weights, engines and audit events


def test_device_time_is_weighted_by_accelerator(tmp_path: Path) -> None:
    budgets = BudgetsConfig.model_validate(
        {"accounts": {"hr": {"gpu_seconds": 5}}, "accelerators": {"L4": 0.25}}
    )
    desk = Desk(tmp_path, budgets)
    desk.ledger.report(report(row(1, gpu_us=1001), accelerator="L4"))
    desk.ledger.report(report(row(2, gpu_us=1000), replica_id="r2", accelerator="B300"))
    assert desk.spent().gpu_us == 250 + 1000
    desk.ledger._store.close()


def test_an_undelivered_end_goes_on_record_once(desk: Desk) -> None:
    desk.renew(need=1000)
    ended = row(1, answer=90, gpu_us=800, ended=True, delivered=False)
    desk.ledger.report(report(ended))
    desk.ledger.report(report(ended, seq=2))
    desk.renew("g1", paid(1, 50))
    (event,) = desk.events(EventType.SETTLED)
    assert (event["reservation_id"], event["output_tokens"]) == ("rsv_g1_1", 90)
    assert (event["gpu_us"], event["charged_us"], event["budget_account"]) == (800, 800, "hr")


def test_a_delivered_end_goes_on_record_if_its_gateway_dies(desk: Desk) -> None:
    desk.renew(need=1000)
    desk.ledger.report(report(row(1, answer=90, ended=True), row(2, answer=5, ended=True)))
    desk.renew("g1", paid(2, 15))
    assert desk.events(EventType.SETTLED) == []
    desk.restart()
    desk.pass_s(11)
    desk.ledger.sweep()
    desk.ledger.sweep()
    assert [e["reservation_id"] for e in desk.events(EventType.SETTLED)] == ["rsv_g1_1"]


def test_events_come_until_they_are_confirmed(desk: Desk) -> None:
    desk.ledger.report(report(row(1, ended=True, delivered=False)))
    events = desk.ledger.events()
    desk.restart()
    assert desk.ledger.events() == events
    desk.ledger.events_written(events[-1][0])
    assert desk.ledger.events() == []


def test_every_event_fits_the_audit_schema(desk: Desk) -> None:
    desk.ledger.report(report(row(1, ended=True, delivered=False), busy_us=5, elapsed_us=10))
    desk.ledger.set_override("hr", 5, 5, desk.now_us + 10**9, "k", "r")
    desk.ledger.transfer("it", "hr", 0, 1, "k", "r")
    desk.ledger.report(report(row(2), seq=2, dead=True, busy_us=9, unattributed_us=7))
    events = [event for _, event in desk.ledger.events()]
    assert {e["event_type"] for e in events} == {
        EventType.BUDGETS_LOADED,
        EventType.SETTLED,
        EventType.BUDGET_SET,
        EventType.BUDGET_THRESHOLD,
        EventType.BUDGET_TRANSFER,
        EventType.METER_INTERVAL,
        EventType.ENGINE_LOST,
    }
    for event in events:
        for name, value in event.items():
            column = BY_NAME[name]
            assert value is None or isinstance(value, (int, str, list))
            assert not column.values or value is None or value in column.values


def test_a_silent_engine_with_requests_is_lost(desk: Desk) -> None:
    desk.ledger.report(report(row(1, answer=3), busy_us=10, elapsed_us=10))
    desk.pass_s(SILENT_S - 0.1)
    desk.ledger.sweep()
    assert desk.events(EventType.ENGINE_LOST) == []
    desk.pass_s(0.2)
    desk.ledger.sweep()
    desk.ledger.sweep()
    (event,) = desk.events(EventType.ENGINE_LOST)
    assert (event["replica_id"], event["reason_code"]) == ("r1", "silent")
    assert '"unattributed_us":10100000' in event["detail"]


def test_an_idle_engine_that_stops_is_not_lost(desk: Desk) -> None:
    desk.ledger.report(report(busy_us=10, elapsed_us=10))
    desk.pass_s(60)
    desk.ledger.sweep()
    assert desk.events(EventType.ENGINE_LOST) == []
    assert len(desk.events(EventType.METER_INTERVAL)) == 1


def test_an_engine_that_started_anew_had_been_lost(desk: Desk) -> None:
    desk.ledger.report(report(row(1), busy_us=10))
    desk.ledger.report(report(epoch="e2", busy_us=4))
    assert [e["reason_code"] for e in desk.events(EventType.ENGINE_LOST)] == ["restarted"]
    assert desk.ledger.meter_sums()["tiny"]["busy_us"] == 14


def test_an_engine_dies_once_however_often_its_replica_says_so(desk: Desk) -> None:
    desk.ledger.report(report(row(1), busy_us=10, elapsed_us=10))
    for seq in range(2, 6):
        desk.pass_s(2)
        again = report(seq=seq, busy_us=10, unattributed_us=7, elapsed_us=seq * 10, dead=True)
        desk.ledger.report(again)
        desk.ledger.sweep()
        if seq == 3:
            desk.restart()
    assert [e["reason_code"] for e in desk.events(EventType.ENGINE_LOST)] == ["dead"]
    assert len(desk.events(EventType.METER_INTERVAL)) == 1
    desk.ledger.report(report(epoch="e2", busy_us=4, dead=True))
    assert len(desk.events(EventType.ENGINE_LOST)) == 2


def test_intervals_add_up_to_the_meters(desk: Desk) -> None:
    for seq in range(1, 200):
        desk.pass_s(1)
        desk.ledger.report(report(seq=seq, busy_us=seq * 400, elapsed_us=seq * 1_000_000))
        desk.ledger.sweep()
        if seq == 100:
            desk.restart()
    desk.ledger.report(report(seq=200, busy_us=80_000, elapsed_us=200_000_000, dead=True))
    details = [e["detail"] for e in desk.events(EventType.METER_INTERVAL)]
    assert 3 <= len(details) <= 5
    assert sum(int(d.split('"busy_us":')[1].split(",")[0]) for d in details) == 80_000
    assert INTERVAL_US == 60_000_000


# The database


def test_a_batch_is_all_or_nothing(desk: Desk) -> None:
    def fails() -> None:
        with desk.ledger.batch():
            desk.renew("g1", paid(1), need=500)
            desk.ledger.report(report(row(2, answer=90)))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert desk.spent() == Amount()
    assert desk.ledger.committed("hr") == Amount()
    with desk.ledger.batch():
        desk.renew("g1", paid(1), need=500, seq=1)
        with pytest.raises(ValueError, match="figure"):
            desk.renew("g1", need=-1)
    desk.restart()
    assert (desk.spent().tokens, desk.ledger.committed("hr").tokens) == (100, 600)


def test_memory_keeps_nothing_that_disk_lost(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.renew("g1", paid(1), need=500, seq=1)

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(LedgerStore, "_write", full)
        with pytest.raises(sqlite3.OperationalError):
            desk.renew("g1", paid(2), need=900, seq=2)
    assert (desk.spent().tokens, desk.ledger.committed("hr").tokens) == (100, 600)
    assert desk.renew("g1", paid(2), need=900, seq=2).leases[0].hold.tokens == 900
    assert desk.spent().tokens == 200


def test_the_files_are_for_their_owner_only(desk: Desk) -> None:
    desk.renew("g1", paid(1))
    assert stat.S_IMODE(os.stat(desk.path.parent).st_mode) == 0o700
    for file in desk.path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_one_ledger_at_a_time(desk: Desk) -> None:
    with pytest.raises(LedgerStoreError, match="in use"):
        desk.open()


def test_a_foreign_or_broken_or_newer_file_is_refused_and_untouched(tmp_path: Path) -> None:
    foreign, broken, newer = (tmp_path / name for name in ("a.sqlite", "b.sqlite", "c.sqlite"))
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    broken.write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 40)
    LedgerStore(newer).close()
    with sqlite3.connect(newer) as connection:
        connection.execute("UPDATE schema_version SET version = 99")
    connection.close()
    before = foreign.read_bytes()
    for path, reason in ((foreign, "not a budget"), (broken, "cannot be used"), (newer, "99")):
        with pytest.raises(LedgerStoreError, match=reason):
            LedgerStore(path)
        with pytest.raises(LedgerStoreError, match=reason):
            LedgerStore(path)
    assert foreign.read_bytes() == before


def test_old_reservations_are_forgotten(desk: Desk) -> None:
    desk.renew("g1", need=1000)
    desk.ledger.report(report(row(1, ended=True), row(2), row(3, ended=True)))
    desk.renew("g1", paid(1, 10), paid(2, 10), open=100)
    for hours, left in ((0.9, 3), (1.2, 2), (20, 2), (2.2, 1), (1, 0)):
        desk.pass_s(hours * 3600)
        for _ in range(3):
            desk.ledger.sweep()
        desk.restart()
        rows = desk.ledger._store._connection.execute("SELECT id FROM reservation").fetchall()
        assert len(rows) == left


def test_a_clock_that_jumps_forward_makes_nothing_forgotten(desk: Desk) -> None:
    ended = row(1, ended=True)
    desk.ledger.report(report(ended))
    desk.renew("g1", paid(1, 10))
    desk.now_us += 300 * DAY_US
    for _ in range(3):
        desk.ledger.sweep()
    desk.ledger.report(report(ended, seq=2))
    assert desk.ledger.totals()["hr"].tokens == 10


def test_another_window_in_the_file_keeps_what_was_spent(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.renew("g1", paid(1, 70))
    desk.budgets = BudgetsConfig.model_validate(
        {"accounts": {"hr": {"window": "month", "timezone": "Asia/Tokyo", "tokens": 100}}}
    )
    desk.restart()
    (state,) = desk.ledger.state("hr")
    assert (state.window, state.spent.tokens, state.limit_tokens) == ("month", 70, 100)
    assert len(desk.events(EventType.BUDGETS_LOADED)) == 2
    desk.ledger._store.close()


# Devices of several kinds


RESERVATION_1 = """
    CREATE TABLE reservation (
      n          INTEGER PRIMARY KEY,      -- in order of first report
      id         TEXT NOT NULL UNIQUE,     -- a second report of the same changes the first's row
      account    TEXT NOT NULL,
      gateway_id TEXT NOT NULL,
      gpu_us     INTEGER NOT NULL,         -- charged: the largest figure of all reports
      tokens     INTEGER NOT NULL,
      open       INTEGER NOT NULL,         -- 1: its gateway's lease lives, and it is not settled
      settled    INTEGER NOT NULL,         -- 1: its gateway reported it
      ended      INTEGER NOT NULL,         -- 1: its engine was through with it
      unsettled  TEXT,                     -- audit event to write if the gateway never settles it
      changed_us INTEGER NOT NULL          -- by the age of the file, see BudgetLedger
    ) STRICT
    """
"""The table as version 1 of the file had it."""
KINDS = {"L4": 0.25, "H100": 4}


@pytest.fixture
def mixed(tmp_path: Path) -> Iterator[Desk]:
    """Two kinds of device may serve a model."""
    accounts = {"hr": {"window": "day", "gpu_seconds": 1000, "tokens": 10_000}}
    desk = Desk(
        tmp_path,
        BudgetsConfig.model_validate({"accounts": accounts, "accelerators": KINDS}),
    )
    yield desk
    desk.ledger._store.close()


def guessed(raw_us: int | None, weight: float = 4) -> Settlement:
    """Settled at the weight that the gateway took it to be."""
    used = Amount(round((raw_us or 0) * weight), 15)
    return replace(paid(), gpu_us=raw_us, used=used)


@pytest.mark.parametrize("engine_first", [True, False])
@pytest.mark.parametrize("weight", [0.25, 1, 4])
def test_the_device_that_served_gives_the_weight(
    mixed: Desk, engine_first: bool, weight: float
) -> None:
    mixed.ledger.report(report(replica_id="r2", accelerator="H100"))
    mixed.renew(need=100)
    served = report(row(1, answer=5, gpu_us=1_000_000, ended=True), accelerator="L4")
    if engine_first:
        mixed.ledger.report(served)
    mixed.renew("g1", guessed(1_000_000, weight))
    if not engine_first:
        assert mixed.spent().gpu_us == round(1_000_000 * weight)
        mixed.restart()
        mixed.ledger.report(served)
    assert mixed.spent() == Amount(250_000, 15)
    assert mixed.ledger.totals()["hr"] == Amount(250_000, 15)
    mixed.restart()
    mixed.ledger.report(report(row(1, answer=5, gpu_us=999_999), seq=2, accelerator="L4"))
    assert mixed.spent() == Amount(250_000, 15)


def test_what_a_gateway_knows_holds_until_its_engine_says_as_much(mixed: Desk) -> None:
    mixed.renew("g1", guessed(1_000_000))
    mixed.ledger.report(report(row(1, answer=1, gpu_us=10_000), accelerator="L4"))
    assert mixed.spent() == Amount(250_000, 15)
    mixed.ledger.report(
        report(row(1, answer=9, gpu_us=1_200_000, ended=True), seq=2, accelerator="L4")
    )
    assert mixed.spent() == Amount(300_000, 19)


@pytest.mark.parametrize("settles_at", [0, 1, 2])
@pytest.mark.parametrize("turned", [False, True])
def test_of_two_devices_the_one_that_worked_gives_the_weight(
    mixed: Desk, settles_at: int, turned: bool
) -> None:
    tried = report(row(1, gpu_us=0), replica_id="r2", accelerator="H100")
    served = report(row(1, answer=5, gpu_us=1_000_000, ended=True), accelerator="L4")
    for step, message in enumerate([served, tried] if turned else [tried, served]):
        if step == settles_at:
            mixed.renew("g1", guessed(1_000_000))
        mixed.ledger.report(message)
    if settles_at == 2:
        mixed.renew("g1", guessed(1_000_000))
    assert mixed.spent().gpu_us == 250_000


def test_a_lower_charge_returns_to_its_window_only(mixed: Desk) -> None:
    mixed.renew("g1", guessed(1_000_000))
    mixed.pass_s(86_400)
    mixed.renew("g1", replace(guessed(2_000_000), reservation_id="rsv_g1_2"))
    assert mixed.spent().gpu_us == 8_000_000
    served = (row(1, gpu_us=1_000_000, ended=True), row(2, gpu_us=2_000_000, ended=True))
    mixed.ledger.report(report(*served, accelerator="L4"))
    assert mixed.spent().gpu_us == 500_000
    assert mixed.ledger.totals()["hr"].gpu_us == 750_000


def test_a_lower_charge_within_a_lease_frees_nothing_twice(mixed: Desk) -> None:
    mixed.renew(need=100)
    mixed.ledger.report(report(row(1, gpu_us=0), replica_id="r2", accelerator="H100"))
    mixed.ledger.report(report(row(1, gpu_us=400_000), accelerator="L4"))
    lease = mixed.ledger._books.state.leases["g1", "hr"]
    assert lease.open_spent == Amount(100_000, 10)
    mixed.renew("g1", guessed(400_000))
    mixed.renew()
    assert mixed.ledger.committed("hr") == mixed.spent() == Amount(100_000, 15)


def test_gateways_reserve_for_the_dearest_device(mixed: Desk) -> None:
    for seq in range(1, 4):
        mixed.ledger.report(report(replica_id="r2", seq=seq, accelerator="H100"))
        mixed.ledger.report(report(replica_id="r1", seq=seq, accelerator="L4"))
    (price,) = mixed.renew(need=1).prices
    assert price.weight_milli == 4000
    mixed.ledger.report(report(replica_id="r2", seq=4, accelerator="H100", dead=True))
    mixed.pass_s(1)
    mixed.ledger.report(report(replica_id="r1", seq=4, accelerator="L4"))
    (price,) = mixed.renew(need=1).prices
    assert price.weight_milli == 250


NEW_IN_3 = (
    *(
        f"{kind}_{what}"
        for kind in ("moved", "alerted", "standing")
        for what in ("gpu_us", "tokens")
    ),
    "standing_at_us",
)


def test_a_file_of_the_first_version_is_taken_over(desk: Desk) -> None:
    desk.renew(need=500)
    desk.ledger.report(report(row(1, answer=40, gpu_us=700)))
    desk.ledger.close()
    with sqlite3.connect(desk.path) as file:
        file.execute("ALTER TABLE reservation RENAME TO new")
        file.execute(RESERVATION_1)
        file.execute(
            "INSERT INTO reservation SELECT n, id, account, gateway_id, gpu_us, tokens, open,"
            " settled, ended, unsettled, changed_us FROM new"
        )
        file.execute("DROP TABLE new")
        file.execute("DROP TABLE alert")
        file.execute("DROP TABLE transfer")
        for column in NEW_IN_3:
            file.execute(f"ALTER TABLE account DROP COLUMN {column}")
        file.execute("UPDATE schema_version SET version = 1")
    file.close()
    desk.open()
    desk.ledger.report(report(row(1, answer=50, gpu_us=900, ended=True), seq=2))
    assert desk.spent() == Amount(900, 60)
    desk.restart()
    assert desk.spent() == Amount(900, 60)


# A lease that ended while an answer ran


@pytest.mark.parametrize("restarts", [False, True])
def test_a_lease_that_starts_anew_locks_nothing_up(desk: Desk, restarts: bool) -> None:
    desk.renew(need=500)
    desk.renew(open=500)
    desk.ledger.report(report(row(1, prompt=10, answer=390)))
    desk.pass_s(11)
    desk.ledger.sweep()
    assert desk.ledger._books.state.leases == {}
    desk.renew(open=500)
    if restarts:
        desk.restart()
    desk.ledger.report(report(row(1, prompt=10, answer=400), seq=2))
    if restarts:
        desk.restart()
    lease = desk.ledger._books.state.leases["g1", "hr"]
    assert lease.open_spent == Amount(0, 410)
    assert desk.ledger.committed("hr").tokens == 500
    desk.renew("g1", paid(tokens=410))
    reply = desk.renew(need=9_590)
    assert reply.leases[0].hold == Amount(0, 9_590)
    assert desk.ledger.committed("hr").tokens == LIMIT.tokens


# Names that nobody uses


def test_looking_at_an_account_makes_none(tmp_path: Path) -> None:
    budgets = BudgetsConfig.model_validate({"default_account": {"tokens": 500}})
    desk = Desk(tmp_path, budgets)
    for number in range(20):
        (state,) = desk.ledger.state(f"nobody-{number}")
        assert (state.limit_tokens, state.spent) == (500, Amount())
    assert desk.ledger.state() == ()
    (row_count,) = desk.ledger._store._connection.execute("SELECT count(*) FROM account").fetchone()
    assert row_count == 0
    expires_us = desk.now_us + DAY_US
    desk.ledger.set_override("nobody-1", None, 7, expires_us, "k", "why")
    assert [state.limit_tokens for state in desk.ledger.state()] == [7]
    desk.renew(account="nobody-2", need=5)
    assert [state.account for state in desk.ledger.state()] == ["nobody-1", "nobody-2"]
    desk.ledger._store.close()
