"""What routing by complexity costs and gives: ``python -m benchmarks.routing.run``.

Cost: wall and CPU time of scoring one prompt of 32 and of 128 tokens on one thread, everything
included (features, tokens, encoder, heads), and prompts a second in calls of 8 and of 32. Goal:
p50 at most 10 ms and p99 at most 30 ms for 128 tokens on one idle core. Where the machine is not
idle, the time on the clock is that of the other work too, and the goal is judged by the CPU time;
the figures say which it was.

Gain: with ``--outcomes FILE`` (as for ``python -m routing.evaluate``), the mean score against the
share of strong calls, for the scorer and what it is compared with, as JSON and as a picture. Give
``--artefact`` a scorer that was not trained on these rows; the committed one was trained on all
development data.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from routing import metrics
from routing.complexity import ComplexityScorer
from routing.dataset import Outcomes, read
from routing.encoder import TOKENIZER_FILE, open_tokenizer
from routing.evaluate import ARTEFACT, LEAST_ROWS, word_counts

RESULTS = Path(__file__).parent / "results"
GOAL_P50_MS, GOAL_P99_MS = 10.0, 30.0
IDLE_LOAD = 0.5
"""Load average of the last minute below which a machine counts as idle."""
TEXT = (
    "A train leaves the station at 9:15 and travels 240 km at an average speed of 80 km/h. "
    "It waits 20 minutes at a junction, then returns on a line that is 30 km shorter. "
)


def prompt_of(tokens: int) -> str:
    """A text of exactly this many tokens, the two markers among them."""
    tokenizer = open_tokenizer((ARTEFACT / TOKENIZER_FILE).read_bytes())
    text = ""
    for word in (TEXT * tokens).split():
        longer = f"{text} {word}".lstrip()
        if len(tokenizer.encode(longer).ids) > tokens:
            break
        text = longer
    # A full stop is one token, whatever stands before it.
    return text + "." * (tokens - len(tokenizer.encode(text).ids))


def latency(scorer: ComplexityScorer, tokens: int, rounds: int) -> dict[str, float]:
    """Percentiles of one prompt, in milliseconds."""
    prompt = [prompt_of(tokens)]
    for _ in range(20):
        scorer.score(prompt)
    wall, cpu = [], []
    for _ in range(rounds):
        start, busy = time.perf_counter_ns(), time.process_time_ns()
        scorer.score(prompt)
        wall.append((time.perf_counter_ns() - start) / 1e6)
        cpu.append((time.process_time_ns() - busy) / 1e6)
    return {
        "tokens": tokens,
        "wall_p50_ms": round(float(np.percentile(wall, 50)), 3),
        "wall_p99_ms": round(float(np.percentile(wall, 99)), 3),
        "cpu_p50_ms": round(float(np.percentile(cpu, 50)), 3),
        "cpu_p99_ms": round(float(np.percentile(cpu, 99)), 3),
    }


def throughput(scorer: ComplexityScorer, size: int, seconds: float) -> dict[str, float]:
    """Prompts a second in calls of ``size`` prompts of 8 to 128 tokens."""
    rng = np.random.default_rng(size)
    prompts = [prompt_of(int(tokens)) for tokens in rng.integers(8, 129, size)]
    scorer.score(prompts)
    calls, start, busy = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        scorer.score(prompts)
        calls += 1
    return {
        "batch": size,
        "prompts_a_second": round(calls * size / (time.perf_counter() - start), 1),
        "prompts_a_cpu_second": round(calls * size / (time.process_time() - busy), 1),
    }


def curves(scorer: ComplexityScorer, rows: Outcomes) -> list[dict[str, Any]]:
    """Mean score at every percent of strong calls, per pair and source."""
    scores = scorer.score(rows.prompt, rows.pair)
    pairs, sources = np.asarray(rows.pair), np.asarray(rows.source)
    found = []
    for pair in sorted(set(rows.pair)):
        names = sorted(set(sources[pairs == pair].tolist()))
        for name in ["all", *names] if len(names) > 1 else ["all"]:
            mask = (pairs == pair) & ((sources == name) | (name == "all"))
            if mask.sum() < LEAST_ROWS:
                continue
            chosen = rows.select(mask)
            routers = {
                "scorer": scores.gain[mask],
                "ridge": scores.ridge[mask],
                "length": word_counts(chosen.prompt),
                "random": np.zeros(len(chosen)),
                "oracle": chosen.gain,
            }
            lines = {
                router: metrics.curve(values, chosen.weak, chosen.strong)
                for router, values in routers.items()
            }
            found.append(
                {
                    "pair": pair,
                    "source": name,
                    "rows": len(chosen),
                    "score": {
                        router: [round(line.at(share / 100), 5) for share in range(101)]
                        for router, line in lines.items()
                    },
                }
            )
    return found


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """The curves of the pooled sets as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wanted = [one for one in found if one["source"] == "all" and len(one["score"]["random"])]
    columns = min(3, len(wanted))
    height = -(-len(wanted) // columns)
    figure, axes = pyplot.subplots(
        height, columns, figsize=(4.6 * columns, 3.7 * height), squeeze=False
    )
    styles = {
        "scorer": {"color": "#0b5cad", "linewidth": 2.2},
        "ridge": {"color": "#d9822b", "linewidth": 1.3},
        "length": {"color": "#5f8f3e", "linewidth": 1.3},
        "random": {"color": "#777777", "linewidth": 1.0, "linestyle": "--"},
    }
    for axis, one in zip(axes.flat, wanted, strict=False):
        for router, style in styles.items():
            axis.plot(range(101), one["score"][router], label=router, **style)
        axis.set_title(f"{one['pair']} ({one['rows']} questions)", fontsize=10)
        axis.set_xlabel("strong calls, %")
        axis.set_ylabel("mean score")
        axis.grid(alpha=0.25)
    for axis in list(axes.flat)[len(wanted) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measure, print one line per goal, and keep the raw figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing.run")
    parser.add_argument("--artefact", type=Path, default=ARTEFACT)
    parser.add_argument("--outcomes", type=Path, nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=3.0, help="per throughput figure")
    parser.add_argument("--skip-cost", action="store_true")
    given = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    scorer = ComplexityScorer.load(given.artefact, threads=1)
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "artefact": scorer.digest,
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime"),
        "processor": _processor(),
        "load_average": os.getloadavg()[0],
    }
    if not given.skip_cost:
        cost = {
            **facts,
            "judged_by": "wall" if facts["load_average"] < IDLE_LOAD else "cpu",
            "latency": [latency(scorer, tokens, given.rounds) for tokens in (32, 128)],
            "throughput": [throughput(scorer, size, given.seconds) for size in (8, 32)],
        }
        (RESULTS / "cost.json").write_text(json.dumps(cost, indent=1) + "\n")
        for line in cost["latency"] + cost["throughput"]:
            print(json.dumps(line))
        found = cost["latency"][-1]
        p50, p99 = found[f"{cost['judged_by']}_p50_ms"], found[f"{cost['judged_by']}_p99_ms"]
        verdict = "holds" if p50 <= GOAL_P50_MS and p99 <= GOAL_P99_MS else "does not hold"
        print(
            f"128 tokens, {cost['judged_by']} time: p50 {p50} ms (goal {GOAL_P50_MS}), p99 {p99} "
            f"ms (goal {GOAL_P99_MS}): {verdict}"
        )
    if given.outcomes:
        found = [one for path in given.outcomes for one in curves(scorer, read(path))]
        (RESULTS / "curves.json").write_text(json.dumps({**facts, "curves": found}) + "\n")
        draw(found, RESULTS / "curves.png")
        print(f"{len(found)} curves in {RESULTS.name}/curves.json and curves.png")
    return 0


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
