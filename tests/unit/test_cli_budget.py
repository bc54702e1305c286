"""``gatehouse budget`` against a small gateway over real HTTP."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from deployments.cli.budget_output import bar, depth, ordered, seconds, short
from deployments.cli.errors import Exit
from governance.budget.config import BudgetsConfig
from tests.unit.test_cli_commands import Stub, error, run, stub

__all__ = ["stub"]

NOW_S = 1_799_990_000
HR: dict[str, Any] = {
    "object": "usage",
    "account": "hr",
    "mode": "soft",
    "class": "critical",
    "owner": "budgets-hr@example.com",
    "window": "day",
    "start_at": NOW_S - 3600,
    "reset_at": 1_800_000_000,
    "limit": {"gpu_us": 3_600_000_000, "tokens": None},
    "spent": {"gpu_us": 1_800_500_000, "tokens": 12_345},
    "leased": {"gpu_us": 2_000_000, "tokens": 0},
    "open": {"gpu_us": 1_500_000, "tokens": 300},
    "remaining": {"gpu_us": 1_798_000_000, "tokens": None},
    "available": {"gpu_us": 1_700_000_000, "tokens": None},
    "borrowed": {"gpu_us": 0, "tokens": 500},
    "lent": {"gpu_us": 98_000_000, "tokens": 0},
    "overridden_until": None,
    "age_ms": 3,
}
OVERRIDDEN = {**HR, "overridden_until": NOW_S}


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: NOW_S * 10**9)


def test_everybody_sees_what_they_may(stub: Stub) -> None:
    stub.answers["GET", "/v1/admin/budgets"] = 200, {"object": "list", "data": [HR, OVERRIDDEN]}
    lines = run(stub, "budget", "show").output.splitlines()
    assert lines[0].split("\t") == [
        "hr", "day", "30m00s / 1h00m", "█████░░░░░", "12,345 / no limit", "", "1.500 s, 300",
        "28m20s, no limit", "+500 tokens, -1m38s", "30m00s, 12,345", "2027-01-15 06:09Z",
        "2027-01-15 08:00Z", "soft, critical", "budgets-hr@example.com", "",
    ]  # fmt: skip
    assert lines[1].endswith("override until 2027-01-15 05:13Z")
    stub.answers["GET", "/v1/admin/budgets"] = 403, error("not_permitted")
    stub.answers["GET", "/v1/usage"] = 200, HR
    assert json.loads(run(stub, "budget", "show", "--json").output) == HR
    assert [path for _, path, _, _ in stub.seen][-2:] == ["/v1/admin/budgets", "/v1/usage"]


def test_one_department_or_account(stub: Stub) -> None:
    below = {**HR, "account": "hr/screening", "parent": "hr"}
    stub.answers["GET", "/v1/usage?department=hr"] = 200, {**HR, "accounts": [below]}
    lines = run(stub, "budget", "show", "--department", "hr").output.splitlines()
    assert [line.split("\t")[:2] for line in lines] == [["hr", "day"], ["hr/screening", "day"]]
    result = run(stub, "budget", "show", "--department", "a&b=c/d")
    assert stub.seen[-1][1] == "/v1/usage?department=a%26b%3Dc%2Fd"
    assert result.exit_code == Exit.NOT_FOUND
    run(stub, "budget", "show", "--account", "hr~ab")
    assert stub.seen[-1][1] == "/v1/usage?account=hr~ab"
    run(stub, "budget", "show", "--users")
    assert stub.seen[-1][1] == "/v1/admin/budgets?users=true"
    assert run(stub, "budget", "show", "--users", "--department", "hr").exit_code == Exit.USAGE


def test_an_account_that_is_used_up(stub: Stub) -> None:
    gone = {**HR, "available": {"gpu_us": 0, "tokens": None}}
    stub.answers["GET", "/v1/admin/budgets"] = 200, {"object": "list", "data": [gone]}
    assert "\tnow\t" in run(stub, "budget", "show").output
    slow = {**HR, "spent": {"gpu_us": 1_000_000, "tokens": 0}}
    stub.answers["GET", "/v1/admin/budgets"] = 200, {"object": "list", "data": [slow]}
    assert "1.000 s, 0\t\t2027" in run(stub, "budget", "show").output, "the window ends first"


def test_accounts_stand_below_their_departments() -> None:
    names = ["hr/a~u", "hr-b", "hr~u", "hr@hour", "hr/a", "hr", "a/x", "a"]
    found = [each["account"] for each in ordered({"account": name} for name in names)]
    assert found == ["a", "a/x", "hr", "hr@hour", "hr~u", "hr/a", "hr/a~u", "hr-b"]
    assert [depth(name) for name in found] == [0, 1, 0, 1, 1, 1, 2, 0]


def test_pseudonyms_are_cut_and_nothing_else() -> None:
    key = "0123456789ab" + "c" * 52
    assert short(f"hr/a~{key}") == "hr/a~0123456789ab"
    assert short(f"{key}: GPU time") == "0123456789ab: GPU time"
    for whole in ("hr~" + "a" * 63, "a" * 65, "deadbeef", "hr\x1b[31m"):
        assert short(whole) == whole.replace("\x1b", "\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (401, "invalid_credential", Exit.DENIED),
        (403, "no_budget_account", Exit.DENIED),
        (503, "ledger_unavailable", Exit.UNAVAILABLE),
    ],
)
def test_failures(stub: Stub, status: int, code: str, expected: Exit) -> None:
    stub.answers["GET", "/v1/admin/budgets"] = status, error(code)
    stub.answers["GET", "/v1/usage"] = status, error(code)
    result = run(stub, "budget", "show")
    assert (result.exit_code, code in result.output) == (expected, True)


def set_hr(stub: Stub, *words: str) -> Result:
    return run(stub, "budget", "set", "hr", *words)


def test_setting_sends_integers(stub: Stub) -> None:
    stub.answers["PUT", "/v1/admin/budgets/hr"] = 200, OVERRIDDEN
    words = ("--gpu-seconds", "1.5", "--tokens", "0", "--expires", "4h", "--reason", "quarter end")
    result = set_hr(stub, *words)
    assert result.exit_code == 0, result.output
    assert result.output == "hr: 1h00m GPU, no limit tokens a day, until 2027-01-15 05:13Z\n"
    body = {"gpu_us": 1_500_000, "tokens": 0, "expires_in_s": 14_400, "reason": "quarter end"}
    assert stub.seen[-1] == ("PUT", "/v1/admin/budgets/hr", "Bearer secret-token", body)
    assert json.loads(set_hr(stub, *words, "--json").output) == OVERRIDDEN


@pytest.mark.parametrize(
    "words",
    [
        ("--gpu-seconds", "1", "--reason", "x"),
        ("--gpu-seconds", "1", "--expires", "4h"),
        ("--expires", "4h", "--reason", "x"),
        ("--gpu-seconds", "-1", "--expires", "4h", "--reason", "x"),
        ("--gpu-seconds", "1e9", "--expires", "4h", "--reason", "x"),
        ("--gpu-seconds", "0.0000001", "--expires", "4h", "--reason", "x"),
        ("--tokens", "-1", "--expires", "4h", "--reason", "x"),
        ("--tokens", "5", "--expires", "soon", "--reason", "x"),
    ],
)
def test_wrong_use_sends_nothing(stub: Stub, words: tuple[str, ...]) -> None:
    assert set_hr(stub, *words).exit_code == Exit.USAGE
    assert stub.seen == []


HOUR_LEFT = "1h00m GPU, no limit tokens a day, until 2027-01-15 08:00Z"


def test_a_transfer_sends_integers(stub: Stub) -> None:
    both = {"object": "transfer", "source": HR, "target": {**HR, "account": "marketing"}}
    stub.answers["POST", "/v1/admin/budgets/transfer"] = 200, both
    words = ("transfer", "hr", "marketing", "--gpu-seconds", "0.5h", "--reason", "fair")
    assert run(stub, "budget", *words).exit_code == Exit.OK
    result = run(stub, "budget", "transfer", "hr", "marketing", "--gpu-seconds", "30m",
                 "--reason", "fair")  # fmt: skip
    assert result.output == f"hr: {HOUR_LEFT}\nmarketing: {HOUR_LEFT}\n"
    body = {"source": "hr", "target": "marketing", "gpu_us": 1_800_000_000, "reason": "fair"}
    assert [seen[3] for seen in stub.seen] == [body, body]
    assert run(stub, "budget", "transfer", "hr", "marketing", "--reason", "x").exit_code == (
        Exit.USAGE
    )
    refused = error("invalid_request", "account hr has 5 gpu_us that are neither spent nor lent")
    stub.answers["POST", "/v1/admin/budgets/transfer"] = 400, refused
    result = run(stub, "budget", *words)
    assert (result.exit_code, "has 5 gpu_us" in result.output) == (Exit.FAILURE, True)


BEFORE = {"accounts": {"hr": {"window": "day", "gpu_seconds": 60}}}


@pytest.fixture
def file(stub: Stub, tmp_path: Path) -> Path:
    now = BudgetsConfig.model_validate(BEFORE)
    stub.answers["GET", "/v1/admin/budget-file"] = 200, {
        "object": "budgets", "digest": now.digest, "budgets": now.model_dump(mode="json"),
    }  # fmt: skip
    path = tmp_path / "budgets.yaml"
    path.write_text(
        "accounts: {hr: {window: day, gpu_seconds: 90}, it: {window: day, tokens: 5}}\n"
    )
    return path


def test_a_file_is_compared_and_sent(stub: Stub, file: Path) -> None:
    taken = {"object": "budgets", "digest": "ab" * 32, "changed": True}
    stub.answers["POST", "/v1/admin/budgets/apply"] = 200, taken
    result = run(stub, "budget", "apply", str(file), "--reason", "growth")
    assert result.exit_code == Exit.OK, result.output
    assert result.stdout.splitlines() == [
        "raised\taccounts.hr.gpu_seconds\t60\t90", "added\taccounts.it\t\t",
    ]  # fmt: skip
    assert "abababababab taken up" in result.stderr
    method, path, _, body = stub.seen[-1]
    assert (method, path) == ("POST", "/v1/admin/budgets/apply")
    assert (body["reason"], body["dry_run"]) == ("growth", False)
    assert set(BudgetsConfig.model_validate(body["budgets"]).accounts) == {"hr", "it"}
    result = run(stub, "budget", "apply", str(file), "--reason", "growth", "--dry-run")
    assert stub.seen[-1][3]["dry_run"]
    assert "nothing was changed" in result.stderr
    result = run(stub, "budget", "apply", str(file), "--reason", "growth", "--json")
    assert [change["kind"] for change in json.loads(result.stdout)["changes"]] == [
        "raised", "added",
    ]  # fmt: skip


def test_a_file_that_is_wrong_is_not_sent(stub: Stub, file: Path) -> None:
    file.write_text("organisation: {window: day, gpu_seconds: 50}\n"
                    "accounts: {hr: {window: day, gpu_seconds: 60}}\n")  # fmt: skip
    result = run(stub, "budget", "apply", str(file), "--reason", "x")
    assert result.exit_code == Exit.FAILURE
    assert "60 gpu_seconds" in result.output
    assert stub.seen == []


def test_clearing(stub: Stub) -> None:
    stub.answers["DELETE", "/v1/admin/budgets/hr"] = 200, HR
    result = run(stub, "budget", "clear", "hr")
    assert result.output == "hr: 1h00m GPU, no limit tokens a day, as in the file\n"
    assert stub.seen[-1][:2] == ("DELETE", "/v1/admin/budgets/hr")
    stub.answers["DELETE", "/v1/admin/budgets/hr"] = 403, error("not_permitted")
    assert run(stub, "budget", "clear", "hr").exit_code == Exit.DENIED


@pytest.mark.parametrize(
    ("spent", "limit", "full"),
    [
        (0, 100, "░" * 10), (1, 100, "█" + "░" * 9), (99, 100, "█" * 9 + "░"), (100, 100, "█" * 10),
        (500, 100, "█" * 10), (0, 0, "█" * 10), (5, None, ""),
    ],
)  # fmt: skip
def test_a_bar_is_full_only_when_all_is_spent(spent: int, limit: int | None, full: str) -> None:
    assert bar(spent, limit) == full


@pytest.mark.parametrize(
    ("amount_us", "text"),
    [
        (0, "0.000 s"), (1_999, "0.001 s"), (59_999_999, "59.999 s"), (60_000_000, "1m00s"),
        (3_661_000_000, "1h01m"), (None, "no limit"),
    ],
)  # fmt: skip
def test_device_time_for_people(amount_us: int | None, text: str) -> None:
    assert seconds(amount_us) == text
