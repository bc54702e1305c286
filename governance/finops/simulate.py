"""What a budgets file would have done to the requests on record: who would have been refused, when.

The requests of the past are played to a real ``BudgetLedger`` in a scratch folder, whose clock
shows what the clock showed then. So the rules are not a copy of the rules: windows, parts, users,
borrowing, lending, overdraft and thresholds are decided by the code that decides them in
production.

What is simpler than production, on purpose:

- A request is decided and charged in one moment, when it ended. Gateways hold no leases beyond it,
  so nobody is refused for want of what others hold: the ledger's edge, without its seconds.
- It wants what it really took, where production reserves chunk by chunk. One that does not fit
  would have been refused, or cut short where something was left: both count as refused here, with
  what was left. At an account that is ``soft``, and all above it are, what runs is finished: there
  a request is refused only where nothing is left at all.
- Requests that a budget refused in the past took nothing, and nobody knows what they would have
  taken. They are played with the median of what the same caller's requests took (else the
  department's, else anybody's) and counted as ``guessed``.
- People do not change what they ask because of a refusal. Overrides and transfers of the past are
  not played: the file alone counts. Each window begins with nothing spent at the first request.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Final

from governance.budget.config import BudgetsConfig
from governance.budget.ledger import BudgetLedger
from governance.budget.messages import (
    AccountState,
    LeaseAsk,
    LeaseState,
    RenewRequest,
    Settlement,
)
from governance.budget.tree import Tree
from governance.errors import NoAccount
from governance.types import Amount, Principal

SECOND_US: Final = 1_000_000
SWEEP_US: Final = 3_600 * SECOND_US
QUARTER_US: Final = 900 * SECOND_US
"""Windows end at a full quarter of an hour, in whatever time zone."""
ZERO: Final = Amount()
_GATEWAY: Final = "simulation"


@dataclass(frozen=True, slots=True)
class Past:
    """A request of the past."""

    ts_us: int
    """When it ended, or was refused."""
    principal: Principal
    took: Amount
    """What it was charged; nothing where it was refused."""
    refused: bool = False
    """By a budget, before it began."""


@dataclass(slots=True)
class Fate:
    """What would have become of the requests of one account: the one that they are charged to."""

    account: str
    requests: int = 0
    guessed: int = 0
    """Of them, those that a budget refused in the past; what they would have taken is a guess."""
    refused: int = 0
    first_us: int | None = None
    """When the first one would have been refused."""
    last_us: int | None = None
    asked: Amount = ZERO
    served: Amount = ZERO
    reasons: dict[str, int] = field(default_factory=dict)
    """Refusals by the account that had nothing left, and its window."""


@dataclass(slots=True)
class Level:
    """What would have become of a department, a part or a further window."""

    account: str
    window: str
    limit_us: int | None
    limit_tokens: int | None
    spent: Amount = ZERO
    """The most that any window would have spent."""
    borrowed: Amount = ZERO
    """The most that it would have borrowed at any time."""
    exhausted_us: int | None = None
    """When it first would have had nothing left for somebody."""
    thresholds: dict[str, int] = field(default_factory=dict)
    """Quantity and threshold in per cent, as ``gpu_us 80``, to how many windows crossed it."""


@dataclass(slots=True)
class Simulation:
    """The whole result."""

    requests: int
    from_us: int
    until_us: int
    refused_then: int
    """Requests that budgets really refused."""
    refused: int
    unknown: int
    """Requests of departments that have no account in the file: they would get 403."""
    fates: tuple[Fate, ...]
    levels: tuple[Level, ...]


def simulate(config: BudgetsConfig, requests: Iterable[Past], folder: Path) -> Simulation:
    """Play the requests of the past under a budgets file.

    Args:
        config: The candidate.
        requests: In any order.
        folder: Scratch folder, empty; on memory where there is such a place, for speed.
    """
    # One ledger plays all: how accounts are spread over several changes no decision.
    config = config.model_copy(update={"shards": 1})
    known = sorted(requests, key=lambda past: past.ts_us)
    play = _Play(config, known, folder)
    try:
        return play.run()
    finally:
        play.ledger.close()


class _Play:
    """One run."""

    def __init__(self, config: BudgetsConfig, requests: list[Past], folder: Path) -> None:
        self.requests = requests
        self.now_us = requests[0].ts_us if requests else 0
        self.tree = Tree(config)
        self.ledger = BudgetLedger.open(
            folder / "simulation.sqlite",
            config,
            clock=lambda: self.now_us,
            monotonic=lambda: self.now_us / SECOND_US,
        )
        self._seq = 0
        self._swept_us = self.now_us
        self._guesses = _Guesses(requests)
        self._fates: dict[str, Fate] = {}
        self._levels: dict[str, Level] = {}
        self._unknown = 0
        self._touched: set[str] = set()
        self._hard: dict[str, bool] = {}
        self._short: set[str] = set()
        """Accounts whose last request was refused."""

    def run(self) -> Simulation:
        """All requests, a transaction for those of one second."""
        for _, second in groupby(self.requests, key=lambda past: past.ts_us // SECOND_US):
            batch = list(second)
            if batch[0].ts_us // QUARTER_US != self.now_us // QUARTER_US:
                self._look()  # before a window ends, and with it what was spent in it
            self.now_us = batch[0].ts_us
            with self.ledger.batch():
                for past in batch:
                    self.now_us = past.ts_us
                    self._play(past)
            self._sweep()
        self._look()
        self._take_alerts()
        fates = sorted(self._fates.values(), key=lambda fate: (-fate.refused, fate.account))
        return Simulation(
            requests=len(self.requests),
            from_us=self.requests[0].ts_us if self.requests else 0,
            until_us=self.requests[-1].ts_us if self.requests else 0,
            refused_then=sum(past.refused for past in self.requests),
            refused=sum(fate.refused for fate in fates),
            unknown=self._unknown,
            fates=tuple(fates),
            levels=tuple(self._levels[name] for name in sorted(self._levels)),
        )

    def _play(self, past: Past) -> None:
        try:
            leaf = self.tree.leaf(past.principal)
        except NoAccount:
            self._unknown += 1
            return
        fate = self._fates.setdefault(leaf, Fate(leaf))
        fate.requests += 1
        took = past.took
        if past.refused:
            fate.guessed += 1
            took = self._guesses.of(past.principal)
        fate.asked += took
        need = took if self._stops(leaf) else Amount(min(took.gpu_us, 1), min(took.tokens, 1))
        if self._may_fit(leaf, need) and self._ask(leaf, need):
            self._settle(leaf, took)
            fate.served += took
            self._short.discard(leaf)
        else:
            self._refuse(leaf, need, fate)
            self._short.add(leaf)
        self._touched.add(leaf)

    def _stops(self, leaf: str) -> bool:
        """Whether some account on the path is not soft; the file alone decides that."""
        known = self._hard.get(leaf)
        if known is None:
            known = self._hard[leaf] = self._state(leaf).stops
        return known

    def _may_fit(self, leaf: str, need: Amount) -> bool:
        """Whether it is worth asking; only looked at where the last request was refused."""
        return leaf not in self._short or _fits(need, self._state(leaf))

    def _ask(self, leaf: str, need: Amount) -> bool:
        """Whether the ledger lends what is needed."""
        leases = self._renew((LeaseAsk(leaf, ZERO, need, ZERO),))
        hold = next((lease.hold for lease in leases if lease.account == leaf), ZERO)
        granted = hold.gpu_us >= need.gpu_us and hold.tokens >= need.tokens
        if not granted:
            self._return()
        return granted

    def _settle(self, leaf: str, took: Amount) -> None:
        number = f"rsv_{_GATEWAY}_{self._seq + 1}"
        said = Settlement(number, leaf, number, "any", "any", took.gpu_us, took, final=False)
        if self._renew((), said):
            self._return()

    def _refuse(self, leaf: str, need: Amount, fate: Fate) -> None:
        state = self._state(leaf)
        fate.refused += 1
        fate.first_us = self.now_us if fate.first_us is None else fate.first_us
        fate.last_us = self.now_us
        short_us = state.reach_us is not None and need.gpu_us > state.reach_us
        tight = state.tight_us if short_us else (state.tight_tokens or state.tight_us)
        account = leaf if tight is None else tight.account
        quantity = "GPU time" if short_us else "tokens"
        window = "" if tight is None else f" per {tight.window}"
        reason = f"{account}: {quantity}{window}"
        fate.reasons[reason] = fate.reasons.get(reason, 0) + 1
        if "~" not in account:
            level = self._level(account)
            if level.exhausted_us is None:
                level.exhausted_us = self.now_us

    def _return(self) -> None:
        """Give back what is held: the second renewal proves that the first was heard of."""
        for _ in range(2):
            if not self._renew(()):
                return

    def _renew(self, asks: tuple[LeaseAsk, ...], *said: Settlement) -> tuple[LeaseState, ...]:
        """One message to the ledger; a lease that is not asked for comes to its end."""
        self._seq += 1
        return self.ledger.renew(
            RenewRequest(_GATEWAY, self._seq, asks, said, closing=False)
        ).leases

    def _look(self) -> None:
        """Note what accounts have spent and borrowed in the windows that still run."""
        with self.ledger.batch():
            names = {node.name for leaf in self._touched for node in self.tree.path(leaf)}
            for name in names:
                if "~" not in name:
                    state, level = self._state(name), self._level(name)
                    level.spent = _largest(level.spent, state.spent)
                    level.borrowed = _largest(level.borrowed, state.borrowed)
        self._touched.clear()

    def _level(self, account: str) -> Level:
        level = self._levels.get(account)
        if level is None:
            state = self._state(account)
            level = Level(account, state.window, state.limit_us, state.limit_tokens)
            self._levels[account] = level
        return level

    def _state(self, account: str) -> AccountState:
        return self.ledger.state(account)[0]

    def _sweep(self) -> None:
        if self.now_us - self._swept_us >= SWEEP_US:
            self._swept_us = self.now_us
            self._take_alerts()
            self.ledger.sweep()

    def _take_alerts(self) -> None:
        """Count thresholds that were crossed; nobody else needs the events."""
        while alerts := self.ledger.alerts(1000):
            for _, alert in alerts:
                if "~" in alert["account"]:
                    continue
                crossed = self._level(alert["account"]).thresholds
                name = f"{alert['quantity']} {alert['threshold']}"
                crossed[name] = crossed.get(name, 0) + 1
            self.ledger.alerts_done(alerts[-1][0])
        while events := self.ledger.events(1000):
            self.ledger.events_written(events[-1][0])


class _Guesses:
    """Medians of what requests took, by caller and by department."""

    def __init__(self, requests: Iterable[Past]) -> None:
        self._all: list[Amount] = []
        self._by: dict[str, list[Amount]] = {}
        for past in requests:
            if not past.refused:
                self._all.append(past.took)
                self._by.setdefault(past.principal.department, []).append(past.took)
                self._by.setdefault(past.principal.key, []).append(past.took)
        self._known: dict[str, Amount] = {}

    def of(self, principal: Principal) -> Amount:
        """What a request would have taken."""
        name = principal.key if principal.key in self._by else principal.department
        if name not in self._known:
            found = self._by.get(name, self._all) or [ZERO]
            self._known[name] = Amount(
                round(median(each.gpu_us for each in found)),
                round(median(each.tokens for each in found)),
            )
        return self._known[name]


def _fits(need: Amount, state: AccountState) -> bool:
    """Whether a request may fit; the ledger has the last word, since several may borrow."""
    return (state.reach_us is None or need.gpu_us <= state.reach_us) and (
        state.reach_tokens is None or need.tokens <= state.reach_tokens
    )


def _largest(a: Amount, b: Amount) -> Amount:
    return Amount(max(a.gpu_us, b.gpu_us), max(a.tokens, b.tokens))
