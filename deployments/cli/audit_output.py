"""What ``gatehouse audit`` prints: results of queries, events as lines, one request as a story.

NOTE: values of the trail were partly chosen by callers (names of models, error texts), so they pass
through ``printable`` wherever a terminal may read them.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from deployments.cli.errors import CliError, Exit
from deployments.cli.output import print_table, printable

if TYPE_CHECKING:
    import duckdb

FORMATS = ("table", "csv", "jsonl", "parquet")
_BATCH = 4096
_COLOURS = {
    "inference.refused": "yellow",
    "inference.aborted": "red",
    "engine.lost": "red",
    "failed": "red",
}


def print_result(connection: duckdb.DuckDBPyConnection, sql: str, form: str, limit: int) -> bool:
    """Run a query and print its rows as they come.

    Args:
        connection: Where to run it.
        sql: One SELECT.
        form: One of ``FORMATS``.
        limit: Most rows; 0 for all.

    Returns:
        Whether there are more rows than were printed.
    """
    if form == "parquet":
        return _parquet(connection, sql, limit)
    result = connection.execute(sql)
    columns = [column[0] for column in result.description or ()]
    printed, left = 0, limit or sys.maxsize
    shown: list[Sequence[str]] = []
    writer = csv.writer(sys.stdout, lineterminator="\n")
    clean = _shown if sys.stdout.isatty() else _as_is
    if form == "csv":
        writer.writerow(columns)
    while left and (rows := result.fetchmany(min(_BATCH, left))):
        left -= len(rows)
        printed += len(rows)
        if form == "csv":
            writer.writerows([clean(_plain(value)) for value in row] for row in rows)
        elif form == "jsonl":
            for row in rows:
                value = dict(zip(columns, row, strict=True))
                click.echo(json.dumps(value, default=_text, separators=(",", ":")))
        else:
            shown += [["" if v is None else str(_plain(v)) for v in row] for row in rows]
    if form == "table":
        print_table(columns, shown, "no rows")
    return bool(not left and result.fetchone())


def _parquet(connection: duckdb.DuckDBPyConnection, sql: str, limit: int) -> bool:
    import pyarrow.parquet as pq

    if sys.stdout.isatty():
        raise CliError(
            "Parquet is not for a terminal", "redirect it: ... > rows.parquet", Exit.USAGE
        )
    left = limit or sys.maxsize
    reader = connection.sql(sql).to_arrow_reader(_BATCH)
    with pq.ParquetWriter(sys.stdout.buffer, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch.slice(0, left))
            if batch.num_rows > left:
                return True
            left -= batch.num_rows
    return False


def _shown(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value


def _as_is(value: Any) -> Any:
    return value


def _plain(value: Any) -> Any:
    """A cell as text; a list or struct as JSON."""
    if isinstance(value, list | dict):
        return json.dumps(value, default=_text, ensure_ascii=False)
    return _text(value) if isinstance(value, bytes | datetime) else value


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat(sep=" ") if isinstance(value, datetime) else str(value)


def event_line(record: Mapping[str, Any]) -> str:
    """An event as one line: when, what, who, which model, how it went, which request."""
    kind = str(record["event_type"])
    outcome = " ".join(
        str(value)
        for value in (
            record["outcome"] or record["decision"] or record["state"],
            record["status"],
            record["error_code"],
        )
        if value is not None
    )
    what = record["response_model"] or record["request_model"] or record["entity_id"]
    cells = (
        _time(record["ts_end_us"] or record["ts_us"]),
        click.style(f"{_safe(kind):<20}", fg=_COLOURS.get(kind)),
        f"{_safe(record['department']):<12}",
        f"{_safe(what):<16}",
        click.style(f"{_safe(outcome):<16}", fg=_COLOURS.get(outcome.split(" ")[0])),
        _usage(record),
        _safe(record["request_id"] or record["writer_id"]),
    )
    return "  ".join(cell for cell in cells if cell)


def _safe(value: Any) -> str:
    """A value on one line, without what could steer a terminal.

    NOTE: before it is styled. A colour and an attack are the same characters afterwards.
    """
    return printable(str(value or "-").replace("\n", " ").replace("\t", " "))


def _usage(record: Mapping[str, Any]) -> str:
    parts = []
    if record["input_tokens"] is not None or record["output_tokens"] is not None:
        parts.append(f"{record['input_tokens'] or 0}+{record['output_tokens'] or 0} tokens")
    if record["gpu_us"] is not None:
        parts.append(f"{record['gpu_us'] / 1e6:.3f} GPU-s")
    return " ".join(parts)


_SECTIONS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("who", (
        ("subject", "subject_key"), ("kind", "principal_kind"), ("department", "department"),
        ("roles", "roles"), ("issuer", "issuer"), ("by", "auth_method"), ("client", "client_id"),
        ("key", "key_id"), ("exception", "exception_id"),
    )),
    ("decision", (
        ("effect", "decision"), ("rules", "rule_ids"), ("mode", "mode"),
        ("in shadow", "shadow_decision"), ("policy", "policy_digest"), ("id", "decision_id"),
        ("data class", "data_class"), ("findings", "findings"), ("inspector", "inspector"),
    )),
    ("route", (
        ("asked for", "request_model"), ("answered", "response_model"),
        ("weights", "model_revision"), ("adapter", "adapter"), ("engine", "engine_version"),
        ("to", "route_target"), ("because", "route_reason"), ("replica", "replica_id"),
    )),
    ("request", (
        ("operation", "operation"), ("max tokens", "max_tokens"), ("choices", "choices"),
        ("temperature/1000", "temperature_milli"), ("seed", "seed"), ("stream", "stream"),
    )),
    ("usage", (
        ("input tokens", "input_tokens"), ("cached", "cached_tokens"),
        ("output tokens", "output_tokens"), ("GPU-s", "gpu_us"), ("metered by", "gpu_us_method"),
        ("charged s", "charged_us"), ("account", "budget_account"), ("held s", "reserved_us"),
        ("reservation", "reservation_id"), ("class", "priority_class"),
    )),
    ("end", (
        ("outcome", "outcome"), ("status", "status"), ("error", "error_code"),
        ("finish", "finish_reason"), ("queued s", "queue_us"), ("first piece s", "ttft_us"),
        ("total s", "latency_us"), ("state", "state"), ("reason", "reason_code"),
        ("detail", "detail"),
    )),
)  # fmt: skip


def show_request(events: Sequence[Mapping[str, Any]]) -> None:
    """All events of one request. A value that an earlier event gave is not said again."""
    click.secho(f"request {printable(str(events[0]['request_id']))}", bold=True)
    said: dict[str, Any] = {}
    for event in events:
        ended = f" to {_time(event['ts_end_us'])}" if event["ts_end_us"] else ""
        click.echo()
        click.secho(f"{printable(event['event_type'])}  {_time(event['ts_us'])}{ended}", bold=True)
        for title, fields in _SECTIONS:
            parts = [
                f"{label} {_value(column, event[column])}"
                for label, column in fields
                if event[column] not in (None, []) and said.get(column) != event[column]
            ]
            if parts:
                click.echo(printable(f"  {title:<9} {', '.join(parts)}"))
        for what, side in (("input", "prompt"), ("output", "response")):
            commitment = event[f"{side}_commit"]
            if commitment is not None and said.get(f"{side}_commit") != commitment:
                size = event[f"{side}_bytes"]
                bytes_ = "" if size is None else f"{size} bytes, "
                click.echo(f"  {what:<9} {bytes_}encrypted, commitment {commitment}")
        said |= {name: value for name, value in event.items() if value is not None}
        where = "sealed" if event["sealed"] else "in the writer's log, not sealed yet"
        click.echo(
            printable(
                f"  chain     {event['writer_id']} start {event['writer_epoch']} place "
                f"{event['writer_seq']}, {where}"
            )
        )
        click.echo(f"  hash      {event['leaf_hash']}")
        click.echo(f"  before    {event['prev_hash']}")
        click.echo(printable(f"  event     {event['event_id']}"))


def _value(column: str, value: Any) -> str:
    if column.endswith("_us"):
        return f"{value / 1e6:.6f}"
    if column in ("roles", "rule_ids"):
        return "+".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(_plain(value))


def _time(us: int) -> str:
    moment = datetime.fromtimestamp(us // 1_000_000, UTC)
    return f"{moment:%Y-%m-%d %H:%M:%S}.{us % 1_000_000 // 1000:03d}Z"
