"""What a score costs a request: ``python -m benchmarks.routing.latency``.

1. ``alone``: one prompt of 32, 128 and 256 tokens, one thread, nothing else to do.
2. ``batch``: prompts a second in one call, by its size; what batching could gain at most.
3. ``closed``: concurrent callers through the batcher in this process, each asking again at once;
   with batches of up to 1, 4 and 16. The ratio to batches of 1 is within one run.
4. ``open``: callers that come by chance (Poisson), at a stated part of what one thread can do, with
   the time limit of the sample configuration: how many are late, how long the others wait.
5. ``loop``: how late the event loop of a gateway runs while a thread of its process scores.
6. ``hop`` (with ``--hop``): the ``Router`` deployment on a local Ray against this process, and
   against the same work behind ``@serve.batch``.

Contenders are visited in turn within each round. CPU time is the figure to trust where the machine
is not idle; the load average is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.routing.callers import LONG_S, Row, callers, merged, mixed_prompts, percentiles
from benchmarks.routing.latency_hop import hop
from benchmarks.routing.run import prompt_of
from deployments.config import RouterConfig
from deployments.routing.micro_batch import MicroBatcher
from deployments.routing.scoring import ScoreMany, inspect_artefact, open_scorer
from routing.types import Score, ScorerUnavailable

RESULTS = Path(__file__).parent / "results" / "latency.json"
BATCHES = (1, 4, 16)
TIMEOUT_MS = 100
"""``score_timeout_ms`` of the sample configuration."""
GOAL_P50_MS, GOAL_P99_MS = 10.0, 30.0


def alone(score: ScoreMany, rounds: int) -> list[Row]:
    """One prompt at a time."""
    prompts = {tokens: [prompt_of(tokens)] for tokens in (32, 128, 256)}
    wall: dict[int, list[float]] = {tokens: [] for tokens in prompts}
    cpu: dict[int, list[float]] = {tokens: [] for tokens in prompts}
    for number in range(-20, rounds):
        for tokens, prompt in prompts.items():
            began, busy = time.perf_counter_ns(), time.process_time_ns()
            score(prompt)
            if number >= 0:
                wall[tokens].append((time.perf_counter_ns() - began) / 1e6)
                cpu[tokens].append((time.process_time_ns() - busy) / 1e6)
    return [
        {
            "tokens": tokens,
            **percentiles(wall[tokens]),
            "cpu_p50_ms": percentiles(cpu[tokens])["p50_ms"],
            "cpu_p99_ms": percentiles(cpu[tokens])["p99_ms"],
        }
        for tokens in prompts
    ]


def batch(score: ScoreMany, rounds: int, seed: int) -> list[Row]:
    """Sizes of a call, over the same prompts."""
    sizes = (1, 4, 16, 64)
    prompts = {"8 tokens": [prompt_of(8)] * 64, "8 to 128 tokens": mixed_prompts(64, seed)}
    found = []
    for name, texts in prompts.items():
        spent = dict.fromkeys(sizes, 0)
        for _ in range(max(2, rounds // 30)):
            for size in sizes:
                busy = time.process_time_ns()
                for start in range(0, len(texts), size):
                    score(texts[start : start + size])
                spent[size] += time.process_time_ns() - busy
        for size in sizes:
            found.append(
                {
                    "prompts": name,
                    "size": size,
                    "ratio_to_1": round(spent[1] / spent[size], 3),
                    "cpu_ms_per_prompt": round(
                        spent[size] / 1e6 / len(texts) / max(2, rounds // 30), 3
                    ),
                }
            )
    return found


async def closed(score: ScoreMany, seconds: float, rounds: int, seed: int) -> list[Row]:
    """Through batchers of several sizes."""
    prompts, found = mixed_prompts(256, seed), []
    batchers = {size: MicroBatcher(score, max_batch=size, max_waiting=1024) for size in BATCHES}
    for count in (1, 4, 16):
        rows: dict[int, list[Row]] = {size: [] for size in BATCHES}
        for _ in range(rounds):
            for size, batcher in batchers.items():
                before = batcher.stats.batches, batcher.stats.items

                async def ask(prompt: str, batcher: MicroBatcher[str, Score] = batcher) -> Score:
                    return await batcher.submit(prompt, LONG_S)

                row = await callers(ask, prompts, count, seconds)
                batches = batcher.stats.batches - before[0]
                row["mean_batch"] = round((batcher.stats.items - before[1]) / max(1, batches), 2)
                rows[size].append(row)
        whole = {size: merged(many) for size, many in rows.items()}
        for size, row in whole.items():
            ratio = row["scores_a_cpu_second"] / whole[1]["scores_a_cpu_second"]
            found.append({"max_batch": size, **row, "ratio_to_unbatched": round(ratio, 3)})
    for batcher in batchers.values():
        await batcher.close()
    return found


async def arriving(
    score: ScoreMany, seconds: float, rate_per_s: float, seed: int, size: int
) -> Row:
    """Prompts by chance, each with the time limit."""
    rng = np.random.default_rng(seed)
    prompts = mixed_prompts(256, seed)
    batcher = MicroBatcher(score, max_batch=size)
    results: Counter[str] = Counter()
    took: list[float] = []

    async def one(prompt: str) -> None:
        began = time.perf_counter()
        try:
            await batcher.submit(prompt, TIMEOUT_MS / 1000)
        except ScorerUnavailable as error:
            results[error.reason] += 1
        else:
            results["scored"] += 1
            took.append(1000 * (time.perf_counter() - began))

    async with asyncio.TaskGroup() as group:
        due, place = time.perf_counter(), 0
        until = due + seconds
        while due < until:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(one(prompts[place % len(prompts)]))
            place += 1
            due += rng.exponential(1 / rate_per_s)
    await batcher.close()
    asked = sum(results.values())
    return {
        "asked": asked,
        "late_share": round(results["late"] / asked, 4),
        "turned_away_at_once": batcher.stats.refused,
        "dropped": batcher.stats.dropped,
        **percentiles(took),
    }


async def offered(score: ScoreMany, seconds: float, seed: int) -> list[Row]:
    """Parts of what one thread can do, and more than that."""
    prompts, began = mixed_prompts(64, seed), time.process_time()
    for prompt in prompts:
        score([prompt])
    capacity = len(prompts) / (time.process_time() - began)
    found = []
    for part in (0.5, 0.9, 1.5, 5.0):
        for size in BATCHES:
            row = await arriving(score, seconds, part * capacity, seed, size)
            found.append({"offered": part, "max_batch": size, **row})
    return found


async def loop_delay(score: ScoreMany, seconds: float, seed: int) -> list[Row]:
    """By how much a wish to wake after 1 ms is late, without and with a thread that scores."""
    prompts, found = mixed_prompts(64, seed), []
    for busy in (False, True):
        batcher = MicroBatcher(score, max_batch=4)
        late: list[float] = []
        until = time.perf_counter() + seconds

        async def keep_busy(batcher: MicroBatcher[str, Score] = batcher) -> None:
            place = 0
            while True:
                await batcher.submit(prompts[place % len(prompts)], LONG_S)
                place += 1

        tasks = [asyncio.create_task(keep_busy()) for _ in range(4 * busy)]
        while time.perf_counter() < until:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            late.append(1000 * (time.perf_counter() - began) - 1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.close()
        found.append({"scoring": busy, **percentiles(late)})
    return found


def facts_of(given: argparse.Namespace, digest: str) -> Row:
    """What the figures were measured on, and how."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    names = ("onnxruntime", "numpy", "tokenizers", "ray")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "method": " ".join((__doc__ or "").split()),
        "seed": given.seed,
        "rounds": given.rounds,
        "seconds": given.seconds,
        "artefact": digest,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "defaults": RouterConfig().model_dump(mode="json"),
        "timeout_ms": TIMEOUT_MS,
    }


def main() -> int:
    """Measure, print one line a figure, keep them all."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing.latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--artefact", default=None, help="folder of a scorer; the built-in one")
    parser.add_argument("--rounds", type=int, default=300, help="of each figure of one prompt")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each figure under load")
    parser.add_argument("--repeats", type=int, default=3, help="rounds under load; the median")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hop", action="store_true", help="on a local Ray as well")
    parser.add_argument("--only", nargs="*", default=None, help="names of figures, as above")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the raw figures")
    given = parser.parse_args()
    facts = inspect_artefact(Path.cwd(), given.artefact)
    score = open_scorer(facts, threads=1, gpu=False)
    seconds, seed = given.seconds, given.seed
    parts: dict[str, Callable[[], list[Row]]] = {
        "alone": lambda: alone(score, given.rounds),
        "batch": lambda: batch(score, given.rounds, seed),
        "closed": lambda: asyncio.run(closed(score, seconds, given.repeats, seed)),
        "open": lambda: asyncio.run(offered(score, seconds, seed)),
        "loop": lambda: asyncio.run(loop_delay(score, seconds, seed)),
    }
    if given.hop:
        parts["hop"] = lambda: hop(facts, score, seconds, given.repeats, seed)
    report = facts_of(given, facts.digest)
    for name, measure in parts.items():
        if given.only is not None and name not in given.only:
            continue
        report[name] = measure()
        for row in report[name]:
            print(name, json.dumps(row), flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    for row in report.get("alone", ()):
        if row["tokens"] == 128:
            holds = row["p50_ms"] <= GOAL_P50_MS and row["p99_ms"] <= GOAL_P99_MS
            print(
                f"one prompt of 128 tokens: p50 {row['p50_ms']} ms (goal {GOAL_P50_MS}), "
                f"p99 {row['p99_ms']} ms (goal {GOAL_P99_MS}): "
                f"{'holds' if holds else 'falls short'}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
