"""The tree of errors: each has its own code, crosses a pickle, and is documented."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import pytest

from governance import errors
from governance.errors import GatehouseError

TREE = sorted(
    (
        cls
        for _, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, GatehouseError) and cls is not GatehouseError
    ),
    key=lambda cls: cls.__name__,
)
REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "errors.md"


@pytest.mark.parametrize("cls", TREE)
def test_each_error(cls: type[GatehouseError]) -> None:
    assert "code" in vars(cls), "an error without a code of its own cannot be told apart"
    assert 400 <= cls.status < 600
    assert cls().message == (cls.__doc__ or "").strip()
    error = pickle.loads(pickle.dumps(cls("what", "a.b", 7, ("rule",))))
    assert type(error) is cls
    assert (error.message, error.param, error.retry_after_s, error.rule_ids) == (
        "what",
        "a.b",
        7,
        ("rule",),
    )


def test_codes_are_unique() -> None:
    codes = [cls.code for cls in TREE]
    assert len(codes) == len(set(codes))


def test_the_drawing_is_true() -> None:
    drawing = errors.__doc__ or ""
    for cls in TREE:
        line = next(x for x in drawing.splitlines() if f" {cls.__name__} " in x)
        assert line.split()[-2:] == [str(cls.status), cls.code]


def test_the_reference_page_lists_each_error() -> None:
    page = REFERENCE.read_text()
    for cls in TREE:
        assert f"| {cls.status} | `{cls.code}` |" in page
