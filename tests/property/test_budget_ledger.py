"""Gateways, engines and clients against one ledger, and everything that can go wrong between them.

Each seed is one schedule of 25 seconds on a loop with time of its own: renewals and reports are
lost on the way there or back, delayed and repeated; gateways die, the ledger dies between any two
messages, and between memory and disk; the wall clock jumps, and windows end.

What must hold, in every schedule:

- after every message, ``committed`` is within the limit, but for what answers took beyond what
  their gateways had reserved (late figures, engines that work on for a moment);
- once everything is reported, what was spent is exactly the sum of true charges;
- what leases held returns;
- in no window more is spent than the limit and those overruns;
- ``open_spent`` of a lease is what its open reservations were charged;
- once all is quiet, no more is set aside than the gateways that live know they hold.
"""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from governance.budget.config import BudgetsConfig
from governance.budget.holds import LeaseHold
from governance.budget.leases import LeaseBook
from governance.budget.messages import MeterReport, RenewReply, RenewRequest
from governance.budget.state import ZERO, largest, least, positive
from governance.budget.store import LedgerStore
from governance.budget.tree import Tree
from governance.errors import BudgetExhausted, LedgerUnavailable
from governance.types import Amount, Usage
from tests.budget_world import World, ask, report, row, run

WEIGHTS = {"cpu": 1500, "L4": 250}
"""In thousandths. A model is served by the first kind, and in some schedules by both."""
LENGTH_S = 25.0
GATEWAYS = 3
LONGEST_PROMPT = 100


@dataclass(eq=False)
class Job:
    """One request at an engine: the truth."""

    hold: LeaseHold
    account: str
    gateway_id: str
    prompt: int
    answer: int
    token_us: int
    device: str = "cpu"
    done: int = 0
    ended: bool = False
    delivered: bool = False
    reserved: Amount = ZERO
    settled: Amount | None = None

    @property
    def raw_us(self) -> int:
        return self.prompt * 100 + self.done * self.token_us

    @property
    def true(self) -> Amount:
        return Amount(self.raw_us * WEIGHTS[self.device] // 1000, self.prompt + self.done)

    @property
    def overrun(self) -> Amount:
        """What it took beyond what its gateway had reserved, or has settled it for."""
        held, charged = self.reserved, self.true
        if self.settled is not None:
            # Charged by the gateway's weight until the engine has reported.
            charged = largest(charged, self.settled)
            held = least(held, self.settled)
            # What it said is charged at the weight of the device, and the rest comes later.
            said_us = self.hold._raw_us * WEIGHTS[self.device] // 1000
            held = least(held, Amount(said_us, held.tokens))
        return positive(charged - held)

    def row(self) -> Any:
        made = row(
            int(self.hold.id.rsplit("_", 1)[1]),
            gateway_id=self.gateway_id,
            account=self.account,
            prompt=self.prompt,
            answer=self.done,
            gpu_us=self.raw_us,
            ended=self.ended,
            delivered=self.delivered,
        )
        return replace(made, prefill_us=self.prompt * 100, decode_us=self.done * self.token_us)


@dataclass
class Trouble:
    """How much goes wrong."""

    lose: float = 0.0
    gateways_die: bool = False
    ledger_dies: bool = False
    clock_jumps: bool = False
    clients_leave: bool = False
    lag: bool = False
    """Figures reach the gateway late."""
    kinds: bool = False
    """Devices of two kinds serve; what the gateway is told is the first to report."""
    cut_off: bool = False
    """A gateway does not reach the ledger for longer than its leases live; answers are slow."""


@dataclass
class Schedule:
    """One run."""

    seed: int
    trouble: Trouble
    tokens: int = 12_000
    gpu_seconds: int = 60
    jobs: list[Job] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    refused: int = 0

    def __post_init__(self) -> None:
        self.rng = Random(self.seed)
        limits = {"window": "hour", "tokens": self.tokens, "gpu_seconds": self.gpu_seconds}
        self.world = World(
            BudgetsConfig.model_validate(
                {
                    "accounts": {"hr": limits, "it": {**limits, "tokens": self.tokens // 3}},
                    "accelerators": {name: milli / 1000 for name, milli in WEIGHTS.items()},
                }
            )
        )
        self.books: dict[str, LeaseBook] = {}
        self.living: dict[str, list[asyncio.Task[None]]] = {}
        self.unreported: list[Job] = []
        self.reports = 0
        self.born = 0
        self.cut: set[str] = set()
        """Gateways that do not reach the ledger."""
        self.were_cut: set[str] = set()

    # The parts

    def gateway(self) -> None:
        """Start a gateway."""
        self.born += 1
        name = f"g{self.born}"
        self.books[name] = LeaseBook(
            name,
            self.renew,
            clock=self.world.clock,
            monotonic=self.world.monotonic,
            tree=Tree(self.world.budgets),
            chunk_tokens=32,
        )
        self.books[name].start()
        self.living[name] = []

    async def renew(self, request: RenewRequest) -> RenewReply:
        """A renewal on its way: lost there, lost back, late, or taken twice."""
        rng, world = self.rng, self.world
        await asyncio.sleep(rng.random() * 0.02)
        if world.down or rng.random() < self.trouble.lose or request.gateway_id in self.cut:
            raise ConnectionError
        reply = world.ledger.renew(request)
        self.check()
        if rng.random() < self.trouble.lose:
            self.tasks.append(asyncio.create_task(self.again(request)))
        await asyncio.sleep(rng.random() * 0.02)
        if rng.random() < self.trouble.lose:
            raise ConnectionError
        return reply

    async def again(self, request: RenewRequest) -> None:
        """A copy of a renewal arrives later."""
        await asyncio.sleep(self.rng.random() * 3)
        if not self.world.down:
            self.world.ledger.renew(request)
            self.check()

    async def client(self, gateway_id: str) -> None:
        """One request, as the gateway handles it."""
        rng, book = self.rng, self.books[gateway_id]
        account = rng.choice(["hr", "hr", "it"])
        most = rng.choice([16, 64, 400])
        try:
            hold = await book.reserve(ask(account, most, rng.choice([100, 1000])))
        except (BudgetExhausted, LedgerUnavailable):
            self.refused += 1
            return
        answer = rng.randint(1, most)
        job = Job(
            hold,
            account,
            gateway_id,
            rng.randint(5, LONGEST_PROMPT),
            answer,
            rng.randint(100_000, 400_000) if self.trouble.cut_off else rng.randint(500, 20_000),
            rng.choice(sorted(WEIGHTS)) if self.trouble.kinds else "cpu",
        )
        job.reserved = hold.reservation.reserved
        self.jobs.append(job)
        self.unreported.append(job)
        leaves = rng.random() < 0.3 if self.trouble.clients_leave else False
        patience = rng.randint(0, answer) if leaves else answer + 1
        try:
            await asyncio.sleep(rng.random() * 0.1)
            await hold.started(job.prompt)
            job.reserved = hold.reservation.reserved
            while job.done < answer and job.done < patience:
                await asyncio.sleep(job.token_us / 1e6)
                job.done += 1
                late = rng.randint(0, 3) if self.trouble.lag else 0
                seen_us = max(job.prompt * 100, job.raw_us - late * job.token_us)
                if hold.consumed(1, seen_us):
                    await hold.extend()
                job.reserved = hold.reservation.reserved
        except (BudgetExhausted, LedgerUnavailable):
            leaves = True
        if leaves or job.done < answer:
            hold.settle(None, None)
            if self.trouble.lag:
                job.done = min(job.done + rng.randint(0, 2), answer)
        else:
            job.delivered = True
            gpu_us = None if self.trouble.lag and rng.random() < 0.2 else job.raw_us
            hold.settle(Usage(job.prompt, job.done), gpu_us)
        job.settled = hold.charged
        job.ended = True

    async def engine(self) -> None:
        """Report what is not through twice a second."""
        while True:
            await asyncio.sleep(0.5)
            self.send()

    def send(self, *, surely: bool = False) -> bool:
        """One report; whether the engine knows that it arrived."""
        self.reports += 1
        done = [self.send_of(device, surely) for device in WEIGHTS]
        return all(done)

    def send_of(self, device: str, surely: bool) -> bool:
        """Report of the replica with one kind of device."""
        rng = self.rng
        jobs = [job for job in self.unreported if job.device == device]
        if device != "cpu" and not self.trouble.kinds:
            return True
        made: MeterReport = report(
            *(job.row() for job in jobs),
            replica_id=f"replica-{device}",
            accelerator=device,
            seq=self.reports,
            busy_us=self.reports,
        )
        if self.world.down or (not surely and rng.random() < self.trouble.lose):
            return False
        self.world.ledger.report(made)
        self.check()
        if rng.random() < self.trouble.lose:
            self.world.ledger.report(made)
        if not surely and rng.random() < self.trouble.lose:
            return False
        self.unreported = [j for j in self.unreported if j not in jobs or not j.ended]
        for job in jobs:
            if job.ended and job in self.unreported and made.rows[jobs.index(job)].ended:
                self.unreported.remove(job)
        return True

    async def mishaps(self) -> None:
        """What goes wrong from time to time."""
        rng, world = self.rng, self.world
        while True:
            await asyncio.sleep(rng.random() * 4)
            kind = rng.randrange(4)
            if kind == 0 and self.trouble.gateways_die and len(self.living) > 1:
                self.kill_gateway(rng.choice(sorted(self.living)))
                self.gateway()
            elif kind == 1 and self.trouble.ledger_dies and not world.down:
                if rng.random() < 0.5:
                    self.die_in_commit()
                world.kill()
                await asyncio.sleep(rng.random() * 4)
                world.start()
            elif kind == 2 and self.trouble.clock_jumps:
                world.skew_us += rng.choice([-50_000_000, 50_000_000, 3_600_000_000])
            if not world.down:
                world.ledger.sweep()
                self.check()

    async def cuts(self) -> None:
        """One gateway at a time loses the ledger, for longer than a lease lives."""
        while True:
            await asyncio.sleep(2)
            name = self.rng.choice(sorted(self.living))
            self.cut.add(name)
            self.were_cut.add(name)
            await asyncio.sleep(11.5)
            self.cut.clear()

    def kill_gateway(self, name: str) -> None:
        """A gateway dies; the engine works on for a moment and aborts."""
        for task in [*self.living.pop(name), self.books.pop(name)._renewals._task]:
            if task is not None:
                task.cancel()
        for job in self.jobs:
            if job.gateway_id == name and not job.ended:
                job.done = min(job.done + self.rng.randint(0, 5), job.answer)
                job.ended = True

    def die_in_commit(self) -> None:
        """Memory has it, disk does not."""
        real = LedgerStore._write

        def lost(*_: object) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        LedgerStore._write = lost  # type: ignore[method-assign]
        try:
            self.send(surely=True)
        except sqlite3.OperationalError:
            pass
        finally:
            LedgerStore._write = real  # type: ignore[method-assign]

    # What must hold

    def check(self) -> None:
        """After every message."""
        for account, limit in (("hr", self.tokens), ("it", self.tokens // 3)):
            over = self.overrun(account)
            found = self.world.ledger.committed(account)
            assert found.tokens <= limit + over.tokens, (self.seed, account, found, over)
            assert found.gpu_us <= self.gpu_seconds * 1_000_000 + over.gpu_us, (self.seed, found)
        for lease in self.world.ledger._books.state.leases.values():
            charged = sum((r.charged for r in lease.reservations.values()), Amount())
            assert lease.open_spent == charged, (self.seed, lease.id)

    def overrun(self, account: str) -> Amount:
        total = Amount()
        for job in self.jobs:
            if job.account == account:
                total += job.overrun
                if job.gateway_id in self.were_cut:
                    # What its lease held may be lent to others while it runs on.
                    total += largest(job.reserved, job.true)
        return total

    async def quiet(self) -> None:
        """Nothing is in flight any more: what is set aside, somebody knows that he holds it."""
        self.trouble = Trouble()
        self.cut.clear()
        await asyncio.sleep(12)
        # What a gateway held before its last renewal counts until it is heard again.
        most = {"hr": ZERO, "it": ZERO}
        for _ in range(60):
            await asyncio.sleep(0.05)
            most = {account: largest(held, self.held(account)) for account, held in most.items()}
        self.world.ledger.sweep()
        for account, known in most.items():
            (state,) = self.world.ledger.state(account)
            assert largest(state.leased, known) == known, (self.seed, state.leased, known)
            assert state.open == Amount(), self.seed

    def held(self, account: str) -> Amount:
        """What the gateways that live know to hold."""
        lines = [book._lines.get(account) for book in self.books.values()]
        return sum((Amount(v.hold_us, v.hold_tokens) for v in lines if v), Amount())

    async def main(self) -> None:
        rng = self.rng
        # Engines report before anybody asks them for work: the weight of their devices is known.
        self.send(surely=True)
        for _ in range(GATEWAYS):
            self.gateway()
        helpers = [asyncio.create_task(self.engine()), asyncio.create_task(self.mishaps())]
        if self.trouble.cut_off:
            helpers.append(asyncio.create_task(self.cuts()))
        end_s = self.world.monotonic() + LENGTH_S
        while self.world.monotonic() < end_s:
            name = rng.choice(sorted(self.books))
            task = asyncio.create_task(self.client(name))
            self.living[name].append(task)
            self.tasks.append(task)
            await asyncio.sleep(rng.random() * 0.3)
        for helper in helpers:
            helper.cancel()
        for ended in await asyncio.gather(*helpers, return_exceptions=True):
            assert isinstance(ended, asyncio.CancelledError), ended
        if self.world.down:
            self.world.start()
        await asyncio.gather(*list(self.tasks), return_exceptions=True)
        for task in self.tasks:
            if task.done() and not task.cancelled():
                task.result()
        assert self.send(surely=True)
        await self.quiet()
        for book in self.books.values():
            await book.close()
        await asyncio.sleep(12)
        self.world.ledger.sweep()
        totals = self.world.ledger.totals()
        for account in ("hr", "it"):
            true = Amount()
            for job in self.jobs:
                true += job.true if job.account == account else Amount()
            assert totals.get(account, Amount()) == true, self.seed
            (state,) = self.world.ledger.state(account)
            assert state.leased == Amount(), self.seed


def play(seed: int, trouble: Trouble, **limits: int) -> Schedule:
    schedule = Schedule(seed, trouble, **limits)
    with schedule.world:
        run(schedule.main)
    return schedule


SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=5, deadline=None)


@FEW
@given(SEEDS)
def test_without_trouble_nothing_is_overspent(seed: int) -> None:
    schedule = play(seed, Trouble(), gpu_seconds=6000)
    # Who is admitted at the edge, on what is left, may have a longer prompt than that.
    for account in ("hr", "it"):
        assert schedule.overrun(account).tokens <= LONGEST_PROMPT * GATEWAYS


@FEW
@given(SEEDS)
def test_lost_late_and_repeated_messages(seed: int) -> None:
    play(seed, Trouble(lose=0.25, clients_leave=True))


@FEW
@given(SEEDS)
def test_gateways_that_die(seed: int) -> None:
    play(seed, Trouble(gateways_die=True, lose=0.05, lag=True))


@FEW
@given(SEEDS)
def test_a_ledger_that_dies(seed: int) -> None:
    play(seed, Trouble(ledger_dies=True, lose=0.05))


@FEW
@given(SEEDS)
@example(117)
def test_everything_at_once(seed: int) -> None:
    play(seed, Trouble(0.15, True, True, True, True, True))


@FEW
@given(SEEDS)
def test_devices_of_two_kinds(seed: int) -> None:
    play(seed, Trouble(lose=0.15, clients_leave=True, lag=True, kinds=True))


@FEW
@given(SEEDS)
def test_gateways_that_lose_the_ledger_for_longer_than_a_lease(seed: int) -> None:
    trouble = Trouble(lose=0.05, clients_leave=True, cut_off=True)
    play(seed, trouble, tokens=100_000, gpu_seconds=6000)


@FEW
@given(SEEDS)
def test_everything_at_once_with_two_kinds_and_lost_ledgers(seed: int) -> None:
    play(seed, Trouble(0.15, True, True, True, True, True, True, True), gpu_seconds=600)
