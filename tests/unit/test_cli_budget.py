"""``gatehouse budget`` against a small gateway over real HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import Result

from deployments.cli.budget import _bar, _seconds
from deployments.cli.errors import Exit
from tests.unit.test_cli_commands import Stub, error, run, stub

__all__ = ["stub"]

HR: dict[str, Any] = {
    "object": "usage",
    "account": "hr",
    "window": "day",
    "reset_at": 1_800_000_000,
    "limit": {"gpu_us": 3_600_000_000, "tokens": None},
    "spent": {"gpu_us": 1_800_500_000, "tokens": 12_345},
    "leased": {"gpu_us": 2_000_000, "tokens": 0},
    "open": {"gpu_us": 1_500_000, "tokens": 300},
    "remaining": {"gpu_us": 1_798_000_000, "tokens": None},
    "overridden_until": None,
    "age_ms": 3,
}
OVERRIDDEN = {**HR, "overridden_until": 1_799_990_000}


def test_everybody_sees_what_they_may(stub: Stub) -> None:
    stub.answers["GET", "/v1/admin/budgets"] = 200, {"object": "list", "data": [HR, OVERRIDDEN]}
    lines = run(stub, "budget", "show").output.splitlines()
    assert lines[0].split("\t") == [
        "hr", "day", "30m00s / 1h00m", "█████░░░░░", "12,345 / no limit", "",
        "1.500 s, 300", "29m58s, no limit", "2027-01-15 08:00Z", "",
    ]  # fmt: skip
    assert lines[1].endswith("override until 2027-01-15 05:13Z")
    stub.answers["GET", "/v1/admin/budgets"] = 403, error("not_permitted")
    stub.answers["GET", "/v1/usage"] = 200, HR
    assert json.loads(run(stub, "budget", "show", "--json").output) == HR
    assert [path for _, path, _, _ in stub.seen][-2:] == ["/v1/admin/budgets", "/v1/usage"]


def test_one_department(stub: Stub) -> None:
    stub.answers["GET", "/v1/usage?department=hr"] = 200, HR
    assert run(stub, "budget", "show", "--department", "hr").output.startswith("hr\tday")
    result = run(stub, "budget", "show", "--department", "a&b=c/d")
    assert stub.seen[-1][1] == "/v1/usage?department=a%26b%3Dc%2Fd"
    assert result.exit_code == Exit.NOT_FOUND


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


def test_clearing(stub: Stub) -> None:
    stub.answers["DELETE", "/v1/admin/budgets/hr"] = 200, HR
    result = run(stub, "budget", "clear", "hr")
    assert result.output == "hr: 1h00m GPU, no limit tokens a day, as in the file\n"
    assert stub.seen[-1][:2] == ("DELETE", "/v1/admin/budgets/hr")
    stub.answers["DELETE", "/v1/admin/budgets/hr"] = 403, error("not_permitted")
    assert run(stub, "budget", "clear", "hr").exit_code == Exit.DENIED


@pytest.mark.parametrize(
    ("spent", "limit", "bar"),
    [
        (0, 100, "░" * 10), (1, 100, "█" + "░" * 9), (99, 100, "█" * 9 + "░"), (100, 100, "█" * 10),
        (500, 100, "█" * 10), (0, 0, "█" * 10), (5, None, ""),
    ],
)  # fmt: skip
def test_a_bar_is_full_only_when_all_is_spent(spent: int, limit: int | None, bar: str) -> None:
    assert _bar(spent, limit) == bar


@pytest.mark.parametrize(
    ("amount_us", "text"),
    [
        (0, "0.000 s"), (1_999, "0.001 s"), (59_999_999, "59.999 s"), (60_000_000, "1m00s"),
        (3_661_000_000, "1h01m"), (None, "no limit"),
    ],
)  # fmt: skip
def test_device_time_for_people(amount_us: int | None, text: str) -> None:
    assert _seconds(amount_us) == text
