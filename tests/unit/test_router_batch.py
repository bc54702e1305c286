"""Batching of concurrent prompts: bounded, fair, and nobody fails for another's prompt."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from deployments.routing.micro_batch import Backlogged, MicroBatcher
from routing.types import ScorerUnavailable


class Work:
    """Doubles numbers; keeps what it was given; can be held back."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()
        self.poisoned: set[int] = set()
        self.at_once = 0
        self.most_at_once = 0

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.batches.append(list(items))
        assert self.go.wait(10)
        self.at_once -= 1
        if self.poisoned & set(items):
            raise ValueError("a prompt in clear")
        return [2 * item for item in items]


@asynccontextmanager
async def batcher(
    work: Work, max_batch: int = 4, wait_s: float = 0.0, max_waiting: int = 64
) -> AsyncIterator[MicroBatcher[int, int]]:
    made = MicroBatcher(work, max_batch=max_batch, wait_s=wait_s, max_waiting=max_waiting)
    try:
        yield made
    finally:
        work.go.set()
        await made.close()


async def started(work: Work, count: int = 1) -> None:
    """Until so many batches have begun."""
    while len(work.batches) < count:  # noqa: ASYNC110  another thread begins them
        await asyncio.sleep(0.001)


async def hold(made: MicroBatcher[int, int], work: Work) -> asyncio.Task[int]:
    """Keep the thread busy with item 0."""
    work.go.clear()
    task = asyncio.create_task(made.submit(0, 30))
    await started(work)
    return task


async def reasons(tasks: Sequence[asyncio.Task[int]]) -> list[object]:
    """Results, or why there are none."""
    done = await asyncio.gather(*tasks, return_exceptions=True)
    return [d.reason if isinstance(d, ScorerUnavailable) else d for d in done]


async def test_the_first_goes_at_once_and_what_comes_meanwhile_is_the_next_batch() -> None:
    work = Work()
    async with batcher(work, wait_s=5.0) as made:
        first = await hold(made, work)
        assert work.batches == [[0]], "did not wait for company"
        others = [asyncio.create_task(made.submit(n, 30)) for n in (1, 2, 3, 4)]
        await asyncio.sleep(0)
        work.go.set()
        assert await first == 0
        assert await asyncio.gather(*others) == [2, 4, 6, 8]
        assert work.batches == [[0], [1, 2, 3, 4]]
        assert made.stats.batches == 2
        assert made.stats.items == 5


async def test_batches_are_bounded_and_one_at_a_time() -> None:
    work = Work()
    async with batcher(work, max_batch=3) as made:
        first = await hold(made, work)
        others = [asyncio.create_task(made.submit(n, 30)) for n in range(1, 8)]
        await asyncio.sleep(0)
        work.go.set()
        await asyncio.gather(first, *others)
        assert [len(batch) for batch in work.batches] == [1, 3, 3, 1]
        assert work.most_at_once == 1


async def test_a_following_batch_waits_for_company_no_longer_than_is_stated() -> None:
    work = Work()
    async with batcher(work, wait_s=0.2) as made:
        first = await hold(made, work)
        second = asyncio.create_task(made.submit(1, 30))
        await asyncio.sleep(0)
        began = time.monotonic()
        work.go.set()
        await first
        await asyncio.sleep(0.02)
        assert work.batches == [[0]]
        third = asyncio.create_task(made.submit(2, 30))
        await asyncio.gather(second, third)
        assert 0.15 < time.monotonic() - began < 2
        assert work.batches == [[0], [1, 2]]


async def test_a_full_batch_waits_for_nobody() -> None:
    work = Work()
    async with batcher(work, max_batch=2, wait_s=20) as made:
        first = await hold(made, work)
        second = asyncio.create_task(made.submit(1, 30))
        await asyncio.sleep(0)
        work.go.set()
        await first
        third = asyncio.create_task(made.submit(2, 30))
        async with asyncio.timeout(5):
            await asyncio.gather(second, third)


async def test_a_poisoned_prompt_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    work = Work()
    work.poisoned = {2}
    async with batcher(work) as made:
        first = await hold(made, work)
        tasks = [asyncio.create_task(made.submit(n, 30)) for n in (1, 2, 3)]
        await asyncio.sleep(0)
        work.go.set()
        assert await first == 0
        assert await reasons(tasks) == [2, "failed", 6]
        assert work.batches == [[0], [1, 2, 3], [1], [2], [3]]
        assert made.stats.failed == 1
        assert await made.submit(5, 30) == 10, "goes on"
    assert "ValueError" in caplog.text
    assert "clear" not in caplog.text, "what a prompt says is not logged"


async def test_even_what_is_no_exception_harms_nobody_else() -> None:
    """A panic of a Rust library is a BaseException."""

    class Panic(BaseException):
        pass

    def work(items: Sequence[int]) -> list[int]:
        if 1 in items:
            raise Panic
        return list(items)

    made = MicroBatcher(work, max_batch=4)
    tasks = [asyncio.create_task(made.submit(n, 30)) for n in (0, 1, 2)]
    assert await reasons(tasks) == [0, "failed", 2]
    await made.close()


async def test_too_few_results_are_no_results() -> None:
    made: MicroBatcher[int, int] = MicroBatcher(lambda items: list(items)[:-1], max_batch=4)
    with pytest.raises(ScorerUnavailable, match="failed"):
        await made.submit(1, 30)
    await made.close()


async def test_failures_are_not_logged_without_end(caplog: pytest.LogCaptureFixture) -> None:
    work = Work()
    work.poisoned = {1}
    async with batcher(work) as made:
        await reasons([asyncio.create_task(made.submit(1, 30)) for _ in range(50)])
    assert len(caplog.records) == 1


async def test_a_flood_is_turned_away_at_once_and_memory_stays_bounded() -> None:
    work = Work()
    async with batcher(work, max_waiting=10) as made:
        first = await hold(made, work)
        kept = [asyncio.create_task(made.submit(n, 30)) for n in range(1, 11)]
        await asyncio.sleep(0)
        began = time.monotonic()
        for _ in range(5000):
            with pytest.raises(Backlogged):
                await made.submit(99, 30)
        assert time.monotonic() - began < 5
        assert made.waiting == 10
        assert made.stats.refused == 5000
        work.go.set()
        assert await first == 0
        assert await asyncio.gather(*kept) == [2 * n for n in range(1, 11)]
        assert await made.submit(7, 30) == 14


async def test_nobody_is_taken_who_would_be_late_anyway() -> None:
    def work(items: Sequence[int]) -> list[int]:
        time.sleep(0.05 * len(items))
        return list(items)

    made = MicroBatcher(work, max_batch=1)
    await made.submit(0, 30)
    tasks = [asyncio.create_task(made.submit(n, 0.12)) for n in range(20)]
    found = await reasons(tasks)
    assert made.stats.refused >= 15
    assert found.count("late") >= 15
    assert made.waiting == 0
    await asyncio.sleep(0.15)
    assert await made.submit(1, 0.0501 * 20) == 1, "idle again: taken whatever the last one took"
    await made.close()


async def test_one_slow_batch_does_not_turn_everything_away_for_good() -> None:
    slow = threading.Event()

    def work(items: Sequence[int]) -> list[int]:
        if not slow.is_set():
            slow.set()
            time.sleep(0.3)
        return list(items)

    made = MicroBatcher(work, max_batch=1)
    await made.submit(0, 30)
    for n in range(20):
        assert await made.submit(n, 0.2) == n
    await made.close()


async def test_who_waits_too_long_is_told_in_time_and_is_not_worked_on() -> None:
    work = Work()
    async with batcher(work) as made:
        first = await hold(made, work)
        began = time.monotonic()
        with pytest.raises(ScorerUnavailable, match="late") as caught:
            await made.submit(1, 0.05)
        assert not isinstance(caught.value, Backlogged)
        assert time.monotonic() - began < 1
        assert made.waiting == 0
        assert made.stats.expired == 1
        work.go.set()
        await first
        await made.submit(2, 30)
        assert [1] not in work.batches


async def test_a_result_that_comes_late_is_dropped_and_counted() -> None:
    work = Work()
    async with batcher(work) as made:
        work.go.clear()
        with pytest.raises(ScorerUnavailable, match="late"):
            await made.submit(1, 0.05)
        assert made.stats.expired == 0, "it was being worked on"
        work.go.set()
        assert await made.submit(2, 30) == 4
        assert made.stats.dropped == 1


async def test_a_storm_of_cancellations_leaves_nothing_behind() -> None:
    work = Work()
    async with batcher(work, max_waiting=100) as made:
        first = await hold(made, work)
        for _ in range(50):
            tasks = [asyncio.create_task(made.submit(n, 30)) for n in range(1, 101)]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert made.waiting == 0
        work.go.set()
        assert await first == 0
        assert await made.submit(3, 30) == 6
        assert work.batches == [[0], [3]], "not one of the five thousand was worked on"
        assert made.stats.expired == 5000


async def test_cancelling_what_is_worked_on_harms_no_neighbour() -> None:
    work = Work()
    async with batcher(work) as made:
        first = await hold(made, work)
        tasks = [asyncio.create_task(made.submit(n, 30)) for n in (1, 2, 3)]
        await asyncio.sleep(0)
        work.go.set()
        await first
        work.go.clear()
        await started(work, 2)
        tasks[1].cancel()
        work.go.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert done[0] == 2
        assert done[2] == 6
        assert isinstance(done[1], asyncio.CancelledError)


async def test_closing_ends_what_waits_and_refuses_what_comes() -> None:
    work = Work()
    made = MicroBatcher(work, max_batch=2, wait_s=30)
    first = await hold(made, work)
    waiting = asyncio.create_task(made.submit(1, 30))
    await asyncio.sleep(0)
    closing = asyncio.create_task(made.close())
    await asyncio.sleep(0)
    work.go.set()
    await closing
    assert await reasons([first, waiting]) == [0, "unreachable"]
    with pytest.raises(ScorerUnavailable, match="unreachable"):
        await made.submit(2, 30)
    await made.close()


async def test_work_that_never_ends_is_seen() -> None:
    work = Work()
    async with batcher(work) as made:
        assert made.stuck_s == 0
        await hold(made, work)
        await asyncio.sleep(0.05)
        assert made.stuck_s >= 0.05


async def test_every_result_reaches_the_one_who_asked_for_it() -> None:
    work = Work()
    async with batcher(work, max_batch=7, max_waiting=10_000) as made:

        async def ask(n: int) -> None:
            await asyncio.sleep((n * 7919 % 100) / 10_000)
            assert await made.submit(n, 30) == 2 * n

        await asyncio.gather(*(ask(n) for n in range(1000)))
        assert made.stats.items == 1000
