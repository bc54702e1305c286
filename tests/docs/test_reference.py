"""The generated pages say what the code says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel

from deployments.config import AppConfig
from scripts.reference import PAGES, docstrings, nested, sections

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference"


@pytest.mark.parametrize(("name", "render"), PAGES.items())
def test_the_page_is_what_the_code_gives(name: str, render: Callable[[], str]) -> None:
    assert (ROOT / name).read_text() == render(), "run: python scripts/reference.py"


@pytest.mark.parametrize("model", [model for _, model in sections(AppConfig)])
def test_each_setting_is_explained_where_it_is_declared(model: type[BaseModel]) -> None:
    described = docstrings(model)
    assert not [
        name
        for name, field in model.model_fields.items()
        if name not in described and nested(field.annotation) is type(None)
    ]


def test_each_variable_of_ours_is_documented() -> None:
    sources = [*(ROOT / "deployments").rglob("*.py"), ROOT / "scripts" / "bootstrap.py"]
    read = {
        variable
        for path in sources
        for variable in re.findall(r"\"(GATEHOUSE_[A-Z_]+)\"", path.read_text())
    }
    assert len(read) > 5
    pages = "".join((REFERENCE / page).read_text() for page in ("settings.md", "cli.md"))
    assert not [variable for variable in read if f"`{variable}`" not in pages]
