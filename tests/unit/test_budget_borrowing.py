"""Arithmetic of borrowing, by hand-computed cases and by invariants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governance.budget.borrowing import Member, Pool, Room, decayed

amounts = st.integers(0, 10_000)


def member(
    nominal: int, used: int = 0, *, lend: int = 0, borrow: int = 0, standing: int = 0
) -> Member:
    return Member(nominal, min(lend, nominal), borrow, used, standing)


def room(one: Member, others: list[Member], shared: int, *, lending: bool = True) -> Room:
    pool = Pool({str(n): other for n, other in enumerate(others)}, shared)
    pool.put("one", one)
    return pool.room("one", one, lending=lending)


def test_without_borrowing_a_member_has_its_nominal_budget() -> None:
    assert room(member(100, 30), [member(500)], 0) == Room(70, 0)
    assert room(member(100, 130), [member(500)], 0) == Room(0, 0)


def test_a_member_borrows_what_others_lend_and_no_more() -> None:
    lender = member(500, 0, lend=200)
    assert room(member(100, 100, borrow=1000), [lender], 0) == Room(0, 200)
    assert room(member(100, 100, borrow=50), [lender], 0) == Room(0, 50)
    assert room(member(100, 250, borrow=1000), [lender], 0) == Room(0, 50)


def test_what_a_lender_used_itself_is_not_lent() -> None:
    # 500 nominal, 200 of it to lend: the first 300 that it uses are nobody else's.
    assert room(member(100, 100, borrow=999), [member(500, 300, lend=200)], 0) == Room(0, 200)
    assert room(member(100, 100, borrow=999), [member(500, 450, lend=200)], 0) == Room(0, 50)
    assert room(member(100, 100, borrow=999), [member(500, 500, lend=200)], 0) == Room(0, 0)


def test_a_lender_keeps_what_it_does_not_lend() -> None:
    borrower = member(100, 300, borrow=200)  # has taken all that is lent
    assert room(member(500, 0, lend=200), [borrower], 0) == Room(300, 0)


def test_a_cohorts_own_room_is_lent_to_all() -> None:
    assert room(member(100, 100, borrow=80), [member(100)], 60) == Room(0, 60)


def test_while_lending_is_stopped_everybody_has_his_own() -> None:
    lender = member(500, 0, lend=200)
    assert room(member(100, 40, borrow=99), [lender], 0, lending=False) == Room(60, 0)


def test_of_two_that_borrow_the_one_that_borrowed_less_may_take_more() -> None:
    lender = member(10_000, 0, lend=1000)
    often = member(100, 110, borrow=9999, standing=200)
    seldom = member(100, 110, borrow=9999)
    first = room(often, [lender, seldom], 0).borrowed
    second = room(seldom, [lender, often], 0).borrowed
    # Weights 1/4 and 1; 20 of 1,000 are taken.
    assert (first, second) == (980 // 5, 980 * 4 // 5)


@pytest.mark.parametrize(
    ("elapsed_us", "left"), [(0, 1000), (10, 500), (20, 250), (10**9, 0), (-5, 1000)]
)
def test_what_was_borrowed_counts_half_after_the_half_life(elapsed_us: int, left: int) -> None:
    assert decayed(1000, elapsed_us, 10) == left


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[list[Member], int]:
    members = [
        member(draw(amounts), 0, lend=draw(amounts), borrow=draw(amounts), standing=draw(amounts))
        for _ in range(draw(st.integers(1, 5)))
    ]
    return members, draw(st.sampled_from([0, 0, 500]))


@given(cohorts(), st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1)), max_size=40))
def test_however_members_take_turns_nothing_is_used_twice(
    cohort: tuple[list[Member], int], turns: list[tuple[int, float]]
) -> None:
    members, shared = list(cohort[0]), cohort[1]
    capacity = shared + sum(m.nominal for m in members)
    for which, part in turns:
        place = which % len(members)
        others = members[:place] + members[place + 1 :]
        found = room(members[place], others, shared)
        assert min(found.own, found.borrowed) >= 0
        taken = int((found.own + found.borrowed) * part)
        one = members[place]
        members[place] = Member(one.nominal, one.lend, one.borrow, one.used + taken, one.standing)
        assert members[place].used <= one.nominal + one.borrow
        assert sum(m.used for m in members) <= capacity
        # What nobody lent is still there for its owner.
        for other in members:
            free = room(other, [m for m in members if m is not other], shared).own
            assert free >= other.guaranteed - other.used
        changed = Pool({str(n): m for n, m in enumerate(cohort[0])}, shared)
        fresh = Pool({str(n): m for n, m in enumerate(members)}, shared)
        for number, each in enumerate(members):
            changed.put(str(number), each)
        assert changed.left == fresh.left >= 0
        assert changed.borrowers("") == fresh.borrowers("")
