"""From the runs of ``simulate`` to figures over seeds, paired by seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.fairness import measures

CRITICAL_NAME = "support-desk"
LEAST_TOGETHER_S = 60.0
"""Seconds of common waiting below which evenness says nothing."""
Row = Mapping[str, Any]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Figures by trace, scenario and arm."""
    by_key = {(r["trace"], r["scenario"], r["arm"], r["seed"]): r for r in rows}
    found: dict[str, Any] = {}
    for trace, scenario, arm in dict.fromkeys((r["trace"], r["scenario"], r["arm"]) for r in rows):
        mine = [r for r in rows if (r["trace"], r["scenario"], r["arm"]) == (trace, scenario, arm)]
        pairs = [
            (
                row,
                by_key.get((trace, scenario, "alone", row["seed"])),
                by_key.get((trace, scenario, "fcfs", row["seed"])),
            )
            for row in mine
        ]
        found.setdefault(trace, {}).setdefault(scenario, {})[arm] = _cell(pairs)
    return found


def _cell(pairs: Sequence[tuple[Row, Row | None, Row | None]]) -> dict[str, Any]:
    mine = [row for row, _, _ in pairs]
    cell: dict[str, Any] = {
        "seeds": len(mine),
        "critical p99 TTFT, s": _interval((critical_p99(row) for row in mine), ratio=True),
        "critical p99 TTFT against alone": _interval(
            (critical_p99(row) / critical_p99(alone) for row, alone, _ in pairs if alone),
            ratio=True,
        ),
        "critical p99 TTFT, FCFS against it": _interval(
            (critical_p99(fcfs) / critical_p99(row) for row, _, fcfs in pairs if fcfs),
            ratio=True,
        ),
        "throughput lost against FCFS": _interval(
            measures.lost(row["throughput"], fcfs["throughput"]) for row, _, fcfs in pairs if fcfs
        ),
        "device time for the same work, FCFS against it": _interval(
            (
                fcfs["busy_s"] / row["busy_s"]
                for row, _, fcfs in pairs
                if fcfs and row["tokens"] == fcfs["tokens"]
            ),
            ratio=True,
        ),
        "refused": _interval(row["refused"] / row["requests"] for row in mine),
        "p99 TTFT, s": {
            name: _interval(
                (
                    row["waiting"][name]["ttft_p99_s"]
                    for row in mine
                    if row["waiting"].get(name, {}).get("ttft_p99_s")
                ),
                ratio=True,
            )
            for name in dict.fromkeys(name for row in mine for name in row["waiting"])
        },
        "most TTFT of the batch class, s": _interval(
            row["waiting"]["archive"]["ttft_max_s"]
            for row in mine
            if row["waiting"].get("archive", {}).get("ttft_max_s") is not None
        ),
        "jain": _interval(
            row["evenness"]["jain"]
            for row in mine
            if row["evenness"]["seconds"] >= LEAST_TOGETHER_S
        ),
    }
    cell["gap against stake"] = _interval(
        row["gaps"]["stake"]["largest share of bound"] for row in mine if "stake" in row["gaps"]
    )
    for unit in ("gpu_us", "tokens"):
        cell[f"gap, {unit}"] = {
            "share of bound": _interval(
                row["gaps"][unit]["largest share of bound"] for row in mine
            ),
            "violations": sum(row["gaps"][unit]["violations"] for row in mine),
            "stretches": sum(row["gaps"][unit]["stretches"] for row in mine),
        }
    return cell


def critical_p99(row: Row) -> float:
    """Critical requests' 99th percentile of the time to the first token, in seconds."""
    return float(row["waiting"][CRITICAL_NAME]["ttft_p99_s"])


def _interval(values: Iterable[float], *, ratio: bool = False) -> dict[str, Any] | None:
    given = list(values)
    return measures.interval(given, ratio=ratio) if given else None


def line(trace: str, scenario: str, arm: str, cell: Mapping[str, Any]) -> str:
    """One cell in one line."""
    parts = [f"{trace}, {scenario}, {arm}:"]
    if (found := cell["critical p99 TTFT against alone"]) is not None:
        parts.append(f"critical p99 {found['mean']:.2f}x alone{_spread(found)};")
    if (found := cell["throughput lost against FCFS"]) is not None:
        parts.append(f"throughput lost {found['mean']:.2%};")
    gap = cell["gap, gpu_us"]
    parts.append(f"gap at most {gap['share of bound']['worst']:.1%} of the bound,")
    parts.append(f"{gap['violations']} of {gap['stretches']} stretches over it")
    return " ".join(parts)


def _spread(found: Mapping[str, Any]) -> str:
    return "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"


ARMS = {
    "fcfs": "first come, first served",
    "classes": "classes only",
    "rpm": "requests a minute",
    "vtc": "plain VTC",
    "ours, no floors": "ours, no floors",
    "ours": "ours",
    "ours, not told": "ours, engines not told of each other",
}
"""Names of arms in tables, in their order."""


def table(report: Mapping[str, Any]) -> str:
    """The recorded simulation as a Markdown table: means over seeds, and the worst gap."""
    lines = [
        "| trace | scenario | arm | critical p99, times alone | data science p99, s | refused "
        "| throughput lost | gap, % of bound | over it | Jain |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for trace, scenarios in report["summary"].items():
        for scenario, arms in scenarios.items():
            for arm, name in ARMS.items():
                if (cell := arms.get(arm)) is None:
                    continue
                gap = cell["gap, gpu_us"]
                lines.append(
                    "| "
                    + " | ".join(
                        (
                            trace.removeprefix("azure_llm_2023_"),
                            scenario,
                            name,
                            _shown(cell["critical p99 TTFT against alone"], "{:.2f}", spread=True),
                            _shown(cell["p99 TTFT, s"].get("data-science"), "{:.2f}"),
                            _shown(cell["refused"], "{:.0%}"),
                            _shown(cell["throughput lost against FCFS"], "{:+.1%}"),
                            f"{gap['share of bound']['worst']:.1%}",
                            f"{gap['violations']} of {gap['stretches']}",
                            _shown(cell["jain"], "{:.3f}"),
                        )
                    )
                    + " |"
                )
    return "\n".join(lines)


def _shown(found: Mapping[str, Any] | None, form: str, *, spread: bool = False) -> str:
    if found is None:
        return ""
    if spread and found["mean"] >= 10:
        form = "{:.0f}"
    text = form.format(found["mean"])
    if spread and found["low"] is not None:
        text += f" [{form.format(found['low'])}, {form.format(found['high'])}]"
    return text
