"""Alerts on their way to a webhook: real HTTP, the real ledger's table, a clock of our own."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from deployments.alerts import delivery
from deployments.alerts.delivery import BATCH, GIVE_UP_US, LONGEST_PAUSE_S, Delivery
from deployments.alerts.payload import MAX_BODY_BYTES, message_id, messages
from deployments.alerts.sender import MAX_RETRY_AFTER_S, Attempt, Result, WebhookSender, judge
from deployments.alerts.signing import SecretError, new_secret
from deployments.ledger_alerts import SECRET_FILE, LedgerAlerts
from governance.budget import events
from governance.budget.state import Account
from governance.budget.tree import Node
from governance.errors import LedgerUnavailable
from tests.unit.test_alerts_signing import documented, private

NOW_US = 1_796_126_400_000_000
DAY_US = 86_400_000_000
SECRET = new_secret(lambda n: b"k" * n)
KEY = b"k" * 32


def alert(
    account: str = "hr",
    threshold: int = 80,
    quantity: str = "gpu_us",
    start_us: int = NOW_US - DAY_US // 2,
    ts_us: int = NOW_US,
) -> dict[str, Any]:
    """As the ledger makes one."""
    node = Node(account, account, None, owner="budgets@example.com")
    of = Account(account, "day UTC", start_us, start_us + DAY_US)
    return events.alert(node, of, quantity, threshold, threshold * 10, 1000, ts_us)


@dataclass
class Table:
    """The ledger's table."""

    rows: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)
    down: bool = False
    _seq: int = 0

    def put(self, *alerts: dict[str, Any]) -> None:
        for each in alerts:
            self._seq += 1
            self.rows.append((self._seq, each))

    async def alerts(self, limit: int) -> list[tuple[int, dict[str, Any]]]:
        if self.down:
            raise LedgerUnavailable
        return self.rows[:limit]

    async def alerts_done(self, up_to: int) -> None:
        if self.down:
            raise LedgerUnavailable
        self.rows = [row for row in self.rows if row[0] > up_to]

    async def alert_lost(self, alert: Mapping[str, Any], reason: str) -> None:
        self.lost.append((alert["id"], reason))


@dataclass
class Post:
    headers: dict[str, str]
    body: bytes

    @property
    def data(self) -> dict[str, Any]:
        return dict(json.loads(self.body)["data"])


@dataclass
class Receiver:
    """A webhook over HTTP: answers what it is told to, by account or in turn."""

    url: str = ""
    posts: list[Post] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    """In turn; then 200."""
    by_account: dict[str, int] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    wait: asyncio.Event | None = None
    endless: bool = False

    async def answer(self, request: web.Request) -> web.StreamResponse:
        post = Post({k.lower(): v for k, v in request.headers.items()}, await request.read())
        self.posts.append(post)
        if self.wait is not None:
            await self.wait.wait()
        if self.endless:
            response = web.StreamResponse()
            await response.prepare(request)
            try:
                while True:
                    await response.write(b"x" * 65536)
            except ConnectionError:
                return response
        status = self.answers.pop(0) if self.answers else 200
        status = self.by_account.get(post.data.get("account", ""), status)
        return web.Response(status=status, headers=self.headers, text="whsec_words of a receiver")

    def told(self) -> list[tuple[str, int]]:
        return [(post.data["account"], post.data["threshold_percent"]) for post in self.posts]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    found = Receiver()
    app = web.Application()
    app.router.add_route("*", "/{any:.*}", found.answer)
    server = TestServer(app, host="127.0.0.1")
    await server.start_server()
    found.url = f"http://127.0.0.1:{server.port}/hook"
    yield found
    if found.wait is not None:
        found.wait.set()
    await server.close()


@dataclass
class Bench:
    """A delivery whose time the test moves."""

    table: Table
    receiver: Receiver
    now_s: float = 0.0
    url: str | None = None
    secrets: Callable[[], tuple[bytes, ...]] = lambda: (KEY,)
    timeout_s: float = 5.0

    def __post_init__(self) -> None:
        self.url = self.receiver.url
        self.restart()

    def restart(self) -> None:
        """A new process: nothing but the table is left."""
        clock = self.clock
        self.delivery = Delivery(
            self.table,
            WebhookSender(clock=clock, timeout_s=self.timeout_s),
            lambda: self.url,
            lambda: self.secrets(),
            clock,
            monotonic=lambda: self.now_s,
            draw=lambda: 0.5,
        )

    def clock(self) -> int:
        return NOW_US + int(self.now_s * 1e6)

    async def after(self, seconds: float) -> None:
        self.now_s += seconds
        await self.delivery.round()

    @property
    def waiting(self) -> list[int]:
        return [seq for seq, _ in self.table.rows]


@pytest.fixture
def bench(receiver: Receiver) -> Bench:
    return Bench(Table(), receiver)


# -- what arrives -----------------------------------------------------------------------------


async def test_a_message_verifies_and_says_everything(bench: Bench) -> None:
    bench.now_s = time.time() - NOW_US / 1e6  # the documented receiver looks at the real clock
    bench.table.put(alert("hr/recruiting", 80, ts_us=bench.clock()))
    await bench.after(0)
    (post,) = bench.receiver.posts
    assert documented()(SECRET, post.headers, post.body)
    assert not documented()(new_secret(lambda n: b"x" * n), post.headers, post.body)
    whole = json.loads(post.body)
    assert (whole["type"], whole["version"]) == ("gatehouse.budget.threshold", 1)
    assert whole["timestamp"].endswith("Z")
    assert post.data["account"] == "hr/recruiting"
    assert (post.data["spent"], post.data["limit"]) == (800, 1000)
    assert post.data["owner"] == "budgets@example.com"
    assert "80%" in post.data["text"]
    assert post.headers["content-type"] == "application/json"
    assert post.headers["webhook-id"] == message_id(post.data["alert"])
    assert not bench.table.rows
    assert bench.delivery.stats.delivered == 1


async def test_thresholds_that_were_crossed_at_once_are_one_message(bench: Bench) -> None:
    bench.table.put(alert(threshold=50), alert("mk", 50), alert(threshold=80), alert(threshold=95))
    bench.table.put(alert(threshold=50, quantity="tokens"))
    await bench.after(0)
    assert bench.receiver.told() == [("hr", 95), ("mk", 50), ("hr", 50)]
    assert bench.receiver.posts[0].data["thresholds_percent"] == [50, 80, 95]
    assert not bench.table.rows
    assert bench.delivery.stats.coalesced == 2


def test_another_window_is_another_message() -> None:
    later = alert(threshold=50, start_us=NOW_US + DAY_US)
    assert [m.seqs for m in messages([(1, alert()), (2, later)])] == [(1,), (2,)]


def test_the_longest_names_make_no_message_that_is_too_long() -> None:
    name = "d" * 64 + "/" + "p" * 64
    row = {**alert(name), "owner": "o" * 200, "spent": 10**18, "limit": 10**18}
    (message,) = messages([(1, row)])
    assert len(message.body) < MAX_BODY_BYTES
    assert len(message.id) < 64
    assert "." not in message.id


# -- what fails -------------------------------------------------------------------------------


async def test_a_repeat_has_the_same_id_and_a_time_of_its_own(bench: Bench) -> None:
    bench.table.put(alert())
    bench.receiver.answers = [503, 500]
    for _ in range(3):
        await bench.after(60)
    ids = [post.headers["webhook-id"] for post in bench.receiver.posts]
    assert len(ids) == 3
    assert len(set(ids)) == 1
    assert len({post.headers["webhook-timestamp"] for post in bench.receiver.posts}) == 3
    assert not bench.table.rows
    assert (bench.delivery.stats.retried, bench.delivery.stats.delivered) == (2, 1)


async def test_pauses_grow_and_end_growing(bench: Bench) -> None:
    bench.table.put(alert())
    bench.receiver.answers = [500] * 1000
    at: list[float] = []
    for _ in range(4000):
        before = len(bench.receiver.posts)
        await bench.after(1)
        if len(bench.receiver.posts) > before:
            at.append(bench.now_s)
    pauses = [round(b - a) for a, b in pairwise(at)]
    assert pauses[:4] == [4, 8, 15, 30]
    assert max(pauses) <= LONGEST_PAUSE_S
    assert pauses[-1] == pauses[-2] == 450


async def test_a_receiver_that_asks_for_time_gets_it(bench: Bench) -> None:
    bench.table.put(alert(), alert("mk"))
    bench.receiver.answers, bench.receiver.headers = [429], {"retry-after": "120"}
    await bench.after(0)
    await bench.after(119)
    assert len(bench.receiver.posts) == 1, "nor is another account's message sent"
    await bench.after(2)
    assert bench.receiver.told()[1:] == [("hr", 80), ("mk", 80)]


@pytest.mark.parametrize("status", [400, 401, 404, 410, 422])
async def test_what_is_refused_for_good_is_not_repeated(bench: Bench, status: int) -> None:
    bench.table.put(alert(), alert("mk"))
    bench.receiver.answers = [status]
    await bench.after(0)
    await bench.after(3600)
    assert bench.receiver.told() == [("hr", 80), ("mk", 80)]
    assert bench.table.lost == [(alert()["id"], f"answered {status}")]
    assert not bench.table.rows
    assert bench.delivery.stats.refused == 1


async def test_no_account_waits_for_anothers_message_but_for_its_own(bench: Bench) -> None:
    later = alert(threshold=50, start_us=NOW_US + DAY_US)
    bench.table.put(alert("odd"), alert("hr"), later | {"account": "odd"})
    bench.receiver.by_account = {"odd": 500}
    await bench.after(0)
    assert bench.receiver.told() == [("odd", 80), ("hr", 80)]
    assert bench.waiting == [1, 2, 3], "an earlier one waits"
    await bench.after(600)
    assert bench.receiver.told()[2:] == [("odd", 80)], "hr's is not sent again, nor one out of turn"
    bench.receiver.by_account = {}
    await bench.after(600)
    assert bench.receiver.told()[3:] == [("odd", 80), ("odd", 50)]
    assert not bench.table.rows


async def test_an_outage_is_not_tried_with_every_message(bench: Bench) -> None:
    bench.table.put(*(alert(f"d{number}") for number in range(50)))
    bench.receiver.answers = [502] * 50
    await bench.after(0)
    assert len(bench.receiver.posts) == 2
    bench.receiver.answers = []
    await bench.after(600)
    assert not bench.table.rows
    assert bench.receiver.told()[2:] == [(f"d{number}", 80) for number in range(50)]


async def test_after_a_day_it_is_given_up_on_record(bench: Bench) -> None:
    bench.table.put(alert())
    bench.receiver.answers = [500] * 10
    await bench.after(GIVE_UP_US / 1e6 - 1)
    assert not bench.table.lost
    bench.restart()
    await bench.after(2)
    assert not bench.table.lost, "a new process tries once"
    await bench.after(1)
    assert bench.table.lost == [(alert()["id"], "not delivered in time")]
    assert not bench.table.rows
    assert bench.delivery.stats.expired == 1


async def test_a_clock_that_jumps_loses_no_alert(bench: Bench) -> None:
    bench.table.put(alert(ts_us=NOW_US - 2 * GIVE_UP_US))
    await bench.after(0)
    assert bench.receiver.told() == [("hr", 80)]
    assert not bench.table.lost


async def test_a_restart_in_between_sends_again_under_the_same_id(bench: Bench) -> None:
    bench.table.put(alert(), alert("mk"))
    first = await bench.table.alerts(BATCH)
    bench.receiver.answers = [200, 500]
    await bench.after(0)
    assert bench.waiting == [2]
    bench.table.rows = first  # killed before the ledger had written that the first was done
    bench.restart()
    await bench.after(1)
    posts = bench.receiver.posts
    assert bench.receiver.told() == [("hr", 80), ("mk", 80), ("hr", 80), ("mk", 80)]
    assert posts[0].headers["webhook-id"] == posts[2].headers["webhook-id"]
    assert posts[0].body == posts[2].body
    assert not bench.table.rows


async def test_a_ledger_that_does_not_answer_costs_nothing(bench: Bench) -> None:
    bench.table.put(alert())
    bench.table.down = True
    with pytest.raises(LedgerUnavailable):
        await bench.after(0)
    assert not bench.receiver.posts
    bench.table.down = False
    await bench.after(1)
    assert bench.receiver.told() == [("hr", 80)]


async def test_a_slow_receiver_is_given_up_in_time(receiver: Receiver) -> None:
    bench = Bench(Table(), receiver, timeout_s=0.2)
    receiver.wait = asyncio.Event()
    bench.table.put(alert())
    await asyncio.wait_for(bench.after(0), 5)
    assert bench.waiting == [1]
    assert bench.delivery.stats.retried == 1


async def test_an_endless_answer_is_not_read_to_its_end(bench: Bench) -> None:
    bench.receiver.endless = True
    bench.table.put(alert())
    await asyncio.wait_for(bench.after(0), 5)
    assert not bench.table.rows, "its status was 200"


async def test_nobody_there(bench: Bench) -> None:
    bench.url = "http://127.0.0.1:1/hook"
    bench.table.put(alert())
    await bench.after(0)
    assert bench.waiting == [1]
    bench.url = bench.receiver.url  # a file that was applied
    await bench.after(60)
    assert not bench.table.rows


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_no_redirect_is_followed(bench: Bench, status: int) -> None:
    bench.receiver.answers = [status]
    bench.receiver.headers = {"location": f"{bench.receiver.url}/elsewhere"}
    bench.table.put(alert())
    await bench.after(0)
    assert len(bench.receiver.posts) == 1
    assert bench.waiting == [1]


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/x",
        "http://169.254.169.254/latest",
        "https://user:word@hooks.example.com/x",
        "file:///etc/passwd",
        "http://127.0.0.1.example.com/",
    ],
)
async def test_urls_that_are_not_sent_to(bench: Bench, url: str) -> None:
    bench.url = url
    bench.table.put(alert())
    await bench.after(0)
    assert bench.waiting == [1]
    assert bench.delivery.stats.retried == 1


async def test_a_certificate_of_nobody_is_refused(tmp_path: Path) -> None:
    server_side, trusted = certificate(tmp_path)
    posts: list[bytes] = []

    async def take(request: web.Request) -> web.Response:
        posts.append(await request.read())
        return web.Response()

    app = web.Application()
    app.router.add_post("/", take)
    server = TestServer(app, host="127.0.0.1", scheme="https")
    await server.start_server(ssl=server_side)
    url = f"https://127.0.0.1:{server.port}/"
    try:
        refused = await WebhookSender(clock=lambda: NOW_US).send(url, (KEY,), "alert_1", b"{}")
        assert refused.result is Result.LATER
        assert "Certificate" in refused.why
        assert not posts
        sender = WebhookSender(clock=lambda: NOW_US, tls=trusted)
        assert (await sender.send(url, (KEY,), "alert_1", b"{}")).result is Result.DELIVERED
        assert posts == [b"{}"]
    finally:
        await server.close()


def certificate(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's context for 127.0.0.1, and one that trusts it."""
    from datetime import UTC, datetime, timedelta
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    alt = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(alt, critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "pem").write_bytes(pem + secret)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "pem")
    return server, ssl.create_default_context(cadata=pem.decode())


# -- secrets ----------------------------------------------------------------------------------


async def test_nothing_leaves_unsigned(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = private(tmp_path / "s", SECRET)
    path.chmod(0o644)

    def refused() -> tuple[bytes, ...]:
        raise SecretError(f"{path}: others may read it")

    bench.secrets = refused
    bench.table.put(alert())
    with caplog.at_level(logging.DEBUG):
        for _ in range(20):
            await bench.after(60)
    assert not bench.receiver.posts
    assert bench.waiting == [1]
    assert len([r for r in caplog.records if "others may read it" in r.getMessage()]) == 1
    bench.secrets = lambda: (KEY,)
    await bench.after(600)
    assert not bench.table.rows


async def test_secrets_and_answers_are_not_logged(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.receiver.answers = [500, 403]
    bench.table.put(alert())
    with caplog.at_level(logging.DEBUG):
        await bench.after(0)
        await bench.after(60)
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert "answered 500" in logged
    assert "whsec" not in logged
    assert SECRET.removeprefix("whsec_") not in logged
    signatures = [post.headers["webhook-signature"] for post in bench.receiver.posts]
    assert not [each for each in signatures if each in logged]


async def test_the_ledgers_task_reads_the_file_that_the_environment_names(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "POLL_S", 0.01)
    monkeypatch.setattr(delivery, "FIRST_PAUSE_S", 0.01)
    monkeypatch.delenv(SECRET_FILE, raising=False)
    table = Table()
    table.put(alert())
    telling = LedgerAlerts(table, lambda: receiver.url, clock=lambda: NOW_US)
    task = asyncio.create_task(telling.run())
    try:
        await until(lambda: telling.stats.retried > 1)
        assert not receiver.posts
        monkeypatch.setenv(SECRET_FILE, str(private(tmp_path / "s", SECRET)))
        await until(lambda: not table.rows)
        (tmp_path / "s").write_text(f"{new_secret(lambda n: b'n' * n)}\n{SECRET}\n")
        table.put(alert("mk"))
        await until(lambda: len(receiver.posts) == 2)
        signatures = [post.headers["webhook-signature"].split() for post in receiver.posts]
        assert [len(each) for each in signatures] == [1, 2]
    finally:
        task.cancel()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 - of several threads' doing
            await asyncio.sleep(0.01)


async def test_a_fault_of_ours_does_not_end_the_task(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(delivery, "POLL_S", 0.01)

    class Broken:
        calls = 0

        async def send(self, *_: object) -> Attempt:
            self.calls += 1
            if self.calls < 3:
                raise RuntimeError("whsec_in a message")
            return Attempt(Result.DELIVERED, "answered 200")

    table, sender = Table(), Broken()
    table.put(alert())
    done = Delivery(table, sender, lambda: "https://x", lambda: (KEY,), lambda: NOW_US)
    task = asyncio.create_task(done.run())
    await until(lambda: not table.rows)
    task.cancel()
    assert sender.calls == 3
    assert "RuntimeError" in caplog.text
    assert "whsec" not in caplog.text


# -- bounds -----------------------------------------------------------------------------------


async def test_without_a_webhook_nothing_is_kept(bench: Bench) -> None:
    bench.url = None
    bench.table.put(*(alert(f"d{number}") for number in range(BATCH + 5)))
    await bench.after(0)
    await bench.after(1)
    assert not bench.table.rows
    assert bench.delivery.stats.unwanted == BATCH + 5
    assert not bench.receiver.posts


async def test_memory_is_bounded_by_what_is_looked_at(bench: Bench) -> None:
    bench.table.put(*(alert(f"d{number}") for number in range(3 * BATCH)))
    bench.receiver.by_account = {"d0": 500}
    for _ in range(5):
        await bench.after(1000)
    kept = bench.delivery
    assert len(kept._done) < BATCH
    assert len(kept._tries) < BATCH
    assert kept.stats.waiting <= BATCH
    bench.receiver.by_account = {}
    for _ in range(5):
        await bench.after(1000)
    assert not bench.table.rows
    assert not kept._done


async def test_what_waits_is_counted(bench: Bench) -> None:
    bench.receiver.answers = [500] * 9
    bench.table.put(alert(ts_us=NOW_US - 5), alert("mk"))
    await bench.after(0)
    await bench.after(0)
    assert (bench.delivery.stats.waiting, bench.delivery.stats.oldest_us) == (2, NOW_US - 5)
    bench.receiver.answers = []
    await bench.after(600)
    await bench.after(1)
    assert (bench.delivery.stats.waiting, bench.delivery.stats.oldest_us) == (0, 0)


@pytest.mark.parametrize(
    ("status", "asked", "result", "pause_s"),
    [
        (200, None, Result.DELIVERED, None),
        (204, "9", Result.DELIVERED, None),
        (404, None, Result.REFUSED, None),
        (408, None, Result.LATER, None),
        (425, "1", Result.LATER, 1),
        (429, "99999999999999999999", Result.LATER, MAX_RETRY_AFTER_S),
        (503, "Tue, 01 Dec 2026 10:40:10 GMT", Result.LATER, 10),
        (503, "Tue, 01 Dec 1999 10:40:10 GMT", Result.LATER, 0),
        (503, "soon", Result.LATER, None),
        (503, "-5", Result.LATER, None),
        (302, None, Result.LATER, None),
        (100, None, Result.LATER, None),
    ],
)
def test_what_an_answer_means(
    status: int, asked: str | None, result: Result, pause_s: float | None
) -> None:
    at_us = 1_796_121_600_000_000
    found = judge(status, asked, lambda: at_us)
    assert (found.result, found.retry_after_s) == (result, pause_s)
