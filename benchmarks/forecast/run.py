"""Is a forecast of budgets better than going on as before? ``make bench-forecast``, half a minute.

**Series.** Hourly spending of made-up departments, ten weeks each, by a fixed seed: ``office``
(working hours, grows 3 % a week), ``nights`` (batches at night, one night in five without),
``steady`` (round the clock), ``sparse`` (three hours a day), ``launch`` (office, and its level
jumps by a factor of 1.5 to 3 somewhere in the last four weeks). Days differ by a factor that
remembers the day before (AR(1), 0.5; standard deviation 0.2 to 0.4 on a logarithmic scale).
``trace``: the hours of ``office``, and in each hour a Poisson number of requests whose sizes are
drawn from the public Azure traces of 2023 (20 us of device time a prompt token, 2 ms an answer
token); with ``--traces FOLDER`` only.

**Task.** At a random moment, with so much on record, foretell what a window of a month (or a week)
will have spent at its end. Error: sum of absolute errors of what was still to come, by the sum of
what came. Rivals: the last 24 hours go on (``flat``), and the average since the window began goes
on (``since start``), which is what a table with a burn rate suggests. Coverage: share of outcomes
in the interval, which promises 80 %.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from governance.finops.burn import HOUR_US, since_start
from governance.finops.forecast import DAY, WEEK, History, Span, flat, forecast

Floats = NDArray[np.float64]

RESULTS = Path(__file__).parent / "results" / "forecast.json"
START_US = 1_767_571_200_000_000
"""Monday, 5 January 2026, UTC."""
HOURS = 10 * WEEK
KINDS = ("office", "nights", "steady", "sparse", "launch")
RECORDS = {"1 day": DAY, "4 days": 4 * DAY, "2 weeks": 2 * WEEK, "6 weeks": 6 * WEEK}
"""How much is on record when the forecast is made, hours."""
WINDOWS = {"week": WEEK, "month": 30 * DAY}


def series(kind: str, random: np.random.Generator) -> Floats:
    """Amounts by hour, device-microseconds."""
    hours = np.arange(HOURS)
    hour, weekday = hours % DAY, hours // DAY % 7
    working = (weekday < 5) * np.exp(-(((hour - 13.5) / 3.5) ** 2))
    shape = {
        "office": working + 0.03,
        "launch": working + 0.03,
        "nights": ((hour >= 1) & (hour < 5)) * (random.random(HOURS // DAY) > 0.2)[hours // DAY],
        "steady": np.ones(HOURS),
        "sparse": (random.random(HOURS) < 3 / DAY).astype(float),
    }[kind]
    days = np.zeros(HOURS // DAY)
    spread = random.uniform(0.2, 0.4)
    for day in range(1, len(days)):
        days[day] = 0.5 * days[day - 1] + random.normal(0, spread * np.sqrt(0.75))
    growth = np.exp(0.03 * hours / WEEK) if kind in {"office", "launch"} else np.ones(HOURS)
    if kind == "launch":
        growth = growth * np.where(
            hours > random.integers(6 * WEEK, 9 * WEEK), random.uniform(1.5, 3.0), 1.0
        )
    noise = random.gamma(4.0, 0.25, HOURS)
    return np.asarray(3e7 * shape * np.exp(days)[hours // DAY] * growth * noise)


def traced(costs: Floats, random: np.random.Generator) -> Floats:
    """As ``office``, made of single requests of the traces."""
    rates = series("office", random)
    counts = random.poisson(rates / rates.mean() * 40)
    return np.asarray([random.choice(costs, count).sum() for count in counts], dtype=np.float64)


def costs(folder: Path) -> Floats:
    """Device time of each request of the Azure traces, by the prices above."""
    found = []
    for path in sorted(folder.glob("azure_llm_2023_*.csv.gz")):
        with gzip.open(path) as stream:
            for row in csv.DictReader(io.TextIOWrapper(stream, "utf-8")):
                found.append(20 * int(row["ContextTokens"]) + 2000 * int(row["GeneratedTokens"]))
    return np.asarray(found, dtype=np.float64)


def judge(made: list[Floats], record: int, window: int, random: np.random.Generator) -> Any:
    """Errors of all rivals over many moments."""
    errors = {"forecast": 0.0, "flat": 0.0, "since start": 0.0}
    came = inside = count = 0.0
    for amounts in made:
        for _ in range(3):
            now = int(random.integers(record, HOURS - window // 2))
            # The window has run for a third of its length at most, and no longer than the record.
            ran = int(min(record, random.integers(1, window // 3)))
            end = min(now - ran + window, HOURS)
            history = History(
                START_US + (now - record) * HOUR_US,
                tuple(int(value) for value in amounts[now - record : now]),
            )
            now_us, end_us = START_US + now * HOUR_US, START_US + end * HOUR_US
            spent = int(amounts[now - ran : now].sum())
            truth = float(amounts[now - ran : end].sum())
            span = Span(end_us, spent, None)
            found = forecast(history, span, now_us, paths=200, seed=now)
            rate = since_start(spent, now_us - ran * HOUR_US, now_us)
            guesses = {
                "forecast": found.spent,
                "flat": flat(history, span, now_us),
                "since start": spent + rate * (end - now),
            }
            for name, guess in guesses.items():
                errors[name] += abs(guess - truth)
            came += truth - spent
            inside += found.low <= truth <= found.high
            count += 1
    return {
        **{name: round(error / came, 3) for name, error in errors.items()},
        "coverage": round(inside / count, 3),
        "moments": int(count),
    }


def run(seed: int, each: int, traces: Path | None) -> dict[str, Any]:
    """All kinds, records and windows."""
    random = np.random.default_rng(seed)
    made = {kind: [series(kind, random) for _ in range(each)] for kind in KINDS}
    if traces is not None:
        sizes = costs(traces)
        made["trace"] = [traced(sizes, random) for _ in range(each)]
    began = time.process_time()
    rows = {
        f"{kind}, {record} on record, {window}": judge(
            amounts, RECORDS[record], WINDOWS[window], random
        )
        for kind, amounts in made.items()
        for record in RECORDS
        for window in WINDOWS
    }
    moments = sum(row["moments"] for row in rows.values())
    return {
        "method": __doc__,
        "seed": seed,
        "series_of_each_kind": each,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cpu_ms_a_forecast": round((time.process_time() - began) * 1000 / moments, 2),
        "rows": rows,
    }


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=20261201)
    parser.add_argument("--each", type=int, default=12, help="series of each kind")
    parser.add_argument("--traces", type=Path, help="folder of the Azure traces")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    found = run(given.seed, given.each, given.traces)
    names = ("forecast", "flat", "since start", "coverage", "moments")
    print(f"{'':<40}" + "".join(f"{name:>13}" for name in names))
    for row, figures in found["rows"].items():
        print(f"{row:<40}" + "".join(f"{figures[name]:>13}" for name in names))
    print(f"{found['cpu_ms_a_forecast']} ms of CPU a forecast")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
