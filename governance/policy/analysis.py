"""What is wrong with a policy that is well-formed: names nobody declared, rules that cannot act.

Everything here is exact, not a heuristic: dimensions have few values, and a rule names only what
matches, so every cell (role, department, kind, model, operation) can be looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from governance.policy.engine import CompiledPolicy, RuleIndex, bits
from governance.policy.model import (
    TIER_PREFIX,
    TIERS,
    InlineTest,
    LimitsConfig,
    PolicyConfig,
    Rule,
)
from governance.types import Decision, Effect, ModelInfo, Operation, Principal, PrincipalKind
from governance.yaml_config import Place

_OTHER = ""
"""Stands for a department or model that no rule names; the empty string is no valid name."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason to refuse a policy, and where it is."""

    place: Place
    reason: str


def problems(
    config: PolicyConfig, models: Sequence[ModelInfo], supported_effects: frozenset[Effect]
) -> Iterator[Problem]:
    """All reasons to refuse a policy; later checks run only if names and shapes are right."""
    found = [
        *_declarations(config),
        *_names(config, models),
        *_shapes(config, supported_effects),
    ]
    yield from found
    if found:
        return
    yield from _idle_rules(config, models)
    yield from _failing_tests(config, models)


def _declarations(config: PolicyConfig) -> Iterator[Problem]:
    """Duplicates."""
    for key, values in (
        ("roles", config.roles),
        ("departments", config.departments),
        ("rules", tuple(rule.id for rule in config.rules)),
        ("tests", tuple(test.name for test in config.tests)),
    ):
        seen: set[str] = set()
        for i, value in enumerate(values):
            if value in seen:
                yield Problem((key, i), f"{value!r} is there twice")
            seen.add(value)


def _names(config: PolicyConfig, models: Sequence[ModelInfo]) -> Iterator[Problem]:
    """Names that are not declared, or not served."""
    roles, departments = set(config.roles), set(config.departments)
    rule_ids = {rule.id for rule in config.rules}
    served = {model.id for model in models}
    for permission, holders in config.administration.items():
        for i, role in enumerate(holders):
            if role not in roles:
                yield Problem(("administration", permission.value, i), _unknown("role", role))
    for i, rule in enumerate(config.rules):
        place: Place = ("rules", i, "when")
        for j, role in enumerate(rule.when.roles or ()):
            if role not in roles:
                yield Problem((*place, "roles", j), _unknown("role", role))
        for j, department in enumerate(rule.when.departments or ()):
            if department not in departments:
                yield Problem((*place, "departments", j), _unknown("department", department))
        for j, name in enumerate(rule.when.models or ()):
            if reason := _unknown_model(name, served):
                yield Problem((*place, "models", j), reason)
    for i, test in enumerate(config.tests):
        place = ("tests", i)
        for j, role in enumerate(test.principal.roles):
            if role not in roles:
                yield Problem((*place, "principal", "roles", j), _unknown("role", role))
        if test.principal.department not in departments:
            reason = _unknown("department", test.principal.department)
            yield Problem((*place, "principal", "department"), reason)
        if reason := _unknown_model(test.model, served):
            yield Problem((*place, "model"), reason)
        if test.rule is not None and test.rule not in rule_ids:
            yield Problem((*place, "rule"), f"there is no rule {test.rule!r}")


def _unknown(kind: str, name: str) -> str:
    return f"{kind} {name!r} is not declared under {kind}s"


def _unknown_model(name: str, served: set[str]) -> str:
    """Why a model or tier cannot be meant; empty if it can."""
    if name.startswith(TIER_PREFIX):
        if name.removeprefix(TIER_PREFIX) in TIERS:
            return ""
        return f"there is no tier {name!r}; tiers are {', '.join(TIER_PREFIX + t for t in TIERS)}"
    if name in served:
        return ""
    return f"model {name!r} is not served; served are {', '.join(sorted(served)) or 'none'}"


def _shapes(config: PolicyConfig, supported: frozenset[Effect]) -> Iterator[Problem]:
    """Rules that say something which their effect cannot mean."""
    for i, rule in enumerate(config.rules):
        if rule.effect not in supported:
            yield Problem(
                ("rules", i, "effect"),
                f"{rule.effect.value} needs {_NEEDS[rule.effect]}, which this version does not "
                "have yet",
            )
        if rule.effect is not Effect.ALLOW:
            for field, given in (
                ("limits", rule.limits != LimitsConfig()),
                ("priority", rule.priority is not None),
                ("on_exhaustion", rule.on_exhaustion is not None),
                ("everyone", rule.everyone),
            ):
                if given:
                    reason = f"only an allow rule has {field}"
                    yield Problem(("rules", i, field), reason)
            continue
        if rule.message is not None:
            yield Problem(("rules", i, "message"), "an allow rule stops nobody and has no message")
        named = rule.when.roles is not None or rule.when.departments is not None
        if not named and not rule.everyone:
            yield Problem(
                ("rules", i, "when"),
                "an allow rule names roles or departments, or says everyone: true",
            )
        if named and rule.everyone:
            yield Problem(
                ("rules", i, "everyone"), "the rule names roles or departments, so not everyone"
            )


_NEEDS = {
    Effect.BLOCK: "blocking",
    Effect.REQUIRE_APPROVAL: "parked requests and approvals",
    Effect.REROUTE: "rerouting",
    Effect.REDACT: "inspection and redaction",
    Effect.ALLOW: "allowing",
}


def _idle_rules(config: PolicyConfig, models: Sequence[ModelInfo]) -> Iterator[Problem]:
    """Rules that can never act: no served model fits, or a stricter rule always does."""
    index = RuleIndex(config)
    stricter_than: dict[Effect, int] = {}
    stricter = 0
    for effect in Effect:  # strictest first
        stricter_than[effect] = stricter
        stricter |= index.by_effect[effect]
    # An allow rule still grants, and still limits, what other rules then restrict.
    stricter_than[Effect.ALLOW] = index.by_effect[Effect.BLOCK]
    for i, rule in enumerate(config.rules):
        reached = list(_models_of(rule, models))
        if not reached:
            yield Problem(
                ("rules", i, "when"), "never matches: no model it names answers its operations"
            )
            continue
        if rule.on_exhaustion is not None and all(model.tier != "large" for model, _ in reached):
            yield Problem(
                ("rules", i, "on_exhaustion"), "never acts: the rule is about no large model"
            )
        shadows = 0
        for cell in _cells(rule, config, reached):
            over = index.matching(*cell) & stricter_than[rule.effect]
            if not over:
                break
            shadows |= over
        else:
            ids = ", ".join(config.rules[j].id for j in bits(shadows))
            yield Problem(("rules", i), f"never acts: wherever it matches, {ids} wins")


def _models_of(
    rule: Rule, models: Sequence[ModelInfo]
) -> Iterator[tuple[ModelInfo, tuple[Operation, ...]]]:
    """Models that a rule can match, with the operations for which it can.

    A tier without a served model counts, with a stand-in, so that one file suits installations
    with different models.
    """
    wanted = set(rule.when.operations or Operation)
    for model in models_to_look_at(models):
        names = rule.when.models
        by_tier = TIER_PREFIX + model.tier in (names or ())
        if rule.effect is Effect.ALLOW and model.base != model.id:
            by_tier = False
        if names is None or model.id in names or by_tier:
            operations = tuple(o for o in Operation if o in wanted & model.operations)
            if operations:
                yield model, operations


def models_to_look_at(models: Sequence[ModelInfo]) -> list[ModelInfo]:
    """Served models, and a stand-in for each tier that none is in."""
    served = {model.tier for model in models}
    return [*models, *(_stand_in(tier) for tier in TIERS if tier not in served)]


def _stand_in(tier: str) -> ModelInfo:
    """A model of a tier that no rule can name by id."""
    name = f"any model of tier {tier}"
    return ModelInfo(name, tier, frozenset(Operation), context_tokens=1, base=name)


def _cells(
    rule: Rule, config: PolicyConfig, models: list[tuple[ModelInfo, tuple[Operation, ...]]]
) -> Iterator[tuple[tuple[str, ...], str, str, ModelInfo, str]]:
    """The least specific principals that a rule matches, with every model and operation.

    One role at most: with more roles a principal matches more rules, never fewer, so what is
    shadowed for one role is shadowed for all sets that hold it.
    """
    role_sets = [(role,) for role in rule.when.roles] if rule.when.roles else [()]
    departments = rule.when.departments or (*config.departments, _OTHER)
    kinds = rule.when.kinds or tuple(PrincipalKind)
    for roles, department, kind in itertools.product(role_sets, departments, kinds):
        for model, operations in models:
            for operation in operations:
                yield roles, department, kind.value, model, operation.value


def _failing_tests(config: PolicyConfig, models: Sequence[ModelInfo]) -> Iterator[Problem]:
    policy = CompiledPolicy(config, models)
    for i, test in enumerate(config.tests):
        for model in _models_of_test(test, models):
            decision = policy.decide(_principal(test), model, test.operation.value)
            if reason := _difference(test, decision):
                yield Problem(("tests", i), f"fails for {model.id}: {reason}")
                break


def _models_of_test(test: InlineTest, models: Sequence[ModelInfo]) -> list[ModelInfo]:
    """The model a test names; for a tier a stand-in, and each served model that has no adapter."""
    if not test.model.startswith(TIER_PREFIX):
        return [model for model in models if model.id == test.model]
    tier = test.model.removeprefix(TIER_PREFIX)
    served = [m for m in models if m.tier == tier and m.base == m.id]
    return [_stand_in(tier), *served]


def _principal(test: InlineTest) -> Principal:
    return Principal(
        kind=test.principal.kind,
        subject="test",
        issuer="test",
        department=test.principal.department,
        roles=frozenset(test.principal.roles),
        key="test",
    )


def _difference(test: InlineTest, decision: Decision) -> str:
    """What a decision has other than a test expects; empty if nothing."""
    by = f" by {', '.join(decision.rule_ids)}" if decision.rule_ids else " by default"
    if decision.effect is not test.expect:
        return f"expected {test.expect.value}, decided {decision.effect.value}{by}"
    if test.rule is not None and test.rule not in decision.rule_ids:
        return f"expected rule {test.rule}, decided {decision.effect.value}{by}"
    for bound, value in test.limits.model_dump(exclude_none=True).items():
        if (actual := getattr(decision.limits, bound)) != value:
            return f"expected {bound} {value}, got {actual if actual is not None else 'none'}"
    exhausted = decision.on_exhaustion or "refuse"
    if test.on_exhaustion is not None and test.on_exhaustion != exhausted:
        return f"expected on_exhaustion {test.on_exhaustion}, got {exhausted}{by}"
    return ""
