"""The gateway's side of the ledger: reserve, extend and settle in memory, renew in the background.

One task renews once a second, and at once when a request waits; one renewal is in flight at a
time, and all requests that wait share it. A renewal that was not answered is **repeated
unchanged**: a new number tells the ledger that the last answer was heard, and settlements are kept
until then. Leases count from when a renewal was first sent, by this process's own clock, less a
margin.

While the ledger restarts, requests are served out of leases that are still valid. A request that
does not fit into them waits ``WAIT_S`` at most.

A request that does not fit after the ledger has answered, in this order: waits for prompts that the
engine is counting, since an estimate may give room back; takes its median estimate, or what is left
if that may do; waits ``GIVE_BACK_S`` for what other gateways do not use; is refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from time import perf_counter_ns

from governance.budget.holds import LeaseHold
from governance.budget.lines import Line
from governance.budget.messages import (
    AccountState,
    LeaseAsk,
    ModelPrice,
    RenewReply,
    RenewRequest,
    Settlement,
)
from governance.budget.prices import COLD
from governance.budget.state import ZERO
from governance.budget.waiters import Level, Waiter
from governance.errors import (
    BudgetExhausted,
    GatehouseError,
    LedgerUnavailable,
    NoAccount,
    Shortage,
)
from governance.ports import Clock
from governance.tracebacks import without_messages
from governance.types import Amount, BudgetAsk

log = logging.getLogger("gatehouse.ledger")

WAIT_S = 3.0
"""Longest wait of a request for the ledger; then it is refused with ``LedgerUnavailable``."""
GIVE_BACK_S = 2.5
"""Longest wait for what others may give back: two renewals and a half."""
CALL_S = 2.0
"""A renewal that was not answered for so long is sent again."""
GAP_S = 0.005
"""Shortest time between two renewals: requests that come meanwhile share the second."""
UNKNOWN_S = 1.0
"""An account that does not exist is not asked for again this soon."""
MARGIN = 0.05
"""Part of a lease's time that is not used: clocks of two machines do not run alike."""


@dataclass(slots=True)
class LeaseStats:
    """Figures of a lease book, for metrics. Amounts are over all accounts with a limit."""

    leases: int = 0
    free: Amount = ZERO
    open: Amount = ZERO
    waiting: int = 0
    unsent: int = 0
    """Settlements that the ledger has not confirmed."""
    reservations: int = 0
    refusals: int = 0
    unavailable: int = 0
    renewals: int = 0
    failures: int = 0
    renew_us: int = 0
    """How long the last renewal took."""


class LeaseBook:
    """Implements ``governance.ports.Ledger``. Used from one event loop.

    Args:
        gateway_id: Unique per process start: an id that is used again would be taken for a
            repetition.
        renew: Sends a renewal to the ledger; any exception means that it was not answered.
        clock: Wall clock, for what people read.
        monotonic: Seconds; decides when a lease ends.
        chunk_tokens: Answer tokens per choice that are reserved at a time.
        renew_s: Seconds between renewals.
    """

    def __init__(
        self,
        gateway_id: str,
        renew: Callable[[RenewRequest], Awaitable[RenewReply]],
        *,
        clock: Clock,
        monotonic: Callable[[], float],
        chunk_tokens: int = 128,
        renew_s: float = 1.0,
    ) -> None:
        self.gateway_id = gateway_id
        self.monotonic = monotonic
        self.chunk_tokens = chunk_tokens
        self._renew = renew
        self._clock = clock
        self._renew_s = renew_s
        self._lines: dict[str, Line] = {}
        self._prices: dict[str, ModelPrice] = {}
        self._numbers = count(1)
        self._seq = 0
        self._unsent: list[tuple[Line, Settlement, Amount]] = []
        self._sent: list[tuple[Line, Settlement, Amount]] = []
        self._flight: RenewRequest | None = None
        """Sent and not answered; sent again as it is."""
        self._flight_s = 0.0
        """When it was first sent."""
        self._cushions_s = monotonic()
        self._kick = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._answered_s = float("-inf")
        self._stats = LeaseStats()

    async def reserve(self, ask: BudgetAsk) -> LeaseHold:
        """Hold what the prompt and the first chunk of the answer may cost.

        Raises:
            BudgetExhausted: The account cannot cover it.
            NoAccount: The department has no account.
            LedgerUnavailable: No lease is left, and the ledger cannot be reached.
        """
        now_s = self.monotonic()
        line = self._lines.get(ask.department)
        if line is None:
            line = self._lines[ask.department] = Line(ask.department)
        line.used_s = now_s
        hold = LeaseHold(self, line, ask, self.price(ask.base_model), next(self._numbers))
        if not line.waiters and now_s < line.valid_until_s and hold.take():
            self._stats.reservations += 1
            return hold
        await self._first(line, hold, now_s)
        self._stats.reservations += 1
        return hold

    def usage(self, department: str) -> AccountState | None:
        """State of a department's account, as of the last renewal."""
        line = self._lines.get(department)
        if line is None:
            line = self._lines[department] = Line(department)
            self._wake()
        line.used_s = self.monotonic()
        return line.state

    @property
    def stats(self) -> LeaseStats:
        """Figures as of now."""
        found = self._stats
        now_s, lines = self.monotonic(), self._lines.values()
        found.leases = sum(now_s < line.valid_until_s for line in lines)
        found.free = Amount(
            sum(max(line.free_us, 0) for line in lines if line.limited_us),
            sum(max(line.free_tokens, 0) for line in lines if line.limited_tokens),
        )
        found.open = Amount(
            sum(line.open_us for line in lines), sum(line.open_tokens for line in lines)
        )
        found.waiting = sum(len(line.waiters) for line in lines)
        found.unsent = len(self._unsent) + len(self._sent)
        return found

    @property
    def lines(self) -> Collection[Line]:
        """Every account that has been asked for."""
        return self._lines.values()

    def age_s(self) -> float:
        """Seconds since the last answered renewal was sent; infinite before the first."""
        return self.monotonic() - self._answered_s

    def start(self) -> None:
        """Begin to renew; ``reserve`` does it too."""
        if self._task is None and not self._closed:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Send the last settlements and give all leases back; twice is once.

        Gives up after ``WAIT_S``: then the leases end by themselves.
        """
        if self._closed:
            return
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        until_s = self.monotonic() + WAIT_S
        for line in self._lines.values():
            for waiter in list(line.waiters):
                self._fail(line, waiter, LedgerUnavailable())
        while self.monotonic() < until_s:
            closing = self._flight is None
            if await self._renew_once(closing=closing) and closing:
                return
            if self._flight is not None:
                await asyncio.sleep(0.1)

    async def wait(
        self,
        line: Line,
        *,
        attempt: Callable[[Level], bool],
        need: Callable[[], Amount],
        least: Amount,
        wait_s: float | None,
    ) -> None:
        """Wait until something fits; the request's next chunk, or its first.

        Args:
            line: The account's lease.
            attempt: Reserve, if it fits.
            need: What to ask the ledger for.
            least: The least that could do.
            wait_s: Longest wait; ``None`` is ``WAIT_S``.

        Raises:
            BudgetExhausted: The account cannot cover it.
            NoAccount: There is none.
            LedgerUnavailable: The ledger did not answer in time.
        """
        if self._closed:
            raise LedgerUnavailable
        now_s = self.monotonic()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = Waiter(attempt, need, least, done, now_s + GIVE_BACK_S)
        line.waiters.append(waiter)
        self._wake()
        try:
            async with asyncio.timeout(WAIT_S if wait_s is None else wait_s):
                await done
        except TimeoutError:
            if done.done() and not done.cancelled():
                done.result()
                return
            if waiter.answered:
                raise self._refusal(line) from None
            self._stats.unavailable += 1
            raise LedgerUnavailable from None
        finally:
            if waiter in line.waiters:
                line.waiters.remove(waiter)

    def price(self, base_model: str) -> ModelPrice:
        """Price of a base model, as of the last renewal."""
        return self._prices.get(base_model, COLD)

    def freed(self, line: Line) -> None:
        """Something may have been given back: serve who waits."""
        if line.waiters:
            self._serve(line)

    def settled(self, line: Line, settlement: Settlement, pending: Amount) -> None:
        """Queue a settlement for the next renewal."""
        self._unsent.append((line, settlement, pending))
        self.freed(line)

    async def _first(self, line: Line, hold: LeaseHold, now_s: float) -> None:
        """Reserve for a request that does not fit at once."""
        if now_s < line.unknown_until_s:
            raise NoAccount
        if now_s < line.valid_until_s and line.exhausted() and self._window_holds(line):
            raise self._refusal(line)
        try:
            await self.wait(
                line, attempt=hold.retry, need=hold.need, least=hold.least(), wait_s=None
            )
        except asyncio.CancelledError:
            if hold.reserved_tokens:
                hold.release()
            raise

    def _wake(self) -> None:
        self.start()
        self._kick.set()

    async def _run(self) -> None:
        """Renew for as long as the book is open."""
        backoff_s = 0.05
        while not self._closed:
            try:
                answered = await self._renew_once(closing=False)
            except Exception as error:
                # Without this task nobody would be served; what it met is said, and it goes on.
                log.error("a renewal failed\n%s", without_messages(error))
                self._stats.failures += 1
                answered = False
            if answered:
                backoff_s = 0.05
                await asyncio.sleep(GAP_S)
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._pause_s()):
                        await self._kick.wait()
            else:
                await asyncio.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, 1.0)

    def _pause_s(self) -> float:
        """Until the next renewal; sooner while somebody waits for what others give back."""
        return self._renew_s / 4 if any(v.waiters for v in self._lines.values()) else self._renew_s

    async def _renew_once(self, *, closing: bool) -> bool:
        """Send the renewal that is in flight, or a new one; whether it was answered."""
        self._kick.clear()
        if self._flight is None:
            self._flight, self._flight_s = self._request(closing), self.monotonic()
        request, begun_ns = self._flight, perf_counter_ns()
        try:
            # Not `wait_for`: up to Python 3.11 it can lose a cancellation.
            async with asyncio.timeout(CALL_S):
                reply = await self._renew(request)
        except Exception:
            # Whatever it was: the ledger has not answered, and is asked the same again.
            self._stats.failures += 1
            return False
        if reply.seq != request.seq:
            self._stats.failures += 1
            return False
        self._stats.renewals += 1
        self._stats.renew_us = (perf_counter_ns() - begun_ns) // 1000
        self._take(request, reply)
        return True

    def _request(self, closing: bool) -> RenewRequest:
        """What to tell the ledger now."""
        now_s = self.monotonic()
        elapsed_s, self._cushions_s = now_s - self._cushions_s, now_s
        self._seq += 1
        asks = []
        for line in self._lines.values():
            need = Amount()
            for waiter in line.waiters:
                waiter.asked = waiter.asked or self._seq
                need += waiter.need()
            if line.scarce(need.gpu_us, need.tokens):
                need += Amount(line.owed_us, line.owed_tokens)
            reserved = Amount(line.open_us, line.open_tokens)
            cushion = line.cushion(elapsed_s, now_s)
            asks.append(LeaseAsk(line.account, reserved, need, cushion))
        self._sent, self._unsent = self._unsent, []
        settlements = tuple(settlement for _, settlement, _ in self._sent)
        return RenewRequest(self.gateway_id, self._seq, tuple(asks), settlements, closing)

    def _take(self, request: RenewRequest, reply: RenewReply) -> None:
        """Take the ledger's answer in, and serve who waits."""
        self._answered_s = self._flight_s
        for line, _, pending in self._sent:
            line.confirm(pending)
        self._flight, self._sent = None, []
        self._prices = {price.base_model: price for price in reply.prices}
        leases = {lease.account: lease for lease in reply.leases}
        states = {state.account: state for state in reply.accounts}
        ttl_s = reply.ttl_ms / 1000
        valid_until_s = self._flight_s + ttl_s - max(ttl_s * MARGIN, 0.1)
        if request.closing:
            leases = {}
        for ask in request.asks:
            line = self._lines[ask.account]
            line.renewed(leases.get(ask.account), states.get(ask.account), valid_until_s)
            if ask.account in reply.unknown:
                line.unknown_until_s = self.monotonic() + UNKNOWN_S
                line.state = None
                for waiter in list(line.waiters):
                    self._fail(line, waiter, NoAccount())
            for waiter in line.waiters:
                waiter.answered = waiter.answered or 0 < waiter.asked <= reply.seq
            if line.waiters:
                self._serve(line)
            if line.idle(self.monotonic()):
                del self._lines[ask.account]

    def _serve(self, line: Line) -> None:
        """Let everybody who waits try again, in order; refuse who need not wait longer."""
        now_s = self.monotonic()
        if now_s >= line.valid_until_s:
            return
        for waiter in list(line.waiters):
            if waiter.done.done():
                continue
            if waiter.attempt(Level.P99):
                self._let(line, waiter)
                continue
            if not waiter.answered:
                continue
            waiting = now_s < waiter.until_s
            if waiting and line.unstarted and not line.exhausted():
                continue
            if waiter.attempt(Level.P50) or waiter.attempt(Level.EDGE):
                self._let(line, waiter)
                continue
            best = line.reachable()
            could = best.gpu_us >= waiter.least.gpu_us and best.tokens >= waiter.least.tokens
            if not (waiting and could):
                self._fail(line, waiter, self._refusal(line))

    def _let(self, line: Line, waiter: Waiter) -> None:
        line.waiters.remove(waiter)
        waiter.done.set_result(None)

    def _fail(self, line: Line, waiter: Waiter, error: GatehouseError) -> None:
        line.waiters.remove(waiter)
        if not waiter.done.done():
            waiter.done.set_exception(error)

    def _window_holds(self, line: Line) -> bool:
        """Whether the window that is known has not ended."""
        return line.state is not None and self._clock() < line.state.reset_us

    def _refusal(self, line: Line) -> BudgetExhausted:
        """Say what is left, and when there is more."""
        self._stats.refusals += 1
        state = line.state
        if state is None:
            return BudgetExhausted()
        reset = datetime.fromtimestamp(state.reset_us // 1_000_000, UTC)
        room = []
        tokens = gpu_us = None
        if state.limit_tokens is not None:
            tokens = max(line.free_tokens, 0) + line.rest_tokens
            room.append(f"{tokens} tokens")
        if state.limit_us is not None:
            gpu_us = max(line.free_us, 0) + line.rest_us
            room.append(f"{gpu_us // 1000} ms of GPU time")
        return BudgetExhausted(
            f"The budget of account {line.account} cannot cover this request. Left until it resets"
            f" at {reset:%Y-%m-%dT%H:%M:%SZ}: {' and '.join(room)}.",
            None,
            max(1, -(-(state.reset_us - self._clock()) // 1_000_000)),
            (),
            Shortage(line.account, state.reset_us, gpu_us, tokens),
        )
