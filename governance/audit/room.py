"""Whether a disk has room for new work, asked at most once a second."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

_LEAST_BYTES: Final = 256 << 20
_ASK_S: Final = 1.0


class Room:
    """Free space against a reserve.

    Args:
        folder: Somewhere on the disk.
        reserve_bytes: Free space to keep; ``None`` for 1 % of the disk or 256 MiB, the larger, but
            at most 10 % of the disk.
        monotonic: Seconds that never go back.
        statvfs: Asks the file system.
    """

    def __init__(
        self,
        folder: Path,
        reserve_bytes: int | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        statvfs: Callable[[Path], os.statvfs_result] = os.statvfs,
    ) -> None:
        self._folder = folder
        self._reserve_bytes = reserve_bytes
        self._monotonic = monotonic
        self._statvfs = statvfs
        self._asked_s = -_ASK_S
        self._enough = False

    def enough(self) -> bool:
        """Whether more is free than the reserve, as of a second ago at most."""
        now = self._monotonic()
        if now - self._asked_s >= _ASK_S:
            self._asked_s = now
            self._enough = self._ask()
        return self._enough

    def _ask(self) -> bool:
        try:
            stat = self._statvfs(self._folder)
        except OSError:
            return False
        size = stat.f_blocks * stat.f_frsize
        reserve = self._reserve_bytes
        if reserve is None:
            reserve = min(max(size // 100, _LEAST_BYTES), size // 10)
        return stat.f_bavail * stat.f_frsize > reserve
