"""What came of ``auto``, from the audit trail: shares, savings, quality evidence, drift.

Every figure is a row of a view (``governance/audit/views``), so that whoever doubts one can ask the
trail. Memory: what DuckDB may use, and of prompts the place of the newest `DRIFT_PROMPTS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, Final

from routing.drift import Reference, drift

if TYPE_CHECKING:
    import duckdb

Row = dict[str, Any]

DRIFT_PROMPTS: Final = 50_000
"""Newest prompts that are compared with the training data."""
MOST_DEPARTMENTS: Final = 1_000

_SAVINGS = "SELECT * EXCLUDE (day) FROM v_route_savings WHERE level IN ('all', 'department')"
_FACTS = """
SELECT
    CASE
        WHEN grouping(department) = 0 THEN 'department'
        WHEN grouping(reason) = 0 THEN 'reason'
        WHEN grouping(scorer) = 0 THEN 'scorer'
        ELSE 'all'
    END AS by,
    coalesce(department, reason, scorer) AS name,
    count(*) AS requests,
    arg_max(target, ts) AS target,
    min(ts) AS first,
    max(ts) AS last,
    count(gain_milli) AS scored,
    quantile_disc(score_us, 0.5) AS p50_us,
    quantile_disc(score_us, 0.95) AS p95_us,
    quantile_disc(score_us, 0.99) AS p99_us
FROM v_routes
GROUP BY GROUPING SETS ((department), (reason), (scorer), ())
HAVING count(*) > 0
ORDER BY requests DESC, name
"""
"""Everything that one pass over the requests can tell."""
_MOVES = """
SELECT route_reason AS reason, response_model AS model, count(*) AS attempts
FROM v_attempts
WHERE auto AND (route_reason LIKE 'fallback:%' OR route_reason LIKE 'cascade:%')
GROUP BY ALL ORDER BY attempts DESC, reason, model
"""
_QUALITY = """
SELECT * EXCLUDE (day) FROM v_route_quality WHERE level IN ('all', 'department', 'gain')
"""
_METHODS = """
SELECT method, firm, count(*) AS pairs, round(avg(agreement_milli))::INTEGER AS agreement_milli
FROM v_shadow_pairs WHERE agreement_milli IS NOT NULL
GROUP BY ALL ORDER BY pairs DESC, method
"""
_PROMPTS = """
SELECT cluster, similarity_milli FROM v_routes
WHERE scorer = ? AND cluster BETWEEN 0 AND ? AND similarity_milli IS NOT NULL
ORDER BY ts DESC LIMIT ?
"""


@dataclass(frozen=True, slots=True)
class Known:
    """The scorer with whose training data prompts are compared."""

    name: str
    """As in records: the first digits of its digest."""
    reference: Reference


@dataclass(frozen=True, slots=True)
class DriftFound:
    """How far the newest prompts are from the training data; see ``routing.drift.Drift``."""

    scorer: str
    prompts: int
    verdict: str
    psi_cluster: float | None
    psi_similarity: float | None
    expected_psi: float | None
    """What ``psi_cluster`` is by chance alone with this many prompts."""
    scorers: tuple[Row, ...]
    """Prompts by the scorer that scored them; those of others are not compared."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything, as rows of views."""

    period: Row
    total: Row
    departments: tuple[Row, ...]
    reasons: tuple[Row, ...]
    moves: tuple[Row, ...]
    """Attempts after another one, by why there was another."""
    scores: Row
    quality: tuple[Row, ...]
    methods: tuple[Row, ...]
    """Comparisons by what was compared."""
    drift: DriftFound

    def as_json(self) -> Mapping[str, Any]:
        """For scripts."""
        return asdict(self)


def make_report(connection: duckdb.DuckDBPyConnection, known: Known) -> Report | None:
    """Ask the trail.

    Args:
        connection: As ``governance.audit.query.connect`` gives it.
        known: The scorer that is served.

    Returns:
        The report; ``None`` where no request was left to the platform.
    """
    facts = _rows(connection, _FACTS)
    if not facts:
        return None
    (overall,) = (row for row in facts if row["by"] == "all")
    savings = _rows(connection, _SAVINGS)
    return Report(
        period={name: overall[name] for name in ("first", "last", "requests")},
        # Where every request is still open, none has ended that could be counted.
        total=next((_without(row, "level", "department") for row in savings if _is_total(row)), {}),
        departments=_departments(savings, facts),
        reasons=_named(facts, "reason", "requests"),
        moves=_rows(connection, _MOVES),
        scores={name: overall[name] for name in ("scored", "p50_us", "p95_us", "p99_us")},
        quality=_rows(connection, _QUALITY),
        methods=_rows(connection, _METHODS),
        drift=_drift(connection, known, _named(facts, "scorer", "prompts")),
    )


def _departments(savings: Sequence[Row], facts: Sequence[Row]) -> tuple[Row, ...]:
    """Savings with the target that counted last, the busiest first."""
    targets = {row["name"]: row["target"] for row in facts if row["by"] == "department"}
    rows = [
        _without(row, "level") | {"target": targets.get(row["department"])}
        for row in savings
        if row["level"] == "department" and row["requests"]
    ]
    rows.sort(key=lambda row: (-row["requests"], str(row["department"])))
    return tuple(rows[:MOST_DEPARTMENTS])


def _named(facts: Sequence[Row], by: str, count: str) -> tuple[Row, ...]:
    return tuple(
        {by: row["name"], count: row["requests"]}
        for row in facts
        if row["by"] == by and row["name"] is not None
    )


def _is_total(row: Row) -> bool:
    return bool(row["level"] == "all")


def _without(row: Row, *names: str) -> Row:
    return {name: value for name, value in row.items() if name not in names}


def _drift(
    connection: duckdb.DuckDBPyConnection, known: Known, scorers: tuple[Row, ...]
) -> DriftFound:
    last = len(known.reference.cluster_share) - 1
    arguments = [known.name, last, DRIFT_PROMPTS]
    prompts = connection.execute(_PROMPTS, arguments).fetchnumpy()
    found = drift(prompts["cluster"], prompts["similarity_milli"] / 1000, known.reference)
    return DriftFound(
        scorer=known.name,
        prompts=found.prompts,
        verdict=found.verdict,
        psi_cluster=_figure(found.psi_cluster),
        psi_similarity=_figure(found.psi_similarity),
        expected_psi=_figure(found.expected_psi),
        scorers=scorers,
    )


def _figure(value: float) -> float | None:
    return round(value, 3) if isfinite(value) else None


def _rows(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple[Row, ...]:
    result = connection.execute(sql)
    names = [column[0] for column in result.description or ()]
    return tuple(dict(zip(names, row, strict=True)) for row in result.fetchall())
