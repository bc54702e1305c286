"""Budgets are changed over HTTP while a real ledger runs, and each change is on record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from governance.audit.query import connect
from governance.budget.config import BudgetsConfig
from tests.budget_platform import BudgetPlatform
from tests.contract.conftest import TOKENS

DAY = {"window": "day", "timezone": "Europe/Berlin"}
FILE: dict[str, Any] = {
    "accounts": {
        "hr": {**DAY, "gpu_seconds": 100, "owner": "budgets-hr@example.com",
               "also": [{"window": "hour", "gpu_seconds": 80}],
               "parts": {"screening": {**DAY, "match": {"roles": ["analyst"]},
                                       "gpu_seconds": 60}}},
        "marketing": {**DAY, "gpu_seconds": 50, "tokens": 1000,
                      "per_user": {**DAY, "gpu_seconds": 20}},
        "data-science": {"window": "month", "tokens": 1000},
    }
}  # fmt: skip
ADMIN = "platform-admin"


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def platform(state: Path) -> Iterator[BudgetPlatform]:
    with BudgetPlatform(BudgetsConfig.model_validate(FILE), state).running() as found:
        yield found


def call(
    platform: BudgetPlatform, method: str, path: str, body: Any = None, who: str = ADMIN
) -> tuple[int, Any]:
    where = urlsplit(platform.url)
    with closing(HTTPConnection(where.hostname or "", where.port, timeout=20)) as connection:
        headers = {"authorization": f"Bearer {who}", "content-type": "application/json"}
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def limit(platform: BudgetPlatform, account: str) -> Any:
    status, found = call(platform, "GET", f"/v1/admin/budgets/{account}")
    assert status == 200, found
    return found["limit"]["gpu_us"]


def move(platform: BudgetPlatform, source: str, target: str, **amounts: int) -> tuple[int, Any]:
    body = {"source": source, "target": target, "reason": "trade fair", **amounts}
    return call(platform, "POST", "/v1/admin/budgets/transfer", body)


def test_names_with_marks_are_found(platform: BudgetPlatform) -> None:
    assert limit(platform, "hr/screening") == 60_000_000
    assert limit(platform, "hr@hour") == 80_000_000
    key = TOKENS["marketing-intern"].key
    assert limit(platform, f"marketing~{key}") == 20_000_000
    assert call(platform, "GET", "/v1/admin/budgets/hr/nobody")[0] == 404


def test_callers_see_the_accounts_that_they_are_charged_to(platform: BudgetPlatform) -> None:
    status, found = call(platform, "GET", "/v1/usage", who="hr-analyst")
    own = [each["account"] for each in found["accounts"]]
    assert (status, found["account"], own) == (200, "hr", ["hr/screening", "hr@hour"])
    assert found["owner"] == "budgets-hr@example.com"
    status, found = call(platform, "GET", "/v1/usage", who="marketing-intern")
    key = TOKENS["marketing-intern"].key
    assert [each["account"] for each in found["accounts"]] == [f"marketing~{key}"]
    other = f"/v1/usage?account=marketing~{key}"
    assert call(platform, "GET", other, who="hr-analyst")[0] == 403
    assert call(platform, "GET", other, who=ADMIN)[0] == 200


def test_a_transfer_moves_and_is_on_record(platform: BudgetPlatform, state: Path) -> None:
    status, moved = move(platform, "hr", "marketing", gpu_us=30_000_000)
    assert status == 200, moved
    assert (moved["source"]["limit"]["gpu_us"], moved["target"]["limit"]["gpu_us"]) == (
        70_000_000, 80_000_000,
    )  # fmt: skip
    assert moved["target"]["moved"]["gpu_us"] == 30_000_000
    assert (limit(platform, "hr"), limit(platform, "marketing")) == (70_000_000, 80_000_000)
    assert move(platform, "marketing", "hr", gpu_us=30_000_000)[0] == 200
    with connect(state / "evidence", state) as trail:
        events = trail.execute(
            "SELECT subject_key, reason_code, detail FROM audit"
            " WHERE event_type = 'budget.transfer' ORDER BY ts"
        ).fetchall()
    assert [(by, why) for by, why, _ in events] == [(TOKENS[ADMIN].key, "trade fair")] * 2
    assert json.loads(events[0][2])["source"] == "hr"


@pytest.mark.parametrize(
    ("source", "target", "amounts", "status", "said"),
    [
        ("hr", "marketing", {"gpu_us": 101_000_000}, 400, "neither spent nor lent out"),
        ("hr", "marketing", {"tokens": 1}, 400, "no limit of that kind"),
        ("hr", "data-science", {"gpu_us": 1}, 400, "different windows"),
        ("hr", "hr", {"gpu_us": 1}, 400, "the same account"),
        ("hr/screening", "marketing", {"gpu_us": 1}, 400, "not two departments"),
        ("hr", "nowhere", {"gpu_us": 1}, 404, ""),
    ],
)
def test_what_cannot_be_moved_is_told(
    platform: BudgetPlatform, source: str, target: str, amounts: dict[str, int], status: int,
    said: str,
) -> None:  # fmt: skip
    got, answer = move(platform, source, target, **amounts)
    assert (got, said in answer["error"]["message"]) == (status, True), answer
    assert limit(platform, "hr") == 100_000_000


def test_a_file_is_taken_up_without_a_restart(platform: BudgetPlatform, state: Path) -> None:
    _, before = call(platform, "GET", "/v1/admin/budget-file")
    assert before["digest"] == BudgetsConfig.model_validate(FILE).digest
    bigger = {"accounts": {**FILE["accounts"], "hr": {**DAY, "gpu_seconds": 200}}}
    for dry_run in (True, False):
        body = {"budgets": bigger, "reason": "new quarter", "dry_run": dry_run}
        status, answer = call(platform, "POST", "/v1/admin/budgets/apply", body)
        assert (status, answer["changed"]) == (200, not dry_run)
    assert limit(platform, "hr") == 200_000_000
    assert call(platform, "GET", "/v1/admin/budgets/hr/screening")[0] == 404
    assert call(platform, "GET", "/v1/admin/budget-file")[1]["digest"] == answer["digest"]
    wrong = {**bigger, "organisation": {"window": "month", "gpu_seconds": 5}}
    body = {"budgets": wrong, "reason": "does not add up"}
    status, answer = call(platform, "POST", "/v1/admin/budgets/apply", body)
    assert (status, "organisation" in answer["error"]["message"]) == (400, True)
    body = {"budgets": FILE, "reason": "as before"}
    assert call(platform, "POST", "/v1/admin/budgets/apply", body)[0] == 200
    with connect(state / "evidence", state) as trail:
        reasons = trail.execute(
            "SELECT reason_code FROM audit WHERE event_type = 'budget.loaded'"
            " AND subject_key IS NOT NULL ORDER BY ts"
        ).fetchall()
    assert reasons == [("new quarter",), ("as before",)]
