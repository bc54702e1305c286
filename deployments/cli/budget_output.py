"""How ``gatehouse budget`` writes amounts and tables for people.

NOTE: names and reasons were partly chosen by others, so cells pass through ``printable``.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click

from deployments.cli.output import print_table, printable
from governance.finops.burn import exhaustion_us, since_start

Json = dict[str, Any]

BAR = 10
"""Characters of a full bar."""
SECOND_US = 1_000_000


def show_accounts(accounts: Sequence[Json], now_us: int | None = None) -> None:
    """Accounts as a tree: what is spent, what is left, how fast it goes."""
    now_us = time.time_ns() // 1000 if now_us is None else now_us
    columns = (
        "account", "window", "GPU", "", "tokens", "", "in flight", "left", "borrowed, lent",
        "burns an hour", "used up", "resets", "mode, class", "owner", "until",
    )  # fmt: skip
    print_table(columns, [_row(each, now_us) for each in ordered(accounts)], "no accounts")


def ordered(accounts: Iterable[Json]) -> list[Json]:
    """A department, then its further windows, its parts and their users, each below the other."""

    def place(account: Json) -> tuple[str, ...]:
        name = str(account["account"])
        # Further windows first, then users of the department, then parts.
        for order, mark in enumerate("@~/"):
            name = name.replace(mark, f"\x00{order}")
        return tuple(name.split("\x00"))

    return sorted(accounts, key=place)


def depth(account: str) -> int:
    """How far below its department an account is."""
    return sum(account.count(mark) for mark in "/~@")


def _row(account: Json, now_us: int) -> tuple[str, ...]:
    limit, spent = account["limit"], account["spent"]
    until, name = account["overridden_until"], str(account["account"])
    left = account.get("available") or account["remaining"]
    return (
        f"{'  ' * depth(name)}{short(name)}" if sys.stdout.isatty() else name,
        account["window"],
        f"{seconds(spent['gpu_us'])} / {seconds(limit['gpu_us'])}",
        bar(spent["gpu_us"], limit["gpu_us"]),
        f"{count(spent['tokens'])} / {count(limit['tokens'])}",
        bar(spent["tokens"], limit["tokens"]),
        f"{seconds(account['open']['gpu_us'])}, {count(account['open']['tokens'])}",
        f"{seconds(left['gpu_us'])}, {count(left['tokens'])}",
        _lending(account),
        _burn(account, now_us),
        _exhaustion(account, now_us),
        moment(account["reset_at"]),
        ", ".join(filter(None, (account.get("mode"), account.get("class")))),
        printable(account.get("owner") or ""),
        "" if until is None else f"override until {moment(until)}",
    )


def _lending(account: Json) -> str:
    said = []
    for name, sign in (("borrowed", "+"), ("lent", "-")):
        amount = account.get(name) or {}
        if amount.get("gpu_us"):
            said.append(f"{sign}{seconds(amount['gpu_us'])}")
        if amount.get("tokens"):
            said.append(f"{sign}{count(amount['tokens'])} tokens")
    return ", ".join(said)


def _rates(account: Json, now_us: int) -> tuple[float, float]:
    """Averages since the window began, per hour."""
    start_us = account.get("start_at", 0) * SECOND_US
    spent = account["spent"]
    return (
        since_start(spent["gpu_us"], start_us, now_us),
        since_start(spent["tokens"], start_us, now_us),
    )


def _burn(account: Json, now_us: int) -> str:
    if "start_at" not in account:
        return ""
    gpu_us, tokens = _rates(account, now_us)
    return f"{seconds(round(gpu_us))}, {count(round(tokens))}"


def _exhaustion(account: Json, now_us: int) -> str:
    """When it is used up at the average rate so far; empty where the window ends first."""
    if "start_at" not in account:
        return ""
    left = account.get("available") or account["remaining"]
    reset_us = account["reset_at"] * SECOND_US
    pairs = zip((left["gpu_us"], left["tokens"]), _rates(account, now_us), strict=True)
    found = [exhaustion_us(amount, rate, now_us, reset_us) for amount, rate in pairs]
    times = [when_us for when_us in found if when_us is not None]
    if not times:
        return ""
    return "now" if min(times) <= now_us else moment(min(times) // SECOND_US)


def bar(spent: int, limit: int | None) -> str:
    """How much is spent; full only when everything is, empty only when nothing is."""
    if limit is None:
        return ""
    if spent >= limit:
        return "█" * BAR
    full = min(BAR - 1, max(1 if spent else 0, spent * BAR // limit))
    return "█" * full + "░" * (BAR - full)


def limits(account: Mapping[str, Any]) -> str:
    """Limits of an account in words."""
    limit = account["limit"]
    gpu, tokens = seconds(limit["gpu_us"]), count(limit["tokens"])
    return f"{gpu} GPU, {tokens} tokens a {account['window']}"


def seconds(amount_us: int | None) -> str:
    """Device time for people, rounded down: three digits of a second below a minute."""
    if amount_us is None:
        return "no limit"
    if amount_us < 60_000_000:
        return f"{amount_us // 1_000_000}.{amount_us // 1000 % 1000:03d} s"
    minutes, left = divmod(amount_us // 1_000_000, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{left:02d}s"


def count(amount: int | None) -> str:
    """Tokens for people."""
    return "no limit" if amount is None else f"{amount:,}"


def quantity(name: str, amount: float | None) -> str:
    """An amount of ``gpu_us`` or ``tokens``."""
    whole = None if amount is None else round(amount)
    return seconds(whole) if name == "gpu_us" else count(whole)


def moment(at_s: int) -> str:
    """A time, UTC, to the minute."""
    return f"{datetime.fromtimestamp(at_s, UTC):%Y-%m-%d %H:%MZ}"


def short(name: str) -> str:
    """A name with a pseudonym in it cut to twelve digits, which tell people apart."""
    return printable(re.sub(r"(?<![0-9a-f])([0-9a-f]{12})[0-9a-f]{52}(?![0-9a-f])", r"\1", name))


def note(text: str) -> None:
    """A line below a table."""
    click.echo(click.wrap_text(text, 100))
