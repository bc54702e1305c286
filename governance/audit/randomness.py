"""Random bytes from the system, fetched some thousands at a time.

``os.urandom`` lets go of the interpreter's lock, and under load getting it back costs more than the
bytes. A process that forks must not hand out the same bytes twice, which as nonces would break the
encryption: the child begins with an empty pool.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Final

_POOL_BYTES: Final = 4096


class RandomPool:
    """Callable like ``os.urandom``; no byte is given out twice. Any thread may call it.

    Args:
        source: Gives fresh random bytes.
    """

    def __init__(self, source: Callable[[int], bytes] = os.urandom) -> None:
        self._source = source
        self.empty()
        os.register_at_fork(after_in_child=self.empty)

    def empty(self) -> None:
        """Forget what is left."""
        self._guard = threading.Lock()  # The old one may be held by a thread that is not here.
        self._pool = b""
        self._at = 0

    def __call__(self, size: int) -> bytes:
        """``size`` random bytes."""
        with self._guard:
            start, end = self._at, self._at + size
            if end > len(self._pool):
                start, end = 0, size
                self._pool = self._source(max(size, _POOL_BYTES))
            self._at = end
            return self._pool[start:end]


random_bytes: Final = RandomPool()
"""The pool of this process."""
