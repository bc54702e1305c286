"""Alerts from the charge to the receiver: the real ledger's process, real HTTP, the command."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from click.testing import CliRunner, Result

from deployments.alerts import delivery
from deployments.alerts.payload import message_id
from deployments.alerts.signing import new_secret, read_secrets
from deployments.cli.budget_alerts import alerts
from deployments.cli.errors import Exit
from deployments.ledger_alerts import SECRET_FILE
from deployments.ledger_budgets import Budgets
from deployments.ledger_service import LedgerService
from governance.budget.config import BudgetsConfig
from tests.unit.test_alerts_signing import documented, private
from tests.unit.test_ledger_service import renewal, service, trail

__all__ = ["trail"]

SECRET = new_secret(lambda n: b"k" * n)


# -- from the charge to the receiver ----------------------------------------------------------


@dataclass
class Webhook:
    """A receiver that answers what it is told to."""

    url: str = ""
    status: int = 200
    posts: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    hold: asyncio.Event | None = None

    async def answer(self, request: web.Request) -> web.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.posts.append((headers, await request.read()))
        if self.hold is not None:
            await self.hold.wait()
        return web.Response(status=self.status)

    def data(self) -> list[dict[str, Any]]:
        return [json.loads(body)["data"] for _, body in self.posts]


@pytest.fixture
async def webhook() -> AsyncIterator[Webhook]:
    found = Webhook()
    app = web.Application()
    app.router.add_post("/", found.answer)
    server = TestServer(app, host="127.0.0.1")
    await server.start_server()
    found.url = f"http://127.0.0.1:{server.port}/"
    yield found
    if found.hold is not None:
        found.hold.set()
    await server.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(delivery, "POLL_S", 0.01)
    monkeypatch.setattr(delivery, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv(SECRET_FILE, str(private(tmp_path / "secret", SECRET)))


async def started(root: Path, url: str | None, built_us: int = 1) -> LedgerService:
    """A ledger with 10 seconds a day for hr, and thresholds at 5 and 8."""
    config = BudgetsConfig.model_validate(
        {
            "accounts": {"hr": {"window": "day", "gpu_seconds": 10}},
            "alerts": {"thresholds": [50, 80], "webhook": url},
        }
    )
    found = service(root)
    found.start()
    await found.configure(Budgets(config, built_us).dump())
    return found


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


async def forgotten(ledger: LedgerService) -> None:
    """Wait until no alert waits."""
    async with asyncio.timeout(10):
        while await ledger.alerts(10):  # noqa: ASYNC110 - of another task
            await asyncio.sleep(0.01)


async def test_a_charge_is_told_signed_and_on_record(
    tmp_path: Path, webhook: Webhook, trail: list[dict[str, Any]]
) -> None:
    ledger = await started(tmp_path, webhook.url)
    await ledger.renew(renewal(1, used_us=4_900_000, number=1))
    await ledger.renew(renewal(2, used_us=200_000, number=2))
    await until(lambda: len(webhook.posts) == 1)
    await ledger.renew(renewal(3, used_us=3_500_000, number=3))
    await until(lambda: len(webhook.posts) == 2)
    await ledger.renew(renewal(4, used_us=100_000, number=4))
    assert [each["threshold_percent"] for each in webhook.data()] == [50, 80]
    assert [each["spent"] for each in webhook.data()] == [5_100_000, 8_600_000]
    genuine = documented()
    assert all(genuine(SECRET, headers, body) for headers, body in webhook.posts)
    await ledger.stop()
    told = [event for event in trail if event["event_type"] == "budget.threshold"]
    assert [event["entity_id"] for event in told] == [each["alert"] for each in webhook.data()]
    assert len(webhook.posts) == 2, "each threshold is told once"


async def test_an_alert_outlives_the_process(tmp_path: Path, webhook: Webhook) -> None:
    webhook.status = 503
    ledger = await started(tmp_path, webhook.url)
    await ledger.renew(renewal(1, used_us=9_000_000, number=1))
    await until(lambda: len(webhook.posts) > 0)
    await ledger.stop()
    webhook.status = 200
    before = len(webhook.posts)
    ledger = service(tmp_path)  # by what it finds beside its database
    ledger.start()
    await until(lambda: len(webhook.posts) > before)
    assert len({headers["webhook-id"] for headers, _ in webhook.posts}) == 1
    assert webhook.data()[-1]["thresholds_percent"] == [50, 80]
    await forgotten(ledger)
    await ledger.stop()


async def test_a_receiver_that_hangs_holds_no_charge_up(tmp_path: Path, webhook: Webhook) -> None:
    webhook.hold = asyncio.Event()
    ledger = await started(tmp_path, webhook.url)
    await ledger.renew(renewal(1, used_us=6_000_000, number=1))
    await until(lambda: len(webhook.posts) == 1)
    async with asyncio.timeout(5):
        for seq in range(2, 102):
            await ledger.renew(renewal(seq, used_us=1, number=seq))
    (state,) = await ledger.state("hr")
    assert state.spent.gpu_us == 6_000_100
    async with asyncio.timeout(5):
        await ledger.stop()


async def test_a_refused_alert_is_on_record_as_undelivered(
    tmp_path: Path, webhook: Webhook, trail: list[dict[str, Any]]
) -> None:
    webhook.status = 401
    ledger = await started(tmp_path, webhook.url)
    await ledger.renew(renewal(1, used_us=6_000_000, number=1))
    await until(lambda: ledger.telling.stats.refused == 1)
    await until(lambda: any(event.get("state") == "undelivered" for event in trail))
    await ledger.stop()
    (lost,) = [event for event in trail if event.get("state") == "undelivered"]
    assert lost["reason_code"] == "answered 401"
    assert message_id(lost["entity_id"]) == webhook.posts[0][0]["webhook-id"]
    assert len(webhook.posts) == 1


async def test_a_file_that_is_applied_moves_the_webhook(tmp_path: Path, webhook: Webhook) -> None:
    ledger = await started(tmp_path, "http://127.0.0.1:1/")
    await ledger.renew(renewal(1, used_us=6_000_000, number=1))
    await until(lambda: ledger.telling.stats.retried > 0)
    config = BudgetsConfig.model_validate(
        {
            "accounts": {"hr": {"window": "day", "gpu_seconds": 10}},
            "alerts": {"thresholds": [50, 80], "webhook": webhook.url},
        }
    )
    await ledger.configure(Budgets(config, 2).dump())
    await until(lambda: len(webhook.posts) == 1)
    await ledger.stop()


async def test_without_a_webhook_nothing_piles_up(tmp_path: Path) -> None:
    ledger = await started(tmp_path, None)
    await ledger.renew(renewal(1, used_us=9_000_000, number=1))
    await until(lambda: ledger.telling.stats.unwanted == 2)
    await forgotten(ledger)
    await ledger.stop()


# -- the command ------------------------------------------------------------------------------


@pytest.fixture
def receiver() -> Iterator[Webhook]:
    """A receiver in a thread: the command has an event loop of its own."""
    found = Webhook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            found.posts.append(({k.lower(): v for k, v in self.headers.items()}, body))
            self.send_response(found.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_port}/"
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


def run(*args: str) -> Result:
    return CliRunner().invoke(alerts, args)


def test_the_command_sends_one_that_verifies(receiver: Webhook) -> None:
    result = run("test", "--url", receiver.url)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("delivered: answered 200 (test_")
    ((headers, body),) = receiver.posts
    assert documented()(SECRET, headers, body)
    assert json.loads(body)["type"] == "gatehouse.alerts.test"


def test_the_command_takes_the_url_of_the_file(receiver: Webhook, tmp_path: Path) -> None:
    path = tmp_path / "budgets.yaml"
    path.write_text(
        "version: 1\naccounts: {hr: {window: day, tokens: 5}}\n"
        f"alerts: {{webhook: '{receiver.url}'}}\n"
    )
    result = run("test", "--budgets", str(path), "--json")
    assert json.loads(result.output)["result"] == "delivered"
    path.write_text("version: 1\naccounts: {hr: {window: day, tokens: 5}}\n")
    assert run("test", "--budgets", str(path)).exit_code == Exit.USAGE
    path.write_text("version: 7\n")
    assert run("test", "--budgets", str(path)).exit_code == Exit.FAILURE


@pytest.mark.parametrize(("status", "code"), [(401, Exit.FAILURE), (503, Exit.UNAVAILABLE)])
def test_the_command_says_what_the_webhook_answered(
    receiver: Webhook, status: int, code: Exit
) -> None:
    receiver.status = status
    result = run("test", "--url", receiver.url)
    assert result.exit_code == code
    assert f"answered {status}" in result.output
    assert "whsec" not in result.output


def test_the_command_sends_nothing_unsigned_or_in_the_clear(
    receiver: Webhook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").chmod(0o644)
    assert "others may read it" in run("test", "--url", receiver.url).output
    monkeypatch.delenv(SECRET_FILE)
    assert run("test", "--url", receiver.url).exit_code == Exit.USAGE
    assert run("test", "--url", "http://hooks.example.com/").exit_code == Exit.FAILURE
    assert not receiver.posts


def test_a_secret_is_made_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new"
    first = run("secret", str(path)).output.strip()
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(read_secrets(path)) == 1
    assert run("secret", str(path)).exit_code == Exit.USAGE, "the one before is not lost"
    assert path.read_text() == f"{first}\n"
    second = run("secret", str(path), "--rotate").output.strip()
    assert path.read_text() == f"{second}\n{first}\n"
    third = run("secret", str(path), "--rotate").output.strip()
    assert path.read_text() == f"{third}\n{second}\n"
    assert run("secret", str(tmp_path / "none"), "--rotate").exit_code == Exit.USAGE
    path.chmod(0o644)
    assert "others may read it" in run("secret", str(path), "--rotate").output


def test_the_clock_of_a_message_is_the_present(receiver: Webhook) -> None:
    run("test", "--url", receiver.url)
    sent_s = int(receiver.posts[0][0]["webhook-timestamp"])
    assert abs(sent_s - time.time()) < 60
