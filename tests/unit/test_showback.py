"""Showback: sums, reconciliation with the ledger, and pages in which nothing is markup."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import duckdb
import pytest

from deployments.showback import NOT_RECONCILED, make_showback, render
from deployments.showback_svg import COLOURS, bars, stacked_days
from governance.audit.query import connect
from governance.budget.config import BudgetsConfig
from governance.finops.compare import Kind, compare
from governance.finops.showback import (
    MOST_LINES,
    NO_PART,
    UNKNOWN,
    Allowance,
    Price,
    Showback,
    UsageRow,
    build,
)
from tests.spending_trail import PERSONS, Spending, person, spend
from tests.trail import Trail, us

FIRST, AFTER = date(2026, 11, 1), date(2026, 12, 1)
NOW_US = us("2026-11-30 12:00:00")
VOID = {"meta", "br", "line", "rect"}


def row(day: int = 1, department: str | None = "hr", **more: Any) -> UsageRow:
    values = {
        "part": None, "application": "desk", "person": "anna", "model": "small", "requests": 1,
        "gpu_us": 10, "charged_us": 20, "input_tokens": 3, "output_tokens": 4, **more,
    }  # fmt: skip
    return UsageRow(date(2026, 11, day), department, **values)


def test_everything_is_counted_once() -> None:
    rows = [row(1), row(30), row(1, "it", charged_us=50), row(2, None, charged_us=1, model=None)]
    found = build(rows, FIRST, AFTER, "UTC")
    assert [each.name for each in found.departments] == ["it", "hr", UNKNOWN]
    assert found.total.charged_us == 91 == sum(each.total.charged_us for each in found.departments)
    assert (found.total.requests, found.total.tokens) == (4, 28)
    assert len(found.days) == 30
    assert [day.charged_us for day in found.days if day.charged_us] == [70, 1, 20]
    for each in found.departments:
        for lines in (each.models, each.applications, each.days):
            assert sum(line.charged_us for line in lines) == each.total.charged_us
        assert sum(sum(amounts) for _, amounts in each.model_days) == each.total.charged_us
        assert each.parts == []


def test_parts_add_up_and_many_lines_become_one() -> None:
    rows = [row(1, part="screening"), row(1)]
    rows += [row(1, model=f"m{number:02d}", charged_us=100 - number) for number in range(20)]
    (hr,) = build(rows, FIRST, AFTER, "UTC").departments
    assert {line.name for line in hr.parts} == {"screening", NO_PART}
    assert sum(line.charged_us for line in hr.parts) == hr.total.charged_us
    assert len(hr.models) == MOST_LINES
    assert hr.models[-1].name == "(others) 12"
    assert sum(line.charged_us for line in hr.models) == hr.total.charged_us
    assert sum(sum(amounts) for _, amounts in hr.model_days) == hr.total.charged_us


def test_a_department_that_used_nothing_has_a_page() -> None:
    allowance = Allowance("day", 1_000_000, None, "budgets-it@example.com", "soft")
    found = build([], FIRST, AFTER, "UTC", refused={"hr": 2}, allowances={"it": allowance})
    assert {each.name: each.refused for each in found.departments} == {"hr": 2, "it": 0}
    page = render(found, "markdown")
    assert page is not None
    assert "1 charged seconds a day, soft, owner budgets-it@example.com" in page


@pytest.mark.parametrize(
    ("charged_us", "cost"),
    [(0, "0.00"), (3_600_000_000, "2.40"), (7_499_999, "0.00"), (7_500_000, "0.01"),
     (10**15, "666666.67")],
)  # fmt: skip
def test_costs_are_rounded_to_the_cent(charged_us: int, cost: str) -> None:
    assert Price(Decimal("2.40"), "EUR").cost(charged_us) == Decimal(cost)


# From a trail


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trail, Spending]:
    trail = Trail(tmp_path_factory.mktemp("house"))
    sums = spend(trail)
    trail.seal()
    return trail, sums


@pytest.fixture(scope="module")
def trail(house: tuple[Trail, Spending]) -> Iterator[duckdb.DuckDBPyConnection]:
    with connect(house[0].evidence, house[0].state) as connection:
        yield connection


def accounts(sums: Spending, **off_us: int) -> list[dict[str, Any]]:
    """What the ledger says; ``off_us`` is what it charged beyond the trail."""
    found = []
    for name in PERSONS:
        extra = off_us.get(name, 0)
        found.append(
            {
                "account": name, "window": "month", "start": "2026-11-01T00:00:00Z",
                "start_at": us("2026-11-01 00:00:00") // 1_000_000, "mode": "hard",
                "owner": f"budgets-{name}@example.com",
                "limit": {"gpu_us": 3_600_000_000, "tokens": None},
                "spent": {"gpu_us": sums.november_us[name] + extra, "tokens": 0},
                "total": {"gpu_us": sums.charged_us[name] + extra, "tokens": sums.tokens[name]},
            }
        )  # fmt: skip
    return [*found, {**found[0], "account": "hr/screening"}, {**found[0], "account": "hr@hour"}]


def made(
    trail: duckdb.DuckDBPyConnection, known: list[dict[str, Any]] | None, **more: Any
) -> Showback:
    return make_showback(trail, FIRST, AFTER, "UTC", accounts=known, now_us=NOW_US, **more)


def test_the_ledger_and_the_trail_agree(
    trail: duckdb.DuckDBPyConnection, house: tuple[Trail, Spending]
) -> None:
    sums = house[1]
    found = made(trail, accounts(sums))
    assert {each.name: each.total.charged_us for each in found.departments} == sums.november_us
    assert {(each.department, each.since) for each in found.reconciled} == {
        (name, since) for name in PERSONS for since in ("ever", "window from 2026-11-01T00:00:00Z")
    }
    assert {each.difference_us for each in found.reconciled} == {0}
    assert not [
        each for each in found.reconciled if each.since == "ever" and each.difference_tokens
    ]


def test_a_difference_is_said_to_the_microsecond(
    trail: duckdb.DuckDBPyConnection, house: tuple[Trail, Spending]
) -> None:
    found = made(trail, accounts(house[1], hr=5))
    assert {each.difference_us for each in found.reconciled if each.department == "hr"} == {5}
    markdown, page = render(found, "markdown"), render(found, "html")
    assert markdown is not None
    assert page is not None
    assert "| 0.000005 |" in markdown
    assert "<td>0.000005</td>" in page
    assert "sums differ" in page


def test_a_window_after_the_period_is_not_held_against_it(
    trail: duckdb.DuckDBPyConnection, house: tuple[Trail, Spending]
) -> None:
    later = [
        {**each, "start_at": us("2026-12-01 00:00:00") // 1_000_000} for each in accounts(house[1])
    ]
    assert {each.since for each in made(trail, later).reconciled} == {"ever"}


def test_without_a_ledger_it_says_so(trail: duckdb.DuckDBPyConnection) -> None:
    for form in ("markdown", "html", "json"):
        page = render(made(trail, None), form)
        assert page is not None
        assert NOT_RECONCILED in page


class Page(HTMLParser):
    """Elements, balanced, and where something would be loaded or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.reaches: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        known = {"src", "href", "srcset", "action", "data", "poster"}
        self.reaches += [each for each in attrs if each[0] in known or each[0].startswith("on")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_loads_and_runs_nothing(
    trail: duckdb.DuckDBPyConnection, house: tuple[Trail, Spending]
) -> None:
    text = render(
        made(trail, accounts(house[1]), price=Price(Decimal("2.40"), "EUR"), persons=True), "html"
    )
    assert text is not None
    page = Page(text)
    assert page.reaches == []
    assert not page.tags & {"script", "link", "img", "iframe", "object", "form", "b"}
    assert "default-src 'none'" in text
    assert '=HYPERLINK("http://x","<b>|y")' in page.text, "shown as it is"
    assert len(re.findall("<svg", text)) >= 1 + 2 * len(PERSONS)
    assert "@media print" in text
    for plot in re.findall(r"<svg.*?</svg>", text):
        ElementTree.fromstring(plot)


def test_markdown_in_names_is_text(trail: duckdb.DuckDBPyConnection) -> None:
    text = render(made(trail, None), "markdown")
    assert text is not None
    assert r'=HYPERLINK("http://x","\<b\>\|y")' in text
    widths = {line.count("|") - line.count(r"\|") for line in text.splitlines() if "HYPER" in line}
    heading = next(line for line in text.splitlines() if line.startswith("| application"))
    assert widths == {heading.count("|")}


def test_persons_are_named_only_where_they_are_asked_for(
    trail: duckdb.DuckDBPyConnection,
) -> None:
    someone = person("marketing", 1)[:12]
    for form in ("markdown", "html"):
        assert someone in (render(made(trail, None, persons=True), form, "marketing") or "")
    for form in ("markdown", "html", "json"):
        text = render(made(trail, None), form, "hr") or ""
        assert not [key for key in range(PERSONS["hr"]) if person("hr", key)[:12] in text]
    assert "of 6 people" in (render(made(trail, None), "markdown") or "")


def test_one_departments_page(
    trail: duckdb.DuckDBPyConnection, house: tuple[Trail, Spending]
) -> None:
    text = render(made(trail, accounts(house[1])), "json", "marketing")
    assert text is not None
    found = json.loads(text)
    assert [each["name"] for each in found["departments"]] == ["marketing"]
    assert found["total"]["charged_us"] == house[1].november_us["marketing"]
    assert {each["department"] for each in found["reconciled"]} == {"marketing"}
    assert render(made(trail, None), "json", "nowhere") is None


# Plots


def heights(plot: str) -> list[float]:
    return [float(value) for value in re.findall(r'<rect[^>]* height="([\d.]+)"', plot)]


def test_bars_are_as_high_as_their_amounts() -> None:
    series = [("a", (2_000_000, 0)), ("b", (1_000_000, 4_000_000))]
    plot = stacked_days("t", ["2026-11-01", "2026-11-02"], series)
    first, second, third = sorted(heights(plot))
    assert second == pytest.approx(2 * first, rel=0.01)
    assert third == pytest.approx(4 * first, rel=0.01)
    assert max(heights(plot)) <= 220 - 12 - 34
    assert "<title>b, 2026-11-02: 4.0 s</title>" in plot


@pytest.mark.parametrize("top", [0, 1, 999_999, 3_000_000, 10**7, 123_456_789, 10**12])
def test_every_scale_holds_its_bars(top: int) -> None:
    plot = stacked_days("t", ["2026-11-01"], [("a", (top,))])
    assert all(height <= 174 + 1e-6 for height in heights(plot))
    assert 2 <= plot.count("<line") <= 12


def test_more_series_than_colours_are_added_up() -> None:
    series = [(f"s{number}", (1_000_000,)) for number in range(12)]
    plot = stacked_days("t", ["2026-11-01"], series)
    assert plot.count("<rect") == len(COLOURS)
    assert f"others ({12 - len(COLOURS) + 1})" in plot
    assert sum(heights(plot)) == pytest.approx(12 * min(heights(plot)), rel=0.01)


def test_names_in_plots_are_text() -> None:
    for plot in (
        stacked_days("<t>", ["2026-11-01"], [("<a>", (1,)), ("&b", (2,))]),
        bars("<t>", [("<a>", 1, "<b>"), ("x" * 99, 0, "")]),
    ):
        (svg,) = re.findall(r"<svg.*?</svg>", plot)
        ElementTree.fromstring(svg)
        assert "<a>" not in plot


# Files compared


def budgets(**more: Any) -> BudgetsConfig:
    return BudgetsConfig.model_validate(
        {"accounts": {"hr": {"window": "day", "gpu_seconds": 60, **more}}}
    )


@pytest.mark.parametrize(
    ("change", "kind", "place"),
    [
        ({"gpu_seconds": 61}, Kind.RAISED, "accounts.hr.gpu_seconds"),
        ({"gpu_seconds": 59}, Kind.LOWERED, "accounts.hr.gpu_seconds"),
        ({"tokens": 5}, Kind.LOWERED, "accounts.hr.tokens"),
        ({"mode": "soft"}, Kind.CHANGED, "accounts.hr.mode"),
        ({"weight": 2}, Kind.RAISED, "accounts.hr.weight"),
        ({"window": "week"}, Kind.CHANGED, "accounts.hr.window"),
        ({"owner": "budgets-hr@example.com"}, Kind.ADDED, "accounts.hr.owner"),
        ({"parts": {"a.b": {"match": {"roles": ["x"]}, "tokens": 1}}}, Kind.ADDED,
         "accounts.hr.parts.a\N{MIDDLE DOT}b"),
    ],
)  # fmt: skip
def test_one_change_is_one_line(change: dict[str, Any], kind: Kind, place: str) -> None:
    found = compare(budgets(), budgets(**change))
    assert [(each.kind, each.place) for each in found] == [(kind, place)]
    back = compare(budgets(**change), budgets())
    assert [each.place for each in back] == [place]
    assert (back[0].before, back[0].after) == (found[0].after, found[0].before)


def test_windows_and_accounts_come_and_go() -> None:
    further = {"also": [{"window": "hour", "gpu_seconds": 9}]}
    places = {each.place for each in compare(budgets(), budgets(**further))}
    assert "accounts.hr.also.hour.gpu_seconds" in places
    other = BudgetsConfig.model_validate({"accounts": {"it": {"window": "day", "tokens": 1}}})
    assert [(each.kind, each.place) for each in compare(budgets(), other)] == [
        (Kind.REMOVED, "accounts.hr"), (Kind.ADDED, "accounts.it"),
    ]  # fmt: skip
    assert compare(budgets(), budgets()) == []
