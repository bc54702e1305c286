"""Which account a request is charged to, what lies above it, and whether a file adds up."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from governance.budget.config import BudgetsConfig, Mode, PriorityClass
from governance.budget.tree import Tree, department_of, parts_of
from governance.errors import NoAccount
from governance.types import Principal, PrincipalKind

KEY = "ab12" * 16


def principal(
    department: str = "hr",
    *roles: str,
    kind: PrincipalKind = PrincipalKind.USER,
    subject: str = "sub",
    client_id: str | None = None,
) -> Principal:
    return Principal(kind, subject, "idp", department, frozenset(roles), KEY, client_id=client_id)


def tree(**hr: Any) -> Tree:
    account = {"tokens": 1000, "gpu_seconds": 100, **hr}
    return Tree(BudgetsConfig.model_validate({"accounts": {"hr": account}}))


PARTS = {
    "recruiting": {"tokens": 300, "match": {"applications": ["key_1", "app-9"]}},
    "talent": {
        "tokens": 200,
        "match": {"roles": ["talent"]},
        "per_user": {"tokens": 20, "window": "day"},
        "priority": "critical",
        "owner": "talent-budget",
    },
}


def test_without_parts_and_caps_a_department_is_charged() -> None:
    assert tree().leaf(principal()) == "hr"
    with pytest.raises(NoAccount):
        tree().leaf(principal("it"))


@pytest.mark.parametrize(
    ("caller", "leaf"),
    [
        (principal(), "hr"),
        (principal("hr", "talent"), f"hr/talent~{KEY}"),
        (principal(kind=PrincipalKind.KEY, subject="key_1"), "hr/recruiting"),
        (principal(client_id="app-9"), "hr/recruiting"),
        # An application's id counts as such only where the identity provider says so.
        (principal(subject="key_1"), "hr"),
        # The first part that matches is taken.
        (principal("hr", "talent", client_id="app-9"), "hr/recruiting"),
    ],
)
def test_a_part_is_charged_for_whom_it_matches(caller: Principal, leaf: str) -> None:
    assert tree(parts=PARTS).leaf(caller) == leaf


def test_a_path_holds_everything_above_and_further_windows() -> None:
    found = tree(
        parts=PARTS,
        per_user={"tokens": 50, "window": "day"},
        also=[{"window": "hour", "tokens": 90}],
    )
    names = [node.name for node in found.path(f"hr/talent~{KEY}")]
    assert names == [f"hr/talent~{KEY}", "hr/talent", "hr", "hr@hour"]
    assert [node.limit_tokens for node in found.path(f"hr/talent~{KEY}")] == [20, 200, 1000, 90]
    assert [node.limit_us for node in found.path("hr@hour")] == [None]
    assert found.leaf(principal()) == f"hr~{KEY}"
    assert found.listed() == ["hr", "hr@hour", "hr/recruiting", "hr/talent"]


def test_a_part_says_otherwise_or_takes_after_its_department() -> None:
    found = tree(parts=PARTS, mode="soft", owner="hr-budget", priority="batch")
    talent, recruiting = found.node("hr/talent"), found.node("hr/recruiting")
    assert (talent.owner, talent.priority, talent.mode) == (
        "talent-budget",
        PriorityClass.CRITICAL,
        Mode.SOFT,
    )
    assert (recruiting.owner, recruiting.priority) == ("hr-budget", PriorityClass.BATCH)
    assert tree().charge(principal()).priority_class is None
    assert found.charge(principal("hr", "talent")).priority_class == "critical"


def test_an_overdraft_is_the_departments_alone() -> None:
    found = tree(parts=PARTS, mode="overdraft", overdraft={"tokens": 77})
    assert found.node("hr").overdraft.tokens == 77
    assert found.node("hr/talent").mode is Mode.HARD
    assert found.node("hr/talent").overdraft.tokens == 0


@pytest.mark.parametrize("name", ["it", "hr/none", f"hr/recruiting~{KEY}", "hr@week"])
def test_what_the_file_does_not_have_is_found_but_not_granted(name: str) -> None:
    found = tree(parts=PARTS)
    assert not found.exists(name)
    assert department_of(name) == found.path(name)[-1].name.split("@")[0]


@pytest.mark.parametrize(
    "name",
    ["", "a b", "hr/", "/hr", "hr//x", "hr~", "hr~a~b", "hr/x/y", "hr@day/x", "-x", "h" * 300],
)
def test_other_names_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="account"):
        parts_of(name)
    assert not tree().exists(name)


def test_shards_keep_a_cohort_together() -> None:
    accounts = {f"d{n}": {"tokens": 1, "cohort": f"c{n % 7}"} for n in range(70)}
    cohorts = {f"c{n}": {} for n in range(7)}
    found = Tree(
        BudgetsConfig.model_validate({"accounts": accounts, "cohorts": cohorts, "shards": 4})
    )
    for cohort, members in found.members.items():
        assert len({found.shard(name) for name in members}) == 1, cohort
    assert len({found.shard(name) for name in accounts}) > 1
    assert found.shard("d1/part~user") == found.shard("d1")


A = {"tokens": 100, "gpu_seconds": 50}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"accounts": {"a": {**A, "cohort": "x"}}}, "in cohort x, which is not named"),
        ({"accounts": {"a": {**A, "lend": {"tokens": 5}}}}, "lend needs a cohort"),
        ({"accounts": {"a": {**A, "borrow": {"tokens": 5}}}}, "borrow needs a cohort"),
        ({"accounts": {"a": {**A, "mode": "overdraft"}}}, "overdraft belong together"),
        ({"accounts": {"a": {**A, "overdraft": {"tokens": 5}}}}, "overdraft belong together"),
        ({"accounts": {"a": {**A, "also": [{"window": "month", "tokens": 1}]}}}, "same kind"),
        ({"accounts": {"a": {**A, "weight": 0.0001}}}, "0.001 to 1000"),
        ({"accounts": {"a": {**A, "fiscal_day": 6}}}, "fiscal_day belongs to"),
        (
            {
                "cohorts": {"x": {}},
                "accounts": {"a": {"tokens": 5, "cohort": "x", "lend": {"tokens": 9}}},
            },
            "lends more than it has",
        ),
        (
            {
                "cohorts": {"x": {}},
                "accounts": {"a": {"tokens": 5, "cohort": "x", "borrow": {"gpu_seconds": 9}}},
            },
            "no limit of its own",
        ),
        (
            {"cohorts": {"x": {"window": "day"}}, "accounts": {"a": {**A, "cohort": "x"}}},
            "different windows",
        ),
        (
            {
                "cohorts": {"x": {"tokens": 150}},
                "accounts": {"a": {**A, "cohort": "x"}, "b": {**A, "cohort": "x"}},
            },
            "the accounts of cohort x have 200 tokens, but it has 150",
        ),
        (
            {"organisation": {"tokens": 100}, "accounts": {"a": A, "b": A}},
            "may use 200 tokens in a month, but the organisation has 100",
        ),
        (
            {"organisation": {"tokens": 3000}, "accounts": {"a": {**A, "window": "day"}}},
            "may use 3100 tokens in a month",
        ),
        (
            {"organisation": {"tokens": 3000, "window": "day"}, "accounts": {"a": A}},
            "a longer window than the organisation",
        ),
        (
            {"organisation": {"tokens": 3000}, "default_account": A},
            "default_account gives any number",
        ),
        (
            {"organisation": {"tokens": 3000}, "accounts": {"a": {"gpu_seconds": 5}}},
            "account a does not",
        ),
        (
            {
                "organisation": {"tokens": 100},
                "accounts": {"a": {**A, "mode": "overdraft", "overdraft": {"tokens": 1}}},
            },
            "may use 101 tokens",
        ),
        ({"alerts": {"thresholds": [80, 50]}, "accounts": {"a": A}}, "must rise"),
        ({"alerts": {"webhook": "http://hooks.example.com/x"}, "accounts": {"a": A}}, "https"),
    ],
)
def test_a_file_that_does_not_add_up_is_refused(data: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        BudgetsConfig.model_validate(data)


def test_a_file_that_adds_up_is_taken() -> None:
    BudgetsConfig.model_validate(
        {
            "organisation": {"tokens": 3100 + 150, "window": "month"},
            "cohorts": {"x": {"tokens": 150}},
            "accounts": {
                "a": {"tokens": 100, "window": "day"},
                "b": {"tokens": 100, "cohort": "x", "lend": {"tokens": 50}},
                "c": {"tokens": 50, "cohort": "x", "borrow": {"tokens": 50}},
            },
        }
    )


def test_the_digest_knows_sets_without_order() -> None:
    def digest(*roles: str) -> str:
        parts = {"p": {"tokens": 1, "match": {"roles": list(roles)}}}
        return tree(parts=parts).config.digest

    assert digest("a", "b", "c") == digest("c", "a", "b") != digest("a", "b")
