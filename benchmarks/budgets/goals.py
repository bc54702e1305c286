"""Goals of budgets, each measured on a ledger in a process of its own, on a disk.

Gateways are the real ``LeaseBook`` over the real ``LedgerCalls``; requests are ours. Every function
starts its own ledger, takes seconds, and gives what it measured and whether the goal holds.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.budgets.files import TTL_S, load
from benchmarks.budgets.ledger_process import LedgerProcess, wall_us
from deployments.ledger_budgets import Budgets
from deployments.ledger_calls import LedgerCalls
from deployments.ledger_shards import BudgetsFollower, LedgerShards
from governance.budget.config import BudgetsConfig
from governance.budget.holds import LeaseHold
from governance.budget.leases import LeaseBook
from governance.budget.messages import MeterReport, MeterRow, RenewReply, RenewRequest
from governance.budget.tree import Tree
from governance.errors import BudgetExhausted, LedgerUnavailable
from governance.types import BudgetAsk, Operation, Usage

STATE_AGE_S = 2.0
"""A gateway's state of a budget is at most this old, in seconds."""
RENEW_S = 1
PROMPT = 20
CHUNK = 32
LOOK_S = 0.02
BY = "benchmark"

Found = tuple[str, bool, dict[str, Any]]
"""What was measured in words, whether the goal holds, and the figures."""


@dataclass
class Room:
    """One ledger process, and gateways."""

    process: LedgerProcess
    config: BudgetsConfig
    calls: LedgerCalls
    gateways: list[LeaseBook] = field(default_factory=list)

    def gateway(self, name: str) -> LeaseBook:
        """A gateway that follows the ledger's file."""
        tree = Tree(self.config)
        ledgers = LedgerShards(lambda _: self.calls, tree)
        follower = BudgetsFollower(ledgers, Budgets(self.config, 1), lambda new: _follow(book, new))

        async def renew(request: RenewRequest) -> RenewReply:
            reply = await self.calls.renew(request)
            follower.heard(0, reply.digest)
            return reply

        book = LeaseBook(
            name,
            renew,
            clock=wall_us,
            monotonic=time.monotonic,
            tree=tree,
            chunk_tokens=CHUNK,
            renew_s=RENEW_S,
        )
        self.gateways.append(book)
        return book

    async def spent(self, account: str) -> int:
        """Tokens that an account has spent, as the ledger has it."""
        (state,) = await self.calls.state(account)
        return state.spent.tokens


def _follow(book: LeaseBook, budgets: Budgets) -> None:
    book.tree = Tree(budgets.config)


def file(**accounts: dict[str, Any]) -> dict[str, Any]:
    """A budgets file with windows of a day."""
    return {
        "accounts": {name: {"window": "day", **account} for name, account in accounts.items()},
        "lease": {"ttl_s": TTL_S, "renew_s": RENEW_S},
        "chunk_tokens": CHUNK,
    }


@asynccontextmanager
async def room(data: dict[str, Any]) -> AsyncIterator[Room]:
    """A ledger that has a file, and whatever talks to it."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        config = load(data)
        process = LedgerProcess(Path(folder))
        process.start()
        found = Room(process, config, LedgerCalls(process.link, Budgets(config, wall_us()).dump()))
        try:
            await found.calls.ready()
            yield found
            await asyncio.gather(*(book.close() for book in found.gateways))
        finally:
            process.kill()


def ask(account: str, most: int) -> BudgetAsk:
    """A request with a short prompt."""
    return BudgetAsk("req", account, "tiny", "tiny", Operation.CHAT, 80, 1, most)


async def stream(book: LeaseBook, account: str, answer: int, token_s: float = 0.002) -> int:
    """One request to its end, or to the end of its account; gives the tokens of its answer."""
    hold = await book.reserve(ask(account, answer))
    done = 0
    try:
        await hold.started(PROMPT)
        for _ in range(answer):
            await asyncio.sleep(token_s)
            done += 1
            if hold.consumed(1, 0):
                await hold.extend()
        hold.settle(Usage(PROMPT, done), 0)
    except (BudgetExhausted, LedgerUnavailable):
        hold.settle(Usage(PROMPT, done), 0)
    return done


def _told(seq: int, account: str, tokens: int) -> MeterReport:
    """An engine's report of one request of a gateway that nobody here is."""
    row = MeterRow(
        "rsv_elsewhere_1", "req", "elsewhere", account, "tiny", "tiny", 0, 0, 0, 0, 0, 0, tokens,
        ended=False, delivered=False,
    )  # fmt: skip
    return MeterReport("r1", "tiny", "cpu", "e1", seq, 1, 0, 0, 0, 0, 1, False, (row,))


async def state_age(rounds: int = 8) -> Found:
    """How long after a charge is on disk a gateway, which did not make it, knows of it."""
    async with room(file(hr={"tokens": 10**9})) as found:
        book = found.gateway("gw-1")
        (await book.reserve(ask("hr", 16))).release()
        taken, oldest = [], 0.0
        for number in range(1, rounds + 1):
            await asyncio.sleep(number * 0.37 % 1)  # at another point of the second each time
            await found.calls.report(_told(number, "hr", number * 1000))
            charged = time.monotonic()
            while True:
                state = book.usage("hr")
                oldest = max(oldest, book.age_s())
                if state is not None and state.spent.tokens >= number * 1000:
                    break
                await asyncio.sleep(0.005)
            taken.append(round(time.monotonic() - charged, 3))
    worst = max(taken)
    shown = f"known after {worst:.2f} s at most, oldest state used {oldest:.2f} s, {rounds} charges"
    return shown, max(worst, oldest) <= STATE_AGE_S, {"known_after_s": taken, "oldest_s": oldest}


async def hard_limit(clients: int = 32, limit: int = 2_000) -> Found:
    """Many answers at once against limits, at two gateways; and one that is lowered meanwhile."""
    figures: dict[str, Any] = {}
    roomy = {"tokens": 50 * limit}
    async with room(
        file(
            hard={"tokens": limit},
            lowered=roomy,
            soft=roomy | {"mode": "soft"},
        )
    ) as found:
        books = [found.gateway(f"gw-{n}") for n in range(2)]
        for account in ("hard", "lowered", "soft"):
            answers = asyncio.gather(
                *(stream(books[n % 2], account, 200, 0.01) for n in range(clients)),
                return_exceptions=True,
            )
            committed = limit
            if account != "hard":
                await asyncio.sleep(0.6)
                state = await found.calls.set_override(
                    account, None, 100, wall_us() + 60_000_000, "benchmark", BY
                )
                committed = state.spent.tokens + state.leased.tokens
            outcomes = await answers
            await asyncio.sleep(RENEW_S + 0.5)
            done = [outcome for outcome in outcomes if isinstance(outcome, int)]
            figures[account] = {
                "spent": await found.spent(account),
                "committed": committed,
                "begun": len(done),
                "whole": sum(tokens == 200 for tokens in done),
                "strange": [
                    repr(outcome)
                    for outcome in outcomes
                    if not isinstance(outcome, (int, BudgetExhausted))
                ],
            }
    hard, lowered, soft = (figures[name] for name in ("hard", "lowered", "soft"))
    holds = (
        0 < hard["spent"] <= limit
        and lowered["whole"] == 0 < lowered["begun"]
        and lowered["spent"] <= lowered["committed"]
        and 0 < soft["begun"] == soft["whole"]
        and not any(each["strange"] for each in figures.values())
    )
    shown = (
        f"{hard['spent']} of {limit} tokens spent; lowered while {lowered['begun']} ran: all"
        f" stopped, {lowered['spent']} spent of {lowered['committed']} that were lent; soft:"
        f" {soft['whole']} of {soft['begun']} finished"
    )
    return shown, holds, figures


async def _take(book: LeaseBook, account: str, most: int) -> list[LeaseHold]:
    """Reserve answers of 100 tokens until there is no more."""
    holds: list[LeaseHold] = []
    for _ in range(most):
        try:
            holds.append(await book.reserve(ask(account, 100)))
        except BudgetExhausted:
            break
    return holds


async def borrowing() -> Found:
    """One department borrows what another does not use, and gives it back when that wants it."""
    data = file(
        hr={"tokens": 1_000, "cohort": "biz", "borrow": {"tokens": 600}},
        it={"tokens": 1_000, "cohort": "biz", "lend": {"tokens": 800}},
    )
    async with room(data | {"cohorts": {"biz": {"window": "day"}}}) as found:
        borrower, lender = found.gateway("gw-1"), found.gateway("gw-2")
        held = await _take(borrower, "hr", 100)
        await asyncio.sleep(RENEW_S + 0.2)
        (state,) = await found.calls.state("hr")
        borrowed = state.borrowed.tokens
        for hold in held:
            hold.release()  # nothing of it was spent: all that was borrowed can be had back
        began = time.monotonic()
        mine = await asyncio.gather(
            *(lender.reserve(ask("it", 100)) for _ in range(6)), return_exceptions=True
        )
        took = time.monotonic() - began
        got = sum(h.reserved_tokens for h in mine if isinstance(h, LeaseHold))
        for one in mine:
            if isinstance(one, LeaseHold):
                one.release()
    holds = 0 < borrowed <= 600 and got >= 600 and took <= TTL_S + RENEW_S
    shown = (
        f"{borrowed} of 600 tokens borrowed; the lender had {got} of its own back in {took:.2f} s"
    )
    return shown, holds, {"borrowed": borrowed, "got_back": got, "seconds": took}


async def other_file() -> Found:
    """A file is applied while requests run; a gateway works by it, and nothing is lost."""
    before = file(hr={"tokens": 300})
    async with room(before) as found:
        book = found.gateway("gw-1")
        await asyncio.gather(*(stream(book, "hr", 64) for _ in range(3)), return_exceptions=True)
        await asyncio.sleep(RENEW_S + 0.2)
        spent = await found.spent("hr")
        refused = len(await _take(book, "hr", 1)) == 0
        began = time.monotonic()
        digest = await found.calls.apply(
            file(hr={"tokens": 3_000}, new={"tokens": 500}), "benchmark", BY
        )
        holds: list[LeaseHold] = []
        while not holds and time.monotonic() - began < 10:
            holds = await _take(book, "hr", 1)
        admitted = time.monotonic() - began
        await _when(lambda: book.tree.config.digest == digest, 10)
        followed = time.monotonic() - began
        kept = await found.spent("hr") == spent
        found.process.kill()
        found.process.start()
        (state,) = await _until(lambda: found.calls.state("hr"))
        after_restart = state.limit_tokens == 3_000 and state.spent.tokens == spent
        for hold in holds:
            hold.release()
    good = refused and kept and after_restart and max(admitted, followed) <= STATE_AGE_S
    shown = (
        f"refused before; admitted {admitted:.2f} s and followed {followed:.2f} s after;"
        f" {spent} tokens spent before {'count on' if kept else 'are lost'}, also after a kill"
    )
    return shown, good, {"admitted_s": admitted, "followed_s": followed, "kept": after_restart}


async def _until(work: Callable[[], Coroutine[Any, Any, Any]], most_s: float = 60.0) -> Any:
    """What a call gives, once it gives anything."""
    until_s = time.monotonic() + most_s
    while True:
        try:
            return await work()
        except LedgerUnavailable:
            if time.monotonic() > until_s:
                raise
        await asyncio.sleep(0.1)


async def _when(condition: Callable[[], bool], most_s: float) -> None:
    """Wait until something holds, or so long."""
    for _ in range(round(most_s / LOOK_S)):
        if condition():
            return
        await asyncio.sleep(LOOK_S)


GOALS: dict[str, tuple[str, Callable[[], Coroutine[Any, Any, Found]]]] = {
    "age": (f"a gateway's state of a budget is at most {STATE_AGE_S:.0f} s old", state_age),
    "limit": (
        "32 answers at a hard limit: not beyond it, stopped at a chunk; a soft one finishes them",
        hard_limit,
    ),
    "borrowing": (
        "what is lent is borrowed within its limit, and back within one time to live",
        borrowing,
    ),
    "file": ("another file takes effect within 2 s, without a restart", other_file),
}


def measure(name: str) -> Found:
    """One goal."""
    return asyncio.run(GOALS[name][1]())
