"""The fair queue: order, virtual time, service elsewhere, ageing; and VTC's bound at random."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.fairness import BATCH, CRITICAL, STANDARD, FairQueue, FairSettings

SECOND_US = 1_000_000


def queue(**options: int) -> FairQueue[str]:
    return FairQueue(FairSettings(**options))


def add(
    fair: FairQueue[str],
    key: str,
    rank: int = STANDARD,
    *,
    weight: int = 1000,
    served: int = 0,
    now: int = 0,
    estimate: int = 0,
) -> None:
    """A request; its department is the first letter of its key."""
    fair.arrive(key, key[0], rank, weight, served, now, estimate)


def serve(fair: FairQueue[str], cost_us: int, now: int = 0) -> str:
    """The next one runs, costs so much, and ends."""
    key = fair.head(now)
    assert key is not None
    fair.take(key)
    fair.charge(key, cost_us)
    fair.leave(key, now)
    return key


def test_departments_take_turns_by_what_they_cost() -> None:
    fair = queue()
    for number in range(6):
        add(fair, f"a{number}")
        add(fair, f"b{number}")
    order = [serve(fair, 30 if fair.head(0) in {"a0", "a1"} else 10) for _ in range(8)]
    assert order == ["a0", "b0", "b1", "b2", "a1", "b3", "b4", "b5"]


def test_a_weight_is_a_share() -> None:
    fair = queue()
    for number in range(40):
        add(fair, f"a{number}", weight=3000)
        add(fair, f"b{number}", weight=1000)
    served = [serve(fair, 100)[0] for _ in range(40)]
    assert served.count("a") == 30


def test_within_a_department_the_first_that_came_is_next() -> None:
    fair = queue()
    for key in ("a1", "a2", "a3"):
        add(fair, key)
    assert [serve(fair, 5) for _ in range(3)] == ["a1", "a2", "a3"]
    assert fair.head(0) is None
    assert len(fair) == 0


def test_classes_come_before_shares() -> None:
    fair = queue()
    add(fair, "a1", BATCH)
    add(fair, "b1", STANDARD)
    add(fair, "c1", CRITICAL)
    assert [serve(fair, 10**6) for _ in range(3)] == ["c1", "b1", "a1"]


def test_who_was_idle_saves_nothing_up_and_owes_nothing() -> None:
    fair = queue()
    for number in range(10):
        add(fair, f"a{number}")
    for _ in range(5):
        serve(fair, 1000)
    for number in range(10):
        add(fair, f"b{number}")
    # b begins where a is: they take turns, b has no 5,000 to catch up on.
    assert [serve(fair, 1000)[0] for _ in range(4)] in (list("abab"), list("baba"))


def test_after_an_empty_queue_nobody_is_ahead() -> None:
    fair = queue()
    add(fair, "a1")
    serve(fair, 9000)
    add(fair, "b1")
    serve(fair, 10)
    add(fair, "a2")
    add(fair, "b2")
    assert serve(fair, 1) == "a2"


def test_one_look_does_not_start_all_of_one_department() -> None:
    fair = queue()
    for number in range(4):
        add(fair, f"a{number}", estimate=100)
    for number in range(4):
        add(fair, f"b{number}", estimate=100)
    started = []
    for _ in range(4):
        key = fair.head(0)
        assert key is not None
        fair.take(key)
        started.append(key[0])
    assert sorted(started) == ["a", "a", "b", "b"]


def test_an_estimate_is_replaced_by_what_is_metered() -> None:
    for estimate in (0, 50, 500):
        fair = queue()
        add(fair, "a1", estimate=estimate)
        add(fair, "a2")
        fair.take("a1")
        fair.charge("a1", 40)
        fair.charge("a1", 60)
        fair.leave("a1")
        assert fair.virtual_us() == {"a": 100}


def test_who_is_put_back_has_its_place_again() -> None:
    fair = queue()
    for key in ("a1", "a2", "b1"):
        add(fair, key, estimate=10)
    fair.take("a1")
    fair.put_back("a1")
    assert fair.virtual_us() == {"a": 0, "b": 0}
    assert fair.head(0) == "a1"
    assert next(iter(fair.order(0))) == "a1"


def test_who_is_set_aside_is_passed_and_keeps_its_place() -> None:
    fair = queue()
    add(fair, "a1")
    add(fair, "a2")
    fair.set_aside("a1")
    assert (fair.head(0), len(fair)) == ("a2", 1)
    assert fair.place("a1", 0) < fair.place("a2", 0)
    fair.put_back("a1")
    assert fair.head(0) == "a1"
    fair.set_aside("a1")
    fair.take("a1")
    fair.leave("a1")
    assert fair.head(0) == "a2"


def test_service_elsewhere_counts_once() -> None:
    fair = queue()
    add(fair, "a1", served=1000)
    add(fair, "b1", served=77_000)  # lifetime totals say nothing
    assert fair.virtual_us() == {"a": 0, "b": 0}
    fair.take("a1")
    fair.charge("a1", 500)
    # The figure holds the 500 from here, and 300 from elsewhere.
    add(fair, "a2", served=1800)
    assert fair.virtual_us()["a"] == 800
    add(fair, "a3", served=1800)
    assert fair.virtual_us()["a"] == 800
    # An older figure changes nothing.
    add(fair, "a4", served=900)
    assert fair.virtual_us()["a"] == 800


def test_service_elsewhere_while_long_away_does_not_count() -> None:
    fair = queue(memory_us=10 * SECOND_US)
    add(fair, "b1")
    add(fair, "a1")
    fair.leave("a1", 0)
    add(fair, "a2", served=5_000, now=9 * SECOND_US)
    assert fair.virtual_us()["a"] == 5_000
    fair.leave("a2", 10 * SECOND_US)
    add(fair, "a3", served=905_000, now=21 * SECOND_US)
    assert fair.virtual_us()["a"] == 5_000


def test_a_batch_request_grows_up() -> None:
    fair = queue(batch_age_us=30 * SECOND_US)
    add(fair, "a1", BATCH)
    for number in range(5):
        add(fair, f"b{number}", now=SECOND_US)
    assert serve(fair, 100, 29 * SECOND_US) == "b0"
    assert serve(fair, 100, 30 * SECOND_US) == "a1"


def test_what_is_gone_changes_nothing() -> None:
    fair = queue()
    add(fair, "a1")
    with pytest.raises(ValueError, match="twice"):
        add(fair, "a1")
    fair.leave("a1")
    fair.leave("a1")
    fair.charge("a1", 5)
    assert (fair.head(0), len(fair), "a1" in fair) == (None, 0, False)


@st.composite
def workloads(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    weights = draw(st.lists(st.integers(200, 5000), min_size=2, max_size=4))
    costs = draw(st.lists(st.integers(1, 1000), min_size=60, max_size=200))
    return weights, costs


@given(workloads())
@settings(deadline=None)
def test_two_that_both_wait_are_never_further_apart_than_one_request(
    workload: tuple[list[int], list[int]],
) -> None:
    """One place and exact charges: VTC's bound is the dearest request over its weight."""
    weights, costs = workload
    fair = queue()
    served = dict.fromkeys("abcd"[: len(weights)], 0)
    for name, weight in zip(served, weights, strict=False):
        for number in range(len(costs) + 1):
            add(fair, f"{name}{number}", weight=weight)
    bound = max(Fraction(max(costs) * 1000, weight) for weight in weights) + 1
    for cost in costs:
        served[serve(fair, cost)[0]] += cost
        shares = [
            Fraction(each * 1000, weight)
            for each, weight in zip(served.values(), weights, strict=True)
        ]
        assert max(shares) - min(shares) <= bound


events = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "start", "charge", "back", "aside", "leave"]),
        st.integers(0, 11),
        st.sampled_from([CRITICAL, STANDARD, BATCH]),
        st.integers(0, 500),
    ),
    max_size=120,
)


@given(events)
@settings(deadline=None, max_examples=200)
def test_whatever_happens_nobody_is_lost_and_classes_hold(
    happened: list[tuple[str, int, int, int]],
) -> None:
    fair = queue(batch_age_us=200)
    waiting: dict[str, tuple[int, int]] = {}
    others: set[str] = set()
    for now, (what, number, rank, figure) in enumerate(happened):
        key = f"{'abcd'[number % 4]}{number}"
        if what == "arrive" and key not in fair:
            fair.arrive(key, key[0], rank, 1000, figure, now, figure)
            waiting[key] = (rank, now)
        elif what == "start" and waiting:
            started = fair.head(now)
            assert started is not None
            fair.take(started)
            del waiting[started]
            others.add(started)
        elif what == "charge" and key in others:
            fair.charge(key, figure)
        elif what == "back" and key in others:
            fair.put_back(key)
            others.discard(key)
            waiting[key] = (fair.rank(key), -1)
        elif what == "aside" and key in waiting:
            fair.set_aside(key)
            del waiting[key]
            others.add(key)
        elif what == "leave" and key in fair:
            fair.leave(key, now)
            waiting.pop(key, None)
            others.discard(key)
        assert len(fair) == len(waiting)
        assert set(fair.order(now)) == waiting.keys()
        first = fair.head(now)
        assert (first is None) == (not waiting)
        if first is not None:
            ranks = {name: fair.place(name, now)[0] for name in waiting}
            assert ranks[first] == min(ranks.values())
            assert fair.place(first, now) == min(fair.place(name, now) for name in waiting)
        assert sum(fair.waiting().values()) == len(waiting)


def test_who_always_runs_something_owes_nothing_for_a_day_without_queues() -> None:
    """Counters drift apart where nobody waits; that is no debt when somebody does."""
    fair = queue()
    for number in range(50):
        for name, cost in (("a", 10_000), ("b", 100)):
            add(fair, f"{name}{number}")
            fair.take(f"{name}{number}")
            fair.charge(f"{name}{number}", cost)
            if number:
                fair.leave(f"{name}{number - 1}", 0)
    for number in range(100, 110):
        add(fair, f"b{number}")
        add(fair, f"a{number}")
    order = [serve(fair, 1000)[0] for _ in range(6)]
    assert order.count("a") == order.count("b") == 3


def test_batch_work_on_a_free_engine_is_no_debt_of_other_work() -> None:
    fair = queue()
    add(fair, "b0")
    serve(fair, 10)
    for number in range(20):
        add(fair, f"a{number}", BATCH)
        serve(fair, 50_000)
    for number in range(20, 26):
        add(fair, f"b{number}")
        add(fair, f"a{number}")
    order = [serve(fair, 1000)[0] for _ in range(6)]
    assert order.count("a") == 3


def test_who_has_grown_up_competes_at_the_least_counter() -> None:
    fair = queue(batch_age_us=100)
    for number in range(10):
        add(fair, f"a{number}", BATCH)
        add(fair, f"b{number}", now=99)
    for _ in range(5):
        serve(fair, 1000, 99)
    order = [serve(fair, 1000, 100)[0] for _ in range(8)]
    assert order.count("a") == order.count("b") == 4
    assert fair.waiting() == {CRITICAL: 0, STANDARD: 1, BATCH: 6}


class Batching:
    """Continuous batching: so many places; a prompt is paid in the first step, then each step."""

    def __init__(self, places: int, **options: int) -> None:
        self.fair = queue(**options)
        self.places = places
        self.now = 0
        self.left: dict[str, list[int]] = {}
        self.running: dict[str, list[int]] = {}
        self.served: dict[str, int] = {}
        self.started: list[str] = []

    def ask(self, key: str, rank: int, weight: int, costs: list[int]) -> None:
        add(self.fair, key, rank, weight=weight, now=self.now, estimate=costs[0])
        self.left[key] = list(costs)
        self.served.setdefault(key[0], 0)

    def step(self) -> None:
        while len(self.running) < self.places and (key := self.fair.head(self.now)) is not None:
            self.fair.take(key)
            self.running[key] = self.left.pop(key)
            self.started.append(key)
        assert not (len(self.fair) and len(self.running) < self.places), "idle beside a queue"
        for key, costs in list(self.running.items()):
            cost = costs.pop(0)
            self.fair.charge(key, cost)
            self.served[key[0]] += cost
            if not costs:
                del self.running[key]
                self.fair.leave(key, self.now)
        self.now += 1


requests = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.integers(0, 30),
        st.lists(st.integers(1, 50), min_size=1, max_size=6),
    ),
    min_size=5,
    max_size=60,
)


@given(
    requests,
    st.integers(1, 5),
    st.lists(st.sampled_from([500, 1000, 3000]), min_size=3, max_size=3),
)
@settings(deadline=None)
def test_the_bound_holds_under_continuous_batching(
    asked: list[tuple[str, int, list[int]]], places: int, weights: list[int]
) -> None:
    """For any two, over any stretch in which both wait all the time, from arrivals at random."""
    machine = Batching(places)
    weight = dict(zip("abc", weights, strict=True))
    dearest = sorted((sum(costs) for _, _, costs in asked), reverse=True)
    bound = 2 * Fraction(sum(dearest[:places]) * 1000, min(weights)) + 1
    todo = sorted(enumerate(asked), key=lambda item: item[1][1])
    since: dict[tuple[str, str], list[Fraction]] = {}
    while todo or machine.running or len(machine.fair):
        while todo and todo[0][1][1] <= machine.now:
            number, (name, _, costs) = todo.pop(0)
            machine.ask(f"{name}{number}", STANDARD, weight[name], costs)
        machine.step()
        waiting = {key[0] for key in machine.fair.order(machine.now)}
        for pair in (("a", "b"), ("a", "c"), ("b", "c")):
            if not set(pair) <= waiting:
                since.pop(pair, None)
                continue
            one, other = (Fraction(machine.served[n] * 1000, weight[n]) for n in pair)
            gaps = since.setdefault(pair, [])
            gaps.append(one - other)
            assert max(gaps) - min(gaps) <= bound
    assert len(machine.started) == len(asked)


@given(requests, st.integers(1, 3))
@settings(deadline=None)
def test_batch_waits_for_its_age_and_then_as_a_standard_one(
    asked: list[tuple[str, int, list[int]]], places: int
) -> None:
    """Others never stop asking, so it waits; and little longer than its age."""
    age = 20
    machine = Batching(places, batch_age_us=age)
    machine.ask("z0", BATCH, 1000, [1])
    dearest = max(sum(costs) for _, _, costs in asked)
    number = 0
    while "z0" not in machine.started:
        for name in "abc":
            _, _, costs = asked[number % len(asked)]
            number += 1
            machine.ask(f"{name}{number}", STANDARD, 1000, costs)
        machine.step()
        # It grows up level with the least. What each of the three others may be given before it is
        # half the bound, ``places * dearest``, each start is at least 1 of it and takes 6 steps.
        assert machine.now <= age + 6 * (3 * (dearest + 1) + 2)
    assert machine.now > age
