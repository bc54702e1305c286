"""A key that all requests of one conversation share, for cache-friendly replica choice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

_PREFIX_CHARS = 2048
"""Two KV blocks of text and more; longer openings add no information about who shares a prefix."""


def affinity_key(salt: str, opening: Iterable[str]) -> str:
    """Digest of the opening of a prompt.

    A conversation resends its history, so its system prompt and first message stay the same and
    name it; an application's shared system prompt does the same for prefix caching. ``salt``
    (the department) keeps departments apart, as the engine's cache does.

    Args:
        salt: Domain of the cache; equal openings under different salts share nothing.
        opening: System prompt and first message, or the prompt; read until 2,048 characters.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(salt.encode(), digest_size=16)
    left = _PREFIX_CHARS
    for text in opening:
        digest.update(b"\0" + text[:left].encode("utf-8", "surrogatepass"))
        left -= len(text)
        if left <= 0:
            break
    return digest.hexdigest()
