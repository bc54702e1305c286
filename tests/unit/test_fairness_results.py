"""What the fairness benchmarks recorded, and what their README says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.fairness import tables

RESULTS = tables.FOLDER / "results"


def test_the_readme_says_what_was_recorded() -> None:
    text = tables.README.read_text()
    assert tables.filled(text) == text
    for name in tables.PARTS:
        assert (RESULTS / f"{name}.json").exists()
        assert (RESULTS / f"{name}.png").exists()


def test_a_place_that_is_missing_in_the_readme_is_told() -> None:
    with pytest.raises(ValueError, match="simulation"):
        tables.filled("nothing here", RESULTS)


@pytest.mark.parametrize("name", tables.PARTS)
def test_a_record_says_how_and_on_what_it_was_made(name: str) -> None:
    report = json.loads((RESULTS / f"{name}.json").read_text())
    assert {"what", "method", "date", "python", "versions"} <= report.keys()
    assert report.get("seed") or report["seeds"]


def test_the_recorded_simulation_is_of_all_scenarios_and_its_runs_add_up() -> None:
    report = json.loads((RESULTS / "simulation.json").read_text())
    for scenarios in report["summary"].values():
        assert set(scenarios) == {"flood", "batch flood", "peak", "engines", "shuffled"}
    by_place: dict[tuple[str, str, int], set[int]] = {}
    for run in report["runs"]:
        if run["arm"] in ("alone", "rpm"):
            continue
        # All arms of a scenario and seed did the same work.
        place = run["trace"], run["scenario"], run["seed"]
        by_place.setdefault(place, set()).add(run["tokens"])
        assert run["refused"] == 0
    assert all(len(tokens) == 1 for tokens in by_place.values())


def test_the_recorded_engines_did_the_same_work_in_every_round() -> None:
    report = json.loads((RESULTS / "engines.json").read_text())
    for fair, fcfs in zip(report["phases"]["fair"], report["phases"]["fcfs"], strict=True):
        assert fair["tokens"] == fcfs["tokens"]
        assert fair["requests"] == fcfs["requests"]


def test_results_name_no_path_of_a_machine() -> None:
    for path in sorted(Path(RESULTS).glob("*.json")):
        text = path.read_text()
        assert "/root" not in text
        assert "/work" not in text
        assert "/home" not in text
