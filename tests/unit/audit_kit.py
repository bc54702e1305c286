"""What tests of the audit trail share: events, a clock, failing files, a look at the evidence."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from governance.audit.arrow import cells_of, records_of
from governance.audit.canonical import canonical_bytes, leaf_hash
from governance.audit.content import Cell
from governance.audit.files import Files
from governance.audit.merkle import merkle_root
from governance.audit.record import check_record
from governance.audit.writer import AuditWriter, WalOptions

SMALL = WalOptions(segment_bytes=4096, segment_age_us=10**12, first_bytes=8192)
"""Segments of a few records."""
PLAIN = WalOptions(segment_age_us=10**12)


def without_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that die need no sync, and here only processes die."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: None)


def now_us() -> int:
    return time.time_ns() // 1000


def event(event_type: str = "inference.decided", **values: Any) -> dict[str, Any]:
    return {"event_type": event_type, "ts_us": now_us(), "department": "hr", **values}


def open_writer(root: Path, writer_id: str = "gw-1", **more: Any) -> AuditWriter:
    more.setdefault("options", PLAIN)
    return AuditWriter.open(root, writer_id, clock=now_us, **more)


class Killed(BaseException):
    """Stands for the death of the process: nothing of ours catches it."""


class FailingFiles(Files):
    """Counts operations, and fails where it is told to."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail: Callable[[str, int], BaseException | None] = lambda name, index: None
        """Given the operation and its number: what to raise before it is done."""

    def _step(self, name: str) -> None:
        index = len(self.calls)
        self.calls.append(name)
        error = self.fail(name, index)
        if error is not None:
            raise error

    def zero(self, descriptor: int, start: int, end: int) -> None:
        self._step("zero")
        super().zero(descriptor, start, end)

    def write(self, descriptor: int, data: bytes, offset: int) -> None:
        self._step("write")
        super().write(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        self._step("sync")
        super().sync(descriptor)

    def sync_folder(self, folder: Path) -> None:
        self._step("sync_folder")
        super().sync_folder(folder)

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename")
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._step("unlink")
        super().unlink(path)


def no_space() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def io_error() -> OSError:
    return OSError(errno.EIO, "Input/output error")


def manifests(evidence: Path, writer_id: str | None = None) -> list[dict[str, Any]]:
    folders = sorted((evidence / "audit" / "manifests").glob(writer_id or "*"))
    return [json.loads(p.read_bytes()) for f in folders for p in sorted(f.glob("*.json"))]


def sealed_records(evidence: Path, writer_id: str | None = None) -> list[dict[str, Any]]:
    """Every record in evidence, checked in full against its manifests as an auditor would."""
    found = []
    last: dict[str, str] = {}
    for manifest in manifests(evidence, writer_id):
        records = []
        for file in manifest["files"]:
            if file["kind"] == "audit":
                path = evidence / file["path"]
                records += list(records_of(pq.ParquetFile(path).read()))
        records.sort(key=lambda record: record["writer_seq"])
        for record in records:
            check_record(record)
            assert leaf_hash(canonical_bytes(record)) == record["leaf_hash"]
        if not any(file["kind"] == "quarantine" for file in manifest["files"]):
            leaves = [bytes.fromhex(record["leaf_hash"]) for record in records]
            assert merkle_root(leaves).hex() == manifest["root"]
            chain = last.get(f"{manifest['writer_id']}-{manifest['epoch']}", "0" * 64)
            assert manifest["prev_leaf"] == chain
            for record in records:
                assert record["prev_hash"] == chain
                chain = record["leaf_hash"]
        last[f"{manifest['writer_id']}-{manifest['epoch']}"] = manifest["last_leaf"]
        found += records
    listed = {file["path"] for m in manifests(evidence) for file in m["files"]}
    present = {str(p.relative_to(evidence)) for p in evidence.rglob("*.parquet")}
    assert present == listed, "every file of evidence is in exactly one manifest"
    return found


def sealed_cells(evidence: Path) -> list[Cell]:
    return [
        cell
        for path in sorted((evidence / "content").rglob("*.parquet"))
        for cell in cells_of(pq.ParquetFile(path).read())
    ]
