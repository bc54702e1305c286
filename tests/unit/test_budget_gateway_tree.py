"""Gateways over the tree of accounts: exact admission, soft limits, what is reclaimed in time."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from governance.budget.config import BudgetsConfig
from governance.budget.leases import LeaseBook
from governance.budget.tree import Tree
from governance.errors import BudgetExhausted
from governance.types import Principal, PrincipalKind, Usage
from tests.budget_world import World, ask, run

PROMPT, ANSWER = 37, 96
WHOLE = PROMPT + ANSWER


def budgets(accounts: dict[str, dict[str, Any]], **more: Any) -> BudgetsConfig:
    named = {name: {"window": "day", **limits} for name, limits in accounts.items()}
    return BudgetsConfig.model_validate({"accounts": named, **more})


async def answer(book: LeaseBook, account: str, tokens: int = ANSWER) -> bool:
    """One request whose answer is as long as it may be; whether it was answered to the end."""
    try:
        hold = await book.reserve(ask(account, max_tokens=tokens, prompt_bytes=150))
    except BudgetExhausted:
        return False
    try:
        await hold.started(PROMPT)
        for _ in range(tokens):
            await asyncio.sleep(0.01)
            if hold.consumed(1, 0):
                await hold.extend()
    except BudgetExhausted:
        hold.settle(None, None)
        return False
    hold.settle(Usage(PROMPT, tokens), None)
    return True


@pytest.mark.parametrize("n", [3, 20])
def test_users_of_many_gateways_share_what_is_above_them(n: int) -> None:
    file = budgets({"hr": {"tokens": n * WHOLE, "per_user": {"tokens": 5 * WHOLE}}})

    async def main() -> tuple[int, int]:
        with World(file) as world:
            books = [world.book(f"g{i}") for i in range(3)]
            calls = (answer(books[i % 3], f"hr~u{i % 12}") for i in range(48))
            done = await asyncio.gather(*calls)
            for book in books:
                await book.close()
            return sum(done), world.ledger.state("hr")[0].spent.tokens

    admitted, spent = run(main)
    assert n - 3 <= admitted <= n
    assert spent <= n * WHOLE


def test_a_user_stops_at_the_own_cap_and_others_go_on() -> None:
    file = budgets({"hr": {"tokens": 10**6, "per_user": {"tokens": 2 * WHOLE}}})

    async def main() -> list[int]:
        with World(file) as world:
            book = world.book()
            greedy = [await answer(book, "hr~u1") for _ in range(5)]
            other = [await answer(book, "hr~u2") for _ in range(2)]
            await book.close()
            return [sum(greedy), sum(other)]

    assert run(main) == [2, 2]


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_at_a_soft_limit_what_runs_is_finished(mode: str) -> None:
    # Room for each prompt and the first chunks, not for the answers.
    file = budgets({"hr": {"tokens": 3000, "mode": mode}})

    async def main() -> tuple[int, int, bool]:
        with World(file) as world:
            book = world.book()
            done = await asyncio.gather(*(answer(book, "hr", 700) for _ in range(4)))
            late = await answer(book, "hr", 700)
            await book.close()
            return sum(done), world.ledger.state("hr")[0].spent.tokens, late

    done, spent, late = run(main)
    assert not late
    if mode == "hard":
        assert spent <= 3000
    else:
        assert spent == done * (PROMPT + 700)


def test_a_running_answer_goes_on_past_a_limit_that_became_lower() -> None:
    async def main(mode: str) -> bool:
        with World(budgets({"hr": {"tokens": 10**6, "mode": mode}})) as world:
            book = world.book()
            running = asyncio.create_task(answer(book, "hr", 1500))
            await asyncio.sleep(1.5)
            world.ledger.apply(budgets({"hr": {"tokens": 500, "mode": mode}}))
            done = await running
            refused = not await answer(book, "hr", 1500)
            await book.close()
            assert refused
            return done

    assert run(lambda: main("soft"))
    assert not run(lambda: main("hard"))


def test_a_lender_has_its_own_back_before_it_is_refused() -> None:
    file = budgets(
        {
            "hr": {"tokens": 10 * WHOLE, "cohort": "x", "lend": {"tokens": 10 * WHOLE}},
            "it": {"tokens": WHOLE, "cohort": "x", "borrow": {"tokens": 10 * WHOLE}},
        },
        cohorts={"x": {"window": "day"}},
    )

    async def main() -> tuple[int, int]:
        with World(file) as world:
            borrower, lender = world.book("g1"), world.book("g2")
            # Borrows for one answer after the other, so that its cushion grows.
            first = [await answer(borrower, "it") for _ in range(4)]
            held = world.ledger.state("it")[0].leased.tokens
            assert held > 0
            second = await asyncio.gather(*(answer(lender, "hr") for _ in range(7)))
            await borrower.close()
            await lender.close()
            return sum(first), sum(second)

    # 11 answers in all; what the borrower has spent is gone, what it held is not.
    assert run(main) == (4, 7)


def test_a_principal_is_charged_by_the_file_that_holds() -> None:
    async def main() -> list[str]:
        first = budgets({"hr": {"tokens": 1000}})
        part = {"bot": {"window": "day", "tokens": 9, "match": {"roles": ["bot"]}}}
        second = budgets({"hr": {"tokens": 1000, "parts": part}})
        caller = Principal(PrincipalKind.USER, "s", "idp", "hr", frozenset({"bot"}), "ab" * 32)
        with World(first) as world:
            book = world.book()
            found = [book.charge(caller).account]
            await book.reserve(ask("hr", 10))
            world.ledger.apply(second)
            digest = book.digest
            await asyncio.sleep(2)
            assert book.digest == second.digest != digest
            book.tree = Tree(second)
            found.append(book.charge(caller).account)
            await book.close()
            return found

    assert run(main) == ["hr", "hr/bot"]


def test_service_of_the_department_is_told_to_all_gateways() -> None:
    file = budgets({"hr": {"tokens": 10**6, "gpu_seconds": 100, "per_user": {"tokens": 10**5}}})

    async def main() -> tuple[int, int]:
        caller = Principal(PrincipalKind.USER, "s", "idp", "hr", frozenset(), "u2")
        with World(file) as world:
            first, second = world.book("g1"), world.book("g2")
            hold = await first.reserve(ask("hr~u1", 10))
            hold.settle(Usage(10, 10), 5_000)
            before = second.charge(replace(caller)).served_us
            await second.reserve(ask("hr~u2", 10))
            await asyncio.sleep(2.5)
            after = second.charge(caller).served_us
            await first.close()
            await second.close()
            return before, after

    assert run(main) == (0, 5_000)
