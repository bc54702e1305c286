"""Decisions: who gets what, and why."""

from __future__ import annotations

from typing import Any

import pytest

from governance.policy.engine import CompiledPolicy
from governance.policy.model import PolicyConfig
from governance.types import Effect, Limits, ModelInfo, Operation, Principal, PrincipalKind

ALL = frozenset(Operation)
SMALL = ModelInfo("tiny", "small", ALL, 1024, "tiny")
ADAPTER = ModelInfo("tiny-hr", "small", ALL, 1024, "tiny")
LARGE = ModelInfo("big", "large", frozenset({Operation.CHAT}), 1024, "big")
MODELS = (SMALL, ADAPTER, LARGE)


def policy(*rules: dict[str, Any], **more: Any) -> CompiledPolicy:
    config = PolicyConfig.model_validate(
        {
            "version": 1,
            "roles": ["analyst", "intern", "admin"],
            "departments": ["hr", "it"],
            "rules": [{"id": f"r{i}", "effect": "allow", **rule} for i, rule in enumerate(rules)],
            **more,
        }
    )
    return CompiledPolicy(config, MODELS)


def principal(*roles: str, **more: Any) -> Principal:
    return Principal(
        **{
            "kind": PrincipalKind.USER,
            "subject": "s",
            "issuer": "i",
            "department": "hr",
            "roles": frozenset(roles),
            "key": "k",
            **more,
        }
    )


ANALYST = {"when": {"roles": ["analyst"]}}


def test_without_a_matching_rule_the_request_is_blocked() -> None:
    decided = policy(ANALYST, default_message="Ask.").decide(principal("intern"), SMALL, "chat")
    assert (decided.effect, decided.rule_ids, decided.message) == (Effect.BLOCK, (), "Ask.")


def test_all_dimensions_must_match() -> None:
    compiled = policy(
        {
            "when": {
                "roles": ["analyst"],
                "departments": ["hr"],
                "kinds": ["user"],
                "models": ["tiny"],
                "operations": ["chat"],
            }
        }
    )
    assert compiled.decide(principal("analyst"), SMALL, "chat").rule_ids == ("r0",)
    for who, model, operation in (
        (principal("intern"), SMALL, "chat"),
        (principal("analyst", department="it"), SMALL, "chat"),
        (principal("analyst", department="nowhere"), SMALL, "chat"),
        (principal("analyst", kind=PrincipalKind.KEY), SMALL, "chat"),
        (principal("analyst"), LARGE, "chat"),
        (principal("analyst"), SMALL, "completions"),
        (principal("analyst"), SMALL, "speak"),
    ):
        assert compiled.decide(who, model, operation).effect is Effect.BLOCK


def test_one_role_of_several_is_enough_and_a_block_wins() -> None:
    compiled = policy(
        ANALYST,
        {"when": {"roles": ["intern"]}, "effect": "block", "message": "Not as an intern."},
        {"when": {"roles": ["analyst", "admin"]}},
    )
    assert compiled.decide(principal("analyst", "admin"), SMALL, "chat").rule_ids == ("r0", "r2")
    blocked = compiled.decide(principal("analyst", "intern"), SMALL, "chat")
    assert blocked.effect is Effect.BLOCK
    assert blocked.rule_ids == ("r1",)
    assert blocked.message == "Not as an intern."
    assert blocked.limits == Limits()


@pytest.mark.parametrize("effect", ["redact", "reroute", "require_approval", "block"])
def test_only_allow_grants(effect: str) -> None:
    alone = policy({"when": {"roles": ["analyst"]}, "effect": effect})
    assert alone.decide(principal("analyst"), SMALL, "chat").effect is Effect.BLOCK
    with_allow = policy({"effect": effect}, ANALYST)
    decided = with_allow.decide(principal("analyst"), SMALL, "chat")
    assert decided.effect is Effect(effect)
    assert decided.rule_ids == ("r0",)


def test_effects_are_ordered() -> None:
    order = ["block", "require_approval", "reroute", "redact", "allow"]
    for i, strictest in enumerate(order):
        compiled = policy(*({"effect": effect} for effect in reversed(order[i:])))
        assert compiled.decide(principal(), SMALL, "chat").effect is Effect(strictest)


def test_limits_and_priority_are_the_least_of_matching_allow_rules() -> None:
    compiled = policy(
        {"limits": {"max_tokens": 100, "parallel_requests": 5}, "priority": "critical"},
        {"when": {"roles": ["analyst"]}, "limits": {"max_tokens": 50}, "priority": "batch"},
        {"when": {"roles": ["intern"]}, "limits": {"max_tokens": 1}},
        {"when": {"models": ["tiny"]}, "limits": {"requests_per_minute": 7}},
    )
    decided = compiled.decide(principal("analyst"), SMALL, "chat")
    assert decided.limits == Limits(max_tokens=50, parallel_requests=5, requests_per_minute=7)
    assert decided.priority_class == "batch"
    assert compiled.decide(principal(), LARGE, "chat").limits.max_tokens == 100
    assert policy({}).decide(principal(), SMALL, "chat").priority_class is None


@pytest.mark.parametrize(
    ("rules", "decided"),
    [
        ([], None),
        (["small"], "small"),
        (["refuse"], "refuse"),
        (["small", "refuse"], "refuse"),
        (["refuse", "small"], "refuse"),
        ([None, "small", None], "small"),
    ],
)
def test_a_further_rule_cannot_let_another_model_stand_in(
    rules: list[str | None], decided: str | None
) -> None:
    compiled = policy({}, *({"on_exhaustion": each} for each in rules))
    assert compiled.decide(principal(), LARGE, "chat").on_exhaustion == decided


def test_the_limits_of_a_credential_come_before_every_rule() -> None:
    compiled = policy({"when": {"roles": ["admin"]}, "effect": "block"}, {})
    only_large = principal("admin", models=frozenset({"big"}))
    denied = compiled.decide(only_large, SMALL, "chat")
    assert (denied.effect, denied.rule_ids) == (Effect.BLOCK, ("credential:models",))
    by_operation = principal(operations=frozenset({"chat"}))
    assert compiled.decide(by_operation, SMALL, "embeddings").rule_ids == ("credential:operations",)
    assert compiled.decide(by_operation, SMALL, "chat").effect is Effect.ALLOW
    assert compiled.decide(principal(models=frozenset()), SMALL, "chat").effect is Effect.BLOCK
    by_tier = principal(models=frozenset({"tier:small"}))
    assert compiled.decide(by_tier, SMALL, "chat").effect is Effect.ALLOW
    assert compiled.decide(by_tier, LARGE, "chat").effect is Effect.BLOCK
    # The same cell without limits must not be answered from what was remembered, nor reverse.
    assert compiled.decide(principal(), SMALL, "embeddings").effect is Effect.ALLOW


def test_an_adapter_is_granted_by_its_own_id_and_restricted_by_its_tier() -> None:
    by_tier = policy({"when": {"roles": ["analyst"], "models": ["tier:small"]}})
    assert by_tier.decide(principal("analyst"), SMALL, "chat").effect is Effect.ALLOW
    assert by_tier.decide(principal("analyst"), ADAPTER, "chat").effect is Effect.BLOCK
    assert not by_tier.visible(principal("analyst"), ADAPTER)
    by_id = {"when": {"roles": ["analyst"], "models": ["tiny-hr"]}}
    assert policy(by_id).decide(principal("analyst"), ADAPTER, "chat").effect is Effect.ALLOW
    held = policy(by_id, {"when": {"models": ["tier:small"]}, "effect": "block"})
    assert held.decide(principal("analyst"), ADAPTER, "chat").effect is Effect.BLOCK


def test_a_model_is_visible_for_any_operation_that_it_answers() -> None:
    compiled = policy({"when": {"roles": ["analyst"], "operations": ["completions"]}})
    assert compiled.visible(principal("analyst"), SMALL)
    assert not compiled.visible(principal("analyst"), LARGE), "it answers chat only"
    assert not compiled.visible(principal("intern"), SMALL)
    limited = principal("analyst", operations=frozenset({"chat"}))
    assert not compiled.visible(limited, SMALL)
    asks = policy(ANALYST, {"effect": "require_approval"})
    assert asks.visible(principal("analyst"), SMALL)


def test_permissions_are_of_roles_and_unknown_ones_of_nobody() -> None:
    compiled = policy({}, administration={"keys:manage": ["admin"], "keys:read": []})
    assert compiled.permits(principal("analyst", "admin"), "keys:manage")
    assert not compiled.permits(principal("analyst"), "keys:manage")
    for permission in ("keys:read", "config:read", "keys:steal", ""):
        assert not compiled.permits(principal("admin"), permission)


def test_a_model_cannot_pass_for_a_tier() -> None:
    with pytest.raises(ValueError, match="tier:"):
        CompiledPolicy(policy({}).config, [ModelInfo("tier:small", "large", ALL, 1, "tier:small")])


def test_what_is_remembered_is_bounded() -> None:
    compiled = policy({})
    for i in range(40_000):
        compiled.decide(principal(department=str(i)), SMALL, "chat")
    assert len(compiled._remembered) <= 16_384


def big_policy(rules: int) -> CompiledPolicy:
    """``rules`` rules over 40 roles and 20 departments; each cell matches about a dozen."""
    departments = [f"d{i}" for i in range(20)]
    roles = [f"role{i}" for i in range(40)]
    made = [
        {
            "id": f"r{i}",
            "effect": "block" if i % 10 == 9 else "allow",
            "when": {
                "roles": [roles[i % 40], roles[(7 * i + 3) % 40]],
                "departments": [departments[(i // 40 + j) % 20] for j in range(5)],
                "operations": ["chat"],
                "models": ["tier:small"] if i % 2 else ["big", "tiny"],
            },
            "limits": {} if i % 10 == 9 else {"max_tokens": i + 1},
        }
        for i in range(rules)
    ]
    return policy(*made, roles=roles, departments=departments)


def test_a_thousand_rules_decide_as_they_stand() -> None:
    compiled = big_policy(1_000)
    callers = [
        principal(f"role{i % 40}", f"role{i % 7}", department=f"d{i % 20}") for i in range(2_000)
    ]
    effects = {compiled.decide(caller, SMALL, "chat").effect for caller in callers}
    assert effects == {Effect.ALLOW, Effect.BLOCK}
