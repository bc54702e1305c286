"""Every field that the installed engine reads has been decided on.

The engine's own source is parsed, not imported: that would load torch. A new engine version that
brings a field fails here until ``governance.protocol.fields`` says what becomes of it.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from governance.protocol.fields import FORBIDDEN, FORWARDED, IGNORED, READ
from governance.types import Operation

SET_BY_GATEWAY = {"model", "cache_salt", "priority"}


def engine_root() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "entrypoints"


def fields_of(file: str, *classes: str) -> set[str]:
    """Names of the annotated public fields of some classes of a source file."""
    tree = ast.parse((engine_root() / file).read_text())
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in classes:
            found |= {
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
    return {name for name in found if not name.startswith("_")}


ENGINE_FIELDS = {
    Operation.CHAT: fields_of("openai/chat_completion/protocol.py", "ChatCompletionRequest"),
    Operation.COMPLETIONS: fields_of("openai/completion/protocol.py", "CompletionRequest"),
    Operation.EMBEDDINGS: fields_of(
        "pooling/base/protocol.py",
        "PoolingBasicRequestMixin",
        "CompletionRequestMixin",
        "ChatRequestMixin",
        "ChatRequestOptionsMixin",
        "EncodingRequestMixin",
        "EmbedRequestMixin",
    ),
}


@pytest.mark.parametrize("operation", Operation)
def test_each_field_of_the_engine_is_decided_on_once(operation: Operation) -> None:
    tables = [
        set(FORWARDED[operation]),
        set(READ[operation]) | {"model"},
        set(IGNORED[operation]),
        set(FORBIDDEN[operation]),
    ]
    decided = set().union(*tables)
    assert sum(map(len, tables)) == len(decided), "a field is in two tables"
    assert len(ENGINE_FIELDS[operation]) > 5
    assert ENGINE_FIELDS[operation] - decided == set()


@pytest.mark.parametrize("operation", Operation)
def test_the_engine_knows_each_field_that_is_sent(operation: Operation) -> None:
    sent = set(FORWARDED[operation]) | SET_BY_GATEWAY
    if operation is not Operation.EMBEDDINGS:
        sent |= {"stream", "stream_options"}
        sent.add("max_completion_tokens" if operation is Operation.CHAT else "max_tokens")
    assert sent - ENGINE_FIELDS[operation] == set()


@pytest.mark.parametrize("operation", Operation)
def test_what_the_platform_sets_is_forbidden_to_clients(operation: Operation) -> None:
    assert (SET_BY_GATEWAY - {"model"}) <= FORBIDDEN[operation]
