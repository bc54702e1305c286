"""One simulated schedule of several ledgers, gateways and engines, and everything that goes wrong.

A seed gives the budgets file, the requests and all that goes wrong. ``BudgetLedger``, its database,
``LeaseBook``, ``ShardedLeases`` and ``BudgetsFollower`` are the real ones; the network, the engines
and the clocks are simulated, on a loop in which time passes only while nobody can work, so that
seconds of waiting cost nothing and a seed gives the same schedule each time.

``benchmarks.budgets.watch`` looks at each ledger after every message. In the end:

- every department and part has been charged exactly what its requests cost (of those whose engine
  died, no more than that, and no less than what their gateways settled);
- all leases have returned, within one time to live after the last gateway was heard;
- no threshold was told twice; what is left can be reserved; gateways work by the ledger's file.
"""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from benchmarks.budgets import files
from benchmarks.budgets.files import RENEW_S, TTL_S, WEIGHTS
from benchmarks.budgets.parts import (
    DRIFT,
    Engine,
    Gateway,
    Job,
    LedgerProcess,
    Trouble,
    Wire,
    built,
    principal,
)
from benchmarks.budgets.virtual import START_US, run
from benchmarks.budgets.watch import ABORT_TOKENS, LATE_TOKENS, SETTLED_LATE, Broken, Watch
from deployments.ledger_budgets import Budgets
from governance.budget.state import ZERO
from governance.budget.tree import Tree
from governance.errors import BudgetExhausted, LedgerUnavailable, NoAccount
from governance.types import Amount, BudgetAsk, Operation, Usage

LENGTH_S = 7.0
GATEWAYS = 3
LONGEST_PROMPT = 100
HOUR_US = 3_600_000_000


def draw_trouble(rng: Random) -> Trouble:
    """What goes wrong in a schedule: something in almost all, everything in some."""
    if rng.random() < 0.2:
        return Trouble(0.15, 0.15, 0.3, *(True,) * 9)
    often = rng.choice((0.0, 0.05, 0.25))
    few = (rng.random() < 0.4 for _ in range(9))
    return Trouble(often, rng.choice((0.0, 0.2)), rng.choice((0.01, 0.4)), *few)


@dataclass
class Outcome:
    """What one schedule was."""

    seed: int
    shards: int
    trouble: Trouble
    requests: int = 0
    refused: int = 0
    stopped: int = 0
    checks: int = 0
    ledger_kills: int = 0
    gateway_kills: int = 0
    engine_kills: int = 0
    cuts: int = 0
    jumps: int = 0
    changes: int = 0
    transfers: int = 0
    borrowed: int = 0
    """Looks at which somebody had borrowed."""
    worst_over_tokens: int = 0
    """Most tokens that one request took beyond its reservation."""


@dataclass
class Schedule:
    """See the module.

    Args:
        seed: Gives everything.
        trouble: What goes wrong; ``None`` to draw it.
        shards: Ledgers; 0 to draw it.
    """

    seed: int
    trouble: Trouble | None = None
    shards: int = 0
    jobs: list[Job] = field(default_factory=list)

    def play(self) -> Outcome:
        """Run it.

        Raises:
            Broken: An invariant does not hold.
        """
        self.rng = Random(self.seed)
        self.trouble = self.trouble or draw_trouble(self.rng)
        self.shards = self.shards or self.rng.choice((1, 1, 2))
        self.outcome = Outcome(self.seed, self.shards, self.trouble)
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            self.folder = Path(folder)
            run(self._main)
        return self.outcome

    # -- the parts ----------------------------------------------------------------------------

    def _set_up(self) -> None:
        assert self.trouble is not None
        self.wire = Wire(self.rng, self.trouble, START_US)
        self.file = files.draw(self.rng, shards=self.shards)
        self.budgets = built(files.load(self.file))
        self.processes = [
            LedgerProcess(self.wire, self.folder, shard, self.budgets)
            for shard in range(self.shards)
        ]
        self.engines = {device: Engine(device) for device in sorted(WEIGHTS)}
        self.gateways: dict[str, Gateway] = {}
        self.watches = [Watch(each, self.jobs, self.gateways) for each in self.processes]
        self.unreported: list[Job] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.born = 0

    def _after(self, *shards: int) -> None:
        """After every message that a ledger took."""
        for shard in shards or range(self.shards):
            self.watches[shard].tick()
            self.watches[shard].check()

    def _gateway(self) -> None:
        self.born += 1
        name = f"gw-{self.born}"
        self.gateways[name] = Gateway(name, self.wire, self.processes, self.budgets, self._after)

    async def _client(self, gateway: Gateway) -> None:
        """One request, as its gateway handles it."""
        rng, trouble = self.rng, self.wire.trouble
        department = rng.choice(("hr", "hr", "it", "it", "ops", "sci", "law"))
        application = "app-jobs" if rng.random() < 0.3 else ""
        role = "payroll" if rng.random() < 0.3 else "staff"
        most = rng.choice((16, 64, 200))
        size = rng.choice((100, 1000))
        try:
            leaf = gateway.leases.charge(
                principal(department, rng.randrange(3), application, role)
            ).account
            hold = await gateway.leases.reserve(
                BudgetAsk("req", leaf, "tiny", "tiny", Operation.CHAT, size, 1, most)
            )
        except (BudgetExhausted, LedgerUnavailable, NoAccount):
            self.outcome.refused += 1
            return
        job = Job(
            hold,
            gateway,
            rng.randint(5, LONGEST_PROMPT),
            rng.randint(1, most),
            rng.randint(60_000, 200_000) if trouble.cuts else rng.randint(500, 30_000),
            rng.choice(sorted(WEIGHTS)) if trouble.kinds else "cpu",
            leaf,
        )
        job.look()
        self.jobs.append(job)
        self.unreported.append(job)
        leaves = trouble.clients_leave and rng.random() < 0.3
        await self._stream(job, rng.randint(0, job.answer) if leaves else job.answer + 1)
        for watch in self.watches:
            watch.request(job)

    async def _stream(self, job: Job, patience: int) -> None:
        rng, hold, lag = self.rng, job.hold, self.wire.trouble.lag
        stopped = False
        try:
            await asyncio.sleep(rng.random() * 0.1)
            await hold.started(job.prompt)
            job.look()
            while job.done < job.answer and job.done < patience and not job.ended:
                await asyncio.sleep(job.token_us / 1e6)
                if job.ended:
                    break
                job.done += 1
                late = rng.randint(0, LATE_TOKENS) if lag else 0
                seen_us = max(0, job.raw_us - late * job.token_us)
                if hold.consumed(1, seen_us):
                    await hold.extend()
                job.look()
        except (BudgetExhausted, LedgerUnavailable):
            if not hold._line.stops:
                raise Broken(f"{hold.id} was stopped, but its account is soft") from None
            stopped = True
            self.outcome.stopped += 1
        if stopped or job.lost or job.done < job.answer:
            hold.settle(None, None)
            if lag and not job.lost:
                job.done = min(job.done + rng.randint(0, SETTLED_LATE), job.answer)
        else:
            job.delivered = True
            gpu_us = None if lag and rng.random() < 0.2 else job.raw_us
            hold.settle(Usage(job.prompt, job.done), gpu_us)
        job.settled = hold.charged
        job.ended = True
        over = job.beyond.tokens
        if job.stops and not job.lapsed:
            self.outcome.worst_over_tokens = max(self.outcome.worst_over_tokens, over)

    async def _report(self) -> None:
        """Engines report twice a second."""
        while True:
            await asyncio.sleep(0.5)
            self._send()

    def _send(self, *, surely: bool = False) -> bool:
        """Reports of all engines to all ledgers; whether all arrived, as far as they know."""
        done = [
            self._send_to(engine, process, surely=surely)
            for engine in self.engines.values()
            for process in self.processes
            if engine.device == "cpu" or self.wire.trouble.kinds
        ]
        return all(done)

    def _send_to(self, engine: Engine, process: LedgerProcess, *, surely: bool) -> bool:
        jobs = [
            job
            for job in self.unreported
            if job.device == engine.device and job.shard == process.shard
        ]
        made = engine.report([job.row() for job in jobs], process.shard, self.wire.now_s())
        if process.down or (not surely and self.wire.lost()):
            return False
        self.watches[process.shard].tick()
        process.ledger.report(made)
        self._after(process.shard)
        if self.wire.repeated():
            process.ledger.report(made)
            self._after(process.shard)
        if not surely and self.wire.lost():
            return False
        for job, row in zip(jobs, made.rows, strict=True):
            if row.ended:
                self.unreported.remove(job)
                job.through = True
                job.through_us = self.watches[process.shard].latest_us
        return True

    # -- what goes wrong ----------------------------------------------------------------------

    async def _mishaps(self) -> None:
        rng, trouble = self.rng, self.wire.trouble
        kinds = [
            (trouble.gateways_die, self._kill_gateway),
            (trouble.engines_die, self._kill_engine),
            (trouble.ledgers_die, self._kill_ledger),
            (trouble.clocks, self._jump),
            (trouble.changes, self._change),
            (trouble.changes, self._transfer),
            (trouble.cuts, self._cut),
        ]
        while True:
            await asyncio.sleep(rng.random() * 0.8)
            wanted, happen = rng.choice(kinds)
            if wanted:
                await happen()
            for process in self.processes:
                if not process.down:
                    process.ledger.sweep()
                    process.drain()
            self._after()

    async def _kill_gateway(self) -> None:
        if len(self.gateways) < 2:
            return
        gateway = self.gateways.pop(self.rng.choice(sorted(self.gateways)))
        gateway.kill()
        self.outcome.gateway_kills += 1
        for job in self.jobs:
            if job.gateway is gateway and not job.ended:
                # The engine sees the connection end, and aborts.
                job.done = min(job.done + self.rng.randint(0, ABORT_TOKENS), job.answer)
                job.ended = True
        self._gateway()

    async def _kill_engine(self) -> None:
        engine = self.engines[self.rng.choice(sorted(self.engines))]
        self.outcome.engine_kills += 1
        for job in list(self.unreported):
            if job.device == engine.device:
                job.ended = job.lost = True
                self.unreported.remove(job)
        engine.born, engine.seq = engine.born + 1, 0

    async def _kill_ledger(self) -> None:
        process = self.rng.choice(self.processes)
        if process.down:
            return
        if self.rng.random() < 0.5:
            with process.broken_disk():  # memory has it, and the disk does not
                self._send()
        process.kill()
        self.outcome.ledger_kills += 1
        self.tasks.append(asyncio.create_task(self._bring_back(process)))

    async def _bring_back(self, process: LedgerProcess) -> None:
        await asyncio.sleep(self.rng.random() * 3)
        process.start()

    async def _jump(self) -> None:
        self.outcome.jumps += 1
        jump_us = self.rng.choice((-50_000_000, 50_000_000, HOUR_US, HOUR_US, 24 * HOUR_US))
        self.wire.jumped_us += jump_us

    async def _cut(self) -> None:
        gateway = self.gateways[self.rng.choice(sorted(self.gateways))]
        gateway.cut = True
        self.outcome.cuts += 1

        async def heal() -> None:
            await asyncio.sleep(TTL_S * 1.5)
            gateway.cut = False

        self.tasks.append(asyncio.create_task(heal()))

    async def _change(self) -> None:
        """Another file, or an override of an account."""
        first = self.processes[0]
        if first.down:
            return
        self.outcome.changes += 1
        if self.rng.random() < 0.4:
            name = self.rng.choice(sorted(self.budgets.config.accounts))
            process = self.processes[first.ledger.tree.shard(name)]
            if process.down:
                return
            until_us = process.clock() + self.rng.choice((1, 4)) * 1_000_000
            tokens = self.rng.choice((100, 2_000))
            with suppress(ValueError):  # more than the cohort has
                process.ledger.set_override(name, None, tokens, until_us, "x", "a schedule")
        else:
            self.file = files.changed(self.rng, self.file)
            self.budgets = Budgets(files.load(self.file), self.budgets.built_us + 1)
            first.take_up(self.budgets, "x")
        self._after()

    async def _transfer(self) -> None:
        names = sorted(self.budgets.config.accounts)
        source, target = self.rng.sample(names, 2)
        process = self.processes[self._home(source)]
        if process.down or self._home(target) != self._home(source):
            return
        watch = self.watches[process.shard]
        watch.tick()
        watch.check()
        watch.moving = True
        demand = (source, target, 0, self.rng.choice((50, 200)), "x", "a schedule")
        key = f"demand-{self.outcome.transfers}"
        try:
            done = process.ledger.transfer(*demand, key=key)
        except ValueError:
            watch.moving = False  # there is not so much to move
            return
        self.outcome.transfers += 1
        watch.check()
        if self.wire.repeated():
            again = process.ledger.transfer(*demand, key=key)
            if [state.moved for state in again] != [state.moved for state in done]:
                raise Broken(f"{key} was carried out twice")

    def _home(self, name: str) -> int:
        return Tree(self.budgets.config).shard(name)

    # -- the whole ----------------------------------------------------------------------------

    async def _main(self) -> None:
        self._set_up()
        try:
            await self._serve()
            await self._settle_down()
            await self._end()
        finally:
            # After a fault as well: nothing of this schedule may run on into the next.
            for gateway in self.gateways.values():
                gateway.kill()
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)
            for process in self.processes:
                if not process.down:
                    process.kill()

    async def _serve(self) -> None:
        """Requests, for as long as things go wrong."""
        rng = self.rng
        # Engines report before anybody asks them for work: the weight of their devices is known.
        self._send(surely=True)
        for _ in range(GATEWAYS):
            self._gateway()
        helpers = [asyncio.create_task(self._report()), asyncio.create_task(self._mishaps())]
        end_s = self.wire.now_s() + LENGTH_S
        while self.wire.now_s() < end_s and not any(helper.done() for helper in helpers):
            gateway = self.gateways[rng.choice(sorted(self.gateways))]
            self.outcome.requests += 1
            gateway.tasks.append(asyncio.create_task(self._client(gateway)))
            self.tasks.append(gateway.tasks[-1])
            await asyncio.sleep(rng.random() * 0.35)
        for helper in helpers:
            helper.cancel()
        for ended in await asyncio.gather(*helpers, return_exceptions=True):
            if isinstance(ended, BaseException) and not isinstance(ended, asyncio.CancelledError):
                raise ended

    async def _settle_down(self) -> None:
        """Nothing goes wrong any more; everybody says what he has not said."""
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for task in self.tasks:
            if not task.cancelled():
                task.result()
        clocks, kinds = self.wire.trouble.clocks, self.wire.trouble.kinds
        self.wire.trouble = Trouble(clocks=clocks, kinds=kinds)
        for gateway in self.gateways.values():
            gateway.cut = False
        await asyncio.sleep(0)
        if not self._send(surely=True):
            raise Broken("a ledger is down for ever")
        await asyncio.sleep(TTL_S * (1 + 2 * DRIFT) + 4 * RENEW_S)
        for process in self.processes:
            process.ledger.sweep()
            process.drain()
        self._after()
        digest = self.processes[0].ledger.config.digest
        for gateway in self.gateways.values():
            if gateway.leases.tree.config.digest != digest:
                raise Broken(f"{gateway.name} works by another file than the ledger")
            if gateway.leases.age_s() > 2 * RENEW_S:
                raise Broken(f"{gateway.name} knows nothing newer than {gateway.leases.age_s()} s")
        for process in self.processes:
            if process.ledger.config.digest != digest:
                raise Broken(f"ledger {process.shard} works by another file than the first")
        await self._use_what_is_left()

    async def _use_what_is_left(self) -> None:
        """What nobody has spent, somebody can have: nothing is held for nobody."""
        for process in self.processes:
            for state in process.ledger.state():
                if (
                    "@" in state.account
                    or process.ledger.tree.shard(state.account) != process.shard
                ):
                    continue
                roomy = (state.reach_tokens or 0) >= 700 and (state.reach_us or 0) >= 60_000_000
                if not roomy or not process.ledger.tree.exists(state.account):
                    continue
                gateway = self.gateways[self.rng.choice(sorted(self.gateways))]
                ask = BudgetAsk("r", state.account, "tiny", "tiny", Operation.CHAT, 100, 1, 16)
                try:
                    hold = await gateway.leases.reserve(ask)
                except BudgetExhausted as error:
                    raise Broken(f"{state.account} is refused, but has {state}") from error
                hold.release()

    async def _end(self) -> None:
        """Gateways go; all that was lent returns, and all that was done is charged, once."""
        for gateway in self.gateways.values():
            await gateway.leases.close()
            await gateway.follower.close()
            await asyncio.gather(*gateway.copies, return_exceptions=True)
        await asyncio.sleep(TTL_S * (1 + 2 * DRIFT) + 0.1)
        for process in self.processes:
            process.ledger.sweep()
            process.drain()
            if len(set(process.told)) != len(process.told):
                raise Broken(f"ledger {process.shard} told a threshold twice")
            if process.ledger.stats.conflicts:
                raise Broken(f"ledger {process.shard} saw a reservation of somebody else's")
            self._charged(process)
        self._after()
        self.outcome.checks = sum(watch.checks for watch in self.watches)
        self.outcome.borrowed = sum(watch.borrowing for watch in self.watches)
        for process in self.processes:
            process.close()

    def _charged(self, process: LedgerProcess) -> None:
        state = process.ledger._books.state
        for name, amount in state.held.items():
            if amount != ZERO:
                raise Broken(f"{amount} of {name} are held by nobody")
        least: dict[str, Amount] = {}
        most: dict[str, Amount] = {}
        for job in self.jobs:
            if job.shard != process.shard:
                continue
            for node in process.ledger.tree.path(job.leaf):
                least[node.name] = least.get(node.name, ZERO) + job.least
                most[node.name] = most.get(node.name, ZERO) + job.most
        for name, account in state.accounts.items():
            if "~" in name:
                continue  # forgotten between windows
            for place, found in enumerate((account.total.gpu_us, account.total.tokens)):
                low, high = (_pair(each.get(name, ZERO))[place] for each in (least, most))
                if not low <= found <= high:
                    raise Broken(
                        f"{name} was charged {found} {('gpu_us', 'tokens')[place]}, not {low}"
                        + ("" if low == high else f" to {high}")
                    )


def _pair(amount: Amount) -> tuple[int, int]:
    return amount.gpu_us, amount.tokens
