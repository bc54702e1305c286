"""Policies that are refused, with line, place and reason; and the one that is shipped."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import yaml

from deployments.config import AppConfig
from governance.policy.load import load_policy
from governance.policy.model import PolicyConfig
from governance.types import Effect, ModelInfo, Operation
from governance.yaml_config import ConfigError

ROOT = Path(__file__).parents[2]
GENERATE = frozenset({Operation.CHAT, Operation.COMPLETIONS})
MODELS = (
    ModelInfo("tiny", "small", GENERATE, 1024, "tiny"),
    ModelInfo("tiny-hr", "small", GENERATE, 1024, "tiny"),
    ModelInfo("big", "large", GENERATE, 1024, "big"),
)
HEAD = """\
version: 1
roles: [analyst, intern]
departments: [hr, marketing]
"""
"""Three lines, so that what a test adds starts in line 4."""


def load(tmp_path: Path, text: str, effects: frozenset[Effect] | None = None) -> PolicyConfig:
    path = tmp_path / "policy.yaml"
    path.write_text(HEAD + textwrap.dedent(text))
    if effects is None:
        return load_policy(path, MODELS)
    return load_policy(path, MODELS, effects)


def refusal(tmp_path: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    return caught.value


def rule(line: str) -> str:
    """A file of one rule; ``line`` is its line 6."""
    return f"rules:\n- id: r\n  {line}\n"


@pytest.mark.parametrize(
    ("line", "place", "reason"),
    [
        ("{when: {roles: [boss]}, effect: allow}", "when.roles.0", "role 'boss' is not declared"),
        (
            "{when: {departments: [it]}, effect: block}",
            "when.departments.0",
            "'it' is not declared",
        ),
        (
            "{when: {roles: [analyst], models: [huge]}, effect: allow}",
            "when.models.0",
            "not served",
        ),
        ("{when: {models: ['tier:huge']}, effect: block}", "when.models.0", "no tier 'tier:huge'"),
        ("{when: {operations: [speak]}, effect: block}", "when.operations.0", "'chat'"),
        ("{when: {kinds: [robot]}, effect: block}", "when.kinds.0", "'user'"),
        ("{when: {roles: []}, effect: allow}", "when.roles", "at least 1"),
        ("{when: {roles: analyst}, effect: allow}", "when.roles", "tuple"),
        ("{when: {findings: [pii]}, effect: block}", "when.findings", "not permitted"),
        ("{when: {roles: [analyst]}, effect: deny}", "effect", "'block'"),
        ("{when: {roles: [analyst]}}", "effect", "required"),
        ("{when: {}, effect: allow}", "when", "everyone: true"),
        ("{effect: allow}", "when", "everyone: true"),
        ("{when: {models: [tiny], kinds: [user]}, effect: allow}", "when", "everyone: true"),
        ("{when: {roles: [intern]}, everyone: true, effect: allow}", "everyone", "not everyone"),
        ("{everyone: true, effect: block}", "everyone", "only an allow rule"),
        ("{effect: block, limits: {max_tokens: 5}}", "limits", "only an allow rule"),
        ("{effect: block, priority: batch}", "priority", "only an allow rule"),
        ("{effect: block, on_exhaustion: small}", "on_exhaustion", "only an allow rule"),
        ("{everyone: true, effect: allow, on_exhaustion: large}", "on_exhaustion", "'refuse'"),
        (
            "{everyone: true, when: {models: ['tier:small']}, effect: allow, on_exhaustion: small}",
            "on_exhaustion",
            "about no large model",
        ),
        ("{everyone: true, effect: allow, message: x}", "message", "stops nobody"),
        ("{everyone: true, effect: allow, limits: {max_tokens: 0}}", "limits.max_tokens", "1"),
        (
            "{everyone: true, effect: allow, limits: {max_tokens: '5'}}",
            "limits.max_tokens",
            "integer",
        ),
        ("{everyone: true, effect: allow, limits: {max_tokens: true}}", "limits.max_tokens", "int"),
        ("{everyone: true, effect: allow, limits: {tokens: 5}}", "limits.tokens", "not permitted"),
        ("{everyone: true, effect: allow, priority: urgent}", "priority", "'critical'"),
        ("{everyone: 'yes', effect: allow}", "everyone", "boolean"),
        ("{everyone: true, effect: redact}", "effect", "this version does not have yet"),
        ("{effect: reroute}", "effect", "needs rerouting, which this version does not have yet"),
        ("{effect: require_approval}", "effect", "needs parked requests and approvals"),
        ("{mode: shadow, effect: block}", "mode", "not permitted"),
    ],
)
def test_a_wrong_rule_is_refused_with_its_place(
    tmp_path: Path, line: str, place: str, reason: str
) -> None:
    error = refusal(tmp_path, "rules:\n- " + line.replace("{", "{id: r, ", 1) + "\n")
    assert error.line == 5
    assert error.place == f"rules.0.{place}"
    assert reason in error.reason


GOOD = "rules:\n- {id: r, when: {roles: [analyst]}, effect: allow}\n"


@pytest.mark.parametrize(
    ("text", "line", "place", "reason"),
    [
        (GOOD + "- {id: r, when: {roles: [intern]}, effect: allow}\n", 6, "rules.1", "twice"),
        (
            GOOD + "administration: {'keys:manage': [boss]}\n",
            6,
            "administration.keys:manage.0",
            "b",
        ),
        (GOOD + "administration: {'keys:steal': [analyst]}\n", 6, "administration.keys:steal", ""),
        ("rules: []\n", 4, "rules", "at least 1"),
        (GOOD + "extra: 1\n", 6, "extra", "not permitted"),
        (GOOD + "rules: []\n", 6, "rules", "twice"),
        ("rules:\n- {id: 'A b', everyone: true, effect: allow}\n", 5, "rules.0.id", "pattern"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(
    tmp_path: Path, text: str, line: int, place: str, reason: str
) -> None:
    error = refusal(tmp_path, text)
    assert error.line == line
    assert error.place.startswith(place)
    assert reason in error.reason


def test_declared_names_are_unique(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(HEAD.replace("[analyst, intern]", "[analyst, analyst, intern]") + GOOD)
    with pytest.raises(ConfigError, match=r":2: roles.1: 'analyst' is there twice"):
        load_policy(path, MODELS)


@pytest.mark.parametrize(
    ("allowed", "blocks"),
    [
        ("roles: [analyst]", ["roles: [analyst, intern]"]),
        ("roles: [analyst, intern]", ["roles: [analyst]", "roles: [intern]"]),
        ("roles: [analyst], models: [tiny]", ["models: ['tier:small']"]),
        ("roles: [analyst], models: [tiny-hr]", ["models: ['tier:small']"]),
        ("roles: [analyst], operations: [chat]", ["operations: [chat]"]),
        ("departments: [hr], kinds: [user]", ["departments: [hr, marketing]", "kinds: [key]"]),
        (
            "roles: [analyst], models: ['tier:small', big], operations: [chat]",
            ["models: [tiny, tiny-hr]", "models: [big], operations: [chat, completions]"],
        ),
        ("roles: [analyst], models: ['tier:embedding']", ["models: ['tier:embedding']"]),
        ("roles: [intern]", ["kinds: [user]", "kinds: [service]", "kinds: [key]"]),
    ],
)
def test_a_rule_that_stricter_ones_always_beat_is_refused(
    tmp_path: Path, allowed: str, blocks: list[str]
) -> None:
    text = GOOD.replace("{roles: [analyst]}", "{roles: [intern]}").replace("id: r", "id: other")
    text += f"- {{id: idle, when: {{{allowed}}}, effect: allow}}\n"
    for i, block in enumerate(blocks):
        text += f"- {{id: b{i}, when: {{{block}}}, effect: block}}\n"
    text = text.replace("- {id: other, when: {roles: [intern]}, effect: allow}\n", "")
    error = refusal(tmp_path, text)
    assert error.place == "rules.0"
    assert "never acts" in error.reason
    assert "b0" in error.reason


@pytest.mark.parametrize(
    ("allowed", "block"),
    [
        ("roles: [analyst, intern]", "roles: [analyst]"),
        ("departments: [hr, marketing]", "departments: [hr]"),
        ("roles: [analyst]", "departments: [hr, marketing]"),  # departments nobody declared remain
        ("roles: [analyst]", "models: ['tier:small']"),
        ("roles: [analyst], models: ['tier:small']", "models: [tiny-hr]"),
        ("roles: [analyst]", "operations: [chat]"),
        ("roles: [analyst]", "kinds: [key, service]"),
        ("roles: [analyst]", "roles: [intern]"),
    ],
)
def test_a_rule_that_is_beaten_in_part_only_is_kept(
    tmp_path: Path, allowed: str, block: str
) -> None:
    load(
        tmp_path,
        f"""\
        rules:
        - {{id: a, when: {{{allowed}}}, effect: allow}}
        - {{id: b, when: {{{block}}}, effect: block}}
        """,
    )


def test_everyone_is_shadowed_by_a_block_for_everyone_only(tmp_path: Path) -> None:
    text = "rules:\n- {id: a, everyone: true, effect: allow}\n- {id: b, effect: block%s}\n"
    assert "never acts" in refusal(tmp_path, text % "").reason
    load(tmp_path, text % ", when: {roles: [analyst, intern]}")


@pytest.mark.parametrize(
    "when",
    [
        "roles: [analyst], models: [tiny], operations: [embeddings]",
        "roles: [analyst], models: ['tier:large', 'tier:small'], operations: [embeddings]",
    ],
)
def test_a_rule_without_a_model_that_could_answer_is_refused(tmp_path: Path, when: str) -> None:
    error = refusal(tmp_path, f"rules:\n- {{id: r, when: {{{when}}}, effect: allow}}\n")
    assert error.place == "rules.0.when"
    assert "never matches" in error.reason


def test_a_tier_that_has_no_model_today_may_be_named(tmp_path: Path) -> None:
    load(
        tmp_path,
        """\
        rules:
        - {id: r, when: {roles: [analyst], models: ["tier:embedding"]}, effect: allow}
        tests:
        - name: embeddings are granted
          principal: {roles: [analyst], department: hr}
          model: "tier:embedding"
          operation: embeddings
          expect: allow
        """,
    )


def inline(**changed: str) -> str:
    fields = {
        "principal": "{roles: [analyst], department: hr}",
        "model": "tiny",
        "operation": "chat",
        "expect": "allow",
        **changed,
    }
    lines = "".join(f"  {key}: {value}\n" for key, value in fields.items())
    return (
        "rules:\n"
        "- {id: r, when: {roles: [analyst]}, effect: allow, limits: {max_tokens: 9}}\n"
        "- {id: s, when: {roles: [intern]}, effect: block}\n"
        f"tests:\n- name: it\n{lines}"
    )


def test_inline_tests_that_hold_are_accepted(tmp_path: Path) -> None:
    load(tmp_path, inline())
    load(tmp_path, inline(rule="r", limits="{max_tokens: 9}"))
    load(tmp_path, inline(model="'tier:small'"))
    load(tmp_path, inline(principal="{department: hr}", expect="block"))
    load(tmp_path, inline(on_exhaustion="refuse"))
    load(tmp_path, inline(principal="{roles: [intern], department: hr}", expect="block", rule="s"))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"expect": "block"}, "fails for tiny: expected block, decided allow by r"),
        ({"principal": "{department: hr}"}, "expected allow, decided block by default"),
        ({"principal": "{roles: [intern], department: hr}"}, "decided block by s"),
        ({"rule": "s"}, "expected rule s"),
        ({"limits": "{max_tokens: 8}"}, "expected max_tokens 8, got 9"),
        ({"limits": "{context_tokens: 8}"}, "expected context_tokens 8, got none"),
        ({"on_exhaustion": "small"}, "expected on_exhaustion small, got refuse by r"),
        ({"model": "'tier:large'", "expect": "block"}, "any model of tier large"),
        ({"model": "nope"}, "not served"),
        ({"rule": "nope"}, "no rule 'nope'"),
        ({"principal": "{roles: [boss], department: hr}"}, "'boss' is not declared"),
        ({"principal": "{roles: [], department: it}"}, "'it' is not declared"),
    ],
)
def test_a_failing_inline_test_refuses_the_file(
    tmp_path: Path, changed: dict[str, str], reason: str
) -> None:
    error = refusal(tmp_path, inline(**changed))
    assert error.place.startswith("tests.0")
    assert (error.line or 0) >= 8
    assert reason in error.reason


def test_effects_are_accepted_once_the_platform_has_them(tmp_path: Path) -> None:
    text = GOOD + "- {id: x, when: {roles: [analyst]}, effect: redact}\n"
    with pytest.raises(ConfigError, match="does not have yet"):
        load(tmp_path, text)
    load(tmp_path, text, frozenset(Effect))  # the allow rule is not idle: it grants
    text += "- {id: y, when: {roles: [analyst]}, effect: reroute}\n"
    with pytest.raises(ConfigError, match=r"rules.1: never acts: wherever it matches, y wins"):
        load(tmp_path, text, frozenset(Effect))


def test_the_shipped_policy_suits_both_shipped_installations() -> None:
    digests = set()
    for name in ("serve_config.yaml", "serve_config.local.yaml"):
        file = yaml.safe_load((ROOT / name).read_text())
        args = AppConfig.model_validate(file["applications"][0]["args"])
        policy = load_policy(ROOT / "config/policy.yaml", args.model_infos())
        digests.add(policy.digest)
    assert len(digests) == 1
    assert len(policy.tests) >= 10


def test_a_policy_survives_the_way_to_a_replica() -> None:
    policy = load_policy(ROOT / "config/policy.yaml", MODELS)
    again = PolicyConfig.model_validate(policy.model_dump(mode="json"))
    assert again == policy
    assert again.digest == policy.digest
    changed = policy.model_copy(update={"roles": (*policy.roles, "x")})
    assert changed.digest != policy.digest
