"""Plots as inline SVG: no script, no network, prints as it looks.

Colours are those of Okabe and Ito (2008), which people with any kind of colour vision tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
_WIDTH, _HEIGHT = 720, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 8, 12, 34


def stacked_days(
    title: str, days: Sequence[str], series: Sequence[tuple[str, Sequence[int]]]
) -> str:
    """Bars by day, stacked by series; amounts in device-microseconds, shown as seconds.

    Args:
        title: For those who hear the page.
        days: ISO dates.
        series: Name and one amount a day; beyond the number of colours they are added up.
    """
    shown = _few(series, len(days))
    sums = [sum(amounts[place] for _, amounts in shown) for place in range(len(days))]
    top_s, step_s = _scale(max(sums, default=0) / 1e6)
    across, down = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    slot = across / max(len(days), 1)
    parts = [_open(title, _HEIGHT)]
    line_s = 0.0
    while line_s <= top_s + 1e-9:
        y = _TOP + down * (1 - line_s / top_s)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
            f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_number(line_s)} s</text>'
        )
        line_s += step_s
    for place, day in enumerate(days):
        below = 0.0
        x = _LEFT + slot * place
        for colour, (name, amounts) in zip(COLOURS, shown, strict=False):
            height = down * amounts[place] / 1e6 / top_s
            if height <= 0:
                continue
            y = _TOP + down - below - height
            parts.append(
                f'<rect x="{x + slot * 0.12:.1f}" y="{y:.2f}" width="{slot * 0.76:.1f}"'
                f' height="{height:.2f}" fill="{colour}"><title>{escape(name)}, {escape(day)}:'
                f" {amounts[place] / 1e6:,.1f} s</title></rect>"
            )
            below += height
        if place % max(1, -(-len(days) // 10)) == 0:
            parts.append(
                f'<text x="{x + slot / 2:.1f}" y="{_HEIGHT - _BOTTOM + 16}"'
                f' text-anchor="middle">{escape(day[5:])}</text>'
            )
    parts.append("</svg>")
    return "".join(parts) + _legend([name for name, _ in shown])


def bars(title: str, lines: Sequence[tuple[str, int, str]]) -> str:
    """Horizontal bars: name, amount, and what is written behind the bar."""
    row, longest = 22, max((amount for _, amount, _ in lines), default=0) or 1
    height = row * len(lines) + 6
    parts = [_open(title, height)]
    for place, (name, amount, said) in enumerate(lines):
        y, width = 4 + row * place, 400 * amount / longest
        parts.append(
            f'<text x="0" y="{y + 12}">{escape(_cut(name))}</text>'
            f'<rect x="170" y="{y + 1}" width="{max(width, 1 if amount else 0):.1f}" height="14"'
            f' fill="{COLOURS[0]}"/>'
            f'<text x="{176 + width:.1f}" y="{y + 12}">{escape(said)}</text>'
        )
    parts.append("</svg>")
    return "".join(parts)


def _open(title: str, height: int) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{escape(title)}</title>"
    )


def _legend(names: Sequence[str]) -> str:
    keys = "".join(
        f'<span><i style="background:{colour}"></i>{escape(_cut(name))}</span>'
        for colour, name in zip(COLOURS, names, strict=False)
    )
    return f'<p class="legend">{keys}</p>' if len(names) > 1 else ""


def _few(series: Sequence[tuple[str, Sequence[int]]], days: int) -> list[tuple[str, Sequence[int]]]:
    """As many series as there are colours; the smallest are added up."""
    ordered = sorted(series, key=lambda each: -sum(each[1]))
    if len(ordered) <= len(COLOURS):
        return ordered
    kept, rest = ordered[: len(COLOURS) - 1], ordered[len(COLOURS) - 1 :]
    summed = [sum(amounts[place] for _, amounts in rest) for place in range(days)]
    return [*kept, (f"others ({len(rest)})", summed)]


def _scale(top: float) -> tuple[float, float]:
    """A round end of an axis, and the step of its lines."""
    if top <= 0:
        return 1.0, 0.5
    magnitude = 10.0 ** len(str(int(top))) / 10 if top >= 1 else 0.1
    while magnitude > top:
        magnitude /= 10
    for factor in (1, 2, 2.5, 5, 10):
        step = magnitude * factor / 2
        if step * 5 >= top:
            count = -(-top // step)
            return step * count, step
    return magnitude * 10, magnitude * 2


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:g}"


def _cut(name: str) -> str:
    return name if len(name) <= 26 else f"{name[:25]}…"
