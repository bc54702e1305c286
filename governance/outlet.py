"""The way out of an answer: what may leave, and the end, which waits until it is on record."""

from __future__ import annotations

import re

from governance.types import EngineChunk

_FINISH = b'"finish_reason":"'
"""Marks the chunk that ends a choice. Inside generated text the quotes are escaped, so text
cannot imitate it."""
_REASON = re.compile(rb'"finish_reason":"([a-z_]+)"')


class Outlet:
    """Pieces of an answer on their way out; keeps the end of the last choice back."""

    def __init__(self, choices: int) -> None:
        self._unfinished = choices
        self._waiting: list[EngineChunk] = []
        self._held: list[bytes] = []

    def take(self, piece: EngineChunk | None) -> None:
        """Take a piece in that inspection has released, if any."""
        if piece is not None:
            self._waiting.append(piece)

    def ready(self) -> list[EngineChunk]:
        """Pieces that may leave now; all but those of the end."""
        ready = []
        for piece in self._waiting:
            self._unfinished -= piece.data.count(_FINISH)
            if self._unfinished > 0:
                ready.append(piece)
            else:
                self._held.append(piece.data)
        self._waiting.clear()
        return ready

    def rest(self) -> bytes:
        """Everything that has not left."""
        self._held += [piece.data for piece in self._waiting]
        self._waiting.clear()
        return b"".join(self._held)


def finish_reason(tail: bytes) -> str | None:
    """Reason of the choice that ended last; ``None`` where nothing was generated."""
    reasons = _REASON.findall(tail)
    return reasons[-1].decode() if reasons else None
