"""Generated requests against our own OpenAPI document: no crash, and no undocumented answer."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.contract.conftest import Server

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"),
    ("GET", "/v1/usage"),
]


@pytest.mark.parametrize("identity", ["data-scientist", "nobody"])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_answer_is_documented(server: Server, method: str, path: str, identity: str) -> None:
    # NOTE: driven through hypothesis and not through the package's pytest plugin, which needs
    # internals that the pinned pytest no longer has.
    operation = schemathesis.openapi.from_asgi("/openapi.json", server.app)[path][method]
    statuses = set()

    @given(case=operation.as_strategy())
    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case) -> None:
        answer = case.call_and_validate(
            base_url=server.url,
            headers={"authorization": f"Bearer {identity}"},
            checks=CHECKS,
        )
        statuses.add(answer.status_code)

    check()
    if identity == "nobody":
        assert statuses == {401}
    else:
        assert statuses <= {200, 400, 403, 404, 429}
