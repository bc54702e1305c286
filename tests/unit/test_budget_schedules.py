"""Simulated schedules of everything that goes wrong, and whether those who watch would notice.

``benchmarks/budgets/schedules.py`` plays a thousand and more of the same.
"""

from __future__ import annotations

import pytest

from benchmarks.budgets import watch
from benchmarks.budgets.parts import Trouble
from benchmarks.budgets.schedule import LONGEST_PROMPT, Schedule
from governance.budget import grants, meters
from governance.budget.books import Books
from governance.budget.borrowing import Pool
from governance.budget.state import Lease
from governance.types import Amount

SEEDS = 200
PER_TEST = 20


@pytest.mark.parametrize("first", range(0, SEEDS, PER_TEST))
def test_no_schedule_breaks_a_bound(first: int) -> None:
    for seed in range(first, first + PER_TEST):
        Schedule(seed).play()


def test_a_seed_is_one_schedule() -> None:
    everything = Trouble(0.15, 0.15, 0.3, *(True,) * 9)
    first, second = (Schedule(7, everything).play() for _ in range(2))
    assert first == second
    assert first.requests > 20
    assert first.checks > 100


def test_without_trouble_only_a_prompt_at_the_edge_goes_beyond() -> None:
    for seed in range(1000, 1010):
        outcome = Schedule(seed, Trouble()).play()
        assert outcome.refused < outcome.requests
        assert outcome.worst_over_tokens <= LONGEST_PROMPT


def test_schedules_meet_what_they_are_about() -> None:
    everything = Trouble(0.1, 0.15, 0.2, *(True,) * 9)
    found = [Schedule(seed, everything, shards=2).play() for seed in range(2000, 2010)]
    for name in ("ledger_kills", "gateway_kills", "engine_kills", "cuts", "jumps", "changes"):
        assert sum(getattr(outcome, name) for outcome in found), name
    for name in ("transfers", "borrowed", "refused", "stopped"):
        assert sum(getattr(outcome, name) for outcome in found), name


# Each fault that is put in must be found, or the schedules prove nothing.


def first_broken(trouble: Trouble, shards: int = 1) -> str:
    for seed in range(3000, 3025):
        try:
            Schedule(seed, trouble, shards).play()
        except watch.Broken as broken:
            return str(broken)
    return ""


def test_a_ledger_that_lends_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grants, "largest", lambda left, hold: hold)
    assert "believes to hold" in first_broken(Trouble(lose=0.2))


def test_a_report_that_counts_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Books.metered

    def metered(self: Books, found: object, gpu_us: int, tokens: int, *rest: int) -> None:
        real(self, found, gpu_us + found.charged.gpu_us // 50, tokens, *rest)  # type: ignore[attr-defined, arg-type, call-arg]

    monkeypatch.setattr(Books, "metered", metered)
    assert first_broken(Trouble())


def test_a_lease_that_never_ends_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Books, "end_lease", lambda self, lease: None)
    assert first_broken(Trouble(gateways_die=True))


def test_an_account_above_that_is_not_charged_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Books._count

    def count(self: Books, lease: Lease) -> None:
        if lease.account == "law":
            lease.counted = lease.outstanding
            return
        real(self, lease)

    monkeypatch.setattr(Books, "_count", count)
    assert "held" in first_broken(Trouble())


def test_an_engine_that_is_not_believed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "charge_row", lambda *_: None)
    assert "was charged" in first_broken(Trouble(gateways_die=True))


def test_borrowing_beyond_what_is_lent_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "free", lambda self, name, member: 10**9)
    assert "cohort biz" in first_broken(Trouble())


def test_a_request_that_runs_on_is_found() -> None:
    def amount(tokens: int) -> Amount:
        return Amount(0, tokens)

    schedule = Schedule(3100, Trouble())
    schedule.play()
    job = next(j for j in schedule.jobs if j.stops and j.settled is not None and not j.lapsed)
    job.done += 10_000
    job.reserved = amount(1)
    with pytest.raises(watch.Broken, match="beyond its reservation"):
        watch.Watch(schedule.processes[0], schedule.jobs, {}).request(job)
