"""Tables of the commands that read the audit trail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from deployments.cli.budget_output import count, moment, note, quantity, seconds, short
from deployments.cli.output import print_table
from governance.finops.burn import sparkline

if TYPE_CHECKING:
    from deployments.budget_forecast import Outlook
    from deployments.usage_trail import Top
    from governance.finops.simulate import Fate, Level, Simulation
    from governance.types import Amount

_SECOND_US = 1_000_000
_METHODS = {
    "hour-of-week": "hours of the week",
    "hour-of-day": "hours of the day",
    "flat": "flat: less than two days on record",
}
_MOST = 30
"""Lines of a table; more are in the JSON."""


def show_outlooks(found: Sequence[Outlook], now_us: int) -> None:
    """Forecasts, the most urgent first."""
    columns = (
        "account", "window", "of", "last 7 days", "burns an hour", "spent", "at the end",
        "8 of 10 times", "limit", "runs out", "risk", "from", "ends",
    )  # fmt: skip
    print_table(columns, [_outlook(each, now_us) for each in found], "no account has a limit")
    if found:
        note(
            "'runs out': when the limit is reached if nothing changes, and the earliest moment in "
            "one of ten outcomes; 'risk': share of outcomes that reach it before the window ends."
        )


def _outlook(each: Outlook, now_us: int) -> tuple[str, ...]:
    said = each.forecast
    return (
        short(each.account),
        each.window,
        "GPU" if each.quantity == "gpu_us" else "tokens",
        sparkline(each.week, 28),
        quantity(each.quantity, said.per_hour),
        quantity(each.quantity, each.spent),
        quantity(each.quantity, said.spent),
        f"{quantity(each.quantity, said.low)} to {quantity(each.quantity, said.high)}",
        quantity(each.quantity, each.limit),
        _runs_out(each, now_us),
        f"{said.risk * 100:.0f} %",
        _METHODS[said.method],
        moment(each.end_us // _SECOND_US),
    )


def _runs_out(each: Outlook, now_us: int) -> str:
    said = each.forecast
    if said.exhausted_us is not None and said.exhausted_us <= now_us:
        return "now"
    usual = "not" if said.exhausted_us is None else moment(said.exhausted_us // _SECOND_US)
    if said.earliest_us is None:
        return usual
    return f"{usual}, earliest {moment(said.earliest_us // _SECOND_US)}"


def show_simulation(found: Simulation) -> None:
    """What a file would have done."""
    click.echo(
        f"{found.requests} requests, {moment(found.from_us // _SECOND_US)} to "
        f"{moment(found.until_us // _SECOND_US)}: {found.refused} would have been refused; "
        f"{found.refused_then} really were"
    )
    if found.unknown:
        click.echo(f"{found.unknown} requests are of departments that the file has no account for")
    refused = [fate for fate in found.fates if fate.refused]
    _heading("Refused")
    print_table(
        ("account", "requests", "refused", "first", "last", "asked", "served", "for want of"),
        [_fate(fate) for fate in refused[:_MOST]],
        "nobody",
    )
    if len(refused) > _MOST:
        note(f"{len(refused) - _MOST} more accounts are in the output of --json.")
    _heading("Accounts")
    print_table(
        ("account", "window", "limit", "most spent in one", "most borrowed", "first used up",
         "thresholds crossed"),
        [_level(level) for level in found.levels],
        "none",
    )  # fmt: skip
    guessed = sum(fate.guessed for fate in found.fates)
    if guessed:
        note(
            f"{guessed} requests were refused by a budget then, so nobody knows what they would "
            "have taken: they are played with the median of what the same caller's requests took."
        )


def _fate(fate: Fate) -> tuple[str, ...]:
    why = max(fate.reasons, key=lambda name: fate.reasons[name]) if fate.reasons else ""
    return (
        short(fate.account),
        str(fate.requests),
        str(fate.refused),
        "" if fate.first_us is None else moment(fate.first_us // _SECOND_US),
        "" if fate.last_us is None else moment(fate.last_us // _SECOND_US),
        _amount(fate.asked),
        _amount(fate.served),
        short(why),
    )


def _level(level: Level) -> tuple[str, ...]:
    return (
        short(level.account),
        level.window,
        f"{seconds(level.limit_us)}, {count(level.limit_tokens)}",
        _amount(level.spent),
        _amount(level.borrowed) if level.borrowed.gpu_us or level.borrowed.tokens else "",
        "" if level.exhausted_us is None else moment(level.exhausted_us // _SECOND_US),
        ", ".join(f"{_threshold(name)} ({times}x)" for name, times in level.thresholds.items()),
    )


def _threshold(name: str) -> str:
    what, _, percent = name.partition(" ")
    return f"{percent} % of {'GPU' if what == 'gpu_us' else 'tokens'}"


def _amount(amount: Amount) -> str:
    return f"{seconds(amount.gpu_us)}, {count(amount.tokens)}"


def show_top(by: str, found: Sequence[Top], lines: int, from_us: int, until_us: int) -> None:
    """Who used most."""
    print_table(
        (by, "charged", "share", "requests", "tokens", "metered", "over the period"),
        [
            (
                short(each.name),
                seconds(each.charged_us),
                f"{each.share_percent:.1f} %",
                str(each.requests),
                count(each.tokens),
                seconds(each.gpu_us),
                sparkline(each.buckets),
            )
            for each in found[:lines]
        ],
        "nothing was used in this time",
    )
    if len(found) > lines:
        said = f"{len(found) - lines} more; -n shows them"
        click.echo(f"... {said}", err=True)


def _heading(text: str) -> None:
    click.echo()
    click.secho(text, bold=True)
