"""A gateway's lease book: exact admission, restarts of the ledger, corrections, chunks."""

from __future__ import annotations

import asyncio

import pytest

from governance.budget import leases
from governance.budget.checks import MOST
from governance.budget.leases import LeaseBook
from governance.budget.messages import RenewReply, RenewRequest
from governance.errors import (
    BudgetExhausted,
    GatehouseError,
    InternalError,
    InvalidRequest,
    LedgerUnavailable,
    NoAccount,
    Overloaded,
)
from governance.types import Amount, Usage
from tests.budget_world import World, ask, config, report, row, run

PROMPT, ANSWER = 37, 96


async def answer(book: LeaseBook, start_s: float = 0.05, max_tokens: int = ANSWER) -> bool:
    """One request whose answer is as long as it may be; whether it was answered to the end."""
    try:
        hold = await book.reserve(ask(max_tokens=max_tokens, prompt_bytes=150))
    except BudgetExhausted:
        return False
    try:
        await asyncio.sleep(start_s)
        await hold.started(PROMPT)
        for _ in range(max_tokens):
            await asyncio.sleep(0.01)
            if hold.consumed(1, 0):
                await hold.extend()
    except BudgetExhausted:
        hold.settle(None, None)
        return False
    hold.settle(Usage(PROMPT, max_tokens), None)
    return True


@pytest.mark.parametrize("n", [1, 7, 50, 63, 64])
@pytest.mark.parametrize("max_tokens", [96, 700])
def test_a_budget_worth_n_answers_admits_n_of_64_at_once(n: int, max_tokens: int) -> None:
    async def main() -> tuple[int, Amount]:
        budget = n * (PROMPT + max_tokens)
        with World(config(hr={"tokens": budget})) as world:
            book = world.book()
            done = await asyncio.gather(*(answer(book, 0.05, max_tokens) for _ in range(64)))
            await book.close()
            (state,) = world.ledger.state("hr")
            assert state.leased == Amount()
            return sum(done), state.spent

    admitted, spent = run(main)
    assert admitted == n
    assert spent.tokens == n * (PROMPT + max_tokens)


@pytest.mark.parametrize("n", [5, 40])
def test_one_after_the_other_admits_exactly_n(n: int) -> None:
    async def main() -> int:
        with World(config(hr={"tokens": n * (PROMPT + ANSWER)})) as world:
            book = world.book()
            done = [await answer(book) for _ in range(n + 5)]
            await book.close()
            return sum(done)

    assert run(main) == n


@pytest.mark.parametrize("n", [6, 40])
def test_three_gateways_never_admit_more(n: int) -> None:
    async def main() -> int:
        with World(config(hr={"tokens": n * (PROMPT + ANSWER)})) as world:
            books = [world.book(f"g{i}") for i in range(3)]
            done = await asyncio.gather(*(answer(books[i % 3]) for i in range(64)))
            for book in books:
                await book.close()
            return sum(done)

    admitted = run(main)
    assert n - 3 <= admitted <= n


def test_many_departments_each_have_their_own_budget() -> None:
    async def main() -> list[int]:
        one = {"tokens": 5 * (PROMPT + ANSWER)}
        with World(config(hr=one, it=one)) as world:
            book = world.book()

            async def client(account: str) -> bool:
                try:
                    hold = await book.reserve(ask(account, ANSWER, 150))
                except BudgetExhausted:
                    return False
                await hold.started(PROMPT)
                hold.settle(Usage(PROMPT, ANSWER), 5)
                return True

            counts = []
            for account in ("hr", "it"):
                counts.append(sum([await client(account) for _ in range(9)]))
            await book.close()
            return counts

    assert run(main) == [5, 5]


def test_a_refusal_says_account_rest_and_reset() -> None:
    async def main() -> BudgetExhausted:
        with World(config(hr={"tokens": 70, "gpu_seconds": 500})) as world:
            book = world.book()
            with pytest.raises(BudgetExhausted) as caught:
                await book.reserve(ask(max_tokens=100))
            assert world.monotonic() < 1000.1
            await book.close()
            return caught.value

    error = run(main)
    assert error.message == (
        "The budget of account hr cannot cover this request. Left until it resets at"
        " 2025-10-10T00:00:00Z: 70 tokens and 500000 ms of GPU time; used in this day: 0 of 70"
        " tokens."
    )
    assert error.retry_after_s is not None
    assert 54_000 < error.retry_after_s < 86_400


def test_a_department_without_account_is_refused_without_asking_each_time() -> None:
    async def main() -> int:
        with World(config(hr={"tokens": 70})) as world:
            book = world.book()
            for _ in range(20):
                with pytest.raises(NoAccount):
                    await book.reserve(ask("ghost"))
            await book.close()
            return world.renewals

    assert run(main) <= 3


def test_a_spent_budget_is_refused_without_asking_each_time() -> None:
    async def main() -> int:
        with World(config(hr={"tokens": 200})) as world:
            book = world.book()
            hold = await book.reserve(ask(max_tokens=20))
            hold.settle(Usage(150, 50), 0)
            await asyncio.sleep(2.5)
            before = world.renewals
            for _ in range(20):
                with pytest.raises(BudgetExhausted):
                    await book.reserve(ask(max_tokens=20))
            renewals = world.renewals - before
            await book.close()
            return renewals

    assert run(main) == 0


def test_requests_are_served_while_the_ledger_restarts() -> None:
    async def main() -> None:
        with World(config(hr={"tokens": 1_000_000})) as world:
            book = world.book()
            (await book.reserve(ask(max_tokens=20))).settle(Usage(10, 20), 5)
            for _ in range(20):
                await asyncio.sleep(0.2)
                (await book.reserve(ask(max_tokens=20))).settle(Usage(10, 20), 5)
            world.kill()
            for _ in range(4):
                await asyncio.sleep(0.3)
                (await book.reserve(ask(max_tokens=20))).settle(Usage(10, 20), 5)
            assert book.stats.unsent >= 3
            world.start()
            await asyncio.sleep(3)
            (await book.reserve(ask(max_tokens=20))).settle(Usage(10, 20), 5)
            await book.close()
            (state,) = world.ledger.state("hr")
            assert state.spent.tokens == 26 * 30
            assert state.leased == Amount()

    run(main)


def test_without_lease_and_ledger_a_request_is_refused_within_three_seconds() -> None:
    async def main() -> float:
        with World(config(hr={"tokens": 1_000_000})) as world:
            book = world.book()
            (await book.reserve(ask(max_tokens=20))).settle(Usage(10, 20), 5)
            world.kill()
            await asyncio.sleep(10)
            began = world.monotonic()
            with pytest.raises(LedgerUnavailable):
                await book.reserve(ask(max_tokens=20))
            took = world.monotonic() - began
            await book.close()
            return took

    assert run(main) <= 3.01


def test_a_lease_counts_from_when_its_renewal_was_first_sent() -> None:
    async def main() -> float:
        with World(config(hr={"tokens": 1_000_000})) as world:

            async def slow(request: RenewRequest) -> RenewReply:
                reply = await world.renew(request)
                await asyncio.sleep(1.5)
                return reply

            book = world.book(renew=slow)
            began = world.monotonic()
            await book.reserve(ask(max_tokens=20))
            line = book._lines["hr"]
            valid = line.valid_until_s - began
            await book.close()
            return valid

    assert 9.4 < run(main) <= 9.5


def test_a_lost_answer_is_asked_for_again_unchanged() -> None:
    async def main() -> None:
        with World(config(hr={"tokens": 1_000})) as world:
            seen: list[RenewRequest] = []

            async def lossy(request: RenewRequest) -> RenewReply:
                seen.append(request)
                reply = await world.renew(request)
                if len(seen) % 2:
                    raise ConnectionError
                return reply

            book = world.book(renew=lossy)
            for _ in range(5):
                (await book.reserve(ask(max_tokens=20))).settle(Usage(10, 20), 5)
                await asyncio.sleep(1.3)
            await book.close()
            assert all(seen[i] == seen[i + 1] for i in range(0, len(seen) - 1, 2))
            (state,) = world.ledger.state("hr")
            assert state.spent.tokens == 150

    run(main)


def test_a_request_cancelled_while_it_waits_holds_nothing() -> None:
    async def main() -> None:
        with World(config(hr={"tokens": 1_000})) as world:
            book = world.book()
            tasks = [asyncio.create_task(book.reserve(ask(max_tokens=20))) for _ in range(5)]
            for delay in (0, 0, 0.0005, 0.0005, 0.0005):
                await asyncio.sleep(delay)
                tasks.pop().cancel()
            await asyncio.sleep(0.1)
            assert (book.stats.open, book.stats.waiting) == (Amount(), 0)
            assert book._lines["hr"].unstarted == 0
            await book.close()

    run(main)


def test_an_answer_of_many_chunks_extends_in_time() -> None:
    async def main() -> None:
        with World(config(hr={"tokens": 100_000})) as world:
            book = world.book()
            hold = await book.reserve(ask(max_tokens=1000))
            first = hold.reservation.reserved.tokens
            await hold.started(PROMPT)
            assert hold.reservation.reserved.tokens == PROMPT + 128 < first
            extensions = 0
            for done in range(1, 1001):
                assert hold.reservation.reserved.tokens >= PROMPT + done
                if hold.consumed(1, 0):
                    await hold.extend()
                    extensions += 1
            assert extensions == 7
            assert hold.charged.tokens == PROMPT + 1000
            hold.settle(None, None)
            hold.settle(Usage(1, 1), 1)
            assert hold.charged.tokens == PROMPT + 1000
            await hold.extend()
            await hold.started(5)
            await book.close()

    run(main)


def test_a_denied_chunk_stops_the_answer_only_where_its_reservation_ends() -> None:
    async def main() -> int:
        with World(config(hr={"tokens": 100_000})) as world:
            book = world.book()
            hold = await book.reserve(ask(max_tokens=1000))
            await hold.started(PROMPT)
            world.ledger.set_override("hr", None, 10, world.clock() + 10**9, "k", "stop")
            await asyncio.sleep(1.1)
            done = 0
            while done < 1000:
                await asyncio.sleep(0.001)
                done += 1
                try:
                    if hold.consumed(1, 0):
                        await hold.extend()
                except BudgetExhausted:
                    break
            hold.settle(None, None)
            await book.close()
            return done

    assert run(main) == 128


def test_device_time_is_extended_by_what_was_metered() -> None:
    async def main() -> None:
        with World(config(hr={"gpu_seconds": 100_000})) as world:
            for number in range(1, 40):
                made = row(number, prompt=10, answer=100, gpu_us=1_000_000, ended=True)
                world.ledger.report(report(made, seq=number))
            book = world.book()
            book.start()
            await asyncio.sleep(0.1)
            hold = await book.reserve(ask(max_tokens=100))
            await hold.started(10)
            before = hold.reservation.reserved.gpu_us
            raw = 0
            for _ in range(100):
                raw += 100_000  # Thirteen times the price that was learned.
                if hold.consumed(1, raw):
                    await hold.extend()
                assert hold.reservation.reserved.gpu_us >= raw
            hold.settle(Usage(10, 100), raw)
            assert before < raw == hold.charged.gpu_us
            await book.close()

    run(main)


def test_a_prompt_longer_than_the_account_can_cover_is_refused_at_the_start() -> None:
    async def main() -> None:
        with World(config(hr={"tokens": 500})) as world:
            book = world.book()
            hold = await book.reserve(ask(max_tokens=50, prompt_bytes=40))
            with pytest.raises(BudgetExhausted):
                await hold.started(5000)
            hold.settle(None, None)
            await book.close()
            assert world.ledger.state("hr")[0].leased == Amount()

    run(main)


def test_usage_is_a_second_old_at_most() -> None:
    async def main() -> None:
        with World(config(hr={"tokens": 1_000})) as world:
            book = world.book()
            assert book.usage("hr") is None
            await asyncio.sleep(0.1)
            (await book.reserve(ask(max_tokens=20))).settle(Usage(10, 20), 5)
            await asyncio.sleep(1.2)
            state = book.usage("hr")
            assert state is not None
            assert (state.spent.tokens, state.limit_tokens, state.limit_us) == (30, 1000, None)
            assert book.usage("ghost") is None
            await book.close()

    run(main)


def test_lines_that_nobody_uses_are_given_up() -> None:
    async def main() -> None:
        with World(config(hr={"tokens": 1_000})) as world:
            book = world.book()
            (await book.reserve(ask(max_tokens=20))).settle(Usage(10, 20), 5)
            await asyncio.sleep(70)
            assert book._lines == {}
            assert world.ledger.state("hr")[0].leased == Amount()
            await book.close()

    run(main)


def test_after_close_nothing_is_reserved() -> None:
    async def main() -> None:
        with World(config(hr={"tokens": 1_000})) as world:
            book = world.book()
            await book.reserve(ask(max_tokens=20))
            await book.close()
            await book.close()
            with pytest.raises(LedgerUnavailable):
                await book.reserve(ask(max_tokens=20))

    run(main)


# Renewals that the ledger rejects


def test_impossible_requests_fail_alone() -> None:
    async def main() -> None:
        limits = {"gpu_seconds": 3600}
        with World(config(hr=limits, it=limits)) as world:
            book = world.book()
            (await book.reserve(ask("it"))).settle(Usage(10, 20), 5)
            huge = ask("hr", max_tokens=10_000_000, choices=128, prompt_bytes=1000)
            attempts = [asyncio.create_task(book.reserve(huge)) for _ in range(20)]
            for outcome in await asyncio.gather(*attempts, return_exceptions=True):
                assert isinstance(outcome, BudgetExhausted)
            for _ in range(3):
                (await book.reserve(ask("it"))).settle(Usage(10, 20), 5)
                await asyncio.sleep(5)
            assert book.stats.rejections == book.stats.unsent == 0
            await book.close()
            assert world.ledger.state("it")[0].spent.tokens == 4 * 30

    run(main)


def test_no_ask_is_more_than_the_ledger_takes() -> None:
    async def main() -> None:
        with World(config(hr={"gpu_seconds": 10**10})) as world:
            book = world.book()
            await asyncio.gather(book.reserve(ask()), return_exceptions=True)
            line = book._lines["hr"]
            line.open_us = line._last_us = 1 << 60
            (found,) = book.asks(7)
            assert found.open.gpu_us == found.cushion.gpu_us == MOST
            line.open_us = 0
            await book.close()

    run(main)


@pytest.mark.parametrize("department", ["", "R&D", "a b", "hr\n", "x" * 300, "-x"])
def test_a_department_that_cannot_be_an_account_is_not_asked_for(department: str) -> None:
    async def main() -> None:
        with World(config(hr={"tokens": 1000})) as world:
            book = world.book()
            assert book.usage(department) is None
            with pytest.raises(NoAccount):
                await book.reserve(ask(department))
            await book.reserve(ask("hr"))
            assert book.stats.rejections == 0
            await book.close()

    run(main)


@pytest.mark.parametrize("bad", [{1}, {64}, {7, 8, 50}])
@pytest.mark.parametrize("error", [InvalidRequest, InternalError])
def test_a_settlement_that_is_rejected_holds_no_other_up(
    bad: set[int], error: type[GatehouseError], caplog: pytest.LogCaptureFixture
) -> None:
    ids = {f"rsv_g1_{number}" for number in bad}

    async def main() -> None:
        with World(config(hr={"tokens": 1_000_000}, it={"tokens": 1_000})) as world:

            async def strict(request: RenewRequest) -> RenewReply:
                if ids & {said.reservation_id for said in request.settlements}:
                    raise error
                return await world.renew(request)

            book = world.book(renew=strict)
            holds = [await book.reserve(ask(max_tokens=20)) for _ in range(64)]
            for hold in holds:
                hold.settle(Usage(10, 20), 5)
            began = world.monotonic()
            (await book.reserve(ask("it", max_tokens=20))).settle(Usage(10, 20), 5)
            assert world.monotonic() - began < 1.0
            await asyncio.sleep(30)
            assert book.stats.given_up == len(bad)
            assert book.stats.unsent == 0
            line = book._lines["hr"]
            assert (line.open_tokens, line.pending_tokens) == (0, 0)
            await book.close()
            assert world.ledger.state("hr")[0].spent.tokens == (64 - len(bad)) * 30
            assert world.ledger.state("it")[0].spent.tokens == 30

    run(main)
    for name in ids:
        assert name in caplog.text


def test_a_rejection_that_passes_loses_no_settlement() -> None:
    async def main() -> None:
        with World(config(hr={"tokens": 1_000_000})) as world:
            rejections = 2

            async def shaky(request: RenewRequest) -> RenewReply:
                nonlocal rejections
                if request.settlements and rejections:
                    rejections -= 1
                    raise InternalError
                return await world.renew(request)

            book = world.book(renew=shaky)
            (await book.reserve(ask(max_tokens=20))).settle(Usage(10, 20), 5)
            await asyncio.sleep(10)
            assert (book.stats.given_up, book.stats.unsent) == (0, 0)
            await book.close()
            assert world.ledger.state("hr")[0].spent.tokens == 30

    run(main)


def test_who_waits_for_a_renewal_that_is_always_rejected_is_refused() -> None:
    async def main() -> None:
        with World(config(hr={"tokens": 1_000})) as world:

            async def never(_: RenewRequest) -> RenewReply:
                await asyncio.sleep(0.001)
                raise InternalError

            book = world.book(renew=never)
            with pytest.raises(LedgerUnavailable):
                await book.reserve(ask())
            assert world.monotonic() < 1000.5
            await book.close()

    run(main)


def test_after_a_lost_answer_and_a_rejection_no_old_lease_is_used() -> None:
    async def main() -> None:
        with World(config(hr={"tokens": 10_000})) as world:
            mood = ""

            async def moody(request: RenewRequest) -> RenewReply:
                nonlocal mood
                reply = await world.renew(request)
                if mood == "lose":
                    mood = "reject"
                    raise ConnectionError
                if mood == "reject":
                    mood = "down"
                    raise InternalError
                if mood == "down":
                    raise ConnectionError
                return reply

            book = world.book(renew=moody)
            (await book.reserve(ask(max_tokens=50))).settle(Usage(10, 50), 5)
            await asyncio.sleep(2)
            assert book.stats.leases == 1
            mood = "lose"
            await asyncio.sleep(2)
            assert mood == "down"
            assert book.stats.leases == 0
            mood = ""
            await asyncio.sleep(2)
            assert book.stats.leases == 1
            await book.close()

    run(main)


# A crowd


async def crowd(book: LeaseBook, count: int, max_tokens: int) -> list[asyncio.Task[object]]:
    made = [asyncio.create_task(book.reserve(ask(max_tokens=max_tokens))) for _ in range(count)]
    await asyncio.sleep(0)
    return list(made)


def test_what_many_give_back_in_one_turn_is_offered_once() -> None:
    async def main() -> None:
        with World(config(hr={"tokens": 3_000})) as world:
            book = world.book()
            holds = [await book.reserve(ask(max_tokens=20)) for _ in range(3)]
            tasks = await crowd(book, 200, 2_900)
            await asyncio.sleep(0.02)
            line = book._lines["hr"]
            waiting = len(line.waiters)
            assert waiting > 100
            tried = 0
            for waiter in line.waiters:
                attempt = waiter.attempt

                def counted(level: object, attempt: object = attempt) -> bool:
                    nonlocal tried
                    tried += 1
                    return attempt(level)  # type: ignore[operator]

                waiter.attempt = counted
            for _ in range(500):
                book.freed(line)
            assert tried == 0
            await asyncio.sleep(0)
            assert 0 < tried <= 3, "new requests wait behind the first that does not fit"
            for hold in holds:
                hold.settle(Usage(10, 20), 5)
            await asyncio.gather(*tasks, return_exceptions=True)
            await book.close()

    run(main)


def test_a_crowd_at_one_account_is_bounded_and_leaves_others_alone() -> None:
    async def main() -> None:
        with World(config(hr={"tokens": 1_000_000}, it={"tokens": 1_000})) as world:
            book = world.book()
            tasks = await crowd(book, leases.MAX_WAITERS + 50, 20)
            assert len(book._lines["hr"].waiters) == leases.MAX_WAITERS
            await book.reserve(ask("it", max_tokens=20))
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            refused = [found for found in outcomes if isinstance(found, Exception)]
            assert len(refused) == 50
            assert all(isinstance(error, Overloaded) for error in refused)
            assert {error.retry_after_s for error in refused} == {1}
            assert len(book._lines["hr"].waiters) == 0
            await book.close()

    run(main)


def test_one_more_than_may_wait_hears_that_the_budget_is_too_small() -> None:
    async def main() -> None:
        with World(config(hr={"tokens": 3_000})) as world:
            book = world.book()
            await book.reserve(ask(max_tokens=20))
            other = world.book("g2")
            hold = await other.reserve(ask(max_tokens=2_000))
            tasks = await crowd(book, leases.MAX_WAITERS, 2_000)
            await asyncio.sleep(0)
            assert len(book._lines["hr"].waiters) == leases.MAX_WAITERS
            with pytest.raises(BudgetExhausted):
                await book.reserve(ask(max_tokens=100_000))
            hold.settle(None, None)
            await asyncio.gather(*tasks, return_exceptions=True)
            await book.close()
            await other.close()

    run(main)


def test_a_running_answer_is_served_past_new_requests_that_do_not_fit() -> None:
    async def main() -> None:
        with World(config(hr={"tokens": 5_000})) as world:
            book = world.book()
            running = await book.reserve(ask(max_tokens=300))
            await running.started(PROMPT)
            other = await book.reserve(ask(max_tokens=100))
            line = book._lines["hr"]
            tasks = await crowd(book, 3, 100_000)
            line.hold_tokens = line.open_tokens
            running.consumed(running.reservation.reserved.tokens, 0)
            extending = asyncio.create_task(running.extend())
            await asyncio.sleep(0)
            assert not extending.done()
            other.settle(Usage(5, 5), 0)
            line.confirm(Amount(0, 10))
            line.hold_tokens += 1_000
            book.freed(line)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert extending.done()
            await asyncio.gather(*tasks, extending, return_exceptions=True)
            await book.close()

    run(main)
