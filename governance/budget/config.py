"""What ``config/budgets.yaml`` may say: who may use how much, until when, and what happens then.

The accounts form a tree: organisation, cohort, department, part (a team or an application), user.
A department is charged to the account of its name; a request is charged to the most particular
account that its principal has, and with it to all accounts above (``governance.budget.tree``).

What the file promises must add up: the departments' nominal budgets within their cohort's, cohorts
within the organisation's, whatever their windows. So the organisation's limit holds without anybody
asking for it at run time, and cohorts can live in different ledgers (``docs/consistency.md``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from governance.budget.sums import check_sums
from governance.budget.windows import WindowKind
from governance.identity.config import is_safe_url
from governance.yaml_config import load_yaml_model

SECOND_US = 1_000_000
MAX_GPU_SECONDS = 10**10
MAX_TOKENS = 10**15
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=NAME_PATTERN)]


class Section(BaseModel):
    """Base of all sections: immutable, and a name that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Mode(StrEnum):
    """What happens at the limit."""

    HARD = "hard"
    """New requests are refused, and a running answer stops at the chunk that is reserved."""
    SOFT = "soft"
    """New requests are refused; what runs is finished."""
    OVERDRAFT = "overdraft"
    """As hard, but only at the limit plus the overdraft."""


class PriorityClass(StrEnum):
    """How urgent an account's requests are, most urgent first."""

    CRITICAL = "critical"
    STANDARD = "standard"
    BATCH = "batch"


class Quantity(Section):
    """Device time, tokens, or both; what is not given is 0."""

    gpu_seconds: int = Field(0, ge=0, le=MAX_GPU_SECONDS)
    tokens: int = Field(0, ge=0, le=MAX_TOKENS)

    @property
    def gpu_us(self) -> int:
        """Charged device-microseconds."""
        return self.gpu_seconds * SECOND_US


NO_QUANTITY = Quantity(gpu_seconds=0, tokens=0)


class WindowSection(Section):
    """A window, and how much fits into it."""

    window: WindowKind = WindowKind.MONTH
    """When the budget is fresh again: each ``hour`` (UTC), ``day``, ``week`` (Monday), ``month`` or
    ``fiscal-month``, at midnight of ``timezone``."""
    timezone: str = "UTC"
    """Time zone by its IANA name, such as ``Europe/Berlin``."""
    fiscal_day: int = Field(1, ge=1, le=28)
    """Day of the month on which a ``fiscal-month`` begins."""
    gpu_seconds: int | None = Field(None, ge=0, le=MAX_GPU_SECONDS)
    """Device-seconds per window, times the weight of the accelerator; not set: no such limit."""
    tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    """Prompt plus answer tokens per window; not set: no such limit."""

    @field_validator("timezone")
    @classmethod
    def _zone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(
                "is not a time zone of the IANA database, such as Europe/Berlin"
            ) from None
        return name

    @model_validator(mode="after")
    def _consistent(self) -> WindowSection:
        if self.fiscal_day != 1 and self.window is not WindowKind.FISCAL_MONTH:
            raise ValueError("fiscal_day belongs to window: fiscal-month")
        return self

    @property
    def limit_us(self) -> int | None:
        """Charged device-microseconds per window."""
        return None if self.gpu_seconds is None else self.gpu_seconds * SECOND_US

    @property
    def span(self) -> tuple[str, str, int]:
        """Kind, time zone and first day: what ``window_at`` wants."""
        return self.window.value, self.timezone, self.fiscal_day


class LimitConfig(WindowSection):
    """A window with at least one limit."""

    @model_validator(mode="after")
    def _limited(self) -> LimitConfig:
        if self.gpu_seconds is None and self.tokens is None:
            raise ValueError("sets no limit; give gpu_seconds, tokens or both")
        return self


class Match(Section):
    """Whose requests are charged to a part; any of what is given."""

    applications: frozenset[str] = Field(default_factory=frozenset, max_length=1000)
    """Ids of service keys, and client ids of applications at the identity provider."""
    roles: frozenset[Name] = Field(default_factory=frozenset, max_length=1000)

    @model_validator(mode="after")
    def _something(self) -> Match:
        if not self.applications and not self.roles:
            raise ValueError("matches nobody; give applications, roles or both")
        return self


class PartConfig(LimitConfig):
    """A team or an application within a department: a cap of its own beside the department's."""

    match: Match
    mode: Mode | None = None
    """Not set: as the department."""
    priority: PriorityClass | None = None
    """Not set: as the department."""
    per_user: LimitConfig | None = None
    """Cap of each of its users; not set: as the department."""
    owner: str | None = Field(None, min_length=1, max_length=200)
    """Who to ask for more; not set: as the department."""


class AccountConfig(LimitConfig):
    """A department's nominal budget, and how it deals with its neighbours."""

    cohort: Name | None = None
    """Departments of one cohort lend to each other."""
    owner: str | None = Field(None, min_length=1, max_length=200)
    """Who to ask for more, such as a mailbox; told with each refusal."""
    mode: Mode = Mode.HARD
    overdraft: Quantity | None = None
    """How far beyond the limit ``mode: overdraft`` goes."""
    borrow: Quantity = NO_QUANTITY
    """Most that the department may use beyond its nominal budget, out of what its cohort lends."""
    lend: Quantity = NO_QUANTITY
    """Most of the nominal budget that others of the cohort may use."""
    priority: PriorityClass | None = None
    """Class of its requests, unless the policy gives a less urgent one; not set: by the policy."""
    weight: float = 1.0
    """Share of engines at peak, beside other departments of the same class; 0.001 to 1000."""
    also: tuple[LimitConfig, ...] = Field(default=(), max_length=5)
    """Further windows, each of another kind, that hold as well."""
    per_user: LimitConfig | None = None
    """Cap of each user of the department."""
    parts: Mapping[Name, PartConfig] = Field(default_factory=dict, max_length=1000)
    """Teams and applications, in the order in which they are tried."""

    @field_validator("weight")
    @classmethod
    def _weight(cls, weight: float) -> float:
        return _thousandth(weight)

    @model_validator(mode="after")
    def _possible(self) -> AccountConfig:
        if (self.mode is Mode.OVERDRAFT) != (self.overdraft is not None):
            raise ValueError("mode: overdraft and the amount of the overdraft belong together")
        for name in ("borrow", "lend"):
            amount: Quantity = getattr(self, name)
            if amount != NO_QUANTITY and self.cohort is None:
                raise ValueError(f"{name} needs a cohort")
            if (amount.gpu_seconds and self.gpu_seconds is None) or (
                amount.tokens and self.tokens is None
            ):
                raise ValueError(f"{name} is of a quantity that has no limit of its own")
        kinds = [limit.window for limit in (self, *self.also)]
        if len(set(kinds)) != len(kinds):
            raise ValueError("two limits have the same kind of window")
        if self.lend.gpu_seconds > (self.gpu_seconds or 0) or self.lend.tokens > (self.tokens or 0):
            raise ValueError("lends more than it has")
        return self

    @property
    def weight_milli(self) -> int:
        """Weight in thousandths."""
        return round(self.weight * 1000)


class CohortConfig(WindowSection):
    """Departments that lend to each other within one window."""

    half_life_hours: int = Field(24, ge=1, le=8760)
    """What a department borrowed counts half after so long: of two that want to borrow, the one
    that borrowed less of late is given more."""


class OrganisationConfig(LimitConfig):
    """What all departments together may be promised."""

    name: Name = "organisation"


class LeaseConfig(Section):
    """How gateways borrow from the ledger."""

    ttl_s: int = Field(default=10, ge=3, le=60)
    """A lease that was not renewed for so long ends, in seconds: what a gateway that died held
    returns after this time, and a gateway that lost the ledger works on for as long."""
    renew_s: int = Field(default=1, ge=1, le=20)
    """Gateways renew this often, in seconds."""

    @model_validator(mode="after")
    def _in_time(self) -> LeaseConfig:
        if self.ttl_s < 3 * self.renew_s:
            raise ValueError("ttl_s must be at least three times renew_s: a renewal may fail")
        return self


class AlertsConfig(Section):
    """Who is told when a budget is nearly used up."""

    thresholds: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = (50, 80, 95, 100)
    """Per cent of a department's or a part's limit; each is told once a window."""
    webhook: str | None = Field(None, max_length=2000)
    """HTTPS address (HTTP on loopback) where alerts are posted; the secret that signs them is in
    the file that the environment variable ``GATEHOUSE_ALERT_SECRET_FILE`` names."""

    @field_validator("webhook")
    @classmethod
    def _safe(cls, url: str | None) -> str | None:
        if url is not None and not is_safe_url(url, allow_loopback_http=True):
            raise ValueError("must be an https URL without user and fragment")
        return url

    @field_validator("thresholds")
    @classmethod
    def _rising(cls, thresholds: tuple[int, ...]) -> tuple[int, ...]:
        if not thresholds or list(thresholds) != sorted(set(thresholds)):
            raise ValueError("must rise, such as [50, 80, 95, 100]")
        return thresholds


class BudgetsConfig(Section):
    """The whole file."""

    version: Literal[1] = 1
    organisation: OrganisationConfig | None = None
    cohorts: Mapping[Name, CohortConfig] = Field(default_factory=dict, max_length=1000)
    accounts: Mapping[Name, AccountConfig] = Field(default_factory=dict, max_length=10_000)
    """Limits by department."""
    default_account: AccountConfig | None = None
    """Limits of each department that ``accounts`` does not name, each on its own account."""
    chunk_tokens: int = Field(128, ge=8, le=8192)
    """Answer tokens per choice that are reserved at a time. Larger: fewer renewals; smaller: less
    is held that may not be used."""
    accelerators: Mapping[Name, float] = Field(default_factory=dict, max_length=1000)
    """Weight by kind of device, from 0.001 to 1000 in steps of 0.001: a second of an ``H100`` may
    cost more than a second of an ``L4``. A kind that is not named weighs 1."""
    lease: LeaseConfig = Field(default_factory=LeaseConfig)
    shards: int = Field(1, ge=1, le=64)
    """Ledgers that cohorts are spread over; changing it needs a restart with empty leases."""
    alerts: AlertsConfig = AlertsConfig(webhook=None)

    @field_validator("accelerators")
    @classmethod
    def _thousandths(cls, weights: Mapping[str, float]) -> Mapping[str, float]:
        for weight in weights.values():
            _thousandth(weight)
        return weights

    @model_validator(mode="after")
    def _adds_up(self) -> BudgetsConfig:
        if not self.accounts and self.default_account is None:
            raise ValueError("has no accounts; give accounts, default_account or both")
        check_sums(self)
        return self

    def account(self, department: str) -> AccountConfig | None:
        """Limits of a department's account, or ``None`` where it has none."""
        return self.accounts.get(department, self.default_account)

    def weight_milli(self, accelerator: str) -> int:
        """Weight of a kind of device, in thousandths."""
        return round(self.accelerators.get(accelerator, 1.0) * 1000)

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex of what the file says: canonical JSON, integers only."""
        data = self.model_dump(mode="json")
        data["accelerators"] = {name: self.weight_milli(name) for name in self.accelerators}
        for name, account in self.accounts.items():
            data["accounts"][name]["weight"] = account.weight_milli
            for part, config in account.parts.items():
                dumped = data["accounts"][name]["parts"][part]["match"]
                dumped["applications"] = sorted(config.match.applications)
                dumped["roles"] = sorted(config.match.roles)
        if self.default_account is not None:
            data["default_account"]["weight"] = self.default_account.weight_milli
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def _thousandth(weight: float) -> float:
    if not 0.001 <= weight <= 1000:
        raise ValueError("a weight must be from 0.001 to 1000")
    if abs(weight * 1000 - round(weight * 1000)) > 1e-6:
        raise ValueError("a weight is counted in steps of 0.001")
    return weight


def load_budgets(path: str | Path) -> BudgetsConfig:
    """Read and check the budgets file.

    Raises:
        ConfigError: Names the file, the line, the place and the reason.
    """
    return load_yaml_model(path, BudgetsConfig)
