"""Prompts and callers for the benchmarks of scoring."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.routing.run import prompt_of

Ask = Callable[[str], Awaitable[Any]]
Row = dict[str, Any]
LONG_S = 60.0
"""Time limit where none is being measured."""


def percentiles(values_ms: Sequence[float]) -> Row:
    """Median and tail, in milliseconds."""
    if not values_ms:
        return {"p50_ms": None, "p99_ms": None}
    p50, p99 = np.percentile(values_ms, (50, 99))
    return {"p50_ms": round(float(p50), 3), "p99_ms": round(float(p99), 3)}


def mixed_prompts(count: int, seed: int) -> list[str]:
    """Prompts of 8 to 128 tokens, evenly."""
    lengths = np.random.default_rng(seed).integers(8, 129, count)
    made = {int(tokens): prompt_of(int(tokens)) for tokens in set(lengths.tolist())}
    return [made[int(tokens)] for tokens in lengths]


async def callers(ask: Ask, prompts: Sequence[str], count: int, seconds: float) -> Row:
    """So many callers, each asking again at once, for a time."""
    took: list[float] = []
    until = time.perf_counter() + seconds

    async def caller(number: int) -> None:
        place = number
        while time.perf_counter() < until:
            began = time.perf_counter()
            await ask(prompts[place % len(prompts)])
            took.append(1000 * (time.perf_counter() - began))
            place += count

    began, busy = time.perf_counter(), time.process_time()
    await asyncio.gather(*(caller(number) for number in range(count)))
    wall = time.perf_counter() - began
    return {
        "callers": count,
        "scores": len(took),
        "scores_a_second": round(len(took) / wall, 1),
        "scores_a_cpu_second": round(len(took) / max(1e-9, time.process_time() - busy), 1),
        **percentiles(took),
    }


def merged(rows: Sequence[Row]) -> Row:
    """Several rounds of one contender: the median of each figure."""
    return {
        key: round(float(np.median([row[key] for row in rows])), 3)
        if isinstance(value, int | float)
        else value
        for key, value in rows[0].items()
    }
