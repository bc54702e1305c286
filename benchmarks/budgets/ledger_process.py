"""A ledger as a process of its own that can be killed: ``LedgerService`` behind a Unix socket.

Frames are a length and a pickle; both ends are started by the same benchmark, in a folder that only
its user can enter.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from deployments.ledger_service import LedgerService
from governance.errors import GatehouseError, InternalError, LedgerUnavailable

START_S = 60.0
_LENGTH = struct.Struct(">I")


def wall_us() -> int:
    """Wall clock."""
    return time.time_ns() // 1000


async def _read(reader: asyncio.StreamReader) -> Any:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return pickle.loads(await reader.readexactly(length))


def _frame(value: Any) -> bytes:
    data = pickle.dumps(value)
    return _LENGTH.pack(len(data)) + data


class Link:
    """A ``LedgerLink`` to such a process."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._reading = asyncio.create_task(self._read_all(reader))

    @classmethod
    async def open(cls, path: Path) -> Link:
        """Connect.

        Raises:
            OSError: Nobody listens there.
        """
        return cls(*await asyncio.open_unix_connection(str(path)))

    def __call__(self, method: str, *args: Any) -> Awaitable[Any]:
        """See ``LedgerLink``."""
        return self._call(method, args)

    async def _call(self, method: str, args: tuple[Any, ...]) -> Any:
        if self._reading.done():
            raise LedgerUnavailable
        number = next(self._numbers)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(_frame((number, method, args)))
            await self._writer.drain()
            return await future
        except OSError:
            raise LedgerUnavailable from None
        finally:
            self._waiting.pop(number, None)

    async def _read_all(self, reader: asyncio.StreamReader) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                number, result, error = await _read(reader)
                future = self._waiting.get(number)
                if future is None or future.done():
                    continue
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(LedgerUnavailable())


class LedgerProcess:
    """Starts such a process, kills it, and starts it again on the same files.

    Args:
        folder: For database, audit log and socket.
        environ: More of its environment.
    """

    def __init__(self, folder: Path, environ: Mapping[str, str] | None = None) -> None:
        self._environ = {**os.environ, **(environ or {})}
        self.database = folder / "ledger" / "ledger.sqlite"
        self._folder = folder
        self._socket = folder / "ledger.socket"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it is there a moment later."""
        self._socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.budgets.ledger_process", str(self._folder)],
            env=self._environ,
            stderr=subprocess.DEVNULL,
        )

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    async def link(self) -> Link:
        """Find it; waits while it starts.

        Raises:
            LedgerUnavailable: It is not there within ``START_S``.
        """
        until_s = time.monotonic() + START_S
        while time.monotonic() < until_s:
            try:
                return await Link.open(self._socket)
            except OSError:
                await asyncio.sleep(0.05)
        raise LedgerUnavailable


async def _serve(folder: Path) -> None:
    service = LedgerService(
        folder / "ledger" / "ledger.sqlite",
        folder / "wal",
        clock=wall_us,
        monotonic=time.monotonic,
    )
    service.start()
    calls: set[asyncio.Task[None]] = set()

    async def answer(
        writer: asyncio.StreamWriter, number: int, method: str, args: tuple[Any, ...]
    ) -> None:
        result = error = None
        try:
            result = await getattr(service, method)(*args)
        except GatehouseError as failure:
            error = failure
        except Exception as failure:
            print(f"{method}: {failure!r}", file=sys.stderr, flush=True)
            error = InternalError()
        writer.write(_frame((number, result, error)))

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                call = asyncio.create_task(answer(writer, *await _read(reader)))
                calls.add(call)
                call.add_done_callback(calls.discard)

    server = await asyncio.start_unix_server(connected, str(folder / "ledger.socket"))
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
