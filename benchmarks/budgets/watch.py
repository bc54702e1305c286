"""What must hold in every schedule, looked at after every message that a ledger took.

With ``committed = spent + held`` of an account, ``held`` what gateways may still spend of it, and
``overrun`` what requests took beyond what their gateways had reserved for them:

- *bound*: ``committed <= limit + borrow + overrun``, where ``limit`` counts transfers, overrides
  and overdraft; and ``spent`` within the same, with no request counted twice on the right. Where a
  limit was lowered below what was committed, or a window ended while more was held than the next
  one has, nothing more is committed until it fits again.
- *pool*: what the members of a cohort use beyond what each keeps for itself is within what they
  lend, but for the same overruns.
- *belief*: a gateway believes to hold no more than its ledger counts for it, and believes in no
  lease that its ledger has ended, however their clocks run.
- *sums*: ``held`` of an account is the sum over the leases at and under it, ``open_spent`` of a
  lease the sum over its open reservations, and an account has spent no less than those under it.
- *requests*: no request took more beyond its reservation than the error of one open chunk, what it
  did between its end at the gateway and the engine's abort, and its prompt where that was longer
  than what was left.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from benchmarks.budgets.files import CHUNK_TOKENS
from benchmarks.budgets.parts import PREFILL_US, Gateway, Job, LedgerProcess
from governance.budget.lines import ENDLESS
from governance.budget.shards import book_of
from governance.budget.state import ZERO
from governance.budget.tree import Node, Tree
from governance.types import Amount

ABORT_TOKENS = 5
"""Most tokens that an engine goes on for after its gateway is through with a request."""
LATE_TOKENS = 3
"""Most tokens by which the figures that a gateway sees are late."""
SETTLED_LATE = 2

NEVER_US = 1 << 62
Over = tuple[int, Amount, Amount]
"""When the ledger had the last of a request, its overrun, and what of that may be spent."""
Key = tuple[str, int]
"""Account or cohort, and quantity: 0 for device time, 1 for tokens."""


class Broken(AssertionError):
    """An invariant does not hold."""


@dataclass
class _Seen:
    """An account in one quantity, as of the last look."""

    cap: int
    committed: int
    held: int
    start_us: int


@dataclass
class Watch:
    """Looks at one ledger.

    Args:
        process: The ledger.
        jobs: Every request of the schedule.
        gateways: Those that live, by name.
    """

    process: LedgerProcess
    jobs: list[Job]
    gateways: dict[str, Gateway]
    checks: int = 0
    borrowing: int = 0
    """Looks at which somebody had borrowed."""
    latest_us: int = 0
    """Latest wall time that the ledger has seen."""
    moving: bool = False
    """The next change of a limit is a transfer: it may take only what is not committed."""
    _seen: dict[Key, _Seen] = field(default_factory=dict)
    _allowed: dict[Key, int] = field(default_factory=dict)
    """What may stay committed beyond the cap, until it fits again."""
    _pools: dict[Key, tuple[tuple[int, ...], dict[str, int]]] = field(default_factory=dict)
    _pooled: dict[Key, int] = field(default_factory=dict)

    def tick(self) -> None:
        """Before the ledger does anything: time has passed, and leases may have ended."""
        if self.process.down:
            return
        self.latest_us = max(self.latest_us, self.process.clock())
        now_s = self.process.monotonic()
        gateways = self.process.ledger._books.state.gateways
        ended = {g.id for g in gateways.values() if now_s >= g.expires_s}
        for job in self.jobs:
            if job.shard != self.process.shard or job.lapsed:
                continue
            if not (job.through if job.gateway.dead else job.told):
                job.lapsed = book_of(job.hold.id) in ended

    def check(self) -> None:
        """Everything that must hold now.

        Raises:
            Broken: Something does not.
        """
        if self.process.down:
            return
        self.checks += 1
        self.latest_us = max(self.latest_us, self.process.clock())
        books = self.process.ledger._books
        books.count()
        tree, state = books.tree, books.state
        self._sums()
        for gateway in self.gateways.values():
            self._belief(gateway)
        over: dict[str, list[Over]] = {}
        for job in self.jobs:
            if job.shard != self.process.shard:
                continue
            overrun, overspent = job.excess
            if overrun != ZERO or overspent != ZERO:
                through = job.through and (job.told or job.gateway.dead)
                last_us = job.through_us if through else NEVER_US
                for node in tree.path(job.leaf):
                    over.setdefault(node.name, []).append((last_us, overrun, overspent))
        for name in {*tree.listed(), *state.accounts, *state.held}:
            self._bound(tree.node(name), over.get(name, ()))
        for cohort in tree.config.cohorts:
            self._pool(tree, cohort, over)
        self.moving = False

    def _bound(self, node: Node, over: Iterable[Over]) -> None:
        books = self.process.ledger._books
        account = books.view(node.name, self.process.clock())
        held = books.state.held.get(node.name, ZERO)
        overrun, overspent = _sum(over, account.start_us)
        for place, limit in enumerate(books.limits(node)):
            if limit is None:
                continue
            spent, out = _pair(account.spent)[place], _pair(held)[place]
            cap, committed, key = limit + _pair(node.borrow)[place], spent + out, (node.name, place)
            before = self._seen.get(key)
            allowed = self._allowed.get(key, 0)
            if before is not None and before.start_us != account.start_us:
                allowed = before.held
            elif before is not None and cap < before.cap and not self.moving:
                allowed = max(allowed, before.committed)
            most = max(cap, allowed) + overrun[place]
            if committed > most or spent > max(cap, allowed) + overspent[place]:
                raise Broken(
                    f"{node.name}: {committed} of {('gpu_us', 'tokens')[place]} are committed"
                    f" ({spent} spent, {out} held), the cap is {cap}, allowed {allowed}, overrun"
                    f" {overrun[place]} ({overspent[place]} of it spent), before {before}"
                )
            self._allowed[key] = allowed if committed > cap else 0
            self._seen[key] = _Seen(cap, committed, out, account.start_us)

    def _pool(self, tree: Tree, cohort: str, over: dict[str, list[Over]]) -> None:
        """Borrowed within what is lent."""
        books, config = self.process.ledger._books, tree.config.cohorts[cohort]
        members = [n for n in tree.members[cohort] if tree.shard(n) == self.process.shard]
        if not members:
            return
        for place, limit in enumerate((config.limit_us, config.tokens)):
            used, held, lent, guaranteed, nominal, overrun = {}, {}, 0, {}, 0, 0
            starts = []
            for name in members:
                node, account = tree.node(name), books.view(name, self.process.clock())
                own = books.limits(node)[place] or 0
                lend = min(_pair(node.lend)[place], own)
                guaranteed[name], lent, nominal = own - lend, lent + lend, nominal + own
                held[name] = _pair(books.state.held.get(name, ZERO))[place]
                used[name] = _pair(account.spent)[place] + held[name]
                overrun += _sum(over.get(name, ()), account.start_us)[0][place]
                starts.append(account.start_us)
            pool = lent + (0 if limit is None else max(0, limit - nominal))
            pooled = sum(max(0, used[name] - guaranteed[name]) for name in members)
            limits = {name: books.limits(tree.node(name))[place] or 0 for name in members}
            self.borrowing += any(used[name] > limits[name] for name in members)
            key = (cohort, place)
            shape = (pool, *(guaranteed[name] for name in members), *starts)
            before = self._pools.get(key)
            allowed = self._pooled.get(key, 0)
            if before is not None and before[0] != shape and not self.moving:
                # What is held is carried over when a window ends; `before` has the larger of both.
                allowed = sum(max(0, before[1][name] - guaranteed[name]) for name in members)
            if pooled > max(pool, allowed) + overrun:
                raise Broken(
                    f"cohort {cohort}: {pooled} of {('gpu_us', 'tokens')[place]} are used of a pool"
                    f" of {pool}, allowed {allowed}, overrun {overrun}: {used}, keep {guaranteed}"
                )
            self._pooled[key] = allowed if pooled > pool else 0
            self._pools[key] = (shape, used)

    def _belief(self, gateway: Gateway) -> None:
        book, ledger = gateway.books[self.process.shard], self.process.ledger
        state, now_s = ledger._books.state, gateway.monotonic()
        known = state.gateways.get(book.gateway_id)
        for line in book.lines:
            holds = (line.hold_us - line.pending_us, line.hold_tokens - line.pending_tokens)
            limited = (line.limited_us, line.limited_tokens)
            if now_s >= line.valid_until_s or max(holds) <= 0:
                continue
            if known is None or self.process.monotonic() >= known.expires_s:
                raise Broken(f"{book.gateway_id} believes in a lease of {line.account} that ended")
            lease = state.leases.get((book.gateway_id, line.account))
            bound = ZERO if lease is None else lease.bound
            for place, hold in enumerate(holds):
                counted = _pair(bound)[place]
                if not limited[place] or hold <= counted or hold >= ENDLESS // 2:
                    continue
                mine = (job for job in gateway.jobs.values() if job.leaf == line.account)
                late = sum(_pair(job.excess[0])[place] for job in mine)
                if hold > counted + late:
                    raise Broken(
                        f"{book.gateway_id} believes to hold {hold} of {line.account}, but"
                        f" {counted} are counted, overrun {late}"
                    )

    def _sums(self) -> None:
        """Figures that are kept beside each other agree."""
        books = self.process.ledger._books
        held: dict[str, Amount] = {}
        for lease in books.state.leases.values():
            charged = sum((r.charged for r in lease.reservations.values()), ZERO)
            if lease.open_spent != charged:
                raise Broken(f"{lease.id}: open_spent is {lease.open_spent}, not {charged}")
            for node in books.tree.path(lease.account):
                held[node.name] = held.get(node.name, ZERO) + lease.outstanding
        for name, amount in books.state.held.items():
            if amount != held.get(name, ZERO):
                raise Broken(f"{name}: {amount} are held, but its leases have {held.get(name)}")
        under: dict[str, Amount] = {}
        for name, account in books.state.accounts.items():
            if (parent := books.tree.node(name).parent) is not None:
                under[parent] = under.get(parent, ZERO) + account.spent
        for name, amount in under.items():
            spent = books.state.accounts[name].spent
            if spent.gpu_us < amount.gpu_us or spent.tokens < amount.tokens:
                raise Broken(f"{name} has spent {spent}, but those under it {amount}")

    def request(self, job: Job) -> None:
        """One request, once it is over.

        Raises:
            Broken: It took more beyond its reservation than it may.
        """
        if job.lapsed or job.settled is None or not job.stops:
            return
        late = ABORT_TOKENS + LATE_TOKENS + SETTLED_LATE
        raw_us = job.prompt * PREFILL_US + (CHUNK_TOKENS + late) * job.token_us
        most = Amount(raw_us * job.weight_milli // 1000, job.prompt + late)
        if job.beyond.gpu_us > most.gpu_us or job.beyond.tokens > most.tokens:
            raise Broken(f"{job.hold.id} took {job.beyond} beyond its reservation, at most {most}")


def _sum(over: Iterable[Over], start_us: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Overruns of requests that were charged in a window, or may be; and what of them is spent."""
    figures = [0, 0, 0, 0]
    for last_us, overrun, overspent in over:
        if last_us >= start_us:
            figures[0] += overrun.gpu_us
            figures[1] += overrun.tokens
            figures[2] += overspent.gpu_us
            figures[3] += overspent.tokens
    return (figures[0], figures[1]), (figures[2], figures[3])


def _pair(amount: Amount) -> tuple[int, int]:
    return amount.gpu_us, amount.tokens
