"""One admitted request as its engine meters it: what it has cost so far, and when that is final."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from deployments.data_plane.ticket_form import Ticket
from deployments.metering.wire import Row
from governance.budget.messages import MeterRow

if TYPE_CHECKING:
    from deployments.metering.collector import MeterCollector

log = logging.getLogger("gatehouse.metering")

FINAL_TIMEOUT_S = 0.25
GRACE_S = 5.0
"""After an exchange is over, time for the core to say that its requests have ended."""
GRACE_STEPS = 3
"""Steps that the core must have ended in that time: what was aborted pays for the one under way,
which may take longer than any number of seconds that could stand here."""
LONGEST_S = 120.0
"""Time after which a core that neither steps nor ends is not waited for."""


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
        "opened_at_s",
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
        self.opened_at_s = time.monotonic()
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
    def begun(self) -> bool:
        """Whether the core has worked for it, as far as it has told."""
        return self.prefill_ns + self.decode_ns > 0

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
            account=ticket.account,
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
