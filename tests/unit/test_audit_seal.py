"""Sealing: what is sealed is what was written, once, whatever dies when; and damage is shouted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from governance.audit.batch import check_segment
from governance.audit.canonical import canonical_bytes, complete
from governance.audit.content import joined_commit, seal_cell
from governance.audit.cursor import CURSOR_NAME
from governance.audit.exchanges import aborted_id
from governance.audit.files import Locked
from governance.audit.frames import FrameType, SegmentHeader, pack_frame, pack_group
from governance.audit.keystore import FileKeystore, KeyScope
from governance.audit.seal import Sealer, SealReport
from governance.audit.segments import read_segment, segment_files
from governance.audit.writer import AuditWriter
from tests.unit.audit_kit import (
    SMALL,
    FailingFiles,
    Killed,
    event,
    io_error,
    manifests,
    now_us,
    open_writer,
    sealed_cells,
    sealed_records,
    without_syncs,
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_syncs(monkeypatch)


@pytest.fixture
def wal(tmp_path: Path) -> Path:
    return tmp_path / "wal"


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    return tmp_path / "evidence"


def seal(wal: Path, evidence: Path, **more: Any) -> SealReport:
    """One round by a sealer that then dies."""
    sealer = Sealer(wal, evidence, now_us, **more)
    try:
        return sealer.seal_once()
    finally:
        die(sealer)


def die(sealer: Sealer) -> None:
    """As a killed process does: locks go, nothing else happens."""
    if sealer._writer is not None:
        kill(sealer._writer)
        sealer._writer = None
    os.close(sealer._lock)


def kill(writer: AuditWriter) -> None:
    """Let the log's lock go without an end, as a killed process does."""
    writer._thread.fail(Killed())
    writer.close_blocking()


def fill(writer: AuditWriter, count: int, **values: Any) -> list[str]:
    return [writer.write_blocking(event("budget.set", **values)) for _ in range(count)]


class TestLiving:
    def test_closed_segments_are_sealed_and_the_current_one_is_left(
        self, wal: Path, evidence: Path
    ) -> None:
        writer = open_writer(wal, options=SMALL)
        ids = fill(writer, 21)
        report = seal(wal, evidence)
        assert report.segments >= 2
        assert not report.faults
        assert not report.adopted
        sealed = [r["event_id"] for r in sealed_records(evidence)]
        assert sealed[1:] == ids[: len(sealed) - 1]
        assert len(sealed) == report.records < 22
        writer.close_blocking()
        report = seal(wal, evidence)
        assert report.adopted == ["gw-1"]
        records = sealed_records(evidence)
        assert [r["event_id"] for r in records[1:-1]] == ids
        assert [r["event_type"] for r in records[:: len(records) - 1]] == [
            "writer.started",
            "writer.stopped",
        ]
        assert list(wal.iterdir()) == [wal / "sealer.lock"]

    def test_manifests_chain(self, wal: Path, evidence: Path) -> None:
        writer = open_writer(wal, options=SMALL)
        fill(writer, 30)
        writer.close_blocking()
        seal(wal, evidence)
        previous = None
        folder = evidence / "audit" / "manifests" / "gw-1"
        assert len(list(folder.iterdir())) >= 3
        for path in sorted(folder.iterdir()):
            data = path.read_bytes()
            manifest = json.loads(data)
            assert manifest["previous"] == previous
            previous = sha256(data).hexdigest()
            for file in manifest["files"]:
                content = (evidence / file["path"]).read_bytes()
                assert sha256(content).hexdigest() == file["sha256"]

    def test_records_are_filed_by_day_and_sorted_by_department(
        self, wal: Path, evidence: Path
    ) -> None:
        writer = open_writer(wal)
        day = 86_400_000_000
        for department, ts_us in (("b", day), ("a", day), (None, day), ("a", 3 * day - 1)):
            writer.write_blocking(event("budget.set", department=department, ts_us=ts_us))
        writer.close_blocking()
        seal(wal, evidence)
        files = sorted((evidence / "audit").rglob("*.parquet"))
        assert [f.parent.name for f in files][:2] == ["dt=1970-01-02", "dt=1970-01-03"]
        table = pq.ParquetFile(files[0]).read()
        assert table.column("department").to_pylist() == ["a", "b", None]
        assert files[0].name == "gw-1-1-1-6.parquet"

    def test_two_sealers_exclude_each_other(self, wal: Path, evidence: Path) -> None:
        first = Sealer(wal, evidence, now_us)
        with pytest.raises(Locked):
            Sealer(wal, evidence, now_us)
        first.close()
        Sealer(wal, evidence, now_us).close()


class TestDead:
    def test_open_requests_get_an_end_once(self, wal: Path, evidence: Path) -> None:
        writer = open_writer(wal)
        ended = writer.write_blocking(event(request_id="r-0"))
        writer.write_blocking(event("inference.completed", parent_event_id=ended))
        open_id = writer.write_blocking(
            event(request_id="r-1", subject_key="k", roles=["a"], prompt_bytes=3, reserved_us=7)
        )
        kill(writer)
        report = seal(wal, evidence)
        assert report.aborted == 1
        assert not (wal / "gw-1").exists()
        for _ in range(3):
            assert seal(wal, evidence).aborted == 0
        ends = [r for r in sealed_records(evidence) if r["event_type"] == "inference.aborted"]
        assert len(ends) == 1
        end = ends[0]
        assert end["event_id"] == aborted_id(open_id)
        assert end["parent_event_id"] == open_id
        assert end["request_id"] == "r-1"
        assert end["subject_key"] == "k"
        assert end["roles"] == ["a"]
        assert end["outcome"] == "aborted"
        assert end["status"] == 500
        assert end["writer_id"].startswith("sealer-")
        assert end["reserved_us"] == 7

    def test_decided_long_before_the_death(self, wal: Path, evidence: Path) -> None:
        writer = open_writer(wal, options=SMALL)
        open_id = writer.write_blocking(event(request_id="r"))
        fill(writer, 20)
        assert seal(wal, evidence).segments >= 2
        fill(writer, 20)
        assert seal(wal, evidence).segments >= 2
        kill(writer)
        assert seal(wal, evidence).aborted == 1
        seal(wal, evidence)
        ends = [r for r in sealed_records(evidence) if r["event_type"] == "inference.aborted"]
        assert [r["parent_event_id"] for r in ends] == [open_id]

    def test_the_answer_found_is_committed_to(
        self, wal: Path, evidence: Path, tmp_path: Path
    ) -> None:
        key = FileKeystore(tmp_path / "keys", clock=now_us).data_key(KeyScope("hr", "s", "2026-01"))
        writer = open_writer(wal, options=SMALL)
        open_id = writer.write_blocking(event())
        cells = [
            seal_cell(
                key,
                event_id=open_id,
                kind="output",
                part=part,
                media="text/event-stream",
                content=b"piece",
                ts_us=now_us(),
                random_bytes=os.urandom,
            )
            for part in range(3)
        ]
        writer.post(None, cells[:1])
        fill(writer, 20)
        assert seal(wal, evidence).cells == 1
        writer.post(None, cells[1:])
        fill(writer, 1)
        kill(writer)
        seal(wal, evidence)
        seal(wal, evidence)
        (end,) = [r for r in sealed_records(evidence) if r["event_type"] == "inference.aborted"]
        assert end["response_commit"] == joined_commit(cell.commit for cell in cells)
        assert end["response_bytes"] == 15
        assert sealed_cells(evidence) == cells

    def test_an_earlier_process_under_the_same_name(self, wal: Path, evidence: Path) -> None:
        first = open_writer(wal)
        open_id = first.write_blocking(event())
        kill(first)
        second = open_writer(wal, options=SMALL)
        assert second.epoch == 2
        fill(second, 20)
        report = seal(wal, evidence)
        assert not report.faults
        assert report.aborted == 1
        second.close_blocking()
        seal(wal, evidence)
        seal(wal, evidence)
        records = sealed_records(evidence)
        assert sum(r["event_type"] == "inference.aborted" for r in records) == 1
        assert sum(r["event_id"] == open_id for r in records) == 1
        assert [r["writer_epoch"] for r in records if r["event_type"] == "writer.started"][:2] == [
            1,
            2,
        ]

    def test_a_torn_tail_is_reported_and_nothing_before_it_lost(
        self, wal: Path, evidence: Path
    ) -> None:
        writer = open_writer(wal)
        ids = fill(writer, 5)
        kill(writer)
        ((_e, _n, path),) = segment_files(wal / "gw-1")[:1]
        data = path.read_bytes().rstrip(b"\0")
        path.write_bytes(data + data[300:400])
        report = seal(wal, evidence)
        assert report.torn_bytes == 100
        assert not report.faults
        assert [r["event_id"] for r in sealed_records(evidence, "gw-1")][1:] == ids
        assert manifests(evidence, "gw-1")[0]["torn_bytes"] == 100

    def test_a_folder_without_a_record_is_removed(self, wal: Path, evidence: Path) -> None:
        (wal / "gw-9").mkdir(parents=True)
        assert seal(wal, evidence).adopted == ["gw-9"]
        assert not (wal / "gw-9").exists()


class TestAttacks:
    def closed(self, wal: Path) -> list[Path]:
        writer = open_writer(wal, options=SMALL)
        fill(writer, 20)
        writer.close_blocking()
        return [path for _e, _n, path in segment_files(wal / "gw-1")]

    def refuses(self, wal: Path, evidence: Path, kept: Path, words: str) -> None:
        for _ in range(2):
            report = seal(wal, evidence)
            assert any(words in fault.reason for fault in report.faults), report.faults
            assert report.lag_us > 0
        assert kept.exists()
        sealed_records(evidence)

    def test_a_changed_byte(self, wal: Path, evidence: Path) -> None:
        paths = self.closed(wal)
        data = bytearray(paths[1].read_bytes())
        data[600] ^= 1
        paths[1].write_bytes(data)
        self.refuses(wal, evidence, paths[1], "damaged")
        assert paths[2].exists()

    def test_a_missing_segment(self, wal: Path, evidence: Path) -> None:
        paths = self.closed(wal)
        paths[1].unlink()
        self.refuses(wal, evidence, paths[2], "missing before it")

    def test_a_missing_first_segment(self, wal: Path, evidence: Path) -> None:
        paths = self.closed(wal)
        paths[0].unlink()
        self.refuses(wal, evidence, paths[1], "missing before it")

    def test_a_segment_cut_off(self, wal: Path, evidence: Path) -> None:
        paths = self.closed(wal)
        paths[0].write_bytes(paths[0].read_bytes()[:700])
        self.refuses(wal, evidence, paths[0], "never closed")

    def test_segments_swapped(self, wal: Path, evidence: Path) -> None:
        paths = self.closed(wal)
        first, second = paths[0].read_bytes(), paths[1].read_bytes()
        paths[0].write_bytes(second)
        paths[1].write_bytes(first)
        self.refuses(wal, evidence, paths[0], "missing before it")

    def test_another_writers_segment(self, wal: Path, evidence: Path) -> None:
        paths = self.closed(wal)
        (wal / "gw-2").mkdir()
        shutil.copy(paths[0], wal / "gw-2" / paths[0].name)
        report = seal(wal, evidence)
        assert any("not a segment of this writer" in fault.reason for fault in report.faults)

    def rewrite(self, path: Path, change: Any) -> None:
        """Write a segment anew with sound checksums: an attacker with the file can do that."""
        segment = read_segment(path)
        header = segment.header
        assert header is not None
        records = [payload for kind, payload in segment.frames if kind is FrameType.RECORD]
        frames = b"".join(pack_frame(FrameType.RECORD, p) for p in change(records))
        path.write_bytes(header.pack() + pack_group(header.segment_id, 1, frames))

    def test_a_record_changed_with_sound_checksums(self, wal: Path, evidence: Path) -> None:
        writer = open_writer(wal)
        fill(writer, 3)
        kill(writer)
        path = segment_files(wal / "gw-1")[0][2]
        self.rewrite(path, lambda r: [r[0], r[1].replace(b'"hr"', b'"it"'), *r[2:]])
        self.refuses(wal, evidence, path, "does not continue the chain")

    def test_a_record_left_out(self, wal: Path, evidence: Path) -> None:
        writer = open_writer(wal)
        fill(writer, 3)
        kill(writer)
        path = segment_files(wal / "gw-1")[0][2]
        self.rewrite(path, lambda r: [r[0], *r[2:]])
        self.refuses(wal, evidence, path, "a gap")

    def test_a_foreign_log_under_a_sealed_name(self, wal: Path, evidence: Path) -> None:
        writer = open_writer(wal)
        fill(writer, 3)
        writer.close_blocking()
        seal(wal, evidence)
        again = open_writer(wal)
        fill(again, 2)
        again.close_blocking()
        path = segment_files(wal / "gw-1")[0][2]
        self.refuses(wal, evidence, path, "sealed under its name")
        assert len(sealed_records(evidence)) == 5


class TestOneWriterAlone:
    @pytest.mark.parametrize(
        "manifest", [b"{}", b"[]", b"null", b"{", b'{"epoch":1,"files":7}'], ids=repr
    )
    def test_a_manifest_that_is_none(self, wal: Path, evidence: Path, manifest: bytes) -> None:
        for name in ("gw-a", "gw-b"):
            open_writer(wal, name).close_blocking()
        folder = evidence / "audit" / "manifests" / "gw-a"
        folder.mkdir(parents=True)
        (folder / "000001-000000001.json").write_bytes(manifest)
        report = seal(wal, evidence)
        assert report.adopted == ["gw-b"]
        assert ["gw-a" in fault.reason for fault in report.faults] == [True]
        assert (wal / "gw-a").exists()

    def test_what_nobody_thought_of(
        self,
        wal: Path,
        evidence: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        for name in ("gw-a", "gw-b"):
            open_writer(wal, name).close_blocking()
        check = check_segment

        def fail(segment: Any, *rest: Any) -> Any:
            if segment.header.writer_id == "gw-a":
                raise RuntimeError("the-secret")
            return check(segment, *rest)

        monkeypatch.setattr("governance.audit.seal.check_segment", fail)
        sealer = Sealer(wal, evidence, now_us)
        for _ in range(2):
            report = sealer.seal_once()
            ((path, reason),) = [(fault.path, fault.reason) for fault in report.faults]
            assert path == str(wal / "gw-a")
            assert reason == "unexpected: RuntimeError"
        assert not (wal / "gw-b").exists()
        assert "the-secret" not in caplog.text
        monkeypatch.undo()
        without_syncs(monkeypatch)
        assert sealer.seal_once().adopted == ["gw-a"]
        sealer.close()


class TestQuarantine:
    def test_what_does_not_fit_is_kept_apart(self, wal: Path, evidence: Path) -> None:
        writer = open_writer(wal)
        good = writer.write_blocking(event("budget.set"))
        writer.write_blocking(event("budget.set", status=70_000))
        writer.write_blocking(event("never.heard.of"))
        writer.write_blocking(event("budget.set", findings=[{"count": 1}]))
        last = writer.write_blocking(event("budget.set"))
        writer.close_blocking()
        report = seal(wal, evidence)
        assert report.quarantined == 3
        assert not report.faults
        records = sealed_records(evidence)
        assert [r["event_id"] for r in records[1:-1]] == [good, last]
        (manifest,) = manifests(evidence)
        assert manifest["count"] == 7
        (path,) = (evidence / "quarantine").glob("*.parquet")
        rows = pq.ParquetFile(path).read().to_pylist()
        assert [row["writer_seq"] for row in rows] == [3, 4, 5]
        assert "status" in rows[0]["reason"]
        assert b"70000" in rows[0]["payload"]

    def test_bytes_that_are_no_record_keep_their_place(self, wal: Path, evidence: Path) -> None:
        header = SegmentHeader("x", 1, 1, 1, "00" * 32, b"i" * 16, 1)
        frames = pack_frame(FrameType.RECORD, b"junk") + pack_frame(FrameType.CELL, b"junk")
        frames += pack_frame(FrameType.RECORD, b'{"b":1, "a":2}')
        (wal / "x").mkdir(parents=True)
        (wal / "x" / "1-1.wal").write_bytes(header.pack() + pack_group(b"i" * 16, 1, frames))
        report = seal(wal, evidence)
        assert report.quarantined == 3
        assert not report.faults
        assert manifests(evidence)[0]["count"] == 2


class TestKilled:
    """The sealer dies before each of its file operations in turn; then one works to the end."""

    def state(self, root: Path) -> None:
        wal = root / "wal"
        dead = open_writer(wal, "gw-dead", options=SMALL)
        dead.write_blocking(event(request_id="open"))
        fill(dead, 4)
        kill(dead)
        stopped = open_writer(wal, "gw-stopped")
        stopped.close_blocking()

    def result(self, evidence: Path) -> list[tuple[Any, ...]]:
        """What must be the same whenever the sealer died: records, less what differs by nature."""
        return sorted(
            (r["writer_id"], r["writer_seq"], r["event_type"], r["event_id"], r["leaf_hash"])
            if not r["writer_id"].startswith("sealer-")
            else ("sealer", 0, r["event_type"], r["event_id"], "")
            for r in sealed_records(evidence)
            if not r["event_type"].startswith("writer.")
        )

    @pytest.mark.parametrize(
        ("error", "stride"), [(Killed(), 1), (io_error(), 3)], ids=["killed", "io_error"]
    )
    def test_at_every_step(self, tmp_path: Path, error: BaseException, stride: int) -> None:
        origin = tmp_path / "origin"
        self.state(origin)
        counting = FailingFiles()
        shutil.copytree(origin, tmp_path / "whole")
        seal(tmp_path / "whole" / "wal", tmp_path / "whole" / "evidence", files=counting)
        for _ in range(2):
            seal(tmp_path / "whole" / "wal", tmp_path / "whole" / "evidence")
        expected = self.result(tmp_path / "whole" / "evidence")
        assert sum(row[2] == "inference.aborted" for row in expected) == 1
        assert len(counting.calls) > 30
        for step in range(0, len(counting.calls), stride):
            root = tmp_path / f"step-{step}"
            shutil.copytree(origin, root)
            files = FailingFiles()
            files.fail = lambda _name, index, step=step: error if index == step else None
            with contextlib.suppress(Killed, OSError):
                seal(root / "wal", root / "evidence", files=files)
            for _ in range(2):
                last = seal(root / "wal", root / "evidence")
            assert not last.faults, (step, counting.calls[step])
            assert self.result(root / "evidence") == expected, (step, counting.calls[step])
            assert list((root / "wal").glob("gw-*")) == []
            shutil.rmtree(root)

    def test_a_lost_cursor_is_made_again(self, wal: Path, evidence: Path) -> None:
        writer = open_writer(wal, options=SMALL)
        open_id = writer.write_blocking(event())
        fill(writer, 20)
        seal(wal, evidence)
        (wal / "gw-1" / CURSOR_NAME).unlink()
        kill(writer)
        report = seal(wal, evidence)
        assert not report.faults
        assert report.aborted == 1
        seal(wal, evidence)
        ends = [r for r in sealed_records(evidence) if r["event_type"] == "inference.aborted"]
        assert [r["parent_event_id"] for r in ends] == [open_id]

    def test_a_damaged_cursor_is_a_fault(self, wal: Path, evidence: Path) -> None:
        writer = open_writer(wal, options=SMALL)
        fill(writer, 20)
        seal(wal, evidence)
        (wal / "gw-1" / CURSOR_NAME).write_bytes(b"{}")
        fill(writer, 20)
        assert "made again" in seal(wal, evidence).faults[0].reason
        (wal / "gw-1" / CURSOR_NAME).unlink()
        assert not seal(wal, evidence).faults
        writer.close_blocking()

    def test_the_own_log_is_sealed_at_close(self, wal: Path, evidence: Path) -> None:
        writer = open_writer(wal)
        writer.write_blocking(event())
        kill(writer)
        sealer = Sealer(wal, evidence, now_us)
        assert sealer.seal_once().aborted == 1
        sealer.close()
        types = [r["event_type"] for r in sealed_records(evidence, "sealer-*")]
        assert types == ["writer.started", "inference.aborted", "writer.stopped"]


def test_a_complete_record_has_every_column() -> None:
    assert canonical_bytes(complete({})).startswith(b'{"adapter":null,')
