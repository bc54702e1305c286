"""Full check of a record against ``COLUMNS``: presence, type, range, permitted values.

The writer does not call this for each record: its callers are ours and typed. Tests do, and the
sealer does for whatever comes out of a log, because a log is a file that anybody with access may
have written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from governance.audit.schema import (
    COLUMNS,
    FINDING_FIELDS,
    PART_FIELDS,
    SCHEMA_VERSION,
    Column,
    Kind,
)
from governance.audit.ulid import ULID

RANGES: Final[Mapping[Kind, tuple[int, int]]] = {
    Kind.U16: (0, 2**16 - 1),
    Kind.U32: (0, 2**32 - 1),
    Kind.U64: (0, 2**64 - 1),
    Kind.I16: (-(2**15), 2**15 - 1),
    Kind.I32: (-(2**31), 2**31 - 1),
    Kind.I64: (-(2**63), 2**63 - 1),
}
"""Least and greatest value of each integer kind."""

MAX_TS_US: Final = 253_402_300_800_000_000
"""The year 10000: times at or beyond it have no day to be filed under."""

WRITER_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a writer id looks like: it names directories and files."""

_HEX32 = re.compile(r"[0-9a-f]{64}")


def check_record(record: Mapping[str, Any]) -> None:
    """Check a record with every column; ``leaf_hash`` may be missing.

    Raises:
        ValueError: It does not fit the schema; the message names the column, never its value.
    """
    unknown = record.keys() - _NAMES
    if unknown:
        raise ValueError(f"{len(unknown)} columns that the schema does not have")
    for column in COLUMNS:
        if column.name not in record:
            if column.derived:
                continue
            raise ValueError(f"{column.name}: missing")
        value = record[column.name]
        if value is None:
            if column.required:
                raise ValueError(f"{column.name}: must not be null")
        elif not _fits(column, value):
            raise ValueError(f"{column.name}: not {column.kind.value}")
    _check_meaning(record)


def _check_meaning(record: Mapping[str, Any]) -> None:
    """What types cannot say."""
    if not 1 <= record["schema_version"] <= SCHEMA_VERSION:
        raise ValueError("schema_version: not known here")
    if ULID.fullmatch(record["event_id"]) is None:
        raise ValueError("event_id: not a ULID")
    if WRITER_ID.fullmatch(record["writer_id"]) is None:
        raise ValueError("writer_id: not an id of a writer")
    if not 0 <= record["ts_us"] < MAX_TS_US:
        raise ValueError("ts_us: not a time that has a day")
    if record["writer_epoch"] < 1 or record["writer_seq"] < 1:
        raise ValueError("writer_epoch, writer_seq: count from 1")


def _fits(column: Column, value: object) -> bool:
    if column.kind is Kind.ENUM:
        return isinstance(value, str) and value in column.values
    return _KINDS[column.kind](value)


def _text(value: object) -> bool:
    if not isinstance(value, str):  # Members of a StrEnum are text in JSON.
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # A lone surrogate.
        return False
    return True


def _integer(kind: Kind) -> Callable[[object], bool]:
    low, high = RANGES[kind]

    def fits(value: object) -> bool:
        # NOTE: ``type``, not ``isinstance``: True is an int to Python and another value in JSON.
        return type(value) is int and low <= value <= high

    return fits


def _structs(fields: tuple[tuple[str, Kind, str], ...]) -> Callable[[object], bool]:
    kinds = {name: kind for name, kind, _doc in fields}

    def fits(value: object) -> bool:
        if type(value) is not list:
            return False
        for item in value:
            if type(item) is not dict or item.keys() != kinds.keys():
                return False
            for name, kind in kinds.items():
                if item[name] is not None and not _KINDS[kind](item[name]):
                    return False
        return True

    return fits


_KINDS: dict[Kind, Callable[[object], bool]] = {
    Kind.BOOL: lambda value: type(value) is bool,
    Kind.TEXT: _text,
    Kind.HEX32: lambda value: isinstance(value, str) and _HEX32.fullmatch(value) is not None,
    Kind.TEXTS: lambda value: type(value) is list and all(_text(item) for item in value),
    **{kind: _integer(kind) for kind in RANGES},
}
_KINDS[Kind.PARTS] = _structs(PART_FIELDS)
_KINDS[Kind.FINDINGS] = _structs(FINDING_FIELDS)
_NAMES = frozenset(column.name for column in COLUMNS)
