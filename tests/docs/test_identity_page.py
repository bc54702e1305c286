"""The page about identity is true: its example loads, and it names every key and number."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from governance.control.records import MAX_TOKEN_REVOCATION_S
from governance.identity import authenticator, jwks, verifier
from governance.identity.config import (
    ALGORITHMS,
    IssuerConfig,
    Mapping,
    WhenClaims,
    load_identity,
)

PAGE = (Path(__file__).parents[2] / "docs/reference/identity.md").read_text()


def test_the_example_loads(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 1
    path = tmp_path / "identity.yaml"
    path.write_text(blocks[0])
    assert [issuer.name for issuer in load_identity(path).issuers] == ["entra", "okta"]


@pytest.mark.parametrize("model", [IssuerConfig, Mapping, WhenClaims])
def test_every_key_is_explained(model: type[BaseModel]) -> None:
    assert not [field for field in model.model_fields if f"`{field}`" not in PAGE]


def test_every_refused_header_and_algorithm_is_named() -> None:
    names = {*verifier._REFUSED_HEADERS, *ALGORITHMS}
    assert not [name for name in names if f"`{name}`" not in PAGE]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (r"more than (\d+) KiB", verifier.MAX_TOKEN_BYTES / 1024),
        (r"more than (\d+) names", verifier.MAX_CLAIMS),
        (r"key under (\d+)", verifier.MIN_RSA_BITS),
        (r"over (\d+) bits", verifier.MAX_RSA_BITS),
        (r"Over (\d+) s past", verifier.LEEWAY_S),
        (r"more than (\d+) s ahead", verifier.LEEWAY_S),
        (r"life of over (\d+) hours", MAX_TOKEN_REVOCATION_S / 3600),
        (r"fresh for (\d+) hour", jwks.FRESH_S / 3600),
        (r"used for up to (\d+) hours", jwks.USABLE_S / 3600),
        (r"per issuer in (\d+) s", jwks.RETRY_S),
        (r"believed for (\d+) s", authenticator.CACHE_S),
    ],
)
def test_numbers_are_those_of_the_code(words: str, value: float) -> None:
    assert [float(found) for found in re.findall(words, " ".join(PAGE.split()))] == [value]
