"""A showback as one HTML file: nothing is loaded, nothing runs; it prints a page a department."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from html import escape

from deployments.showback_svg import bars, stacked_days
from governance.finops.showback import Allowance, Department, Line, Price, Showback

_STYLE = """
:root { color-scheme: light; }
body { font: 14px/1.45 system-ui, sans-serif; color: #1a1a1a; max-width: 60em; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: 0; } h2 { font-size: 1.25em; margin: 0 0 .2em; }
h3 { font-size: 1em; margin: 1.2em 0 .3em; } p.sub { color: #555; margin-top: .2em; }
section { border-top: 2px solid #ddd; margin-top: 2em; padding-top: 1em; }
dl { display: flex; flex-wrap: wrap; gap: .6em; margin: 1em 0; }
dl div { border: 1px solid #ddd; border-radius: 4px; padding: .4em .9em; }
dt { color: #555; font-size: .85em; } dd { margin: 0; font-size: 1.25em; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25em .6em; border-bottom: 1px solid #e5e5e5; }
td.text { overflow-wrap: break-word; max-width: 22em; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
th { font-weight: 600; background: #f6f6f6; }
tr.total td { font-weight: 600; border-top: 2px solid #999; }
svg { width: 100%; height: auto; margin: .5em 0 0; } svg text { font: 11px system-ui, sans-serif;
  fill: #333; } svg .grid { stroke: #e2e2e2; }
p.legend { display: flex; flex-wrap: wrap; gap: .3em 1.2em; margin: .2em 0 1em; font-size: .9em; }
p.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
p.note { color: #555; font-size: .9em; } .differs { color: #b00020; font-weight: 600; }
@page { size: A4; margin: 14mm; }
@media print {
  body { margin: 0; max-width: none; font-size: 10.5px; padding: 0; }
  section { break-before: page; border-top: 0; margin-top: 0; padding-top: 0; }
  table, svg, dl { break-inside: avoid; } tr { break-inside: avoid; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""


def as_html(found: Showback) -> str:
    """The whole report."""
    last = found.after - timedelta(days=1)
    title = f"GPU usage by department, {found.first} to {last}"
    days = [day.name for day in found.days]
    series = [
        (each.name, tuple(day.charged_us for day in each.days))
        for each in found.departments
        if each.total.charged_us
    ]
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="sub">Days of {escape(found.zone)}. Charged seconds are metered device-seconds, '
        "weighted by the kind of accelerator. A request counts when it ended.</p>",
        _tiles(found.total, sum(each.refused for each in found.departments), found.price),
        "<h3>Charged seconds by day</h3>",
        stacked_days("Charged seconds by day and department", days, series),
        "<h3>Departments</h3>",
        _lines("department", [each.total for each in found.departments], found.total, found.price),
    ]
    body += [_page(each, found) for each in found.departments]
    body += [_reconciliation(found)] if found.reconciled else []
    body += [f'<p class="note">{escape(note)}</p>' for note in found.notes]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Whatever a name might smuggle in, nothing is fetched and nothing runs.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _page(department: Department, found: Showback) -> str:
    total, days = department.total, [day.name for day in department.days]
    parts = [f"<section><h2>{escape(department.name)}</h2>"]
    if department.allowance is not None:
        parts.append(f'<p class="sub">Budget: {escape(_budget(department.allowance))}</p>')
    parts.append(_tiles(total, department.refused, found.price, department.people))
    if total.charged_us:
        parts.append("<h3>Charged seconds by day and model</h3>")
        parts.append(
            stacked_days(f"Charged seconds of {department.name}", days, department.model_days)
        )
    for heading, names in (
        ("model", department.models),
        ("part", department.parts),
        ("application", department.applications),
    ):
        if names:
            parts.append(f"<h3>By {heading}</h3>")
            parts.append(_lines(heading, names, total, found.price))
    if department.persons and total.charged_us:
        parts.append("<h3>By person (pseudonyms)</h3>")
        parts.append(
            bars(
                f"Persons of {department.name}",
                [
                    (_short(each.name), each.charged_us,
                     f"{_seconds(each.charged_us)} s, {each.tokens:,} tokens")
                    for each in department.persons
                ],
            )
        )  # fmt: skip
    if department.changes:
        parts.append("<h3>Changes and thresholds</h3>")
        rows = [
            (each.at, each.account, each.what, _short(each.by or ""), each.reason or "")
            for each in department.changes
        ]
        parts.append(_table(("when", "account", "what", "by", "why"), rows, text=5))
    parts.append("</section>")
    return "\n".join(parts)


def _tiles(total: Line, refused: int, price: Price | None, people: int | None = None) -> str:
    tiles = [
        ("charged seconds", _seconds(total.charged_us)),
        ("metered seconds", _seconds(total.gpu_us)),
        ("requests", f"{total.requests:,}"),
        ("tokens", f"{total.tokens:,}"),
        ("refused by a budget", f"{refused:,}"),
    ]
    if people is not None:
        tiles.append(("people", f"{people:,}"))
    if price is not None:
        tiles.append(("cost", f"{price.cost(total.charged_us):,} {price.currency}"))
    return (
        "<dl>"
        + "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles)
        + "</dl>"
    )


def _lines(heading: str, lines: Sequence[Line], total: Line, price: Price | None) -> str:
    headings = [heading, "charged s", "share", "metered s", "requests", "input tokens",
                "output tokens"]  # fmt: skip
    rows = []
    for line in (*lines, total):
        share = 100 * line.charged_us / total.charged_us if total.charged_us else 0.0
        row = [
            _short(line.name) if line is not total else "total",
            _seconds(line.charged_us),
            f"{share:.1f} %",
            _seconds(line.gpu_us),
            f"{line.requests:,}",
            f"{line.input_tokens:,}",
            f"{line.output_tokens:,}",
        ]
        rows.append(row if price is None else [*row, f"{price.cost(line.charged_us):,}"])
    if price is not None:
        headings.append(f"cost, {price.currency}")
    return _table(headings, rows, total=True)


def _reconciliation(found: Showback) -> str:
    headings = ("department", "since", "ledger s", "trail s", "difference s", "ledger tokens",
                "trail tokens", "difference")  # fmt: skip
    rows = []
    for each in found.reconciled:
        rows.append(
            (each.department, each.since, _exact(each.ledger_us), _exact(each.trail_us),
             _exact(each.difference_us), f"{each.ledger_tokens:,}", f"{each.trail_tokens:,}",
             f"{each.difference_tokens:,}")
        )  # fmt: skip
    differ = sum(bool(each.difference_us or each.difference_tokens) for each in found.reconciled)
    verdict = (
        f'<span class="differs">{differ} sums differ.</span>'
        if differ
        else "All sums agree, to the microsecond."
    )
    return (
        "<section><h2>Ledger and audit trail</h2>"
        '<p class="note">What the ledger charged, and what the trail says. Requests in flight are '
        f"in the ledger before they are in the trail. {verdict}</p>"
        + _table(headings, rows, text=2)
        + "</section>"
    )


def _table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, text: int = 1, total: bool = False
) -> str:
    known = list(rows)

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f'<{tag} class="text">{escape(cell)}</{tag}>'
            if place < text
            else f"<{tag}>{escape(cell)}</{tag}>"
            for place, cell in enumerate(row)
        )

    body = "".join(
        f'<tr class="total">{cells(row, "td")}</tr>'
        if total and place == len(known) - 1
        else f"<tr>{cells(row, 'td')}</tr>"
        for place, row in enumerate(known)
    )
    return f"<table><thead><tr>{cells(headings, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def _budget(allowance: Allowance) -> str:
    said = []
    if allowance.limit_us is not None:
        said.append(f"{allowance.limit_us // 1_000_000:,} charged seconds")
    if allowance.limit_tokens is not None:
        said.append(f"{allowance.limit_tokens:,} tokens")
    owner = f", owner {allowance.owner}" if allowance.owner else ""
    return f"{' and '.join(said) or 'no limit'} a {allowance.window}, {allowance.mode}{owner}"


def _seconds(amount_us: int) -> str:
    sign, whole = ("-", -amount_us) if amount_us < 0 else ("", amount_us)
    return f"{sign}{whole // 1_000_000:,}.{whole // 1000 % 1000:03d}"


def _exact(amount_us: int) -> str:
    """To the microsecond: what is reconciled must not hide in a digit that is not shown."""
    sign, whole = ("-", -amount_us) if amount_us < 0 else ("", amount_us)
    return f"{sign}{whole // 1_000_000:,}.{whole % 1_000_000:06d}"


def _short(name: str) -> str:
    """A pseudonym is 64 digits long; twelve tell people apart."""
    return f"{name[:12]}…" if len(name) == 64 else name
