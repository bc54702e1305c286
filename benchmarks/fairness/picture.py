"""The figures of ``simulate`` and ``engines`` as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "fcfs": "#777777",
    "classes": "#9ecae1",
    "rpm": "#807dba",
    "vtc": "#fdae6b",
    "ours, no floors": "#a1d99b",
    "ours": "#238b45",
    "ours, not told": "#d94801",
    "fair": "#238b45",
    "alone": "#000000",
}
NAMES = {
    "fcfs": "FCFS",
    "classes": "classes only",
    "rpm": "requests a minute",
    "vtc": "plain VTC",
    "fair": "ours",
}


def draw_simulation(report: Mapping[str, Any], path: Path) -> None:
    """Two rows of panels for each trace: who waits how long; how even the service is."""
    pyplot = _pyplot()
    traces = report["summary"]
    figure, axes = pyplot.subplots(
        2 * len(traces), 2, figsize=(13, 8.6 * len(traces)), squeeze=False, width_ratios=(3, 2)
    )
    for place, (trace, scenarios) in enumerate(traces.items()):
        upper, lower = axes[2 * place], axes[2 * place + 1]
        _waits(upper[0], scenarios, "flood", trace)
        _gap(upper[1], scenarios)
        _waits(lower[0], scenarios, "batch flood", trace)
        _engines(lower[1], scenarios)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _waits(axis: Any, scenarios: Mapping[str, Any], scenario: str, trace: str) -> None:
    """99th percentile of the time to first token, by department and arm."""
    arms = {name: cell for name, cell in scenarios.get(scenario, {}).items() if name != "alone"}
    if not arms:
        axis.set_axis_off()
        return
    alone = scenarios.get(scenario, {}).get("alone")
    departments = list(next(iter(arms.values()))["p99 TTFT, s"])
    width = 0.8 / len(arms)
    for place, (arm, cell) in enumerate(arms.items()):
        values = [cell["p99 TTFT, s"][name] for name in departments]
        at = [d + (place - (len(arms) - 1) / 2) * width for d in range(len(departments))]
        axis.bar(
            at,
            [value["mean"] if value else 0 for value in values],
            width,
            color=COLOURS[arm],
            label=NAMES.get(arm, arm),
            yerr=_errors(values),
            error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
        )
    if alone is not None:
        reference = alone["critical p99 TTFT, s"]["mean"]
        axis.plot([-0.45, 0.45], [reference] * 2, color="#000000", linewidth=1.6, label="alone")
        axis.plot([-0.45, 0.45], [1.2 * reference] * 2, ":", color="#000000", label="1.2 x alone")
    axis.set_yscale("log")
    axis.set_xticks(range(len(departments)), departments, fontsize=8)
    axis.set_ylabel("p99 time to first token, s (log)")
    axis.set_title(f"{trace}: {scenario}, ten times its share", fontsize=10)
    # Over the bars there is always room on a logarithmic scale once it is made.
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * 12)
    axis.legend(fontsize=7, frameon=False, ncol=3, loc="upper left")
    _plain(axis)


def _gap(axis: Any, scenarios: Mapping[str, Any]) -> None:
    """Largest service gap as a share of VTC's bound."""
    cells = [
        (scenario, arm, cell["gap, gpu_us"]["share of bound"])
        for scenario in ("flood", "peak")
        for arm, cell in scenarios.get(scenario, {}).items()
        if arm not in ("alone", "ours, no floors")
    ]
    for place, (_, arm, value) in enumerate(cells):
        axis.plot(value["worst"] * 100, place, "o", color=COLOURS[arm], markersize=7)
        axis.plot([0.01, value["worst"] * 100], [place] * 2, color=COLOURS[arm], linewidth=1)
    axis.axvline(100, linestyle="--", color="#cc0000", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlim(0.1, 2_000)
    axis.set_yticks(
        range(len(cells)), [f"{scenario}, {NAMES.get(arm, arm)}" for scenario, arm, _ in cells],
        fontsize=8,
    )  # fmt: skip
    axis.invert_yaxis()
    axis.set_xlabel("largest service gap, % of VTC's bound (log)")
    axis.set_title("largest gap of two backlogged departments", fontsize=10)
    _plain(axis)


def _engines(axis: Any, scenarios: Mapping[str, Any]) -> None:
    """Evenness of weighted service over two engines."""
    arms = scenarios.get("engines", {})
    for place, (arm, cell) in enumerate(arms.items()):
        value = cell["jain"]
        if value is None:
            continue
        axis.bar(
            place,
            1 - value["mean"],
            0.7,
            color=COLOURS[arm],
            yerr=_errors([value]),
            error_kw={"elinewidth": 0.8},
        )
    axis.set_xticks(
        range(len(arms)), [NAMES.get(arm, arm).replace(", ", ",\n") for arm in arms], fontsize=8
    )
    axis.set_ylim(bottom=0)
    axis.set_ylabel("1 - Jain's index of weighted service")
    axis.set_title("two engines, marketing bound to one", fontsize=10)
    _plain(axis)


def _errors(values: Sequence[Mapping[str, Any] | None]) -> list[list[float]] | None:
    if any(value is None or value["low"] is None for value in values):
        return None
    known = [value for value in values if value is not None]
    return [
        [min(v["mean"] - v["low"], 0.9 * abs(v["mean"])) for v in known],
        [v["high"] - v["mean"] for v in known],
    ]


def draw_engines(report: Mapping[str, Any], path: Path) -> None:
    """Waits of every request in a round, and their distribution."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.4), width_ratios=(3, 3, 2))
    for axis, arm in zip(axes[:2], ("fcfs", "fair"), strict=True):
        rows = report["raw"][arm][-1]
        for department, colour, mark in (
            ("marketing", "#bbbbbb", "."),
            ("data-science", "#4292c6", "."),
            ("support-desk", "#d94801", "o"),
        ):
            mine = [row for row in rows if row[0] == department]
            axis.plot(
                [row[1] for row in mine],
                [row[2] for row in mine],
                mark,
                color=colour,
                markersize=5 if mark == "o" else 4,
                linestyle="none",
                label=department,
            )
        axis.set_yscale("log")
        axis.set_title(f"{NAMES[arm]}: last round", fontsize=10)
        axis.set_xlabel("request came, s")
        axis.set_ylabel("time to first token, s (log)")
        _plain(axis)
    limits = [axis.get_ylim() for axis in axes[:2]]
    for axis in axes[:2]:
        axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    axes[0].legend(fontsize=8, frameon=False)
    for arm in ("fcfs", "fair"):
        took = sorted(
            row[2] for phase in report["raw"][arm] for row in phase if row[0] == "support-desk"
        )
        shares = [(place + 1) / len(took) for place in range(len(took))]
        axes[2].step(
            took, shares, where="post", color=COLOURS[arm], label=NAMES[arm], linewidth=1.8
        )
    axes[2].set_xscale("log")
    axes[2].set_xlabel("critical: time to first token, s (log)")
    axes[2].set_ylabel("share of requests")
    axes[2].set_title("critical requests of all rounds", fontsize=10)
    axes[2].legend(fontsize=8, frameon=False)
    _plain(axes[2])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _plain(axis: Any) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
