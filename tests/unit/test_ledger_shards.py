"""Several ledgers as one: who lives where, what may change while they run, and who follows."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deployments import ledger_audit
from deployments.ledger_budgets import Budgets, kept_beside
from deployments.ledger_calls import LedgerCalls
from deployments.ledger_service import LedgerService
from deployments.ledger_shards import BudgetsFollower, LedgerShards
from deployments.metering.reporter import MeterReporter
from governance.budget.config import BudgetsConfig
from governance.budget.leases import LeaseBook
from governance.budget.messages import MeterReport, RenewReply, RenewRequest
from governance.budget.sharded import ShardedLeases
from governance.budget.shards import book_id, book_of, moved, shard_of
from governance.budget.store import LedgerStoreError
from governance.budget.tree import Tree
from governance.errors import (
    AuditUnavailable,
    InvalidRequest,
    LedgerUnavailable,
    NoAccount,
    ObjectNotFound,
)
from governance.types import Amount, Usage
from tests.budget_world import ask, row

BY = "f" * 64
SHARDS = 3
NAMES = tuple(f"d{number}" for number in range(12))


def now_us() -> int:
    return time.time_ns() // 1000


def soon() -> int:
    return now_us() + 10_000_000


def file(shards: int = SHARDS, tokens: int = 10_000, **more: Any) -> dict[str, Any]:
    """Twelve departments, two of them in a cohort."""
    accounts: dict[str, Any] = {name: {"window": "day", "tokens": tokens} for name in NAMES}
    for name in ("d0", "d1"):
        accounts[name] |= {"cohort": "biz", "lend": {"tokens": 10}}
    return {
        "cohorts": {"biz": {"window": "day"}},
        "accounts": accounts,
        "shards": shards,
        **more,
    }


def dump(data: dict[str, Any], built_us: int = 1) -> dict[str, Any]:
    return Budgets(BudgetsConfig.model_validate(data), built_us).dump()


def tree(data: dict[str, Any] | None = None) -> Tree:
    return Tree(BudgetsConfig.model_validate(data or file()))


class Direct:
    """A link to a service in this process; ``down`` while it cannot be reached."""

    def __init__(self, service: LedgerService) -> None:
        self.service = service
        self.down = False

    async def __call__(self, method: str, *args: Any) -> Any:
        if self.down:
            raise LedgerUnavailable
        return await getattr(self.service, method)(*args)


class Ledgers:
    """Services of a root, and what calls them."""

    def __init__(self, root: Path, data: dict[str, Any]) -> None:
        self.root = root
        self.data = data
        self.services = [
            LedgerService(
                root / (f"ledger-{shard}.sqlite" if shard else "ledger.sqlite"),
                root / "wal",
                clock=now_us,
                monotonic=time.monotonic,
                shard=shard,
            )
            for shard in range(data["shards"])
        ]
        self.links = [Direct(service) for service in self.services]
        for service in self.services:
            service.start()

    def shards(self, data: dict[str, Any] | None = None, built_us: int = 1) -> LedgerShards:
        """As a gateway of a build has it."""
        built = dump(data or self.data, built_us)

        def make(shard: int) -> LedgerCalls:
            async def resolve() -> Direct:
                return self.links[shard]

            return LedgerCalls(resolve, built)

        return LedgerShards(make, tree(data or self.data))

    async def stop(self) -> None:
        for service in self.services:
            await service.stop()


@pytest.fixture
async def ledgers(tmp_path: Path) -> AsyncIterator[Ledgers]:
    found = Ledgers(tmp_path, file())
    yield found
    await found.stop()


def pair(found: Tree, same: bool) -> tuple[str, str]:
    """Two departments without a cohort that live in one ledger, or in two."""
    for source in NAMES[2:]:
        for target in NAMES[2:]:
            if source != target and (found.shard(source) == found.shard(target)) is same:
                return source, target
    raise LookupError


# Names


@pytest.mark.parametrize(
    ("reservation", "shard", "book"),
    [
        ("rsv_gw-1_7", 0, "gw-1"),
        ("rsv_gw-1.2_7", 2, "gw-1.2"),
        ("rsv_gw-1.63_7", 63, "gw-1.63"),
        ("rsv_gw-1.64_7", 0, "gw-1.64"),
        ("rsv_gw.x_7", 0, "gw.x"),
        ("rsv_gw-1.02_7", 0, "gw-1.02"),
        ("nonsense", 0, None),
        ("", 0, None),
    ],
)
def test_a_reservation_says_where_it_belongs(reservation: str, shard: int, book: str) -> None:
    assert shard_of(reservation) == shard
    assert book_of(reservation) == book


def test_a_book_of_each_ledger_has_its_own_name() -> None:
    names = [book_id("gw-0a1b", shard) for shard in range(64)]
    assert names[0] == "gw-0a1b"
    assert [shard_of(f"rsv_{name}_1") for name in names] == list(range(64))
    assert [book_of(f"rsv_{name}_12") for name in names] == names


def test_ledgers_keep_their_budgets_apart(tmp_path: Path) -> None:
    assert kept_beside(tmp_path / "ledger.sqlite").name == "budgets.json"
    assert kept_beside(tmp_path / "ledger-2.sqlite").name == "budgets-2.json"


def test_a_cohort_lives_together() -> None:
    found = tree()
    assert found.shard("d0") == found.shard("d1") == found.shard("d1/x~u")
    assert len({found.shard(name) for name in NAMES}) == SHARDS


# Calls


async def test_all_accounts_are_listed_once(ledgers: Ledgers) -> None:
    shards = ledgers.shards()
    await shards.ready()
    states = await shards.state()
    assert [state.account for state in states] == sorted(NAMES)
    for name in NAMES:
        (state,) = await shards.state(name)
        assert state.account == name
    assert await shards.state("nobody") == ()
    assert await shards.state("no name") == ()


async def test_an_override_goes_where_the_account_lives(ledgers: Ledgers) -> None:
    shards = ledgers.shards()
    await shards.ready()
    for name in NAMES:
        state = await shards.set_override(name, None, 5, now_us() + 10**9, "x", BY)
        assert state.limit_tokens == 5
    counts = [len(s._ledger._books.state.overrides) for s in ledgers.services]  # type: ignore[union-attr]
    found = tree()
    assert counts == [sum(found.shard(n) == shard for n in NAMES) for shard in range(SHARDS)]
    assert (await shards.clear_override("d3", BY)).limit_tokens == 10_000
    with pytest.raises(ObjectNotFound):
        await shards.clear_override("no name", BY)


async def test_budget_moves_within_a_ledger_only(ledgers: Ledgers) -> None:
    shards = ledgers.shards()
    await shards.ready()
    giver, taker = await shards.transfer("d0", "d1", 0, 100, "x", BY)
    assert (giver.limit_tokens, taker.limit_tokens) == (9_900, 10_100)
    with pytest.raises(InvalidRequest, match="different ledgers"):
        await shards.transfer(*pair(tree(), same=False), 0, 100, "x", BY)


# Transfers of one ledger


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[LedgerService]:
    found = LedgerService(
        tmp_path / "ledger.sqlite", tmp_path / "wal", clock=now_us, monotonic=time.monotonic
    )
    found.start()
    await found.configure(dump(file(1)))
    await found.audit.flush()
    yield found
    await found.stop()


@pytest.fixture
def trail(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Events in the order in which they became durable."""
    written: list[dict[str, Any]] = []
    original = ledger_audit.AuditWriter.write

    async def write(self: Any, event: Any, cells: Any = ()) -> str:
        event_id = await original(self, event, cells)
        written.append(dict(event))
        return event_id

    monkeypatch.setattr(ledger_audit.AuditWriter, "write", write)
    return written


async def test_a_transfer_is_on_record_and_done_once(
    one: LedgerService, trail: list[dict[str, Any]]
) -> None:
    for _ in range(3):
        giver, taker = await one.transfer("d2", "d3", 0, 100, "quarter end", BY, soon(), "key-1")
        assert (giver.limit_tokens, taker.limit_tokens) == (9_900, 10_100)
    (event,) = [e for e in trail if e["event_type"] == "budget.transfer"]
    assert (event["subject_key"], event["reason_code"]) == (BY, "quarter end")
    giver, _ = await one.transfer("d2", "d3", 0, 100, "quarter end", BY, soon(), "key-2")
    assert giver.limit_tokens == 9_800


async def test_a_call_that_is_sent_again_moves_budget_once(one: LedgerService) -> None:
    link, lost = Direct(one), 2

    async def flaky(method: str, *args: Any) -> Any:
        nonlocal lost
        answer = await link(method, *args)
        if method == "transfer" and lost:
            lost -= 1
            raise LedgerUnavailable  # it was done, and nobody heard
        return answer

    async def resolve() -> Any:
        return flaky

    giver, _ = await LedgerCalls(resolve).transfer("d2", "d3", 0, 100, "x", BY)
    assert lost == 0
    assert giver.limit_tokens == 9_900


async def test_what_cannot_be_moved_is_refused(one: LedgerService) -> None:
    with pytest.raises(ObjectNotFound):
        await one.transfer("d2", "nobody", 0, 1, "x", BY, soon(), "a")
    with pytest.raises(InvalidRequest, match="10000 tokens"):
        await one.transfer("d2", "d3", 0, 10_001, "x", BY, soon(), "b")
    with pytest.raises(LedgerUnavailable):
        await one.transfer("d2", "d3", 0, 1, "x", BY, now_us() - 1, "c")
    assert (await one.state("d2"))[0].limit_tokens == 10_000


# Another file while everything runs


async def test_a_file_is_applied_recorded_and_kept(
    trail: list[dict[str, Any]], tmp_path: Path
) -> None:
    (one,) = Ledgers(tmp_path, file(1)).services
    await one.configure(dump(file(1)))
    await one.audit.flush()
    trail.clear()
    digest = await one.apply(file(1, 500), "budget round", BY, soon())
    assert (await one.state("d2"))[0].limit_tokens == 500
    (event,) = [e for e in trail if e["event_type"] == "budget.loaded"]
    assert (event["subject_key"], event["reason_code"]) == (BY, "budget round")
    assert json.loads(event["detail"])["digest"] == digest
    assert (await one.budgets())["config"]["accounts"]["d2"]["tokens"] == 500
    # A gateway of the build before starts late, and the ledger starts again.
    await one.configure(dump(file(1), built_us=2))
    await one.stop()
    (again,) = Ledgers(tmp_path, file(1)).services
    assert (await again.state("d2"))[0].limit_tokens == 500
    await again.configure(dump(file(1, 700), built_us=now_us()))
    assert (await again.state("d2"))[0].limit_tokens == 700, "a later build holds again"
    await again.stop()


async def test_what_was_spent_and_lent_counts_on_in_another_file(one: LedgerService) -> None:
    link = Direct(one)

    async def resolve() -> Direct:
        return link

    book = LeaseBook(
        "gw-1", LedgerCalls(resolve).renew, clock=now_us, monotonic=time.monotonic, tree=tree()
    )
    hold = await book.reserve(ask("d2", 100))
    await one.apply(file(1, 400), "x", BY, soon())
    (state,) = await one.state("d2")
    assert state.limit_tokens == 400
    assert state.leased.tokens >= hold.reserved_tokens
    hold.settle(Usage(10, 20), 1000)
    await book.close()
    (state,) = await one.state("d2")
    assert (state.spent, state.leased) == (Amount(1000, 30), Amount())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"accounts": {}}, "has no accounts"),
        ({"shards": 2}, "There are 1 ledgers"),
        ({"typo": 1}, "typo"),
        ({"accounts": {"d0": {"tokens": 5, "cohort": "nowhere"}}}, "not named"),
    ],
)
async def test_a_file_that_is_wrong_changes_nothing(
    one: LedgerService, change: dict[str, Any], said: str
) -> None:
    before = await one.budgets()
    with pytest.raises(InvalidRequest, match=said):
        await one.apply({**file(1), **change}, "x", BY, soon())
    assert await one.budgets() == before
    assert (await one.state("d2"))[0].limit_tokens == 10_000


async def test_a_file_needs_who_and_why_and_a_trail(
    one: LedgerService, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidRequest, match="Say who"):
        await one.apply(file(1, 500), "", BY, soon())

    async def full(self: Any) -> None:
        raise AuditUnavailable

    monkeypatch.setattr(ledger_audit.LedgerAudit, "check", full)
    with pytest.raises(AuditUnavailable):
        await one.apply(file(1, 500), "x", BY, soon())
    assert (await one.state("d2"))[0].limit_tokens == 10_000


# The number of ledgers


async def test_another_number_of_ledgers_is_refused_with_the_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Ledgers(tmp_path, file(1))
    await first.shards().ready()
    await first.stop()
    kept_beside(tmp_path / "ledger.sqlite").unlink()  # as of an older build: the database knows
    again = Ledgers(tmp_path, file(2))
    with pytest.raises(LedgerUnavailable):
        await again.services[0].configure(dump(file(2)))
    assert "is one of 1 ledgers" in caplog.text
    assert "move the ledger folder" in caplog.text
    await again.services[0].configure(dump(file(1), built_us=2))
    assert len(await again.services[0].state()) == len(NAMES)
    await again.stop()


async def test_a_department_does_not_move_to_another_ledger(ledgers: Ledgers) -> None:
    shards = ledgers.shards()
    await shards.ready()
    found = tree()
    away = next(n for n in NAMES[2:] if found.shard(n) != found.shard("d0"))
    data = file()
    data["accounts"][away] |= {"cohort": "biz"}
    assert moved(found.config, BudgetsConfig.model_validate(data)) == [away]
    with pytest.raises(InvalidRequest, match=f"department {away} would be in another"):
        await shards.apply(data, "x", BY)
    near = next((n for n in NAMES[2:] if found.shard(n) == found.shard("d0")), None)
    assert near is not None
    data = file()
    data["accounts"][near] |= {"cohort": "biz"}
    await shards.apply(data, "x", BY)


def test_a_file_of_a_database_that_cannot_be_opened_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"no database, but long enough to be looked at" * 99)
    service = LedgerService(
        tmp_path / "ledger.sqlite", tmp_path / "wal", clock=now_us, monotonic=time.monotonic
    )
    with pytest.raises(LedgerStoreError):
        service._take_up(Budgets.load(dump(file(1))))
    assert not kept_beside(tmp_path / "ledger.sqlite").exists()


# Gateways follow


class Gateway:
    """Books of all ledgers, and the file that they work by."""

    def __init__(self, ledgers: Ledgers, built: dict[str, Any], built_us: int) -> None:
        self.shards = ledgers.shards(built, built_us)
        budgets = Budgets.load(dump(built, built_us))
        self.follower = BudgetsFollower(self.shards, budgets, self._follow)
        found = Tree(budgets.config)
        books = [self._book(shard, found) for shard in range(found.config.shards)]
        self.leases = ShardedLeases(books, found)

    def _book(self, shard: int, found: Tree) -> LeaseBook:
        async def renew(request: RenewRequest) -> RenewReply:
            reply = await self.shards.calls(shard).renew(request)
            self.follower.heard(shard, reply.digest)
            return reply

        return LeaseBook(
            book_id("gw-1", shard), renew, clock=now_us, monotonic=time.monotonic, tree=found
        )

    def _follow(self, budgets: Budgets) -> None:
        self.leases.tree = Tree(budgets.config)

    async def close(self) -> None:
        await self.leases.close()
        await self.follower.close()


async def test_gateways_and_ledgers_follow_within_two_seconds(ledgers: Ledgers) -> None:
    gateway = Gateway(ledgers, file(), 1)
    await gateway.shards.ready()
    gateway.leases.start()
    ledgers.links[2].down = True
    digest = await ledgers.shards().apply(file(tokens=500), "x", BY)
    ledgers.links[2].down = False
    applied_s = time.monotonic()
    while (
        gateway.leases.tree.config.digest != digest
        or ledgers.services[2]._ledger.config.digest != digest  # type: ignore[union-attr]
    ):
        assert time.monotonic() - applied_s < 10
        await asyncio.sleep(0.02)
    assert all(book.tree.config.digest == digest for book in gateway.leases.books)
    for service in ledgers.services:
        assert service._ledger is not None
        assert service._ledger.config.digest == digest
    await gateway.close()


async def test_a_gateway_of_an_older_build_works_by_the_file_that_holds(ledgers: Ledgers) -> None:
    await ledgers.shards(file(tokens=700), built_us=5).ready()
    gateway = Gateway(ledgers, file(), 1)
    await gateway.follower.refresh()
    assert gateway.leases.tree.config.accounts["d2"].tokens == 700
    assert gateway.shards.tree is not None
    assert gateway.shards.tree.config.accounts["d2"].tokens == 700


async def test_without_an_answer_a_gateway_goes_on_by_its_file(ledgers: Ledgers) -> None:
    gateway = Gateway(ledgers, file(), 1)
    ledgers.links[0].down = True
    await gateway.follower.refresh()
    assert gateway.leases.tree.config.accounts["d2"].tokens == 10_000


# Leases


async def test_requests_are_charged_where_their_account_lives(ledgers: Ledgers) -> None:
    gateway = Gateway(ledgers, file(), 1)
    await gateway.shards.ready()
    found = tree()
    for name in NAMES:
        hold = await gateway.leases.reserve(ask(name, 10))
        assert shard_of(hold.id) == found.shard(name)
        hold.settle(Usage(3, 4), 500)
    assert gateway.leases.stats.reservations == len(NAMES)
    assert {line.account for line in gateway.leases.lines} == set(NAMES)
    assert gateway.leases.age_s() < 10
    await gateway.close()
    states = await gateway.shards.state()
    assert [state.spent for state in states] == [Amount(500, 7)] * len(NAMES)


async def test_what_is_no_account_has_no_ledger(ledgers: Ledgers) -> None:
    gateway = Gateway(ledgers, file(), 1)
    await gateway.shards.ready()
    with pytest.raises(NoAccount):
        await gateway.leases.reserve(ask("no name", 10))
    assert gateway.leases.usage("no name") is None
    await gateway.close()


async def test_one_ledger_that_is_away_stops_its_own_accounts_only(ledgers: Ledgers) -> None:
    gateway = Gateway(ledgers, file(), 1)
    await gateway.shards.ready()
    ledgers.links[1].down = True
    found = tree()
    away = next(n for n in NAMES if found.shard(n) == 1)
    here = next(n for n in NAMES if found.shard(n) == 0)
    (await gateway.leases.reserve(ask(here, 10))).release()
    with pytest.raises(LedgerUnavailable):
        await gateway.leases.reserve(ask(away, 10))
    ledgers.links[1].down = False
    (await gateway.leases.reserve(ask(away, 10))).release()
    await gateway.close()


def test_as_many_books_as_ledgers() -> None:
    with pytest.raises(ValueError, match="0 books for 3"):
        ShardedLeases([], tree())


# Engines


class Exchange:
    """What a reporter needs of an exchange."""

    def __init__(self, key: int, reservation_id: str) -> None:
        self.key = key
        self.ticket = SimpleNamespace(reservation_id=reservation_id)
        self.submitted, self.changed, self.ended = 1, True, True

    def over(self, now_s: float) -> bool:
        return self.ended

    def row(self, now_s: float) -> Any:
        made = row(1, ended=self.ended)
        return replace(made, reservation_id=self.ticket.reservation_id, gateway_id="gw-1")


class Collector:
    base_model, lost_us, running, dead = "tiny", 0, 2, True
    totals = SimpleNamespace(
        busy_ns=9_000, attributed_ns=8_000, unattributed_ns=1_000, hooks_ns=1_000, running=2
    )

    def __init__(self, *ids: str) -> None:
        self.exchanges = {n: Exchange(n, name) for n, name in enumerate(ids)}
        self.on_left: Any = None

    def forget(self, exchange: Exchange) -> None:
        self.exchanges.pop(exchange.key, None)


async def test_an_engine_tells_each_ledger_its_own_and_the_first_its_meters() -> None:
    collector = Collector("rsv_gw-1_1", "rsv_gw-1.2_1", "rsv_gw-1.2_2")
    told: dict[int, list[MeterReport]] = {}
    down = {2}

    async def send(report: MeterReport, shard: int) -> None:
        if shard in down:
            raise LedgerUnavailable
        told.setdefault(shard, []).append(report)

    reporter = MeterReporter(
        collector,  # type: ignore[arg-type]
        send,
        replica_id="r",
        accelerator="cpu",
        devices=1,
    )
    assert not await reporter.report()
    assert [r.reservation_id for r in told[0][0].rows] == ["rsv_gw-1_1"]
    assert (told[0][0].busy_us, told[0][0].running, told[0][0].dead) == (9, 0, True)
    assert sorted(collector.exchanges) == [1, 2], "the first ledger has its row, and waits for none"
    down.clear()
    assert await reporter.report()
    (report,) = told[2]
    assert [(r.reservation_id, r.gateway_id) for r in report.rows] == [
        ("rsv_gw-1.2_1", "gw-1.2"),
        ("rsv_gw-1.2_2", "gw-1.2"),
    ]
    meters = (report.elapsed_us, report.busy_us, report.unattributed_us, report.running)
    assert meters == (0, 0, 0, 0)
    assert not report.dead
    assert not collector.exchanges
