"""Which of the models that can do a request takes it, by the tier that is wanted and by load.

Pure functions of what is known. Load is what replicas reported last and what this gateway has open
there, so it is no promise: what is chosen here may still be full, and the fallbacks are for that.

A tier is passed over where the other can serve and

* it has no replica that takes requests;
* it has no free slot, except for ``batch`` work, which waits rather than costs more;
* requests wait in it while none wait in the other, for ``critical`` work only.

Passing over for load goes up to the large tier only where the department's target and budget leave
room for it; a small tier that is down is replaced anyway, because an answer is worth more than the
saving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from routing.reasons import Reason
from routing.types import ModelLoad

LARGE = "large"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that policy permits for a request."""

    id: str
    tier: str
    """``small`` or ``large``."""
    context_tokens: int
    """Longest prompt plus answer that is served."""
    load: ModelLoad


class State(IntEnum):
    """How busy a model is, best first."""

    FREE = 0
    QUEUES = 1
    """Requests wait in its engines."""
    SATURATED = 2
    """This gateway has no slot left there."""
    DOWN = 3
    """No replica takes requests."""


_REASONS = {
    State.DOWN: Reason.LOAD_DOWN,
    State.SATURATED: Reason.LOAD_SATURATED,
    State.QUEUES: Reason.LOAD_QUEUES,
}


@dataclass(frozen=True, slots=True)
class Placement:
    """The model that takes a request."""

    model: Candidate
    fallbacks: tuple[Candidate, ...]
    """Every other one, in the order in which they are tried."""
    passed: Reason | None
    """Why the tier that was wanted was passed over; ``None`` where it was not."""
    free: bool
    """Either tier would have been taken, had it been wanted."""


def state(candidate: Candidate) -> State:
    """How busy a model is."""
    load = candidate.load
    if load.replicas <= 0:
        return State.DOWN
    if 0 < load.slots <= load.in_flight:
        return State.SATURATED
    return State.QUEUES if load.waiting > 0 else State.FREE


def place(
    wanted: str, able: Sequence[Candidate], priority_class: str, *, may_rise: bool
) -> Placement:
    """Choose among the models that can do a request.

    Args:
        wanted: ``small`` or ``large``.
        able: Models that can do it, in catalogue order; at least one.
        priority_class: ``critical``, ``standard`` or ``batch``.
        may_rise: Whether load may send the request up to the large tier.
    """
    ranked = sorted(able, key=state)  # stable: the catalogue's order among equals
    here = next((model for model in ranked if model.tier == wanted), None)
    there = next((model for model in ranked if model.tier != wanted), None)
    if here is None or there is None:
        return Placement(ranked[0], tuple(ranked[1:]), None, False)
    passed = _passed_over(here, there, priority_class, may_rise)
    back = _passed_over(there, here, priority_class, may_rise)
    model = here if passed is None else there
    return Placement(model, _others(model, ranked), passed, passed is None and back is None)


def _passed_over(
    here: Candidate, there: Candidate, priority_class: str, may_rise: bool
) -> Reason | None:
    """Why the best model of a tier gives way to the best one of the other."""
    busy, other = state(here), state(there)
    if busy is State.DOWN:
        return _REASONS[busy] if other is not State.DOWN else None
    if there.tier == LARGE and not may_rise:
        return None
    if busy is State.SATURATED and priority_class != "batch" and other < State.SATURATED:
        return _REASONS[busy]
    if busy is State.QUEUES and priority_class == "critical" and other is State.FREE:
        return _REASONS[busy]
    return None


def _others(model: Candidate, ranked: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Same tier first; what seems to be down is tried last, because it may be back."""
    rest = [other for other in ranked if other is not model]
    rest.sort(key=lambda other: (state(other) is State.DOWN, other.tier != model.tier))
    return tuple(rest)
