"""``gatehouse budget forecast``, ``simulate`` and ``top``: spending, by the audit trail."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from deployments.cli import budget_tables as tables
from deployments.cli.audit import SinceUs, opened, reported, with_roots
from deployments.cli.client import GatewayClient
from deployments.cli.errors import CliError, Exit
from deployments.cli.options import json_option, with_gateway
from deployments.cli.output import print_json

if TYPE_CHECKING:
    import duckdb

    from deployments.budget_forecast import Subject
    from governance.budget.config import BudgetsConfig

F = TypeVar("F", bound=Callable[..., Any])
GROUPS = ("department", "part", "application", "person", "account", "model")


def limited(command: F) -> F:
    """Add the options that bound a query."""
    timeout = click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=120.0,
        show_default=True,
        help="Seconds after which it is stopped.",
    )
    memory = click.option(
        "--memory", default="2GB", show_default=True, help="Memory that queries may use."
    )
    return timeout(memory(command))


budgets_option = click.option(
    "--budgets",
    "file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Limits of this file, without asking the platform.",
)


@click.command()
@click.option("--account", "accounts", multiple=True, help="Only this one; repeat for several.")
@budgets_option
@click.option("--at", "at_us", type=SinceUs(), help="As of then, with --budgets; a date (UTC).")
@limited
@with_roots
@with_gateway
@json_option
def forecast(
    gateway: GatewayClient,
    accounts: tuple[str, ...],
    file: Path | None,
    at_us: int | None,
    timeout: float,
    memory: str,
    evidence: Path,
    state: Path,
    as_json: bool,
) -> None:
    """Foretell what each account will have spent when its window ends, and when it runs out.

    Limits and spending come from the platform, history from the audit trail: 13 weeks at most. An
    account's hours of the week, its level of the last seven days and a damped trend go on; the
    interval, of eight outcomes in ten, is drawn from the errors that the same forecast would have
    made before.
    """
    from deployments.budget_forecast import outlooks

    if at_us is not None and file is None:
        raise CliError("--at needs --budgets", "the platform only knows now", Exit.USAGE)
    now_us = time.time_ns() // 1000 if at_us is None else at_us
    with trail(evidence, state, memory, timeout, now_us - 91 * 86_400_000_000) as connection:
        subjects = _subjects(gateway, connection, file, now_us)
        if unknown := set(accounts) - {each.account for each in subjects}:
            raise CliError(
                f"no such account: {', '.join(sorted(unknown))}",
                "`gatehouse budget show` lists them",
                Exit.NOT_FOUND,
            )
        wanted = [each for each in subjects if not accounts or each.account in accounts]
        found = outlooks(connection, wanted, now_us)
    if as_json:
        print_json([each.as_json() for each in found])
    else:
        tables.show_outlooks(found, now_us)


@click.command()
@click.option(
    "--budgets",
    "file",
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The candidate.",
)
@click.option(
    "--since",
    type=SinceUs(),
    default="30d",
    show_default=True,
    help="What ended since: 30d, 12h, or a date (UTC).",
)
@limited
@with_roots
@json_option
def simulate(
    file: Path,
    since: int,
    timeout: float,
    memory: str,
    evidence: Path,
    state: Path,
    as_json: bool,
) -> None:
    """Play the requests on record under another budgets file: who would have been refused.

    They are played to a ledger of their own, in a scratch folder, so that the rules are those of
    production. Ends with 4 if the trail has no request in that time.
    """
    import tempfile
    from dataclasses import asdict

    from deployments.usage_trail import past
    from governance.finops.simulate import simulate as play

    config = _load(file)
    with trail(evidence, state, memory, timeout, since) as connection:
        requests = list(past(connection, since))
    if not requests:
        click.echo("no request is on record in this time", err=True)
        raise click.exceptions.Exit(Exit.NOT_FOUND)
    fast = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - only where to put it
    with tempfile.TemporaryDirectory(dir=fast) as folder:
        found = play(config, requests, Path(folder))
    if as_json:
        print_json(asdict(found))
    else:
        tables.show_simulation(found)


@click.command()
@click.option(
    "--by", type=click.Choice(GROUPS), default="department", show_default=True, help="Grouped by."
)
@click.option(
    "--since",
    type=SinceUs(),
    default="7d",
    show_default=True,
    help="What ended since: 30d, 12h, or a date (UTC).",
)
@click.option("--department", help="Only this department.")
@click.option("-n", "--lines", type=click.IntRange(min=1), default=20, show_default=True)
@limited
@with_roots
@json_option
def top(
    by: str,
    since: int,
    department: str | None,
    lines: int,
    timeout: float,
    memory: str,
    evidence: Path,
    state: Path,
    as_json: bool,
) -> None:
    """Who and what used most: by department, part, application, person, account or model.

    Persons are pseudonyms.
    """
    from dataclasses import asdict

    from deployments.usage_trail import top as rank

    now_us = time.time_ns() // 1000
    with trail(evidence, state, memory, timeout, since) as connection:
        found = rank(connection, by, since, now_us, department=department)
    if as_json:
        print_json([asdict(each) for each in found[:lines]])
    else:
        tables.show_top(by, found, lines, since, now_us)


def _subjects(
    gateway: GatewayClient, connection: duckdb.DuckDBPyConnection, file: Path | None, now_us: int
) -> list[Subject]:
    from deployments.budget_forecast import from_file, from_ledger
    from governance.budget.config import BudgetsConfig

    if file is not None:
        return from_file(connection, _load(file), now_us)
    known = gateway.call("GET", "/v1/admin/budget-file").body["budgets"]
    accounts = gateway.call("GET", "/v1/admin/budgets").body["data"]
    return from_ledger(accounts, BudgetsConfig.model_validate(known))


def _load(file: Path) -> BudgetsConfig:
    from governance.budget.config import load_budgets
    from governance.yaml_config import ConfigError

    try:
        return load_budgets(file)
    except ConfigError as error:
        raise CliError(str(error), "docs/reference/budgets.md has every key") from None


@contextmanager
def trail(
    evidence: Path, state: Path, memory: str, timeout: float, since_us: int | None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """The trail, within bounds. What began a day before ``since_us`` may end after it."""
    from governance.audit.sql_guard import time_limit

    if re.fullmatch(r"\d{1,6} ?[KMGT]i?B", memory) is None:
        raise CliError(f"{memory} is not a size", "such as --memory 4GB", Exit.USAGE)
    first_us = None if since_us is None else since_us - 86_400_000_000
    with (
        opened(evidence, state, first_us, memory) as connection,
        reported(timeout),
        time_limit(connection, timeout),
    ):
        yield connection
