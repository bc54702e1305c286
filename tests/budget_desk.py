"""A budget ledger with its clocks in hand, for tests that say one thing after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from governance.audit.schema import EventType
from governance.budget.config import BudgetsConfig
from governance.budget.ledger import BudgetLedger
from governance.budget.messages import LeaseAsk, RenewReply, RenewRequest, Settlement
from governance.types import Amount
from tests.budget_world import START_US, config

DAY_US = 86_400_000_000
LIMIT = Amount(1_000_000_000, 10_000)


class Desk:
    """A ledger with clocks in hand."""

    def __init__(self, folder: Path, budgets: BudgetsConfig | None = None) -> None:
        self.path = folder / "ledger" / "ledger.sqlite"
        self.budgets = budgets or config(
            hr={"tokens": LIMIT.tokens, "gpu_seconds": 1000}, it={"tokens": 500}
        )
        self.now_us = START_US
        self.mono_s = 50.0
        self.seq = 0
        self.open()

    def open(self) -> None:
        self.ledger = BudgetLedger.open(
            self.path, self.budgets, clock=lambda: self.now_us, monotonic=lambda: self.mono_s
        )

    def restart(self) -> None:
        self.ledger._store.close()
        self.open()

    def pass_s(self, seconds: float) -> None:
        self.now_us += round(seconds * 1e6)
        self.mono_s += seconds

    def renew(
        self,
        gateway_id: str = "g1",
        *settlements: Settlement,
        account: str = "hr",
        open: int = 0,
        need: int = 0,
        cushion: int = 0,
        seq: int | None = None,
        closing: bool = False,
    ) -> RenewReply:
        self.seq = self.seq + 1 if seq is None else seq
        ask = LeaseAsk(account, Amount(0, open), Amount(0, need), Amount(0, cushion))
        request = RenewRequest(gateway_id, self.seq, (ask,), settlements, closing)
        return self.ledger.renew(request)

    def spent(self, account: str = "hr") -> Amount:
        (found,) = self.ledger.state(account)
        return found.spent

    def events(self, kind: EventType) -> list[dict[str, Any]]:
        return [e for _, e in self.ledger.events() if e["event_type"] == kind.value]


def paid(number: int = 1, tokens: int = 100, gpu_us: int = 0, gateway_id: str = "g1") -> Settlement:
    return Settlement(
        f"rsv_{gateway_id}_{number}",
        "hr",
        "req",
        "tiny",
        "tiny",
        gpu_us,
        Amount(gpu_us, tokens),
        True,
    )
