"""Make a showback of the audit trail and the ledger, and render it.

The ledger knows what it charged in the window that runs, and ever; the trail has every charge with
its time. Each charge lies in one period, so where the two agree on everything ever, they agree on
each period. What differs is in the report: requests in flight, of which the ledger has been told
and the trail not yet; and parts of a trail that were deleted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any

from deployments import usage_trail
from deployments.showback_html import as_html
from deployments.showback_markdown import as_markdown
from governance.budget.tree import parts_of
from governance.finops.showback import (
    Allowance,
    Line,
    Price,
    Reconciled,
    Showback,
    build,
)
from governance.types import Amount

if TYPE_CHECKING:
    import duckdb

Json = dict[str, Any]
NOT_RECONCILED = (
    "Not reconciled: the ledger was not asked. The figures are those of the audit trail alone."
)


def make_showback(
    connection: duckdb.DuckDBPyConnection,
    first: date,
    after: date,
    zone: str,
    *,
    accounts: Sequence[Json] | None = None,
    price: Price | None = None,
    persons: bool = False,
    now_us: int | None = None,
) -> Showback:
    """Ask the trail, and hold it against the ledger.

    Args:
        connection: The whole trail, as ``governance.audit.query.connect`` gives it.
        first: First day of the period.
        after: First day after it.
        zone: Time zone of the days.
        accounts: Accounts as ``GET /v1/admin/budgets`` shows them; ``None``: not reconciled.
        price: Of a charged device-hour; ``None`` leaves costs out.
        persons: Whether persons (pseudonyms) are listed; else they are only counted.
        now_us: Wall clock; ``None`` for the system's.
    """
    now_us = round(datetime.now(UTC).timestamp() * 1e6) if now_us is None else now_us
    departments = [each for each in accounts or () if _is_department(each["account"])]
    found = build(
        usage_trail.usage_rows(connection, first, after, zone),
        first,
        after,
        zone,
        refused=usage_trail.refusals(connection, first, after, zone),
        allowances={each["account"]: _allowance(each) for each in departments},
        changes=usage_trail.changes(connection, first, after, zone),
        price=price,
    )
    if not persons:
        for each in found.departments:
            each.persons.clear()
    if accounts is None:
        found.notes.append(NOT_RECONCILED)
    else:
        until_us = usage_trail.midnight_us(after, zone)
        found.reconciled = list(_reconciled(connection, departments, until_us, now_us))
    return found


def _is_department(account: str) -> bool:
    _, part, user, window = parts_of(account)
    return part is None and user is None and window is None


def _allowance(account: Json) -> Allowance:
    return Allowance(
        account["window"],
        account["limit"]["gpu_us"],
        account["limit"]["tokens"],
        account.get("owner"),
        account.get("mode", "hard"),
    )


def _reconciled(
    connection: duckdb.DuckDBPyConnection,
    departments: Sequence[Json],
    until_us: int,
    now_us: int,
) -> Iterable[Reconciled]:
    """Each department's sums by both books: of the running window, and ever."""
    ever = usage_trail.totals(connection)
    starts = {each["account"]: each["start_at"] * 1_000_000 for each in departments}
    windows = usage_trail.spent(connection, starts, now_us)
    for each in sorted(departments, key=lambda each: str(each["account"])):
        name = each["account"]
        if starts[name] < until_us:
            since = f"window from {each['start']}"
            yield _pair(name, since, each["spent"], windows[name])
        yield _pair(name, "ever", each["total"], ever.get(name, Amount()))


def _pair(name: str, since: str, ledger: Json, trail: Amount) -> Reconciled:
    return Reconciled(name, since, ledger["gpu_us"], trail.gpu_us, ledger["tokens"], trail.tokens)


def render(found: Showback, form: str, department: str | None = None) -> str | None:
    """The report as text.

    Args:
        found: The report.
        form: ``markdown``, ``html`` or ``json``.
        department: Only this one's page; ``None`` for all.

    Returns:
        The text; ``None`` where the department is in no record and has no budget.
    """
    if department is not None:
        pages = [each for each in found.departments if each.name == department]
        if not pages:
            return None
        page = pages[0]
        found.departments, found.days = pages, page.days
        found.total = Line(page.name)
        found.total.add(page.total)
        found.reconciled = [each for each in found.reconciled if each.department == department]
    if form == "html":
        return as_html(found)
    if form == "json":
        return json.dumps(asdict(found), default=str, indent=1) + "\n"
    return as_markdown(found)
