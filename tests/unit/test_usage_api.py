"""Budgets over HTTP: who may see and change what, and what is shown."""

from __future__ import annotations

import asyncio
import json
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from deployments.api import usage
from deployments.api.accounts import (
    account_object,
    budget_headers,
    cost_headers,
    cost_object,
    duration,
    milliseconds,
)
from deployments.api.assemble import with_field
from deployments.api.envelope import answer_headers, error_body, error_response, turn_headers
from deployments.api.usage import FRESH_S, MAX_OVERRIDE_S, USABLE_S, UsageApi
from deployments.api.usage_schema import USAGE_ANSWER
from governance.budget.config import BudgetsConfig
from governance.budget.messages import AccountState, Tight
from governance.budget.tree import Tree
from governance.errors import (
    BudgetExhausted,
    InvalidRequest,
    LedgerUnavailable,
    NoAccount,
    NotPermitted,
    ObjectNotFound,
    Shortage,
    UnsupportedField,
)
from governance.types import Amount, Operation, Principal, PrincipalKind, Reservation, Turn
from tests.doubles import principal

NOW_US = 1_800_000_000_000_000
HR = AccountState(
    "hr", "day", NOW_US - 3_600_000_000, NOW_US + 360_000_000, 60_000_000, 10_000,
    Amount(20_000_500, 4_000), Amount(9_000_000, 900), Amount(1_000_000, 100), None,
)  # fmt: skip
UNLIMITED = replace(HR, account="platform", limit_us=None, limit_tokens=None)
ROLES = {
    "budgets:read": {"platform-admin", "security-officer"},
    "budgets:manage": {"platform-admin"},
}
ADMIN = principal("admin", "platform", ("platform-admin",))
OFFICER = principal("officer", "security", ("security-officer",))
ANALYST = principal("analyst", "hr", ("analyst",))
MOVE = {"source": "hr", "target": "platform", "gpu_us": 5, "tokens": 0, "reason": "fair"}
FILE = {"accounts": {"hr": {"window": "day", "gpu_seconds": 60}}}
SET = {"account": "hr", "gpu_us": 1, "expires_in_s": 3600, "reason": "quarter end"}


@dataclass
class FakeLedger:
    """Accounts in memory; ``gate`` holds ``state`` back."""

    accounts: dict[str, AccountState]
    asked: int = 0
    lost: bool = False
    gate: asyncio.Event | None = None
    changes: list[tuple[Any, ...]] = field(default_factory=list)

    async def state(
        self, account: str | None = None, users: bool = False
    ) -> tuple[AccountState, ...]:
        self.asked += 1
        answer = tuple(
            a
            for a in self.accounts.values()
            if account == a.account or (account is None and (users or "~" not in a.account))
        )
        if account == "new":
            answer = (replace(HR, account="new"),)
        if self.gate is not None:
            await self.gate.wait()
        if self.lost:
            raise LedgerUnavailable
        return answer

    async def set_override(self, *args: Any) -> AccountState:
        account, limit_us, limit_tokens, expires_us = args[:4]
        self._known(account)
        self.changes.append(args)
        self.accounts[account] = replace(
            self.accounts[account],
            limit_us=limit_us,
            limit_tokens=limit_tokens,
            overridden_until_us=expires_us,
        )
        return self.accounts[account]

    async def clear_override(self, account: str, by: str) -> AccountState:
        self._known(account)
        self.changes.append((account, by))
        return self.accounts[account]

    async def transfer(self, *args: Any) -> tuple[AccountState, AccountState]:
        source, target = args[:2]
        self._known(source)
        self._known(target)
        if source == target:
            raise InvalidRequest("source and target are the same account")
        self.changes.append(args)
        return self.accounts[source], replace(self.accounts[target], moved=Amount(*args[2:4]))

    async def apply(self, *args: Any) -> str:
        self.changes.append(args)
        return BudgetsConfig.model_validate(args[0]).digest

    def _known(self, account: str) -> None:
        if account not in self.accounts:
            raise ObjectNotFound


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def authorize(who: Principal, permission: str) -> None:
    if who.roles.isdisjoint(ROLES[permission]):
        raise NotPermitted


@pytest.fixture
def ledger() -> FakeLedger:
    return FakeLedger({"platform": UNLIMITED, "hr": HR})


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def api(ledger: FakeLedger, clock: Clock) -> UsageApi:
    return UsageApi(ledger, authorize, lambda: NOW_US, clock)


TREE = Tree(
    BudgetsConfig.model_validate(
        {
            "accounts": {
                "hr": {
                    "window": "day",
                    "gpu_seconds": 60,
                    "also": [{"window": "hour", "gpu_seconds": 10}],
                    "per_user": {"window": "day", "gpu_seconds": 20},
                    "parts": {
                        "screening": {
                            "match": {"roles": ["screener"]}, "window": "day", "gpu_seconds": 30,
                        }
                    },
                },
                "platform": {"window": "day", "gpu_seconds": 60},
            }
        }
    )
)  # fmt: skip


@pytest.fixture
def tree_api(ledger: FakeLedger, clock: Clock) -> UsageApi:
    """With the accounts of a file: parts, further windows, users."""
    names = ("hr@hour", "hr/screening", f"hr~{ANALYST.key}", "hr~somebody-else")
    ledger.accounts |= {name: replace(HR, account=name, parent="hr") for name in names}
    return UsageApi(ledger, authorize, lambda: NOW_US, clock, lambda: TREE)


# What must be refused


async def test_another_departments_account_needs_a_permission(api: UsageApi) -> None:
    for department in ("platform", "nowhere"):
        with pytest.raises(NotPermitted):
            await api.usage(ANALYST, {"department": department})
    assert (await api.usage(OFFICER, {"department": "hr"}))["account"] == "hr"
    assert (await api.usage(ANALYST, {"department": "hr"}))["account"] == "hr"
    assert (await api.usage(ANALYST, {}))["account"] == "hr"


@pytest.mark.parametrize(
    ("handler", "body", "allowed"),
    [
        ("list_accounts", {}, [ADMIN, OFFICER]),
        ("get_account", {"account": "hr"}, [ADMIN, OFFICER]),
        ("set_override", SET, [ADMIN]),
        ("clear_override", {"account": "hr"}, [ADMIN]),
        ("transfer", MOVE, [ADMIN]),
        ("apply", {"budgets": FILE, "reason": "less"}, [ADMIN]),
        ("get_file", {}, [ADMIN, OFFICER]),
    ],
)
async def test_every_handler_asks_for_its_permission_first(
    tree_api: UsageApi,
    ledger: FakeLedger,
    handler: str,
    body: dict[str, Any],
    allowed: list[Principal],
) -> None:
    call = getattr(tree_api, handler)
    for who in (ADMIN, OFFICER, ANALYST):
        if who in allowed:
            await call(who, body)
            continue
        ledger.changes.clear()
        ledger.asked = 0
        for attempt in (body, {"nonsense": 1}):
            with pytest.raises(NotPermitted):
                await call(who, attempt)
        assert (ledger.asked, ledger.changes) == (0, [])


async def test_a_service_key_changes_no_budget(api: UsageApi, ledger: FakeLedger) -> None:
    key = replace(ADMIN, kind=PrincipalKind.KEY)
    with pytest.raises(NotPermitted, match="service key"):
        await api.set_override(key, SET)
    with pytest.raises(NotPermitted, match="service key"):
        await api.clear_override(key, {"account": "hr"})
    with pytest.raises(NotPermitted, match="service key"):
        await api.transfer(key, MOVE)
    with pytest.raises(NotPermitted, match="service key"):
        await api.apply(key, {"budgets": FILE, "reason": "less", "dry_run": True})
    assert ledger.changes == []
    assert (await api.get_account(key, {"account": "hr"}))["account"] == "hr"
    await api.set_override(replace(ADMIN, kind=PrincipalKind.SERVICE), SET)


SET_ATTACKS: list[tuple[dict[str, Any], str]] = [
    ({"expires_in_s": None}, "expires_in_s"),
    ({"expires_in_s": MAX_OVERRIDE_S + 1}, "expires_in_s"),
    ({"expires_in_s": 0}, "expires_in_s"),
    ({"expires_in_s": "3600"}, "expires_in_s"),
    ({"expires_in_s": 3600.5}, "expires_in_s"),
    ({"gpu_us": -1}, "gpu_us"),
    ({"gpu_us": 10**30}, "gpu_us"),
    ({"gpu_us": True}, "gpu_us"),
    ({"gpu_us": 1.5}, "gpu_us"),
    ({"gpu_us": None}, "gpu_us"),
    ({"tokens": "1"}, "tokens"),
    ({"reason": ""}, "reason"),
    ({"reason": "x\x1b[31m"}, "reason"),
    ({"reason": "x" * 257}, "reason"),
    ({"account": "hr\n"}, "account"),
    ({"account": "../hr"}, "account"),
    ({"by": "someone else"}, "by"),
]


@pytest.mark.parametrize(("change", "param"), SET_ATTACKS)
async def test_wrong_overrides_are_refused(
    api: UsageApi, ledger: FakeLedger, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await api.set_override(ADMIN, {**SET, **change})
    assert refused.value.param == param
    assert ledger.changes == []


@pytest.mark.parametrize("missing", ["expires_in_s", "reason", "account"])
async def test_an_override_has_an_end_and_a_reason(
    api: UsageApi, ledger: FakeLedger, missing: str
) -> None:
    body = {name: value for name, value in SET.items() if name != missing}
    with pytest.raises(InvalidRequest) as refused:
        await api.set_override(ADMIN, body)
    assert refused.value.param == missing
    assert ledger.changes == []


async def test_unknown_accounts_and_fields(api: UsageApi) -> None:
    with pytest.raises(ObjectNotFound):
        await api.get_account(ADMIN, {"account": "nowhere"})
    with pytest.raises(ObjectNotFound):
        await api.set_override(ADMIN, {**SET, "account": "nowhere"})
    with pytest.raises(NoAccount):
        await api.usage(OFFICER, {})
    with pytest.raises(UnsupportedField):
        await api.usage(ANALYST, {"part": "hr"})
    for wrong in ("*", "", "a b", "hr'--", "x" * 65):
        with pytest.raises(InvalidRequest):
            await api.usage(ADMIN, {"department": wrong})


# What is shown


SHOWN = {
    "object": "usage",
    "account": "hr",
    "parent": None,
    "cohort": None,
    "owner": None,
    "mode": "hard",
    "class": "standard",
    "weight_milli": 1000,
    "window": "day",
    "start": "2027-01-15T07:00:00Z",
    "start_at": NOW_US // 1_000_000 - 3600,
    "reset": "2027-01-15T08:06:00Z",
    "reset_at": NOW_US // 1_000_000 + 360,
    "limit": {"gpu_us": 60_000_000, "tokens": 10_000},
    "spent": {"gpu_us": 20_000_500, "tokens": 4_000},
    "leased": {"gpu_us": 9_000_000, "tokens": 900},
    "open": {"gpu_us": 1_000_000, "tokens": 100},
    "remaining": {"gpu_us": 38_999_500, "tokens": 5_900},
    "available": {"gpu_us": 38_999_500, "tokens": 5_900},
    "moved": {"gpu_us": 0, "tokens": 0},
    "overdraft": {"gpu_us": 0, "tokens": 0},
    "borrow": {"gpu_us": 0, "tokens": 0},
    "borrowed": {"gpu_us": 0, "tokens": 0},
    "lend": {"gpu_us": 0, "tokens": 0},
    "lent": {"gpu_us": 0, "tokens": 0},
    "total": {"gpu_us": 0, "tokens": 0},
    "limited_by": {"gpu_us": None, "tokens": None},
    "exhausted": False,
    "overridden_until": None,
    "age_ms": 0,
}


async def test_an_account_as_json(api: UsageApi) -> None:
    shown = await api.usage(ANALYST, {})
    assert shown == {**SHOWN, "accounts": []}
    assert list(shown) == list(
        USAGE_ANSWER[200]["content"]["application/json"]["schema"]["properties"]
    )
    json.dumps(shown)
    assert account_object(UNLIMITED, 5)["remaining"] == {"gpu_us": None, "tokens": None}
    overspent = replace(HR, spent=Amount(61_000_000, 10_001))
    assert account_object(overspent, 5)["remaining"] == {"gpu_us": 0, "tokens": 0}


async def test_what_a_path_and_a_cohort_leave(api: UsageApi) -> None:
    tight = Tight("hr", "day", NOW_US + 1, 60_000_000, 20_000_500, "budgets-hr@example.com")
    lender = replace(
        HR, cohort="business", lend=Amount(30_000_000, 0), reach_us=9_999_500, tight_us=tight,
        over=True,
    )  # fmt: skip
    shown = account_object(lender, 0)
    assert shown["remaining"]["gpu_us"] == 38_999_500
    assert shown["available"] == {"gpu_us": 9_999_500, "tokens": 5_900}
    assert shown["lent"] == {"gpu_us": 29_000_000, "tokens": 0}
    assert shown["limited_by"]["gpu_us"] == {
        "account": "hr",
        "window": "day",
        "reset_at": NOW_US // 1_000_000 + 1,
        "limit": 60_000_000,
        "spent": 20_000_500,
        "owner": "budgets-hr@example.com",
    }
    assert shown["exhausted"]
    above = replace(lender, account="hr/screening", parent="hr", cohort=None)
    assert account_object(above, 0)["lent"]["gpu_us"] == 0, "what the department lacks is not lent"


# Parts, users and further windows


async def test_a_caller_sees_what_its_requests_are_charged_to(tree_api: UsageApi) -> None:
    shown = await tree_api.usage(ANALYST, {})
    own = [each["account"] for each in shown["accounts"]]
    assert (shown["account"], own) == ("hr", [f"hr~{ANALYST.key}", "hr@hour"])
    for account in (*own, "hr"):
        assert (await tree_api.usage(ANALYST, {"account": account}))["account"] == account
    screener = principal("screener", "hr", ("screener",))
    shown = await tree_api.usage(screener, {})
    assert [each["account"] for each in shown["accounts"]] == ["hr/screening", "hr@hour"]


@pytest.mark.parametrize("account", ["hr~somebody-else", "hr/screening", "platform", "nowhere"])
async def test_a_caller_sees_nobody_elses(tree_api: UsageApi, account: str) -> None:
    with pytest.raises(NotPermitted):
        await tree_api.usage(ANALYST, {"account": account})
    with pytest.raises(InvalidRequest):
        await tree_api.usage(ANALYST, {"account": account, "department": "hr"})


async def test_an_administrator_sees_all(tree_api: UsageApi) -> None:
    listed = await tree_api.list_accounts(OFFICER, {})
    assert not [each for each in listed["data"] if "~" in each["account"]]
    listed = await tree_api.list_accounts(OFFICER, {"users": "true"})
    assert {"hr~somebody-else", "hr@hour", "hr/screening"} <= {a["account"] for a in listed["data"]}
    for account in ("hr~somebody-else", "hr/screening", "hr@hour"):
        assert (await tree_api.get_account(OFFICER, {"account": account}))["account"] == account
    shown = await tree_api.usage(OFFICER, {"department": "hr"})
    assert [each["account"] for each in shown["accounts"]] == ["hr@hour", "hr/screening"]
    with pytest.raises(InvalidRequest):
        await tree_api.list_accounts(OFFICER, {"users": "yes"})


async def test_a_department_whose_file_is_older_is_shown_without_it(
    tree_api: UsageApi, ledger: FakeLedger
) -> None:
    del ledger.accounts["hr@hour"]
    shown = await tree_api.usage(ANALYST, {})
    assert [each["account"] for each in shown["accounts"]] == [f"hr~{ANALYST.key}"]


# Transfers and files


async def test_a_transfer(api: UsageApi, ledger: FakeLedger) -> None:
    moved = await api.transfer(ADMIN, MOVE)
    assert ledger.changes == [("hr", "platform", 5, 0, "fair", ADMIN.key)]
    assert (moved["source"]["account"], moved["target"]["moved"]["gpu_us"]) == ("hr", 5)


@pytest.mark.parametrize(
    "change",
    [
        {"gpu_us": 0}, {"gpu_us": -1}, {"gpu_us": "5"}, {"gpu_us": 10**16}, {"tokens": 1.5},
        {"reason": ""}, {"source": "hr/"}, {"source": "a//b"}, {"target": "hr~"}, {"by": "x"},
        {"target": "hr"},
    ],
)  # fmt: skip
async def test_wrong_transfers_move_nothing(
    api: UsageApi, ledger: FakeLedger, change: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest):
        await api.transfer(ADMIN, {**MOVE, **change})
    assert ledger.changes == []


async def test_a_file_is_checked_and_taken_up(tree_api: UsageApi, ledger: FakeLedger) -> None:
    shown = await tree_api.get_file(OFFICER, {})
    assert BudgetsConfig.model_validate(shown["budgets"]).digest == shown["digest"]
    dry = await tree_api.apply(ADMIN, {"budgets": FILE, "reason": "less", "dry_run": True})
    assert (dry["changed"], ledger.changes) == (False, [])
    done = await tree_api.apply(ADMIN, {"budgets": FILE, "reason": "less"})
    assert done["changed"]
    assert done["digest"] == dry["digest"] != shown["digest"]
    ((data, reason, by),) = ledger.changes
    assert (BudgetsConfig.model_validate(data).digest, reason, by) == (
        done["digest"], "less", ADMIN.key,
    )  # fmt: skip
    again = {"budgets": shown["budgets"], "reason": "as it is"}
    assert not (await tree_api.apply(ADMIN, again))["changed"]
    asked = ledger.asked
    await tree_api.list_accounts(OFFICER, {})
    assert ledger.asked == asked + 1, "figures from before the file are not shown"


@pytest.mark.parametrize(
    ("budgets", "said"),
    [
        ({"accounts": {"hr": {"window": "fortnight", "gpu_seconds": 1}}}, "accounts.hr.window"),
        ({}, "no accounts"),
        (
            {
                "organisation": {"window": "day", "gpu_seconds": 50},
                "accounts": {"hr": {"window": "day", "gpu_seconds": 60}},
            },
            "60 gpu_seconds",
        ),
    ],
)
async def test_a_file_that_does_not_add_up_is_refused_with_the_reason(
    api: UsageApi, ledger: FakeLedger, budgets: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidRequest, match=said):
        await api.apply(ADMIN, {"budgets": budgets, "reason": "more"})
    assert ledger.changes == []


async def test_an_account_that_nobody_used_yet(api: UsageApi) -> None:
    newcomer = principal("newcomer", "new", ("analyst",))
    assert (await api.usage(newcomer, {}))["account"] == "new"


async def test_the_list_is_sorted(api: UsageApi) -> None:
    listed = await api.list_accounts(OFFICER, {})
    assert [each["account"] for each in listed["data"]] == ["hr", "platform"]


async def test_setting_and_clearing(api: UsageApi, ledger: FakeLedger) -> None:
    await api.usage(ANALYST, {})
    answer = await api.set_override(ADMIN, {**SET, "tokens": 7})
    until_us = NOW_US + 3_600_000_000
    assert ledger.changes == [("hr", 1, 7, until_us, "quarter end", ADMIN.key)]
    assert answer["overridden_until"] == until_us // 1_000_000
    assert (await api.usage(ANALYST, {}))["limit"] == {"gpu_us": 1, "tokens": 7}
    await api.clear_override(ADMIN, {"account": "hr"})
    assert ledger.changes[-1] == ("hr", ADMIN.key)
    body = {name: value for name, value in SET.items() if name != "gpu_us"}
    with pytest.raises(InvalidRequest, match="gpu_us"):
        await api.set_override(ADMIN, body)


async def test_routes_reach_every_handler(api: UsageApi) -> None:
    routes = {(method, path): takes for method, path, _, takes in api.routes()}
    assert routes == {
        ("GET", "/v1/admin/budgets"): False,
        ("POST", "/v1/admin/budgets/transfer"): True,
        ("POST", "/v1/admin/budgets/apply"): True,
        ("GET", "/v1/admin/budget-file"): False,
        ("GET", "/v1/admin/budgets/{account:path}"): False,
        ("PUT", "/v1/admin/budgets/{account:path}"): True,
        ("DELETE", "/v1/admin/budgets/{account:path}"): False,
    }


# The ledger is asked seldom, and may be away


async def test_many_who_ask_are_one_call(api: UsageApi, ledger: FakeLedger, clock: Clock) -> None:
    ledger.gate = asyncio.Event()
    asking = [asyncio.create_task(api.usage(ANALYST, {})) for _ in range(50)]
    await asyncio.sleep(0)
    asking[0].cancel()
    await asyncio.sleep(0)
    ledger.gate.set()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert sum(isinstance(answer, dict) for answer in answers) == 49
    assert ledger.asked == 1
    clock.now_s += FRESH_S / 2
    assert (await api.usage(ANALYST, {}))["age_ms"] == 500
    assert ledger.asked == 1
    clock.now_s += FRESH_S
    assert (await api.usage(ANALYST, {}))["age_ms"] == 0
    assert ledger.asked == 2


async def test_a_lost_ledger_shows_older_figures_and_then_none(
    api: UsageApi, ledger: FakeLedger, clock: Clock
) -> None:
    ledger.lost = True
    with pytest.raises(LedgerUnavailable):
        await api.usage(ANALYST, {})
    ledger.lost = False
    await api.usage(ANALYST, {})
    ledger.lost = True
    clock.now_s += USABLE_S - 1
    assert (await api.usage(ANALYST, {}))["age_ms"] == (USABLE_S - 1) * 1000
    clock.now_s += 2
    with pytest.raises(LedgerUnavailable):
        await api.usage(ANALYST, {})


async def test_an_answer_from_before_a_change_does_not_hide_it(
    api: UsageApi, ledger: FakeLedger
) -> None:
    ledger.gate = asyncio.Event()
    asking = asyncio.create_task(api.usage(ANALYST, {}))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await api.set_override(ADMIN, SET)
    ledger.gate.set()
    assert (await asking)["limit"]["gpu_us"] == 1


async def test_one_that_is_in_no_list_is_asked_for_once_a_second(
    api: UsageApi, ledger: FakeLedger, clock: Clock
) -> None:
    newcomer = principal("newcomer", "new", ("analyst",))
    for _ in range(5):
        answers = [api.usage(newcomer, {}) for _ in range(50)]
        assert {answer["account"] for answer in await asyncio.gather(*answers)} == {"new"}
        for _ in range(10):
            with pytest.raises(ObjectNotFound):
                await api.usage(OFFICER, {"department": "nowhere"})
    assert ledger.asked == 3
    clock.now_s += FRESH_S / 2
    assert (await api.usage(newcomer, {}))["age_ms"] == 500
    clock.now_s += FRESH_S
    assert (await api.usage(newcomer, {}))["age_ms"] == 0
    assert ledger.asked == 5
    ledger.lost = True
    clock.now_s += USABLE_S - 1
    assert (await api.usage(newcomer, {}))["age_ms"] == (USABLE_S - 1) * 1000
    clock.now_s += 2
    with pytest.raises(LedgerUnavailable):
        await api.usage(newcomer, {})


async def test_names_that_somebody_made_up_take_no_more_memory(
    api: UsageApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "MAX_OTHERS", 10)
    for number in range(35):
        with pytest.raises(ObjectNotFound):
            await api.usage(OFFICER, {"department": f"nobody-{number}"})
    assert len(api._others) <= 10


# Headers and the body


def turn(account: AccountState | None = HR) -> Turn:
    return Turn("req_1", "dec_1", NOW_US, Operation.CHAT, account=account)


def test_headers_of_an_account() -> None:
    assert budget_headers(HR, NOW_US) == {
        "x-gatehouse-budget-account": "hr",
        "x-gatehouse-budget-reset": "2027-01-15T08:06:00Z",
        "x-gatehouse-budget-remaining-gpu-ms": "38999",
        "x-ratelimit-limit-tokens": "10000",
        "x-ratelimit-remaining-tokens": "5900",
        "x-ratelimit-reset-tokens": "6m0s",
    }
    assert set(budget_headers(UNLIMITED, NOW_US)) == {
        "x-gatehouse-budget-account",
        "x-gatehouse-budget-reset",
    }
    assert (
        budget_headers(replace(HR, spent=Amount(10**12, 10**9)), NOW_US)[
            "x-ratelimit-remaining-tokens"
        ]
        == "0"
    )


@pytest.mark.parametrize(
    ("span_us", "text"),
    [
        (-5, "0s"), (0, "0s"), (1, "1s"), (59_000_000, "59s"), (59_000_001, "1m0s"),
        (3_600_000_000, "1h0m0s"), (31 * 86_400_000_000, "744h0m0s"),
    ],
)  # fmt: skip
def test_durations_are_written_as_openai_does(span_us: int, text: str) -> None:
    assert duration(span_us) == text


def test_every_answer_has_them_and_refusals_too() -> None:
    assert turn_headers(turn()).items() >= budget_headers(HR).items()
    assert "x-gatehouse-budget-account" not in turn_headers(turn(None))
    refused = error_response(BudgetExhausted("", None, 360), "req_1", "dec_1", HR)
    assert refused.headers["x-gatehouse-budget-account"] == "hr"
    assert refused.headers["retry-after"] == "360"
    assert "x-gatehouse-budget-account" not in error_response(BudgetExhausted(), "req_1").headers


def test_a_refusal_says_what_still_fits() -> None:
    left = Shortage("hr", NOW_US + 1, 1_999_999, None)
    error = pickle.loads(pickle.dumps(BudgetExhausted("Too much.", None, 360, (), left)))
    assert (error.shortage, error.retry_after_s, str(error)) == (left, 360, "Too much.")
    body = json.loads(error_body(error, "req_1"))["error"]
    assert body["message"] == "Too much."
    assert body["account"] == "hr"
    assert body["reset_at"] == NOW_US // 1_000_000 + 1, "not before it is fresh"
    assert body["still_fits"] == {"tokens": None, "gpu_ms": 1999}
    assert "account" not in json.loads(error_body(BudgetExhausted(), "req_1"))["error"]


def test_what_an_answer_took() -> None:
    done = turn()
    assert cost_headers(done) == {}
    assert cost_object(done) == {"request_id": "req_1", "gpu_us": None, "charged_us": None}
    done.gpu_us, done.charged = 1_234_005, Amount(2_468_010, 12)
    assert "x-gatehouse-charged-gpu-ms" not in cost_headers(done), "no account was charged"
    done.reservation = Reservation("r", "hr")
    assert cost_headers(done) == {
        "x-gatehouse-gpu-ms": "1234.005",
        "x-gatehouse-charged-gpu-ms": "2468.010",
    }
    assert answer_headers(done).items() > cost_headers(done).items()
    assert cost_object(done) == {
        "request_id": "req_1", "gpu_us": 1_234_005, "charged_us": 2_468_010,
    }  # fmt: skip
    assert milliseconds(7) == "0.007"


def test_a_field_is_added_without_parsing() -> None:
    event = b'data: {"usage":{"a":1}}\n\n'
    added = with_field(event, b"}\n\n", "gatehouse", {"gpu_us": 5})
    assert added == b'data: {"usage":{"a":1},"gatehouse":{"gpu_us":5}}\n\n'
    assert with_field(b"", b"}\n\n", "gatehouse", {}) == b""


def test_headers_are_cheap() -> None:
    def best_us(work: Callable[[], object]) -> float:
        rounds = []
        for _ in range(20):
            started = time.perf_counter()
            for _ in range(200):
                work()
            rounds.append((time.perf_counter() - started) / 200 * 1e6)
        return min(rounds)

    took_us = best_us(lambda: budget_headers(HR))
    print(f"budget headers: {took_us:.1f} us")
    assert took_us < 50
