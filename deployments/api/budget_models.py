"""What the interface to budgets takes, and what it needs of the ledger."""

from __future__ import annotations

from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, Field

from deployments.api.admin_models import Fields, Text
from governance.budget.messages import AccountState
from governance.budget.tree import ACCOUNT_PATTERN
from governance.policy.model import Name

Json = dict[str, Any]

MIN_OVERRIDE_S = 60
MAX_OVERRIDE_S = 31 * 86_400
MAX_GPU_US = 10**15
"""Most that an override or a transfer may name, in device-microseconds: about 32 device-years."""
MAX_TOKENS = 10**13


def _account(name: str) -> str:
    if ACCOUNT_PATTERN.fullmatch(name) is None:
        raise ValueError("not the name of an account")
    return name


AccountName = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_account)]
"""``hr``, ``hr/recruiting``, ``hr~<principal key>``, ``hr@hour``."""


class BudgetControl(Protocol):
    """The budget ledger, as this interface needs it. Every method raises ``LedgerUnavailable``."""

    async def state(
        self, account: str | None = None, users: bool = False
    ) -> tuple[AccountState, ...]:
        """One account, or all, with those of single users or without; empty where there is none."""
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

    async def transfer(
        self, source: str, target: str, gpu_us: int, tokens: int, reason: str, by: str
    ) -> tuple[AccountState, AccountState]:
        """Move budget until the window ends; both accounts as they are then."""
        ...

    async def apply(self, config: Json, reason: str, by: str) -> str:
        """Take up another budgets file; digest of the one that holds then."""
        ...


class UsageQuery(Fields):
    """``GET /v1/usage``."""

    department: Name | None = None
    """Department to show; left out, the caller's."""
    account: AccountName | None = None
    """Account to show, in place of a department."""


class ListQuery(Fields):
    """``GET /v1/admin/budgets``."""

    users: str | None = Field(default=None, pattern="^(true|false)$")
    """``true``: accounts of single users as well."""


class AccountReference(Fields):
    """A request about one account."""

    account: AccountName
    """Name of the account."""


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


class TransferBudget(Fields):
    """Budget that moves from one account to another, until the window ends."""

    source: AccountName
    """Whose budget becomes smaller."""
    target: AccountName
    """Whose becomes larger."""
    gpu_us: int = Field(default=0, ge=0, le=MAX_GPU_US)
    """Charged device-microseconds."""
    tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)
    reason: Text
    """For the record."""


class ApplyBudgets(Fields):
    """A budgets file that shall hold from now on."""

    budgets: Json
    """What the file says, as JSON."""
    reason: Text
    """For the record."""
    dry_run: bool = False
    """Only check it."""
