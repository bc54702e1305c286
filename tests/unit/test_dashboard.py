"""Dashboard and alerts speak of metrics that exist, by labels that they have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.telemetry.names import EXPORTED, RAY_LABELS

ROOT = Path(__file__).resolve().parents[2]
BOARD = json.loads((ROOT / "deployments/dashboards/grafana.json").read_text())
(GROUP,) = yaml.safe_load((ROOT / "deployments/dashboards/alerts.yaml").read_text())["groups"]
RULES: list[dict[str, Any]] = GROUP["rules"]
PANELS: list[dict[str, Any]] = [p for p in BOARD["panels"] if p["type"] != "row"]
TARGETS = [
    (panel["title"], target["expr"], target["legendFormat"])
    for panel in PANELS
    for target in panel["targets"]
]
EXPRESSIONS = [(title, expr) for title, expr, _ in TARGETS] + [
    (rule["alert"], rule["expr"]) for rule in RULES
]
VARIABLES = {each["name"]: each for each in BOARD["templating"]["list"]}


def selectors(expr: str) -> Iterator[tuple[str, set[str]]]:
    """Metrics of an expression with the labels that they are selected by."""
    for name, _, inside in re.findall(r"(ray_\w+)(\{([^}]*)\})?", expr):
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", inside))


def grouped(expr: str) -> set[str]:
    """Labels that an expression groups or matches by."""
    lists = re.findall(r"\b(?:by|on|ignoring)\s*\(([^)]*)\)", expr)
    return {label.strip() for each in lists for label in each.split(",") if label.strip()}


@pytest.mark.parametrize(("title", "expr"), EXPRESSIONS)
def test_names_and_labels_exist(title: str, expr: str) -> None:
    found = list(selectors(expr))
    assert found, "an expression without a metric of ours"
    assert not [name for name, _ in found if name not in EXPORTED]
    for name, labels in found:
        assert labels <= {*EXPORTED[name], *RAY_LABELS}, name
    common = {label for name, _ in found for label in (*EXPORTED[name], *RAY_LABELS)}
    assert grouped(expr) <= common


@pytest.mark.parametrize(("title", "expr"), EXPRESSIONS)
def test_expressions_are_balanced_and_count_what_counts(title: str, expr: str) -> None:
    bare = re.sub(r"\"[^\"]*\"", "", expr)
    for opening, closing in ("()", "{}", "[]"):
        assert bare.count(opening) == bare.count(closing)
    for name, _ in selectors(expr):
        ranged = re.search(rf"(rate|increase)\({name}(\{{[^}}]*\}})?\[", expr)
        assert (ranged is not None) == name.endswith("_total"), name


def test_the_checks_above_can_fail() -> None:
    assert list(selectors('rate(ray_x_total{a="b",c!~"d"}[5m])')) == [("ray_x_total", {"a", "c"})]
    assert grouped("sum by (model, le) (x) / on (a) y") == {"model", "le", "a"}


@pytest.mark.parametrize(("title", "expr", "legend"), TARGETS)
def test_legends_name_labels_that_are_left(title: str, expr: str, legend: str) -> None:
    assert set(re.findall(r"{{(\w+)}}", legend)) <= grouped(expr)


def test_variables_are_asked_for_what_exists() -> None:
    for name in ("model", "department"):
        metric, label = re.findall(r"\((\w+), (\w+)\)", VARIABLES[name]["definition"])[0]
        assert label == name
        assert label in EXPORTED[metric]
    used = {v for _, expr in EXPRESSIONS for v in re.findall(r"\$([a-z_]\w*)", expr)}
    assert used - {"__rate_interval"} == {"model", "department"}


def test_every_metric_is_drawn() -> None:
    drawn = {name for _, expr, _ in TARGETS for name, _ in selectors(expr)}
    parts = {name for name in EXPORTED if name.endswith(("_sum_total", "_count_total"))}
    assert not set(EXPORTED) - drawn - parts


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    cells: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        own = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & own, panel["title"]
        cells |= own


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_each_alert_says_what_it_means_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"]["summary"]
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert anchor in anchors
    labels = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    assert labels <= grouped(rule["expr"])


def test_each_runbook_belongs_to_an_alert() -> None:
    text = (ROOT / "docs/guides/operate.md").read_text()
    headings = re.findall(r"^### (Alert: .+)$", text, re.MULTILINE)
    told = {rule["annotations"]["runbook"].partition("#")[2] for rule in RULES}
    assert {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings} == told
