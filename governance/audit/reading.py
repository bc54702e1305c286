"""The two halves of the trail as records and Arrow tables: sealed files, and the writers' logs.

``governance.audit.query`` makes SQL tables of them and says how they fit together. Sealed files
are found by their names, which say what they cover; what is in them is for Arrow to read, column
by column. Whether either half is what was written is for the verifier, not for a reader.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import fs

from governance.audit.arrow import SCHEMA, records_of, table_of
from governance.audit.schema import CANONICAL, COLUMNS
from governance.audit.segments import read_records

Rows = Iterable[dict[str, Any]]
"""Records as they stand in the logs: every column, hashes as hex text."""
OnFault = Callable[[str], None]
"""Hears one line for people."""

_CHUNK = 1024
_DAY_US = 86_400_000_000
_FILE = re.compile(
    r"(?P<writer>[A-Za-z0-9][A-Za-z0-9._-]*)-(?P<epoch>\d+)-(?P<first>\d+)-(?P<last>\d+)\.parquet"
)
_DAY = re.compile(r"dt=(\d{4}-\d{2}-\d{2})")

# NOTE: enums as plain text, not as the dictionaries of the files: each file has one of its own.
_SCHEMA: Final = pa.schema(
    [
        pa.field(field.name, pa.string() if pa.types.is_dictionary(field.type) else field.type)
        for field in SCHEMA
    ]
)
_FILED: Final = _SCHEMA.append(pa.field("dt", pa.date32()))


@dataclass(frozen=True, slots=True)
class SealedFile:
    """A sealed file, as its path says: records of ``day`` out of a segment of a writer."""

    path: Path
    day: date
    writer_id: str
    writer_epoch: int
    first_seq: int
    last_seq: int


def sealed_files(evidence: Path) -> list[SealedFile]:
    """Sealed files, by day, writer and place. A file with another name is not part of the trail."""
    found = [_sealed_file(path) for path in (evidence / "audit").glob("dt=*/*.parquet")]
    return sorted(
        (file for file in found if file is not None),
        key=lambda file: (file.day, file.writer_id, file.writer_epoch, file.first_seq),
    )


def _sealed_file(path: Path) -> SealedFile | None:
    name, day = _FILE.fullmatch(path.name), _DAY.fullmatch(path.parent.name)
    if name is None or day is None:
        return None
    try:
        filed = date.fromisoformat(day[1])
    except ValueError:
        return None
    first, last = int(name["first"]), int(name["last"])
    return SealedFile(path, filed, name["writer"], int(name["epoch"]), first, last)


def read_sealed(file: SealedFile, after_seq: int) -> Iterator[dict[str, Any]]:
    """Records of a sealed file behind a place in the chain, hashes as hex text, in chain order."""
    wanted = ds.field("writer_seq") > pa.scalar(after_seq, pa.uint64())
    table = dataset([file]).to_table(columns=_SCHEMA.names, filter=wanted)
    for batch in table.sort_by("writer_seq").to_batches(max_chunksize=1024):
        yield from records_of(batch)


def read_logs(state: Path, on_fault: OnFault = lambda said: None) -> Rows:
    """Records that are in the writers' logs, each writer's in order; some may be sealed too."""
    return read_records(
        state / "wal", lambda fault: on_fault(f"{fault.path} at {fault.offset}: {fault.reason}")
    )


def dataset(listed: list[SealedFile]) -> ds.Dataset:
    """The files as one table with today's columns, whatever version they were written with."""
    form, local = ds.ParquetFileFormat(), fs.LocalFileSystem()
    fragments = [
        form.make_fragment(
            str(file.path),
            local,
            partition_expression=ds.field("dt") == pa.scalar(file.day, pa.date32()),
        )
        for file in listed
    ]
    return ds.FileSystemDataset(fragments, _FILED, form, local)


def unsealed_table(rows: Rows, on_fault: OnFault) -> pa.Table:
    """Records of the logs as a table like ``dataset``'s; what is not a record is left out."""
    tables = []
    waiting = iter(rows)
    while chunk := list(islice(waiting, _CHUNK)):
        try:
            tables.append(_table(chunk))
        except (ValueError, TypeError, KeyError):
            # A log is a file; what it holds may be anything, and must not end the query.
            tables += _tables_one_by_one(chunk, on_fault)
    table = pa.concat_tables([SCHEMA.empty_table(), *tables]).cast(_SCHEMA)
    days = pc.floor(pc.divide(table["ts_us"], _DAY_US)).cast(pa.int32()).cast(pa.date32())
    return table.append_column(_FILED.field("dt"), days)


def _table(records: list[dict[str, Any]]) -> pa.Table:
    if any(len(record) != len(COLUMNS) for record in records):
        raise ValueError("columns that the schema does not have")
    rows = [tuple([record[name] for name in CANONICAL]) for record in records]
    return table_of(rows, [bytes.fromhex(record["leaf_hash"]) for record in records])


def _tables_one_by_one(records: list[dict[str, Any]], on_fault: OnFault) -> Iterator[pa.Table]:
    for record in records:
        try:
            yield _table([record])
        except (ValueError, TypeError, KeyError) as error:
            on_fault(f"a record in the logs is left out: {error}")


def without_sealed(rows: pa.Table, listed: list[SealedFile]) -> pa.Table:
    """Rows that no listed file covers, each once.

    NOTE: a segment that runs over midnight makes one file a day, all named after the whole
    segment, and one may be there before the other: so the day must be the file's too.
    """
    covered: dict[tuple[str, int, date], list[range]] = {}
    for file in listed:
        places = range(file.first_seq, file.last_seq + 1)
        covered.setdefault((file.writer_id, file.writer_epoch, file.day), []).append(places)
    columns = ("writer_id", "writer_epoch", "dt", "writer_seq")
    keep, seen = [], set()
    for key in zip(*(rows[name].to_pylist() for name in columns), strict=True):
        writer, epoch, day, seq = key
        sealed = any(seq in places for places in covered.get((writer, epoch, day), ()))
        keep.append(not sealed and key not in seen)
        seen.add(key)
    return rows.filter(pa.array(keep, pa.bool_()))
