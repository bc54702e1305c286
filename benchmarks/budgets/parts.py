"""The parts of a simulated schedule: ledgers that die, gateways with clocks of their own, jobs."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.budgets.files import WEIGHTS
from deployments.ledger_budgets import Budgets
from deployments.ledger_shards import BudgetsFollower, LedgerShards
from governance.budget.config import BudgetsConfig
from governance.budget.holds import LeaseHold
from governance.budget.leases import LeaseBook
from governance.budget.ledger import BudgetLedger
from governance.budget.messages import MeterReport, MeterRow, RenewReply, RenewRequest
from governance.budget.sharded import ShardedLeases
from governance.budget.shards import book_id, book_of, shard_of
from governance.budget.state import ZERO, largest, least, positive
from governance.budget.store import LedgerStore
from governance.budget.tree import Tree
from governance.errors import LedgerUnavailable
from governance.types import Amount, Principal, PrincipalKind

MILLI = {kind: round(weight * 1000) for kind, weight in WEIGHTS.items()}
NOTHING = (ZERO, ZERO)
PREFILL_US = 100
"""Raw device time of a prompt token."""
SKEW_US = 700_000
"""Wall clocks of two processes differ by up to twice this."""
DRIFT = 0.02
"""Monotonic clocks run this much too fast or slow at most. A lease's margin is 5 %."""


@dataclass
class Trouble:
    """What goes wrong, and how often; probabilities are per message."""

    lose: float = 0.0
    repeat: float = 0.0
    delay_s: float = 0.02
    """Longest way of a message. Two messages may overtake each other."""
    gateways_die: bool = False
    engines_die: bool = False
    ledgers_die: bool = False
    clocks: bool = False
    """Wall clocks jump and differ; monotonic clocks begin anywhere and drift."""
    clients_leave: bool = False
    lag: bool = False
    """Figures reach the gateway late."""
    kinds: bool = False
    """Devices of two kinds serve."""
    cuts: bool = False
    """A gateway does not reach the ledgers for longer than its leases live."""
    changes: bool = False
    """Transfers, overrides and new budgets files."""


class Wire:
    """The loop's time, wall clocks on it, and how messages travel."""

    def __init__(self, rng: Random, trouble: Trouble, start_us: int) -> None:
        self.rng = rng
        self.trouble = trouble
        self.jumped_us = 0
        self._start_us = start_us

    @staticmethod
    def now_s() -> float:
        """Time that passes alike for all, which nobody in the schedule can read."""
        return asyncio.get_running_loop().time()

    def clock(self) -> Callable[[], int]:
        """Wall clock of one process."""
        skew_us = self.rng.randint(-SKEW_US, SKEW_US) if self.trouble.clocks else 0
        return lambda: self._start_us + self.jumped_us + skew_us + round(self.now_s() * 1e6)

    def monotonic(self) -> Callable[[], float]:
        """Monotonic clock of one process."""
        if not self.trouble.clocks:
            return self.now_s
        began_s, rate = self.now_s(), 1 + self.rng.uniform(-DRIFT, DRIFT)
        first_s = self.rng.random() * 1e6
        return lambda: first_s + (self.now_s() - began_s) * rate

    def lost(self) -> bool:
        """Whether this message never arrives."""
        return self.rng.random() < self.trouble.lose

    def repeated(self) -> bool:
        """Whether this message arrives a second time."""
        return self.rng.random() < self.trouble.repeat

    async def way(self) -> None:
        """Let a message travel."""
        await asyncio.sleep(self.rng.random() * self.trouble.delay_s)


class LedgerProcess:
    """One ledger, its database, and what it is given when it starts again."""

    def __init__(self, wire: Wire, folder: Path, shard: int, budgets: Budgets) -> None:
        self.shard = shard
        self.budgets = budgets
        self.down = True
        self.told: list[str] = []
        """Ids of alerts, as delivered."""
        self._wire = wire
        self._path = folder / f"ledger-{shard}.sqlite"
        self.start()

    def start(self) -> None:
        """Start on what the disk has."""
        self.clock, self.monotonic = self._wire.clock(), self._wire.monotonic()
        self.ledger = BudgetLedger.open(
            self._path, self.budgets.config, clock=self.clock, monotonic=self.monotonic
        )
        self.down = False

    def kill(self) -> None:
        """End without a word: what was not committed is gone."""
        self.ledger._store.close()
        self.down = True

    def close(self) -> None:
        """End in order."""
        if not self.down:
            self.ledger.close()
            self.down = True

    def up(self) -> BudgetLedger:
        """The ledger.

        Raises:
            LedgerUnavailable: It is dead.
        """
        if self.down:
            raise LedgerUnavailable
        return self.ledger

    def take_up(self, budgets: Budgets, by: str | None = None) -> None:
        """Another file, unless a later one has come before."""
        ledger = self.up()
        if budgets.built_us > self.budgets.built_us:
            self.budgets = budgets
            ledger.apply(budgets.config, by, None if by is None else "a schedule")

    def drain(self) -> None:
        """Deliver what waits, as the tasks beside a ledger do."""
        for number, alert in self.ledger.alerts(1000):
            self.told.append(alert["id"])
            self.ledger.alerts_done(number)
        if events := self.ledger.events(1000):
            self.ledger.events_written(events[-1][0])

    @contextmanager
    def broken_disk(self) -> Iterator[None]:
        """Nothing can be written inside."""
        real = LedgerStore._write

        def lost(*_: object) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        LedgerStore._write = lost  # type: ignore[method-assign, assignment]
        try:
            yield
        except sqlite3.OperationalError:
            pass
        finally:
            LedgerStore._write = real  # type: ignore[method-assign]


class Calls:
    """What ``LedgerCalls`` is to a gateway, over the wire of a schedule."""

    def __init__(
        self, wire: Wire, process: LedgerProcess, gateway: Gateway, after: Callable[[int], None]
    ) -> None:
        self._wire, self._process, self._gateway, self._after = wire, process, gateway, after

    async def renew(self, request: RenewRequest) -> RenewReply:
        """There and back; either way may fail, and a copy may come later."""
        await self._there()
        reply = self._process.up().renew(request)
        for settlement in request.settlements:
            self._gateway.jobs[settlement.reservation_id].told = True
        self._after(self._process.shard)
        if self._wire.repeated():
            self._gateway.copies.append(asyncio.create_task(self._again(request)))
        await self._back()
        return reply

    async def budgets(self) -> dict[str, Any]:
        """The budgets that hold."""
        await self._there()
        self._process.up()
        found = self._process.budgets.dump()
        await self._back()
        return found

    async def configure(self, budgets: dict[str, Any]) -> None:
        """Take up the first ledger's budgets."""
        await self._there()
        self._process.take_up(Budgets.load(budgets))
        self._after(self._process.shard)
        await self._back()

    async def _there(self) -> None:
        await self._wire.way()
        if self._gateway.cut or self._wire.lost():
            raise LedgerUnavailable

    async def _back(self) -> None:
        await self._wire.way()
        if self._gateway.cut or self._wire.lost():
            raise LedgerUnavailable

    async def _again(self, request: RenewRequest) -> None:
        await asyncio.sleep(self._wire.rng.random() * 3)
        if not self._process.down:
            self._process.ledger.renew(request)
            self._after(self._process.shard)


class Gateway:
    """One gateway process: leases at every ledger, and the budgets file that it works by."""

    def __init__(
        self,
        name: str,
        wire: Wire,
        processes: list[LedgerProcess],
        built: Budgets,
        after: Callable[[int], None],
    ) -> None:
        self.name = name
        self.cut = False
        """It reaches no ledger."""
        self.dead = False
        self.tasks: list[asyncio.Task[None]] = []
        self.jobs: dict[str, Job] = {}
        """By reservation."""
        self.copies: list[asyncio.Task[None]] = []
        """Messages that are on their way a second time."""
        self.clock, self.monotonic = wire.clock(), wire.monotonic()
        tree = Tree(built.config)
        calls: Any = [Calls(wire, process, self, after) for process in processes]
        self.ledgers = LedgerShards(lambda shard: calls[shard], tree)
        self.follower = BudgetsFollower(self.ledgers, built, self._follow)
        self.books = [self._book(shard, tree) for shard in range(len(processes))]
        self.leases: LeaseBook | ShardedLeases
        one = len(self.books) == 1
        self.leases = self.books[0] if one else ShardedLeases(self.books, tree)
        self.leases.start()

    def _book(self, shard: int, tree: Tree) -> LeaseBook:
        async def renew(request: RenewRequest) -> RenewReply:
            reply = await self.ledgers.calls(shard).renew(request)
            self.follower.heard(shard, reply.digest)
            return reply

        return LeaseBook(
            book_id(self.name, shard),
            renew,
            clock=self.clock,
            monotonic=self.monotonic,
            tree=tree,
            chunk_tokens=tree.config.chunk_tokens,
            renew_s=tree.config.lease.renew_s,
        )

    def _follow(self, budgets: Budgets) -> None:
        self.leases.tree = Tree(budgets.config)

    def kill(self) -> None:
        """End without a word."""
        self.dead = True
        renewing = [book._renewals._task for book in self.books]
        following = list(self.follower._busy.values())
        for task in [*self.tasks, *self.copies, *renewing, *following]:
            if task is not None:
                task.cancel()


@dataclass(eq=False)
class Job:
    """One request at an engine: the truth."""

    hold: LeaseHold
    gateway: Gateway
    prompt: int
    answer: int
    token_us: int
    device: str
    leaf: str
    done: int = 0
    ended: bool = False
    delivered: bool = False
    lost: bool = False
    """Its engine died: what it did since its last report nobody will ever tell."""
    reserved: Amount = ZERO
    peak: Amount = ZERO
    """The most that it had reserved; a renewal that is sent again tells what was so before."""
    settled: Amount | None = None
    told: bool = False
    """The ledger has what its gateway settled."""
    through: bool = False
    """The ledger has its last row."""
    through_us: int = 0
    """Latest wall time of the schedule before that."""
    lapsed: bool = False
    """Its gateway's lease ended while it ran: what it has reserved may be lent to others."""
    stops: bool = True
    """It ends where its account does."""
    weight_milli: int = field(init=False)
    shard: int = field(init=False)
    """Ledger that it is charged at."""
    _excess: tuple[Amount, Amount] | None = None

    def __post_init__(self) -> None:
        self.weight_milli, self.shard = MILLI[self.device], shard_of(self.hold.id)
        self.gateway.jobs[self.hold.id] = self

    def look(self) -> None:
        """Note what its gateway has reserved for it now, and whether its account stops it."""
        self.reserved = self.hold.reservation.reserved
        self.peak = largest(self.peak, self.reserved)
        self.stops = self.stops and self.hold._line.stops

    @property
    def excess(self) -> tuple[Amount, Amount]:
        """``overrun`` and ``overspent``."""
        if self._excess is not None:
            return self._excess
        if not self.lapsed and self.settled is None:
            # Most looks are at requests that run, and most run within what they have reserved.
            tokens = self.prompt + self.done
            gpu_us = (self.prompt * PREFILL_US + self.done * self.token_us) * self.weight_milli
            if tokens <= self.reserved.tokens and gpu_us // 1000 <= self.reserved.gpu_us:
                return NOTHING
        found = self.overrun, self.overspent
        if self.told and self.through and self.ended:
            self._excess = found  # nothing changes any more
        return found

    @property
    def raw_us(self) -> int:
        """Device time so far."""
        return self.prompt * PREFILL_US + self.done * self.token_us

    @property
    def true(self) -> Amount:
        """What it has cost."""
        return Amount(self.raw_us * self.weight_milli // 1000, self.prompt + self.done)

    @property
    def said(self) -> Amount:
        """What its gateway has told of it, at the weight of its device."""
        if self.settled is None:
            return ZERO
        said_us = self.hold._raw_us * self.weight_milli // 1000
        return least(self.settled, Amount(said_us, self.settled.tokens))

    @property
    def least(self) -> Amount:
        """The least that it may be charged in the end."""
        if not self.lost:
            return self.true
        # What a gateway did not tell before it died, nobody will.
        return ZERO if self.gateway.dead else least(self.said, self.true)

    @property
    def most(self) -> Amount:
        """The most that it may be charged in the end."""
        lost = self.lost and self.settled is not None
        return largest(self.true, self.settled or ZERO) if lost else self.true

    @property
    def beyond(self) -> Amount:
        """What it took beyond what its gateway had reserved, or has settled it for."""
        held = self.reserved if self.settled is None else least(self.reserved, self.said)
        return positive(self.true - held)

    @property
    def overrun(self) -> Amount:
        """The same with what is charged for the time being: what a ledger may have lent twice.

        Until its engine has reported, a request is charged at the weight that its gateway was told.
        """
        over = self.beyond
        if self.settled is not None:
            over = largest(over, positive(self.settled - least(self.reserved, self.said)))
        # Of a lease that ended, what it was charged and what it has reserved may both be counted
        # until its gateway is lent anew and its engine has reported.
        return over + self.peak + self.true if self.lapsed else over

    @property
    def overspent(self) -> Amount:
        """The most of it that may have been spent beyond a limit."""
        if not self.lapsed:
            return self.overrun
        return self.overrun - self.peak - self.true + largest(self.peak, self.true)

    def row(self) -> MeterRow:
        """What its engine says of it."""
        prefill_us = self.prompt * PREFILL_US
        return MeterRow(
            reservation_id=self.hold.id,
            request_id=f"req_{self.hold.id}",
            gateway_id=book_of(self.hold.id) or self.gateway.name,
            account=self.leaf,
            model="tiny",
            base_model="tiny",
            gpu_us=self.raw_us,
            prefill_us=prefill_us,
            decode_us=self.raw_us - prefill_us,
            prefill_tokens=self.prompt,
            cached_tokens=0,
            prompt_tokens=self.prompt,
            decode_tokens=self.done,
            ended=self.ended,
            delivered=self.delivered,
        )


@dataclass
class Engine:
    """One replica, with devices of one kind."""

    device: str
    born: int = 1
    seq: int = 0

    def report(self, rows: list[MeterRow], shard: int, now_s: float) -> MeterReport:
        """The next report; the meters go to the first ledger alone."""
        self.seq += 1
        busy_us = 0 if shard else self.seq
        made = MeterReport(
            replica_id=f"replica-{self.device}-{self.born}",
            base_model="tiny",
            accelerator=self.device,
            epoch=f"e{self.born}",
            seq=self.seq,
            devices=1,
            elapsed_us=0 if shard else round(now_s * 1e6),
            busy_us=busy_us,
            attributed_us=busy_us,
            unattributed_us=0,
            running=0 if shard else sum(not row.ended for row in rows),
            dead=False,
            rows=tuple(rows),
        )
        return replace(made)


def principal(department: str, user: int, application: str = "", role: str = "staff") -> Principal:
    """Somebody who asks."""
    return Principal(
        PrincipalKind.KEY if application else PrincipalKind.USER,
        application or f"user-{user}",
        "gatehouse",
        department,
        frozenset({role}),
        f"key{user}",
    )


def built(config: BudgetsConfig) -> Budgets:
    """Budgets of the first build."""
    return Budgets(config, 1)
