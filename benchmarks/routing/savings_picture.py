"""The figures of ``savings`` as a picture: what is saved and kept, and the share over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "share 10 %": "#9ecae1",
    "share 30 %": "#4292c6",
    "share 50 %": "#084594",
    "quality 50 %": "#fdae6b",
    "quality 90 %": "#d94801",
    "share 30 %, hysteresis": "#41ab5d",
    "share 50 %, small budget": "#807dba",
}
OVER_TIME = ("share 10 %", "share 30 %", "share 50 %", "share 30 %, hysteresis")
UNDER_PRESSURE = "share 50 %, small budget"
LEAST_REQUESTS = 100
"""Windows with fewer are left out: chance alone moves them by more than the target's width."""


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw one row of two panels for each trace."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    traces = report["traces"]
    figure, axes = pyplot.subplots(len(traces), 2, figsize=(11.5, 4.3 * len(traces)), squeeze=False)
    for row, (name, found) in zip(axes, traces.items(), strict=True):
        title = f"{name}, {found['requests']:,} requests"
        _saved_and_kept(row[0], title, found["settings"])
        _time(row[1], found["settings"])
    axes[0][0].legend(fontsize=8, frameon=False, loc="lower left")
    axes[0][1].legend(fontsize=8, frameon=False, loc="upper right", ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _saved_and_kept(axis: Any, title: str, settings: Mapping[str, Any]) -> None:
    gpu = next(iter(settings.values()))["gpu seconds"]["parameters"]
    most = 100 * (1 - gpu["all small"] / gpu["all large"])
    axis.plot([0, most], [100, 0], "--", color="#777777", linewidth=1, label="at random")
    for name, cell in settings.items():
        saved = 100 * cell["gpu seconds"]["parameters"]["saved against all large"]
        kept = cell["kept"]
        value = 100 * kept["value"]
        error = [[value - 100 * kept["low"]], [100 * kept["high"] - value]]
        axis.errorbar(
            saved, value, error, fmt="o", color=COLOURS[name], capsize=3, markersize=6, label=name
        )
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("GPU time saved against all requests at the large model, %\n(by parameters)")
    axis.set_ylabel("gain of the large model kept, %")
    axis.set_xlim(0, 100)
    _plain(axis)


def _time(axis: Any, settings: Mapping[str, Any]) -> None:
    for name in (*OVER_TIME, UNDER_PRESSURE):
        cell = settings[name]
        minutes, share = _windows(cell["large share over time"])
        dashed = "--" if "hysteresis" in name else "-"
        axis.plot(
            minutes,
            share,
            dashed,
            color=COLOURS[name],
            linewidth=1.8,
            marker=".",
            label=name,
        )
        if "hysteresis" not in name:
            target = _windows(cell["target share over time"])[1]
            axis.plot(minutes, target, ":", color=COLOURS[name], linewidth=1.2)
    axis.set_title("large calls in windows of five minutes; dotted: target", fontsize=10)
    axis.set_xlabel("minutes")
    axis.set_ylabel("large calls, %")
    axis.set_ylim(0, 70)
    _plain(axis)


def _windows(over_time: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Minutes and per cent of the windows that hold enough requests to mean something."""
    kept = [one for one in over_time if one[2] >= LEAST_REQUESTS]
    return [one[0] / 60 for one in kept], [100 * one[1] for one in kept]


def _plain(axis: Any) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
