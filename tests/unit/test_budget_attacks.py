"""Attacks on budgets from outside: names, amounts, transfers, forged accounts, other people's.

The HTTP application, the ledger, its arithmetic and the gateways' leases are the real ones; only
the way between them is a call in the same process.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.api.admin import AdminApi
from deployments.api.app import create_app
from deployments.api.completions import BodyLimits
from deployments.api.usage import UsageApi
from governance.audit.schema import EventType
from governance.budget.config import BudgetsConfig
from governance.budget.holds import LeaseHold
from governance.budget.leases import LeaseBook
from governance.budget.messages import AccountState, LeaseAsk, RenewRequest
from governance.budget.tree import Tree, parts_of
from governance.errors import (
    BudgetExhausted,
    GatehouseError,
    InvalidRequest,
    NoAccount,
    NotPermitted,
    ObjectNotFound,
)
from governance.identity.pseudonym import principal_key
from governance.types import Amount, Principal, PrincipalKind
from tests.budget_desk import Desk, paid
from tests.budget_world import World, ask, config, run
from tests.doubles import TokenTable, principal

PEPPER = bytes(range(32))
KEY_A, KEY_B = (principal_key(PEPPER, "entra", None, name) for name in ("a", "b"))
FILE: dict[str, Any] = {
    "accounts": {
        "hr": {
            "window": "day",
            "tokens": 1000,
            "gpu_seconds": 100,
            "per_user": {"window": "day", "tokens": 400},
            "also": [{"window": "hour", "tokens": 900}],
            "parts": {
                "recruiting": {"window": "day", "tokens": 500, "match": {"roles": ["recruiter"]}},
                "payroll": {"window": "day", "tokens": 300, "match": {"roles": ["payroll"]}},
            },
        },
        "mk": {"window": "day", "tokens": 1000, "gpu_seconds": 100},
        "weekly": {"window": "week", "tokens": 1000},
        "gpu-only": {"window": "day", "gpu_seconds": 100},
    }
}


def person(key: str, *roles: str, department: str = "hr") -> Principal:
    return replace(principal(key, department, roles), key=key)


TOKENS = {
    "admin": person("ad", "platform-admin", department="mk"),
    "officer": person("of", "security-officer", department="mk"),
    "a": person(KEY_A),
    "b": person(KEY_B),
    "key": replace(
        person("ke", "platform-admin", department="mk"), kind=PrincipalKind.KEY, key_id="k"
    ),
}
ROLES = {
    "budgets:read": {"platform-admin", "security-officer"},
    "budgets:manage": {"platform-admin"},
}


def authorize(who: Principal, permission: str) -> None:
    if who.roles.isdisjoint(ROLES[permission]):
        raise NotPermitted


class Near:
    """The ledger as the interface sees it, in this process."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    async def state(
        self, account: str | None = None, users: bool = False
    ) -> tuple[AccountState, ...]:
        return self.desk.ledger.state(account, users=users)

    async def set_override(self, *given: Any) -> AccountState:
        account, limit_us, limit_tokens, expires_us, reason, by = given
        done = self._do("set_override", account, limit_us, limit_tokens, expires_us, by, reason)
        return cast(AccountState, done)

    async def clear_override(self, account: str, by: str) -> AccountState:
        return cast(AccountState, self._do("clear_override", account, by, "by hand"))

    async def transfer(self, *given: Any) -> tuple[AccountState, AccountState]:
        source, target, gpu_us, tokens, reason, by = given
        done = self._do("transfer", source, target, gpu_us, tokens, by, reason)
        return cast(tuple[AccountState, AccountState], done)

    async def apply(self, budgets: dict[str, Any], reason: str, by: str) -> bool:
        return self.desk.ledger.apply(BudgetsConfig.model_validate(budgets), by, reason)

    def _do(self, method: str, *args: Any) -> Any:
        try:
            return getattr(self.desk.ledger, method)(*args)
        except NoAccount:
            raise ObjectNotFound from None
        except ValueError as error:
            raise InvalidRequest(str(error)) from None


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    found = Desk(tmp_path, BudgetsConfig.model_validate(FILE))
    yield found
    found.ledger.close()


class Client:
    """The HTTP application without a socket."""

    def __init__(self, desk: Desk) -> None:
        usage = UsageApi(Near(desk), authorize, lambda: desk.now_us, tree=lambda: desk.ledger.tree)
        gateway = SimpleNamespace(authenticator=TokenTable(TOKENS))
        control: Any = object()
        self.app = create_app(
            cast(Any, gateway),
            AdminApi(control, authorize),
            BodyLimits(1 << 16, 2.0, 1.0),
            ready=lambda: {},
            created_s=1,
            version="test",
            usage=usage,
        )

    async def __call__(
        self, method: str, path: str, body: Any = None, token: str | None = "admin"
    ) -> httpx.Response:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(
                method, path, content=None if body is None else content, headers=headers
            )

    async def transfer(self, token: str | None = "admin", **given: Any) -> httpx.Response:
        body = {"source": "hr", "target": "mk", "tokens": 10, "reason": "r", **given}
        body = {name: value for name, value in body.items() if value is not ...}
        return await self("POST", "/v1/admin/budgets/transfer", body, token)


@pytest.fixture
def client(desk: Desk) -> Client:
    return Client(desk)


def moved(desk: Desk) -> dict[str, Amount]:
    """What has been moved, where that is anything."""
    return {s.account: s.moved for s in desk.ledger.state(users=True) if s.moved != Amount()}


# -- names ------------------------------------------------------------------------------------

ODD = [
    "",
    " ",
    "hr ",
    "hr\nx",
    "hr\x00",
    "HR",
    "hr/",
    "hr//recruiting",
    "hr/../mk",
    "../hr",
    "hr/recruiting/x",
    "hr~",
    "hr~a~b",
    "hr~a/b",
    "hr@",
    "hr@day@hour",
    "hr~x@day",
    "hr@hour~x",
    "hr@minute",
    "hr%2Frecruiting",
    "hr;DROP TABLE account",
    "hr' OR '1'='1",
    "-hr",
    ".hr",
    "~x",
    "ｈｒ",
    "hr\u200b",
    "hr\u0435",
    "x" * 257,
    "hr/" + "x" * 300,
    "$(id)",
    "hr?users=true",
    "hr#x",
    "\ud7ff",
]


@pytest.mark.parametrize("name", ODD)
async def test_odd_names_are_no_accounts_and_leave_nothing(
    desk: Desk, client: Client, name: str
) -> None:
    before = desk.ledger.state(users=True)
    place = f"/v1/admin/budgets/{quote(name, safe='')}"
    override = {"tokens": 5, "expires_in_s": 3600, "reason": "r"}
    answers = [
        await client("PUT", place, override),
        await client("DELETE", place),
        await client.transfer(source=name),
        await client.transfer(target=name),
        await client("GET", f"/v1/usage?account={quote(name, safe='')}"),
    ]
    if name.strip("/ "):  # else the path is that of the list
        answers.append(await client("GET", place))
    for answer in answers:
        assert answer.status_code in (400, 404, 405), answer.text
        assert set(answer.json()) == {"error"}
    assert desk.ledger.state(users=True) == before
    assert not desk.events(EventType.BUDGET_SET)
    assert not desk.events(EventType.BUDGET_TRANSFER)


@pytest.mark.parametrize("name", [*ODD, "hr@hour", "hr\n"])
def test_no_message_charges_a_name_that_is_no_account(desk: Desk, name: str) -> None:
    if name == "HR":  # may be an account, of another department
        return
    asks = (LeaseAsk(name, Amount(), Amount(0, 5), Amount()),)
    for request in (
        RenewRequest("g1", 1, asks, (), False),
        RenewRequest("g1", 1, (), (replace(paid(), account=name),), False),
    ):
        with pytest.raises(ValueError, match=r"account"):
            desk.ledger.renew(request)
    assert {s.account for s in desk.ledger.state(users=True)} == set(desk.ledger.tree.listed())


async def test_the_account_in_the_path_is_meant(desk: Desk, client: Client) -> None:
    body = {"tokens": 5, "expires_in_s": 3600, "reason": "r", "account": "mk"}
    answer = await client("PUT", "/v1/admin/budgets/hr", body)
    assert answer.json()["account"] == "hr"
    assert desk.ledger.state("mk")[0].limit_tokens == 1000
    answer = await client("GET", "/v1/admin/budgets/hr%2Frecruiting?account=mk")
    assert answer.json()["account"] == "hr/recruiting"


async def test_nobody_acts_in_anothers_name(desk: Desk, client: Client) -> None:
    for extra in ({"by": "x"}, {"key": "x"}, {"deadline_us": 1}, {"moved": 5}):
        assert (await client.transfer(**extra)).status_code == 400
    assert (await client.transfer()).status_code == 200
    (event,) = desk.events(EventType.BUDGET_TRANSFER)
    assert event["subject_key"] == TOKENS["admin"].key


# -- amounts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "amount",
    [-1, -(2**63), 2**63, 10**15 + 1, 10**400, 1.0, 0.5, 1e300, True, "5", "0x5", None, [5], {}],
)
@pytest.mark.parametrize("quantity", ["tokens", "gpu_us"])
async def test_amounts_that_are_none(
    desk: Desk, client: Client, amount: Any, quantity: str
) -> None:
    answer = await client.transfer(**{"tokens": ..., quantity: amount})
    assert answer.status_code == 400, answer.text
    override = {quantity: amount, "expires_in_s": 3600, "reason": "r"}
    if amount is not None:
        answer = await client("PUT", "/v1/admin/budgets/hr", override)
        assert answer.status_code == 400, answer.text
    assert not moved(desk)
    assert desk.ledger.state("hr")[0].overridden_until_us is None


@pytest.mark.parametrize("amount", [-1, True, 1.0, "1", 2**63, None])
def test_the_ledger_itself_takes_no_such_amount(desk: Desk, amount: Any) -> None:
    for gpu_us, tokens in ((amount, 0), (0, amount)):
        with pytest.raises((ValueError, TypeError)):
            desk.ledger.transfer("hr", "mk", gpu_us, tokens, "by", "why")
    assert not moved(desk)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"null", b"{", b'{"a": NaN}', b"\xff", b'{"source": "hr"}', b"5"]
)
async def test_bodies_that_are_none(desk: Desk, client: Client, body: bytes) -> None:
    for method, path in (
        ("POST", "/v1/admin/budgets/transfer"),
        ("POST", "/v1/admin/budgets/apply"),
        ("PUT", "/v1/admin/budgets/hr"),
    ):
        answer = await client(method, path, body)
        assert answer.status_code == 400, answer.text
    assert not moved(desk)


# -- transfers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "status"),
    [
        ("hr", "hr", 400),
        ("hr", "weekly", 400),
        ("weekly", "hr", 400),
        ("hr", "hr/recruiting", 400),
        ("hr/recruiting", "hr", 400),
        ("hr/recruiting", "mk", 400),
        ("hr@hour", "hr", 400),
        ("hr", "hr@hour", 400),
        (f"hr~{KEY_A}", f"hr~{KEY_B}", 400),
        ("hr", f"hr~{KEY_A}", 400),
        ("hr", "gpu-only", 400),
        ("gpu-only", "hr", 400),
        ("nobody", "hr", 404),
        ("hr", "nobody", 404),
        ("hr/nobody", "hr/recruiting", 404),
        ("hr/recruiting", "hr/payroll", 200),
    ],
)
async def test_between_which_accounts(
    desk: Desk, client: Client, source: str, target: str, status: int
) -> None:
    answer = await client.transfer(source=source, target=target)
    assert answer.status_code == status, answer.text
    expected = {source: Amount(0, -10), target: Amount(0, 10)} if status == 200 else {}
    assert moved(desk) == expected


async def test_no_more_is_moved_than_is_there(desk: Desk, client: Client) -> None:
    desk.ledger.renew(RenewRequest("g1", 1, (), (paid(tokens=300),), False))
    desk.seq = 1
    desk.renew("g2", account="mk", open=0, need=0)
    desk.renew("g1", account="hr", open=200, need=0)
    assert (await client.transfer(tokens=501)).status_code == 400
    assert (await client.transfer(tokens=500)).status_code == 200
    assert (await client.transfer(tokens=1)).status_code == 400
    (hr,) = desk.ledger.state("hr")
    assert hr.limit_tokens == 500
    assert hr.spent.tokens + hr.leased.tokens <= 500


async def test_round_and_round_makes_nothing(desk: Desk, client: Client) -> None:
    for _ in range(20):
        assert (await client.transfer(tokens=1000)).status_code == 200
        assert (await client.transfer(source="mk", target="hr", tokens=2000)).status_code == 200
        assert (await client.transfer(source="mk", target="hr", tokens=1)).status_code == 400
        assert (await client.transfer(tokens=1000)).status_code == 200
    limits = {s.account: s.limit_tokens for s in desk.ledger.state()}
    assert (limits["hr"], limits["mk"]) == (1000, 1000)


def test_what_overflows_a_sum_is_refused_and_harms_nobody(tmp_path: Path) -> None:
    budgets = config(**{f"d{n}": {"gpu_seconds": 10**10, "tokens": 10**15} for n in range(3)})
    desk = Desk(tmp_path, budgets)
    desk.ledger.transfer("d1", "d0", 10**16, 10**15, "by", "why")
    for gpu_us, tokens in ((10**16, 0), (0, 10**15), (1, 0), (0, 1)):
        with pytest.raises(ValueError, match="more than an account may have"):
            desk.ledger.transfer("d2", "d0", gpu_us, tokens, "by", "why")
    desk.restart()
    assert moved(desk) == {"d1": Amount(-(10**16), -(10**15)), "d0": Amount(10**16, 10**15)}
    desk.ledger.close()


def test_a_transfer_ends_with_its_window_and_is_not_repeated(desk: Desk) -> None:
    desk.ledger.transfer("hr", "mk", 0, 400, "by", "why", key="one")
    desk.ledger.transfer("hr", "mk", 0, 400, "by", "why", key="one")
    assert moved(desk) == {"hr": Amount(0, -400), "mk": Amount(0, 400)}
    desk.restart()
    desk.ledger.transfer("hr", "mk", 0, 400, "by", "why", key="one")
    assert moved(desk) == {"hr": Amount(0, -400), "mk": Amount(0, 400)}
    desk.pass_s(86_400)
    assert not moved(desk)
    assert len(desk.ledger.transfers()) == 1


COHORT: dict[str, Any] = {
    "cohorts": {"c": {"window": "day"}},
    "accounts": {
        "lender": {"window": "day", "tokens": 100, "cohort": "c", "lend": {"tokens": 80}},
        "borrower": {"window": "day", "tokens": 100, "cohort": "c", "borrow": {"tokens": 80}},
        "third": {"window": "day", "tokens": 100, "cohort": "c"},
        "outside": {"window": "day", "tokens": 100},
    },
}


def spend(desk: Desk, account: str, tokens: int) -> int:
    """Spend as much of so much as a gateway is lent; what it was."""
    reply = desk.renew("g1", account=account, need=tokens)
    held = {lease.account: lease.hold.tokens for lease in reply.leases}.get(account, 0)
    used = min(held, tokens)
    desk.seq += 1
    said = replace(paid(desk.seq, used), account=account)
    nothing = LeaseAsk(account, Amount(), Amount(), Amount())
    desk.ledger.renew(RenewRequest("g1", desk.seq, (nothing,), (said,), False))
    return used


@pytest.mark.parametrize("target", ["third", "outside"])
def test_what_was_borrowed_of_an_account_cannot_be_moved_away(tmp_path: Path, target: str) -> None:
    desk = Desk(tmp_path, BudgetsConfig.model_validate(COHORT))
    assert spend(desk, "borrower", 1000) == 180
    with pytest.raises(ValueError, match="neither spent nor lent out"):
        desk.ledger.transfer("lender", target, 0, 21, "by", "why")
    desk.ledger.transfer("lender", target, 0, 20, "by", "why")
    every = [spend(desk, name, 1000) for name in ("lender", "third", "outside", "borrower")]
    assert 180 + sum(every) <= 400
    desk.ledger.close()


@pytest.mark.parametrize("target", ["outside", "third"])
def test_a_cohorts_own_limit_is_not_freed_by_moving_out_of_it(tmp_path: Path, target: str) -> None:
    file = json.loads(json.dumps(COHORT))
    file["cohorts"]["c"]["tokens"] = 300
    desk = Desk(tmp_path, BudgetsConfig.model_validate(file))
    if target == "outside":
        with pytest.raises(ValueError, match="has a limit"):
            desk.ledger.transfer("lender", target, 0, 100, "by", "why")
        with pytest.raises(ValueError, match="has a limit"):
            desk.ledger.transfer(target, "lender", 0, 100, "by", "why")
    else:
        desk.ledger.transfer("lender", target, 0, 100, "by", "why")
    names = ("borrower", "lender", "third", "outside")
    assert sum(spend(desk, name, 1000) for name in names) <= 400
    desk.ledger.close()


def test_moving_during_an_override_leaves_nothing_behind(tmp_path: Path) -> None:
    desk = Desk(tmp_path, config(hr={"tokens": 100}, mk={"tokens": 100}))
    until_us = desk.now_us + 3_600_000_000
    desk.ledger.set_override("hr", None, 1000, until_us, "by", "why")
    with pytest.raises(ValueError, match="by the file"):
        desk.ledger.transfer("hr", "mk", 0, 101, "by", "why")
    desk.ledger.transfer("hr", "mk", 0, 100, "by", "why")
    desk.ledger.set_override("hr", None, 50, until_us, "by", "again")
    assert spend(desk, "hr", 100) == 0, "a second override brings back what was moved"
    desk.pass_s(3601)
    (hr,) = desk.ledger.state("hr")
    assert hr.rest_tokens == 0
    assert spend(desk, "hr", 100) == 0
    desk.ledger.close()


def test_a_lower_override_gives_others_nothing_since_it_may_end_first(tmp_path: Path) -> None:
    desk = three(tmp_path, 300, cohort=False)
    hour_us = 3_600_000_000
    desk.ledger.set_override("hr", None, 0, desk.now_us + hour_us, "by", "why")
    with pytest.raises(ValueError, match="300"):
        desk.ledger.set_override("mk", None, 200, desk.now_us + 3 * hour_us, "by", "why")
    desk.pass_s(3601)
    assert everything(desk) == 300
    desk.ledger.close()


def three(tmp_path: Path, together: int, cohort: bool, **limits: int) -> Desk:
    """Three accounts that may have so much together."""
    limits = {"hr": 100, "mk": 100, "third": 100, **limits}
    member: dict[str, Any] = {"borrow": {"tokens": 100}, "cohort": "c"} if cohort else {}
    window = {"window": "day", "tokens": together}
    file: dict[str, Any] = {
        "organisation": window,
        "cohorts": {"c": window} if cohort else {},
        "accounts": {n: {"window": "day", "tokens": k, **member} for n, k in limits.items()},
    }
    return Desk(tmp_path, BudgetsConfig.model_validate(file))


def everything(desk: Desk) -> int:
    return sum(spend(desk, name, 10_000) for name in ("third", "mk", "hr"))


@pytest.mark.parametrize("cohort", [False, True])
@pytest.mark.parametrize("by", ["override", "apply", "expiry"])
def test_what_was_moved_away_cannot_be_given_out_again(
    tmp_path: Path, by: str, cohort: bool
) -> None:
    together = 1300 if by == "expiry" else 300
    desk = three(tmp_path, together, cohort)
    hour_us = desk.now_us + 3_600_000_000
    steps: list[tuple[str, Any]] = [("transfer", ("hr", "third", 0, 100, "by", "why"))]
    if by == "override":
        steps.append(("set_override", ("hr", None, 0, hour_us, "by", "why")))
        steps.append(("set_override", ("mk", None, 200, hour_us, "by", "why")))
    elif by == "apply":
        (tmp_path / "other").mkdir()
        other = three(tmp_path / "other", together, cohort, hr=0, mk=200)
        steps.append(("apply", (other.budgets, "by", "why")))
        other.ledger.close()
    else:
        steps = [
            ("set_override", ("hr", None, 1100, hour_us, "by", "why")),
            ("transfer", ("hr", "third", 0, 1100, "by", "why")),
            ("pass", ()),
            ("set_override", ("mk", None, 1100, hour_us + 7_200_000_000, "by", "why")),
        ]
    refused = 0
    for method, args in steps:
        if method == "pass":
            desk.pass_s(3601)
            continue
        try:
            getattr(desk.ledger, method)(*args)
        except ValueError:
            refused += 1
    assert everything(desk) <= together
    assert refused
    desk.ledger.close()


# -- who may ----------------------------------------------------------------------------------

CHANGES = [
    ("POST", "/v1/admin/budgets/transfer", {"source": "hr", "target": "mk", "tokens": 1}),
    ("POST", "/v1/admin/budgets/apply", {"budgets": FILE}),
    ("PUT", "/v1/admin/budgets/hr", {"tokens": 1, "expires_in_s": 60}),
    ("DELETE", "/v1/admin/budgets/hr", None),
]


@pytest.mark.parametrize(
    ("token", "status"), [(None, 401), ("x", 401), ("a", 403), ("officer", 403), ("key", 403)]
)
@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
async def test_who_may_not_change_budgets(
    desk: Desk,
    client: Client,
    token: str | None,
    status: int,
    method: str,
    path: str,
    body: Any,
) -> None:
    before, digest = desk.ledger.state(users=True), desk.ledger.config.digest
    given = None if body is None else {**body, "reason": "r"}
    assert (await client(method, path, given, token)).status_code == status
    assert desk.ledger.state(users=True) == before
    assert desk.ledger.config.digest == digest


@pytest.mark.parametrize("token", ["a", "b"])
@pytest.mark.parametrize(
    "path",
    [
        "/v1/admin/budgets",
        "/v1/admin/budgets?users=true",
        "/v1/admin/budgets/hr",
        "/v1/admin/budget-file",
        "/v1/usage?department=mk",
        "/v1/usage?account=mk",
        "/v1/usage?account=hr%2Frecruiting",
    ],
)
async def test_who_may_not_see_them(client: Client, token: str, path: str) -> None:
    assert (await client("GET", path, None, token)).status_code == 403


async def test_no_person_sees_anothers_account(desk: Desk, client: Client) -> None:
    for key in (KEY_A, KEY_B):
        desk.seq += 1
        said = replace(paid(desk.seq, 50), account=f"hr~{key}")
        desk.ledger.renew(RenewRequest("g1", desk.seq, (), (said,), False))
    own = await client("GET", f"/v1/usage?account=hr~{KEY_A}", None, "a")
    assert own.json()["spent"]["tokens"] == 50
    known = await client("GET", f"/v1/usage?account=hr~{KEY_B}", None, "a")
    unknown = await client("GET", f"/v1/usage?account=hr~{'0' * 64}", None, "a")
    assert known.status_code == unknown.status_code == 403

    def without_id(answer: httpx.Response) -> Any:
        body = answer.json()["error"]
        body.pop("request_id")
        return body

    assert without_id(known) == without_id(unknown), "tells nobody whether it exists"
    shown = (await client("GET", "/v1/usage", None, "a")).text
    assert KEY_A in shown
    assert KEY_B not in shown


# -- forged accounts --------------------------------------------------------------------------

PRINTABLE = st.text(max_size=12)
NAMES = st.builds(
    lambda first, rest: first + rest,
    st.sampled_from("aZ0"),
    st.text(alphabet="aZ0._-", max_size=6),
)


@pytest.mark.parametrize(
    "department",
    [f"hr~{KEY_A}", "hr/recruiting", "hr@hour", "hr/recruiting~x", "hr~", "", "hr ", "hr/x", "."],
)
def test_a_department_by_the_name_of_an_account_gets_none(department: str) -> None:
    everyone = {**FILE, "default_account": {"window": "day", "tokens": 5}}
    tree = Tree(BudgetsConfig.model_validate(everyone))
    forged = person(KEY_B, department=department)
    with pytest.raises(NoAccount):
        tree.charge(forged)


@given(department=PRINTABLE, key=PRINTABLE, roles=st.frozensets(PRINTABLE, max_size=3))
def test_no_claim_leads_out_of_ones_own_department(
    department: str, key: str, roles: frozenset[str]
) -> None:
    tree = Tree(BudgetsConfig.model_validate({**FILE, "default_account": {"tokens": 5}}))
    claimed = replace(person("x", department=department), roles=roles, key=key)
    try:
        leaf = tree.leaf(claimed)
        above = [node.name for node in tree.path(leaf)]
    except (NoAccount, ValueError):
        return
    assert {parts_of(name)[0] for name in above} == {department}


@given(NAMES, st.none() | NAMES, st.none() | NAMES, NAMES, st.none() | NAMES, st.none() | NAMES)
def test_two_leaves_never_have_one_name(
    d1: str, p1: str | None, u1: str | None, d2: str, p2: str | None, u2: str | None
) -> None:
    def name(department: str, part: str | None, user: str | None) -> str:
        return department + (f"/{part}" if part else "") + (f"~{user}" if user else "")

    first, second = name(d1, p1, u1), name(d2, p2, u2)
    assert (first == second) == ((d1, p1, u1) == (d2, p2, u2))
    assert parts_of(first) == (d1, p1, u1, None)


def test_pseudonyms_of_two_people_do_not_meet() -> None:
    people = [
        ("entra", None, "ab"),
        ("entra", "", "ab"),
        ("entra", "a", "b"),
        ("entra", "ab", ""),
        ("entraa", None, "b"),
        ("entr", None, "aab"),
        ("gatehouse", None, "ab"),
        ("entra", None, "ab\x00"),
        ("entra", None, "AB"),
        ("entra", None, "\uff41b"),
    ]
    keys = {principal_key(PEPPER, *each) for each in people}
    assert len(keys) == len(people)
    tree = Tree(BudgetsConfig.model_validate(FILE))
    assert len({tree.leaf(person(key)) for key in keys}) == len(people)


def test_a_role_or_client_leads_to_a_part_only_where_the_file_says_so() -> None:
    tree = Tree(BudgetsConfig.model_validate(FILE))
    assert tree.leaf(person(KEY_A, "recruiter")) == f"hr/recruiting~{KEY_A}"
    for roles in (("Recruiter",), ("recruiter ",), ("recruiter/x",), ("payroll\n",)):
        assert tree.leaf(person(KEY_A, *roles)) == f"hr~{KEY_A}"
    elsewhere = person(KEY_A, "recruiter", department="mk")
    assert tree.leaf(elsewhere) == "mk", "a part belongs to its department"


# -- races ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_transfers_race_with_spending(seed: int) -> None:
    """Tokens are exact: what is spent never exceeds what was there, however it is moved about."""
    draw = random.Random(seed)
    limits = {"hr": 3000, "mk": 2000, "it": 1000}

    async def story() -> None:
        world = World(config(**{name: {"tokens": limit} for name, limit in limits.items()}))
        gateways = [gateway(world, n) for n in range(3)]

        async def spender(book: LeaseBook, account: str) -> None:
            for _ in range(40):
                await asyncio.sleep(draw.random())
                try:
                    hold = await book.reserve(ask(account, max_tokens=draw.randint(1, 60)))
                except GatehouseError:
                    continue
                await asyncio.sleep(draw.random())
                used = min(draw.randint(0, 40), hold.reservation.reserved.tokens - 20)
                if used > 0:
                    hold.consumed(used, 0)
                hold.settle(None, 0)

        async def mover() -> None:
            for _ in range(100):
                await asyncio.sleep(draw.random() / 2)
                source, target = draw.sample(sorted(limits), 2)
                try:
                    world.ledger.transfer(source, target, 0, draw.randint(1, 900), "by", "why")
                except ValueError:
                    continue
                check()

        def check() -> None:
            states = {s.account: s for s in world.ledger.state()}
            assert sum(s.limit_tokens or 0 for s in states.values()) == sum(limits.values())
            for state in states.values():
                assert state.limit_tokens is not None
                assert state.spent.tokens + state.leased.tokens <= state.limit_tokens

        tasks = [spender(book, name) for book in gateways for name in limits]
        await asyncio.gather(mover(), *tasks)
        for book in gateways:
            await book.close()
        check()
        states = world.ledger.state()
        assert all(state.leased == Amount() for state in states), "what is not used returns"
        assert sum(state.spent.tokens for state in states) <= sum(limits.values())
        assert sum(state.spent.tokens for state in states) > 500, "it was a race"
        world.close()

    run(story)


def gateway(world: World, number: int) -> LeaseBook:
    return world.book(f"g{number}")


def test_a_spent_account_is_served_after_a_transfer_and_not_before(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(config(hr={"tokens": 300}, mk={"tokens": 1000}))
        book = world.book("g1")
        hold = await book.reserve(ask("hr", max_tokens=100))
        hold.consumed(100, 0)
        hold.settle(None, 0)
        held = await drain(book)
        world.ledger.transfer("mk", "hr", 0, 900, "by", "why")
        await asyncio.sleep(2)
        held.append(await book.reserve(ask("hr", max_tokens=100)))
        for hold in held:
            hold.settle(None, 0)
        await book.close()
        world.close()

    run(story)


async def drain(book: LeaseBook) -> list[LeaseHold]:
    """Reserve until nothing is left."""
    held: list[LeaseHold] = []
    while len(held) < 50:
        try:
            held.append(await book.reserve(ask("hr", max_tokens=100)))
        except BudgetExhausted:
            return held
    raise AssertionError("it never ends")
