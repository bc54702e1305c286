"""Canonical bytes of a record and its leaf hash; ``governance.audit.schema`` says what they are.

``orjson`` with sorted keys writes what Python's own encoder writes with ``sort_keys=True``,
``separators=(",", ":")`` and ``ensure_ascii=False``, so an independent reader needs nothing but a
JSON library and SHA-256. A property test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final

import orjson

from governance.audit.schema import CANONICAL

NO_HASH: Final = "0" * 64
"""``prev_hash`` of the first record of a chain."""

BLANK: Final[Mapping[str, None]] = dict.fromkeys(CANONICAL)
"""A record without values; ``{**BLANK, **event}`` gives one with every column."""

_COLUMNS: Final = len(CANONICAL)


def complete(event: Mapping[str, Any]) -> dict[str, Any]:
    """A record with every canonical column, ``None`` where ``event`` has no value.

    Raises:
        ValueError: ``event`` has a column that the schema does not have.
    """
    record = {**BLANK, **event}  # In the order of BLANK: see encode_ordered.
    if len(record) != _COLUMNS:
        unknown = sorted(set(record) - set(BLANK))
        raise ValueError(f"not columns of the audit record: {', '.join(unknown)}")
    return record


def canonical_bytes(record: Mapping[str, Any]) -> bytes:
    """Canonical bytes of a complete record; a ``leaf_hash`` in it is left out.

    Raises:
        ValueError: A column is missing or unknown, or a value is not JSON (lone surrogates,
            integers beyond 64 bits).
    """
    if "leaf_hash" in record:
        record = {name: value for name, value in record.items() if name != "leaf_hash"}
    if record.keys() != BLANK.keys():
        raise ValueError("a record has exactly the canonical columns")
    return encode(record)


def encode(record: Mapping[str, Any]) -> bytes:
    """``canonical_bytes`` for a record that is known to be complete.

    Raises:
        ValueError: A value is not JSON.
    """
    try:
        return orjson.dumps(record, option=orjson.OPT_SORT_KEYS)
    except TypeError as error:
        raise ValueError(str(error)) from None


def encode_ordered(record: Mapping[str, Any]) -> bytes:
    """``canonical_bytes`` for what ``complete`` gave, whose keys are in order: half the cost.

    Raises:
        ValueError: A value is not JSON.
    """
    try:
        # NOTE: sorted keys as well where lists of objects stand in it; they are rare.
        nested = record["parts"] or record["findings"]
        return orjson.dumps(record, option=orjson.OPT_SORT_KEYS if nested else None)
    except TypeError as error:
        raise ValueError(str(error)) from None


def leaf_hash(canonical: bytes) -> str:
    """SHA-256 of a zero byte and the canonical bytes, lower case hex (RFC 6962, section 2.1)."""
    return sha256(b"\0" + canonical).hexdigest()


def parse(canonical: bytes) -> dict[str, Any]:
    """``parse_ordered`` with ``leaf_hash`` added.

    Raises:
        ValueError: As there.
    """
    record = parse_ordered(canonical)
    record["leaf_hash"] = sha256(b"\0" + canonical).hexdigest()
    return record


def parse_ordered(canonical: bytes) -> dict[str, Any]:
    """The record that canonical bytes say, its keys in the order of ``CANONICAL``.

    Only form is checked here, values by ``governance.audit.record.check_record``.

    Raises:
        ValueError: Not the canonical bytes of any record: not JSON, a column missing or unknown,
            keys not sorted, white space, a key given twice, a number in another notation.
    """
    record = orjson.loads(canonical)
    if type(record) is not dict or record.keys() != BLANK.keys():
        raise ValueError("not a record: its columns are not those of the schema")
    # Keys stand as they were read: bytes with others first are not the same bytes.
    if tuple(record) != CANONICAL or encode_ordered(record) != canonical:
        raise ValueError("not canonical: other bytes for the same record")
    return record
