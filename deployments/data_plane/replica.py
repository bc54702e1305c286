"""One engine replica, as a gateway knows it: its pushed state and its pooled connections."""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections import Counter
from typing import Any

from deployments.data_plane.connection import RequestConnection, StateConnection
from deployments.data_plane.options import ClientOptions
from deployments.data_plane.tickets import TicketSigner
from governance.control.snapshot import ReplicaAddress
from governance.errors import GatehouseError
from routing.types import ReplicaState

log = logging.getLogger("gatehouse.data_plane")

_BACKOFF_S = (0.05, 1.0)
"""First and longest pause between attempts to reach a replica; drawn from the upper half."""


class Replica:
    """Keeps the state connection up, and holds idle request connections.

    The snapshot says where a replica can be found; the state connection says whether it lives. So
    a replica that vanishes from the snapshot (a control plane that restarts and has not heard of
    its replicas yet) is used until its connection ends, and then not looked for again.

    Args:
        address: Where it registered.
        signer: Mints the tickets of connections.
        options: Bounds.
        tls: Context for mutual TLS, or ``None``.
        rng: Jitter of reconnects.

    """

    def __init__(
        self,
        address: ReplicaAddress,
        signer: TicketSigner,
        options: ClientOptions,
        tls: ssl.SSLContext | None,
        rng: random.Random,
    ) -> None:
        self.address = address
        self.retired = False
        """No longer in the snapshot."""
        self.in_flight = 0
        self.departments: Counter[str] = Counter()
        """Requests of ours in flight, by department."""
        self._signer = signer
        self._options = options
        self._tls = tls
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._state: dict[str, Any] = {}
        self._heard_at = 0.0
        self._own_at_push = 0
        self._prefixes: dict[str, None] = {}
        self._prefix_view: frozenset[str] | None = frozenset()
        self._watch: StateConnection | None = None
        self._idle: list[RequestConnection] = []
        self._used: set[RequestConnection] = set()
        self._task = self._loop.create_task(self._run())

    @property
    def id(self) -> str:
        """Replica id."""
        return self.address.replica_id

    @property
    def live(self) -> bool:
        """Whether it may be given requests: connected, heard of lately, not draining."""
        return (
            self._watch is not None
            and bool(self._state)
            and not self._state.get("draining")
            and self._loop.time() - self._heard_at <= self._options.stale_after_s
        )

    @property
    def ended(self) -> bool:
        """Whether it is gone for good."""
        return self._task.done()

    @property
    def buffered_bytes(self) -> int:
        """Bytes of answers received that nobody has taken yet."""
        return sum(connection.buffered_bytes for connection in self._used)

    def state(self, with_prefixes: bool) -> ReplicaState:
        """What it pushed last, plus what this gateway sent there, and got back, since.

        Args:
            with_prefixes: Include the affinity keys; left out when the request has none.

        """
        since = self.in_flight - self._own_at_push
        prefixes: frozenset[str] = frozenset()
        if with_prefixes:
            if self._prefix_view is None:
                self._prefix_view = frozenset(self._prefixes)
            prefixes = self._prefix_view
        return ReplicaState(
            self.id,
            max(0, self._number("running") + since),
            self._number("waiting"),
            self.in_flight,
            self._number("kv_usage_milli"),
            prefixes,
        )

    def _number(self, name: str) -> int:
        value = self._state.get(name, 0)
        return value if isinstance(value, int) else 0

    # -- one request --------------------------------------------------------------------------

    def enter(self, department: str, key: str | None) -> None:
        """A request is on its way there."""
        self.in_flight += 1
        self.departments[department] += 1
        if key is not None:
            self._remember(key)

    def leave(self, department: str) -> None:
        """The request ended, in whatever way."""
        self.in_flight -= 1
        self.departments[department] -= 1
        if not self.departments[department]:
            del self.departments[department]

    async def acquire(self, connect_by: float) -> RequestConnection:
        """An idle connection, or a new one.

        Args:
            connect_by: Loop time by which a new connection must stand.

        Raises:
            OSError: The replica cannot be reached; ``TimeoutError`` when not in time.
            GatehouseError: It refused, or is another one.

        """
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                self._used.add(connection)
                return connection
            connection.abort()
        connect_by = min(connect_by, self._loop.time() + self._options.connect_timeout_s)
        async with asyncio.timeout_at(connect_by):
            connection = await RequestConnection.dial(self.address, self._signer, self._tls)
        self._used.add(connection)
        return connection

    def release(self, connection: RequestConnection) -> None:
        """Keep a connection whose exchange ended in order; close any other, which aborts it."""
        self._used.discard(connection)
        if (
            connection.reusable
            and not self.ended
            and len(self._idle) < self._options.max_idle_connections
        ):
            self._idle.append(connection)
        else:
            connection.abort()

    # -- state --------------------------------------------------------------------------------

    def _remember(self, key: str) -> None:
        if key in self._prefixes:
            del self._prefixes[key]  # to the end: the oldest goes first
        else:
            self._prefix_view = None
        self._prefixes[key] = None
        if len(self._prefixes) > self._options.max_prefixes:
            del self._prefixes[next(iter(self._prefixes))]
            self._prefix_view = None

    def _on_state(self, state: dict[str, Any]) -> None:
        self._heard_at = self._loop.time()
        self._own_at_push = self.in_flight
        prefixes = state.pop("prefixes", ())
        for key in prefixes if isinstance(prefixes, list) else ():
            if isinstance(key, str):
                self._remember(key)
        self._state |= state

    async def _run(self) -> None:
        """Stay connected while the replica is in the snapshot; know at once when it is gone."""
        pause, longest = _BACKOFF_S
        while True:
            try:
                async with asyncio.timeout(self._options.connect_timeout_s):
                    watch = await StateConnection.dial(self.address, self._signer, self._tls)
            except (OSError, GatehouseError) as error:
                log.info("replica %s not reached: %s", self.id, type(error).__name__)
            else:
                pause = _BACKOFF_S[0]
                await self._watch_until_lost(watch)
            if self.retired:
                return
            await asyncio.sleep(pause * self._rng.uniform(0.5, 1.0))
            pause = min(2 * pause, longest)

    async def _watch_until_lost(self, watch: StateConnection) -> None:
        self._state = {}
        self._watch = watch
        self._heard_at = self._loop.time()
        watch.listen(self._on_state)
        try:
            while not watch.closed.done():
                await asyncio.wait((watch.closed,), timeout=self._options.stale_after_s)
                if self._loop.time() - self._heard_at > self._options.stale_after_s:
                    return  # connect anew; a silent connection may be half open
        finally:
            self._watch = None
            self._prefixes.clear()
            self._prefix_view = frozenset()
            watch.abort()
            for connection in self._idle:
                connection.abort()
            self._idle.clear()

    async def close(self) -> None:
        """Give everything up; requests in flight fail."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for connection in (*self._idle, *self._used):
            connection.abort()
        self._idle.clear()
