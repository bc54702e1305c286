"""Requests per minute and at the same time."""

from __future__ import annotations

import pytest

from governance.admission.limits import REFUSALS_PER_MINUTE, RateLimiter
from governance.errors import Overloaded, RateLimited, TooManyParallel
from governance.types import Limits


class Clock:
    """Monotonic seconds that a test sets."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_minute_slides_and_says_when_it_has_room(clock: Clock) -> None:
    limiter = RateLimiter(clock)
    limits = Limits(requests_per_minute=2)
    limiter.acquire("a", limits).release()
    clock.now_s += 40
    limiter.acquire("a", limits).release()
    with pytest.raises(RateLimited) as caught:
        limiter.acquire("a", limits)
    assert (caught.value.status, caught.value.retry_after_s) == (429, 20)
    limiter.acquire("b", limits)
    clock.now_s += 19.9
    with pytest.raises(RateLimited) as caught:
        limiter.acquire("a", limits)
    assert caught.value.retry_after_s == 1
    clock.now_s += 0.1
    limiter.acquire("a", limits)
    with pytest.raises(RateLimited):
        limiter.acquire("a", limits)


def test_waiting_as_long_as_told_is_enough(clock: Clock) -> None:
    limiter = RateLimiter(clock)
    limits = Limits(requests_per_minute=3)
    for step_s in (0.1, 7.7, 13.3):
        limiter.acquire("a", limits)
        clock.now_s += step_s
    with pytest.raises(RateLimited) as caught:
        limiter.acquire("a", limits)
    clock.now_s += caught.value.retry_after_s or 0
    limiter.acquire("a", limits)


def test_parallel_requests_are_counted_until_released_once(clock: Clock) -> None:
    limiter = RateLimiter(clock)
    limits = Limits(parallel_requests=2)
    first = limiter.acquire("a", limits)
    with limiter.acquire("a", limits):
        with pytest.raises(TooManyParallel):
            limiter.acquire("a", limits)
        first.release()
        first.release()
        first.release()
        limiter.acquire("a", limits)
        with pytest.raises(TooManyParallel):
            limiter.acquire("a", limits)


def test_a_failing_request_gives_its_place_back(clock: Clock) -> None:
    limiter = RateLimiter(clock)
    limits = Limits(parallel_requests=1)
    for _ in range(3):
        with pytest.raises(RuntimeError), limiter.acquire("a", limits):
            raise RuntimeError
    limiter.acquire("a", limits)


def test_a_refused_request_costs_nothing(clock: Clock) -> None:
    limiter = RateLimiter(clock)
    limits = Limits(requests_per_minute=2, parallel_requests=1)
    lease = limiter.acquire("a", limits)
    for _ in range(50):
        with pytest.raises(TooManyParallel):
            limiter.acquire("a", limits)
    lease.release()
    limiter.acquire("a", limits).release()
    with pytest.raises(RateLimited):
        limiter.acquire("a", limits)


def test_no_bound_admits_everything_and_keeps_no_times(clock: Clock) -> None:
    limiter = RateLimiter(clock)
    for _ in range(1_000):
        limiter.acquire("a", Limits())
    with pytest.raises(TooManyParallel):
        limiter.acquire("a", Limits(parallel_requests=1000))


def test_a_limit_that_shrinks_counts_what_was_admitted_before(clock: Clock) -> None:
    limiter = RateLimiter(clock)
    for _ in range(10):
        limiter.acquire("a", Limits(requests_per_minute=10)).release()
        clock.now_s += 1
    with pytest.raises(RateLimited) as caught:
        limiter.acquire("a", Limits(requests_per_minute=3))
    assert caught.value.retry_after_s == 57
    clock.now_s += 57
    limiter.acquire("a", Limits(requests_per_minute=3))


@pytest.mark.parametrize(
    ("gateways", "limit", "admitted"),
    [(1, 10, 10), (2, 10, 5), (3, 10, 3), (49, 98, 2), (8, 3, 1), (100, 1, 1)],
)
def test_each_gateway_gives_out_its_share(
    clock: Clock, gateways: int, limit: int, admitted: int
) -> None:
    limiter = RateLimiter(clock, share=lambda: 1 / gateways)
    limits = Limits(requests_per_minute=limit)
    for _ in range(admitted):
        limiter.acquire("a", limits)
    with pytest.raises(RateLimited):
        limiter.acquire("a", limits)


def test_idle_keys_are_forgotten_and_active_ones_are_not(clock: Clock) -> None:
    limiter = RateLimiter(clock, max_keys=100)
    limits = Limits(requests_per_minute=1)
    held = limiter.acquire("held", Limits(parallel_requests=1))
    for minute in range(20):
        for i in range(40):
            limiter.acquire(f"{minute}-{i}", limits).release()
        clock.now_s += 61
    assert len(limiter) <= 100
    with pytest.raises(TooManyParallel):
        limiter.acquire("held", Limits(parallel_requests=1))
    held.release()


def test_more_active_callers_than_can_be_counted_are_told_to_wait(clock: Clock) -> None:
    limiter = RateLimiter(clock, max_keys=10)
    limits = Limits(requests_per_minute=1)
    for i in range(10):
        limiter.acquire(str(i), limits).release()
    with pytest.raises(Overloaded):
        limiter.acquire("one more", limits)
    with pytest.raises(RateLimited):
        limiter.acquire("0", limits)
    clock.now_s += 61
    limiter.acquire("one more", limits)


def test_refusals_have_a_minute_of_their_own(clock: Clock) -> None:
    limiter = RateLimiter(clock)
    for _ in range(REFUSALS_PER_MINUTE):
        limiter.check_refusals("a")
        limiter.refused("a")
    with pytest.raises(RateLimited) as caught:
        limiter.check_refusals("a")
    assert caught.value.retry_after_s == 60
    limiter.check_refusals("b")
    limiter.acquire("a", Limits(requests_per_minute=1))  # what was admitted counts apart
    clock.now_s += 60
    limiter.check_refusals("a")


def test_counting_a_refusal_never_fails_and_is_not_forgotten(clock: Clock) -> None:
    limiter = RateLimiter(clock, max_keys=2)
    limiter.check_refusals("a")
    limiter.refused("a")
    limiter.refused("never looked at")
    assert len(limiter) == 1
    for other in "bcdefgh":
        limiter.check_refusals(other)
    for _ in range(REFUSALS_PER_MINUTE - 1):
        limiter.refused("a")
    with pytest.raises(RateLimited):
        limiter.check_refusals("a")
