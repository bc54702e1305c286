"""Load: which tier is passed over, for whom, and what is tried next."""

from __future__ import annotations

import pytest

from routing.reasons import Reason
from routing.tiers import Candidate, State, place, state
from routing.types import ModelLoad

LOADS = {
    State.FREE: ModelLoad(replicas=1, running=3, slots=8, in_flight=7),
    State.QUEUES: ModelLoad(replicas=1, waiting=1, slots=8),
    State.SATURATED: ModelLoad(replicas=1, slots=8, in_flight=8),
    State.DOWN: ModelLoad(),
}
FREE, QUEUES, SATURATED, DOWN = State


def model(tier: str, busy: State, name: str | None = None) -> Candidate:
    return Candidate(name or tier, tier, 4096, LOADS[busy])


def test_states() -> None:
    for busy in State:
        assert state(model("small", busy)) is busy
    unknown_slots = Candidate("a", "small", 1, ModelLoad(replicas=1, slots=0, in_flight=9))
    assert state(unknown_slots) is FREE


@pytest.mark.parametrize(
    ("wanted", "here", "there", "priority", "reason"),
    [
        ("small", FREE, FREE, "standard", None),
        ("large", QUEUES, FREE, "standard", None),
        ("large", QUEUES, FREE, "batch", None),
        ("large", QUEUES, FREE, "critical", Reason.LOAD_QUEUES),
        ("large", QUEUES, QUEUES, "critical", None),
        ("small", QUEUES, SATURATED, "critical", None),
        ("large", SATURATED, FREE, "standard", Reason.LOAD_SATURATED),
        ("small", SATURATED, QUEUES, "standard", Reason.LOAD_SATURATED),
        ("small", SATURATED, SATURATED, "standard", None),
        ("small", SATURATED, DOWN, "critical", None),
        ("large", SATURATED, FREE, "batch", None),
        ("large", DOWN, FREE, "batch", Reason.LOAD_DOWN),
        ("small", DOWN, SATURATED, "standard", Reason.LOAD_DOWN),
        ("small", DOWN, DOWN, "critical", None),
        ("large", SATURATED, FREE, "what is this", Reason.LOAD_SATURATED),
    ],
)
def test_a_tier_is_passed_over(
    wanted: str, here: State, there: State, priority: str, reason: Reason | None
) -> None:
    other = "large" if wanted == "small" else "small"
    models = (model(wanted, here), model(other, there))
    placed = place(wanted, models, priority, may_rise=True)
    assert placed.passed == reason
    assert placed.model.tier == (wanted if reason is None else other)
    assert len(placed.fallbacks) == 1


@pytest.mark.parametrize(
    ("busy", "tier"), [(SATURATED, "small"), (QUEUES, "small"), (DOWN, "large")]
)
def test_load_goes_up_without_room_only_where_nobody_else_is(busy: State, tier: str) -> None:
    models = (model("small", busy), model("large", FREE))
    assert place("small", models, "critical", may_rise=False).model.tier == tier


@pytest.mark.parametrize(
    ("small", "large", "free"),
    [
        (FREE, FREE, True),
        (QUEUES, FREE, True),
        (SATURATED, FREE, False),
        (FREE, SATURATED, False),
        (FREE, DOWN, False),
        (DOWN, FREE, False),
    ],
)
def test_free_is_what_could_have_gone_either_way(small: State, large: State, free: bool) -> None:
    models = (model("small", small), model("large", large))
    for wanted in ("small", "large"):
        assert place(wanted, models, "standard", may_rise=True).free is free


def test_the_less_busy_of_a_tier_then_the_catalogue_then_the_rest() -> None:
    models = (
        model("large", FREE, "l1"),
        model("small", DOWN, "s1"),
        model("small", QUEUES, "s2"),
        model("small", FREE, "s3"),
        model("small", FREE, "s4"),
        model("large", DOWN, "l2"),
    )
    placed = place("small", models, "standard", may_rise=True)
    assert placed.model.id == "s3"
    assert [other.id for other in placed.fallbacks] == ["s4", "s2", "l1", "s1", "l2"]


def test_one_tier_is_taken_as_it_is() -> None:
    models = (model("large", DOWN, "l1"), model("large", SATURATED, "l2"))
    placed = place("small", models, "standard", may_rise=False)
    assert (placed.model.id, placed.passed, placed.free) == ("l2", None, False)
