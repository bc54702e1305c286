"""Whatever the sequence of requests, limits hold."""

from __future__ import annotations

from bisect import bisect_right

from hypothesis import given
from hypothesis import strategies as st

from governance.admission.limits import Lease, RateLimiter
from governance.errors import RateLimited
from governance.types import Limits

steps = st.lists(
    st.tuples(
        st.sampled_from([0, 0.5, 10, 19.75, 20, 29.5, 59.5])
        | st.floats(0, 40),  # seconds before it
        st.sampled_from(["acquire", "acquire", "release"]),
        st.sampled_from(["a", "b", "c", "d"]),
    ),
    max_size=120,
)


@given(steps=steps, per_minute=st.integers(1, 6), parallel=st.integers(1, 4))
def test_no_minute_and_no_moment_exceeds_its_limit(
    steps: list[tuple[float, str, str]], per_minute: int, parallel: int
) -> None:
    now_s = 0.0
    limiter = RateLimiter(lambda: now_s)
    limits = Limits(requests_per_minute=per_minute, parallel_requests=parallel)
    admitted: dict[str, list[int]] = {}
    running: dict[str, list[Lease]] = {}
    waits_s: list[int] = []
    for wait_s, action, key in steps:
        now_s += wait_s
        if action == "release":
            if running.get(key):
                lease = running[key].pop()
                lease.release()
                lease.release()
            continue
        try:
            lease = limiter.acquire(key, limits)
        except RateLimited as refusal:
            waits_s.append(refusal.retry_after_s or 0)
            continue
        running.setdefault(key, []).append(lease)
        admitted.setdefault(key, []).append(int(now_s * 1_000_000))
        assert len(running[key]) <= parallel
    assert all(1 <= wait_s <= 60 for wait_s in waits_s)
    for times in admitted.values():
        for i, start in enumerate(times):
            assert bisect_right(times, start + 60_000_000 - 1) - i <= per_minute


@given(steps=steps, per_minute=st.integers(1, 6))
def test_a_request_is_refused_only_when_the_minute_is_full(
    steps: list[tuple[float, str, str]], per_minute: int
) -> None:
    now_s = 0.0
    limiter = RateLimiter(lambda: now_s)
    limits = Limits(requests_per_minute=per_minute)
    admitted: dict[str, list[int]] = {}
    for wait_s, _, key in steps:
        now_s += wait_s
        now_us = int(now_s * 1_000_000)
        recent = [t for t in admitted.get(key, []) if t > now_us - 60_000_000]
        try:
            limiter.acquire(key, limits)
        except RateLimited:
            assert len(recent) == per_minute
        else:
            assert len(recent) < per_minute
            admitted.setdefault(key, []).append(now_us)
