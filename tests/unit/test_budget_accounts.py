"""The ledger's tree: paths, borrowing and reclaim, transfers, modes, thresholds, a new file."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from governance.audit.schema import EventType
from governance.budget.config import BudgetsConfig
from governance.budget.messages import AccountState
from governance.errors import NoAccount
from governance.types import Amount
from tests.budget_desk import DAY_US, Desk, paid
from tests.budget_world import report, row

Open = Callable[..., Desk]


@pytest.fixture
def open_desk(tmp_path: Path) -> Iterator[Open]:
    desks: list[Desk] = []

    def make(data: dict[str, Any]) -> Desk:
        desks.append(Desk(tmp_path, BudgetsConfig.model_validate(data)))
        return desks[-1]

    yield make
    for desk in desks:
        desk.ledger._store.close()


def hr(**more: Any) -> dict[str, Any]:
    return {"accounts": {"hr": {"window": "day", "tokens": 1000, **more}}}


def state(desk: Desk, account: str) -> AccountState:
    (found,) = desk.ledger.state(account)
    return found


def lent(desk: Desk, account: str, need: int, gateway_id: str = "g1", **more: Any) -> int:
    """What a renewal grants beyond what was open."""
    reply = desk.renew(gateway_id, account=account, need=need, **more)
    holds = [v.hold.tokens for v in reply.leases if v.account == account]
    return (holds[0] if holds else 0) - more.get("open", 0)


def spend(desk: Desk, account: str, tokens: int, number: int = 1, **more: Any) -> None:
    desk.renew("g1", replace(paid(number, tokens), account=account), account=account, **more)


PARTS = {"bot": {"window": "day", "tokens": 300, "match": {"roles": ["bot"]}}}


# Paths


def test_a_charge_counts_at_everything_above(open_desk: Open) -> None:
    desk = open_desk(
        hr(
            parts=PARTS,
            per_user={"window": "day", "tokens": 50},
            also=[{"window": "hour", "tokens": 400}],
        )
    )
    spend(desk, "hr/bot~u1", 30, 1)
    spend(desk, "hr/bot~u2", 10, 2)
    spend(desk, "hr~u3", 5, 3)
    spent = {s.account: s.spent.tokens for s in desk.ledger.state(users=True)}
    assert spent == {
        "hr": 45,
        "hr@hour": 45,
        "hr/bot": 40,
        "hr/bot~u1": 30,
        "hr/bot~u2": 10,
        "hr~u3": 5,
    }
    assert {s.account for s in desk.ledger.state()} == {"hr", "hr@hour", "hr/bot"}
    assert desk.ledger.totals() == {"hr": Amount(0, 45)}
    desk.restart()
    assert {s.account: s.spent.tokens for s in desk.ledger.state(users=True)} == spent


def test_the_tightest_account_on_the_path_decides(open_desk: Open) -> None:
    desk = open_desk(
        hr(
            parts=PARTS,
            per_user={"window": "day", "tokens": 500},
            also=[{"window": "hour", "tokens": 200}],
            owner="hr-budget",
        )
    )
    assert lent(desk, "hr/bot~u1", 999) == 200
    tight = state(desk, "hr/bot~u2").tight_tokens
    assert tight is not None
    assert (tight.account, tight.window, tight.limit, tight.owner) == (
        "hr@hour",
        "hour",
        200,
        "hr-budget",
    )
    assert state(desk, "hr/bot~u2").rest_tokens == 0
    assert state(desk, "hr/bot~u2").reach_tokens == 200
    assert not state(desk, "hr/bot~u2").over
    spend(desk, "hr/bot~u1", 200)
    assert state(desk, "hr/bot~u2").over
    desk.pass_s(3600)
    # 200 of the hour before are part of the day, and of the part's 300.
    assert lent(desk, "hr/bot~u2", 999) == 100


def test_leases_of_many_users_share_what_is_above(open_desk: Open) -> None:
    desk = open_desk(hr(per_user={"window": "day", "tokens": 400}))
    assert [lent(desk, f"hr~u{n}", 400, f"g{n}") for n in range(4)] == [400, 400, 200, 0]
    assert state(desk, "hr").leased.tokens == 1000


def test_only_the_window_that_ends_is_fresh(open_desk: Open) -> None:
    desk = open_desk(hr(also=[{"window": "hour", "tokens": 400}]))
    spend(desk, "hr", 150)
    desk.pass_s(3600)
    assert (state(desk, "hr@hour").spent.tokens, state(desk, "hr").spent.tokens) == (0, 150)


def test_a_window_that_ended_is_on_record(open_desk: Open) -> None:
    desk = open_desk(hr(per_user={"window": "day", "tokens": 50}))
    start_us = state(desk, "hr").window_start_us
    spend(desk, "hr~u1", 30)
    desk.pass_s(3 * DAY_US / 1e6)
    desk.ledger.sweep()
    (event,) = desk.events(EventType.BUDGET_WINDOW)
    assert (event["entity_id"], event["ts_us"]) == ("hr", start_us)
    assert json.loads(event["detail"])["tokens"] == 30


def test_what_is_lowered_returns_to_the_windows_that_still_run(open_desk: Open) -> None:
    desk = open_desk(hr(also=[{"window": "hour", "gpu_seconds": 1}], gpu_seconds=1))
    desk.renew(account="hr", need=5)
    spend(desk, "hr", 10)
    desk.renew("g1", replace(paid(2, 5, gpu_us=900), account="hr"), account="hr")
    desk.pass_s(3600)
    # The engine says less than the gateway guessed, an hour later.
    desk.ledger.report(report(row(2, answer=5, gpu_us=300, ended=True), accelerator="cpu"))
    figures = state(desk, "hr").spent.gpu_us, state(desk, "hr@hour").spent.gpu_us
    assert figures == (900, 0)


def test_users_are_forgotten_when_their_window_ends(open_desk: Open) -> None:
    desk = open_desk(hr(per_user={"window": "day", "tokens": 50}))
    for number in range(20):
        spend(desk, f"hr~u{number}", 3, number)
    desk.pass_s(11)
    desk.ledger.sweep()
    desk.pass_s(DAY_US / 1e6)
    desk.ledger.sweep()
    assert [s.account for s in desk.ledger.state(users=True)] == ["hr"]
    desk.restart()
    assert [s.account for s in desk.ledger.state(users=True)] == ["hr"]
    assert desk.ledger.totals() == {"hr": Amount(0, 60)}


# Borrowing


def cohort(**members: dict[str, Any]) -> dict[str, Any]:
    return {
        "cohorts": {"business": {"window": "day"}},
        "accounts": {
            name: {"window": "day", "cohort": "business", **limits}
            for name, limits in members.items()
        },
    }


LENDING = cohort(
    hr={"tokens": 1000, "lend": {"tokens": 600}},
    it={"tokens": 100, "borrow": {"tokens": 500}},
    pr={"tokens": 100, "borrow": {"tokens": 500}},
)


def test_a_department_borrows_up_to_its_limit(open_desk: Open) -> None:
    desk = open_desk(LENDING)
    assert lent(desk, "it", 9999) == 600
    assert state(desk, "it").borrowed.tokens == 500
    assert lent(desk, "hr", 9999) == 500
    assert state(desk, "it").limit_tokens == 100


def test_what_is_borrowed_and_spent_is_gone_for_the_lender(open_desk: Open) -> None:
    desk = open_desk(LENDING)
    desk.renew(account="it", need=600)
    spend(desk, "it", 600)
    assert lent(desk, "hr", 9999) == 500
    assert state(desk, "hr").reach_tokens == 500
    desk.pass_s(DAY_US / 1e6)
    assert lent(desk, "hr", 9999) == 1000


def test_what_is_borrowed_and_only_held_is_reclaimed(open_desk: Open) -> None:
    desk = open_desk(LENDING)
    desk.renew("g1", account="it", need=600)
    # The lender wants its own, and cannot have it all yet.
    assert lent(desk, "hr", 900, "g2") == 500
    # At its next renewals the borrower keeps what its requests have reserved: 50.
    desk.renew("g1", account="it", open=50, cushion=9999)
    assert lent(desk, "it", 999, open=50) <= 50
    assert lent(desk, "hr", 400, "g2", open=500) == 400
    # Nobody borrows anew while it lasts; then again.
    assert lent(desk, "pr", 200, "g3") == 100
    desk.renew("g2", account="hr", closing=True)
    desk.pass_s(20)
    assert lent(desk, "pr", 9999, "g3") == 600


def test_a_reclaim_takes_nothing_from_running_requests(open_desk: Open) -> None:
    desk = open_desk(LENDING)
    desk.renew("g1", account="it", need=600)
    lent(desk, "hr", 900, "g2")
    desk.renew("g1", account="it", open=600)
    desk.renew("g1", account="it", open=600)
    assert state(desk, "it").leased.tokens == 600
    assert state(desk, "hr").limit_tokens == 1000
    assert state(desk, "hr").leased.tokens + 600 <= 1200


def test_who_borrowed_much_of_late_is_given_less(open_desk: Open) -> None:
    desk = open_desk(LENDING)
    desk.renew(account="it", need=300)
    spend(desk, "it", 300)  # 200 borrowed: two nominal budgets, weight 1/4
    desk.renew("g2", account="pr", need=150)  # 50 borrowed and held, weight 1
    assert state(desk, "it").borrowed.tokens == 200
    assert lent(desk, "it", 9999) == (600 - 250) // 5


# Transfers


TWO = {
    "accounts": {
        "hr": {"window": "day", "tokens": 1000, "gpu_seconds": 10, "parts": PARTS},
        "it": {"window": "day", "tokens": 500},
        "pr": {"window": "month", "tokens": 500},
        "ops": {"window": "day", "tokens": 500, "cohort": "x"},
    },
    "cohorts": {"x": {"window": "day", "tokens": 600}},
}


def test_a_transfer_counts_until_the_window_ends(open_desk: Open) -> None:
    desk = open_desk(TWO)
    source, target = desk.ledger.transfer("hr", "it", 0, 300, "who", "quarter end")
    assert (source.limit_tokens, target.limit_tokens) == (700, 800)
    assert (source.moved.tokens, target.moved.tokens) == (-300, 300)
    assert lent(desk, "it", 9999) == 800
    desk.restart()
    assert state(desk, "hr").limit_tokens == 700
    (entry,) = desk.ledger.transfers()
    assert (entry.source, entry.target, entry.moved.tokens, entry.by) == ("hr", "it", 300, "who")
    (event,) = desk.events(EventType.BUDGET_TRANSFER)
    assert (event["entity_id"], event["budget_account"], event["reason_code"]) == (
        "hr",
        "it",
        "quarter end",
    )
    desk.pass_s(DAY_US / 1e6)
    assert (state(desk, "hr").limit_tokens, state(desk, "it").limit_tokens) == (1000, 500)


def test_only_what_is_neither_spent_nor_lent_out_can_be_moved(open_desk: Open) -> None:
    desk = open_desk(TWO)
    desk.renew(account="hr", need=600)
    spend(desk, "hr", 100, open=0, need=500)
    with pytest.raises(ValueError, match="has 10000000 gpu_us and 400 tokens that are"):
        desk.ledger.transfer("hr", "it", 0, 401, "who", "why")
    desk.ledger.transfer("hr", "it", 0, 400, "who", "why")
    assert state(desk, "hr").rest_tokens == 0
    assert lent(desk, "hr", 9999, "g2") == 0


def test_a_demand_that_comes_again_moves_nothing(open_desk: Open) -> None:
    desk = open_desk(TWO)
    with desk.ledger.batch():
        for _ in range(2):
            desk.ledger.transfer("hr", "it", 0, 300, "who", "why", key="demand 1")
    desk.restart()
    _, target = desk.ledger.transfer("hr", "it", 0, 300, "who", "why", key="demand 1")
    assert target.limit_tokens == 800
    desk.ledger.transfer("hr", "it", 0, 300, "who", "why", key="demand 2")
    assert [entry.key for entry in desk.ledger.transfers()] == ["demand 2", "demand 1"]


@pytest.mark.parametrize(
    ("source", "target", "gpu_us", "tokens", "reason"),
    [
        ("hr", "hr", 0, 1, "the same account"),
        ("hr", "pr", 0, 1, "different windows"),
        ("hr", "ops", 0, 1, "cohort x has a limit"),
        ("ops", "hr", 0, 1, "cohort x has a limit"),
        ("hr", "hr/bot", 0, 1, "not two departments"),
        ("hr/bot", "it", 0, 1, "not two departments"),
        ("hr", "it", 1, 0, "account it has no limit of that kind"),
        ("hr", "it", 0, 0, "moves nothing"),
        ("hr", "it", 0, -5, "whole number"),
        ("hr", "it", 0, 1.5, "whole number"),
        ("hr", "it", 0, True, "whole number"),
        ("hr", "it", 0, 10**16, "whole number"),
        ("hr", "it", 0, 1001, "neither spent nor lent"),
    ],
)
def test_an_impossible_transfer_changes_nothing(
    open_desk: Open, source: str, target: str, gpu_us: Any, tokens: Any, reason: str
) -> None:
    desk = open_desk(TWO)
    before = desk.ledger.state()
    with pytest.raises(ValueError, match=reason):
        desk.ledger.transfer(source, target, gpu_us, tokens, "who", "why")
    assert desk.ledger.state() == before
    assert desk.ledger.transfers() == []


@pytest.mark.parametrize("name", ["nobody", "hr/none", "hr~u1", "", "a b", "hr@week"])
def test_a_transfer_to_nobody_is_refused(open_desk: Open, name: str) -> None:
    desk = open_desk(TWO)
    with pytest.raises(NoAccount):
        desk.ledger.transfer("hr", name, 0, 1, "who", "why")


# Modes


def test_an_overdraft_is_part_of_the_limit(open_desk: Open) -> None:
    desk = open_desk(hr(mode="overdraft", overdraft={"tokens": 200}))
    found = state(desk, "hr")
    assert (found.limit_tokens, found.overdraft.tokens, found.mode) == (1200, 200, "overdraft")
    assert lent(desk, "hr", 9999) == 1200


def test_a_path_stops_unless_all_of_it_is_soft(open_desk: Open) -> None:
    parts = {
        "a": {"tokens": 9, "match": {"roles": ["a"]}},
        "b": {"tokens": 9, "match": {"roles": ["b"]}, "mode": "hard"},
    }
    desk = open_desk(hr(mode="soft", parts=parts))
    stops = [state(desk, name).stops for name in ("hr", "hr/a", "hr/b")]
    assert stops == [False, False, True]


def test_an_override_must_add_up(open_desk: Open) -> None:
    desk = open_desk(TWO | {"organisation": {"window": "month", "tokens": 31 * 2200 + 500}})
    until_us = desk.now_us + DAY_US
    with pytest.raises(ValueError, match="may use"):
        desk.ledger.set_override("it", None, 601, until_us, "k", "why")
    # One that lowers a limit gives others nothing: it may end first.
    desk.ledger.set_override("hr", None, 900, until_us, "k", "why")
    with pytest.raises(ValueError, match="may use"):
        desk.ledger.set_override("it", None, 601, until_us, "k", "why")
    desk.ledger.set_override("it", None, 600, until_us, "k", "why")
    assert state(desk, "it").limit_tokens == 600


def test_what_was_spent_under_an_override_counts_after_it(open_desk: Open) -> None:
    accounts = {name: {"window": "day", "tokens": 100} for name in ("hr", "it", "pr")}
    desk = open_desk({"accounts": accounts, "organisation": {"window": "day", "tokens": 400}})
    until_us = desk.now_us + DAY_US
    desk.ledger.set_override("hr", None, 200, until_us, "k", "why")
    spend(desk, "hr", 200)
    desk.ledger.clear_override("hr", "k", "why")
    with pytest.raises(ValueError, match="may use 500"):
        desk.ledger.set_override("it", None, 200, until_us, "k", "why")


def test_a_part_and_a_further_window_are_overridden_by_their_names(open_desk: Open) -> None:
    desk = open_desk(hr(parts=PARTS, also=[{"window": "hour", "tokens": 400}]))
    until_us = desk.now_us + DAY_US
    desk.ledger.set_override("hr/bot", None, 10, until_us, "k", "why")
    desk.ledger.set_override("hr@hour", None, 20, until_us, "k", "why")
    assert lent(desk, "hr/bot", 99) == 10
    assert lent(desk, "hr", 99, "g2") == 10


# Thresholds


def test_each_threshold_is_told_once_a_window(open_desk: Open) -> None:
    desk = open_desk(hr(owner="hr-budget", parts=PARTS) | {"alerts": {"thresholds": [50, 100]}})
    spend(desk, "hr", 499, 1)
    assert desk.ledger.alerts() == []
    spend(desk, "hr", 1, 2)
    spend(desk, "hr", 100, 3)
    (first,) = desk.ledger.alerts()
    assert {k: first[1][k] for k in ("account", "quantity", "threshold", "spent", "limit")} == {
        "account": "hr",
        "quantity": "tokens",
        "threshold": 50,
        "spent": 500,
        "limit": 1000,
    }
    assert first[1]["owner"] == "hr-budget"
    desk.restart()
    assert desk.ledger.alerts() == [first]
    desk.ledger.alerts_done(first[0])
    spend(desk, "hr/bot", 900, 4)
    told = [(a["account"], a["threshold"]) for _, a in desk.ledger.alerts()]
    assert told == [("hr/bot", 50), ("hr/bot", 100), ("hr", 100)]
    assert len({a["id"] for _, a in desk.ledger.alerts()}) == 3
    assert len(desk.events(EventType.BUDGET_THRESHOLD)) == 4
    desk.ledger.alerts_done(desk.ledger.alerts()[-1][0])
    desk.pass_s(DAY_US / 1e6)
    spend(desk, "hr", 501, 5)
    assert [a["threshold"] for _, a in desk.ledger.alerts()] == [50]


def test_an_alert_that_is_given_up_is_on_record(open_desk: Open) -> None:
    desk = open_desk(hr())
    spend(desk, "hr", 600)
    ((seq, alert),) = desk.ledger.alerts()
    desk.ledger.alert_lost(alert, "not delivered within 24 h")
    desk.ledger.alerts_done(seq)
    last = desk.events(EventType.BUDGET_THRESHOLD)[-1]
    assert (last["state"], last["entity_id"]) == ("undelivered", alert["id"])


def test_users_cause_no_alerts(open_desk: Open) -> None:
    desk = open_desk(hr(per_user={"window": "day", "tokens": 10}))
    spend(desk, "hr~u1", 10)
    assert desk.ledger.alerts() == []


# Another file


def test_a_new_file_holds_without_a_restart(open_desk: Open) -> None:
    desk = open_desk(hr())
    desk.renew("g1", account="hr", need=500)
    spend(desk, "hr", 200, need=300)
    before = desk.ledger.config.digest
    new = BudgetsConfig.model_validate(hr(tokens=600, parts=PARTS))
    assert desk.ledger.apply(new, "who", "less")
    found = state(desk, "hr")
    assert (found.limit_tokens, found.spent.tokens) == (600, 200)
    assert found.rest_tokens == 600 - 200 - found.leased.tokens
    assert state(desk, "hr/bot").limit_tokens == 300
    assert desk.renew("g1", account="hr", open=10).digest == new.digest != before
    (_, event) = desk.events(EventType.BUDGETS_LOADED)
    assert (event["subject_key"], event["reason_code"]) == ("who", "less")
    assert not desk.ledger.apply(new, "who", "again")


def test_a_part_that_is_taken_out_is_charged_to_its_department(open_desk: Open) -> None:
    desk = open_desk(hr(parts=PARTS))
    desk.renew("g1", account="hr/bot", need=100)
    desk.ledger.apply(BudgetsConfig.model_validate(hr()))
    assert state(desk, "hr").leased.tokens == 100
    reply = desk.renew("g1", replace(paid(1, 60), account="hr/bot"), account="hr/bot")
    assert reply.unknown == ("hr/bot",)
    assert state(desk, "hr").spent.tokens == 60
    desk.renew("g1", account="hr/bot")
    assert state(desk, "hr").leased.tokens == 0


def test_a_lower_limit_keeps_what_runs(open_desk: Open) -> None:
    desk = open_desk(hr())
    desk.renew("g1", account="hr", need=800)
    desk.ledger.apply(BudgetsConfig.model_validate(hr(tokens=100)))
    reply = desk.renew("g1", account="hr", open=300, cushion=500)
    assert reply.leases[0].hold.tokens == 300


def test_a_file_that_could_not_be_stored_does_not_hold(
    open_desk: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = open_desk(hr())
    new = BudgetsConfig.model_validate(hr(tokens=5000))

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(desk.ledger._store, "save", full)
        with pytest.raises(sqlite3.OperationalError):
            desk.ledger.apply(new, "who", "more")
    assert state(desk, "hr").limit_tokens == 1000
    assert desk.ledger.apply(new, "who", "more")
    assert [e["subject_key"] for e in desk.events(EventType.BUDGETS_LOADED)] == [None, "who"]


def test_the_number_of_ledgers_cannot_change_under_way(open_desk: Open) -> None:
    desk = open_desk(hr())
    with pytest.raises(ValueError, match="shards is 1 here"):
        desk.ledger.apply(BudgetsConfig.model_validate(hr() | {"shards": 2}))
