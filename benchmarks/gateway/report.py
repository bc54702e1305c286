"""Figures of many rounds as one table, and the goals held against them. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.gateway.targets import EVENTS

CASES = ("plain", "stream", "paced")
GOAL_RATIO = 10
"""LiteLLM's CPU over ours, at least."""
_MEDIANS = (
    "rps",
    "p50",
    "p99",
    "ttfb_p50",
    "ttfb_p99",
    "cpu_ms",
    "cpu_ms_with_engines",
    "gross_cpu_ms",
    "gross_cpu_ms_with_engines",
)

Row = dict[str, Any]


Idle = dict[str, dict[str, float]]
"""CPU without requests, in ms per second, by target: ``gateway`` and ``all`` with engines."""


def mean_idle(samples: list[Idle]) -> Idle:
    """Mean of several watches."""
    return {
        name: {
            part: round(statistics.mean(sample[name][part] for sample in samples), 2)
            for part in ("gateway", "all")
        }
        for name in samples[0]
    }


def net(cell: Row, idle: Idle) -> Row:
    """The cell with what its requests cost: CPU less what the target takes without any."""
    own = idle[cell["target"]]
    spared = 1 / max(cell["answers_per_s"], 1e-9)
    return {
        **cell,
        "cpu_ms": max(0.0, cell["gross_cpu_ms"] - own["gateway"] * spared),
        "cpu_ms_with_engines": max(0.0, cell["gross_cpu_ms_with_engines"] - own["all"] * spared),
    }


def summary(cells: Iterable[Row], idle: Idle) -> list[Row]:
    """Median over rounds of each (case, concurrency, target), and what it adds to ``direct``."""
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for cell in (net(cell, idle) for cell in cells):
        group_key = (cell["case"], cell["concurrency"], cell["target"])
        groups.setdefault(group_key, []).append(cell)
    rows: list[Row] = []
    for (case, concurrency, target), group in groups.items():
        row: Row = {"case": case, "concurrency": concurrency, "target": target}
        answered = [cell for cell in group if cell["n"]] or group
        row.update({key: _median(cell[key] for cell in answered) for key in _MEDIANS})
        row["best_cpu_ms"] = min(cell["cpu_ms"] for cell in group)
        row["memory_mb"] = _median(cell["memory_mb"]["gateway"] for cell in group)
        row["memory_mb_with_engines"] = _median(cell["memory_mb"]["all"] for cell in group)
        row["bad"] = sum(cell["bad"] for cell in group)
        row["answers"] = sum(cell["n"] for cell in group)
        if case == "paced":
            row["cpu_us_per_event"] = round(row["cpu_ms"] * 1000 / EVENTS, 2)
            row["gross_cpu_us_per_event"] = round(row["gross_cpu_ms"] * 1000 / EVENTS, 2)
        direct = groups.get((case, concurrency, "direct"))
        if direct and target != "direct":
            for key in ("p50", "p99"):
                row[f"added_{key}"] = round(row[key] - _median(c[key] for c in direct), 3)
        rows.append(row)
    return rows


def goals(rows: Iterable[Row]) -> list[Row]:
    """The two goals at each concurrency, each with its figures and whether it holds."""
    found = {(row["case"], row["concurrency"], row["target"]): row for row in rows}
    lines: list[Row] = []
    for case, key, unit, what in (
        ("plain", "cpu_ms", "ms", "plain request"),
        ("paced", "cpu_us_per_event", "µs", "streamed event"),
    ):
        for concurrency in sorted({c for k, c, _ in found if k == case}):
            ours = found.get((case, concurrency, "gatehouse"))
            theirs = found.get((case, concurrency, "litellm"))
            if ours is None or theirs is None:
                continue
            ratio = theirs[key] / max(ours[key], 1e-9)
            clean = not ours["bad"] and not theirs["bad"]
            gross = theirs[f"gross_{key}"] / max(ours[f"gross_{key}"], 1e-9)
            # Both: what a request adds, and what the whole costs with an idle cluster's share.
            holds = clean and min(ratio, gross) >= GOAL_RATIO
            measured = (
                f"{ours[key]:.3g} {unit} against {theirs[key]:.3g} {unit}, 1/{ratio:.1f} "
                f"(1/{gross:.1f} with what each takes without requests)"
            )
            lines.append(
                {
                    "goal": f"CPU of a {what} at most a tenth of LiteLLM's, {concurrency} at once",
                    "measured": measured if clean else f"{measured}, with bad answers",
                    "ratio": round(ratio, 2),
                    "gross_ratio": round(gross, 2),
                    "holds": holds,
                }
            )
    return lines


def table(rows: Iterable[Row], idle: Idle) -> str:
    """Markdown: one line for each case, concurrency and target."""
    lines = [
        "| case | c | target | answers/s | p50 ms | p99 ms | first byte p50 ms "
        "| added p50 ms | added p99 ms | CPU ms | gross | with engines | CPU µs/event | gross "
        "| PSS MB | with engines | bad |",
        "|" + "---|" * 17,
    ]
    lines += [
        f"| {r['case']} | {r['concurrency']} | {r['target']} | {r['rps']:.0f} | {r['p50']:.2f} "
        f"| {r['p99']:.2f} | {r['ttfb_p50']:.2f} | {_cell(r.get('added_p50'), 2)} "
        f"| {_cell(r.get('added_p99'), 2)} | {r['cpu_ms']:.3f} | {r['gross_cpu_ms']:.3f} "
        f"| {r['gross_cpu_ms_with_engines']:.3f} | {_cell(r.get('cpu_us_per_event'), 1)} "
        f"| {_cell(r.get('gross_cpu_us_per_event'), 1)} | {r['memory_mb']:.0f} "
        f"| {r['memory_mb_with_engines']:.0f} | {r['bad']} |"
        for r in sorted(rows, key=lambda r: (CASES.index(r["case"]), r["concurrency"]))
    ]
    idles = ", ".join(f"{name} {ms['gateway']:.1f} ({ms['all']:.1f})" for name, ms in idle.items())
    return "\n".join(lines) + f"\n\nCPU without requests, ms per second (with engines): {idles}"


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 4)


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
