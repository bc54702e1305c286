"""Where an engine replica hears its core's meter: figures by exchange.

The core names exchanges by number (``keys.METER_KEY``); whose they are is known here. Figures
arrive on a Unix datagram socket. The core sends those of a request that ended before its last
output, so when the answer is complete its final figure already lies in the socket, and ``final``
has only to read it. Knows neither vLLM nor Ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from deployments.data_plane.ticket_form import Ticket
from deployments.metering.exchange import MeteredExchange
from deployments.metering.wire import MAX_DATAGRAM_BYTES, Totals, unpack
from deployments.scheduling.terms import rank_of

log = logging.getLogger("gatehouse.metering")

MAX_EXCHANGES = 20_000
"""Exchanges kept, over and not reported yet ones included (some 20 MB); beyond that the oldest that
are over are given up."""
_RECEIVE_BUFFER_BYTES = 4 << 20
_DATAGRAMS_PER_WAKE = 64


class MeterCollector:
    """Receives what the engine cores of one replica send.

    Args:
        base_model: Model that the replica serves.
    """

    def __init__(self, base_model: str = "") -> None:
        self.base_model = base_model
        self.exchanges: dict[int, MeteredExchange] = {}
        """Those that are not over, or not reported to the end."""
        self.dead = False
        """The core is gone; figures are final as they are."""
        self.lost_us = 0
        """Bound on what a dead core worked without telling, in microseconds of time."""
        self.given_up = 0
        """Exchanges forgotten unreported."""
        self.foreign = 0
        """Datagrams that were not ours."""
        self.on_left: Callable[[], None] = lambda: None
        """Called when the final figure of an exchange is known that nobody was given it."""
        self._totals: dict[bytes, Totals] = {}
        self._keys = 0
        self._heard_at_s: float | None = None
        self._by_ticket: dict[bytes, MeteredExchange] = {}
        self._settling: dict[int, MeteredExchange] = {}
        """Those that are over and whose gateway has the figure, oldest first."""
        self._owing: dict[int, MeteredExchange] = {}
        """The others that are over, oldest first."""
        self._directory = Path(tempfile.mkdtemp(prefix="gatehouse-meter-"))
        self.path = str(self._directory / "socket")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        self._socket.bind(self.path)
        os.chmod(self.path, 0o600)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Read from now on, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._on_readable)

    def close(self) -> None:
        """Stop reading and remove the socket."""
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._loop = None
        self._socket.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    # -- exchanges ----------------------------------------------------------------------------

    def open(self, ticket: Ticket) -> MeteredExchange:
        """Meter an admitted request from here on."""
        self._keys += 1
        exchange = MeteredExchange(self, self._keys, ticket, self.base_model)
        self.exchanges[exchange.key] = exchange
        self._by_ticket[ticket.ticket_id] = exchange
        if len(self.exchanges) > MAX_EXCHANGES:
            self._give_up()
        return exchange

    def delivered(self, ticket: Ticket) -> None:
        """The last frame of a ticket's answer was handed to the transport."""
        if (exchange := self._by_ticket.get(ticket.ticket_id)) is not None:
            exchange.deliver()

    def forget(self, exchange: MeteredExchange) -> None:
        """Nothing more is to be said of it."""
        self.exchanges.pop(exchange.key, None)
        self._settling.pop(exchange.key, None)
        self._owing.pop(exchange.key, None)
        if self._by_ticket.get(exchange.ticket.ticket_id) is exchange:
            del self._by_ticket[exchange.ticket.ticket_id]

    def ended(self, exchange: MeteredExchange) -> None:
        """An exchange is over, or its gateway was given the figure."""
        if exchange.closed_at_s is None or exchange.key not in self.exchanges:
            return
        if exchange.delivered:
            self._owing.pop(exchange.key, None)
            self._settling[exchange.key] = exchange
        else:
            self._owing[exchange.key] = exchange

    def left(self, exchange: MeteredExchange) -> None:
        """An exchange ended without its gateway being told the figure."""
        if exchange.complete:
            self.on_left()

    def _give_up(self) -> None:
        """Forget one that is over: best one whose gateway has the figure and settles with it."""
        for over in (self._settling, self._owing):
            if over:
                self.given_up += 1
                self.forget(next(iter(over.values())))
                return

    # -- figures ------------------------------------------------------------------------------

    @property
    def totals(self) -> Totals:
        """Sums over the cores."""
        cores = self._totals.values()
        return Totals(
            b"",
            sum(core.steps for core in cores),
            sum(core.busy_ns for core in cores),
            sum(core.attributed_ns for core in cores),
            sum(core.unattributed_ns for core in cores),
            sum(core.overrun_ns for core in cores),
            sum(core.hooks_ns for core in cores),
            sum(core.running for core in cores),
        )

    @property
    def running(self) -> int:
        """Requests in the engine, as far as the replica knows: given to it and not ended."""
        return sum(
            max(0, exchange.submitted - exchange.ended_requests)
            for exchange in self.exchanges.values()
        )

    def unbegun(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Exchanges that wait for their turn, as far as the core has told.

        Returns:
            How many, and the longest wait in microseconds: critical, standard, batch.
        """
        counts, oldest_us, now_s = [0, 0, 0], [0, 0, 0], time.monotonic()
        for exchange in self.exchanges.values():
            if exchange.submitted and not exchange.begun and exchange.closed_at_s is None:
                rank = rank_of(exchange.ticket.priority)
                counts[rank] += 1
                waited_us = round((now_s - exchange.opened_at_s) * 1_000_000)
                oldest_us[rank] = max(oldest_us[rank], waited_us)
        return (counts[0], counts[1], counts[2]), (oldest_us[0], oldest_us[1], oldest_us[2])

    def drain(self) -> None:
        """Read what lies in the socket now."""
        self._receive(1 << 20)

    def core_died(self) -> None:
        """The engine's process is gone: what it has told is all there will be.

        What it did since its last datagram is not known for each request; if it had any, no more
        than the time since then.
        """
        if self.dead:
            return
        self.drain()
        now_s = time.monotonic()
        opened = [x for x in self.exchanges.values() if x.submitted > x.ended_requests]
        if opened and self._heard_at_s is not None:
            self.lost_us = round((now_s - self._heard_at_s) * 1_000_000)
        self.dead = True
        for exchange in list(self.exchanges.values()):
            exchange.changed = True
            exchange.settle(dead=True)
        self.on_left()

    def _on_readable(self) -> None:
        self._receive(_DATAGRAMS_PER_WAKE)

    def _receive(self, most: int) -> None:
        for _ in range(most):
            try:
                datagram = self._socket.recv(MAX_DATAGRAM_BYTES + 1)
            except OSError:
                return
            self._take(datagram)

    def _take(self, datagram: bytes) -> None:
        try:
            totals, rows = unpack(datagram)
        except ValueError:
            self.foreign += 1
            return
        self._heard_at_s = time.monotonic()
        known = self._totals.get(totals.core)
        if known is None or totals.steps >= known.steps:
            self._totals[totals.core] = totals
        for row in rows:
            exchange = self.exchanges.get(row.key)
            if exchange is not None:
                exchange.take(totals.core, row)
