"""The gateway's side of the ledger: reserve, extend and settle in memory.

``governance.budget.renewals`` talks to the ledger in the background. While the ledger restarts,
requests are served out of leases that are still valid, less a margin. A request that does not fit
into them waits ``WAIT_S`` at most.

A request that does not fit after the ledger has answered, in this order: waits for prompts that the
engine is counting, since an estimate may give room back; takes its median estimate, or what is left
if that may do; waits ``GIVE_BACK_S`` for what other gateways do not use; is refused.

What is given back is offered once per turn of the event loop, however many give back in it: to
running answers first come first served, each that fits; to new requests in order, up to the first
that does not fit, so that a large one is not passed for ever. A renewal's answer is offered to all.
No more than ``MAX_WAITERS`` wait for one account.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from itertools import count

from governance.budget.checks import MOST, is_account
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
from governance.budget.refusals import budget_refusal, largest_answer, limited
from governance.budget.renewals import Renewals
from governance.budget.state import ZERO, least
from governance.budget.tree import Tree
from governance.budget.waiters import Level, Waiter
from governance.errors import (
    BudgetExhausted,
    GatehouseError,
    LedgerUnavailable,
    NoAccount,
    Overloaded,
)
from governance.ports import Clock
from governance.types import Amount, BudgetAsk, Charge, Principal

WAIT_S = 3.0
"""Longest wait of a request for the ledger; then it is refused with ``LedgerUnavailable``."""
GIVE_BACK_S = 2.5
"""Longest wait for what others may give back: two renewals and a half."""
UNKNOWN_S = 1.0
"""An account that does not exist is not asked for again this soon."""
MAX_WAITERS = 256
"""Requests that may wait for one account; more are refused at once."""
MARGIN = 0.05
"""Part of a lease's time that is not used: clocks of two machines do not run alike."""

LARGEST = Amount(MOST, MOST)


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
    rejections: int = 0
    """Renewals that the ledger refused to look at."""
    given_up: int = 0
    """Settlements that it never took."""
    renew_us: int = 0
    """How long the last renewal took."""


class LeaseBook:
    """Implements ``governance.ports.Ledger``. Used from one event loop.

    Args:
        gateway_id: Unique per process start: an id that is used again would be taken for a
            repetition.
        renew: Sends a renewal to the ledger; see ``governance.budget.renewals``.
        clock: Wall clock, for what people read.
        monotonic: Seconds; decides when a lease ends.
        tree: Accounts by the budgets file; replaced when another is taken up.
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
        tree: Tree,
        chunk_tokens: int = 128,
        renew_s: float = 1.0,
    ) -> None:
        self.gateway_id = gateway_id
        self.monotonic = monotonic
        self.tree = tree
        self.digest = tree.config.digest
        """Of the budgets file by which the ledger works, as of the last renewal."""
        self.chunk_tokens = chunk_tokens
        self._clock = clock
        self._lines: dict[str, Line] = {}
        self._prices: dict[str, ModelPrice] = {}
        self._numbers = count(1)
        self._cushions_s = monotonic()
        self._given_back: dict[str, Line] = {}
        """Accounts of which something was given back in this turn of the loop."""
        self._closed = False
        self._renewals = Renewals(gateway_id, renew, self, monotonic=monotonic, renew_s=renew_s)
        self._answered_s = float("-inf")
        self._stats = LeaseStats()

    async def reserve(self, ask: BudgetAsk) -> LeaseHold:
        """Hold what the prompt and the first chunk of the answer may cost.

        Raises:
            BudgetExhausted: The account cannot cover it.
            NoAccount: The department has no account.
            LedgerUnavailable: No lease is left, and the ledger cannot be reached.
            Overloaded: Too many wait for the same account.
        """
        now_s = self.monotonic()
        line = self._lines.get(ask.account)
        if line is None:
            if not is_account(ask.account):
                # The ledger would reject the whole renewal.
                raise NoAccount
            line = self._lines[ask.account] = Line(ask.account)
        line.used_s = now_s
        hold = LeaseHold(self, line, ask, self.price(ask.base_model), next(self._numbers))
        if not line.waiters and now_s < line.valid_until_s and hold.take():
            self._stats.reservations += 1
            return hold
        await self._first(line, hold, now_s)
        self._stats.reservations += 1
        return hold

    def charge(self, principal: Principal) -> Charge:
        """Where a principal's requests are charged, and how they share engines.

        Raises:
            NoAccount: The department has no account.
        """
        charge = self.tree.charge(principal)
        line = self._lines.get(charge.account)
        if line is None or line.state is None:
            return charge
        return replace(charge, served_us=line.state.served_us)

    def usage(self, account: str) -> AccountState | None:
        """State of an account, as of the last renewal."""
        line = self._lines.get(account)
        if line is None:
            if not is_account(account):
                return None
            line = self._lines[account] = Line(account)
            self._renewals.wake()
        line.used_s = self.monotonic()
        return line.state

    def fits(self, ask: BudgetAsk) -> int | None:
        """The longest answer per choice, in tokens, that the account could still cover.

        An estimate by median prices; ``None`` where nothing is known of the account yet.
        """
        line = self._lines.get(ask.account)
        if line is None or line.state is None:
            return None
        return largest_answer(ask, self.price(ask.base_model), line.left(), limited(line.state))

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
        sent = self._renewals
        found.unsent, found.renewals, found.renew_us = sent.unsent, sent.done, sent.took_us
        found.failures, found.rejections = sent.failures, sent.rejections
        found.given_up = sent.given_up
        return found

    @property
    def lines(self) -> Collection[Line]:
        """Every account that has been asked for."""
        return self._lines.values()

    def age_s(self) -> float:
        """Seconds since the last answered renewal was sent; infinite before the first."""
        return self.monotonic() - self._answered_s

    @property
    def renew_s(self) -> float:
        """Seconds between renewals."""
        return self._renewals.renew_s

    @renew_s.setter
    def renew_s(self, seconds: float) -> None:
        self._renewals.renew_s = seconds

    def start(self) -> None:
        """Begin to renew; ``reserve`` does it too."""
        self._renewals.start()

    async def close(self) -> None:
        """Send the last settlements and give all leases back; twice is once.

        Gives up after ``WAIT_S``: then the leases end by themselves.
        """
        if self._closed:
            return
        self._closed = True
        await self._renewals.stop()
        until_s = self.monotonic() + WAIT_S
        for line in self._lines.values():
            for waiter in list(line.waiters):
                self._fail(line, waiter, LedgerUnavailable())
        await self._renewals.finish(until_s)

    async def wait(
        self,
        line: Line,
        *,
        attempt: Callable[[Level], bool],
        need: Callable[[], Amount],
        least: Amount,
        wait_s: float | None,
        first: bool = False,
    ) -> None:
        """Wait until something fits; the request's next chunk, or its first.

        Args:
            line: The account's lease.
            attempt: Reserve, if it fits.
            need: What to ask the ledger for.
            least: The least that could do.
            wait_s: Longest wait; ``None`` is ``WAIT_S``.
            first: It is a new request's.

        Raises:
            BudgetExhausted: The account cannot cover it.
            NoAccount: There is none.
            LedgerUnavailable: The ledger did not answer in time.
        """
        if self._closed:
            raise LedgerUnavailable
        now_s = self.monotonic()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = Waiter(attempt, need, least, done, now_s + GIVE_BACK_S, first)
        line.waiters[waiter] = None
        self._renewals.wake()
        try:
            async with asyncio.timeout(WAIT_S if wait_s is None else wait_s):
                await done
        except TimeoutError:
            if done.done() and not done.cancelled():
                done.result()
                return
            if waiter.answered:
                raise self._refusal(line, least) from None
            self._stats.unavailable += 1
            raise LedgerUnavailable from None
        finally:
            line.waiters.pop(waiter, None)

    def price(self, base_model: str) -> ModelPrice:
        """Price of a base model, as of the last renewal."""
        return self._prices.get(base_model, COLD)

    def freed(self, line: Line) -> None:
        """Something may have been given back: serve who waits, in the loop's next turn."""
        if not line.waiters:
            return
        if not self._given_back:
            asyncio.get_running_loop().call_soon(self._offer)
        self._given_back[line.account] = line

    def settled(self, line: Line, settlement: Settlement, pending: Amount) -> None:
        """Queue a settlement for the next renewal."""
        self._renewals.settle(line, settlement, pending)
        self.freed(line)

    async def _first(self, line: Line, hold: LeaseHold, now_s: float) -> None:
        """Reserve for a request that does not fit at once."""
        if now_s < line.unknown_until_s:
            raise NoAccount
        if now_s < line.valid_until_s and line.exhausted() and self._window_holds(line):
            raise self._refusal(line)
        least = hold.least()
        if len(line.waiters) >= MAX_WAITERS:
            raise self._crowded(line, least, now_s)
        try:
            await self.wait(
                line, attempt=hold.retry, need=hold.need, least=least, wait_s=None, first=True
            )
        except asyncio.CancelledError:
            if hold.reserved_tokens:
                hold.release()
            raise

    # -- for the renewals ---------------------------------------------------------------------

    def asks(self, seq: int) -> tuple[LeaseAsk, ...]:
        """See ``governance.budget.renewals.Desk``."""
        now_s = self.monotonic()
        elapsed_s, self._cushions_s = now_s - self._cushions_s, now_s
        asks = []
        for line in self._lines.values():
            need = Amount()
            for waiter in line.waiters:
                waiter.asked = waiter.asked or seq
                need += waiter.need()
            if line.scarce(need.gpu_us, need.tokens):
                need += Amount(line.owed_us, line.owed_tokens)
            reserved = Amount(line.open_us, line.open_tokens)
            cushion = line.cushion(elapsed_s, now_s)
            # The ledger rejects more, and no account has it: those who asked are refused one by
            # one, with what there is.
            amounts = (least(amount, LARGEST) for amount in (reserved, need, cushion))
            asks.append(LeaseAsk(line.account, *amounts))
        return tuple(asks)

    def answered(self, request: RenewRequest, reply: RenewReply, sent_s: float) -> None:
        """See ``governance.budget.renewals.Desk``."""
        self._answered_s = sent_s
        self.digest = reply.digest or self.digest
        self._prices = {price.base_model: price for price in reply.prices}
        leases = {lease.account: lease for lease in reply.leases}
        states = {state.account: state for state in reply.accounts}
        ttl_s = reply.ttl_ms / 1000
        valid_until_s = sent_s + ttl_s - max(ttl_s * MARGIN, 0.1)
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

    def rejected(self, request: RenewRequest, *, in_doubt: bool) -> None:
        """See ``governance.budget.renewals.Desk``."""
        for line in self._lines.values():
            if in_doubt:
                line.valid_until_s = float("-inf")
            for waiter in list(line.waiters):
                if request.settlements:
                    waiter.asked = 0  # likely not to blame: asked for again
                elif waiter.asked:
                    self._fail(line, waiter, LedgerUnavailable())

    def waiting(self) -> bool:
        """See ``governance.budget.renewals.Desk``."""
        return any(line.waiters for line in self._lines.values())

    # -- who waits ----------------------------------------------------------------------------

    def _offer(self) -> None:
        """Offer what was given back since the last turn of the loop."""
        lines, self._given_back = self._given_back, {}
        for line in lines.values():
            self._serve(line, in_order=True)

    def _serve(self, line: Line, *, in_order: bool = False) -> None:
        """Let everybody who waits try again, in order; refuse who need not wait longer.

        Args:
            line: The account.
            in_order: Of the new requests, none passes one that does not fit.
        """
        now_s = self.monotonic()
        if now_s >= line.valid_until_s:
            return
        blocked = False
        for waiter in list(line.waiters):
            if waiter.done.done() or (blocked and waiter.first):
                continue
            served = self._try(line, waiter, now_s)
            blocked = blocked or (in_order and waiter.first and not served)

    def _try(self, line: Line, waiter: Waiter, now_s: float) -> bool:
        """Let one who waits try again; whether he is through, one way or the other."""
        if waiter.attempt(Level.P99):
            return self._let(line, waiter)
        if not waiter.answered:
            return False
        waiting = now_s < waiter.until_s
        if waiting and line.unstarted and not line.exhausted():
            return False
        if waiter.attempt(Level.P50) or waiter.attempt(Level.EDGE):
            return self._let(line, waiter)
        if waiting and self._within_reach(line, waiter.least):
            return False
        self._fail(line, waiter, self._refusal(line, waiter.least))
        return True

    def _within_reach(self, line: Line, least: Amount) -> bool:
        """Whether it could fit, if other gateways gave back what they do not use."""
        best = line.reachable()
        return best.gpu_us >= least.gpu_us and best.tokens >= least.tokens

    def _crowded(self, line: Line, least: Amount, now_s: float) -> GatehouseError:
        """Why one more must not wait."""
        if now_s < line.valid_until_s and not self._within_reach(line, least):
            return self._refusal(line, least)
        return Overloaded("", None, 1)

    def _let(self, line: Line, waiter: Waiter) -> bool:
        line.waiters.pop(waiter, None)
        waiter.done.set_result(None)
        return True

    def _fail(self, line: Line, waiter: Waiter, error: GatehouseError) -> None:
        line.waiters.pop(waiter, None)
        if not waiter.done.done():
            waiter.done.set_exception(error)

    def _window_holds(self, line: Line) -> bool:
        """Whether the window that is known has not ended."""
        return line.state is not None and self._clock() < line.state.reset_us

    def _refusal(self, line: Line, need: Amount | None = None) -> BudgetExhausted:
        """Say what ran out, what is left, and when there is more."""
        self._stats.refusals += 1
        if line.state is None:
            return BudgetExhausted()
        return budget_refusal(line.state, line.left(), self._clock(), need)
