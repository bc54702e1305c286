"""What the budget ledger costs: ``python -m benchmarks.ledger.run``.

- ``reserve``: one request at a gateway with a valid lease, in microseconds of wall time per call
  (reserve, one ``consumed``, settle), 20,000 times.
- ``settlements``: reports per second through the ledger to disk, engine row and settlement of each
  request, in batches of 512 requests with one transaction each (``synchronous=FULL``).
- ``settlements_tree``: the same where each request is charged to a user, a part, a department, and
  its hour, the departments in one cohort that borrow: five accounts a request instead of one.
- ``restart``: seconds to open a ledger with a million reservations on disk and a thousand open.

Goals: reserve p50 at most 5 us; 20,000 settlements a second; restart under 2 s. No randomness is
used; every figure is one run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Any

from governance.budget.config import BudgetsConfig
from governance.budget.leases import LeaseBook
from governance.budget.ledger import BudgetLedger
from governance.budget.messages import (
    LeaseAsk,
    MeterReport,
    MeterRow,
    RenewReply,
    RenewRequest,
    Settlement,
)
from governance.budget.tree import Tree
from governance.types import Amount, BudgetAsk, Operation, Usage

RESULTS = Path(__file__).parent / "results" / "ledger.json"
BUDGETS = BudgetsConfig.model_validate(
    {
        "default_account": {"window": "month", "tokens": 10**14, "gpu_seconds": 10**9},
        "lease": {"ttl_s": 60, "renew_s": 1},
    }
)
ASK = BudgetAsk("req", "d1", "tiny", "tiny", Operation.CHAT, 400, 1, 64)


TREE = BudgetsConfig.model_validate(
    {
        "cohorts": {"all": {"window": "month"}},
        "accounts": {
            f"d{n}": {
                "cohort": "all",
                "window": "month",
                "tokens": 10**13,
                "gpu_seconds": 10**8,
                "lend": {"tokens": 10**12},
                "borrow": {"tokens": 10**12},
                "also": [{"window": "hour", "tokens": 10**12}],
                "parts": {
                    "bot": {
                        "window": "day",
                        "tokens": 10**12,
                        "match": {"roles": ["bot"]},
                        "per_user": {"window": "day", "tokens": 10**11},
                    }
                },
            }
            for n in range(10)
        },
        "lease": {"ttl_s": 60, "renew_s": 1},
    }
)
FLAT_ACCOUNTS = tuple(f"d{n}" for n in range(10))
TREE_ACCOUNTS = tuple(f"d{n % 10}/bot~u{n}" for n in range(200))


def _ledger(folder: str, budgets: BudgetsConfig = BUDGETS) -> BudgetLedger:
    return BudgetLedger.open(
        Path(folder) / "ledger.sqlite", budgets, clock=_clock, monotonic=time.monotonic
    )


def _clock() -> int:
    return time.time_ns() // 1000


def _quantiles(taken_ns: list[int]) -> dict[str, float]:
    taken_ns.sort()
    return {f"p{q}_us": round(taken_ns[len(taken_ns) * q // 100] / 1000, 2) for q in (50, 90, 99)}


def reserve(calls: int = 20_000) -> dict[str, Any]:
    """Time of each call of a gateway's lease book, out of a valid lease."""

    async def main(folder: str) -> dict[str, Any]:
        ledger = _ledger(folder)

        async def renew(request: RenewRequest) -> RenewReply:
            return ledger.renew(request)

        book = LeaseBook("bench", renew, clock=_clock, monotonic=time.monotonic, tree=Tree(BUDGETS))
        # A cushion of five seconds' use, as a busy gateway has.
        for _ in range(20):
            for hold in [await book.reserve(ASK) for _ in range(200)]:
                hold.settle(Usage(100, 64), 1000)
            await asyncio.sleep(0.02)
        taken: dict[str, list[int]] = {"reserve": [], "consumed": [], "settle": []}
        for number in range(calls):
            if number % 100 == 0:
                # Lets the renewal in, as other requests would.
                await asyncio.sleep(0)
            start = time.perf_counter_ns()
            hold = await book.reserve(ASK)
            reserved = time.perf_counter_ns()
            hold.consumed(1, 100)
            consumed = time.perf_counter_ns()
            hold.settle(Usage(100, 64), 1000)
            settled = time.perf_counter_ns()
            taken["reserve"].append(reserved - start)
            taken["consumed"].append(consumed - reserved)
            taken["settle"].append(settled - consumed)
        await book.close()
        ledger.close()
        return {"calls": calls, **{name: _quantiles(times) for name, times in taken.items()}}

    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(main(folder))


def _request(
    first: int, count: int, accounts: tuple[str, ...] = FLAT_ACCOUNTS
) -> tuple[MeterReport, tuple[Settlement, ...]]:
    """Engine rows and settlements of so many requests, over some accounts."""
    numbers, most = range(first, first + count), len(accounts)
    rows = tuple(
        MeterRow(
            f"rsv_bench_{n}", f"req_{n}", "bench", accounts[n % most], "tiny", "tiny", 900, 100,
            800, 90, 10, 100, 64, ended=True, delivered=True,
        )
        for n in numbers
    )  # fmt: skip
    settlements = tuple(
        Settlement(
            f"rsv_bench_{n}", accounts[n % most], f"req_{n}", "tiny", "tiny", 900, Amount(900, 164),
            final=True, prompt_bytes=400, prompt_tokens=100,
        )
        for n in numbers
    )  # fmt: skip
    seq = first // count + 1
    return MeterReport("r1", "tiny", "cpu", "e1", seq, 1, 0, 0, 0, 0, 0, False, rows), settlements


def settlements(
    requests: int = 20_480,
    batch: int = 512,
    budgets: BudgetsConfig = BUDGETS,
    accounts: tuple[str, ...] = FLAT_ACCOUNTS,
) -> dict[str, Any]:
    """Reports per second, on disk."""
    asks = tuple(LeaseAsk(a, Amount(), Amount(10**9, 10**9), Amount()) for a in accounts)
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        ledger = _ledger(folder, budgets)
        ledger.renew(RenewRequest("bench", 1, asks, (), False))
        work = [_request(first, batch, accounts) for first in range(0, requests, batch)]
        start, cpu = time.perf_counter(), time.process_time()
        for number, (report, said) in enumerate(work):
            with ledger.batch():
                ledger.report(report)
                ledger.renew(RenewRequest("bench", number + 2, asks, said, False))
        took, cpu = time.perf_counter() - start, time.process_time() - cpu
        spent = sum(amount.tokens for amount in ledger.totals().values())
        ledger.close()
    if spent != requests * 164:
        raise RuntimeError("the ledger lost something")
    return {
        "requests": requests,
        "batch": batch,
        "reports_per_s": round(2 * requests / took),
        "cpu_us_per_report": round(cpu * 1e6 / requests / 2, 1),
    }


def restart(reservations: int = 1_000_000, still_open: int = 1_000) -> dict[str, Any]:
    """Seconds from opening the file to the first answer, with so many reservations on disk."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        ledger = _ledger(folder)
        asks = tuple(LeaseAsk(f"d{i}", Amount(), Amount(10**9, 10**9), Amount()) for i in range(10))
        ledger.renew(RenewRequest("bench", 1, asks, (), False))
        report, _ = _request(0, still_open)
        ledger.report(report)
        ledger.close()
        path = Path(folder) / "ledger.sqlite"
        # Written directly: through the ledger it would take minutes and leave the same rows.
        with sqlite3.connect(path) as connection:
            connection.executemany(
                "INSERT INTO reservation (id, account, gateway_id, gpu_us, tokens, open, settled,"
                " ended, unsettled, changed_us) VALUES (?, ?, 'old', 900, 164, 0, 1, 1, NULL, ?)",
                ((f"rsv_old_{n}", f"d{n % 10}", _clock()) for n in range(reservations)),
            )
        connection.close()
        size = path.stat().st_size
        start = time.perf_counter()
        ledger = _ledger(folder)
        reply = ledger.renew(RenewRequest("bench", 2, asks, (), False))
        took = time.perf_counter() - start
        ledger.close()
    return {
        "reservations": reservations,
        "open": still_open,
        "leases": len(reply.leases),
        "file_bytes": size,
        "seconds": round(took, 3),
    }


def main() -> None:
    """Measure all, print and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    out = parser.parse_args().out
    result = {
        "method": __doc__,
        "seed": None,
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "reserve": reserve(),
        "settlements": settlements(),
        "settlements_tree": settlements(budgets=TREE, accounts=TREE_ACCOUNTS),
        "restart": restart(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
