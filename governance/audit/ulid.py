"""ULIDs: ids that sort by time, 48 bits of milliseconds and 80 random ones.

26 characters of Crockford's base 32, upper case (github.com/ulid/spec). Ids of one millisecond are
in no particular order: places in a writer's chain order its records, not ids.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Final

_ALPHABET: Final = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS: Final = tuple(
    bytes((_ALPHABET[value >> 5], _ALPHABET[value & 31])).decode() for value in range(1024)
)
"""Ten bits in two characters."""
_RANDOM_BYTES: Final = 10
_TIME_CHARS: Final = 10

ULID: Final = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
"""What a ULID looks like."""


def new_ulid(ts_us: int, random_bytes: Callable[[int], bytes] = os.urandom) -> str:
    """A ULID of a time.

    Args:
        ts_us: Microseconds since 1970 UTC, below the year 10889.
        random_bytes: Source of 10 random bytes.
    """
    return ulid_of(ts_us, random_bytes(_RANDOM_BYTES))


def ulid_of(ts_us: int, tail: bytes) -> str:
    """The ULID of a time and 10 given bytes; equal arguments give equal ids."""
    bits = int.from_bytes(tail, "big")
    return _time_chars(ts_us // 1000) + "".join(
        [_PAIRS[bits >> shift & 1023] for shift in range(70, -1, -10)]
    )


def ulid_ms(ulid: str) -> int:
    """Milliseconds since 1970 UTC that a ULID carries."""
    value = 0
    for char in ulid[:_TIME_CHARS].encode():
        value = value << 5 | _ALPHABET.index(char)
    return value


_last: tuple[int, str] = (-1, "")


def _time_chars(ms: int) -> str:
    """The first ten characters; most calls fall into the same millisecond as the one before."""
    global _last
    known, chars = _last  # One read: another thread may replace the pair.
    if known != ms:
        chars = bytes(_ALPHABET[ms >> shift & 31] for shift in range(45, -1, -5)).decode()
        _last = (ms, chars)
    return chars
