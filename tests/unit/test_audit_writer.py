"""The writer: durable before it answers, fail closed, one chain."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from governance.audit.canonical import NO_HASH
from governance.audit.files import Locked, take_lock
from governance.audit.record import check_record
from governance.audit.room import Room
from governance.audit.segments import WalFault, read_records, read_segment, segment_files
from governance.audit.writer import WalOptions
from governance.errors import AuditUnavailable
from tests.unit.audit_kit import (
    SMALL,
    FailingFiles,
    event,
    io_error,
    no_space,
    open_writer,
    without_syncs,
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_syncs(monkeypatch)


def records(root: Path) -> list[dict[str, Any]]:
    def fault(fault: WalFault) -> None:
        raise AssertionError(fault)

    return list(read_records(root, fault))


class TestChain:
    async def test_concurrent_records_form_one_chain(self, tmp_path: Path) -> None:
        writer = open_writer(tmp_path, options=SMALL)
        ids = await asyncio.gather(*(writer.write(event("budget.set")) for _ in range(100)))
        await writer.close()
        found = records(tmp_path)
        assert [r["writer_seq"] for r in found] == list(range(1, 103))
        assert sorted(ids) == sorted(r["event_id"] for r in found[1:-1])
        leaf = NO_HASH
        for record in found:
            check_record(record)
            assert record["prev_hash"] == leaf
            leaf = record["leaf_hash"]
        assert found[0]["event_type"] == "writer.started"
        assert found[-1]["event_type"] == "writer.stopped"
        assert writer.stats.records == 102
        assert writer.stats.syncs < 102
        assert writer.stats.queued == 0

    async def test_the_order_of_one_caller_is_kept(self, tmp_path: Path) -> None:
        writer = open_writer(tmp_path)
        for index in range(20):
            writer.post(event("budget.set", request_id=str(index)))
        await writer.write(event("budget.set", request_id="20"))
        await writer.close()
        found = [r["request_id"] for r in records(tmp_path)[1:-1]]
        assert found == [str(index) for index in range(21)]

    async def test_a_bad_event_is_its_callers_alone(self, tmp_path: Path) -> None:
        writer = open_writer(tmp_path)
        with pytest.raises(ValueError, match="not columns"):
            await writer.write(event("budget.set", colour="red"))
        results = await asyncio.gather(
            writer.write(event("budget.set")),
            writer.write(event("budget.set", request_id="\ud800")),
            writer.write(event("budget.set")),
            return_exceptions=True,
        )
        assert [isinstance(result, ValueError) for result in results] == [False, True, False]
        await writer.close()
        assert [r["writer_seq"] for r in records(tmp_path)] == [1, 2, 3, 4]

    def test_the_next_start_has_the_next_epoch(self, tmp_path: Path) -> None:
        for epoch in (1, 2, 3):
            writer = open_writer(tmp_path)
            assert writer.epoch == epoch
            writer.close_blocking()
            for _epoch, _number, path in segment_files(tmp_path / "gw-1"):
                path.unlink()

    def test_one_process_at_a_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("governance.audit.wal._LOCK_WAIT_S", 0.05)
        writer = open_writer(tmp_path)
        with pytest.raises(Locked):
            open_writer(tmp_path)
        writer.close_blocking()
        open_writer(tmp_path).close_blocking()

    @pytest.mark.parametrize("writer_id", ["", ".", "..", "a/b", "../x", "a" * 65, "a b", "é"])
    def test_ids_that_are_no_names(self, tmp_path: Path, writer_id: str) -> None:
        with pytest.raises(ValueError, match="writer id"):
            open_writer(tmp_path, writer_id)
        assert list(tmp_path.iterdir()) == []

    async def test_close_twice_and_write_after(self, tmp_path: Path) -> None:
        writer = open_writer(tmp_path)
        await writer.close()
        await writer.close()
        with pytest.raises(AuditUnavailable):
            await writer.write(event())
        with pytest.raises(AuditUnavailable):
            writer.check_room()

    async def test_a_cancelled_caller_leaves_its_record(self, tmp_path: Path) -> None:
        writer = open_writer(tmp_path)
        task = asyncio.create_task(writer.write(event("budget.set", request_id="gone")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await writer.write(event("budget.set"))
        await writer.close()
        assert records(tmp_path)[1]["request_id"] == "gone"


class TestSegments:
    def test_all_but_the_last_are_closed_and_prepared_ones_removed(self, tmp_path: Path) -> None:
        writer = open_writer(tmp_path, options=SMALL)
        for _ in range(20):
            writer.write_blocking(event("budget.set"))
        writer.close_blocking()
        segments = [read_segment(path) for _e, _n, path in segment_files(tmp_path / "gw-1")]
        assert len(segments) > 3
        assert all(segment.end is not None for segment in segments)
        assert writer.stats.segments == len(segments) - 1

    def test_age_closes_a_segment_that_has_records(self, tmp_path: Path) -> None:
        writer = open_writer(tmp_path, options=WalOptions(segment_age_us=50_000))
        writer.write_blocking(event("budget.set"))
        deadline = time.monotonic() + 10
        while writer.stats.segments < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert writer.stats.segments == 1, "an empty segment is not closed"
        writer.close_blocking()

    def test_a_group_larger_than_a_segment(self, tmp_path: Path) -> None:
        writer = open_writer(tmp_path, options=SMALL)
        writer.write_blocking(event("budget.set", detail="x" * 3_000_000))
        writer.close_blocking()
        assert len(records(tmp_path)) == 3


class TestFailure:
    @pytest.mark.parametrize("operation", ["write", "sync"])
    @pytest.mark.parametrize("error", [io_error(), no_space()], ids=["EIO", "ENOSPC"])
    async def test_a_failed_write_or_sync_is_final(
        self, tmp_path: Path, operation: str, error: OSError
    ) -> None:
        files = FailingFiles()
        writer = open_writer(tmp_path, files=files)
        await writer.write(event("budget.set"))
        failed = []

        def fail_once(name: str, _index: int) -> BaseException | None:
            if name == operation and not failed:
                failed.append(name)
                return error
            return None

        files.fail = fail_once
        results = await asyncio.gather(
            *(writer.write(event("budget.set")) for _ in range(10)), return_exceptions=True
        )
        assert failed
        assert all(isinstance(result, AuditUnavailable) for result in results)
        assert writer.broken
        calls = len(files.calls)
        with pytest.raises(AuditUnavailable):
            await writer.write(event("budget.set"))
        with pytest.raises(AuditUnavailable):
            writer.post(event("budget.set"))
        with pytest.raises(AuditUnavailable):
            writer.check_room()
        assert "write" not in files.calls[calls:], "nothing is written or synced again"
        assert "sync" not in files.calls[calls:]
        await writer.close()
        assert writer.stats.last_error is not None
        assert writer.stats.last_error.startswith("OSError")

    async def test_what_gathered_behind_the_failure_is_not_written(self, tmp_path: Path) -> None:
        files = FailingFiles()
        writer = open_writer(tmp_path, files=files)
        reached, gate = threading.Event(), threading.Event()

        def fail(name: str, _index: int) -> BaseException | None:
            if name == "sync" and not reached.is_set():
                reached.set()
                gate.wait(10)
                return io_error()
            return None

        files.fail = fail
        first = asyncio.create_task(writer.write(event("budget.set")))
        await asyncio.to_thread(reached.wait, 10)
        behind = [asyncio.create_task(writer.write(event("budget.set"))) for _ in range(5)]
        await asyncio.sleep(0)
        calls = len(files.calls)
        gate.set()
        results = await asyncio.gather(first, *behind, return_exceptions=True)
        assert all(isinstance(result, AuditUnavailable) for result in results)
        await writer.close()
        assert not {"write", "sync"} & set(files.calls[calls:])

    def test_a_broken_writer_holds_its_lock_until_it_is_closed(self, tmp_path: Path) -> None:
        files = FailingFiles()
        writer = open_writer(tmp_path, files=files)
        files.fail = lambda name, _index: io_error() if name == "sync" else None
        with pytest.raises(AuditUnavailable):
            writer.write_blocking(event("budget.set"))
        deadline = time.monotonic() + 10
        while writer._thread._wal._descriptor >= 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert writer._thread._wal._descriptor == -1, "the segment is given up"
        lock = tmp_path / "gw-1" / "lock"
        with pytest.raises(Locked):
            take_lock(lock)
        writer.close_blocking()
        os.close(take_lock(lock))
        assert len(segment_files(tmp_path / "gw-1")) == 1, "what was made ahead is removed"

    async def test_a_condition_is_asked_behind_what_was_put_before(self, tmp_path: Path) -> None:
        files = FailingFiles()
        writer = open_writer(tmp_path, files=files, options=SMALL)
        lost: list[int] = []
        files.fail = lambda name, _index: no_space() if name == "zero" else None
        reached, gate = threading.Event(), threading.Event()

        def hold(name: str, _index: int) -> BaseException | None:
            if name == "sync" and not reached.is_set():
                reached.set()
                gate.wait(10)
            return no_space() if name == "zero" else None

        files.fail = hold
        first = asyncio.create_task(writer.write(event("budget.set")))
        await asyncio.to_thread(reached.wait, 10)
        writer.post(event("budget.set", detail="x" * 1_000_000), lost=lambda: lost.append(1))
        end = asyncio.create_task(
            writer.write(event("inference.completed"), unless=lambda: bool(lost))
        )
        await asyncio.sleep(0)
        gate.set()
        await first
        with pytest.raises(AuditUnavailable):
            await end
        assert lost == [1]
        await writer.close()
        assert "inference.completed" not in {r["event_type"] for r in records(tmp_path)}

    async def test_ends_have_places_of_their_own_in_the_queue(self, tmp_path: Path) -> None:
        files = FailingFiles()
        options = WalOptions(segment_age_us=10**12, queue_records=8, kept_for_ends=0.25)
        writer = open_writer(tmp_path, files=files, options=options)
        gate = threading.Event()

        def wait(name: str, _index: int) -> None:
            if name == "sync":
                gate.wait(10)

        files.fail = wait
        tasks = [asyncio.create_task(writer.write(event("budget.set"))) for _ in range(20)]
        tasks += [asyncio.create_task(writer.write(event("inference.completed"))) for _ in "123"]
        await asyncio.sleep(0.1)
        assert [task.done() for task in tasks[-3:]] == [False, False, True]
        gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(result, str) for result in results) == 6 + 2
        await writer.close()

    async def test_no_room_refuses_and_recovers(self, tmp_path: Path) -> None:
        files = FailingFiles()
        writer = open_writer(tmp_path, files=files, options=SMALL)
        full = True
        files.fail = lambda name, _index: no_space() if full and name == "zero" else None
        refused = 0
        for _ in range(30):
            try:
                await writer.write(event("budget.set", detail="x" * 2000))
            except AuditUnavailable:
                refused += 1
        assert refused
        assert not writer.broken
        full = False
        for _ in range(50):
            try:
                await writer.write(event("budget.set", request_id="after"))
                break
            except AuditUnavailable:
                await asyncio.sleep(0.01)
        await writer.close()
        found = records(tmp_path)
        assert [r["writer_seq"] for r in found] == list(range(1, len(found) + 1))
        assert found[-2]["request_id"] == "after"

    async def test_a_full_queue_refuses(self, tmp_path: Path) -> None:
        files = FailingFiles()
        writer = open_writer(
            tmp_path, files=files, options=WalOptions(segment_age_us=10**12, queue_records=4)
        )
        gate = threading.Event()

        def wait(name: str, _index: int) -> None:
            if name == "sync":
                gate.wait(10)

        files.fail = wait
        tasks = [asyncio.create_task(writer.write(event("budget.set"))) for _ in range(10)]
        await asyncio.sleep(0.1)
        refused = [task for task in tasks if task.done()]
        assert len(refused) == 6
        assert all(isinstance(task.exception(), AuditUnavailable) for task in refused)
        gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        await writer.close()
        assert len(records(tmp_path)) == 2 + 4

    async def test_posts_that_are_lost_are_told(self, tmp_path: Path) -> None:
        files = FailingFiles()
        writer = open_writer(tmp_path, files=files)
        files.fail = lambda name, _index: io_error() if name == "sync" else None
        lost = []
        writer.post(event("budget.set"), lost=lambda: lost.append(1))
        await writer.close()
        assert lost == [1]


class TestRoom:
    def statvfs(self, total: int, free: int) -> Any:
        def ask(_path: Path) -> os.statvfs_result:
            asked.append(1)
            return os.statvfs_result((4096, 4096, total // 4096, 0, free // 4096, 0, 0, 0, 0, 255))

        asked: list[int] = []
        ask.asked = asked  # type: ignore[attr-defined]
        return ask

    @pytest.mark.parametrize(
        ("total", "free", "enough"),
        [
            (100 << 30, 2 << 30, True),
            (100 << 30, 1 << 30, False),
            (10 << 30, 300 << 20, True),
            (10 << 30, 200 << 20, False),
            (1 << 30, 110 << 20, True),
            (1 << 30, 100 << 20, False),
        ],
    )
    def test_the_reserve(self, total: int, free: int, enough: bool) -> None:
        assert Room(Path("/"), statvfs=self.statvfs(total, free)).enough() is enough

    def test_asked_once_a_second(self) -> None:
        ask = self.statvfs(1 << 40, 1 << 39)
        now = [5.0]
        room = Room(Path("/"), monotonic=lambda: now[0], statvfs=ask)
        for _ in range(100):
            assert room.enough()
        assert len(ask.asked) == 1
        now[0] += 1
        room.enough()
        assert len(ask.asked) == 2

    async def test_ends_may_use_the_reserve(self, tmp_path: Path) -> None:
        writer = open_writer(tmp_path, options=WalOptions(reserve_bytes=1 << 62))
        with pytest.raises(AuditUnavailable):
            writer.check_room()
        await writer.write(event("inference.completed"))
        await writer.close()


CHILD = """
import sys, time
from pathlib import Path
from governance.audit.writer import AuditWriter, WalOptions
import threading
writer = AuditWriter.open(Path(sys.argv[1]), sys.argv[2], clock=lambda: time.time_ns() // 1000,
    options=WalOptions(segment_bytes=1 << 16, first_bytes=1 << 15))
lock = threading.Lock()
def work():
    while True:
        event_id = writer.write_blocking({"event_type": "budget.set", "ts_us": 1})
        with lock:
            sys.stdout.write(event_id + "\\n")
            sys.stdout.flush()
for _ in range(8):
    threading.Thread(target=work).start()
threading.Event().wait()
"""


@pytest.mark.parametrize("count", [1, 7, 40, 150])
def test_a_killed_process_has_every_acknowledged_record(tmp_path: Path, count: int) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path), "gw-1"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert child.stdout is not None
    seen = [child.stdout.readline().strip() for _ in range(count)]
    child.kill()
    rest = child.stdout.read().split("\n")[:-1]
    child.wait()
    child.stdout.close()
    acknowledged = [*seen, *rest]
    found = records(tmp_path)
    ids = [record["event_id"] for record in found]
    assert all(acknowledged)
    assert len(set(ids)) == len(ids)
    assert set(acknowledged) <= set(ids)
    assert len(ids) - len(acknowledged) <= 1 + 8, "no more than was in flight"
    assert [record["writer_seq"] for record in found] == list(range(1, len(found) + 1))
    # The next start goes on under the next epoch.
    writer = open_writer(tmp_path)
    assert writer.epoch == 2
    writer.close_blocking()
