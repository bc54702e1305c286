"""A showback: what each department used in a period, of what, against its budget, reconciled.

Sums of integers over rows of the audit trail. Nothing is estimated, and nothing is left out: what
no department can be named for is a department of its own (``UNKNOWN``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from decimal import Decimal
from typing import Final

UNKNOWN: Final = "(unknown)"
NO_PART: Final = "(no part)"
REST: Final = "(others)"
MOST_LINES: Final = 10
"""Most lines of a table; the rest is added up in one."""


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What was used on one day, by whom, of what."""

    day: date
    department: str | None
    part: str | None
    application: str | None
    person: str | None
    """Pseudonym."""
    model: str | None
    requests: int
    gpu_us: int
    charged_us: int
    input_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Line:
    """Sums under one name."""

    name: str
    requests: int = 0
    gpu_us: int = 0
    """Metered device-microseconds."""
    charged_us: int = 0
    """The same, weighted by the accelerator."""
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Prompt plus answer tokens."""
        return self.input_tokens + self.output_tokens

    def add(self, row: UsageRow | Line) -> None:
        """Count something in."""
        self.requests += row.requests
        self.gpu_us += row.gpu_us
        self.charged_us += row.charged_us
        self.input_tokens += row.input_tokens
        self.output_tokens += row.output_tokens


@dataclass(frozen=True, slots=True)
class Allowance:
    """A department's budget, as its account has it."""

    window: str
    limit_us: int | None
    limit_tokens: int | None
    owner: str | None
    mode: str


@dataclass(frozen=True, slots=True)
class Change:
    """Somebody changed a budget, or a threshold was crossed."""

    at: str
    account: str
    what: str
    by: str | None
    reason: str | None


@dataclass(slots=True)
class Department:
    """One department's page."""

    name: str
    total: Line
    days: list[Line] = field(default_factory=list)
    """One for each day of the period, also where nothing was used; the name is the day."""
    models: list[Line] = field(default_factory=list)
    model_days: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    """Charged device-microseconds by day, for each of ``models``."""
    parts: list[Line] = field(default_factory=list)
    applications: list[Line] = field(default_factory=list)
    persons: list[Line] = field(default_factory=list)
    people: int = 0
    """Persons who used anything."""
    refused: int = 0
    """Requests that a budget refused or cut short."""
    allowance: Allowance | None = None
    changes: list[Change] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Reconciled:
    """One department: what the ledger charged, and what the audit trail says."""

    department: str
    since: str
    """``ever``, or when the running window began."""
    ledger_us: int
    trail_us: int
    ledger_tokens: int
    trail_tokens: int

    @property
    def difference_us(self) -> int:
        """Ledger less trail, device-microseconds."""
        return self.ledger_us - self.trail_us

    @property
    def difference_tokens(self) -> int:
        """Ledger less trail."""
        return self.ledger_tokens - self.trail_tokens


@dataclass(frozen=True, slots=True)
class Price:
    """What a charged device-hour is billed at."""

    per_hour: Decimal
    currency: str
    """ISO 4217, such as ``EUR``."""

    def cost(self, charged_us: int) -> Decimal:
        """Cost to the cent, half a cent up."""
        # NOTE: divided last, so that half a cent is half a cent.
        cost = Decimal(charged_us) * self.per_hour / Decimal(3_600_000_000)
        return cost.quantize(Decimal("0.01"), "ROUND_HALF_UP")


@dataclass(slots=True)
class Showback:
    """The whole report."""

    first: date
    after: date
    """First day after the period."""
    zone: str
    total: Line
    days: list[Line]
    departments: list[Department]
    reconciled: list[Reconciled] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    price: Price | None = None


def build(
    rows: Iterable[UsageRow],
    first: date,
    after: date,
    zone: str,
    *,
    refused: Mapping[str, int] | None = None,
    allowances: Mapping[str, Allowance] | None = None,
    changes: Mapping[str, Sequence[Change]] | None = None,
    price: Price | None = None,
) -> Showback:
    """Add up a period.

    Args:
        rows: Usage on days of the period; others are an error of the caller.
        first: First day.
        after: First day after it.
        zone: Time zone of the days.
        refused: Requests that budgets refused, by department.
        allowances: Budgets by department; a department that used nothing is listed as well.
        changes: What was changed, by department.
        price: For costs; ``None`` leaves them out.
    """
    known = list(rows)
    by: dict[str, list[UsageRow]] = {name: [] for name in allowances or {}}
    for name in refused or {}:
        by.setdefault(name, [])
    for row in known:
        by.setdefault(row.department or UNKNOWN, []).append(row)
    departments = [_department(name, found, first, after) for name, found in by.items()]
    for department in departments:
        department.refused = (refused or {}).get(department.name, 0)
        department.allowance = (allowances or {}).get(department.name)
        department.changes = list((changes or {}).get(department.name, ()))
    departments.sort(key=lambda each: (-each.total.charged_us, -each.total.tokens, each.name))
    return Showback(
        first,
        after,
        zone,
        _total("total", known),
        _days(known, first, after),
        departments,
        price=price,
    )


def _department(name: str, rows: list[UsageRow], first: date, after: date) -> Department:
    models = _lines(rows, lambda row: row.model)
    return Department(
        name,
        _total(name, rows),
        _days(rows, first, after),
        models,
        _model_days(rows, models, first, after),
        _lines(rows, lambda row: row.part or NO_PART) if any(row.part for row in rows) else [],
        _lines(rows, lambda row: row.application),
        _lines([row for row in rows if row.person], lambda row: row.person),
        len({row.person for row in rows if row.person}),
    )


def _total(name: str, rows: Iterable[UsageRow | Line]) -> Line:
    total = Line(name)
    for row in rows:
        total.add(row)
    return total


def _days(rows: Iterable[UsageRow], first: date, after: date) -> list[Line]:
    days = {
        first + timedelta(days=place): Line((first + timedelta(days=place)).isoformat())
        for place in range((after - first).days)
    }
    for row in rows:
        days[row.day].add(row)
    return list(days.values())


def _model_days(
    rows: Iterable[UsageRow], models: Sequence[Line], first: date, after: date
) -> list[tuple[str, tuple[int, ...]]]:
    found = {line.name: [0] * (after - first).days for line in models}
    rest = next((name for name in found if name.startswith(REST)), UNKNOWN)
    for row in rows:
        name = row.model or UNKNOWN
        found[name if name in found else rest][(row.day - first).days] += row.charged_us
    return [(name, tuple(amounts)) for name, amounts in found.items()]


def _lines(rows: Iterable[UsageRow], key: Callable[[UsageRow], str | None]) -> list[Line]:
    """Sums by a key, the dearest first; what is beyond ``MOST_LINES`` is one line."""
    found: dict[str, Line] = {}
    for row in rows:
        name = key(row) or UNKNOWN
        found.setdefault(name, Line(name)).add(row)
    ordered = sorted(found.values(), key=lambda each: (-each.charged_us, -each.tokens, each.name))
    if len(ordered) <= MOST_LINES:
        return ordered
    rest = _total(f"{REST} {len(ordered) - MOST_LINES + 1}", ordered[MOST_LINES - 1 :])
    return [*ordered[: MOST_LINES - 1], rest]
