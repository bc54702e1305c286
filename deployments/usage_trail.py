"""What the audit trail says of usage: rows for tops, forecasts, simulations, reports and exports.

Every figure comes from the view ``v_usage``, so that whoever doubts one can ask the trail.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from zoneinfo import ZoneInfo

from governance.finops.burn import HOUR_US
from governance.finops.forecast import History
from governance.finops.showback import Change, UsageRow
from governance.finops.simulate import Past
from governance.types import Amount, Principal, PrincipalKind

if TYPE_CHECKING:
    import duckdb

GROUPS: Final = ("department", "part", "application", "person", "account", "model")
"""What usage can be grouped by."""
QUANTITIES: Final = ("gpu_us", "tokens")
_COLUMN: Final = {"gpu_us": "charged_us", "tokens": "tokens"}


@dataclass(frozen=True, slots=True)
class Top:
    """Sums under one name, and how they came about."""

    name: str
    requests: int
    gpu_us: int
    charged_us: int
    tokens: int
    share_percent: float
    """Of what was charged to all names."""
    buckets: tuple[int, ...]
    """Charged device-microseconds over the period, in equal parts."""


def top(
    connection: duckdb.DuckDBPyConnection,
    by: str,
    from_us: int,
    until_us: int,
    *,
    department: str | None = None,
    parts: int = 24,
) -> list[Top]:
    """Who used most in a period, the dearest first.

    Args:
        connection: As ``governance.audit.query.connect`` gives it.
        by: One of ``GROUPS``.
        from_us: Beginning of the period.
        until_us: End of the period.
        department: Only this one.
        parts: Parts of the period for ``Top.buckets``.
    """
    if by not in GROUPS:
        raise ValueError(f"by must be one of {', '.join(GROUPS)}")
    name = "coalesce(department || '/' || part, department)" if by == "part" else by
    rows = connection.execute(
        f"""
        SELECT
            coalesce({name}, '(none)') AS name,
            least(floor((epoch_us(ended_ts) - $from) / ($until - $from) * $parts), $parts - 1)
                ::INTEGER AS part,
            count(*),
            sum(gpu_us)::BIGINT,
            sum(charged_us)::BIGINT,
            sum(tokens)::BIGINT
        FROM v_usage
        WHERE epoch_us(ended_ts) >= $from AND epoch_us(ended_ts) < $until
            AND ($department IS NULL OR department = $department)
        GROUP BY 1, 2
        """,  # noqa: S608 - made of our own names
        {"from": from_us, "until": until_us, "parts": parts, "department": department},
    ).fetchall()
    sums: dict[str, list[int]] = {}
    shapes: dict[str, list[int]] = {}
    for key, place, *figures in rows:
        known = sums.setdefault(key, [0, 0, 0, 0])
        for index, figure in enumerate(figures):
            known[index] += figure
        shapes.setdefault(key, [0] * parts)[place] += figures[2]
    everything = sum(figures[2] for figures in sums.values())
    found = []
    for key, (requests, gpu_us, charged_us, tokens) in sums.items():
        share = round(100 * charged_us / everything, 1) if everything else 0.0
        shape = tuple(shapes[key])
        found.append(Top(key, requests, gpu_us, charged_us, tokens, share, shape))
    return sorted(found, key=lambda each: (-each.charged_us, -each.tokens, each.name))


def histories(
    connection: duckdb.DuckDBPyConnection, now_us: int, zones: Mapping[str, str]
) -> dict[tuple[str, str], History]:
    """Full hours up to now by account and quantity, from the first charge in the trail on.

    Args:
        connection: The trail.
        now_us: The hour that runs is left out.
        zones: Time zone by account; accounts that are not in it are left out.
    """
    hour_us = now_us - now_us % HOUR_US
    rows = connection.execute(
        "SELECT account, epoch_us(hour), charged_us, tokens FROM v_budget_burn"
        " WHERE epoch_us(hour) < ? ORDER BY hour",
        [hour_us],
    ).fetchall()
    first_us = min((row[1] for row in rows), default=hour_us)
    count = (hour_us - first_us) // HOUR_US
    amounts = {(account, quantity): [0] * count for account in zones for quantity in QUANTITIES}
    for account, start_us, charged_us, tokens in rows:
        if account in zones:
            place = (start_us - first_us) // HOUR_US
            amounts[account, "gpu_us"][place] = charged_us
            amounts[account, "tokens"][place] = tokens
    return {
        (account, quantity): History(first_us, tuple(values), zones[account])
        for (account, quantity), values in amounts.items()
    }


def spent(
    connection: duckdb.DuckDBPyConnection, starts: Mapping[str, int], until_us: int
) -> dict[str, Amount]:
    """What accounts were charged since a moment each, by the trail; their parts counted."""
    found = {}
    for account, from_us in starts.items():
        row = connection.execute(
            "SELECT coalesce(sum(charged_us), 0)::BIGINT, coalesce(sum(tokens), 0)::BIGINT"
            " FROM v_usage WHERE list_contains(path, ?) AND epoch_us(ended_ts) >= ?"
            " AND epoch_us(ended_ts) < ?",
            [account, from_us, until_us],
        ).fetchone()
        assert row is not None
        found[account] = Amount(*row)
    return found


def totals(connection: duckdb.DuckDBPyConnection) -> dict[str, Amount]:
    """What departments were charged ever, by the trail."""
    rows = connection.execute(
        "SELECT department, sum(charged_us)::BIGINT, sum(tokens)::BIGINT FROM v_usage"
        " WHERE department IS NOT NULL GROUP BY department"
    ).fetchall()
    return {name: Amount(charged_us, tokens) for name, charged_us, tokens in rows}


def past(connection: duckdb.DuckDBPyConnection, from_us: int) -> Iterator[Past]:
    """Requests of the past with their callers, those that budgets refused included."""
    callers = _Callers()
    charged = connection.execute(
        "SELECT epoch_us(ended_ts), principal_kind, subject_key, department, roles, application,"
        " charged_us, tokens FROM v_usage WHERE epoch_us(ended_ts) >= ? AND department IS NOT NULL"
        " ORDER BY ended_ts",
        [from_us],
    )
    while rows := charged.fetchmany(10_000):
        for at_us, kind, key, department, roles, application, charged_us, tokens in rows:
            who = callers.of(kind, key, department, roles, application)
            yield Past(at_us, who, Amount(charged_us, tokens))
    refused = connection.execute(
        "SELECT epoch_us(coalesce(ts_end, ts)), principal_kind, subject_key, department, roles,"
        " CASE WHEN principal_kind = 'key' THEN key_id ELSE client_id END FROM audit"
        " WHERE event_type = 'inference.refused' AND error_code = 'budget_exhausted'"
        " AND ts_us >= ? AND department IS NOT NULL ORDER BY ts",
        [from_us],
    )
    while rows := refused.fetchmany(10_000):
        for at_us, kind, key, department, roles, application in rows:
            who = callers.of(kind, key, department, roles, application)
            yield Past(at_us, who, Amount(), refused=True)


class _Callers:
    """Callers, each kept once: there are far fewer of them than requests."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Principal] = {}

    def of(
        self,
        kind: str | None,
        key: str | None,
        department: str,
        roles: list[str] | None,
        app: str | None,
    ) -> Principal:
        """As much of a caller as decides which account is charged."""
        name = (kind, key, department, tuple(roles or ()), app)
        found = self._known.get(name)
        if found is None:
            found = self._known[name] = _principal(kind, key, department, roles, app)
        return found


def _principal(
    kind: str | None, key: str | None, department: str, roles: list[str] | None, app: str | None
) -> Principal:
    known = PrincipalKind(kind) if kind in set(PrincipalKind) else PrincipalKind.SERVICE
    subject = app if known is PrincipalKind.KEY and app else (key or "unknown")
    return Principal(
        known,
        subject,
        "trail",
        department,
        frozenset(roles or ()),
        key or "unknown",
        client_id=None if known is PrincipalKind.KEY else app,
    )


def usage_rows(
    connection: duckdb.DuckDBPyConnection, first: date, after: date, zone: str
) -> Iterator[UsageRow]:
    """Usage on the days of a period, days by a time zone."""
    result = connection.execute(
        """
        SELECT
            timezone($zone, timezone('UTC', ended_ts))::DATE AS day,
            department, part, application, person, model,
            count(*),
            sum(gpu_us)::BIGINT, sum(charged_us)::BIGINT,
            sum(input_tokens)::BIGINT, sum(output_tokens)::BIGINT
        FROM v_usage
        WHERE epoch_us(ended_ts) >= $from AND epoch_us(ended_ts) < $until
        GROUP BY ALL ORDER BY ALL
        """,
        {"zone": zone, "from": midnight_us(first, zone), "until": midnight_us(after, zone)},
    )
    while rows := result.fetchmany(10_000):
        for row in rows:
            yield UsageRow(*row)


def refusals(
    connection: duckdb.DuckDBPyConnection, first: date, after: date, zone: str
) -> dict[str, int]:
    """Requests of a period that a budget refused or cut short, by department."""
    rows = connection.execute(
        "SELECT department, count(*) FROM v_requests WHERE error_code = 'budget_exhausted'"
        " AND epoch_us(ts) >= ? AND epoch_us(ts) < ? AND department IS NOT NULL GROUP BY 1",
        [midnight_us(first, zone), midnight_us(after, zone)],
    ).fetchall()
    return dict(rows)


def changes(
    connection: duckdb.DuckDBPyConnection, first: date, after: date, zone: str
) -> dict[str, list[Change]]:
    """Overrides, transfers and thresholds of a period, by department."""
    rows = connection.execute(
        """
        SELECT DISTINCT department, ts, budget_account, event_type, state, subject_key,
            reason_code, detail
        FROM audit
        WHERE event_type IN ('budget.set', 'budget.transfer', 'budget.threshold')
            AND ts_us >= ? AND ts_us < ?
        ORDER BY ts, budget_account
        """,
        [midnight_us(first, zone), midnight_us(after, zone)],
    ).fetchall()
    found: dict[str, list[Change]] = {}
    for department, at, account, kind, state, by, reason, detail in rows:
        known = _CHANGES[kind] if state in {None, "overridden"} else f"{_CHANGES[kind]} {state}"
        what = f"{known} {_told(detail)}".strip()
        change = Change(f"{at:%Y-%m-%d %H:%MZ}", account or "", what, by, reason)
        found.setdefault(department or "", []).append(change)
    return found


_CHANGES = {
    "budget.set": "override",
    "budget.transfer": "transfer",
    "budget.threshold": "threshold",
}


def _told(detail: str | None) -> str:
    """Values of a record's detail that people read."""
    try:
        values: Any = json.loads(detail or "{}")
    except ValueError:
        return ""
    if not isinstance(values, dict):
        return ""
    said = []
    if "threshold" in values:
        what = "GPU time" if values.get("quantity") == "gpu_us" else "tokens"
        return f"{values['threshold']} % of {what}"
    if "source" in values:
        said.append(f"from {values['source']} to {values.get('target')}:")
    if values.get("gpu_us"):
        said.append(f"{values['gpu_us'] / 1e6:g} GPU seconds")
    if values.get("tokens"):
        said.append(f"{values['tokens']} tokens")
    return " ".join(said)


def midnight_us(day: date, zone: str) -> int:
    """First microsecond of a local day."""
    local = datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(zone))
    epoch = datetime(1970, 1, 1, tzinfo=ZoneInfo("UTC"))
    return (local.astimezone(ZoneInfo("UTC")) - epoch) // timedelta(microseconds=1)
