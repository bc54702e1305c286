"""What ``config/budgets.yaml`` may say: how much each department may use, and until when.

A department is charged to the account of its name. ``default_account`` gives every other
department an account of its own with the same limits; without it such a department is refused
(``NoAccount``).

An account has one window so far. Trees of accounts, borrowing and soft limits will be further keys
of an account: unknown keys are refused, so that none of them can be taken for working before it
does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from governance.budget.windows import WindowKind
from governance.yaml_config import load_yaml_model

SECOND_US = 1_000_000
MAX_GPU_SECONDS = 10**10
MAX_TOKENS = 10**15
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=NAME_PATTERN)]


class Section(BaseModel):
    """Base of all sections: immutable, and a name that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AccountConfig(Section):
    """Limits of one account."""

    window: WindowKind = WindowKind.MONTH
    """When the budget is fresh again: each ``hour`` (UTC), ``day``, ``week`` (Monday) or
    ``month``, at midnight of ``timezone``."""
    timezone: str = "UTC"
    """Time zone by its IANA name, such as ``Europe/Berlin``."""
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
    def _limited(self) -> AccountConfig:
        if self.gpu_seconds is None and self.tokens is None:
            raise ValueError("sets no limit; give gpu_seconds, tokens or both")
        return self

    @property
    def limit_us(self) -> int | None:
        """Charged device-microseconds per window."""
        return None if self.gpu_seconds is None else self.gpu_seconds * SECOND_US


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


class BudgetsConfig(Section):
    """The whole file."""

    version: Literal[1] = 1
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

    @field_validator("accelerators")
    @classmethod
    def _thousandths(cls, weights: Mapping[str, float]) -> Mapping[str, float]:
        for weight in weights.values():
            if not 0.001 <= weight <= 1000:
                raise ValueError("a weight must be from 0.001 to 1000")
            if abs(weight * 1000 - round(weight * 1000)) > 1e-6:
                raise ValueError("a weight is counted in steps of 0.001")
        return weights

    @model_validator(mode="after")
    def _some_account(self) -> BudgetsConfig:
        if not self.accounts and self.default_account is None:
            raise ValueError("has no accounts; give accounts, default_account or both")
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
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def load_budgets(path: str | Path) -> BudgetsConfig:
    """Read and check the budgets file.

    Raises:
        ConfigError: Names the file, the line, the place and the reason.
    """
    return load_yaml_model(path, BudgetsConfig)
