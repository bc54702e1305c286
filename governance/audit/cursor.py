"""How far one writer's log is sealed: a small file in the writer's folder, replaced as a whole.

It holds where the chain stands (so that the next segment must continue it), the hash of the last
manifest, and the requests that are open at that point, so that their ends can be written after a
death that comes days later. It is written after the manifest and before the segment is deleted: at
every moment either the segment is there or the cursor knows it. A lost cursor is made again from
the evidence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import orjson
import pyarrow.parquet as pq

from governance.audit.arrow import cells_of, records_of
from governance.audit.canonical import NO_HASH
from governance.audit.content import Cell
from governance.audit.exchanges import OpenExchanges, ends
from governance.audit.files import Files

CURSOR_NAME: Final = "sealed.json"
_VERSION: Final = 1


class CursorError(ValueError):
    """A cursor cannot be used; the message names the file."""


@dataclass(slots=True)
class Cursor:
    """What is sealed of one writer."""

    epoch: int = 0
    number: int = 0
    """Last segment sealed; 0 before the first."""
    seq: int = 0
    leaf: str = NO_HASH
    manifest: str | None = None
    """SHA-256 of the last manifest's bytes, hex."""
    open: OpenExchanges = field(default_factory=OpenExchanges)

    def save(self, folder: Path, files: Files) -> None:
        """Make it durable."""
        fields = {
            "version": _VERSION,
            "epoch": self.epoch,
            "number": self.number,
            "seq": self.seq,
            "leaf": self.leaf,
            "manifest": self.manifest,
            "open": self.open.to_json(),
        }
        files.publish(folder / CURSOR_NAME, orjson.dumps(fields))

    @classmethod
    def load(cls, folder: Path) -> Cursor | None:
        """The cursor of a writer's folder; ``None`` if there is none.

        Raises:
            CursorError: It is damaged.
        """
        path = folder / CURSOR_NAME
        try:
            fields = orjson.loads(path.read_bytes())
            if fields.pop("version") != _VERSION:
                raise CursorError(f"{path}: of another version")
            fields["open"] = OpenExchanges.from_json(fields["open"])
            return cls(**fields)
        except FileNotFoundError:
            return None
        except CursorError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError):
            raise CursorError(
                f"{path}: damaged; remove it, and it is made again from the evidence"
            ) from None


def manifest_folder(evidence_root: Path, writer_id: str) -> Path:
    """Where a writer's manifests are."""
    return evidence_root / "audit" / "manifests" / writer_id


def manifest_name(epoch: int, number: int) -> str:
    """File name of a segment's manifest; names sort as segments do."""
    return f"{epoch:06d}-{number:09d}.json"


def rebuild(evidence_root: Path, writer_id: str) -> Cursor:
    """A cursor out of a writer's manifests and the files that they name; new if there are none.

    Raises:
        CursorError: A manifest or a file that it names is missing or damaged.
    """
    cursor = Cursor()
    for data, manifest in _manifests(manifest_folder(evidence_root, writer_id)):
        for record in _records(evidence_root, manifest):
            cursor.open.record(record)
        for cell in _cells(evidence_root, manifest):
            cursor.open.cell(cell)
        cursor.epoch, cursor.number = manifest["epoch"], manifest["segment"]
        cursor.seq, cursor.leaf = manifest["last_seq"], manifest["last_leaf"]
        cursor.manifest = sha256(data).hexdigest()
    if cursor.open.by_id:
        for folder in manifest_folder(evidence_root, writer_id).parent.glob("sealer-*"):
            for _data, manifest in _manifests(folder):
                for record in _records(evidence_root, manifest):
                    cursor.open.record({**record, "event_type": _ended_only(record)})
    return cursor


def _ended_only(record: dict[str, Any]) -> str | None:
    """Type of an end; nothing for a decided, which is another writer's."""
    return record["event_type"] if ends(record) else None


def _manifests(folder: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        data = path.read_bytes()
        if not _is_manifest(data):
            raise CursorError(f"{path}: damaged, or no manifest; restore it from a backup")
        yield data, orjson.loads(data)


def _is_manifest(data: bytes) -> bool:
    """Whether it has what a cursor is made of."""
    try:
        manifest = orjson.loads(data)
        files = manifest["files"]
        return (
            all(type(manifest[name]) is int for name in ("epoch", "segment", "last_seq"))
            and type(manifest["last_leaf"]) is str
            and all(type(file["kind"]) is type(file["path"]) is str for file in files)
        )
    except (ValueError, TypeError, KeyError):
        return False


def _records(evidence_root: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    records = [r for table in _tables(evidence_root, manifest, "audit") for r in records_of(table)]
    return sorted(records, key=lambda record: int(record["writer_seq"]))


def _cells(evidence_root: Path, manifest: dict[str, Any]) -> list[Cell]:
    return [c for table in _tables(evidence_root, manifest, "content") for c in cells_of(table)]


def _tables(evidence_root: Path, manifest: dict[str, Any], kind: str) -> Iterator[Any]:
    for file in manifest["files"]:
        if file["kind"] == kind:
            path = evidence_root / file["path"]
            try:
                yield pq.ParquetFile(path).read()
            except (OSError, ValueError) as error:
                raise CursorError(f"{path}: {type(error).__name__}") from error
