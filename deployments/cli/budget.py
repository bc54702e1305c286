"""``gatehouse budget``: what departments have used, and overriding their limits for a time."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import click

from deployments.cli.admin import DurationS
from deployments.cli.client import GatewayClient
from deployments.cli.errors import CliError, Exit
from deployments.cli.options import json_option, with_gateway
from deployments.cli.output import print_json, print_table

_BAR = 10
"""Characters of a full bar."""


class GpuSeconds(click.ParamType[int]):
    """``90``, ``0.25``, ``2h``: device time, as microseconds."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> int:
        """Read an amount without passing through a float."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,9})(?:\.(\d{1,6}))?([smhd]?)", str(value))
        if match is None:
            self.fail("write device time such as 3600, 0.5 or 2h", param, context)
        amount_us = int(match[1]) * 1_000_000 + int((match[2] or "").ljust(6, "0"))
        return amount_us * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[match[3] or "s"]


@click.group()
def budget() -> None:
    """Budgets: device time and tokens per department and window."""


@budget.command()
@click.option("--department", help="One department; left out, all that the caller may see.")
@with_gateway
@json_option
def show(gateway: GatewayClient, department: str | None, as_json: bool) -> None:
    """Show what is spent and what is left."""
    if department is not None:
        answer = gateway.call("GET", f"/v1/usage?department={_quoted(department)}").body
    else:
        answer = _visible(gateway)
    if as_json:
        print_json(answer)
        return
    accounts = answer["data"] if answer["object"] == "list" else [answer]
    columns = ("account", "window", "GPU", "", "tokens", "", "in flight", "left", "resets", "until")
    print_table(columns, [_row(each) for each in accounts], "no accounts")


@budget.command(name="set")
@click.argument("department")
@click.option("--gpu-seconds", type=GpuSeconds(), help="Such as 3600, 0.5 or 2h, per window.")
@click.option("--tokens", type=click.IntRange(min=0), help="Tokens per window.")
@click.option("--expires", type=DurationS(), required=True, help="Such as 4h; at most 31d.")
@click.option("--reason", required=True, help="For the record.")
@with_gateway
@json_option
def set_budget(
    gateway: GatewayClient,
    department: str,
    gpu_seconds: int | None,
    tokens: int | None,
    expires: int,
    reason: str,
    as_json: bool,
) -> None:
    """Override a department's limits for a time; what is left out stays as in the file."""
    if gpu_seconds is None and tokens is None:
        raise CliError("nothing to set", "give --gpu-seconds, --tokens or both", Exit.USAGE)
    body: dict[str, Any] = {"expires_in_s": expires, "reason": reason}
    if gpu_seconds is not None:
        body["gpu_us"] = gpu_seconds
    if tokens is not None:
        body["tokens"] = tokens
    answer = gateway.call("PUT", _path(department), body).body
    if as_json:
        print_json(answer)
    else:
        until = _moment(answer["overridden_until"])
        click.echo(f"{answer['account']}: {_limits(answer)}, until {until}")


@budget.command()
@click.argument("department")
@with_gateway
@json_option
def clear(gateway: GatewayClient, department: str, as_json: bool) -> None:
    """End an override: the limits of the budgets file hold again."""
    answer = gateway.call("DELETE", _path(department)).body
    if as_json:
        print_json(answer)
    else:
        click.echo(f"{answer['account']}: {_limits(answer)}, as in the file")


def _visible(gateway: GatewayClient) -> Any:
    """All accounts for those who may see them, else the caller's own."""
    try:
        return gateway.call("GET", "/v1/admin/budgets").body
    except CliError as error:
        if error.exit_code != Exit.DENIED:
            raise
    return gateway.call("GET", "/v1/usage").body


def _row(account: dict[str, Any]) -> tuple[str, ...]:
    limit, spent, left = account["limit"], account["spent"], account["remaining"]
    until = account["overridden_until"]
    return (
        account["account"],
        account["window"],
        f"{_seconds(spent['gpu_us'])} / {_seconds(limit['gpu_us'])}",
        _bar(spent["gpu_us"], limit["gpu_us"]),
        f"{_count(spent['tokens'])} / {_count(limit['tokens'])}",
        _bar(spent["tokens"], limit["tokens"]),
        f"{_seconds(account['open']['gpu_us'])}, {_count(account['open']['tokens'])}",
        f"{_seconds(left['gpu_us'])}, {_count(left['tokens'])}",
        _moment(account["reset_at"]),
        "" if until is None else f"override until {_moment(until)}",
    )


def _bar(spent: int, limit: int | None) -> str:
    """How much is spent; full only when everything is, empty only when nothing is."""
    if limit is None:
        return ""
    if spent >= limit:
        return "█" * _BAR
    full = min(_BAR - 1, max(1 if spent else 0, spent * _BAR // limit))
    return "█" * full + "░" * (_BAR - full)


def _limits(account: dict[str, Any]) -> str:
    limit = account["limit"]
    gpu, tokens = _seconds(limit["gpu_us"]), _count(limit["tokens"])
    return f"{gpu} GPU, {tokens} tokens a {account['window']}"


def _seconds(amount_us: int | None) -> str:
    """Device time for people, rounded down: three digits of a second below a minute."""
    if amount_us is None:
        return "no limit"
    if amount_us < 60_000_000:
        return f"{amount_us // 1_000_000}.{amount_us // 1000 % 1000:03d} s"
    minutes, seconds = divmod(amount_us // 1_000_000, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def _count(amount: int | None) -> str:
    return "no limit" if amount is None else f"{amount:,}"


def _moment(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%MZ}"


def _path(department: str) -> str:
    return f"/v1/admin/budgets/{_quoted(department)}"


def _quoted(text: str) -> str:
    return quote(text, safe="")
