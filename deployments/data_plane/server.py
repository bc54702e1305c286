"""The data plane's end on an engine replica.

State of the replica is pushed, never asked for: a poll of ten times a second compares the
engine's numbers with what was sent last, sends what changed, and sends anyway when nothing has
been sent for ``heartbeat_s``.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from deployments.data_plane.backend import Backend
from deployments.data_plane.session import Session
from deployments.data_plane.tickets import TicketVerifier

STATE_INTERVAL_S = 0.1
MAX_PUSHED_PREFIXES = 512
MAX_PREFIX_CHARS = 64
CLOSE_TIMEOUT_S = 5.0
"""Time for an engine to end what was aborted, and for peers to read what was answered."""


@dataclass(slots=True)
class ServerStats:
    """Counters of one replica since its start; ``in_flight`` and ``connections`` are levels."""

    connections: int = 0
    in_flight: int = 0
    served: int = 0
    """Requests that ended with FINISHED or ERROR."""
    aborted: int = 0
    """Requests whose peer went, or that a forced close ended."""
    overloaded: int = 0
    protocol_errors: int = 0
    connections_refused: int = 0


class DataPlaneServer:
    """Serves verified requests to gateways over pooled connections.

    Args:
        backend: The engine.
        verifier: Checks tickets; its ``refused`` counts the refusals by reason.
        replica_id: Identity under which the replica registered.
        max_in_flight: Requests taken at once; the rest is told ``overloaded`` before it costs
            anything.
        max_connections: Connections at once, over all gateways.
        heartbeat_s: Longest silence on a state connection.

    """

    def __init__(
        self,
        backend: Backend,
        verifier: TicketVerifier,
        replica_id: str,
        *,
        max_in_flight: int = 256,
        max_connections: int = 4096,
        heartbeat_s: float = 0.5,
    ) -> None:
        self.backend = backend
        self.verifier = verifier
        self.replica_id = replica_id
        self.max_in_flight = max_in_flight
        self.stats = ServerStats()
        self.draining = False
        self._max_connections = max_connections
        self._heartbeat_s = heartbeat_s
        self._sessions: set[Session] = set()
        self._watchers: set[Session] = set()
        self._listener: asyncio.Server | None = None
        self._pusher: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._pushed: dict[str, Any] = {}
        self._pushed_at = 0.0

    async def start(
        self, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
    ) -> int:
        """Listen; ``port`` 0 takes a free one.

        Returns:
            The port, to be registered with the control plane.

        """
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: Session(self), host, port, ssl=tls, backlog=1024
        )
        self._pusher = loop.create_task(self._push_states())
        return int(self._listener.sockets[0].getsockname()[1])

    async def drain(self, timeout_s: float) -> int:
        """Take nothing new, tell every gateway, and wait for what runs.

        Returns:
            Requests still running after ``timeout_s``; 0 means drained.

        """
        self.draining = True
        for session in self._sessions:
            session.go_away()
        self._push_now()
        await self._wait_idle(timeout_s)
        return self.stats.in_flight

    async def _wait_idle(self, timeout_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()

    async def close(self) -> None:
        """Stop listening, abort every request, and wait until they ended.

        Answers that are complete but not read yet get ``CLOSE_TIMEOUT_S`` to be read.
        """
        self.draining = True
        if self._listener is not None:
            self._listener.close()
        for session in list(self._sessions):
            if session.busy:
                session.abort()
            else:
                session.close()
        if self._pusher is not None:
            self._pusher.cancel()
            await asyncio.gather(self._pusher, return_exceptions=True)
        await self._wait_idle(CLOSE_TIMEOUT_S)
        if self._sessions:
            await asyncio.wait(
                [session.closed for session in self._sessions], timeout=CLOSE_TIMEOUT_S
            )
        for session in list(self._sessions):
            session.abort()

    @property
    def unsent_bytes(self) -> int:
        """Bytes of answers in user space that peers have not read, over all connections."""
        return sum(session.unsent_bytes for session in self._sessions)

    # -- for sessions -------------------------------------------------------------------------

    def admit(self, session: Session) -> bool:
        """Count a new connection in, if there is room."""
        if len(self._sessions) >= self._max_connections:
            self.stats.connections_refused += 1
            return False
        self._sessions.add(session)
        self.stats.connections += 1
        return True

    def forget(self, session: Session) -> None:
        """A connection is gone."""
        if session in self._sessions:
            self._sessions.discard(session)
            self._watchers.discard(session)
            self.stats.connections -= 1

    def greeted(self, session: Session) -> None:
        """A connection's HELLO has been verified."""
        if session.role == "state":
            self._watchers.add(session)
            session.send_state(self._numbers())
        elif self.draining:
            session.go_away()

    def started(self) -> None:
        """A request begins."""
        self.stats.in_flight += 1
        self._idle.clear()

    def finished(self) -> None:
        """A request ended, in whatever way."""
        self.stats.in_flight -= 1
        if not self.stats.in_flight:
            self._idle.set()

    def served_prefix(self, key: object) -> None:
        """Note an affinity key that was sent here; a hint, so one of another form is ignored."""
        if isinstance(key, str) and 0 < len(key) <= MAX_PREFIX_CHARS:
            for watcher in self._watchers:
                watcher.unsent_prefixes[key] = None
                if len(watcher.unsent_prefixes) > MAX_PUSHED_PREFIXES:
                    del watcher.unsent_prefixes[next(iter(watcher.unsent_prefixes))]

    # -- state --------------------------------------------------------------------------------

    def _numbers(self) -> dict[str, Any]:
        load = self.backend.load()
        return {
            "running": load.running,
            "waiting": load.waiting,
            "kv_usage_milli": load.kv_usage_milli,
            "in_flight": self.stats.in_flight,
            "max_in_flight": self.max_in_flight,
            "draining": self.draining,
        }

    def _push_now(self) -> None:
        numbers = self._numbers()
        self._pushed = numbers
        self._pushed_at = asyncio.get_running_loop().time()
        for watcher in self._watchers:
            watcher.send_state(numbers)

    async def _push_states(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(STATE_INTERVAL_S)
            if self._watchers and (
                loop.time() - self._pushed_at >= self._heartbeat_s
                or any(watcher.unsent_prefixes for watcher in self._watchers)
                or self._numbers() != self._pushed
            ):
                self._push_now()
