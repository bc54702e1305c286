"""SHA-256 of short texts without letting go of the interpreter's lock.

Python's hashes let go of it from 2,048 bytes at once. Under load, another thread takes it then, and
getting it back takes longer than the hash.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any, Final

_QUICK_BYTES: Final = 2046
_LONG_BYTES: Final = 32 << 10
"""Longer ones take so long that others should go on meanwhile."""


def sha256_of(head: bytes, data: bytes) -> Any:
    """Hash object over ``head``, a few bytes, and ``data``."""
    if len(data) > _LONG_BYTES:
        digest = sha256(head)
        digest.update(data)
        return digest
    digest = sha256(head + data[: _QUICK_BYTES - len(head)])
    for start in range(_QUICK_BYTES - len(head), len(data), _QUICK_BYTES):
        digest.update(data[start : start + _QUICK_BYTES])
    return digest
