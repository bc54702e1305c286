"""Budgets over HTTP: what a department has used, and overriding its limits for a time.

    GET    /v1/usage                      any principal    its own department's account
    GET    /v1/usage?department=NAME      budgets:read     another department's account
    GET    /v1/admin/budgets              budgets:read     all accounts
    GET    /v1/admin/budgets/{account}    budgets:read     one account
    PUT    /v1/admin/budgets/{account}    budgets:manage   override its limits until a moment
    DELETE /v1/admin/budgets/{account}    budgets:manage   end the override

An override always ends, at most 31 days ahead, and then the budgets file holds again. A service
key sets none, whatever its roles: who spends a budget by program should not raise it by program.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

from pydantic import Field

from deployments.api.accounts import account_object
from deployments.api.admin_models import Fields, NoFields, Text, parse
from governance.budget.messages import AccountState
from governance.errors import (
    InvalidRequest,
    LedgerUnavailable,
    NoAccount,
    NotPermitted,
    ObjectNotFound,
)
from governance.policy.model import Name, Permission
from governance.ports import Clock
from governance.types import Principal, PrincipalKind

Json = dict[str, Any]
Handler = Callable[[Principal, Json], Awaitable[Json]]

FRESH_S = 1.0
"""An answer of the ledger serves everybody who asks within this time, in seconds."""
USABLE_S = 60.0
"""While the ledger cannot be reached, an older answer is shown for this long, in seconds."""
MAX_OTHERS = 1_000
"""Answers kept about accounts that are in no list."""
MIN_OVERRIDE_S = 60
MAX_OVERRIDE_S = 31 * 86_400
MAX_GPU_US = 10**15
"""Most that an override may allow, in device-microseconds: about 32 device-years."""
MAX_TOKENS = 10**13

_SECOND_US = 1_000_000


class BudgetControl(Protocol):
    """The budget ledger, as this interface needs it. Every method raises ``LedgerUnavailable``."""

    async def state(self, account: str | None = None) -> tuple[AccountState, ...]:
        """One account, or all; empty where there is none."""
        ...

    async def set_override(
        self,
        account: str,
        limit_us: int | None,
        limit_tokens: int | None,
        expires_us: int,
        reason: str,
        by: str,
    ) -> AccountState:
        """Override limits; ``None`` leaves a dimension as the file has it. ``by``: its key."""
        ...

    async def clear_override(self, account: str, by: str) -> AccountState:
        """End an override; an account without one is no error."""
        ...


class UsageQuery(Fields):
    """``GET /v1/usage``."""

    department: Name | None = None
    """Department to show; left out, the caller's."""


class AccountReference(Fields):
    """A request about one account."""

    account: Name
    """Name of the account: the department that it is for."""


class SetOverride(AccountReference):
    """Limits that hold instead of the file's, for a time."""

    gpu_us: int | None = Field(default=None, ge=0, le=MAX_GPU_US)
    """Charged device time per window, microseconds; left out, as in the file."""
    tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    """Tokens per window; left out, as in the file."""
    expires_in_s: int = Field(ge=MIN_OVERRIDE_S, le=MAX_OVERRIDE_S)
    """Seconds until the file's limits hold again: a minute to 31 days. There is no default."""
    reason: Text
    """For the record."""


class UsageApi:
    """Handlers that take an authenticated principal and a JSON object and give a JSON object.

    However many ask, each gateway asks the ledger once a second for all accounts that are in use or
    in the budgets file, and once a second for each other department that somebody asks for.

    Args:
        ledger: The budget ledger.
        authorize: Raises ``NotPermitted`` unless a principal has the named permission.
        clock: Wall clock, microseconds; ``None`` for the system's.
        monotonic: Seconds of a clock that never goes back.
    """

    def __init__(
        self,
        ledger: BudgetControl,
        authorize: Callable[[Principal, str], None],
        clock: Clock | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._authorize = authorize
        self._clock = clock or _system_clock
        self._monotonic = monotonic
        self._accounts: dict[str, AccountState] = {}
        self._asked_s = float("-inf")
        self._changes = 0
        self._asking: asyncio.Task[None] | None = None
        self._others: dict[str, tuple[float, AccountState | None]] = {}
        """Accounts that are in no list, or do not exist, and when the ledger was asked."""
        self._asking_for: dict[str, asyncio.Task[AccountState | None]] = {}

    def routes(self) -> Iterable[tuple[str, str, Handler, bool]]:
        """(method, path, handler, takes a body), as ``AdminApi.routes``."""
        return (
            ("GET", "/v1/admin/budgets", self.list_accounts, False),
            ("GET", "/v1/admin/budgets/{account}", self.get_account, False),
            ("PUT", "/v1/admin/budgets/{account}", self.set_override, True),
            ("DELETE", "/v1/admin/budgets/{account}", self.clear_override, False),
        )

    async def usage(self, principal: Principal, query: Json) -> Json:
        """One account: the caller's own, or with a permission another."""
        fields = parse(UsageQuery, query)
        department = fields.department or principal.department
        if department != principal.department:
            self._authorize(principal, Permission.BUDGETS_READ)
        try:
            return await self._shown(department)
        except ObjectNotFound:
            if department == principal.department:
                raise NoAccount from None
            raise

    async def list_accounts(self, principal: Principal, body: Json) -> Json:
        """All accounts, by name."""
        self._authorize(principal, Permission.BUDGETS_READ)
        parse(NoFields, body)
        await self._refresh()
        age_ms = self._age_ms()
        accounts = [self._accounts[name] for name in sorted(self._accounts)]
        return {"object": "list", "data": [account_object(state, age_ms) for state in accounts]}

    async def get_account(self, principal: Principal, body: Json) -> Json:
        """One account."""
        self._authorize(principal, Permission.BUDGETS_READ)
        return await self._shown(parse(AccountReference, body).account)

    async def set_override(self, principal: Principal, body: Json) -> Json:
        """Override an account's limits; effective at every gateway within a second."""
        self._may_change(principal)
        fields = parse(SetOverride, body)
        if fields.gpu_us is None and fields.tokens is None:
            raise InvalidRequest("Give 'gpu_us', 'tokens' or both.", "gpu_us")
        state = await self._ledger.set_override(
            fields.account,
            fields.gpu_us,
            fields.tokens,
            self._clock() + fields.expires_in_s * _SECOND_US,
            fields.reason,
            principal.key,
        )
        return self._changed(state)

    async def clear_override(self, principal: Principal, body: Json) -> Json:
        """End an override now."""
        self._may_change(principal)
        account = parse(AccountReference, body).account
        return self._changed(await self._ledger.clear_override(account, principal.key))

    def _may_change(self, principal: Principal) -> None:
        self._authorize(principal, Permission.BUDGETS_MANAGE)
        if principal.kind is PrincipalKind.KEY:
            raise NotPermitted("A service key cannot change budgets; use an access token.")

    def _changed(self, state: AccountState) -> Json:
        self._accounts[state.account] = state
        self._others.pop(state.account, None)
        self._changes += 1
        return account_object(state, 0)

    async def _shown(self, account: str) -> Json:
        await self._refresh()
        if (state := self._accounts.get(account)) is not None:
            return account_object(state, self._age_ms())
        # Nobody has used it yet, so it is in no list; but there may be a default for it.
        asked_s, state = await self._other(account)
        if state is None:
            raise ObjectNotFound("There is no such budget account.")
        return account_object(state, self._since_ms(asked_s))

    def _age_ms(self) -> int:
        return self._since_ms(self._asked_s)

    def _since_ms(self, asked_s: float) -> int:
        return int((self._monotonic() - asked_s) * 1000)

    async def _other(self, account: str) -> tuple[float, AccountState | None]:
        """An account that is in no list, and when the ledger was asked; one call for all."""
        known = self._others.get(account)
        if known is not None and self._monotonic() - known[0] < FRESH_S:
            return known
        asked_s = self._monotonic()
        if (asking := self._asking_for.get(account)) is None:
            asking = asyncio.create_task(self._ask_for(account), name="budget-account")
            self._asking_for[account] = asking
        try:
            return asked_s, await asyncio.shield(asking)
        except LedgerUnavailable:
            if known is None or self._monotonic() - known[0] > USABLE_S:
                raise
            return known

    async def _ask_for(self, account: str) -> AccountState | None:
        asked_s, changes = self._monotonic(), self._changes
        try:
            state = next(iter(await self._ledger.state(account)), None)
        finally:
            del self._asking_for[account]
        if changes == self._changes:  # else the answer may be from before it
            if len(self._others) >= MAX_OTHERS:
                self._others.clear()
            self._others[account] = asked_s, state
        return state

    async def _refresh(self) -> None:
        """Ask the ledger unless it was just asked; one call for all who wait.

        Raises:
            LedgerUnavailable: It cannot be reached, and what is known is too old to show.
        """
        if self._monotonic() - self._asked_s < FRESH_S:
            return
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask(), name="budget-accounts")
        try:
            # Shielded: a client that hangs up must not take the answer from the others.
            await asyncio.shield(self._asking)
        except LedgerUnavailable:
            if self._monotonic() - self._asked_s > USABLE_S:
                raise

    async def _ask(self) -> None:
        try:
            while True:
                asked_s, changes = self._monotonic(), self._changes
                accounts = await self._ledger.state()
                if changes == self._changes:
                    break  # else the answer may be from before what was changed through here
            self._accounts = {state.account: state for state in accounts}
            self._asked_s = asked_s
        finally:
            self._asking = None


def _system_clock() -> int:
    return time.time_ns() // 1000
