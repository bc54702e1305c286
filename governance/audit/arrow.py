"""Records as Arrow and Parquet; the types come from ``COLUMNS``.

Enums are dictionaries of text, 32-byte values fixed-size binary, lists of text ``list<string>``,
parts and findings lists of structs. Canonical bytes -> row -> canonical bytes is exact.

``table_of`` is quick because it touches whole columns: most are null throughout, and those cost
next to nothing. It is also strict: what ``governance.audit.record.check_record`` refuses, it
refuses.

NOTE: kept out of what writes logs, so that gateways do not load pyarrow (80 MB).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from governance.audit.canonical import parse_ordered
from governance.audit.content import Cell
from governance.audit.record import MAX_TS_US, RANGES, WRITER_ID
from governance.audit.schema import (
    CANONICAL,
    COLUMNS,
    FINDING_FIELDS,
    PART_FIELDS,
    SCHEMA_VERSION,
    Column,
    Kind,
)
from governance.audit.ulid import ULID

_HASH = pa.binary(32)
_SIMPLE: Final = {
    Kind.U16: pa.uint16(),
    Kind.U32: pa.uint32(),
    Kind.U64: pa.uint64(),
    Kind.I16: pa.int16(),
    Kind.I32: pa.int32(),
    Kind.I64: pa.int64(),
    Kind.BOOL: pa.bool_(),
    Kind.TEXT: pa.string(),
    Kind.ENUM: pa.dictionary(pa.int32(), pa.string()),
    Kind.HEX32: _HASH,
}


def _type(kind: Kind) -> Any:
    if kind is Kind.TEXTS:
        return pa.list_(pa.string())
    if kind in (Kind.PARTS, Kind.FINDINGS):
        fields = PART_FIELDS if kind is Kind.PARTS else FINDING_FIELDS
        return pa.list_(pa.struct([(name, _type(inner)) for name, inner, _doc in fields]))
    return _SIMPLE[kind]


def _read_type(kind: Kind) -> Any:
    """The type as JSON can be read into; what differs is converted afterwards."""
    if kind in (Kind.ENUM, Kind.HEX32):
        return pa.string()
    if kind in (Kind.PARTS, Kind.FINDINGS):
        fields = PART_FIELDS if kind is Kind.PARTS else FINDING_FIELDS
        return pa.list_(pa.struct([(name, _read_type(inner)) for name, inner, _doc in fields]))
    return _type(kind)


SCHEMA: Final = pa.schema(
    [pa.field(column.name, _type(column.kind), nullable=not column.required) for column in COLUMNS]
)
"""Every column of the record in the order of ``COLUMNS``, ``leaf_hash`` included."""

CONTENT_SCHEMA: Final = pa.schema(
    [
        pa.field("event_id", pa.string(), nullable=False),
        pa.field("kind", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("media", pa.string(), nullable=False),
        pa.field("encoding", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("department", pa.string(), nullable=False),
        pa.field("dek_id", pa.string(), nullable=False),
        pa.field("nonce", pa.binary(12), nullable=False),
        pa.field("ciphertext", pa.large_binary(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("ts_us", pa.int64(), nullable=False),
        pa.field("commit", _HASH, nullable=False),
        pa.field("schema_version", pa.uint16(), nullable=False),
    ]
)
"""Cells; see ``governance.audit.content.Cell``."""

QUARANTINE_SCHEMA: Final = pa.schema(
    [
        pa.field("writer_id", pa.string(), nullable=False),
        pa.field("writer_epoch", pa.uint32(), nullable=False),
        pa.field("writer_seq", pa.uint64()),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("leaf_hash", _HASH),
        pa.field("payload", pa.large_binary(), nullable=False),
    ]
)
"""What does not fit the schema, as it was written. ``kind`` is ``record`` or ``cell``; sequence
number and leaf hash are those of a record."""

_PLAIN: Final[dict[Kind, type]] = {
    **dict.fromkeys((Kind.TEXT, Kind.ENUM, Kind.HEX32), str),
    **dict.fromkeys((Kind.TEXTS, Kind.PARTS, Kind.FINDINGS), list),
    **dict.fromkeys(RANGES, int),
    Kind.BOOL: bool,
}
"""What a value of a kind is in JSON. Arrow alone would take 1.0 for 1."""
_NONE: Final = type(None)


def to_table(payloads: Sequence[bytes], leaves: Sequence[bytes]) -> Any:
    """Records as a table with ``SCHEMA``.

    Args:
        payloads: Canonical bytes.
        leaves: Leaf hash of each, 32 bytes.

    Raises:
        ValueError: One of them is none, or does not fit the schema; which one is not said.
    """
    return table_of([tuple(parse_ordered(payload).values()) for payload in payloads], leaves)


def table_of(rows: Sequence[tuple[Any, ...]], leaves: Sequence[bytes]) -> Any:
    """``to_table`` for records whose values stand in the order of ``CANONICAL``.

    Raises:
        ValueError: One of them does not fit the schema; which one is not said.
    """
    if not rows:
        return SCHEMA.empty_table()
    columns = dict(zip(CANONICAL, zip(*rows, strict=True), strict=True))
    arrays = []
    for column in COLUMNS:
        target = SCHEMA.field(column.name).type
        if column.derived:
            arrays.append(pa.array(leaves, _HASH))
            continue
        values = columns[column.name]
        types = set(map(type, values))
        if types == {_NONE} and not column.required:
            arrays.append(pa.nulls(len(values), target))
            continue
        if not types <= {_PLAIN[column.kind], _NONE}:
            raise ValueError(f"{column.name}: a value of another type")
        try:
            array = pa.array(values, _read_type(column.kind))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            raise ValueError(f"{column.name}: a value of another type") from None
        _check(column, array)
        arrays.append(_convert(array, target))
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def records_of(table: Any) -> Iterator[dict[str, Any]]:
    """Records of a table: hex for 32-byte values, ``leaf_hash`` included."""
    hashes = [column.name for column in COLUMNS if column.kind is Kind.HEX32]
    for row in table.to_pylist():
        for name in hashes:
            if row[name] is not None:
                row[name] = row[name].hex()
        for part in row["parts"] or ():
            if part["commit"] is not None:
                part["commit"] = part["commit"].hex()
        yield row


def content_table(cells: Sequence[Cell]) -> Any:
    """Cells as a table with ``CONTENT_SCHEMA``.

    Raises:
        ValueError: A number of a cell is out of range.
    """
    columns: dict[str, list[Any]] = {name: [] for name in CONTENT_SCHEMA.names}
    for cell in cells:
        for name in CONTENT_SCHEMA.names:
            if name == "schema_version":
                columns[name].append(SCHEMA_VERSION)
            else:
                columns[name].append(getattr(cell, "size_bytes" if name == "bytes" else name))
    try:
        return pa.Table.from_pydict(columns, schema=CONTENT_SCHEMA)
    except (pa.ArrowInvalid, OverflowError) as error:
        raise ValueError("a cell has a number out of range") from error


def cells_of(table: Any) -> Iterator[Cell]:
    """The cells of a table."""
    for row in table.to_pylist():
        row.pop("schema_version")
        row["size_bytes"] = row.pop("bytes")
        yield Cell(**row)


# -- conversion -------------------------------------------------------------------------------


def _convert(array: Any, target: Any) -> Any:
    """An array as it was read, in the type that is stored."""
    if array.type == target:
        return array
    if pa.types.is_fixed_size_binary(target):
        return _from_hex(array)
    if pa.types.is_dictionary(target):
        return array.dictionary_encode()
    if pa.types.is_list(target):
        values = _convert(array.flatten(), target.value_type)
        lengths = pc.fill_null(pc.list_value_length(array), 0)
        offsets = pa.concat_arrays([pa.array([0], pa.int32()), pc.cumulative_sum(lengths)])
        return pa.ListArray.from_arrays(
            offsets.cast(pa.int32()), values, type=target, mask=array.is_null()
        )
    fields = [target.field(index) for index in range(target.num_fields)]
    children = [
        _convert(child, field.type) for child, field in zip(array.flatten(), fields, strict=True)
    ]
    return pa.StructArray.from_arrays(children, fields=fields, mask=array.is_null())


def _from_hex(array: Any) -> Any:
    """Text of 64 lower case hex digits as 32 bytes, a whole column at a time."""
    present = array.drop_null()
    if len(present) == 0:
        return pa.nulls(len(array), _HASH)
    lengths = pc.min_max(pc.binary_length(present)).as_py()
    filled = array.fill_null("0" * 64)
    start, size = filled.offset * 64, len(filled) * 64
    text = filled.buffers()[2].to_pybytes()[start : start + size]
    data = bytes.fromhex(text.decode(errors="replace"))
    # ``fromhex`` also takes upper case and spaces.
    if lengths != {"min": 64, "max": 64} or data.hex().encode() != text:
        raise ValueError("a hash is not 64 lower case hex digits")
    values = pa.Array.from_buffers(_HASH, len(filled), [None, pa.py_buffer(data)])
    return pc.if_else(array.is_valid(), values, pa.scalar(None, _HASH))


def _all_match(array: Any, pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(array, pattern)).as_py())


# -- checks -----------------------------------------------------------------------------------

_MIN_MAX: Final = {
    "schema_version": (1, SCHEMA_VERSION),
    "ts_us": (0, MAX_TS_US - 1),
    "writer_epoch": (1, None),
    "writer_seq": (1, None),
}
_PATTERNS: Final = {"event_id": ULID, "writer_id": WRITER_ID}


def _check(column: Column, array: Any) -> None:
    """What types alone do not say; the same as ``check_record``.

    Raises:
        ValueError: A value of the column does not fit.
    """
    if column.required and array.null_count:
        raise ValueError(f"{column.name}: must not be null")
    if column.kind in (Kind.TEXTS, Kind.PARTS, Kind.FINDINGS) and array.flatten().null_count:
        raise ValueError(f"{column.name}: a null within a list")
    if column.kind is Kind.ENUM:
        unknown = set(array.unique().to_pylist()) - {*column.values, None}
        if unknown:
            raise ValueError(f"{column.name}: not a permitted value")
    if column.name in _MIN_MAX:
        low, high = _MIN_MAX[column.name]
        found = pc.min_max(array).as_py()
        if found["min"] < low or (high is not None and found["max"] > high):
            raise ValueError(f"{column.name}: out of range")
    pattern = _PATTERNS.get(column.name)
    if pattern is not None and not _all_match(array, f"^(?:{pattern.pattern})$"):
        raise ValueError(f"{column.name}: not of its form")
