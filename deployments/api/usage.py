"""Budgets over HTTP: what an account has used, and changing budgets while the platform runs.

    GET    /v1/usage                      any principal    its own department's account, and what
                                                           else its requests are charged to
    GET    /v1/usage?department=NAME      budgets:read     another department's account
    GET    /v1/usage?account=NAME         own path, or budgets:read
    GET    /v1/admin/budgets              budgets:read     all accounts; ?users=true for persons'
    GET    /v1/admin/budgets/{account}    budgets:read     one account
    PUT    /v1/admin/budgets/{account}    budgets:manage   override its limits until a moment
    DELETE /v1/admin/budgets/{account}    budgets:manage   end the override
    POST   /v1/admin/budgets/transfer     budgets:manage   move budget until the window ends
    POST   /v1/admin/budgets/apply        budgets:manage   take up another budgets file
    GET    /v1/admin/budget-file          budgets:read     the budgets file that holds

Names of accounts contain ``/``, ``~`` and ``@``. A principal sees the accounts that its own
requests are charged to: never another user's.

An override always ends, at most 31 days ahead, and then the budgets file holds again. A service
key changes nothing, whatever its roles: who spends a budget by program should not raise it by
program.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from pydantic import ValidationError

from deployments.api.accounts import account_object
from deployments.api.admin_models import NoFields, parse
from deployments.api.budget_models import (
    MAX_OVERRIDE_S,
    AccountReference,
    ApplyBudgets,
    BudgetControl,
    ListQuery,
    SetOverride,
    TransferBudget,
    UsageQuery,
)
from governance.budget.config import BudgetsConfig
from governance.budget.messages import AccountState
from governance.budget.tree import Tree, parts_of
from governance.errors import (
    InvalidRequest,
    LedgerUnavailable,
    NoAccount,
    NotPermitted,
    ObjectNotFound,
)
from governance.policy.model import Permission
from governance.ports import Clock
from governance.types import Principal, PrincipalKind

Json = dict[str, Any]
Handler = Callable[[Principal, Json], Awaitable[Json]]
__all__ = ["FRESH_S", "MAX_OTHERS", "MAX_OVERRIDE_S", "USABLE_S", "UsageApi"]

FRESH_S = 1.0
"""An answer of the ledger serves everybody who asks within this time, in seconds."""
USABLE_S = 60.0
"""While the ledger cannot be reached, an older answer is shown for this long, in seconds."""
MAX_OTHERS = 1_000
"""Answers kept about accounts that are in no list."""
_SECOND_US = 1_000_000


class UsageApi:
    """Handlers that take an authenticated principal and a JSON object and give a JSON object.

    However many ask, each gateway asks the ledger once a second for all accounts that are in use or
    in the budgets file, and once a second for each other account that somebody asks for.

    Args:
        ledger: The budget ledger.
        authorize: Raises ``NotPermitted`` unless a principal has the named permission.
        clock: Wall clock, microseconds; ``None`` for the system's.
        monotonic: Seconds of a clock that never goes back.
        tree: Accounts of the budgets file that this gateway knows; ``None`` where departments are
            all there is to show.
    """

    def __init__(
        self,
        ledger: BudgetControl,
        authorize: Callable[[Principal, str], None],
        clock: Clock | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        tree: Callable[[], Tree] | None = None,
    ) -> None:
        self._ledger = ledger
        self._authorize = authorize
        self._clock = clock or _system_clock
        self._monotonic = monotonic
        self._tree = tree
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
            ("POST", "/v1/admin/budgets/transfer", self.transfer, True),
            ("POST", "/v1/admin/budgets/apply", self.apply, True),
            ("GET", "/v1/admin/budget-file", self.get_file, False),
            ("GET", "/v1/admin/budgets/{account:path}", self.get_account, False),
            ("PUT", "/v1/admin/budgets/{account:path}", self.set_override, True),
            ("DELETE", "/v1/admin/budgets/{account:path}", self.clear_override, False),
        )

    async def usage(self, principal: Principal, query: Json) -> Json:
        """One account, the caller's own or with a permission another, and those around it."""
        fields = parse(UsageQuery, query)
        if fields.department and fields.account:
            raise InvalidRequest("Give 'department' or 'account', not both.", "account")
        own = self._own(principal)
        wanted = fields.account or fields.department or principal.department
        if wanted not in own:
            self._authorize(principal, Permission.BUDGETS_READ)
        try:
            shown = await self._shown(wanted)
        except ObjectNotFound:
            if wanted == principal.department:
                raise NoAccount from None
            raise
        if fields.account is None:
            around = own if wanted == principal.department else self._below(wanted)
            shown["accounts"] = [
                found
                for name in around
                if name != wanted and (found := await self._shown_or_none(name)) is not None
            ]
        else:
            shown["accounts"] = []
        return shown

    async def list_accounts(self, principal: Principal, query: Json) -> Json:
        """All accounts, by name; those of single users where they are asked for."""
        self._authorize(principal, Permission.BUDGETS_READ)
        if parse(ListQuery, query).users == "true":
            asked_s = self._monotonic()
            found = {state.account: state for state in await self._ledger.state(None, True)}
            age_ms = self._since_ms(asked_s)
        else:
            await self._refresh()
            found, age_ms = self._accounts, self._age_ms()
        accounts = [account_object(found[name], age_ms) for name in sorted(found)]
        return {"object": "list", "data": accounts}

    async def get_account(self, principal: Principal, body: Json) -> Json:
        """One account."""
        self._authorize(principal, Permission.BUDGETS_READ)
        return await self._shown(parse(AccountReference, body).account)

    async def get_file(self, principal: Principal, body: Json) -> Json:
        """The budgets file that holds, as this gateway knows it."""
        self._authorize(principal, Permission.BUDGETS_READ)
        parse(NoFields, body)
        if self._tree is None:
            raise ObjectNotFound("There is no budgets file.")
        return _file_object(self._tree().config)

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

    async def transfer(self, principal: Principal, body: Json) -> Json:
        """Move budget from one account to another until the window ends."""
        self._may_change(principal)
        fields = parse(TransferBudget, body)
        if not fields.gpu_us and not fields.tokens:
            raise InvalidRequest("Give 'gpu_us', 'tokens' or both.", "gpu_us")
        states = await self._ledger.transfer(
            fields.source,
            fields.target,
            fields.gpu_us,
            fields.tokens,
            fields.reason,
            principal.key,
        )
        source, target = (self._changed(state) for state in states)
        return {"object": "transfer", "source": source, "target": target}

    async def apply(self, principal: Principal, body: Json) -> Json:
        """Take up another budgets file without a restart, or only check it."""
        self._may_change(principal)
        fields = parse(ApplyBudgets, body)
        config = _budgets(fields.budgets)
        before = None if self._tree is None else self._tree().config.digest
        if not fields.dry_run:
            data = config.model_dump(mode="json")
            await self._ledger.apply(data, fields.reason, principal.key)
            self._forget()
        changed = not fields.dry_run and config.digest != before
        return {**_file_object(config), "changed": changed, "dry_run": fields.dry_run}

    def _may_change(self, principal: Principal) -> None:
        self._authorize(principal, Permission.BUDGETS_MANAGE)
        if principal.kind is PrincipalKind.KEY:
            raise NotPermitted("A service key cannot change budgets; use an access token.")

    def _own(self, principal: Principal) -> list[str]:
        """Accounts that a principal's requests are charged to, the department's first."""
        found = [principal.department]
        if self._tree is not None:
            tree = self._tree()
            try:
                path = tree.path(tree.leaf(principal))
            except (NoAccount, ValueError):
                return found
            found += [node.name for node in path if node.name != principal.department]
        return found

    def _below(self, department: str) -> list[str]:
        """Parts and further windows of a department; not its users."""
        if self._tree is None:
            return []
        listed = self._tree().listed()
        return [name for name in listed if parts_of(name)[0] == department]

    def _forget(self) -> None:
        """Everything may be otherwise now."""
        self._changes += 1
        self._asked_s = float("-inf")
        self._others.clear()

    def _changed(self, state: AccountState) -> Json:
        if "~" not in state.account:
            self._accounts[state.account] = state
        self._others.pop(state.account, None)
        self._changes += 1
        return account_object(state, 0)

    async def _shown(self, account: str) -> Json:
        await self._refresh()
        if (state := self._accounts.get(account)) is not None:
            return account_object(state, self._age_ms())
        # Nobody has used it yet, or it is one user's, so it is in no list.
        asked_s, state = await self._other(account)
        if state is None:
            raise ObjectNotFound("There is no such budget account.")
        return account_object(state, self._since_ms(asked_s))

    async def _shown_or_none(self, account: str) -> Json | None:
        try:
            return await self._shown(account)
        except ObjectNotFound:  # another file holds meanwhile
            return None

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


def _file_object(config: BudgetsConfig) -> Json:
    return {
        "object": "budgets",
        "digest": config.digest,
        "budgets": config.model_dump(mode="json"),
    }


def _budgets(data: Json) -> BudgetsConfig:
    """Check a budgets file that somebody sent.

    Raises:
        InvalidRequest: Says where it is wrong, or what does not add up.
    """
    try:
        return BudgetsConfig.model_validate(data)
    except ValidationError as failure:
        found = failure.errors(include_input=False, include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in found["loc"])[:200]
    reason = found["msg"].removeprefix("Value error, ")
    raise InvalidRequest(f"{place or 'The file'}: {reason}"[:1000], "budgets")
