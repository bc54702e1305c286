"""From the core's datagrams to reports: what arrives late, twice, never, or from nobody we know."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from deployments.data_plane.ticket_form import Ticket
from deployments.metering import collector as collecting
from deployments.metering import exchange as exchanging
from deployments.metering.channel import MeterChannel
from deployments.metering.collector import MeterCollector
from deployments.metering.exchange import MeteredExchange
from deployments.metering.reporter import MeterReporter
from deployments.metering.wire import MAX_ROWS, Row, Totals, pack, pack_row, unpack
from governance.budget.messages import MeterReport
from governance.errors import GatehouseError, InternalError, InvalidRequest, LedgerUnavailable

CORE = b"core-one"


def ticket(number: int = 1) -> Ticket:
    return Ticket(
        "gw-1", "small-lora", "chat", f"r-{number}", "d", f"v-{number}", "p", "hr", 0, 64, None, 0,
        number.to_bytes(16, "big"), bytes(32), account="hr/recruiting",
    )  # fmt: skip


def row(key: int, prefill_us: int, decode_us: int = 0, *, row: int = 1, ended: bool = False) -> Row:
    return Row(row, key, prefill_us * 1000, decode_us * 1000, 10, 3, ended)


class Core:
    """The far end, with datagrams by hand."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._path = path
        self._steps = 0

    def tell(self, *rows: Row, core: bytes = CORE, busy_us: int = 0, lost_us: int = 0) -> None:
        self._steps += 1
        totals = Totals(
            core,
            self._steps,
            (busy_us + lost_us) * 1000,
            busy_us * 1000,
            lost_us * 1000,
            0,
            0,
            1,
        )
        self.say(pack(totals, [pack_row(row) for row in rows]))

    def say(self, datagram: bytes) -> None:
        self._socket.sendto(datagram, self._path)

    def close(self) -> None:
        self._socket.close()


@pytest_asyncio.fixture
async def meter() -> AsyncIterator[MeterCollector]:
    collector = MeterCollector("small")
    collector.start()
    yield collector
    collector.close()


@pytest_asyncio.fixture
async def core(meter: MeterCollector) -> AsyncIterator[Core]:
    far = Core(meter.path)
    yield far
    far.close()


def opened(meter: MeterCollector, submitted: int = 1, number: int = 1) -> MeteredExchange:
    exchange = meter.open(ticket(number))
    exchange.submitted = submitted
    return exchange


def finish(exchange: MeteredExchange, *, delivered: bool = True) -> None:
    exchange.finished = True
    exchange.close()
    if delivered:
        exchange.deliver()


class Ledger:
    """Takes reports, or not."""

    def __init__(self) -> None:
        self.up = True
        self.reports: list[MeterReport] = []
        self.refused: list[MeterReport] = []

    async def report(self, report: MeterReport, shard: int = 0) -> None:
        await asyncio.sleep(0)
        if not self.up:
            self.refused.append(report)
            raise LedgerUnavailable
        self.reports.append(report)

    @property
    def rows(self) -> list[Any]:
        return [row for report in self.reports for row in report.rows]


def reporter_of(meter: MeterCollector, ledger: Ledger, **options: Any) -> MeterReporter:
    return MeterReporter(
        meter, ledger.report, replica_id="e-1", accelerator="H100", devices=2, **options
    )


# -- datagrams --------------------------------------------------------------------------------


def test_datagrams_survive() -> None:
    totals = Totals(CORE, 1, 2**63, 3, 4, 5, 6, 7)
    rows = [Row(1, 2, 2**63, 4, 5, 6, True), Row(2, 2, 0, 0, 0, 0, False)]
    assert unpack(pack(totals, [pack_row(row) for row in rows])) == (totals, rows)
    assert unpack(pack(totals, [])) == (totals, [])


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"x", lambda d: d[:10]])
def test_a_datagram_of_another_length_is_foreign(change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ValueError, match=r"short|length"):
        unpack(change(pack(Totals(CORE), [pack_row(row(1, 1))])))


async def test_only_the_owner_may_send(meter: MeterCollector) -> None:
    assert stat.S_IMODE(os.stat(os.path.dirname(meter.path)).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(meter.path).st_mode) == 0o600


async def test_the_socket_goes_with_the_collector() -> None:
    collector = MeterCollector("small")
    collector.start()
    collector.close()
    assert not collector._directory.exists()


async def test_nonsense_is_counted_and_skipped(meter: MeterCollector, core: Core) -> None:
    exchange = opened(meter)
    core.say(b"nonsense")
    core.say(b"")
    core.tell(row(99, 5), row(exchange.key, 7))
    meter.drain()
    assert meter.foreign == 2
    assert exchange.total_us == 7


# -- figures ----------------------------------------------------------------------------------


async def test_rows_of_choices_and_cores_add_up(meter: MeterCollector, core: Core) -> None:
    exchange = opened(meter, 3)
    core.tell(row(exchange.key, 5, 1), row(exchange.key, 7, row=2))
    core.tell(row(exchange.key, 100), core=b"core-two")
    meter.drain()
    assert exchange.total_us == 113
    assert exchange.prefill_ns == 112_000


async def test_an_old_or_repeated_figure_changes_nothing(meter: MeterCollector, core: Core) -> None:
    exchange = opened(meter, 2)
    for told in (row(exchange.key, 5, 5), row(exchange.key, 5, 2), row(exchange.key, 5, 5)):
        core.tell(told)
    core.tell(row(exchange.key, 5, 9, ended=True))
    core.tell(row(exchange.key, 5, 9, ended=True))
    core.tell(row(exchange.key, 5, 99))
    meter.drain()
    assert exchange.total_us == 14
    assert exchange.ended_requests == 1


async def test_old_totals_do_not_replace_new_ones(meter: MeterCollector, core: Core) -> None:
    core.tell(busy_us=10)
    core.tell(busy_us=20)
    core._steps = 0
    core.tell(busy_us=5)
    meter.drain()
    assert meter.totals.busy_ns == 20_000


async def test_progress_gives_tokens_once(meter: MeterCollector, core: Core) -> None:
    exchange = opened(meter)
    exchange.answer_tokens += 3
    assert exchange.progress() == (3, 0)
    core.tell(row(exchange.key, 5, 1))
    meter.drain()
    assert exchange.progress() == (0, 6)


async def test_the_final_figure_is_there_without_waiting(meter: MeterCollector, core: Core) -> None:
    exchange = opened(meter, 2)
    core.tell(row(exchange.key, 5, 5, ended=True), row(exchange.key, 1, row=2, ended=True))
    # NOTE: no turn of the loop between: the datagram is read from the socket.
    assert await asyncio.wait_for(exchange.final(10), 0.05) == 11


async def test_the_final_figure_is_waited_for(meter: MeterCollector, core: Core) -> None:
    exchange = opened(meter)
    core.tell(row(exchange.key, 5))
    asyncio.get_running_loop().call_later(0.05, core.tell, row(exchange.key, 5, 2, ended=True))
    assert await exchange.final(5) == 7


async def test_what_is_known_after_the_wait(meter: MeterCollector, core: Core) -> None:
    exchange, silent = opened(meter), opened(meter, number=2)
    core.tell(row(exchange.key, 5))
    assert await exchange.final(0.01) == 5
    assert await silent.final(0.01) is None


async def test_a_dead_core_is_not_waited_for(meter: MeterCollector, core: Core) -> None:
    exchange = opened(meter)
    core.tell(row(exchange.key, 5))
    waiting = asyncio.create_task(exchange.final(30))
    await asyncio.sleep(0.02)
    meter.core_died()
    assert await asyncio.wait_for(waiting, 1) == 5
    assert await asyncio.wait_for(exchange.final(30), 1) == 5


# -- the channel ------------------------------------------------------------------------------


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_what_a_full_queue_refused_arrives_later() -> None:
    collector = MeterCollector("small")  # not reading yet
    channel = MeterChannel(collector.path)
    exchange = opened(collector, 5000)
    try:
        for number in range(1, 5001):
            told = Row(number, exchange.key, 1000, 0, 1, 0, True)
            channel.send(Totals(CORE, number), [(number, pack_row(told))])
        assert channel.refused
        collector.start()
        await until(lambda: exchange.complete)
        assert exchange.total_us == 5000
        assert channel.dropped == 0
    finally:
        channel.close()
        collector.close()


async def test_many_rows_go_in_several_datagrams(meter: MeterCollector) -> None:
    channel = MeterChannel(meter.path)
    exchange = opened(meter, 3 * MAX_ROWS)
    rows = [Row(n, exchange.key, 1000, 0, 1, 0, True) for n in range(3 * MAX_ROWS)]
    channel.send(Totals(CORE, 1), [(told.row, pack_row(told)) for told in rows])
    await until(lambda: exchange.complete)
    assert exchange.total_us == 3 * MAX_ROWS
    channel.close()


async def test_a_replica_that_is_gone_does_not_hold_the_core() -> None:
    channel = MeterChannel("/nonexistent/socket")
    channel.send(Totals(CORE, 1), [(1, pack_row(row(1, 1)))])
    channel.send(Totals(CORE, 2), [(1, pack_row(row(1, 2)))])
    assert channel.refused >= 2
    assert len(channel._pending) == 1
    channel.close()


# -- reports ----------------------------------------------------------------------------------


async def test_a_report_says_who_and_how_much(meter: MeterCollector, core: Core) -> None:
    ledger = Ledger()
    reporter = reporter_of(meter, ledger)
    exchange = opened(meter)
    exchange.prompt_tokens, exchange.answer_tokens = 13, 4
    core.tell(row(exchange.key, 5, 2), busy_us=7, lost_us=3)
    meter.drain()

    assert await reporter.report()

    (report,) = ledger.reports
    assert (report.replica_id, report.base_model, report.accelerator) == ("e-1", "small", "H100")
    assert (report.seq, report.devices, report.running, report.dead) == (1, 2, 1, False)
    assert (report.busy_us, report.attributed_us, report.unattributed_us) == (10, 7, 3)
    (told,) = report.rows
    assert (told.reservation_id, told.request_id, told.gateway_id) == ("v-1", "r-1", "gw-1")
    assert (told.account, told.model, told.base_model) == ("hr/recruiting", "small-lora", "small")
    assert (told.gpu_us, told.prefill_us, told.decode_us) == (7, 5, 2)
    assert (told.prefill_tokens, told.cached_tokens) == (10, 3)
    assert (told.prompt_tokens, told.decode_tokens) == (13, 4)
    assert (told.ended, told.delivered) == (False, False)


async def test_only_what_changed_is_told_and_the_end_once(
    meter: MeterCollector, core: Core
) -> None:
    ledger = Ledger()
    reporter = reporter_of(meter, ledger)
    exchange = opened(meter)
    core.tell(row(exchange.key, 5), busy_us=5)
    meter.drain()
    await reporter.report()
    await reporter.report()
    assert len(ledger.reports) == 1

    core.tell(row(exchange.key, 5, 5, ended=True), busy_us=10)
    meter.drain()
    finish(exchange)
    await reporter.report()
    await reporter.report()

    assert [(r.gpu_us, r.ended, r.delivered) for r in ledger.rows] == [
        (5, False, False),
        (10, True, True),
    ]
    assert not meter.exchanges
    assert not meter._by_ticket


async def test_a_heartbeat_comes_without_news(meter: MeterCollector) -> None:
    now = 0.0
    ledger = Ledger()
    reporter = reporter_of(meter, ledger, monotonic=lambda: now)
    await reporter.report()
    now = 1.9
    await reporter.report()
    assert len(ledger.reports) == 1
    now = 2.0
    await reporter.report()
    assert [report.seq for report in ledger.reports] == [1, 2]
    assert ledger.reports[1].elapsed_us == 4_000_000


async def test_what_was_not_taken_is_told_again(meter: MeterCollector, core: Core) -> None:
    ledger = Ledger()
    reporter = reporter_of(meter, ledger)
    exchange = opened(meter)
    core.tell(row(exchange.key, 5, ended=True), busy_us=5)
    meter.drain()
    finish(exchange)
    ledger.up = False
    assert not await reporter.report()
    assert not await reporter.report()
    assert meter.exchanges
    ledger.up = True
    assert await reporter.report()

    assert [r.gpu_us for r in ledger.rows] == [5]
    assert [r.seq for r in (*ledger.refused, *ledger.reports)] == [1, 2, 3]
    assert not meter.exchanges


async def test_a_row_that_changes_while_it_travels_is_told_again(
    meter: MeterCollector, core: Core
) -> None:
    ledger = Ledger()
    reporter = reporter_of(meter, ledger)
    exchange = opened(meter)
    core.tell(row(exchange.key, 5, ended=True))
    meter.drain()
    finish(exchange, delivered=False)
    sending = asyncio.create_task(reporter.report())
    await asyncio.sleep(0)
    meter.delivered(ticket())
    await sending
    await reporter.report()
    assert [r.delivered for r in ledger.rows] == [False, True]


async def test_an_end_that_nobody_heard_is_told_at_once(meter: MeterCollector, core: Core) -> None:
    ledger = Ledger()
    reporter = reporter_of(meter, ledger)
    reporter.start()
    exchange = opened(meter)
    await until(lambda: bool(ledger.reports))
    core.tell(row(exchange.key, 5))
    exchange.close()
    core.tell(row(exchange.key, 5, 1, ended=True))
    started = asyncio.get_running_loop().time()
    await until(lambda: any(r.ended for r in ledger.rows))
    assert asyncio.get_running_loop().time() - started < 0.4
    assert [r.gpu_us for r in ledger.rows if r.ended] == [6]
    await reporter.stop()


async def test_an_end_that_the_core_never_tells_ends_all_the_same(
    meter: MeterCollector, core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchanging, "GRACE_S", 0.0)
    ledger = Ledger()
    reporter = reporter_of(meter, ledger)
    exchange = opened(meter, 2)
    core.tell(row(exchange.key, 5, ended=True))
    meter.drain()
    exchange.close()
    for _ in range(exchanging.GRACE_STEPS):
        await asyncio.sleep(0.01)
        meter.drain()
        await reporter.report()
        assert not any(r.ended for r in ledger.rows)
        core.tell()
    await asyncio.sleep(0.01)
    meter.drain()
    await reporter.report()
    assert [r.ended for r in ledger.rows][-1]
    assert not meter.exchanges


async def test_who_hangs_up_in_a_long_step_pays_for_it(
    meter: MeterCollector, core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchanging, "GRACE_S", 0.0)
    ledger = Ledger()
    reporter = reporter_of(meter, ledger)
    exchange = opened(meter)
    exchange.close()
    await asyncio.sleep(0.01)
    await reporter.report()  # the step is not over, and nothing has been told of it
    assert exchange.key in meter.exchanges
    core.tell(row(exchange.key, 7_000_000, ended=True))
    meter.drain()
    await reporter.report()
    assert (ledger.rows[-1].ended, ledger.rows[-1].gpu_us) == (True, 7_000_000)
    assert not meter.exchanges


async def test_a_core_that_never_steps_again_is_not_waited_for_for_ever(
    meter: MeterCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = opened(meter)
    exchange.close()
    assert exchange.closed_at_s is not None
    assert not exchange.over(exchange.closed_at_s + exchanging.LONGEST_S - 1)
    assert exchange.over(exchange.closed_at_s + exchanging.LONGEST_S + 1)


async def test_a_refused_request_is_forgotten(meter: MeterCollector) -> None:
    ledger = Ledger()
    exchange = opened(meter, 0)
    exchange.close()
    exchange.close()
    await reporter_of(meter, ledger).report()
    assert not meter.exchanges
    assert not ledger.rows


async def test_a_dead_core_is_reported_with_a_bound(meter: MeterCollector, core: Core) -> None:
    ledger = Ledger()
    reporter = reporter_of(meter, ledger)
    running, ended = opened(meter), opened(meter, number=2)
    core.tell(row(running.key, 5), row(ended.key, 9, row=2, ended=True), busy_us=14)
    meter.drain()
    finish(ended)
    await asyncio.sleep(0.05)
    meter.core_died()
    meter.core_died()
    running.close()
    await reporter.report()

    report = ledger.reports[-1]
    assert report.dead
    assert report.running == 0
    assert 2 * 50_000 <= report.unattributed_us < 2 * 2_000_000
    assert {r.request_id: (r.gpu_us, r.ended) for r in report.rows} == {
        "r-1": (5, True),
        "r-2": (9, True),
    }


async def test_an_idle_core_that_dies_has_lost_nothing(meter: MeterCollector, core: Core) -> None:
    ledger = Ledger()
    exchange = opened(meter)
    core.tell(row(exchange.key, 5, ended=True), busy_us=5)
    meter.drain()
    finish(exchange)
    await asyncio.sleep(0.02)
    meter.core_died()
    await reporter_of(meter, ledger).report()
    assert ledger.reports[-1].unattributed_us == 0


async def test_memory_is_bounded_while_the_ledger_is_away(
    meter: MeterCollector, core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "MAX_EXCHANGES", 10)
    alive = opened(meter, number=999)
    for number in range(1, 50):
        finish(opened(meter, number=number))
    assert len(meter.exchanges) <= 10
    assert meter.given_up >= 40
    assert alive.key in meter.exchanges


async def test_many_rows_go_in_several_reports(meter: MeterCollector, core: Core) -> None:
    ledger = Ledger()
    for number in range(5000):
        finish(opened(meter, number=number))
    meter.dead = True
    await reporter_of(meter, ledger).report()
    assert len(ledger.rows) == 5000
    assert max(len(report.rows) for report in ledger.reports) <= 2048
    assert not meter.exchanges


async def test_stopping_tells_the_rest(meter: MeterCollector, core: Core) -> None:
    ledger = Ledger()
    reporter = reporter_of(meter, ledger)
    reporter.start()
    exchange = opened(meter)
    core.tell(row(exchange.key, 5, ended=True))
    finish(exchange)
    await reporter.stop()
    assert [r.gpu_us for r in ledger.rows if r.ended] == [5]


# -- rejections -------------------------------------------------------------------------------


class Strict(Ledger):
    """Rejects what names one of some reservations."""

    def __init__(self, *bad: str) -> None:
        super().__init__()
        self.bad = set(bad)
        self.error: type[GatehouseError] = InvalidRequest

    async def report(self, report: MeterReport, shard: int = 0) -> None:
        if self.bad & {row.reservation_id for row in report.rows}:
            self.refused.append(report)
            raise self.error("no")
        await super().report(report, shard)


@pytest.mark.parametrize("error", [InvalidRequest, InternalError])
@pytest.mark.parametrize("bad", [[0], [57], [3, 40, 99]])
async def test_a_row_that_is_rejected_holds_no_other_up(
    meter: MeterCollector,
    caplog: pytest.LogCaptureFixture,
    bad: list[int],
    error: type[GatehouseError],
) -> None:
    for number in range(100):
        finish(opened(meter, number=number))
    meter.dead = True
    ids = [x.ticket.reservation_id for x in meter.exchanges.values()]
    ledger = Strict(*(ids[number] for number in bad))
    ledger.error = error
    reporter = reporter_of(meter, ledger)
    assert await reporter.report()
    assert {r.reservation_id for r in ledger.rows} == set(ids) - ledger.bad
    assert reporter.given_up == len(bad)
    assert len(ledger.refused) < 12 * len(bad)
    for name in ledger.bad:
        assert name in caplog.text
    assert await reporter.report(force=True)
    assert not meter.exchanges


async def test_an_answer_whose_row_is_rejected_runs_on(meter: MeterCollector, core: Core) -> None:
    exchange = opened(meter)
    ledger = Strict(exchange.ticket.reservation_id)
    reporter = reporter_of(meter, ledger)
    assert await reporter.report()
    core.tell(row(exchange.key, 8, ended=True))
    assert await exchange.final() == 8
    assert await reporter.report()
    finish(exchange)
    assert await reporter.report()
    assert not meter.exchanges


async def test_a_report_that_is_rejected_without_rows_gives_none_up(meter: MeterCollector) -> None:
    class Never(Ledger):
        async def report(self, report: MeterReport, shard: int = 0) -> None:
            raise InternalError

    for number in range(5):
        finish(opened(meter, number=number))
    reporter = reporter_of(meter, Never())
    for _ in range(3):
        assert not await reporter.report()
    assert len(meter.exchanges) == 5
    assert reporter.given_up == 0


async def test_what_its_gateway_settles_is_given_up_first(
    meter: MeterCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "MAX_EXCHANGES", 4)
    owing = [opened(meter, number=number) for number in (1, 2)]
    settling = [opened(meter, number=number) for number in (3, 4)]
    for exchange in owing:
        finish(exchange, delivered=False)
    settling[0].deliver()  # before its end
    settling[0].close()
    finish(settling[1])
    opened(meter, number=5)
    assert settling[0].key not in meter.exchanges
    owing[0].deliver()  # late
    opened(meter, number=6)
    opened(meter, number=7)
    assert set(meter.exchanges) == {2, 5, 6, 7}
    assert not meter._settling
    assert list(meter._owing) == [2]


async def test_giving_up_looks_at_no_more_than_one(
    meter: MeterCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = 0

    class Counting(dict[int, MeteredExchange]):
        def values(self) -> Any:
            nonlocal seen
            seen += 1
            return super().values()

    monkeypatch.setattr(collecting, "MAX_EXCHANGES", 500)
    for number in range(500):
        finish(opened(meter, number=number), delivered=False)
    meter.exchanges = Counting(meter.exchanges)
    for number in range(500, 600):
        opened(meter, number=number)
    assert (meter.given_up, seen) == (100, 0)
