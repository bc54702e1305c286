"""Calls to the budget ledger, for gateways, engines and administration. How they travel is passed.

Whoever calls finds the ledger, and finds it again after a failure, as for the control plane. What
gateways and engines say is cumulative or numbered, so each of these calls may be sent again: their
own loops do that, and this module does not wait on their behalf. Administration is sent again
here, a few times.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from governance.budget.messages import AccountState, MeterReport, RenewReply, RenewRequest
from governance.budget.renewals import CALL_S
from governance.errors import GatehouseError, LedgerUnavailable
from governance.ports import Clock

log = logging.getLogger("gatehouse.ledger")

CALL_TIMEOUT_S = 3.0
"""How long one call may take, in seconds; finding the ledger included."""
RENEW_TIMEOUT_S = CALL_S - 0.5
"""The same for a renewal: ends before the lease book gives it up, so that it ends here."""
ADMIN_TIMEOUT_S = 8.0
"""The same for an override, which waits for its record."""
START_TIMEOUT_S = 60.0
"""How long ``ready`` waits at a time, in seconds."""
DEADLINE_US = 15_000_000
"""A renewal or override that reaches the ledger later than this after it was sent is refused there:
Ray keeps calls while the ledger is started again, and their callers have long sent others."""
_ATTEMPTS = 5
_PAUSE_S = 0.3


class LedgerLink(Protocol):
    """A way to call the ledger; good until it raises ``LedgerUnavailable``."""

    def __call__(self, method: str, *args: Any) -> Awaitable[Any]:
        """Call a method of ``LedgerService`` by name.

        Raises:
            GatehouseError: What the method raised.
            LedgerUnavailable: The ledger could not be reached.
        """
        ...


class LedgerCalls:
    """The ledger from afar. Every method raises ``LedgerUnavailable`` when there is no answer.

    Args:
        resolve: Finds the ledger anew; may raise anything.
        budgets: Budgets of this application (``Budgets.dump``), given to the ledger
            whenever it is found; ``None`` for those who do not know them.
        clock: Wall clock, microseconds.
    """

    def __init__(
        self,
        resolve: Callable[[], Awaitable[LedgerLink]],
        budgets: Mapping[str, Any] | None = None,
        *,
        clock: Clock = lambda: time.time_ns() // 1000,
    ) -> None:
        self._resolve = resolve
        self._budgets = budgets
        self._clock = clock
        self._link: LedgerLink | None = None
        self._finding: asyncio.Task[LedgerLink] | None = None

    async def renew(self, request: RenewRequest) -> RenewReply:
        """``LedgerService.renew``; once, within ``RENEW_TIMEOUT_S``."""
        deadline_us = self._clock() + DEADLINE_US
        reply: RenewReply = await self._call(RENEW_TIMEOUT_S, "renew", request, deadline_us)
        return reply

    async def report(self, report: MeterReport) -> None:
        """``LedgerService.report``; once, within ``CALL_TIMEOUT_S``. Durable when it returns."""
        await self._call(CALL_TIMEOUT_S, "report", report)

    async def ready(self) -> None:
        """Wait until the ledger has started and has the budgets of this application."""
        await self._insist("state", None, timeout_s=START_TIMEOUT_S)

    async def budgets(self) -> dict[str, Any]:
        """The budgets that hold (``Budgets.dump``); once, within ``CALL_TIMEOUT_S``."""
        found: dict[str, Any] = await self._call(CALL_TIMEOUT_S, "budgets")
        return found

    async def configure(self, budgets: Mapping[str, Any]) -> None:
        """``LedgerService.configure``; once, within ``CALL_TIMEOUT_S``."""
        await self._call(CALL_TIMEOUT_S, "configure", budgets)

    async def state(
        self, account: str | None = None, users: bool = False
    ) -> tuple[AccountState, ...]:
        """One account, or all; empty where there is none.

        Args:
            account: The account; ``None`` for all.
            users: With all of them, accounts of single users as well.
        """
        states: tuple[AccountState, ...] = await self._call(CALL_TIMEOUT_S, "state", account, users)
        return states

    async def set_override(
        self,
        account: str,
        limit_us: int | None,
        limit_tokens: int | None,
        expires_us: int,
        reason: str,
        by: str,
    ) -> AccountState:
        """Override an account's limits (``LedgerService.set_override``).

        Raises:
            ObjectNotFound: There is no such account.
            InvalidRequest: A value is out of range.
            AuditUnavailable: It cannot be recorded, and was not done or was taken back.
        """
        values = (account, limit_us, limit_tokens, expires_us, reason, by)
        state: AccountState = await self._administer("set_override", *values, self._deadline_us())
        return state

    async def clear_override(self, account: str, by: str) -> AccountState:
        """End an override (``LedgerService.clear_override``); raises as ``set_override``."""
        values = (account, by, self._deadline_us())
        state: AccountState = await self._administer("clear_override", *values)
        return state

    async def transfer(
        self, source: str, target: str, gpu_us: int, tokens: int, reason: str, by: str
    ) -> tuple[AccountState, AccountState]:
        """Move budget between two accounts (``LedgerService.transfer``).

        Returns:
            Both accounts as they are then, the source first.

        Raises:
            ObjectNotFound: There is no such account.
            InvalidRequest: It cannot be moved; the message says why.
            AuditUnavailable: It was not done, or it is not in the audit trail yet.
        """
        # However often it is sent, it is one demand.
        values = (source, target, gpu_us, tokens, reason, by, self._deadline_us())
        states: tuple[AccountState, AccountState] = await self._administer(
            "transfer", *values, secrets.token_hex(16)
        )
        return states

    async def apply(self, config: Mapping[str, Any], reason: str, by: str) -> str:
        """Take up another budgets file (``LedgerService.apply``); gives its digest.

        Raises:
            InvalidRequest: It is wrong, or does not add up; the message says where and why.
            AuditUnavailable: It was not done, or it is not in the audit trail yet.
        """
        values = (dict(config), reason, by, self._deadline_us())
        digest: str = await self._administer("apply", *values)
        return digest

    def _deadline_us(self) -> int:
        return self._clock() + DEADLINE_US

    async def _administer(self, method: str, *args: Any) -> Any:
        return await self._insist(method, *args, timeout_s=ADMIN_TIMEOUT_S)

    async def _insist(self, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await self._call(timeout_s, method, *args)
            except LedgerUnavailable:
                if attempt == _ATTEMPTS:
                    raise
            await asyncio.sleep(_PAUSE_S * attempt)
        raise LedgerUnavailable

    async def _call(self, timeout_s: float, method: str, *args: Any) -> Any:
        """Call once.

        Raises:
            GatehouseError: What the method raised.
            LedgerUnavailable: No answer, for whatever reason; the link is given up. So it is when
                the caller gives up sooner: nobody knows whether the ledger is still there.
        """
        link: LedgerLink | None = None
        try:
            async with asyncio.timeout(timeout_s):
                link = await self._connect()
                return await link(method, *args)
        except (LedgerUnavailable, asyncio.CancelledError):
            self._forget(link)
            raise
        except GatehouseError:
            raise
        except Exception as error:
            self._forget(link)
            log.warning("ledger: %s failed (%s)", method, type(error).__name__)
            raise LedgerUnavailable from error

    def _forget(self, link: LedgerLink | None) -> None:
        """Give a link up, unless somebody has found another meanwhile."""
        if self._link is link:
            self._link = None

    async def _connect(self) -> LedgerLink:
        """The link; found once for all who wait, and found to the end when a waiter gives up."""
        if self._link is not None:
            return self._link
        if self._finding is None:
            self._finding = asyncio.create_task(self._find_link(), name="ledger-find")
        return await asyncio.shield(self._finding)

    async def _find_link(self) -> LedgerLink:
        try:
            link = await self._resolve()
            if self._budgets is not None:
                await link("configure", self._budgets)
            self._link = link
            return link
        finally:
            self._finding = None
