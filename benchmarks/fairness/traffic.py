"""Requests of departments: a published trace, with departments, classes and floods put into it.

The traces name no tenant (``../shared/data/traces/README.md``), so each request of a trace is given
a department by a seeded draw, independently of when it came and how long it is. A flood is more
requests of one department: their times are a Poisson process of so many times the department's
own rate, their sizes are drawn from the trace with replacement. ``shuffled`` draws the departments
of all requests anew by the shares of an ordinary day, the flood's among them: the control, in which
as much is asked and no department asks for more than its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.routing.traffic import Trace

CRITICAL, STANDARD, BATCH = 0, 1, 2

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Department:
    """One department (or application) of the invented organisation."""

    name: str
    rank: int
    weight_milli: int
    share: float
    """Of the requests of an ordinary day."""


ORGANISATION = (
    Department("support-desk", CRITICAL, 1000, 0.10),
    Department("data-science", STANDARD, 1000, 0.35),
    Department("hr", STANDARD, 2000, 0.20),
    Department("marketing", STANDARD, 1000, 0.20),
    Department("archive", BATCH, 1000, 0.15),
)


@dataclass(frozen=True, slots=True)
class Flood:
    """One department asks for more than its share."""

    department: int
    """Index."""
    times: float
    """Of its ordinary rate, 10 for ten times."""
    from_s: float
    to_s: float


@dataclass(frozen=True)
class Traffic:
    """Requests in the order of arrival."""

    at_s: Floats
    prompt_tokens: Ints
    answer_tokens: Ints
    department: Ints
    organisation: tuple[Department, ...]

    def __len__(self) -> int:
        return len(self.at_s)

    def only(self, kept: npt.NDArray[np.bool_]) -> Traffic:
        """Some of them."""
        return Traffic(
            self.at_s[kept],
            self.prompt_tokens[kept],
            self.answer_tokens[kept],
            self.department[kept],
            self.organisation,
        )


def draw(
    trace: Trace,
    seed: int,
    *,
    span_s: float,
    organisation: Sequence[Department] = ORGANISATION,
    floods: Sequence[Flood] = (),
    shuffled: bool = False,
) -> Traffic:
    """Departments for the first ``span_s`` seconds of a trace, and floods on top.

    The departments of the trace's own requests depend on the seed alone, so that arms with and
    without a flood have the same ordinary requests.
    """
    rng = np.random.default_rng([seed, 0])
    kept = trace.at_s < span_s
    shares = np.asarray([department.share for department in organisation])
    department = rng.choice(len(shares), len(trace), p=shares / shares.sum())[kept]
    columns = [[trace.at_s[kept], trace.prompt_tokens[kept], trace.answer_tokens[kept], department]]
    for number, flood in enumerate(floods):
        rng = np.random.default_rng([seed, 1 + number])
        length_s = min(flood.to_s, span_s) - flood.from_s
        own_rate = float(kept.sum()) / span_s * shares[flood.department] / shares.sum()
        count = int(rng.poisson((flood.times - 1) * own_rate * length_s))
        size = rng.integers(0, len(trace), count)
        columns.append(
            [
                np.sort(rng.random(count)) * length_s + flood.from_s,
                trace.prompt_tokens[size],
                trace.answer_tokens[size],
                np.full(count, flood.department),
            ]
        )
    at_s, prompt, answer, who = (np.concatenate(column) for column in zip(*columns, strict=True))
    order = np.argsort(at_s, kind="stable")
    who = who[order]
    if shuffled:
        who = np.random.default_rng([seed, 99]).choice(
            len(shares), len(who), p=shares / shares.sum()
        )
    return Traffic(
        at_s[order],
        np.maximum(1, prompt[order]),
        np.maximum(1, answer[order]),
        who.astype(np.int64),
        tuple(organisation),
    )
