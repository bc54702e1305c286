"""The page about budgets is true: its example loads, and it names every key, header and field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from deployments.api import accounts
from deployments.api.schema import USAGE_ANSWER
from deployments.api.usage import MAX_OVERRIDE_S
from governance.budget.config import AccountConfig, BudgetsConfig, LeaseConfig, load_budgets
from governance.budget.windows import WindowKind

PAGE = (Path(__file__).parents[2] / "docs/reference/budgets.md").read_text()


def test_the_example_loads(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "budgets.yaml"
    path.write_text(block)
    assert set(load_budgets(path).accounts) == {"hr", "marketing"}


@pytest.mark.parametrize("model", [BudgetsConfig, AccountConfig, LeaseConfig])
def test_every_key_is_explained(model: type[BaseModel]) -> None:
    assert not [field for field in model.model_fields if f"`{field}`" not in PAGE]


def test_every_window_is_named() -> None:
    assert not [kind for kind in WindowKind if f"`{kind.value}`" not in PAGE]


def test_every_header_is_named() -> None:
    named = set(re.findall(r"`(x-[a-z-]+)`", PAGE))
    values = {value for value in vars(accounts).values() if isinstance(value, str)}
    assert named == {value for value in values if value.startswith("x-")}


def test_every_amount_is_explained() -> None:
    schema = USAGE_ANSWER[200]["content"]["application/json"]["schema"]["properties"]
    amounts = [name for name, value in schema.items() if value.get("type") == "object"]
    assert len(amounts) == 5
    assert not [name for name in (*amounts, "age_ms") if f"`{name}`" not in PAGE]


def test_the_longest_override() -> None:
    assert re.findall(r"at most (\d+) days ahead", PAGE) == [str(MAX_OVERRIDE_S // 86_400)]
