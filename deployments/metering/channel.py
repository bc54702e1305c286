"""The engine core's end of the way to its replica: a Unix datagram socket.

A datagram socket between two processes of one machine loses nothing that ``send`` has accepted,
so the kernel's answer is the acknowledgement: what it accepted is with the replica before the core
goes on, and what it refused (the replica has not read for a while and its queue is full) is kept
here, a later figure replacing an earlier one of the same row, and sent with what comes next.
Where nothing comes next, because the engine has become idle, a thread sends it; it exists from
the first refusal on and sleeps while there is nothing to do. The core itself never waits.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable

from deployments.metering.wire import MAX_ROWS, Totals, pack

RETRY_S = 0.01
MAX_PENDING = 65_536
"""Rows kept for a replica that does not read; then the oldest go (it is gone, and we soon too)."""


class MeterChannel:
    """Sends rows and totals; safe to call from one thread while its own retries.

    Args:
        path: The replica's socket.
    """

    def __init__(self, path: str) -> None:
        self.refused = 0
        """Datagrams that the kernel did not take at first."""
        self.dropped = 0
        """Rows given up, ended or not."""
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._lock = threading.Lock()
        self._pending: dict[int, bytes] = {}
        self._totals: Totals | None = None
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False

    def send(self, totals: Totals, rows: Iterable[tuple[int, bytes]]) -> None:
        """Tell figures: now, or as soon as the replica reads.

        Args:
            totals: As of now.
            rows: Row number and packed row.
        """
        with self._lock:
            pending = self._pending
            for row, packed in rows:
                pending[row] = packed
            while len(pending) > MAX_PENDING:
                del pending[next(iter(pending))]
                self.dropped += 1
            self._totals = totals
            if self._flush():
                return
        self._retry()

    def close(self) -> None:
        """Give up."""
        self._closed = True
        self._wake.set()
        self._socket.close()

    def _flush(self) -> bool:
        """Send all that is due, with the lock held; false when something is left."""
        while self._totals is not None:
            batch = list(self._pending)[:MAX_ROWS] if self._pending else []
            datagram = pack(self._totals, [self._pending[row] for row in batch])
            try:
                self._socket.sendto(datagram, self._path)
            except OSError:
                self.refused += 1
                return False
            for row in batch:
                del self._pending[row]
            if not self._pending:
                self._totals = None
        return True

    def _retry(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="gatehouse-meter", daemon=True)
            self._thread.start()
        self._wake.set()

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait()
            self._wake.clear()
            while not self._closed:
                threading.Event().wait(RETRY_S)
                with self._lock:
                    if self._flush():
                        break
