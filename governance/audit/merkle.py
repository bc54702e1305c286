"""Merkle tree hash of RFC 6962, section 2.1, over leaf hashes."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256


def merkle_root(leaves: Iterable[bytes]) -> bytes:
    """Root over leaf hashes in order; SHA-256 of nothing where there are none.

    Args:
        leaves: Leaf hashes, 32 bytes each: SHA-256 of a zero byte and the record.
    """
    # Roots of perfect subtrees, as the bits of the count say: the largest first.
    stack: list[tuple[int, bytes]] = []
    for leaf in leaves:
        size, node = 1, leaf
        while stack and stack[-1][0] == size:
            node = _node(stack.pop()[1], node)
            size *= 2
        stack.append((size, node))
    if not stack:
        return sha256().digest()
    root = stack.pop()[1]
    while stack:
        root = _node(stack.pop()[1], root)
    return root


def _node(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()
