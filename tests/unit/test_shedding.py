"""Who is turned away from a queue, and when; the rate that waits are estimated by."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governance.admission.shedding import (
    MIN_COMPLETIONS,
    PATIENCE,
    QUEUE,
    REASONS,
    REPORT_S,
    UNKNOWN_RETRY_S,
    Applicant,
    LoadShedder,
    Place,
    QueueLimits,
    Rate,
    overloaded,
)
from governance.classes import PRIORITY_CLASSES, effective_class
from governance.types import Shed
from routing.types import ModelLoad

SHARES = {"critical": 100, "standard": 80, "batch": 50}
SHORT = QueueLimits(waiting=10)


class Desk:
    """A shedder of one model, whose load and clock a test sets."""

    def __init__(self, limits: QueueLimits = SHORT, share: float = 1.0) -> None:
        self.now_s = 1000.0
        self.load = ModelLoad(replicas=1, running=8, slots=256)
        self.shedder = LoadShedder(
            ["m"], lambda base: self.load, lambda: self.now_s, {"m": limits}, lambda: share
        )

    def waiting(self, count: int, replicas: int = 1) -> None:
        self.load = ModelLoad(replicas=replicas, running=8, waiting=count, slots=256)

    def enter(self, each: str = "standard", department: str = "hr", weight: int = 1000) -> object:
        return self.shedder.enter("m", Applicant(each, department, weight))

    def shed(self, each: str = "standard", department: str = "hr") -> Shed:
        found = self.enter(each, department)
        assert isinstance(found, Shed)
        return found

    def fill(self, count: int, each: str = "standard", department: str = "hr") -> list[Place]:
        """Let so many in while nobody waits, then report them as waiting."""
        self.waiting(0)
        places = [self.enter(each, department) for _ in range(count)]
        self.waiting(count)
        self.now_s += REPORT_S
        return [place for place in places if isinstance(place, Place)]

    def learn(self, per_second: float, seconds: float = 60.0) -> None:
        """Complete requests at a rate while others wait."""
        for _ in range(int(per_second * seconds)):
            self.now_s += 1 / per_second
            self.shedder.completed("m")


@pytest.mark.parametrize(
    ("waiting", "shed"),
    [
        (0, []),
        (4, []),
        (5, ["batch"]),
        (7, ["batch"]),
        (8, ["standard", "batch"]),
        (9, ["standard", "batch"]),
        (10, ["critical", "standard", "batch"]),
    ],
)
def test_overload_sheds_batch_first_and_critical_last(waiting: int, shed: list[str]) -> None:
    for each in PRIORITY_CLASSES:
        desk = Desk()
        desk.waiting(waiting)
        found = desk.enter(each)
        assert isinstance(found, Shed) == (each in shed), each
        if isinstance(found, Shed):
            assert (found.reason, found.waiting, found.model) == (QUEUE, waiting, "m")


def test_the_bound_is_per_replica() -> None:
    desk = Desk()
    desk.waiting(15, replicas=2)
    assert isinstance(desk.enter(), Place)
    desk.waiting(16, replicas=2)
    assert isinstance(desk.enter(), Shed)


def test_an_idle_engine_takes_any_burst() -> None:
    desk = Desk()
    assert all(isinstance(desk.enter("batch"), Place) for _ in range(200))


def test_what_was_just_sent_counts_until_reports_can_have_it() -> None:
    desk = Desk()
    desk.waiting(6)
    assert [isinstance(desk.enter(), Place) for _ in range(4)] == [True, True, False, False]
    desk.now_s += REPORT_S
    assert isinstance(desk.enter(), Place)


def test_who_floods_a_queue_is_shed_and_not_who_comes_after() -> None:
    desk = Desk()
    with ExitStack() as held:
        for place in desk.fill(8, department="marketing"):
            held.enter_context(place)
        assert isinstance(desk.enter(department="marketing"), Shed)
        later = []
        for _ in range(6):
            found = desk.enter(department="science")
            if isinstance(found, Place):
                held.enter_context(found)
                later.append(found)
        assert len(later) == 4, "its half of the room of its class"


def test_a_flood_of_a_more_urgent_class_leaves_no_room_for_batch() -> None:
    desk = Desk()
    with ExitStack() as held:
        for place in desk.fill(6, "standard", "marketing"):
            held.enter_context(place)
        assert isinstance(desk.enter("batch", "science"), Shed)
        assert isinstance(desk.enter("critical", "science"), Place)


def test_weights_divide_the_room() -> None:
    desk = Desk(QueueLimits(waiting=100))
    with ExitStack() as held:
        for place in desk.fill(80, department="marketing"):
            held.enter_context(place)
        admitted = 0
        for _ in range(80):
            found = desk.shedder.enter("m", Applicant("standard", "science", 3000))
            if isinstance(found, Place):
                held.enter_context(found)
                admitted += 1
        assert admitted == 60


def test_a_wait_beyond_the_patience_of_the_class_is_refused_at_once() -> None:
    desk = Desk(QueueLimits(waiting=1000))
    desk.waiting(100)
    desk.learn(2.0)
    assert desk.shedder.rate("m") == pytest.approx(2.0, rel=0.05)
    shed = desk.shed("critical")
    assert shed.reason == PATIENCE
    assert shed.wait_ms == pytest.approx(50_000, rel=0.1)
    assert shed.retry_after_s == pytest.approx(40, abs=5), "when the wait will be bearable"
    assert isinstance(desk.enter("standard"), Place), "it has 60 s"
    assert isinstance(desk.enter("batch"), Place)


def test_who_is_served_first_does_not_wait_for_the_rest() -> None:
    desk = Desk(QueueLimits(waiting=1000))
    with ExitStack() as held:
        for place in desk.fill(300, "batch"):
            held.enter_context(place)
        desk.learn(2.0)
        assert isinstance(desk.enter("critical"), Place), "no critical request waits"
        assert desk.shedder.stats["m", "critical", PATIENCE] == 0


def test_a_department_that_asks_little_waits_its_share_only() -> None:
    desk = Desk(QueueLimits(waiting=1000))
    with ExitStack() as held:
        for place in desk.fill(300, "standard", "marketing"):
            held.enter_context(place)
        desk.learn(2.0)
        assert desk.shed("standard", "marketing").reason == PATIENCE
        assert isinstance(desk.enter("standard", "science"), Place)


def test_a_gateway_reckons_with_the_completions_of_the_others() -> None:
    desk = Desk(share=0.25)
    desk.waiting(1)
    desk.learn(2.0)
    assert desk.shedder.rate("m") == pytest.approx(8.0, rel=0.05)


def test_without_a_rate_only_the_queue_counts() -> None:
    desk = Desk(QueueLimits(waiting=1000))
    desk.waiting(799)
    assert isinstance(desk.enter(), Place)
    desk.waiting(800)
    shed = desk.shed()
    assert (shed.wait_ms, shed.retry_after_s) == (None, UNKNOWN_RETRY_S)


def test_refusals_are_counted_by_model_class_and_reason() -> None:
    desk = Desk()
    assert desk.shedder.stats == {
        ("m", each, reason): 0 for each in PRIORITY_CLASSES for reason in (QUEUE, PATIENCE)
    }
    desk.waiting(9)
    desk.shed("batch")
    desk.shed("batch")
    desk.shed("standard")
    assert desk.shedder.stats["m", "batch", QUEUE] == 2
    assert desk.shedder.stats["m", "standard", QUEUE] == 1
    assert desk.shedder.stats.total() == 3


def test_the_refusal_says_why_and_when_to_come_back() -> None:
    queue = overloaded(Shed(QUEUE, "m", "batch", 70, None, 5))
    assert (queue.code, queue.status, queue.retry_after_s) == ("overloaded", 429, 5)
    assert "70" in queue.message
    assert "batch" in queue.message
    patience = overloaded(Shed(PATIENCE, "m", "critical", 9, 12_300, 3))
    assert "13 s" in patience.message


def test_places_return_whatever_becomes_of_the_request() -> None:
    desk = Desk()
    places = desk.fill(8)
    assert isinstance(desk.enter(), Shed)
    with pytest.raises(RuntimeError), places[0]:
        raise RuntimeError
    for place in places[1:]:
        place.started()
        place.started()
    desk.waiting(8)
    # Nothing of this gateway waits any more: those eight are others'.
    queue = desk.shedder._queue("m")
    standard = queue.classes["standard"]
    assert (queue.known, standard.total, standard.weight) == (0, 0, 0)
    assert (standard.waiting, standard.weights) == ({}, {})


def test_a_rate_is_learned_while_there_is_a_queue_only() -> None:
    rate = Rate()
    for second in range(100):
        rate.completed(float(60 * second), queued=False)
    assert rate.per_second(6000.0) is None, "an idle model completes what it is asked"
    for tenth in range(200):
        rate.completed(6000 + tenth / 10, queued=True)
    assert rate.per_second(6020.0) == pytest.approx(10.0, rel=0.02)


def test_too_few_completions_are_no_rate() -> None:
    rate = Rate()
    for second in range(MIN_COMPLETIONS):
        rate.completed(float(second), queued=True)
    assert rate.per_second(float(MIN_COMPLETIONS)) is None


def test_a_model_that_stands_still_is_slower_than_it_was() -> None:
    rate = Rate()
    for tenth in range(200):
        rate.completed(tenth / 10, queued=True)
    seen = [rate.per_second(20.0 + silent) for silent in (0.0, 30.0, 300.0)]
    assert seen[0] is not None
    assert seen[1] is not None
    assert seen[2] is not None
    assert seen[0] > 2 * seen[1] > 4 * seen[2]


def test_a_rate_follows_a_change() -> None:
    rate, now_s = Rate(half_life_s=10), 0.0
    for per_second in (20.0, 2.0):
        for _ in range(int(per_second * 60)):
            now_s += 1 / per_second
            rate.completed(now_s, queued=True)
    assert rate.per_second(now_s) == pytest.approx(2.0, rel=0.3)


@given(
    waiting=st.integers(0, 400),
    replicas=st.integers(0, 3),
    bound=st.integers(1, 200),
    per_second=st.sampled_from([None, 0.5, 5.0, 50.0]),
    own=st.lists(st.tuples(st.sampled_from(PRIORITY_CLASSES), st.sampled_from("abc")), max_size=40),
)
def test_what_sheds_a_class_sheds_every_less_urgent_one(
    waiting: int,
    replicas: int,
    bound: int,
    per_second: float | None,
    own: list[tuple[str, str]],
) -> None:
    """With equal patience, and of a department that has nothing waiting."""
    limits = QueueLimits(bound, SHARES, dict.fromkeys(PRIORITY_CLASSES, 30_000))
    desk = Desk(limits)
    with ExitStack() as held:
        for each, department in own:
            found = desk.enter(each, department)
            assert isinstance(found, Place), "nobody waits yet"
            held.enter_context(found)
        desk.now_s += REPORT_S
        desk.waiting(waiting, replicas)
        if per_second is not None:
            desk.learn(per_second, 30)
        found = [desk.enter(each, "new") for each in PRIORITY_CLASSES]
        for place in found:
            if isinstance(place, Place):
                place.started()
        if not own:
            shed = [isinstance(each, Shed) for each in found]
            assert shed == sorted(shed), "the least urgent first"
        # Those that were let in just before count as well.
        if waiting + 2 < bound * replicas * 50 // 100 and per_second is None:
            assert not any(isinstance(each, Shed) for each in found)
        if waiting == 0 or replicas == 0:
            assert not any(isinstance(each, Shed) for each in found)


@pytest.mark.parametrize(
    ("given", "effective"),
    [
        ((None, None), "standard"),
        (("critical", None), "critical"),
        ((None, "batch"), "batch"),
        (("critical", "standard"), "standard"),
        (("batch", "critical"), "batch"),
        (("critical", "critical"), "critical"),
    ],
)
def test_the_less_urgent_class_counts(given: tuple[str | None, ...], effective: str) -> None:
    assert effective_class(*given) == effective


def test_under_lasting_overload_batch_pays_first_and_critical_is_served_in_time() -> None:
    """A server of ten requests a second, in the order of classes, that is asked for 24."""
    limits = QueueLimits(waiting=40, patience_ms=dict.fromkeys(PRIORITY_CLASSES, 8_000))
    desk = Desk(limits)
    waiting: dict[str, list[tuple[float, Place]]] = {each: [] for each in PRIORITY_CLASSES}
    asked = {"critical": 4, "standard": 10, "batch": 10}
    served = dict.fromkeys(PRIORITY_CLASSES, 0)
    slowest_s = dict.fromkeys(PRIORITY_CLASSES, 0.0)
    end_s = desk.now_s + 120
    while desk.now_s < end_s:
        # A tenth of a second: what comes, what the replica reports, what is served.
        for each, rate in asked.items():
            for number in range(rate):
                if round(desk.now_s * 10) % 10 == number:
                    place = desk.enter(each, f"{each}-{number % 2}")
                    if isinstance(place, Place):
                        waiting[each].append((desk.now_s, place))
        desk.waiting(sum(map(len, waiting.values())))
        for each in PRIORITY_CLASSES:
            if waiting[each]:
                since_s, place = waiting[each].pop(0)
                place.completed()
                served[each] += 1
                slowest_s[each] = max(slowest_s[each], desk.now_s - since_s)
                break
        desk.now_s += 0.1
    shed = {each: sum(desk.shedder.stats["m", each, r] for r in REASONS) for each in asked}
    assert shed["critical"] == 0
    assert slowest_s["critical"] < 2
    assert 0 < shed["standard"] < shed["batch"]
    assert served["standard"] > 5 * served["batch"]
    assert sum(map(len, waiting.values())) <= 2 * limits.waiting
