"""Twenty real kills of a ledger under load: ``python -m benchmarks.budgets.real_kills``.

A ledger runs as a process of its own, on a disk, and is killed with SIGKILL while three gateways
serve requests out of their leases and an engine reports; each time it is started again on what the
disk has. Accounts are tight, with parts, users, a cohort that lends, a soft one and one with an
overdraft, so that the ledger decides all the time. Afterwards, from the database alone:

- every account was charged exactly what its requests cost, once;
- none has spent more than its limit, what it may borrow, and what requests took beyond what their
  gateways had reserved;
- the leases are empty one time to live after the last gateway left, and SQLite finds its file good.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.budgets.files import TTL_S, load
from benchmarks.budgets.ledger_process import LedgerProcess, wall_us
from benchmarks.budgets.parts import principal
from deployments.ledger_budgets import Budgets
from deployments.ledger_calls import LedgerCalls
from governance.budget.holds import LeaseHold
from governance.budget.leases import LeaseBook
from governance.budget.messages import MeterReport, MeterRow
from governance.budget.shards import book_of
from governance.budget.tree import Tree
from governance.errors import BudgetExhausted, GatehouseError, LedgerUnavailable
from governance.types import BudgetAsk, Operation, Usage

RESULTS = Path(__file__).parent / "results" / "real_kills.json"
KILLS = 20
SEED = 11
GATEWAYS = 3
TOKEN_US = 2_000
PROMPT = 40
FILE: dict[str, Any] = {
    "cohorts": {"biz": {"window": "day"}},
    "accounts": {
        "hr": {
            "window": "day",
            "tokens": 30_000,
            "cohort": "biz",
            "borrow": {"tokens": 10_000},
            "per_user": {"window": "day", "tokens": 15_000},
        },
        "it": {
            "window": "day",
            "tokens": 20_000,
            "cohort": "biz",
            "lend": {"tokens": 8_000},
            "parts": {
                "jobs": {
                    "window": "day",
                    "tokens": 9_000,
                    "match": {"applications": ["app-jobs"]},
                }
            },
        },
        "ops": {
            "window": "day",
            "tokens": 8_000,
            "mode": "overdraft",
            "overdraft": {"tokens": 2_000},
        },
        "sci": {"window": "day", "tokens": 10_000, "mode": "soft"},
        "big": {"window": "day", "tokens": 10**9, "gpu_seconds": 10**6},
    },
    "lease": {"ttl_s": TTL_S, "renew_s": 1},
    "chunk_tokens": 32,
}


class Load:
    """Gateways, and an engine, that go on whatever happens to the ledger."""

    def __init__(self, process: LedgerProcess, seed: int) -> None:
        self.rng = Random(seed)
        self.refused = self.stopped = self.unavailable = 0
        self.jobs: list[tuple[LeaseHold, list[int]]] = []
        """With each reservation, what the engine has done: tokens, and whether that is all."""
        self.over: dict[str, int] = {}
        """Tokens beyond what was reserved, by account."""
        self.config = load(FILE)
        self.tree = Tree(self.config)
        budgets = Budgets(self.config, wall_us()).dump()
        self.calls = [LedgerCalls(process.link, budgets) for _ in range(GATEWAYS + 1)]
        self.books = [
            LeaseBook(
                f"gw-{number}",
                self.calls[number].renew,
                clock=wall_us,
                monotonic=time.monotonic,
                tree=self.tree,
                chunk_tokens=self.config.chunk_tokens,
                renew_s=self.config.lease.renew_s,
            )
            for number in range(GATEWAYS)
        ]
        self._unreported: list[tuple[LeaseHold, list[int]]] = []
        self._seq = 0
        self._stopped = False

    async def run(self) -> None:
        """Serve until told to stop."""
        requests: set[asyncio.Task[None]] = set()
        while not self._stopped:
            request = asyncio.create_task(self._request(self.rng.choice(self.books)))
            requests.add(request)
            request.add_done_callback(requests.discard)
            await asyncio.sleep(0.01)
        for failed in await asyncio.gather(*requests, return_exceptions=True):
            if isinstance(failed, BaseException):
                raise failed

    def stop(self) -> None:
        """Begin no more requests."""
        self._stopped = True

    async def report(self) -> bool:
        """One report of the engine; whether it was taken."""
        rows = [(job, _row(*job)) for job in self._unreported]
        self._seq += 1
        made = MeterReport(
            "replica", "tiny", "cpu", "e1", self._seq, 1, 0, 0, 0, 0, len(rows), False,
            tuple(row for _, row in rows),
        )  # fmt: skip
        try:
            await self.calls[GATEWAYS].report(made)
        except GatehouseError:
            return False
        self._unreported = [
            j for j in self._unreported if not any(j is k and r.ended for k, r in rows)
        ]
        return True

    async def _request(self, book: LeaseBook) -> None:
        rng = self.rng
        who = principal(
            rng.choice(("hr", "hr", "it", "ops", "sci", "big")),
            rng.randrange(3),
            "app-jobs" if rng.random() < 0.3 else "",
        )
        most = rng.choice((16, 64, 200))
        leaf = book.charge(who).account
        try:
            hold = await book.reserve(
                BudgetAsk("req", leaf, "tiny", "tiny", Operation.CHAT, 160, 1, most)
            )
        except BudgetExhausted:
            self.refused += 1
            return
        except LedgerUnavailable:
            self.unavailable += 1
            return
        done = [0, 0]
        self.jobs.append((hold, done))
        self._unreported.append((hold, done))
        reserved = hold.reserved_tokens
        try:
            await hold.started(PROMPT)
            for _ in range(rng.randint(1, most)):
                await asyncio.sleep(TOKEN_US / 1e6)
                done[0] += 1
                if hold.consumed(1, (PROMPT + done[0]) * TOKEN_US):
                    await hold.extend()
            reserved = hold.reserved_tokens
            hold.settle(Usage(PROMPT, done[0]), (PROMPT + done[0]) * TOKEN_US)
        except (BudgetExhausted, LedgerUnavailable):
            self.stopped += 1
            reserved = hold.reserved_tokens
            hold.settle(None, None)
        done[1] = 1
        for node in self.tree.path(leaf):
            beyond = max(0, PROMPT + done[0] - reserved)
            self.over[node.name] = self.over.get(node.name, 0) + beyond


def _row(hold: LeaseHold, done: list[int]) -> MeterRow:
    gpu_us = (PROMPT + done[0]) * TOKEN_US
    return MeterRow(
        hold.id, f"req_{hold.id}", book_of(hold.id) or "", hold.reservation.account or "",
        "tiny", "tiny", gpu_us, PROMPT * TOKEN_US, gpu_us - PROMPT * TOKEN_US, PROMPT, 0, PROMPT,
        done[0], ended=bool(done[1]), delivered=bool(done[1]),
    )  # fmt: skip


async def _kills(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    process = LedgerProcess(folder)
    process.start()
    load_ = Load(process, seed)
    await load_.calls[0].ready()
    serving = asyncio.create_task(load_.run())

    async def engine() -> None:
        while True:
            await asyncio.sleep(0.2)
            await load_.report()

    reporting = asyncio.create_task(engine())
    back_s: list[float] = []
    for _ in range(kills):
        await asyncio.sleep(0.3 + load_.rng.random())
        process.kill()
        killed = time.monotonic()
        process.start()
        await load_.calls[0].ready()
        back_s.append(round(time.monotonic() - killed, 2))
    load_.stop()
    await serving
    reporting.cancel()
    await asyncio.gather(reporting, return_exceptions=True)
    for _ in range(100):
        if await load_.report():
            break
        await asyncio.sleep(0.1)
    await asyncio.gather(*(book.close() for book in load_.books))
    await asyncio.sleep(TTL_S + 1)
    states = {state.account: state for state in await load_.calls[0].state(None, True)}
    faults = _faults(process.database, load_)
    faults["still held"] = sum(s.leased.tokens + s.open.tokens for s in states.values())
    process.kill()
    return {
        "kills": len(back_s),
        "back_s": back_s,
        "requests": len(load_.jobs),
        "refused": load_.refused,
        "stopped": load_.stopped,
        "unavailable": load_.unavailable,
        "faults": faults,
        "spent": {name: s.spent.tokens for name, s in states.items() if "~" not in name},
    }


def _faults(database: Path, load_: Load) -> dict[str, int]:
    """What is wrong in the database; every figure should be 0."""
    true: dict[str, int] = {}
    of_request: dict[str, int] = {}
    for hold, done in load_.jobs:
        of_request[hold.id] = PROMPT + done[0]
        for node in load_.tree.path(hold.reservation.account):
            true[node.name] = true.get(node.name, 0) + PROMPT + done[0]
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        spent = dict(connection.execute("SELECT name, total_tokens FROM account").fetchall())
        rows = dict(connection.execute("SELECT id, tokens FROM reservation").fetchall())
        good = connection.execute("PRAGMA integrity_check").fetchone()[0]
    over_limit = 0
    for name, tokens in spent.items():
        node = load_.tree.node(name)
        if node.limit_tokens is not None:
            most = node.limit_tokens + node.overdraft.tokens + node.borrow.tokens
            over_limit += max(0, tokens - most - load_.over.get(name, 0))
    names = spent.keys() | true.keys()
    return {
        "tokens charged to accounts and not spent, or the reverse": sum(
            abs(spent.get(name, 0) - true.get(name, 0)) for name in names
        ),
        "reservations missing": len(of_request.keys() - rows.keys()),
        "reservations of nobody": len(rows.keys() - of_request.keys()),
        "reservations with other figures": sum(
            rows[name] != tokens for name, tokens in of_request.items() if name in rows
        ),
        "tokens beyond every bound": over_limit,
        "file not good": int(good != "ok"),
    }


def run(kills: int = KILLS, seed: int = SEED) -> dict[str, Any]:
    """Kill a ledger so often; ``faults`` of the result should all be 0."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        return asyncio.run(_kills(Path(folder), kills, seed))


def main() -> int:
    """Kill, print and keep the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    result = {
        "method": __doc__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "seed": options.seed,
        **run(options.kills, options.seed),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "method"}, indent=1))
    return 1 if any(result["faults"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
