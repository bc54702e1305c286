"""Merkle tree hash of RFC 6962, section 2.1, over leaf hashes."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256


def merkle_root(leaves: Iterable[bytes]) -> bytes:
    """Root over leaf hashes in order; SHA-256 of nothing where there are none.

    Args:
        leaves: Leaf hashes, 32 bytes each: SHA-256 of a zero byte and the record.
    """
    # Level by level. A last node without a partner moves up as it is, which gives the same root as
    # splitting at the largest power of two.
    nodes = list(leaves)
    if not nodes:
        return sha256().digest()
    while len(nodes) > 1:
        pairs = zip(nodes[::2], nodes[1::2], strict=False)
        level = [sha256(b"\x01" + left + right).digest() for left, right in pairs]
        if len(nodes) % 2:
            level.append(nodes[-1])
        nodes = level
    return nodes[0]
