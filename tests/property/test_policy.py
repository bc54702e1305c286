"""What holds for every policy and every caller."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from governance.policy.analysis import problems
from governance.policy.engine import CompiledPolicy
from governance.policy.model import TIER_PREFIX, PolicyConfig
from governance.types import Decision, Effect, ModelInfo, Operation, Principal, PrincipalKind

ROLES = ("a", "b", "c")
DEPARTMENTS = ("x", "y")
MODELS = (
    ModelInfo("m1", "small", frozenset(Operation), 10, "m1"),
    ModelInfo("m1-lora", "small", frozenset({Operation.CHAT}), 10, "m1"),
    ModelInfo("m2", "large", frozenset({Operation.CHAT, Operation.COMPLETIONS}), 10, "m2"),
)
RANK = {effect: i for i, effect in enumerate(reversed(Effect))}
"""0 is the loosest."""


def some(values: tuple[str, ...]) -> st.SearchStrategy[list[str] | None]:
    return st.none() | st.lists(st.sampled_from(values), min_size=1, max_size=3, unique=True)


whens = st.fixed_dictionaries(
    {
        "roles": some(ROLES),
        "departments": some(DEPARTMENTS),
        "kinds": some(tuple(PrincipalKind)),
        "models": some(("m1", "m1-lora", "m2", "tier:small", "tier:large", "tier:embedding")),
        "operations": some(tuple(Operation)),
    }
)
bodies = st.fixed_dictionaries(
    {
        "when": whens,
        "effect": st.sampled_from([e.value for e in Effect]),
        "limits": st.fixed_dictionaries(
            {
                "max_tokens": st.none() | st.integers(1, 9),
                "parallel_requests": st.none() | st.just(3),
            }
        ),
        "priority": st.sampled_from([None, "critical", "standard", "batch"]),
    }
)
rule_lists = st.lists(bodies, min_size=1, max_size=8)
principals = st.builds(
    Principal,
    kind=st.sampled_from(PrincipalKind),
    subject=st.just("s"),
    issuer=st.just("i"),
    department=st.sampled_from((*DEPARTMENTS, "undeclared")),
    roles=st.frozensets(st.sampled_from((*ROLES, "undeclared"))),
    key=st.just("k"),
)
cells = st.tuples(
    principals,
    st.sampled_from((*MODELS, ModelInfo("other", "odd", frozenset(), 1, "other"))),
    st.sampled_from((*(o.value for o in Operation), "odd")),
)


def config(rules: list[dict[str, Any]]) -> PolicyConfig:
    return PolicyConfig.model_validate(
        {
            "version": 1,
            "roles": ROLES,
            "departments": DEPARTMENTS,
            "rules": [{"id": f"r{i}", **rule} for i, rule in enumerate(rules)],
        }
    )


def compiled(rules: list[dict[str, Any]]) -> CompiledPolicy:
    return CompiledPolicy(config(rules), MODELS)


def matches(rule: dict[str, Any], who: Principal, model: ModelInfo, operation: str) -> bool:
    """Whether a rule matches, written as the documentation says it and without an index."""
    when = rule["when"]
    tier_counts = rule["effect"] != "allow" or model.id == model.base
    return (
        (when["roles"] is None or not who.roles.isdisjoint(when["roles"]))
        and (when["departments"] is None or who.department in when["departments"])
        and (when["kinds"] is None or who.kind in when["kinds"])
        and (when["operations"] is None or operation in when["operations"])
        and (
            when["models"] is None
            or model.id in when["models"]
            or (tier_counts and TIER_PREFIX + model.tier in when["models"])
        )
    )


@given(rules=rule_lists, cell=cells)
def test_a_decision_is_what_the_documentation_says(
    rules: list[dict[str, Any]], cell: tuple[Principal, ModelInfo, str]
) -> None:
    policy = compiled(rules)
    decided = policy.decide(*cell)
    hits = [i for i, rule in enumerate(rules) if matches(rule, *cell)]
    ids: tuple[str, ...] = ()
    effects = {rules[i]["effect"] for i in hits}
    if "block" not in effects and "allow" not in effects:
        expected = Effect.BLOCK
    else:
        expected = next(e for e in Effect if e.value in effects)
        ids = tuple(f"r{i}" for i in hits if rules[i]["effect"] == expected)
    assert (decided.effect, decided.rule_ids) == (expected, ids)
    assert decided.policy_digest == policy.digest
    granting = [rules[i] for i in hits if rules[i]["effect"] == "allow"]
    if decided.effect is Effect.BLOCK:
        granting = []
    for bound in ("max_tokens", "parallel_requests"):
        values = [r["limits"][bound] for r in granting if r["limits"][bound] is not None]
        assert getattr(decided.limits, bound) == min(values, default=None)
    assert policy.decide(*cell) is decided or not decided.rule_ids


def looser(one: Decision, other: Decision) -> bool:
    """Whether ``one`` gives more than ``other``."""
    if RANK[one.effect] != RANK[other.effect]:
        return RANK[one.effect] < RANK[other.effect]
    if one.effect is Effect.BLOCK:
        return False
    return any(
        getattr(other.limits, bound) is not None
        and (getattr(one.limits, bound) or 10**9) > getattr(other.limits, bound)
        for bound in ("max_tokens", "parallel_requests")
    )


@given(rules=rule_lists, new=bodies, cell=cells)
def test_a_new_rule_that_restricts_never_widens(
    rules: list[dict[str, Any]], new: dict[str, Any], cell: tuple[Principal, ModelInfo, str]
) -> None:
    if new["effect"] == "allow":
        new = {**new, "effect": "block"}
    assert not looser(compiled([*rules, new]).decide(*cell), compiled(rules).decide(*cell))


@given(rules=rule_lists, new=bodies, cell=cells)
def test_a_new_allow_rule_loosens_nothing_that_is_granted_already(
    rules: list[dict[str, Any]], new: dict[str, Any], cell: tuple[Principal, ModelInfo, str]
) -> None:
    before = compiled(rules).decide(*cell)
    after = compiled([*rules, {**new, "effect": "allow"}]).decide(*cell)
    if before.effect is not Effect.BLOCK or before.rule_ids:
        assert not looser(after, before)


@given(
    rules=rule_lists, cell=cells, models=st.frozensets(st.sampled_from(("m1", "m2", "tier:small")))
)
def test_limits_of_a_credential_never_widen(
    rules: list[dict[str, Any]],
    cell: tuple[Principal, ModelInfo, str],
    models: frozenset[str],
) -> None:
    who, model, operation = cell
    limited = Principal(
        who.kind,
        "s",
        "i",
        who.department,
        who.roles,
        "k",
        models=models,
        operations=frozenset(("chat",)),
    )
    policy = compiled(rules)
    narrow, wide = policy.decide(limited, model, operation), policy.decide(who, model, operation)
    assert not looser(narrow, wide)
    if operation != "chat":
        assert narrow.effect is Effect.BLOCK


@settings(max_examples=60, deadline=None)
@given(rules=st.lists(bodies, min_size=1, max_size=5))
def test_the_analysis_finds_exactly_the_rules_that_never_act(rules: list[dict[str, Any]]) -> None:
    """Against trying every principal on every cell, the rule taken out and put back."""
    rules = [
        {
            "when": rule["when"],
            "effect": rule["effect"],
            "everyone": rule["effect"] == "allow"
            and rule["when"]["roles"] is None
            and rule["when"]["departments"] is None,
        }
        for rule in rules
    ]
    parsed = config(rules)
    found = {
        int(problem.place[1])
        for problem in problems(parsed, MODELS, frozenset(Effect))
        if problem.place[0] == "rules"
    }
    assert found == {i for i in range(len(rules)) if not acts(rules, i)}


STAND_IN = ModelInfo("none", "embedding", frozenset(Operation), 1, "none")


def acts(rules: list[dict[str, Any]], i: int) -> bool:
    """Whether some principal meets rule ``i`` where no block (or stricter rule) meets him too."""
    strict = {"block"} if rules[i]["effect"] == "allow" else set()
    if rules[i]["effect"] != "allow":
        strict = {e.value for e in Effect if RANK[e] > RANK[Effect(rules[i]["effect"])]}
    role_sets = [frozenset(r for j, r in enumerate(ROLES) if bits >> j & 1) for bits in range(8)]
    for roles in role_sets:
        for department in (*DEPARTMENTS, "undeclared"):
            for kind in PrincipalKind:
                who = Principal(kind, "s", "i", department, roles, "k")
                for model in (*MODELS, STAND_IN):
                    for operation in model.operations:
                        if matches(rules[i], who, model, operation) and not any(
                            rule["effect"] in strict and matches(rule, who, model, operation)
                            for rule in rules
                        ):
                            return True
    return False
