"""A showback as Markdown.

NOTE: names were partly chosen by others (models, applications), so they are escaped: nothing in
them becomes markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import timedelta

from governance.finops.burn import sparkline
from governance.finops.showback import Allowance, Department, Line, Price, Showback


def as_markdown(found: Showback) -> str:
    """The whole report."""
    last = found.after - timedelta(days=1)
    lines = [
        f"# GPU usage by department, {found.first} to {last}",
        "",
        f"Days of {found.zone}. Charged seconds are metered device-seconds, weighted by the kind of"
        " accelerator. A request counts when it ended.",
        "",
        *_table(
            (*_HEADINGS, "refused"),
            [
                (*_cells(each.total, found.total, found.price), str(each.refused))
                for each in found.departments
            ],
        ),
        "",
        f"Total: {_seconds(found.total.charged_us)} charged seconds,"
        f" {found.total.tokens:,} tokens, {found.total.requests:,} requests.",
        "",
        f"By day: `{sparkline([day.charged_us for day in found.days], 31)}`",
        "",
    ]
    for department in found.departments:
        lines += _page(department, found)
    lines += _reconciliation(found)
    for note in found.notes:
        lines += [note, ""]
    return "\n".join(lines).rstrip() + "\n"


_HEADINGS = ("", "charged s", "share", "metered s", "requests", "input tokens", "output tokens",
             "cost")  # fmt: skip


def _page(department: Department, found: Showback) -> list[str]:
    total = department.total
    lines = [f"## {_text(department.name)}", ""]
    if department.allowance is not None:
        lines += [f"Budget: {budget_words(department.allowance)}.", ""]
    lines += [
        f"{_seconds(total.charged_us)} charged seconds, {total.tokens:,} tokens,"
        f" {total.requests:,} requests of {department.people} people;"
        f" {department.refused} refused or cut short by a budget.",
        "",
        f"By day: `{sparkline([day.charged_us for day in department.days], 31)}`",
        "",
    ]
    for heading, names in (
        ("model", department.models),
        ("part", department.parts),
        ("application", department.applications),
        ("person", department.persons),
    ):
        if names:
            rows = [_cells(each, total, found.price) for each in names]
            lines += [*_table((heading, *_HEADINGS[1:]), rows), ""]
    if department.changes:
        lines += [
            *_table(
                ("when", "account", "what", "by", "why"),
                [
                    (each.at, _text(each.account), _text(each.what), _text(each.by or ""),
                     _text(each.reason or ""))
                    for each in department.changes
                ],
            ),
            "",
        ]  # fmt: skip
    return lines


def _reconciliation(found: Showback) -> list[str]:
    if not found.reconciled:
        return []
    return [
        "## Ledger and audit trail",
        "",
        "What the ledger charged, and what the trail says. Requests in flight are in the ledger"
        " before they are in the trail.",
        "",
        *_table(
            ("department", "since", "ledger s", "trail s", "difference s", "ledger tokens",
             "trail tokens", "difference"),
            [
                (_text(each.department), each.since, _exact(each.ledger_us),
                 _exact(each.trail_us), _exact(each.difference_us), f"{each.ledger_tokens:,}",
                 f"{each.trail_tokens:,}", f"{each.difference_tokens:,}")
                for each in found.reconciled
            ],
        ),
        "",
    ]  # fmt: skip


def budget_words(allowance: Allowance) -> str:
    """A budget in words."""
    said = []
    if allowance.limit_us is not None:
        said.append(f"{allowance.limit_us // 1_000_000:,} charged seconds")
    if allowance.limit_tokens is not None:
        said.append(f"{allowance.limit_tokens:,} tokens")
    owner = f", owner {_text(allowance.owner)}" if allowance.owner else ""
    return f"{' and '.join(said) or 'no limit'} a {allowance.window}, {allowance.mode}{owner}"


def _cells(line: Line, total: Line, price: Price | None) -> tuple[str, ...]:
    share = 100 * line.charged_us / total.charged_us if total.charged_us else 0.0
    cost = "" if price is None else f"{price.cost(line.charged_us):,} {price.currency}"
    return (
        _text(line.name),
        _seconds(line.charged_us),
        f"{share:.1f} %",
        _seconds(line.gpu_us),
        f"{line.requests:,}",
        f"{line.input_tokens:,}",
        f"{line.output_tokens:,}",
        cost,
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table without the columns in which nothing stands."""
    known = [headings, *rows]
    kept = [
        place
        for place in range(len(headings))
        if place == 0 or any(row[place] for row in known[1:])
    ]
    body = [[row[place] for place in kept] for row in known]
    rule = ["---" if place == 0 else "---:" for place in kept]
    return [f"| {' | '.join(row)} |" for row in (body[0], rule, *body[1:])]


def _seconds(amount_us: int) -> str:
    """Three digits of a second, exactly."""
    sign, whole = ("-", -amount_us) if amount_us < 0 else ("", amount_us)
    return f"{sign}{whole // 1_000_000:,}.{whole // 1000 % 1000:03d}"


def _exact(amount_us: int) -> str:
    """To the microsecond: what is reconciled must not hide in a digit that is not shown."""
    sign, whole = ("-", -amount_us) if amount_us < 0 else ("", amount_us)
    return f"{sign}{whole // 1_000_000:,}.{whole % 1_000_000:06d}"


def _text(text: str) -> str:
    """Somebody's text within a line, in which nothing is markup; pseudonyms are cut."""
    text = f"{text[:12]}…" if len(text) == 64 else text
    flat = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return re.sub(r"([\\`*_\[\]|<>~&])", r"\\\1", flat)
