"""What an engine replica knows of its core's meter: figures by exchange, and what to report.

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
from deployments.metering.wire import MAX_DATAGRAM_BYTES, Row, Totals, unpack
from governance.budget.messages import MeterRow

log = logging.getLogger("gatehouse.metering")

FINAL_TIMEOUT_S = 0.25
GRACE_S = 5.0
"""After an exchange is over, time for the core to say that its requests have ended."""
GRACE_STEPS = 3
"""Steps that the core must have ended in that time: what was aborted pays for the one under way,
which may take longer than any number of seconds that could stand here."""
LONGEST_S = 120.0
"""Time after which a core that neither steps nor ends is not waited for."""
MAX_EXCHANGES = 20_000
"""Exchanges kept, over and not reported yet ones included (some 20 MB); beyond that the oldest that
are over are given up."""
_RECEIVE_BUFFER_BYTES = 4 << 20
_DATAGRAMS_PER_WAKE = 64


class MeteredExchange:
    """One admitted request as metered; all figures are over its prompts and choices."""

    __slots__ = (
        "_collector",
        "_finals",
        "_rows",
        "_told_tokens",
        "answer_tokens",
        "base_model",
        "changed",
        "closed_at_s",
        "closed_at_step",
        "decode_ns",
        "delivered",
        "ended_requests",
        "finished",
        "key",
        "prefill_ns",
        "prompt_tokens",
        "submitted",
        "ticket",
    )

    def __init__(
        self, collector: MeterCollector, key: int, ticket: Ticket, base_model: str
    ) -> None:
        self.key = key
        self.ticket = ticket
        self.base_model = base_model
        self.prompt_tokens = 0
        """Tokens of the prompts given to the engine so far."""
        self.answer_tokens = 0
        """Tokens that the engine has given."""
        self.submitted = 0
        """Requests handed to the core: one a prompt and choice."""
        self.ended_requests = 0
        """Of them, those that have ended there."""
        self.finished = False
        """The answer was complete."""
        self.delivered = False
        """The final figure was handed to the gateway's connection."""
        self.closed_at_s: float | None = None
        """When the exchange was over, monotonic; nothing is submitted any more."""
        self.closed_at_step = 0
        """Steps that the core had ended then, as far as it had told."""
        self.changed = True
        """Differs from what was last reported."""
        self.prefill_ns = 0
        """Device-nanoseconds of steps that computed prompts."""
        self.decode_ns = 0
        """Device-nanoseconds of the others."""
        self._collector = collector
        self._rows: dict[tuple[bytes, int], Row] = {}
        self._finals: asyncio.Future[None] | None = None
        self._told_tokens = 0

    @property
    def metered(self) -> bool:
        """Whether the core has said anything."""
        return bool(self._rows)

    @property
    def total_us(self) -> int:
        """Device-microseconds so far, rounded down."""
        return (self.prefill_ns + self.decode_ns) // 1000

    @property
    def complete(self) -> bool:
        """Whether the core is through with all that it was given."""
        return self.ended_requests >= self.submitted

    def progress(self) -> tuple[int, int]:
        """Answer tokens since the last call, and device-microseconds so far."""
        tokens = self.answer_tokens - self._told_tokens
        self._told_tokens = self.answer_tokens
        return tokens, self.total_us

    async def final(self, timeout_s: float = FINAL_TIMEOUT_S) -> int | None:
        """Device-microseconds of the whole exchange, once everything submitted has ended.

        Normally without waiting. What is known after ``timeout_s``; ``None`` where nothing is.
        """
        self._collector.drain()
        if not self.complete and not self._collector.dead:
            self._finals = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._finals
            except TimeoutError:
                log.warning("the engine core did not give a final figure in time")
            finally:
                self._finals = None
        return self.total_us if self._rows else None

    def close(self) -> None:
        """The exchange is over, in whatever way."""
        if self.closed_at_s is None:
            self.closed_at_s = time.monotonic()
            self.closed_at_step = self._collector.totals.steps
            self.changed = True
            self._collector.ended(self)
            if not self.submitted:
                self._collector.forget(self)  # refused before it cost anything
            elif not self.finished:
                self._collector.left(self)

    def deliver(self) -> None:
        """FINISHED was handed to the transport."""
        self.delivered = self.changed = True
        self._collector.ended(self)

    def take(self, core: bytes, row: Row) -> None:
        """A figure of the core; an old one changes nothing."""
        known = self._rows.get((core, row.row))
        if known is not None:
            if known.ended or (known.prefill_ns + known.decode_ns > row.prefill_ns + row.decode_ns):
                return
            self.prefill_ns -= known.prefill_ns
            self.decode_ns -= known.decode_ns
        self.prefill_ns += row.prefill_ns
        self.decode_ns += row.decode_ns
        self._rows[core, row.row] = row
        self.changed = True
        if row.ended:
            self.ended_requests += 1
            self.settle()

    def settle(self, *, dead: bool = False) -> None:
        """Wake who waits for the final figure, if it is there or will never be."""
        if (self.complete or dead) and self._finals is not None and not self._finals.done():
            self._finals.set_result(None)
        if self.complete and self.closed_at_s is not None and not self.finished:
            self._collector.left(self)

    def over(self, now_s: float) -> bool:
        """Whether no figure changes any more."""
        if self.closed_at_s is None:
            return False
        if self.complete or self._collector.dead:
            return True
        waited_s = now_s - self.closed_at_s
        stepped = self._collector.totals.steps - self.closed_at_step
        return waited_s > LONGEST_S or (waited_s > GRACE_S and stepped >= GRACE_STEPS)

    def row(self, now_s: float) -> MeterRow:
        """What the ledger is told."""
        ticket, rows = self.ticket, self._rows.values()
        gpu_us, prefill_us = self.total_us, self.prefill_ns // 1000
        return MeterRow(
            reservation_id=ticket.reservation_id,
            request_id=ticket.request_id,
            gateway_id=ticket.gateway_id,
            account=ticket.department,
            model=ticket.audience,
            base_model=self.base_model,
            gpu_us=gpu_us,
            prefill_us=prefill_us,
            decode_us=gpu_us - prefill_us,
            prefill_tokens=sum(row.prefill_tokens for row in rows),
            cached_tokens=sum(row.cached_tokens for row in rows),
            prompt_tokens=self.prompt_tokens,
            decode_tokens=self.answer_tokens,
            ended=self.over(now_s),
            delivered=self.delivered,
        )


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
