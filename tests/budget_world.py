"""A ledger, gateways and engines on a loop whose time stands still while anybody can work.

``run`` gives a coroutine a loop of its own in which sleeping takes no time: when nothing is left to
do, the clock jumps to the next timer. Schedules with seconds of waiting take milliseconds, and give
the same result each time.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks.budgets.virtual import START_US as START_US
from benchmarks.budgets.virtual import VirtualLoop as VirtualLoop
from benchmarks.budgets.virtual import run as run
from governance.budget.config import BudgetsConfig
from governance.budget.leases import LeaseBook
from governance.budget.ledger import BudgetLedger
from governance.budget.messages import MeterReport, MeterRow, RenewReply, RenewRequest
from governance.budget.tree import Tree
from governance.errors import InvalidRequest
from governance.types import BudgetAsk, Operation


def config(**accounts: dict[str, Any]) -> BudgetsConfig:
    """Accounts with a daily window."""
    return BudgetsConfig.model_validate(
        {"accounts": {name: {"window": "day", **limits} for name, limits in accounts.items()}}
    )


def ask(
    account: str = "hr", max_tokens: int = 100, prompt_bytes: int = 400, choices: int = 1
) -> BudgetAsk:
    """A request of a department."""
    return BudgetAsk(
        "req", account, "tiny", "tiny", Operation.CHAT, prompt_bytes, choices, max_tokens
    )


class World:
    """One ledger on disk, and whatever talks to it."""

    def __init__(self, budgets: BudgetsConfig, root: Path | None = None) -> None:
        # In memory where there is such a place: these tests are about order, not about disks.
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self._folder = None if root else tempfile.TemporaryDirectory(dir=memory)
        self.path = Path(self._folder.name if self._folder else root or "") / "ledger.sqlite"
        self.budgets = budgets
        self.skew_us = 0
        self.events: list[dict[str, Any]] = []
        self.down = False
        self.renewals = 0
        self.start()

    def clock(self) -> int:
        """Wall clock; ``skew_us`` makes it jump."""
        return START_US + self.skew_us + round((self.monotonic() - 1000.0) * 1e6)

    def monotonic(self) -> float:
        """The loop's time, or its start where no loop runs."""
        try:
            return asyncio.get_running_loop().time()
        except RuntimeError:
            return 1000.0

    def start(self) -> None:
        """Start the ledger."""
        self.ledger = BudgetLedger.open(
            self.path, self.budgets, clock=self.clock, monotonic=self.monotonic
        )
        self.down = False

    def kill(self) -> None:
        """End the ledger without a word: what was not committed is gone."""
        self.ledger._store.close()
        self.down = True

    def close(self) -> None:
        if not self.down:
            self.ledger.close()
        if self._folder:
            self._folder.cleanup()

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def renew(self, request: RenewRequest) -> RenewReply:
        """What a gateway sends with; takes a millisecond each way."""
        await asyncio.sleep(0.001)
        if self.down:
            raise ConnectionError
        self.renewals += 1
        try:
            reply = self.ledger.renew(request)
        except ValueError as error:
            raise InvalidRequest(str(error)) from None  # as the service has it
        await asyncio.sleep(0.001)
        return reply

    def book(
        self,
        gateway_id: str = "g1",
        renew: Callable[[RenewRequest], Awaitable[RenewReply]] | None = None,
    ) -> LeaseBook:
        """A gateway's leases."""
        return LeaseBook(
            gateway_id,
            renew or self.renew,
            clock=self.clock,
            monotonic=self.monotonic,
            tree=Tree(self.budgets),
        )


def row(
    number: int = 1,
    *,
    gateway_id: str = "g1",
    account: str = "hr",
    prompt: int = 10,
    answer: int = 0,
    gpu_us: int = 0,
    ended: bool = False,
    delivered: bool = True,
) -> MeterRow:
    """What an engine says of one reservation."""
    return MeterRow(
        reservation_id=f"rsv_{gateway_id}_{number}",
        request_id=f"req_{number}",
        gateway_id=gateway_id,
        account=account,
        model="tiny",
        base_model="tiny",
        gpu_us=gpu_us,
        prefill_us=gpu_us // 4,
        decode_us=gpu_us - gpu_us // 4,
        prefill_tokens=prompt,
        cached_tokens=0,
        prompt_tokens=prompt,
        decode_tokens=answer,
        ended=ended,
        delivered=delivered,
    )


def report(
    *rows: MeterRow,
    seq: int = 1,
    replica_id: str = "r1",
    epoch: str = "e1",
    accelerator: str = "cpu",
    elapsed_us: int = 0,
    busy_us: int = 0,
    unattributed_us: int = 0,
    dead: bool = False,
    running: int | None = None,
) -> MeterReport:
    """What an engine replica says."""
    return MeterReport(
        replica_id=replica_id,
        base_model="tiny",
        accelerator=accelerator,
        epoch=epoch,
        seq=seq,
        devices=1,
        elapsed_us=elapsed_us,
        busy_us=busy_us,
        attributed_us=busy_us - unattributed_us,
        unattributed_us=unattributed_us,
        running=sum(not r.ended for r in rows) if running is None else running,
        dead=dead,
        rows=rows,
    )
