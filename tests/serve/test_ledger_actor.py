"""The budget ledger as a real Ray actor: killed under load, nothing answered is lost or doubled."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import ray

from deployments.ledger_actor import (
    ACTOR_NAME,
    LedgerClient,
    actor_name,
    get_or_start_ledger,
)
from deployments.ledger_budgets import Budgets
from deployments.ledger_shards import LedgerShards
from governance.budget.config import BudgetsConfig
from governance.budget.leases import LeaseBook
from governance.budget.messages import MeterReport, MeterRow
from governance.budget.tree import Tree
from governance.errors import (
    GatehouseError,
    InvalidRequest,
    LedgerUnavailable,
    NoAccount,
    ObjectNotFound,
)
from governance.types import Amount, BudgetAsk, Operation, Usage

BY = "f" * 64
PROMPT, ANSWER, GPU_US = 40, 8, 1_500
"""What each request of the load takes."""


def now_us() -> int:
    return time.time_ns() // 1000


def budgets(gpu_seconds: int = 10_000_000) -> dict[str, Any]:
    account = {"window": "month", "gpu_seconds": gpu_seconds, "tokens": 10**12}
    config = BudgetsConfig.model_validate({"accounts": {"hr": account, "it": account}})
    return Budgets(config, now_us()).dump()


@pytest.fixture
def namespace(ray_local: None, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of its own, so that each test starts with no ledger."""
    name = f"test-{request.node.name}"
    yield name
    ray.kill(ray.get_actor(ACTOR_NAME, name), no_restart=True)


@pytest.fixture
async def client(namespace: str, tmp_path: Path) -> LedgerClient:
    found = LedgerClient(tmp_path, budgets(), namespace=namespace)
    await found.ready()
    return found


@dataclass
class Load:
    """Gateways that reserve and settle, and an engine that reports each request as it goes."""

    client: LedgerClient
    books: list[LeaseBook]
    started: int = 0
    served: int = 0
    refused: list[str] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    rows: dict[str, MeterRow] = field(default_factory=dict)
    stop: bool = False
    seq: int = 0

    async def one(self, book: LeaseBook, department: str) -> None:
        self.started += 1
        ask = BudgetAsk(f"req-{self.started}", department, "m", "m", Operation.CHAT, 160, 1, 16)
        began_s = time.monotonic()
        try:
            hold = await book.reserve(ask)
        except GatehouseError as error:
            self.refused.append(error.code)
            return
        self.waits_s.append(time.monotonic() - began_s)
        row = MeterRow(
            hold.id, ask.request_id, book.gateway_id, department, "m", "m",
            0, 0, 0, 0, 0, PROMPT, 0, False, False,
        )  # fmt: skip
        await hold.started(PROMPT)
        for share in (1, 2, 3):
            await asyncio.sleep(0.01)
            hold.consumed(ANSWER // 4, GPU_US * share // 4)
            self.rows[hold.id] = replace(
                row, gpu_us=GPU_US * share // 4, decode_us=GPU_US * share // 4,
                decode_tokens=ANSWER * share // 4,
            )  # fmt: skip
        hold.settle(Usage(PROMPT, ANSWER), GPU_US)
        self.rows[hold.id] = replace(
            row, gpu_us=GPU_US, decode_us=GPU_US, decode_tokens=ANSWER, ended=True, delivered=True
        )
        self.served += 1
        self.at_s.append(time.monotonic())

    async def serve(self, book: LeaseBook, department: str) -> None:
        while not self.stop:
            await self.one(book, department)

    async def report(self) -> None:
        """As the reporter of a replica: what was not taken is told again, with newer figures."""
        rows = dict(self.rows)
        busy_us = self.served * GPU_US
        self.seq += 1
        report = MeterReport(
            "r1", "m", "cpu", "epoch", self.seq, 1, busy_us + 10**6, busy_us, busy_us, 0, 4, False,
            tuple(rows.values()),
        )  # fmt: skip
        try:
            await self.client.report(report)
        except LedgerUnavailable:
            return
        for name, row in rows.items():
            if self.rows[name] is row and row.ended:
                del self.rows[name]

    async def report_for_ever(self) -> None:
        while not self.stop:
            await self.report()
            await asyncio.sleep(0.1)


@pytest.fixture
async def load(client: LedgerClient, namespace: str, tmp_path: Path) -> AsyncIterator[Load]:
    clients = [LedgerClient(tmp_path, None, namespace=namespace) for _ in range(2)]
    books = [
        LeaseBook(
            f"gw-{place}-{os.getpid()}-{now_us()}", each.renew, clock=now_us,
            monotonic=time.monotonic, tree=Tree(Budgets.load(budgets()).config),
        )
        for place, each in enumerate(clients)
    ]  # fmt: skip
    yield Load(client, books)
    for book in books:
        await book.close()


async def pid_of(namespace: str) -> int:
    handle: Any = await asyncio.to_thread(ray.get_actor, ACTOR_NAME, namespace)
    return int(await handle.process_id.remote())


async def back(client: LedgerClient) -> float:
    """Seconds until the ledger answers again."""
    began_s = time.monotonic()
    async with asyncio.timeout(30):
        while True:
            try:
                await client.state()
            except LedgerUnavailable:
                await asyncio.sleep(0.02)
            else:
                return time.monotonic() - began_s


async def test_killed_under_load_nothing_is_lost_or_doubled(
    load: Load, client: LedgerClient, namespace: str
) -> None:
    tasks = [
        asyncio.create_task(load.serve(book, department))
        for book in load.books
        for department in ("hr", "it")
        for _ in range(4)
    ]
    tasks.append(asyncio.create_task(load.report_for_ever()))
    await asyncio.sleep(2)
    took_s = []
    for _ in range(3):
        pid = await pid_of(namespace)
        os.kill(pid, signal.SIGKILL)
        took_s.append(await back(client))
        assert await pid_of(namespace) != pid
        await asyncio.sleep(1.5)
    load.stop = True
    await asyncio.gather(*tasks)
    for book in load.books:
        await book.close()
    async with asyncio.timeout(15):
        while load.rows:
            await load.report()
            await asyncio.sleep(0.05)

    spent = {state.account: state for state in await client.state()}
    total = spent["hr"].spent + spent["it"].spent
    assert total == Amount(load.served * GPU_US, load.served * (PROMPT + ANSWER))
    assert {state.leased for state in spent.values()} == {Amount()}, "all leases were given back"
    assert load.refused == [], "requests were served out of leases meanwhile"
    gap_s = max(b - a for a, b in zip(load.at_s, load.at_s[1:], strict=False))
    print(
        f"{load.served} requests, back after {[f'{s:.2f}' for s in took_s]} s,"
        f" longest reserve {max(load.waits_s):.3f} s, longest gap {gap_s:.3f} s"
    )
    assert max(took_s) < 15


async def test_what_was_answered_is_there_after_a_kill(
    client: LedgerClient, namespace: str
) -> None:
    for seq in range(1, 21):
        row = MeterRow(
            f"rsv_gw-1_{seq}", f"req-{seq}", "gw-1", "hr", "m", "m",
            1000, 0, 1000, 0, 0, 5, 5, True, True,
        )  # fmt: skip
        report = MeterReport(
            "r1", "m", "cpu", "e", seq, 1, 10**6, seq * 1000, seq * 1000, 0, 0, False, (row,)
        )
        await client.report(report)
        if seq % 7 == 0:
            os.kill(await pid_of(namespace), signal.SIGKILL)
            for again in range(100):
                try:
                    await client.report(report)  # a repeat changes nothing
                    break
                except LedgerUnavailable:
                    assert again < 99
                    await asyncio.sleep(0.1)
    (state,) = await client.state("hr")
    assert state.spent == Amount(20_000, 200)


async def test_an_override_and_its_record_outlive_a_kill(
    client: LedgerClient, namespace: str, tmp_path: Path
) -> None:
    until_us = now_us() + 3_600_000_000
    await client.set_override("hr", 5, None, until_us, "quarter end", BY)
    os.kill(await pid_of(namespace), signal.SIGKILL)
    await back(client)
    (state,) = await client.state("hr")
    assert (state.limit_us, state.overridden_until_us) == (5, until_us)
    written = b"".join(path.read_bytes() for path in (tmp_path / "wal").rglob("*.wal"))
    assert b"quarter end" in written
    assert (await client.clear_override("hr", BY)).overridden_until_us is None


async def test_errors_cross_the_actor_as_ours(client: LedgerClient) -> None:
    with pytest.raises(ObjectNotFound):
        await client.clear_override("nowhere", BY)
    with pytest.raises(InvalidRequest, match="expires_us"):
        await client.set_override("hr", 5, None, 1, "x", BY)
    tree = Tree(Budgets.load(budgets()).config)
    book = LeaseBook("gw-e", client.renew, clock=now_us, monotonic=time.monotonic, tree=tree)
    with pytest.raises(NoAccount):
        await book.reserve(BudgetAsk("r", "nowhere", "m", "m", Operation.CHAT, 10, 1, 1))
    await book.close()


async def test_a_later_build_changes_a_running_ledger(
    client: LedgerClient, namespace: str, tmp_path: Path
) -> None:
    later = LedgerClient(tmp_path, budgets(7), namespace=namespace)
    await later.ready()
    (state,) = await client.state("hr")
    assert state.limit_us == 7_000_000
    os.kill(await pid_of(namespace), signal.SIGKILL)
    await back(client)
    (state,) = await client.state("hr")
    assert state.limit_us == 7_000_000, "the arguments of its first start are not what holds"


async def test_one_that_was_stopped_for_good_is_started_again(
    client: LedgerClient, namespace: str
) -> None:
    handle: Any = await asyncio.to_thread(ray.get_actor, ACTOR_NAME, namespace)
    await asyncio.to_thread(ray.kill, handle, no_restart=True)
    await back(client)
    assert {state.account for state in await client.state()} == {"hr", "it"}


async def test_two_who_start_it_get_the_same(namespace: str, tmp_path: Path) -> None:
    pair = await asyncio.gather(
        *(asyncio.to_thread(get_or_start_ledger, tmp_path, None, namespace) for _ in range(2))
    )
    pids = [await handle.process_id.remote() for handle in pair]
    assert pids[0] == pids[1]


async def test_two_ledgers_are_two_actors_with_a_database_each(
    namespace: str, tmp_path: Path
) -> None:
    accounts = {name: {"window": "day", "tokens": 1000} for name in ("a", "b", "c", "d", "e")}
    config = BudgetsConfig.model_validate({"accounts": accounts, "shards": 2})
    dump, tree = Budgets(config, now_us()).dump(), Tree(config)
    shards = LedgerShards(
        lambda shard: LedgerClient(tmp_path, dump, namespace=namespace, shard=shard), tree
    )
    try:
        await shards.ready()
        assert {state.account for state in await shards.state()} == set(accounts)
        assert {tree.shard(name) for name in accounts} == {0, 1}
        states = [await shards.calls(shard).state() for shard in range(2)]
        assert [{tree.shard(s.account) for s in each} for each in states] == [{0}, {1}]
        await shards.apply({"accounts": accounts | {"a": {"tokens": 5}}, "shards": 2}, "x", BY)
        (state,) = await shards.state("a")
        assert state.limit_tokens == 5
        budgets_of = [await shards.calls(shard).budgets() for shard in range(2)]
        assert budgets_of[0] == budgets_of[1]
        names = {path.name for path in (tmp_path / "ledger").glob("*.sqlite")}
        assert names == {"ledger.sqlite", "ledger-1.sqlite"}
    finally:
        ray.kill(ray.get_actor(actor_name(1), namespace), no_restart=True)
