"""``gatehouse audit``: read the audit trail. Nothing here writes, and nothing decrypts content."""

from __future__ import annotations

import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from deployments.cli.audit_output import FORMATS, event_line, print_result, show_request
from deployments.cli.errors import CliError, Exit
from deployments.cli.options import json_option
from deployments.cli.output import print_json, print_table, printable
from deployments.settings import from_environment

if TYPE_CHECKING:
    import duckdb

F = TypeVar("F", bound=Callable[..., Any])

FOLLOW_S = 1.0
"""Time between two looks of ``tail -f``."""
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


class SinceUs(click.ParamType[int]):
    """``2h``, ``30d`` before now, ``2026-11-25`` or ``2026-11-25T14:00`` (UTC); microseconds."""

    name = "since"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> int:
        """Read one point in time."""
        if isinstance(value, int):
            return value
        if match := re.fullmatch(r"(\d{1,6})([smhdw])", str(value)):
            return time.time_ns() // 1000 - int(match[1]) * _UNITS_S[match[2]] * 1_000_000
        try:
            moment = datetime.fromisoformat(str(value))
        except ValueError:
            self.fail("write 30d, 12h, or a date such as 2026-11-25", param, context)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return int(moment.timestamp()) * 1_000_000


def with_roots(command: F) -> F:
    """Add the options that say where the trail is; the command gets ``evidence`` and ``state``."""

    @click.option(
        "--evidence",
        envvar="GATEHOUSE_EVIDENCE",
        type=click.Path(path_type=Path, file_okay=False),
        help="Evidence folder; ./data/evidence if left out.",
    )
    @click.option(
        "--state",
        envvar="GATEHOUSE_STATE",
        type=click.Path(path_type=Path, file_okay=False),
        help="State folder, for events that are not sealed yet; ./data/state if left out.",
    )
    @functools.wraps(command)
    def wrapped(*args: Any, evidence: Path | None, state: Path | None, **kwargs: Any) -> Any:
        settings = from_environment()
        evidence = evidence or settings.evidence
        state = state or settings.state
        if not (evidence / "audit").is_dir() and not (state / "wal").is_dir():
            raise CliError(
                f"no audit trail at {evidence} or {state}",
                "start the platform with `make serve`, or name the folders: --evidence, --state",
                Exit.NOT_FOUND,
            )
        return command(*args, evidence=evidence, state=state, **kwargs)

    return wrapped  # type: ignore[return-value]


@click.group()
def audit() -> None:
    """The audit trail: who asked what of which model, what was decided, what it cost."""


@audit.command()
@click.argument("sql")
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="table on a terminal, csv into a pipe, unless given here.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    help="Most rows to print, 0 for all; 1000 for a table, else all.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds after which the query is stopped.",
)
@click.option("--since", type=SinceUs(), help="Only what began since: 30d, 12h, or a date (UTC).")
@click.option("--memory", default="2GB", show_default=True, help="Memory that the query may use.")
@with_roots
def query(
    sql: str,
    form: str | None,
    limit: int | None,
    timeout: float,
    since: int | None,
    memory: str,
    evidence: Path,
    state: Path,
) -> None:
    """Run one SELECT. SQL is the statement, or - for standard input.

    Tables: audit, and the views that `gatehouse audit views` lists.
    """
    from governance.audit.sql_guard import NotASelect, check_select, time_limit

    if sql == "-":
        sql = sys.stdin.read()
    try:
        check_select(sql)
    except NotASelect as error:
        raise CliError(
            f"not run: {error}", "only one SELECT is taken; it cannot write", Exit.USAGE
        ) from None
    form = form or ("table" if sys.stdout.isatty() else "csv")
    if limit is None:
        limit = 1000 if form == "table" else 0
    if re.fullmatch(r"\d{1,6} ?[KMGT]i?B", memory) is None:
        raise CliError(f"{memory} is not a size", "such as --memory 4GB", Exit.USAGE)
    with (
        opened(evidence, state, since, memory) as connection,
        reported(timeout),
        time_limit(connection, timeout),
    ):
        more = print_result(connection, sql, form, limit)
    if more:
        click.echo(f"... {limit} rows shown; --limit 0 prints all", err=True)


@audit.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with new events until Ctrl-C.")
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="Events of the past.",
)
@click.option("--department", help="Only events of this department.")
@click.option("--type", "event_type", help="Only events of this type, such as inference.refused.")
@json_option
@with_roots
def tail(
    follow: bool,
    lines: int,
    department: str | None,
    event_type: str | None,
    as_json: bool,
    evidence: Path,
    state: Path,
) -> None:
    """Print the last events, one a line; sealed or not."""
    from governance.audit.follow import Follower, Record

    def wanted(record: Record) -> bool:
        return (department is None or record["department"] == department) and (
            event_type is None or record["event_type"] == event_type
        )

    def show(records: list[Record]) -> None:
        for record in records:
            if as_json:
                click.echo(json.dumps(record, sort_keys=True, separators=(",", ":")))
            else:
                click.echo(event_line(record))

    follower = Follower(evidence, state, wanted, _warn)
    show(follower.last(lines))
    try:
        while follow:
            time.sleep(FOLLOW_S)
            show(follower.new())
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass


@audit.command()
@click.argument("request_id")
@json_option
@with_roots
def show(request_id: str, as_json: bool, evidence: Path, state: Path) -> None:
    """Everything on record about one request, in order; never its content."""
    with opened(evidence, state) as connection, reported():
        result = connection.execute("FROM incident(?)", [request_id])
        names = [column[0] for column in result.description or ()]
        events = [dict(zip(names, row, strict=True)) for row in result.fetchall()]
    if not events:
        raise CliError(
            f"no request {request_id} on record",
            "the id is in the answer's header x-gatehouse-request-id",
            Exit.NOT_FOUND,
        )
    if as_json:
        print_json(events)
    else:
        show_request(events)


@audit.command()
@json_option
def views(as_json: bool) -> None:
    """List the views that queries may use, and the question that each answers."""
    from governance.audit.query import views as all_views

    found = all_views()
    if as_json:
        fields = ("name", "question", "grain", "units")
        print_json([{name: getattr(view, name) for name in fields} for view in found])
        return
    print_table(("view", "question", "one row is"), [(v.name, v.question, v.grain) for v in found])


@audit.command()
@json_option
@with_roots
def status(as_json: bool, evidence: Path, state: Path) -> None:
    """Count events, sealed and not yet sealed, by writer; 1 if logs are damaged."""
    from governance.audit.status import trail_status

    faults: list[str] = []
    found = trail_status(evidence, state, time.time_ns() // 1000, faults.append)
    if as_json:
        print_json({**found.as_json(), "faults": faults})
    else:
        age = "" if found.oldest_unsealed_s is None else f", oldest {found.oldest_unsealed_s:.0f} s"
        click.echo(f"sealed {found.sealed} events in {found.files} files")
        click.echo(f"not sealed {found.unsealed} events{age}")
        print_table(
            ("writer", "starts", "sealed", "not sealed", "last place"),
            [
                (w.writer_id, str(w.epoch), str(w.sealed), str(w.unsealed), str(w.last_seq))
                for w in found.writers
            ],
            "no writer yet",
        )
        for fault in faults:
            _warn(fault)
    if faults:
        raise click.exceptions.Exit(int(Exit.FAILURE))


@contextmanager
def opened(
    evidence: Path, state: Path, since_us: int | None = None, memory: str = "2GB"
) -> Iterator[duckdb.DuckDBPyConnection]:
    """The trail as a locked connection."""
    from governance.audit.query import connect

    try:
        connection = connect(
            evidence, state, on_fault=_warn, since_us=since_us, memory_limit=memory
        )
    except OSError as error:
        raise CliError(
            f"the audit trail cannot be read: {error.strerror}",
            "the files belong to the platform's user: run as that user, or ask for read access",
            Exit.DENIED if isinstance(error, PermissionError) else Exit.FAILURE,
        ) from None
    with connection:
        yield connection


@contextmanager
def reported(timeout_s: float = 0) -> Iterator[None]:
    """Errors of a query, for people."""
    import duckdb

    from governance.audit.sql_guard import QueryTimeout, first_line

    try:
        yield
    except QueryTimeout:
        raise CliError(
            f"stopped after {timeout_s:g} s",
            "give it longer with --timeout, or less to read: --since, or WHERE dt = ...",
        ) from None
    except duckdb.OutOfMemoryException:
        raise CliError("the query needs more memory", "--memory 8GB, or less to read") from None
    except duckdb.PermissionException:
        raise CliError("the query reaches outside the audit trail", code=Exit.DENIED) from None
    except duckdb.Error as error:
        # The message may quote a value of the trail.
        raise CliError(
            printable(first_line(error)), "`gatehouse audit views`, and docs/audit-schema.md"
        ) from None


def _warn(said: str) -> None:
    click.secho(f"warning: {said}", err=True, fg="yellow")
