"""Goals of fairness at peak, one line each; ``prove_budgets`` runs them.

The simulation is run anew, shortened, where the traces are given (under a minute); else the
recorded one is judged, and the lines say so. The engines are always real (under four minutes).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.fairness import scenarios, simulate, summary
from benchmarks.proof import Proof

RECORDED = Path(__file__).parent / "results" / "simulation.json"
QUICK_SPAN_S = 300.0
QUICK_SEEDS = (1, 2)
QUICK_ARMS = ("fcfs", "ours")
FLOODS = ("flood", "batch flood")
MOST_WAIT = 1.2
LEAST_FASTER = 5.0
MOST_LOST = 0.02
Figures = dict[str, Any]
Cell = Mapping[str, Any]


def simulation(proof: Proof, figures: Figures, data: Path | None = None) -> None:
    """Goals of the simulation.

    Args:
        proof: Takes the lines.
        figures: Takes the raw figures, under ``fairness_simulation``.
        data: Folder of the traces.
    """
    if data is not None:
        rows = simulate.simulate(
            data,
            [
                scenarios.shortened(one, QUICK_ARMS)
                for one in scenarios.SCENARIOS
                if not one.shuffled
            ],
            simulate.TRACES[:1],
            QUICK_SEEDS,
            QUICK_SPAN_S,
        )
        found, source = summary.summarise(rows), f"simulated now, {len(QUICK_SEEDS)} seeds"
    else:
        report = json.loads(RECORDED.read_text())
        found = report["summary"]
        source = f"recorded {report['date'][:10]}, {len(report['seeds'])} seeds"
    figures["fairness_simulation"] = {"source": source, "summary": found}
    cells = {
        (trace, scenario, arm): cell
        for trace, by_scenario in found.items()
        for scenario, arms in by_scenario.items()
        for arm, cell in arms.items()
    }
    for flood in FLOODS:
        with proof.goal(
            f"simulated {flood}, ten times its share: critical p99 time to first token at most "
            f"{MOST_WAIT} times that of critical requests alone"
        ) as done:
            mine = _chosen(cells, (flood,), "ours")
            most = max(cell["critical p99 TTFT against alone"]["mean"] for cell in mine)
            worst = max(cell["critical p99 TTFT against alone"]["worst"] for cell in mine)
            rival = min(
                cell["critical p99 TTFT against alone"]["mean"]
                for cell in _chosen(cells, (flood,), "fcfs")
            )
            done(
                f"{most:.2f} (worst seed {worst:.2f}; FCFS {rival:.0f}), {source}",
                most <= MOST_WAIT,
            )
    with proof.goal("simulated: VTC's bound on the service gap is never violated") as done:
        judged = (*FLOODS, "peak", "engines")
        rivals, mine = (_chosen(cells, judged, arm) for arm in QUICK_ARMS)
        violations, rival = _violations(mine), _violations(rivals)
        share = max(cell["gap, gpu_us"]["share of bound"]["worst"] for cell in mine)
        stretches = sum(cell["gap, gpu_us"]["stretches"] for cell in mine)
        done(
            f"{violations} violations in {stretches} stretches, gap at most {share:.1%} of the "
            f"bound (FCFS: {rival} violations), {source}",
            violations == 0 and stretches > 0,
        )
    with proof.goal("simulated: throughput lost against FCFS under 2 %") as done:
        lost = max(
            cell["throughput lost against FCFS"]["mean"]
            for cell in _chosen(cells, (*FLOODS, "peak"), "ours")
        )
        done(f"{lost:+.2%} at most of all scenarios, {source}", lost < MOST_LOST)


def engines(proof: Proof, figures: Figures, rounds: int = 6, span_s: float = 4.0) -> None:
    """Goals on real engines.

    Args:
        proof: Takes the lines.
        figures: Takes the raw figures, under ``fairness_engines``.
        rounds: Times that each of the two engines is visited.
        span_s: Seconds of arrivals a round.
    """
    # Ray and all that comes with it, which the simulation does without.
    from benchmarks.fairness.engines import measure

    with proof.goal(
        "real engines, marketing at ten times its share: critical p99 time to first token at least "
        f"{LEAST_FASTER:.0f} times better than FCFS in the same run"
    ) as done:
        found = measure(rounds=rounds, span_s=span_s)
        figures["fairness_engines"] = {k: v for k, v in found.items() if k != "raw"}
        better = found["critical p99 TTFT, FCFS against ours"]
        waits = {arm: cell["support-desk"]["ttft_p99_s"] for arm, cell in found["waits"].items()}
        done(
            f"{better:.1f} times ({waits['fair'] * 1e3:.0f} ms, FCFS {waits['fcfs'] * 1e3:.0f} ms)",
            better >= LEAST_FASTER,
        )
    with proof.goal("real engines: throughput lost against FCFS under 2 %") as done:
        found = figures["fairness_engines"]
        cpu = found["more CPU time of the core for the same work"]
        busy = found["more busy time for the same work"]
        done(
            f"{cpu['mean']:+.2%} CPU time of the engine's core for the same work (by the clock, "
            f"busy time {busy['mean']:+.2%})",
            cpu["mean"] < MOST_LOST,
        )


def _chosen(
    cells: Mapping[tuple[str, str, str], Cell], scenarios: Iterable[str], arm: str
) -> list[Cell]:
    wanted = set(scenarios)
    return [
        cell for (_, scenario, name), cell in cells.items() if scenario in wanted and name == arm
    ]


def _violations(cells: Iterable[Cell]) -> int:
    return sum(int(cell["gap, gpu_us"]["violations"]) for cell in cells)
