"""Traffic to simulate routing on: a published trace, with held-out questions put into it.

A trace says when a request came and how many tokens it had; it has no text. Each of its requests is
given a held-out question, whose predicted gain and whose real outcomes under both models are known;
a department; and a place in a conversation. All three are drawn by a seed, independently of arrival
and size. That length and difficulty are related in real traffic is thereby left out.
"""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

DEPARTMENTS = ("data-science", "hr", "marketing")
SHARES = (0.5, 0.3, 0.2)
"""Of the requests, by department."""
FOLLOWS = 0.6
"""Chance that a request continues one of its department's open conversations."""
OPEN = 20
"""Conversations that a department has open."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their arrival."""

    name: str
    at_s: Floats
    """Since the first."""
    prompt_tokens: Indices
    answer_tokens: Indices

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.at_s)


@dataclass(frozen=True, slots=True)
class Traffic:
    """A trace with what was drawn for each request."""

    trace: Trace
    question: Indices
    """Row of the held-out questions."""
    department: Indices
    """Index into ``DEPARTMENTS``."""
    conversation: Indices


def read_trace(folder: Path, name: str) -> Trace:
    """A trace by the name of its file without ending.

    Raises:
        FileNotFoundError: The folder does not have it.
    """
    for path in sorted(folder.glob(f"{name}.*")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = _azure(file) if ".csv" in path.name else _mooncake(file)
        rows.sort()
        at_s, prompt, answer = (np.asarray(column) for column in zip(*rows, strict=True))
        return Trace(name, at_s - at_s[0], prompt.astype(np.int64), answer.astype(np.int64))
    raise FileNotFoundError(f"no trace {name} in {folder}")


def _azure(file: Any) -> list[tuple[float, int, int]]:
    rows = []
    for row in csv.DictReader(file):
        # Seven digits of a second; Python reads six.
        at = datetime.fromisoformat(row["TIMESTAMP"][:26] + "+00:00")
        rows.append((at.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"])))
    return rows


def _mooncake(file: Any) -> list[tuple[float, int, int]]:
    found = (json.loads(line) for line in file)
    return [(r["timestamp"] / 1000, r["input_length"], r["output_length"]) for r in found]


def draw(trace: Trace, questions: int, seed: int) -> Traffic:
    """Put questions, departments and conversations into a trace.

    Every question is drawn equally often, give or take one: the rows are dealt out in shuffled
    rounds.
    """
    rng = np.random.default_rng(seed)
    rounds = -(-len(trace) // questions)
    dealt = np.concatenate([rng.permutation(questions) for _ in range(rounds)])[: len(trace)]
    department = rng.choice(len(DEPARTMENTS), len(trace), p=SHARES)
    follows, which = rng.random(len(trace)) < FOLLOWS, rng.integers(0, OPEN, len(trace))
    conversation = np.zeros(len(trace), dtype=np.int64)
    open_ones: list[list[int]] = [[] for _ in DEPARTMENTS]
    for number in range(len(trace)):
        mine = open_ones[department[number]]
        if follows[number] and mine:
            conversation[number] = mine[which[number] % len(mine)]
            continue
        conversation[number] = number
        mine.append(number)
        del mine[:-OPEN]
    return Traffic(trace, dealt.astype(np.int64), department.astype(np.int64), conversation)
