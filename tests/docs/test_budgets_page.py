"""The page about budgets is true: its example loads, and it names every key, header and field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from deployments.api import accounts
from deployments.api.budget_models import MAX_OVERRIDE_S
from deployments.api.schema import ERROR
from deployments.api.usage_schema import ACCOUNT
from governance.budget import config
from governance.budget.config import Mode, PriorityClass, load_budgets
from governance.budget.windows import WindowKind

PAGE = (Path(__file__).parents[2] / "docs/reference/budgets.md").read_text()


def test_the_example_loads(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "budgets.yaml"
    path.write_text(block)
    loaded = load_budgets(path)
    assert set(loaded.accounts) == {"hr", "marketing", "finance"}
    assert {account.mode for account in loaded.accounts.values()} == set(Mode)


MODELS = [
    value
    for value in vars(config).values()
    if isinstance(value, type) and issubclass(value, config.Section) and value is not config.Section
]


@pytest.mark.parametrize("model", MODELS)
def test_every_key_is_explained(model: type[BaseModel]) -> None:
    assert not [field for field in model.model_fields if f"`{field}`" not in PAGE]


def test_every_window_mode_and_class_is_named() -> None:
    named = [*WindowKind, *Mode, *PriorityClass]
    assert not [kind for kind in named if f"`{kind.value}`" not in PAGE]


def test_every_field_of_a_refusal_is_named() -> None:
    known = ERROR["properties"]["error"]["properties"]
    ours = set(known) - {
        "message",
        "type",
        "param",
        "code",
        "request_id",
        "decision_id",
        "rule_ids",
    }
    assert len(ours) > 5
    assert not [field for field in ours if f"`{field}`" not in PAGE]


def test_every_header_is_named() -> None:
    named = set(re.findall(r"`(x-[a-z-]+)`", PAGE))
    values = {value for value in vars(accounts).values() if isinstance(value, str)}
    assert named == {value for value in values if value.startswith("x-")}


def test_every_amount_is_explained() -> None:
    amounts = [name for name, value in ACCOUNT.items() if value.get("type") == "object"]
    assert len(amounts) > 5
    assert not [name for name in (*amounts, "age_ms") if f"`{name}`" not in PAGE]


def test_the_longest_override() -> None:
    assert re.findall(r"at most (\d+) days ahead", PAGE) == [str(MAX_OVERRIDE_S // 86_400)]
