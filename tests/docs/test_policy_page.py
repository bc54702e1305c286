"""The page about the policy is true: its example loads, and it names every key there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from governance.policy.load import load_policy
from governance.policy.model import (
    TIERS,
    InlineTest,
    LimitsConfig,
    Permission,
    PolicyConfig,
    Rule,
    TestPrincipal,
    When,
)
from governance.types import Effect, ModelInfo, Operation, PrincipalKind

PAGE = (Path(__file__).parents[2] / "docs/reference/policy.md").read_text()


def test_the_example_loads(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 1
    path = tmp_path / "policy.yaml"
    path.write_text(blocks[0])
    generate = frozenset({Operation.CHAT, Operation.COMPLETIONS})
    models = [ModelInfo("tiny", "small", generate, 1024, "tiny")]
    assert len(load_policy(path, models).tests) == 2


@pytest.mark.parametrize(
    "model", [PolicyConfig, Rule, When, LimitsConfig, TestPrincipal, InlineTest]
)
def test_every_key_is_explained(model: type[BaseModel]) -> None:
    assert not [field for field in model.model_fields if f"`{field}`" not in PAGE]


@pytest.mark.parametrize("values", [Permission, Effect, Operation, PrincipalKind])
def test_every_value_is_named(values: type[Effect]) -> None:
    assert not [value.value for value in values if f"`{value.value}`" not in PAGE]


def test_every_tier_is_named() -> None:
    assert not [tier for tier in TIERS if f"`tier:{tier}`" not in PAGE]
