"""Forecasts of all accounts: limits from the ledger or a file, history from the audit trail."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from deployments.usage_trail import QUANTITIES, histories, spent
from governance.budget.config import BudgetsConfig
from governance.budget.tree import ANY_SPAN, Tree
from governance.budget.windows import window_at
from governance.finops.forecast import Forecast, History, Span
from governance.finops.forecast import forecast as foretell
from governance.types import Amount

if TYPE_CHECKING:
    import duckdb

Json = dict[str, Any]
_SECOND_US = 1_000_000


@dataclass(frozen=True, slots=True)
class Subject:
    """One account in its window."""

    account: str
    window: str
    end_us: int
    limit_us: int | None
    limit_tokens: int | None
    spent: Amount
    zone: str


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is to be expected of one account and quantity."""

    account: str
    window: str
    quantity: str
    """``gpu_us`` or ``tokens``."""
    end_us: int
    limit: int | None
    spent: int
    forecast: Forecast
    week: tuple[int, ...]
    """Amounts of the last seven days by hour, for a picture."""

    def as_json(self) -> Json:
        """For scripts."""
        return asdict(self)


def from_ledger(accounts: Iterable[Json], config: BudgetsConfig) -> list[Subject]:
    """Accounts as ``GET /v1/admin/budgets`` shows them; single users are left out.

    Args:
        accounts: Account objects.
        config: Tells the time zones.
    """
    tree = Tree(config)
    return [
        Subject(
            each["account"],
            each["window"],
            each["reset_at"] * _SECOND_US,
            each["limit"]["gpu_us"],
            each["limit"]["tokens"],
            Amount(each["spent"]["gpu_us"], each["spent"]["tokens"]),
            tree.node(each["account"]).span[1],
        )
        for each in accounts
        if "~" not in each["account"]
    ]


def from_file(
    connection: duckdb.DuckDBPyConnection, config: BudgetsConfig, now_us: int
) -> list[Subject]:
    """Accounts of a budgets file, and what the trail says they spent in their windows.

    Overrides and transfers are not counted: the file alone says what is allowed.
    """
    tree = Tree(config)
    names = tree.listed()
    if config.default_account is not None:
        used = connection.execute(
            "SELECT DISTINCT department FROM v_usage WHERE department IS NOT NULL ORDER BY 1"
        ).fetchall()
        names += [name for (name,) in used if name not in names]
    found = []
    for name in names:
        node = tree.node(name)
        start_us, end_us = window_at(*node.span[:2], now_us, node.span[2])
        base = _charged(name)
        amount = spent(connection, {base: start_us}, now_us)[base]
        limit_us, limit_tokens = node.limit_us, node.limit_tokens
        found.append(
            Subject(
                name,
                node.span[0],
                end_us,
                None if limit_us is None else limit_us + node.overdraft.gpu_us,
                None if limit_tokens is None else limit_tokens + node.overdraft.tokens,
                amount,
                node.span[1],
            )
        )
    return found


def outlooks(
    connection: duckdb.DuckDBPyConnection, subjects: Iterable[Subject], now_us: int
) -> list[Outlook]:
    """Forecasts of everything that is limited, the most urgent first."""
    known = list(subjects)
    zones = {_charged(each.account): each.zone for each in known}
    past = histories(connection, now_us, zones)
    found = [
        _outlook(each, quantity, past, now_us)
        for each in known
        for quantity in QUANTITIES
        if _limit(each, quantity) is not None
    ]
    return sorted(found, key=lambda each: (-each.forecast.risk, each.account, each.quantity))


def _outlook(
    subject: Subject,
    quantity: str,
    past: Mapping[tuple[str, str], History],
    now_us: int,
) -> Outlook:
    used = subject.spent.gpu_us if quantity == "gpu_us" else subject.spent.tokens
    limit = _limit(subject, quantity)
    zone = subject.zone or ANY_SPAN[1]
    history = past.get((_charged(subject.account), quantity), History(now_us, (), zone))
    # Nothing is refused to an account in advance: what it would ask for is what counts.
    found = foretell(history, Span(subject.end_us, used, limit), now_us)
    return Outlook(
        subject.account,
        subject.window,
        quantity,
        subject.end_us,
        limit,
        used,
        found,
        history.amounts[-168:],
    )


def _limit(subject: Subject, quantity: str) -> int | None:
    return subject.limit_us if quantity == "gpu_us" else subject.limit_tokens


def _charged(account: str) -> str:
    """A further window is charged what its department is."""
    return account.partition("@")[0]
