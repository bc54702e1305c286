"""Delivers waiting alerts to the webhook: at least once, in the order of each account.

The ledger keeps an alert in its database until it is told that it is done with, so a restart loses
none: it is sent again with the same ``webhook-id`` and the same body, by which a receiver tells a
repeat. All that is kept in memory is how the attempts of what waits went, for ``BATCH`` alerts.

**Order.** Of one account an alert is not sent before an earlier one is delivered or given up. An
alert that its receiver cannot take holds no other account up.

**Retries.** After the n-th failed attempt comes a pause drawn evenly from half of to the whole of
``min(5 s x 2^(n-1), 10 min)``, or what ``Retry-After`` asks for, if that is longer. Where two
messages in a row fail, or the receiver asks for a pause, nothing at all is sent before it ends. An
alert that is not delivered ``GIVE_UP_US`` after it was crossed is given up, by the wall clock, so
that restarts do not renew the time, and after one attempt at least, so that a clock that jumps
loses none unheard; so is one that the receiver refuses for good. Both are an event in the audit
trail, beside the ``budget.threshold`` that each alert is anyway.

**No webhook.** Then nobody wants to be told, and what waits is forgotten at once.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from deployments.alerts.payload import Message, messages
from deployments.alerts.sender import Attempt, Result
from deployments.alerts.signing import SecretError
from governance.errors import GatehouseError
from governance.ports import Clock
from governance.tracebacks import without_messages

log = logging.getLogger("gatehouse.alerts")

POLL_S = 1.0
"""How often waiting alerts are looked for, in seconds."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 600.0
GIVE_UP_US = 24 * 3_600_000_000
BATCH = 200
"""Alerts looked at together; bounds memory."""

Rows = list[tuple[int, dict[str, Any]]]


class Sender(Protocol):
    """One attempt; ``deployments.alerts.sender.WebhookSender``."""

    async def send(
        self, url: str, secrets: tuple[bytes, ...], message_id: str, body: bytes
    ) -> Attempt:
        """Try once."""
        ...


class Source(Protocol):
    """Where alerts wait: the ledger."""

    async def alerts(self, limit: int) -> Rows:
        """Waiting alerts, oldest first, each with its number."""
        ...

    async def alerts_done(self, up_to: int) -> None:
        """Forget alerts up to a number."""
        ...

    async def alert_lost(self, alert: Mapping[str, Any], reason: str) -> None:
        """Put on record that nobody was told of an alert."""
        ...


@dataclass(slots=True)
class DeliveryStats:
    """Counters since the process started, for metrics."""

    delivered: int = 0
    """Messages that the receiver took."""
    retried: int = 0
    """Attempts that failed and are repeated."""
    refused: int = 0
    """Messages that the receiver refused for good."""
    expired: int = 0
    """Messages that were given up after ``GIVE_UP_US``."""
    coalesced: int = 0
    """Alerts that a higher threshold's message told of."""
    unwanted: int = 0
    """Alerts for which there was no webhook."""
    waiting: int = 0
    """Alerts that wait now; ``BATCH`` stands for more."""
    oldest_us: int = 0
    """When the oldest of them was crossed; 0 where none waits."""


@dataclass(slots=True)
class _Tries:
    """How the attempts of one group of alerts went."""

    failed: int = 0
    due_s: float = float("-inf")


@dataclass(slots=True)
class Delivery:
    """See the module. Runs in one task.

    Args:
        source: Where alerts wait.
        sender: Delivers one.
        webhook: URL as the budgets file that holds now says it; ``None``: nobody is told.
        secrets: To sign with; read for each round, so that a file that is replaced holds at once.
            Raises ``SecretError``.
        clock: Wall clock, microseconds.
        monotonic: Seconds.
        draw: Even draw from [0, 1).
    """

    source: Source
    sender: Sender
    webhook: Callable[[], str | None]
    secrets: Callable[[], tuple[bytes, ...]]
    clock: Clock
    monotonic: Callable[[], float] = time.monotonic
    draw: Callable[[], float] = random.random
    stats: DeliveryStats = field(default_factory=DeliveryStats)
    _tries: dict[tuple[str, str, int], _Tries] = field(default_factory=dict)
    _done: set[int] = field(default_factory=set)
    """Alerts that are done with, and wait for an earlier one before they can be forgotten."""
    _silent_until_s: float = float("-inf")
    _in_a_row: int = 0
    """Attempts that failed since the last that did not."""
    _complained: str = ""
    """What was logged last: an outage is one line, not thousands."""

    async def run(self) -> None:
        """Deliver for ever."""
        while True:
            try:
                await self.round()
            except GatehouseError as error:
                self._complain(f"the ledger does not give alerts ({error.code})")
            except Exception as error:
                self._complain(f"not delivered\n{without_messages(error)}")
            await asyncio.sleep(POLL_S)

    async def round(self) -> None:
        """Try once what is due now.

        Raises:
            LedgerUnavailable: Alerts cannot be had, or not be forgotten.
        """
        rows = await self.source.alerts(BATCH)
        self._note(rows)
        if not rows:
            self._tries.clear()
            return
        url = self.webhook()
        if url is None:
            self.stats.unwanted += len(rows)
            await self.source.alerts_done(rows[-1][0])
            self._done.clear()
            return
        waiting = messages(row for row in rows if row[0] not in self._done)
        groups = {message.group for message in waiting}
        self._tries = {group: tries for group, tries in self._tries.items() if group in groups}
        order = [seq for seq, _ in rows]
        blocked: set[str] = set()
        for message in waiting:
            if message.account in blocked or not await self._deliver(url, message):
                blocked.add(message.account)
            else:
                await self._forget(order, message.seqs)

    async def _deliver(self, url: str, message: Message) -> bool:
        """Whether a message is done with, one way or the other."""
        tries = self._tries.get(message.group, _Tries())
        if tries.failed and self.clock() - message.ts_us > GIVE_UP_US:
            await self._lose(message, "not delivered in time")
            self.stats.expired += 1
            return True
        now_s = self.monotonic()
        if now_s < max(tries.due_s, self._silent_until_s):
            return False
        try:
            secrets = self.secrets()
        except SecretError as error:
            # Nothing leaves unsigned.
            self._failed(message, tries, None)
            self._silent_until_s = self.monotonic() + FIRST_PAUSE_S
            self._complain(str(error))
            return False
        attempt = await self.sender.send(url, secrets, message.id, message.body)
        if attempt.result is Result.LATER:
            self._failed(message, tries, attempt.retry_after_s)
            self._complain(f"{attempt.why}; tried again")
            return False
        self._in_a_row = 0
        if attempt.result is Result.REFUSED:
            await self._lose(message, attempt.why)
            self.stats.refused += 1
            return True
        self.stats.delivered += 1
        self.stats.coalesced += len(message.seqs) - 1
        if self._complained:
            log.warning("alerts: delivered again")
            self._complained = ""
        return True

    def _failed(self, message: Message, tries: _Tries, asked_s: float | None) -> None:
        """An attempt failed: when the next may be."""
        self.stats.retried += 1
        tries.failed += 1
        self._in_a_row += 1
        whole_s = min(FIRST_PAUSE_S * 2 ** min(tries.failed - 1, 30), LONGEST_PAUSE_S)
        pause_s = max(whole_s * (1 + self.draw()) / 2, asked_s or 0.0)
        tries.due_s = self.monotonic() + pause_s
        self._tries[message.group] = tries
        if asked_s is not None or self._in_a_row > 1:
            self._silent_until_s = max(self._silent_until_s, tries.due_s)

    async def _lose(self, message: Message, why: str) -> None:
        log.error("alerts: nobody was told of %s (%s)", message.alert["id"], why)
        await self.source.alert_lost(message.alert, why)

    async def _forget(self, order: list[int], seqs: tuple[int, ...]) -> None:
        """Alerts are done with: the ledger forgets those before which none waits.

        Args:
            order: Numbers that the ledger still has; those that it forgets are taken out.
            seqs: Of the alerts that are done with.
        """
        self._done.update(seqs)
        count = next((n for n, seq in enumerate(order) if seq not in self._done), len(order))
        if count:
            await self.source.alerts_done(order[count - 1])
            self._done.difference_update(order[:count])
            del order[:count]

    def _note(self, rows: Rows) -> None:
        waiting = [alert for seq, alert in rows if seq not in self._done]
        self.stats.waiting = len(waiting)
        self.stats.oldest_us = min((int(alert["ts_us"]) for alert in waiting), default=0)

    def _complain(self, what: str) -> None:
        if what != self._complained:
            log.error("alerts: %s", what)
            self._complained = what
