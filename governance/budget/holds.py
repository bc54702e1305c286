"""One request's hold on its account: estimate, correction, chunks, settlement."""

from __future__ import annotations

from typing import TYPE_CHECKING

from governance.budget.messages import ModelPrice, Settlement
from governance.budget.prices import KIB
from governance.budget.waiters import Level
from governance.errors import BudgetExhausted, LedgerUnavailable
from governance.types import Amount, BudgetAsk, Reservation, Usage

if TYPE_CHECKING:
    from governance.budget.leases import LeaseBook
    from governance.budget.lines import Line

PROMPT_MIN_TOKENS = 32
"""No prompt is estimated at less: a chat template adds tokens that no byte stands for."""
EDGE_DIVISOR = 8
"""What is left of a budget is worth a try for a prompt of this part of the median: if the engine
counts more than is left, the request is refused before it answers."""
DENIED_S = 0.5
"""After a chunk was denied, it is not asked for again this soon while there is some left to use."""
SOFT_WAIT_S = 0.25
"""Longest wait for a chunk that can be done without for now."""
NEVER = 1 << 62


class LeaseHold:
    """Implements ``governance.ports.Hold``; made by ``LeaseBook.reserve`` only.

    Args:
        book: The gateway's leases.
        line: The account's lease.
        ask: The request.
        price: Of its base model.
        number: Makes its id unique within the gateway.
    """

    __slots__ = (
        "_answer",
        "_ask",
        "_book",
        "_decode_ns",
        "_denied_s",
        "_done",
        "_first",
        "_line",
        "_next_raw",
        "_next_tokens",
        "_number",
        "_prefill_ns",
        "_price",
        "_prompt",
        "_prompt_known",
        "_raw_us",
        "_settled",
        "_weight",
        "_whole",
        "owed_tokens",
        "owed_us",
        "reserved_tokens",
        "reserved_us",
        "whole_tokens",
        "whole_us",
    )

    def __init__(
        self, book: LeaseBook, line: Line, ask: BudgetAsk, price: ModelPrice, number: int
    ) -> None:
        self._book = book
        self._line = line
        self._ask = ask
        self._price = price
        self._number = number
        self._weight = price.weight_milli
        self._whole = ask.max_tokens * ask.choices
        chunk = book.chunk_tokens
        self._first = self._whole if ask.max_tokens <= chunk else chunk * ask.choices
        self.reserved_us = self.reserved_tokens = 0
        self.owed_us = self.owed_tokens = 0
        self._answer = 0
        """Answer tokens that are reserved."""
        self._done = 0
        self._raw_us = 0
        self._denied_s = float("-inf")
        self._prompt_known = False
        self._settled: Amount | None = None
        self._next_tokens = self._next_raw = NEVER
        self._estimate(Level.P99)

    @property
    def id(self) -> str:
        """Id of the reservation."""
        return f"rsv_{self._book.gateway_id}_{self._number}"

    @property
    def reservation(self) -> Reservation:
        """The hold as it is now."""
        reserved = Amount(self.reserved_us, self.reserved_tokens)
        return Reservation(self.id, self._line.account, reserved)

    @property
    def lease_id(self) -> str:
        """Lease that it was taken from."""
        return self._line.lease_id

    @property
    def charged(self) -> Amount:
        """What has been charged so far; final after ``settle``."""
        if self._settled is not None:
            return self._settled
        prompt = self._prompt if self._prompt_known else 0
        return Amount(self._raw_us * self._weight // 1000, prompt + self._done)

    @property
    def whole(self) -> Amount:
        """What it may cost in all."""
        return Amount(self.whole_us, self.whole_tokens)

    def least(self) -> Amount:
        """The least that could do: the edge estimate, whole."""
        self._estimate(Level.EDGE)
        found = self.whole
        self._estimate(Level.P99)
        return found

    def need(self) -> Amount:
        """What to ask the ledger for, to reserve this for the first time."""
        answer = self._first
        if self._line.state is None or self._line.scarce(self.whole_us, self.whole_tokens):
            answer = self._whole
        return Amount(self._cost_us(self._prompt, answer), self._prompt + answer)

    def retry(self, level: Level) -> bool:
        """Reserve for the first time after a wait: prices may have come meanwhile."""
        price = self._book.price(self._ask.base_model)
        if price is not self._price:
            self._price, self._weight = price, price.weight_milli
            self._estimate(Level.P99)
        return self.take(level)

    def take(self, level: Level = Level.P99) -> bool:
        """Reserve for the first time, if it fits."""
        line = self._line
        if level is not Level.P99:
            self._estimate(level)
        prompt, answer, owed_us, owed_tokens = self._prompt, self._first, 0, 0
        if line.scarce(self.whole_us, self.whole_tokens):
            answer, owed_us, owed_tokens = self._whole, line.owed_us, line.owed_tokens
        gpu_us, tokens = self._cost_us(prompt, answer), prompt + answer
        if level is Level.EDGE and line.limited_tokens:
            # All that is left, up to the median: it is given back as soon as the prompt is counted.
            room = line.free_tokens - owed_tokens - tokens
            tokens += max(
                0, min(room, self._tokens(self._price.prompt_tokens_per_kib_p50) - prompt)
            )
        if not line.fits(gpu_us, tokens, owed_us, owed_tokens):
            if level is not Level.P99:
                self._estimate(Level.P99)
            return False
        self._answer = answer
        line.unstarted += 1
        line.put(self, gpu_us, tokens)
        self._mark()
        return True

    async def started(self, prompt_tokens: int) -> None:
        """The engine has counted the prompt: replace the estimate, up or down.

        Raises:
            BudgetExhausted: The prompt is longer than estimated and the account cannot cover it.
            LedgerUnavailable: The same, and the ledger does not answer.
        """
        if self._settled is not None:
            return
        line = self._line
        if not self._prompt_known:
            line.unstarted -= 1
            self._prompt_known = True
        if prompt_tokens > 0:
            self._prompt = prompt_tokens
            self._reckon_whole()
            try:
                await self._grow(self._answer, wait_s=None if line.stops else SOFT_WAIT_S)
            except (BudgetExhausted, LedgerUnavailable):
                if line.stops:
                    raise
        self._book.freed(line)

    def consumed(self, tokens: int, gpu_us: int) -> bool:
        """Count what was generated; whether the next chunk must be reserved now."""
        self._done += tokens
        if gpu_us > self._raw_us:
            self._raw_us = gpu_us
        return self._done >= self._next_tokens or self._raw_us >= self._next_raw

    async def extend(self) -> None:
        """Reserve the next chunk; what is short of device time is reserved as well.

        Returns without it while some of what was reserved is left: the caller goes on, and comes
        again. So it does where the account is soft, and what has begun is finished.

        Raises:
            BudgetExhausted: What was reserved is used up, and the account cannot cover more.
            LedgerUnavailable: The same, and the ledger does not answer.
        """
        if self._settled is not None:
            return
        answer = self._answer
        if self._done >= self._next_tokens:
            chunk = self._book.chunk_tokens * self._ask.choices
            answer = min(self._whole, max(answer, self._done) + chunk)
        must = self._used_up() and self._line.stops
        if not must and self._book.monotonic() < self._denied_s + DENIED_S:
            return
        try:
            await self._grow(answer, wait_s=None if must else SOFT_WAIT_S)
        except (BudgetExhausted, LedgerUnavailable):
            self._denied_s = self._book.monotonic()
            if self._used_up() and self._line.stops:
                raise

    def settle(self, usage: Usage | None, gpu_us: int | None) -> None:
        """Replace the hold by what was used; repeating it changes nothing.

        Where the engine has not said all (``None``), the whole hold stays held until the ledger
        confirms the settlement: the engine's report is likely there by then.
        """
        if self._settled is not None:
            return
        if gpu_us is not None:
            self._raw_us = max(gpu_us, self._raw_us)
        used = self.charged
        if usage is not None:
            used = Amount(used.gpu_us, usage.total_tokens)
        reserved = Amount(self.reserved_us, self.reserved_tokens)
        if not self._prompt_known:
            self._line.unstarted -= 1
        self._settled = used
        pending = used
        if usage is None or gpu_us is None:
            pending = Amount(max(used.gpu_us, reserved.gpu_us), max(used.tokens, reserved.tokens))
        ask = self._ask
        settlement = Settlement(
            self.id,
            self._line.account,
            ask.request_id,
            ask.model,
            ask.base_model,
            self._raw_us or gpu_us,
            used,
            usage is not None,
            ask.prompt_bytes if usage is not None else 0,
            usage.prompt_tokens if usage is not None else 0,
        )
        self._line.remove(self, pending)
        self._book.settled(self._line, settlement, pending)

    def release(self) -> None:
        """Give back what was reserved for a request that was cancelled while it waited."""
        if self._settled is None:
            self._line.unstarted -= not self._prompt_known
            self._settled = Amount()
            self._line.remove(self, Amount())

    async def _grow(self, answer: int, wait_s: float | None) -> None:
        """Reserve so many answer tokens, and the device time that goes with them."""
        if self._regrow(answer):
            return
        await self._book.wait(
            self._line,
            attempt=lambda _: self._regrow(answer),
            need=lambda: self._more(answer),
            least=self._more(answer),
            wait_s=wait_s,
        )

    def _target(self, answer: int) -> tuple[int, int]:
        """Charged so far, and at its price what is to come."""
        charged_us = self._raw_us * self._weight // 1000
        if self._raw_us == 0:
            gpu_us = self._cost_us(self._prompt, answer)
        else:
            gpu_us = charged_us + self._cost_us(0, max(answer - self._done, 0))
        return gpu_us, self._prompt + max(answer, self._done)

    def _more(self, answer: int) -> Amount:
        gpu_us, tokens = self._target(answer)
        return Amount(max(gpu_us - self.reserved_us, 0), max(tokens - self.reserved_tokens, 0))

    def _regrow(self, answer: int) -> bool:
        """Set what is reserved, if that fits."""
        if self._settled is not None:
            return True
        line = self._line
        gpu_us, tokens = self._target(answer)
        more_us, more_tokens = gpu_us - self.reserved_us, tokens - self.reserved_tokens
        owed_us = owed_tokens = 0
        if more_us > 0 or more_tokens > 0:
            if self._book.monotonic() >= line.valid_until_s:
                return False
            if line.scarce(0, 0):
                owed_us = line.owed_us - self.owed_us
                owed_tokens = line.owed_tokens - self.owed_tokens
            if not line.fits(more_us, more_tokens, owed_us, owed_tokens):
                return False
        self._answer = answer
        line.put(self, gpu_us, tokens)
        self._mark()
        return True

    def _used_up(self) -> bool:
        """Whether nothing is left of what was reserved, in a dimension with a limit."""
        charged, line = self.charged, self._line
        return (line.limited_us and charged.gpu_us >= self.reserved_us) or (
            line.limited_tokens and self._done >= self._answer and self._answer < self._whole
        )

    def _mark(self) -> None:
        """Note at what point the next chunk must be reserved: half a chunk before the end."""
        half = self._book.chunk_tokens * self._ask.choices // 2
        self._next_tokens = self._answer - half if self._answer < self._whole else NEVER
        if self._line.limited_us:
            ahead = max(min(half, self._whole - self._done), 0)
            short_us = self.reserved_us - self._cost_us(0, ahead)
            self._next_raw = max(short_us * 1000 // self._weight, 1)
        else:
            self._next_raw = NEVER

    def _estimate(self, level: Level) -> None:
        """Estimate prompt and prices from the size of the body and recent requests."""
        price = self._price
        if level is Level.P99:
            self._prompt = self._tokens(price.prompt_tokens_per_kib_p99)
            self._prefill_ns, self._decode_ns = price.prefill_p99_ns, price.decode_p99_ns
        else:
            self._prompt = self._tokens(price.prompt_tokens_per_kib_p50)
            self._prefill_ns, self._decode_ns = price.prefill_p50_ns, price.decode_p50_ns
            if level is Level.EDGE:
                self._prompt = max(self._prompt // EDGE_DIVISOR, 1)
        self._reckon_whole()

    def _reckon_whole(self) -> None:
        self.whole_us = self._cost_us(self._prompt, self._whole)
        self.whole_tokens = self._prompt + self._whole

    def _tokens(self, per_kib: int) -> int:
        return max(-(-self._ask.prompt_bytes * per_kib // KIB), PROMPT_MIN_TOKENS)

    def _cost_us(self, prompt: int, answer: int) -> int:
        """Charged device-microseconds at this hold's prices, rounded up."""
        ns = prompt * self._prefill_ns + answer * self._decode_ns
        return -(-ns * self._weight // 1_000_000)
