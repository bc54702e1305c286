"""What a client sees of its budget: headers, cost of an answer, refusals, ``/v1/usage``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from openai import OpenAI

from governance.budget.messages import AccountState
from governance.errors import BudgetExhausted, Shortage
from governance.nulls import NullHold, NullLedger
from governance.types import Amount, BudgetAsk, Reservation
from tests.contract.conftest import Server

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
RESET_US = 4_000_000_000_000_000
ACCOUNT = AccountState(
    "data-science", "day", 0, RESET_US, 60_000_000, 10_000,
    Amount(1_000_000, 500), Amount(), Amount(), None,
)  # fmt: skip
BUDGET_HEADERS = {
    "x-gatehouse-budget-account": "data-science",
    "x-gatehouse-budget-remaining-gpu-ms": "59000",
    "x-gatehouse-budget-reset": "2096-10-02T07:06:40Z",
    "x-ratelimit-limit-tokens": "10000",
    "x-ratelimit-remaining-tokens": "9500",
}


class ChargingLedger(NullLedger):
    """One account; charges twice the device time, as for a heavier accelerator."""

    def __init__(self) -> None:
        self.refuse: BudgetExhausted | None = None

    async def reserve(self, ask: BudgetAsk) -> NullHold:
        if self.refuse:
            raise self.refuse
        return ChargedHold(Reservation("rsv_gw_1", ask.account))

    def usage(self, account: str) -> AccountState:
        return ACCOUNT


class ChargedHold(NullHold):
    def settle(self, usage: Any, gpu_us: int | None) -> None:
        self.charged = Amount(2 * (gpu_us or 0), 5)


@pytest.fixture
def ledger(server: Server) -> ChargingLedger:
    found = ChargingLedger()
    server.gateway.ledger = found
    return found


@pytest.fixture
def client(server: Server, ledger: ChargingLedger) -> Iterator[OpenAI]:
    with ExitStack() as opened:
        yield opened.enter_context(
            OpenAI(base_url=server.v1, api_key="data-scientist", max_retries=0)
        )


def get(server: Server, path: str, token: str, method: str = "GET") -> tuple[int, Any]:
    where = urlsplit(server.url)
    with closing(HTTPConnection(where.hostname or "", where.port, timeout=10)) as connection:
        connection.request(method, path, headers={"authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def test_an_answer_says_what_it_took_and_what_is_left(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="small", messages=HELLO)
    assert BUDGET_HEADERS.items() <= dict(raw.headers).items()
    assert re.fullmatch(r"\d+h\d+m\d+s", raw.headers["x-ratelimit-reset-tokens"])
    assert raw.headers["x-gatehouse-gpu-ms"] == "3.000"
    assert raw.headers["x-gatehouse-charged-gpu-ms"] == "6.000"
    answer = raw.parse()
    assert answer.model_extra is not None
    assert answer.model_extra["gatehouse"] == {
        "request_id": raw.headers["x-gatehouse-request-id"],
        "gpu_us": 3000,
        "charged_us": 6000,
    }


def test_embeddings_too(client: OpenAI) -> None:
    raw = client.embeddings.with_raw_response.create(
        model="vectors", input="hello", encoding_format="float"
    )
    assert BUDGET_HEADERS.items() <= dict(raw.headers).items()
    answer = raw.parse()
    assert answer.data[0].embedding == [0.5, 1.0]
    assert answer.model_extra is not None
    assert answer.model_extra["gatehouse"]["gpu_us"] is None


@pytest.mark.parametrize("asked", [True, False])
def test_a_stream_tells_its_cost_where_usage_is_asked_for(client: OpenAI, asked: bool) -> None:
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if asked else {}
    raw = client.chat.completions.with_raw_response.create(
        model="small", messages=HELLO, stream=True, **options
    )
    assert BUDGET_HEADERS.items() <= dict(raw.headers).items()
    assert "x-gatehouse-gpu-ms" not in raw.headers, "it has only begun"
    *_, last = list(raw.parse())
    extra = (last.model_extra or {}).get("gatehouse")
    if not asked:
        assert extra is None
        return
    assert last.usage is not None
    request_id = raw.headers["x-gatehouse-request-id"]
    assert extra == {"request_id": request_id, "gpu_us": 3000, "charged_us": 6000}


def test_a_refusal_says_when_to_come_back_and_what_fits(
    client: OpenAI, ledger: ChargingLedger
) -> None:
    left = Shortage("data-science", RESET_US, 1_500, 7)
    ledger.refuse = BudgetExhausted("Too much.", None, 360, (), left)
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model="small", messages=HELLO, stream=stream)
        assert refused.value.code == "budget_exhausted"
        assert isinstance(refused.value.body, dict)
        assert refused.value.body["account"] == "data-science"
        assert refused.value.body["reset_at"] == RESET_US // 1_000_000
        assert refused.value.body["still_fits"] == {"tokens": 7, "gpu_ms": 1}
        headers = refused.value.response.headers
        assert headers["retry-after"] == "360"
        assert BUDGET_HEADERS.items() <= dict(headers).items()


def test_without_budgets_there_are_no_headers(server: Server) -> None:
    with OpenAI(base_url=server.v1, api_key="data-scientist", max_retries=0) as client:
        raw = client.chat.completions.with_raw_response.create(model="small", messages=HELLO)
    assert not [name for name in raw.headers if "budget" in name or "ratelimit" in name]
    assert "x-gatehouse-charged-gpu-ms" not in raw.headers
    assert raw.headers["x-gatehouse-gpu-ms"] == "3.000"


@pytest.mark.parametrize(
    ("path", "token", "status"),
    [
        ("/v1/usage", "hr-analyst", 200),
        ("/v1/usage?department=hr", "hr-analyst", 200),
        ("/v1/usage?department=data-science", "hr-analyst", 403),
        ("/v1/usage?department=data-science", "platform-admin", 200),
        ("/v1/usage?department=nowhere", "platform-admin", 404),
        ("/v1/usage", "marketing-intern", 403),
        ("/v1/usage", "forged", 401),
        ("/v1/usage?department=hr&department=data-science", "platform-admin", 400),
        ("/v1/usage?part=hr", "platform-admin", 400),
        ("/v1/usage?account=hr", "platform-admin", 200),
        ("/v1/usage?account=hr", "hr-analyst", 200),
        ("/v1/usage?account=hr~someone", "hr-analyst", 403),
        ("/v1/usage?account=data-science", "hr-analyst", 403),
        ("/v1/usage?account=hr/a/b", "platform-admin", 400),
        ("/v1/admin/budgets?users=true", "platform-admin", 200),
        ("/v1/admin/budgets?users=true", "hr-analyst", 403),
        ("/v1/admin/budgets?nonsense=1", "platform-admin", 400),
        ("/v1/admin/budgets/hr/screening", "platform-admin", 404),
        ("/v1/admin/budgets/hr%2Fscreening", "platform-admin", 404),
        ("/v1/admin/budgets/hr~someone", "platform-admin", 404),
        ("/v1/admin/budgets/hr~", "platform-admin", 400),
        ("/v1/admin/budget-file", "hr-analyst", 403),
        ("/v1/admin/budget-file", "platform-admin", 404),
        ("/v1/admin/budgets", "hr-analyst", 403),
        ("/v1/admin/budgets", "platform-admin", 200),
        ("/v1/admin/budgets/hr", "hr-analyst", 403),
        ("/v1/admin/budgets/hr", "platform-admin", 200),
    ],
)
def test_who_may_see_what(server: Server, path: str, token: str, status: int) -> None:
    got, body = get(server, path, token)
    assert got == status, body
    assert ("error" in body) is (status != 200)


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
@pytest.mark.parametrize(("token", "status"), [("hr-analyst", 403), ("forged", 401)])
def test_who_may_not_change_budgets(server: Server, method: str, token: str, status: int) -> None:
    assert get(server, "/v1/admin/budgets/hr", token, method)[0] == status
