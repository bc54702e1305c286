"""A gateway's lease of one account: what is held, reserved, and still owed. Arithmetic only.

Of what the ledger lent (``hold``),

    free = hold - open - pending

may be reserved: ``open`` is what requests in flight have reserved, ``pending`` what was settled
and the ledger has not confirmed. A dimension without a limit has an endless ``hold``.

**Scarcity.** A request normally reserves its prompt and the first chunk of its answer, and the rest
chunk by chunk, since most answers are far shorter than they may be. That could let more answers
start than the account can finish. ``owed`` is what the answers in flight here may still need beyond
what they have reserved. The account is *scarce* for a request when, in a limited dimension,

    left < SCARCITY x (owed + its whole cost),   left = free + what the account has not lent out

``left`` is as of the last renewal. Then the whole answer is reserved at once, and ``owed`` is not
free any more: what has started can finish. While no more than ``SCARCITY`` gateways serve one
account, they cannot start more in chunks between them than it can finish.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp
from typing import TYPE_CHECKING

from governance.budget.messages import AccountState, LeaseState
from governance.budget.state import ZERO
from governance.types import Amount

if TYPE_CHECKING:
    from governance.budget.holds import LeaseHold
    from governance.budget.waiters import Waiter

ENDLESS = 1 << 60
SCARCITY = 8
RATE_TAU_S = 5.0
"""Time constant of the average of use."""
CUSHION_S = 5
"""A cushion is what is reserved in so many seconds on average."""
IDLE_S = 60.0
"""A line that nobody used for so long is given up."""


@dataclass(slots=True)
class Line:
    """One account at one gateway."""

    account: str
    lease_id: str = ""
    hold_us: int = 0
    hold_tokens: int = 0
    open_us: int = 0
    open_tokens: int = 0
    pending_us: int = 0
    pending_tokens: int = 0
    owed_us: int = 0
    owed_tokens: int = 0
    rest_us: int = 0
    """What the account has not lent out, as of the last renewal."""
    rest_tokens: int = 0
    limited_us: bool = True
    limited_tokens: bool = True
    valid_until_s: float = float("-inf")
    """The hold must not be used after this time."""
    state: AccountState | None = None
    adjust: Amount = ZERO
    unknown_until_s: float = float("-inf")
    """The ledger said that there is no such account; it is not asked again before this time."""
    used_s: float = 0.0
    unstarted: int = 0
    """Holds whose prompt the engine has not counted yet."""
    waiters: dict[Waiter, None] = field(default_factory=dict)
    """In order of arrival."""
    _flow_us: int = 0
    _flow_tokens: int = 0
    _rate_us: float = 0.0
    """Average of what is reserved, per second."""
    _rate_tokens: float = 0.0
    _last_us: int = 0
    """Largest reservation of late: a cushion holds two of them."""
    _last_tokens: int = 0

    @property
    def free_us(self) -> int:
        """Device time that may be reserved; below 0 where the ledger lowered the hold."""
        return self.hold_us - self.open_us - self.pending_us

    @property
    def free_tokens(self) -> int:
        """Tokens that may be reserved."""
        return self.hold_tokens - self.open_tokens - self.pending_tokens

    def scarce(self, whole_us: int, whole_tokens: int) -> bool:
        """Whether answers must be reserved whole; see the module."""
        return self.free_us + self.rest_us < SCARCITY * (
            self.owed_us + whole_us
        ) or self.free_tokens + self.rest_tokens < SCARCITY * (self.owed_tokens + whole_tokens)

    def fits(self, more_us: int, more_tokens: int, owed_us: int, owed_tokens: int) -> bool:
        """Whether so much more may be reserved.

        Args:
            more_us: Device time.
            more_tokens: Tokens.
            owed_us: What to keep for other answers.
            owed_tokens: The same, tokens.
        """
        return (
            more_us <= 0 or more_us <= self.hold_us - self.open_us - self.pending_us - owed_us
        ) and (
            more_tokens <= 0
            or more_tokens
            <= self.hold_tokens - self.open_tokens - self.pending_tokens - owed_tokens
        )

    def put(self, hold: LeaseHold, reserved_us: int, reserved_tokens: int) -> None:
        """Set what a hold has reserved, and with it what it is owed."""
        more_us, more_tokens = (
            reserved_us - hold.reserved_us,
            reserved_tokens - hold.reserved_tokens,
        )
        owed_us, owed_tokens = hold.whole_us - reserved_us, hold.whole_tokens - reserved_tokens
        owed_us = owed_us if owed_us > 0 else 0
        owed_tokens = owed_tokens if owed_tokens > 0 else 0
        self.open_us += more_us
        self.open_tokens += more_tokens
        self.owed_us += owed_us - hold.owed_us
        self.owed_tokens += owed_tokens - hold.owed_tokens
        self._flow_us += more_us
        self._flow_tokens += more_tokens
        hold.reserved_us, hold.reserved_tokens = reserved_us, reserved_tokens
        hold.owed_us, hold.owed_tokens = owed_us, owed_tokens

    def remove(self, hold: LeaseHold, pending: Amount) -> None:
        """Take a settled hold out; ``pending`` stays held until the ledger has confirmed it."""
        self.open_us -= hold.reserved_us
        self.open_tokens -= hold.reserved_tokens
        self.owed_us -= hold.owed_us
        self.owed_tokens -= hold.owed_tokens
        self.pending_us += pending.gpu_us
        self.pending_tokens += pending.tokens
        self._last_us = max(hold.reserved_us, self._last_us * 7 // 8)
        self._last_tokens = max(hold.reserved_tokens, self._last_tokens * 7 // 8)
        # Given back before it was used: that is no use.
        self._flow_us -= max(hold.reserved_us - pending.gpu_us, 0)
        self._flow_tokens -= max(hold.reserved_tokens - pending.tokens, 0)

    def confirm(self, pending: Amount) -> None:
        """The ledger has a settlement."""
        self.pending_us -= pending.gpu_us
        self.pending_tokens -= pending.tokens

    def renewed(
        self, lease: LeaseState | None, state: AccountState | None, valid_until_s: float
    ) -> None:
        """Take the ledger's answer in."""
        hold = lease.hold if lease else Amount()
        if lease is not None:
            self.lease_id, self.adjust = lease.lease_id, lease.adjust
        self.hold_us, self.hold_tokens = hold.gpu_us, hold.tokens
        self.valid_until_s = valid_until_s
        if state is None:
            return
        self.state = state
        self.limited_us = state.rest_us is not None
        self.limited_tokens = state.rest_tokens is not None
        self.rest_us, self.rest_tokens = state.rest_us or 0, state.rest_tokens or 0
        if not self.limited_us:
            self.hold_us = ENDLESS
        if not self.limited_tokens:
            self.hold_tokens = ENDLESS

    def reachable(self) -> Amount:
        """What a request could get at best, if other gateways gave back what they do not use."""
        state = self.state
        gpu_us = tokens = ENDLESS
        if state is not None and state.reach_us is not None:
            gpu_us = max(state.reach_us, max(self.free_us, 0) + self.rest_us)
        if state is not None and state.reach_tokens is not None:
            tokens = max(state.reach_tokens, max(self.free_tokens, 0) + self.rest_tokens)
        return Amount(gpu_us, tokens)

    def left(self) -> Amount:
        """What new requests could have at most, by the last renewal; nothing below 0."""
        return Amount(
            max(self.free_us, 0) + self.rest_us, max(self.free_tokens, 0) + self.rest_tokens
        )

    def exhausted(self) -> bool:
        """Whether everything is spent, so that nobody needs to be asked."""
        return self.state is not None and self.state.over

    @property
    def stops(self) -> bool:
        """Whether a running answer stops at the limit."""
        return self.state is None or self.state.stops

    def cushion(self, elapsed_s: float, now_s: float) -> Amount:
        """What to ask for beyond what is needed; ``elapsed_s`` since this was last called."""
        if elapsed_s > 0:
            keep = exp(-elapsed_s / RATE_TAU_S)
            gain = (1 - keep) / elapsed_s
            self._rate_us = max(0.0, keep * self._rate_us + gain * self._flow_us)
            self._rate_tokens = max(0.0, keep * self._rate_tokens + gain * self._flow_tokens)
            self._flow_us = self._flow_tokens = 0
        if now_s - self.used_s > IDLE_S:
            return Amount()
        return Amount(
            max(int(CUSHION_S * self._rate_us), 2 * self._last_us),
            max(int(CUSHION_S * self._rate_tokens), 2 * self._last_tokens),
        )

    def idle(self, now_s: float) -> bool:
        """Whether nothing is left of it and nobody used it of late."""
        return (
            now_s - self.used_s > IDLE_S
            and not self.waiters
            and not (self.open_us or self.open_tokens or self.pending_us or self.pending_tokens)
        )
