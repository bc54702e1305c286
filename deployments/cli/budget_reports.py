"""``gatehouse budget report`` and ``export``: for departments, and for other tools."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from deployments.cli.audit import SinceUs, with_roots
from deployments.cli.budget_trail import limited, trail
from deployments.cli.client import GatewayClient
from deployments.cli.errors import CliError, Exit
from deployments.cli.options import with_gateway

if TYPE_CHECKING:
    from governance.finops.showback import Price

F = TypeVar("F", bound=Callable[..., Any])


class Amounts(click.ParamType[Decimal]):
    """A decimal that is not negative."""

    name = "amount"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> Decimal:
        """Read it without passing through a float."""
        if isinstance(value, Decimal):
            return value
        if re.fullmatch(r"\d{1,9}(\.\d{1,6})?", str(value)) is None:
            self.fail("write an amount such as 2.40", param, context)
        return Decimal(str(value))


class Period(click.ParamType[tuple[date, date]]):
    """``2026-11``, ``last-month``, ``this-month`` or ``2026-11-02..2026-11-08``: whole days."""

    name = "period"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> tuple[date, date]:
        """First day, and first day after it."""
        if isinstance(value, tuple):
            return value
        text, today = str(value), datetime.now(UTC).date()
        if text in {"this-month", "last-month"}:
            first = today.replace(day=1)
            if text == "last-month":
                first = (first - timedelta(days=1)).replace(day=1)
            return first, _next_month(first)
        try:
            if match := re.fullmatch(r"(\d{4})-(\d{2})", text):
                first = date(int(match[1]), int(match[2]), 1)
                return first, _next_month(first)
            begin, _, end = text.partition("..")
            first, last = date.fromisoformat(begin), date.fromisoformat(end)
        except ValueError:
            self.fail("write 2026-11, last-month or 2026-11-02..2026-11-08", param, context)
        if last < first or (last - first).days > 366:
            self.fail("the last day must not be before the first, or a year later", param, context)
        return first, last + timedelta(days=1)


def _next_month(first: date) -> date:
    return (first + timedelta(days=32)).replace(day=1)


def priced(command: F) -> F:
    """Add the price of a charged device-hour."""
    price = click.option("--price", type=Amounts(), help="Of a charged device-hour, such as 2.40.")
    currency = click.option("--currency", default="EUR", show_default=True, help="Of the price.")
    return price(currency(command))


@click.command()
@click.option(
    "--period",
    type=Period(),
    default="last-month",
    show_default=True,
    help="2026-11, this-month, or 2026-11-02..2026-11-08.",
)
@click.option("--department", help="Only this department's page.")
@click.option("--timezone", "zone", default="UTC", show_default=True, help="Of the days; IANA.")
@click.option(
    "--format",
    "form",
    type=click.Choice(("markdown", "html", "json")),
    help="By the name of --out, else markdown.",
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write.")
@click.option("--persons", is_flag=True, help="List persons, by pseudonym; else only counted.")
@click.option("--no-ledger", is_flag=True, help="Do not ask the platform: not reconciled.")
@priced
@limited
@with_roots
@with_gateway
def report(
    gateway: GatewayClient,
    period: tuple[date, date],
    department: str | None,
    zone: str,
    form: str | None,
    out: Path | None,
    persons: bool,
    no_ledger: bool,
    price: Decimal | None,
    currency: str,
    timeout: float,
    memory: str,
    evidence: Path,
    state: Path,
) -> None:
    """Show back what each department used in a period: Markdown, or HTML that prints.

    Usage comes from the audit trail, budgets from the platform; what the ledger charged is held
    against what the trail says, and the difference is in the report.
    """
    from deployments.showback import make_showback, render

    _check_zone(zone)
    form = form or {".html": "html", ".htm": "html", ".json": "json"}.get(
        out.suffix if out else "", "markdown"
    )
    accounts = None if no_ledger else gateway.call("GET", "/v1/admin/budgets").body["data"]
    with trail(evidence, state, memory, timeout, None) as connection:
        found = make_showback(
            connection,
            *period,
            zone,
            accounts=accounts,
            price=_price(price, currency),
            persons=persons,
        )
    text = render(found, form, department)
    if text is None:
        raise CliError(f"nothing is known of department {department}", code=Exit.NOT_FOUND)
    if out is None:
        click.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")
        click.echo(f"{out}", err=True)


@click.command()
@click.option("--format", "form", type=click.Choice(("csv", "parquet")), default="csv")
@click.option("--grain", type=click.Choice(("hour", "day")), default="day", show_default=True)
@click.option(
    "--since",
    type=SinceUs(),
    default="30d",
    show_default=True,
    help="What ended since: 30d, 12h, or a date (UTC).",
)
@click.option("--until", type=SinceUs(), help="What ended before: a date (UTC); left out, now.")
@click.option("--organisation", default="organisation", show_default=True, help="Who pays.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write.")
@priced
@limited
@with_roots
def export(
    form: str,
    grain: str,
    since: int,
    until: int | None,
    organisation: str,
    out: Path | None,
    price: Decimal | None,
    currency: str,
    timeout: float,
    memory: str,
    evidence: Path,
    state: Path,
) -> None:
    """Write usage by account, application, model and day or hour, as rows for other tools.

    Columns have the names of FOCUS, the FinOps Open Cost and Usage Specification, where they fit.
    """
    from deployments.usage_export import rows, write_csv, write_parquet

    if form == "parquet" and out is None:
        raise CliError("Parquet is written to a file", "name it with --out", Exit.USAGE)
    until = time.time_ns() // 1000 if until is None else until
    with trail(evidence, state, memory, timeout, None) as connection:
        found = rows(
            connection,
            grain,
            since,
            until,
            organisation=organisation,
            price=_price(price, currency),
        )
        if out is None:
            write_csv(found, sys.stdout)
        elif form == "parquet":
            click.echo(f"{write_parquet(found, out)} rows", err=True)
        else:
            with out.open("w", encoding="utf-8", newline="") as stream:
                click.echo(f"{write_csv(found, stream)} rows", err=True)


def _price(price: Decimal | None, currency: str) -> Price | None:
    from governance.finops.showback import Price

    if re.fullmatch(r"[A-Z]{3}", currency) is None:
        raise CliError(f"{currency} is not a currency", "such as EUR", Exit.USAGE)
    return None if price is None else Price(price, currency)


def _check_zone(zone: str) -> None:
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    try:
        ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise CliError(f"{zone} is not a time zone", "such as Europe/Berlin", Exit.USAGE) from None
