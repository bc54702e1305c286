"""``gatehouse route``: the built-in scorer on prompts, a report on a trail with known answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from deployments.cli.main import cli
from deployments.route_explain import Explainer, NothingToChoose
from deployments.route_report import Known, make_report
from deployments.routing.scoring import BUILT_IN, ScorerFacts, inspect_artefact
from governance.audit.query import connect
from governance.types import ModelInfo, Operation
from routing.cards import ModelsFile
from routing.drift import Reference
from routing.types import Score
from tests.routed_trail import LOW, SCORER, Asked, routed, scored, used
from tests.trail import Trail

ROOT = Path(__file__).parents[2]
OPS = frozenset({Operation.CHAT})
SERVED = (
    ModelInfo("small", "small", OPS, 1000, "small"),
    ModelInfo("large", "large", OPS, 8000, "large"),
    ModelInfo("tuned", "small", OPS, 1000, "small"),
)
QUANTILES = tuple(n / 100 for n in range(101))
FACTS = ScorerFacts(None, "sha256:" + "ab" * 32, QUANTILES)


def route(*words: str, text: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["route", *words], input=text)


def models(**routing: Any) -> ModelsFile:
    cards = [{"id": "small", "tools": False, "languages": ["en", "de"]}, {"id": "large"}]
    return ModelsFile.model_validate({"models": cards, "routing": routing})


def explainer(gain: float = 0.2, **routing: Any) -> Explainer:
    found = Score(gain, 0.5 - gain / 2, 0.5 + gain / 2, 0.4, 17, 0.61, "abababababab")
    return Explainer(models(**routing), SERVED, FACTS, lambda prompts: [found] * len(prompts))


# -- explain ----------------------------------------------------------------------------------


async def test_a_choice_says_what_it_rests_on() -> None:
    found = await explainer(0.2).explain("What is the capital of France?", "hr")
    assert (found.model, found.tier, found.reason) == (
        "small", "small", "auto:small gain below threshold",
    )  # fmt: skip
    assert (found.target, found.threshold_milli, found.gain_milli) == (
        "large_share=0.300",
        700,
        200,
    )
    assert (found.weak_milli, found.strong_milli, found.trust_milli) == (400, 600, 400)
    assert found.fallbacks == ("large",)
    # 20 of the 101 quantiles are smaller.
    assert found.easier_milli == 198


async def test_what_would_change_it_is_tried_out() -> None:
    found = await explainer(0.2).explain("What is the capital of France?", "hr")
    assert {other.condition: (other.tier, other.reason) for other in found.alternatives} == {
        "the request has tools": ("large", "auto:large capability tools"),
        "no replica of the small tier is up": ("large", "auto:large other tier down"),
        "prompt and answer need more than 1000 tokens": ("large", "auto:large capability context"),
        "the request is in any other language": ("large", "auto:large capability language"),
    }
    found = await explainer(0.9).explain("What is the capital of France?", "hr")
    assert found.tier == "large"
    assert {other.condition: other.reason for other in found.alternatives} == {
        "the department uses its budget up at 2 times its pace": "auto:small budget ahead of pace",
        "no replica of the large tier is up": "auto:small other tier down",
    }


@pytest.mark.parametrize(
    ("share", "reason"),
    [(0.0, "auto:small target never large"), (1.0, "auto:large target always large")],
)
async def test_a_score_is_told_also_where_it_does_not_count(share: float, reason: str) -> None:
    target = {"departments": ["*"], "large_share": share}
    found = await explainer(0.2, targets=[target]).explain("What is the capital of France?", "hr")
    assert (found.reason, found.threshold_milli, found.gain_milli) == (reason, None, 200)


async def test_each_department_has_its_target() -> None:
    targets = [
        {"departments": ["hr"], "large_share": 0.9},
        {"departments": ["*"], "quality": 0.5},
    ]
    asked = explainer(0.2, targets=targets)
    assert (await asked.explain("Is it?", "hr")).tier == "large"
    assert (await asked.explain("Is it?", "it")).target == "quality=0.500"


async def test_a_cascade_is_announced() -> None:
    asked = explainer(0.2, cascade={"departments": ["hr"]})
    assert (await asked.explain("Is it?", "hr")).cascade
    assert not (await asked.explain("Is it?", "it")).cascade


def test_without_a_card_there_is_nothing_to_choose() -> None:
    with pytest.raises(NothingToChoose):
        Explainer(ModelsFile(), SERVED, FACTS, lambda prompts: [])


def test_explain_with_the_built_in_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = route("explain", "What is 17 times 23?", "--format", "json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["scorer"] == inspect_artefact(ROOT, None).name
    assert found["strong_milli"] - found["weak_milli"] == pytest.approx(found["gain_milli"], abs=2)
    assert {other["tier"] for other in found["alternatives"]} <= {"small", "large"}
    again = json.loads(
        route("explain", "-", "--format", "json", text="What is 17 times 23?").stdout
    )
    assert again == found
    text = route("explain", "What is 17 times 23?").stdout
    for said in ("chance of a right answer", "gain of the large model", "threshold", "trust",
                 "what would change it:", found["reason"], found["scorer"]):  # fmt: skip
        assert said in text


def test_explain_takes_other_files(tmp_path: Path) -> None:
    file = yaml.safe_load((ROOT / "config/models.yaml").read_text())
    file["routing"]["targets"] = [{"departments": ["hr"], "large_share": 1.0}]
    path = tmp_path / "models.yaml"
    path.write_text(yaml.safe_dump(file))
    words = ("--config", str(ROOT / "serve_config.yaml"), "--models", str(path))
    result = route(
        "explain", "Hi", "--department", "hr", "--artefact", str(BUILT_IN), *words, "--format",
        "json",
    )  # fmt: skip
    found = json.loads(result.stdout)
    assert (found["target"], found["tier"]) == ("large_share=1.000", "large")


def test_explain_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert route("explain", "").exit_code == 2
    assert route("explain", "-", text=" \n").exit_code == 2
    assert route("explain", "-", text="x" * (4 << 20) + "x").exit_code == 2
    wrong = tmp_path / "models.yaml"
    wrong.write_text("version: 1\nmodels:\n- {id: small, tool: true}\n")
    result = route("explain", "Hi", "--models", str(wrong))
    assert result.exit_code == 1
    assert f"{wrong}:3" in result.stderr
    wrong.write_text("version: 1\nmodels: []\n")
    result = route("explain", "Hi", "--models", str(wrong))
    assert result.exit_code == 4
    assert "no served model has a card" in result.stderr
    (tmp_path / "artefact").mkdir()
    result = route("explain", "Hi", "--artefact", str(tmp_path / "artefact"))
    assert result.exit_code == 1
    assert "manifest.json" in result.stderr


# -- report -----------------------------------------------------------------------------------


@pytest.fixture
def trail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trail:
    made = Trail(tmp_path)
    routed(made)
    made.seal()
    monkeypatch.setenv("GATEHOUSE_EVIDENCE", str(made.evidence))
    monkeypatch.setenv("GATEHOUSE_STATE", str(made.state))
    return made


def test_report_repeats_the_views(trail: Trail) -> None:
    result = route("report", "--since", "2026-11-01", "--format", "json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert found["period"]["requests"] == 11
    assert (found["total"]["requests"], found["total"]["saved_us"]) == (10, 690_000)
    assert [
        (row["department"], row["target"], row["free_large_percent"], row["saved_percent"])
        for row in found["departments"]
    ] == [("legal", "large_share=0.300", 25.0, 9.6), ("research", "large_share=0.300", 33.3, 9.7)]
    reasons = {row["reason"]: row["requests"] for row in found["reasons"]}
    assert reasons["auto:small default scorer late"] == 1
    assert {(row["reason"], row["model"]): row["attempts"] for row in found["moves"]} == {
        ("fallback:engine_unavailable", "large"): 2,
        ("cascade:unsure", "large"): 1,
        ("fallback:budget_exhausted", "small"): 1,
        ("fallback:engine_failed", "small"): 1,
    }
    assert found["scores"] == {
        "scored": 9, "p50_us": 9000, "p95_us": 100_400, "p99_us": 100_400,
    }  # fmt: skip
    assert {row["level"] for row in found["quality"]} == {"all", "department", "gain"}
    assert found["drift"]["verdict"] == "too_few"
    assert found["drift"]["scorers"] == [{"scorer": SCORER, "prompts": 9}]


def test_report_for_people(trail: Trail) -> None:
    result = route("report", "--since", "2026-11-01")
    assert result.exit_code == 0
    assert "legal\tlarge_share=0.300\t5\t60.0 %\t25.0 %\t30.0 %\t1\t0\t0" in result.stdout
    assert "research\t1.5\t1.6\t9.7 %\t25.5 %\t1" in result.stdout
    text = " ".join(result.stdout.split())
    for said in (
        "takes its answers 1.5 times as long", "Agreement is not correctness",
        "too few prompts to say", f"not compared: {SCORER} 9", "100 % (34 to 100)",
    ):  # fmt: skip
        assert said in text


def test_since_leaves_out_what_began_before(trail: Trail) -> None:
    result = route("report", "--since", "2026-11-25", "--format", "json")
    assert [row["department"] for row in json.loads(result.stdout)["departments"]] == ["research"]


def test_nothing_on_record_has_a_code_of_its_own(trail: Trail, tmp_path: Path) -> None:
    result = route("report", "--since", "2027-01-01")
    assert (result.exit_code, result.stdout) == (4, "")
    assert "no request was left to the platform" in result.stderr
    result = route("report", "--evidence", str(tmp_path / "x"), "--state", str(tmp_path / "y"))
    assert result.exit_code == 4


def test_what_a_caller_chose_cannot_steer_the_terminal(trail: Trail) -> None:
    Asked(trail, "z", "2026-11-26 10:00:00", "\x1b[2Jred\x07", "auto:small \x1b]0;x\x07").attempt(
        "small", **used(1, 1, 1)
    )
    trail.seal()
    result = CliRunner().invoke(cli, ["route", "report", "--since", "2026-11-26"], color=False)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "\x07" not in result.stdout


def test_requests_that_are_all_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Trail(tmp_path)
    Asked(made, "q", "2026-11-24 10:00:00", "hr", LOW, **scored(1)).attempt("small", open_end=True)
    made.seal()
    where = ("--evidence", str(made.evidence), "--state", str(made.state), "--since", "2026-11-01")
    result = route("report", *where)
    assert result.exit_code == 0, result.output
    assert "no request has ended yet" in result.stderr
    assert json.loads(route("report", *where, "--format", "json").stdout)["total"] == {}


# -- drift ------------------------------------------------------------------------------------


def reference(centres: int) -> Reference:
    share = np.full(centres, 1 / centres, dtype=np.float32)
    edges = np.linspace(-1, 1, 11).astype(np.float32)
    return Reference(np.zeros(101, np.float32), share, edges, np.full(10, 0.1, np.float32))


def test_drift_is_that_of_the_newest_prompts_of_this_scorer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trail = Trail(tmp_path)
    for n in range(400):
        place = {"cluster": n % 4, "similarity_milli": (n % 10) * 200 - 900}
        Asked(trail, f"q{n}", "2026-11-25 10:00:00", "hr", LOW, **scored(1) | place).attempt(
            "small", open_end=True
        )
    # One whose centre this scorer does not have.
    Asked(trail, "x", "2026-11-25 11:00:00", "hr", LOW, **scored(1) | {"cluster": 9}).attempt(
        "small", open_end=True
    )
    with connect(trail.evidence, trail.state, unsealed=trail.unsealed) as connection:
        found = make_report(connection, Known(SCORER, reference(4)))
        assert found is not None
        assert (found.drift.prompts, found.drift.verdict) == (400, "stable")
        other = make_report(connection, Known("another", reference(4)))
        assert other is not None
        assert other.drift == replace(
            found.drift, scorer="another", prompts=0, verdict="too_few", psi_cluster=None,
            psi_similarity=None, expected_psi=None,
        )  # fmt: skip
        monkeypatch.setattr("deployments.route_report.DRIFT_PROMPTS", 100)
        bounded = make_report(connection, Known(SCORER, reference(4)))
        assert bounded is not None
        assert bounded.drift.prompts == 100


def test_drift_is_seen(tmp_path: Path) -> None:
    trail = Trail(tmp_path)
    for n in range(250):
        Asked(
            trail, f"q{n}", "2026-11-25 10:00:00", "hr", LOW, **scored(1) | {"cluster": 1}
        ).attempt("small", open_end=True)
    with connect(trail.evidence, trail.state, unsealed=trail.unsealed) as connection:
        found = make_report(connection, Known(SCORER, reference(4)))
    assert found is not None
    assert found.drift.verdict == "moved"
