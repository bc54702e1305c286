"""The background of a gateway's leases: one renewal at a time, repeated until it is answered.

A renewal goes out once a second, and at once when a request waits; all requests that wait share
it. One that was not answered is **repeated unchanged**: a new number tells the ledger that the last
answer was heard, and settlements are kept until then. Leases count from when a renewal was first
sent, by this process's own clock.

**Rejections.** A renewal that the ledger refuses to look at changed nothing there, and would be
refused for ever: it is dropped, and the next one is made anew, with half as many settlements. When
a single settlement was refused ``BLAMED`` times, and a renewal without it was answered each time,
that settlement is given up, with an error in the log; what its engine reports is charged all the
same. When a renewal without settlements is refused, the requests that wait are at fault, and fail.
If an earlier attempt was not answered, it may have been carried out: nobody here knows what was
lent then, and leases are not used until the next answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import perf_counter_ns
from typing import Protocol

from governance.budget.lines import Line
from governance.budget.messages import LeaseAsk, RenewReply, RenewRequest, Settlement
from governance.errors import GatehouseError, LedgerUnavailable
from governance.tracebacks import without_messages
from governance.types import Amount

log = logging.getLogger("gatehouse.ledger")

CALL_S = 2.5
"""A renewal that was not answered for so long is sent again. Whoever carries it gives up sooner,
so that it is the carrier that looks for the ledger again."""
GAP_S = 0.005
"""Shortest time between two renewals: requests that come meanwhile share the second."""
MAX_SETTLEMENTS = 10_000
"""Most settlements of one renewal; the rest follows at once."""
BLAMED = 3
"""A settlement that was refused alone so often is given up."""
_FIRST_BACKOFF_S = 0.05
_LAST_BACKOFF_S = 1.0

Renew = Callable[[RenewRequest], Awaitable[RenewReply]]
Queued = tuple[Line, Settlement, Amount]
"""A settlement, its account's lease, and what that keeps held until the ledger has it."""


class Desk(Protocol):
    """What renewals are about: the leases."""

    def asks(self, seq: int) -> tuple[LeaseAsk, ...]:
        """What to ask for in the renewal with this number."""
        ...

    def answered(self, request: RenewRequest, reply: RenewReply, sent_s: float) -> None:
        """Take an answer in; ``sent_s`` is when the renewal was first sent."""
        ...

    def rejected(self, request: RenewRequest, *, in_doubt: bool) -> None:
        """A renewal was dropped; ``in_doubt``: it may have been carried out before."""
        ...

    def waiting(self) -> bool:
        """Whether somebody waits."""
        ...


class Renewals:
    """Sends renewals, and keeps settlements until the ledger has them.

    Args:
        gateway_id: See ``LeaseBook``.
        renew: Sends a renewal. A ``GatehouseError`` other than ``LedgerUnavailable`` means that it
            was rejected; any other exception that it was not answered.
        desk: The leases.
        monotonic: Clock in seconds.
        renew_s: Seconds between renewals.
    """

    def __init__(
        self,
        gateway_id: str,
        renew: Renew,
        desk: Desk,
        *,
        monotonic: Callable[[], float],
        renew_s: float,
    ) -> None:
        self.done = 0
        """Renewals that were answered."""
        self.failures = 0
        """Attempts that were not."""
        self.rejections = 0
        """Renewals that the ledger refused."""
        self.given_up = 0
        """Settlements that it will never have."""
        self.took_us = 0
        """How long the last one took."""
        self._gateway_id = gateway_id
        self._renew = renew
        self._desk = desk
        self._monotonic = monotonic
        self.renew_s = renew_s
        self._seq = 0
        self._unsent: list[Queued] = []
        self._sent: list[Queued] = []
        self._flight: RenewRequest | None = None
        """Sent and not answered; sent again as it is."""
        self._flight_s = 0.0
        """When it was first sent."""
        self._in_doubt = False
        """An attempt to send it was not answered."""
        self._most = MAX_SETTLEMENTS
        """Settlements of the next renewal at most."""
        self._suspect: Queued | None = None
        """First in the queue, and refused when it was sent alone."""
        self._blamed = 0
        self._kick = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def unsent(self) -> int:
        """Settlements that the ledger has not confirmed."""
        return len(self._unsent) + len(self._sent)

    def start(self) -> None:
        """Begin to renew."""
        if self._task is None and not self._closed:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def wake(self) -> None:
        """Renew now."""
        self.start()
        self._kick.set()

    def settle(self, line: Line, settlement: Settlement, pending: Amount) -> None:
        """Send a settlement with the next renewal."""
        self._unsent.append((line, settlement, pending))

    async def stop(self) -> None:
        """Renew no more by itself."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def finish(self, until_s: float) -> None:
        """Send what is left and give all leases back, or give up at a time."""
        while self._monotonic() < until_s:
            closing = self._flight is None and len(self._unsent) <= self._most
            answered = await self._once(closing=closing)
            if answered and closing:
                return
            if not answered:
                await asyncio.sleep(0.1)

    async def _run(self) -> None:
        """Renew until stopped."""
        backoff_s = _FIRST_BACKOFF_S
        while not self._closed:
            try:
                answered = await self._once(closing=False)
            except Exception as error:
                # Without this task nobody would be served; what it met is said, and it goes on.
                log.error("a renewal failed\n%s", without_messages(error))
                self.failures += 1
                answered = False
            if not answered:
                if self._flight is None and self._most > 0:
                    backoff_s = _FIRST_BACKOFF_S  # rejected: what comes next is another message
                await asyncio.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, _LAST_BACKOFF_S)
                continue
            backoff_s = _FIRST_BACKOFF_S
            await asyncio.sleep(GAP_S)
            if self._unsent and self._most < MAX_SETTLEMENTS:
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s()):
                    await self._kick.wait()

    def _pause_s(self) -> float:
        """Until the next renewal; sooner while somebody waits for what others give back."""
        return self.renew_s / 4 if self._desk.waiting() else self.renew_s

    async def _once(self, *, closing: bool) -> bool:
        """Send the renewal that is in flight, or a new one; whether it was answered."""
        self._kick.clear()
        if self._flight is None:
            self._flight, self._flight_s = self._request(closing), self._monotonic()
            self._in_doubt = False
        request, begun_ns = self._flight, perf_counter_ns()
        reply: RenewReply | None = None
        try:
            # Not `wait_for`: up to Python 3.11 it can lose a cancellation.
            async with asyncio.timeout(CALL_S):
                reply = await self._renew(request)
        except GatehouseError as error:
            if not isinstance(error, LedgerUnavailable):
                self._reject(request, error)
                return False
        except Exception as error:
            # Whatever it was: the ledger has not answered, and is asked the same again.
            log.debug("a renewal was not answered: %s", type(error).__name__)
        if reply is None or reply.seq != request.seq:
            self._in_doubt = True
            self.failures += 1
            return False
        self.done += 1
        self.took_us = (perf_counter_ns() - begun_ns) // 1000
        self._take(request, reply)
        return True

    def _request(self, closing: bool) -> RenewRequest:
        """What to tell the ledger now."""
        self._seq += 1
        asks = self._desk.asks(self._seq)
        self._sent, self._unsent = self._unsent[: self._most], self._unsent[self._most :]
        settlements = tuple(settlement for _, settlement, _ in self._sent)
        return RenewRequest(self._gateway_id, self._seq, asks, settlements, closing)

    def _take(self, request: RenewRequest, reply: RenewReply) -> None:
        """The ledger has what was sent."""
        for line, _, pending in self._sent:
            line.confirm(pending)
        if self._suspect is not None and (self._sent or self._blamed >= BLAMED):
            if not self._sent:
                self._give_up(self._suspect)
            self._suspect, self._blamed = None, 0
        self._flight, self._sent = None, []
        self._most = min(max(self._most * 2, 1), MAX_SETTLEMENTS)
        self._desk.answered(request, reply, self._flight_s)

    def _reject(self, request: RenewRequest, error: GatehouseError) -> None:
        """Drop a renewal that the ledger will never take, and suspect what was in it."""
        self.failures += 1
        self.rejections += 1
        sent = self._sent
        log.error("the ledger rejected a renewal (%s) with %d settlements", error.code, len(sent))
        self._unsent = sent + self._unsent
        self._flight, self._sent = None, []
        self._most = len(sent) // 2
        if len(sent) == 1:
            if self._suspect is not sent[0]:
                self._suspect, self._blamed = sent[0], 0
            self._blamed += 1
        self._desk.rejected(request, in_doubt=self._in_doubt)

    def _give_up(self, suspect: Queued) -> None:
        """Forget a settlement that the ledger does not take; what it kept held is free again."""
        line, settlement, pending = suspect
        self._unsent.remove(suspect)
        line.confirm(pending)
        self.given_up += 1
        log.error(
            "the ledger does not take the settlement of %s: given up; its engine's report counts",
            settlement.reservation_id,
        )
