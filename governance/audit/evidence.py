"""Sealed evidence of one segment: Parquet files, and the manifest that vouches for them.

    audit/dt=YYYY-MM-DD/<writer>-<epoch>-<first seq>-<last seq>.parquet    records
    content/dt=YYYY-MM-DD/<writer>-<epoch>-<segment>.parquet               cells
    quarantine/<writer>-<epoch>-<segment>.parquet                          what does not fit
    audit/manifests/<writer>/<epoch>-<segment>.json                        manifest

The day is that of ``ts_us``, in UTC. Records are sorted by department, then by sequence number.
One segment gives one manifest, under names that follow from the segment alone: sealing it again
after a crash writes the same again. A manifest is canonical JSON without a time of its own, and
names the SHA-256 of the writer's manifest before it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from governance.audit.arrow import QUARANTINE_SCHEMA
from governance.audit.batch import Batch, SegmentFault
from governance.audit.cursor import manifest_folder, manifest_name
from governance.audit.files import Files
from governance.audit.frames import FrameType, SegmentHeader
from governance.audit.merkle import merkle_root
from governance.audit.segments import Segment, WalFault

_VERSION: Final = 1
_DAY_US: Final = 86_400_000_000
_FILE_MODE: Final = 0o640
_FOLDER_MODE: Final = 0o750


@dataclass(frozen=True, slots=True)
class _File:
    kind: str
    path: str
    """Relative to the evidence root."""
    data: bytes
    rows: int


def publish_evidence(
    root: Path,
    header: SegmentHeader,
    batch: Batch,
    *,
    torn_bytes: int,
    previous: str | None,
    files: Files,
) -> str:
    """Make a segment's files durable, then its manifest.

    Repeating it changes nothing; where the manifest is there already, nothing is written.

    Args:
        root: Evidence root.
        header: Header of the segment.
        batch: Its checked content.
        torn_bytes: Bytes of a cut-off write at its end.
        previous: Hash of the writer's manifest before, hex.
        files: File operations.

    Returns:
        SHA-256 of the manifest's bytes, hex.

    Raises:
        SegmentFault: There is a manifest for this segment that says otherwise.
        OSError: It could not be written.
    """
    manifest = {
        "version": _VERSION,
        "writer_id": header.writer_id,
        "epoch": header.epoch,
        "segment": header.number,
        "first_seq": batch.first_seq,
        "last_seq": batch.last_seq,
        "count": len(batch.leaves),
        "root": merkle_root(batch.leaves).hex(),
        "prev_leaf": batch.prev_leaf,
        "last_leaf": batch.last_leaf,
        "torn_bytes": torn_bytes,
        "previous": previous,
    }
    path = manifest_folder(root, header.writer_id) / manifest_name(header.epoch, header.number)
    if path.exists():
        data = path.read_bytes()
        if not _says(data, manifest):
            fault = WalFault(str(path), 0, "another segment was sealed under this name")
            raise SegmentFault(fault)
        return sha256(data).hexdigest()
    made = _evidence_files(header, batch)
    for file in made:
        _publish(root / file.path, file.data, files)
    manifest["files"] = [
        {
            "kind": file.kind,
            "path": file.path,
            "sha256": sha256(file.data).hexdigest(),
            "bytes": len(file.data),
            "rows": file.rows,
        }
        for file in made
    ]
    data = orjson.dumps(manifest, option=orjson.OPT_SORT_KEYS)
    _publish(path, data, files)
    return sha256(data).hexdigest()


def check_sealed(root: Path, segment: Segment) -> None:
    """Check that a segment is what was sealed under its name, so that it can be deleted.

    Raises:
        SegmentFault: It is not: another process has written under the same id and epoch.
    """
    header = segment.header
    assert header is not None
    if not segment.frames:
        return
    leaves = [
        sha256(b"\0" + payload).digest()
        for kind, payload in segment.frames
        if kind is FrameType.RECORD
    ]
    path = manifest_folder(root, header.writer_id) / manifest_name(header.epoch, header.number)
    said = {
        "first_seq": header.first_seq,
        "count": len(leaves),
        "root": merkle_root(leaves).hex(),
        "prev_leaf": header.prev_hash,
    }
    if not path.exists() or not _says(path.read_bytes(), said):
        raise SegmentFault(WalFault(str(segment.path), 0, "not what was sealed under its name"))


def _says(data: bytes, manifest: dict[str, Any]) -> bool:
    try:
        found = orjson.loads(data)
    except ValueError:
        return False
    return isinstance(found, dict) and all(found.get(k) == v for k, v in manifest.items())


def _publish(path: Path, data: bytes, files: Files) -> None:
    """Write a file unless it stands there already, byte for byte."""
    files.make_folder(path.parent, _FOLDER_MODE)
    if path.exists() and path.read_bytes() == data:
        files.sync_folder(path.parent)
        return
    files.publish(path, data, _FILE_MODE)


def _evidence_files(header: SegmentHeader, batch: Batch) -> list[_File]:
    writer = f"{header.writer_id}-{header.epoch}"
    made = []
    order = [("department", "ascending"), ("writer_seq", "ascending")]
    for day, table in _by_day(batch.table):
        name = f"{writer}-{batch.first_seq}-{batch.last_seq}.parquet"
        data = _parquet(table.take(pc.sort_indices(table, sort_keys=order)))
        made.append(_File("audit", f"audit/dt={day}/{name}", data, table.num_rows))
    for day, table in _by_day(batch.content):
        name = f"{writer}-{header.number}.parquet"
        # Ciphertext does not compress: asking for it only costs time.
        made.append(
            _File("content", f"content/dt={day}/{name}", _parquet(table, raw=True), table.num_rows)
        )
    if batch.quarantine:
        table = _quarantine(header, batch)
        name = f"quarantine/{writer}-{header.number}.parquet"
        made.append(_File("quarantine", name, _parquet(table), table.num_rows))
    return made


def _by_day(table: Any) -> list[tuple[str, Any]]:
    if table.num_rows == 0:
        return []
    days = pc.divide(table.column("ts_us"), _DAY_US)
    found = sorted(days.unique().to_pylist())
    return [
        (
            datetime.fromtimestamp(day * 86_400, UTC).strftime("%Y-%m-%d"),
            table if len(found) == 1 else table.filter(pc.equal(days, day)),
        )
        for day in found
    ]


def _quarantine(header: SegmentHeader, batch: Batch) -> Any:
    rows = [
        {
            "writer_id": header.writer_id,
            "writer_epoch": header.epoch,
            "writer_seq": item.seq,
            "kind": item.kind,
            "reason": item.reason,
            "leaf_hash": item.leaf,
            "payload": item.payload,
        }
        for item in batch.quarantine
    ]
    return pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA)


def _parquet(table: Any, *, raw: bool = False) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        compression={"ciphertext": "none"} | dict.fromkeys(_others(table), "zstd")
        if raw
        else "zstd",
        compression_level=dict.fromkeys(_others(table), 3) if raw else 3,
        use_dictionary=[name for name in table.column_names if name not in _UNIQUE],
        write_statistics=[name for name in table.column_names if name in _SOUGHT],
    )
    return buffer.getvalue()


_UNIQUE: Final = frozenset(
    ("ciphertext", "nonce", "commit", "leaf_hash", "prev_hash", "prompt_commit", "response_commit",
     "event_id", "request_id", "decision_id", "trace_id", "parent_event_id", "writer_seq")
)  # fmt: skip
"""Columns whose values hardly repeat: a dictionary of them only costs."""
_SOUGHT: Final = frozenset(
    ("ts_us", "ts_end_us", "writer_seq", "writer_id", "department", "event_type", "event_id",
     "request_id", "subject_key", "outcome", "budget_account")
)  # fmt: skip
"""Columns that queries select rows by: least and greatest of them help to skip row groups."""


def _others(table: Any) -> list[str]:
    return [name for name in table.column_names if name != "ciphertext"]
