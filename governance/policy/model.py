"""What ``config/policy.yaml`` may say: typed rules, declared names, inline tests.

A rule has a condition (``when``), an effect, and for ``allow`` limits. Every dimension of ``when``
is optional and then means "any"; within a dimension one of the values must match; all dimensions
given must match. Dimensions only ever name what matches, never what does not, so that a rule can
be judged by itself and the analysis at load is exact.

NOTE: later dimensions (``findings``, ``data_class``, ``surface``, ``destination``, ``tools``) are
further optional fields of ``When`` with the same meaning; the format does not change.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Annotated, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from governance.types import Effect, Operation, PrincipalKind

TIERS = ("small", "large", "embedding")
"""Tiers that a model can be in."""
TIER_PREFIX = "tier:"
"""``tier:small`` in a list of models stands for all models of that tier."""

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""Name of a role or a department."""
RuleId = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9-]*$")]
ModelName = Annotated[
    str, Field(min_length=1, max_length=160, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")
]
"""Id of a served model, or ``tier:`` and a tier."""
Count = Annotated[int, Field(strict=True, ge=1, le=10_000_000)]


class Permission(StrEnum):
    """What the administration interface asks before it acts."""

    KEYS_MANAGE = "keys:manage"
    """Create, rotate and revoke service keys."""
    KEYS_READ = "keys:read"
    """List service keys; secrets are never shown again."""
    REVOCATIONS_MANAGE = "revocations:manage"
    """Revoke tokens and subjects."""
    BUDGETS_READ = "budgets:read"
    """See what every department has used, and its limits."""
    BUDGETS_MANAGE = "budgets:manage"
    """Override a department's budget for a time."""
    CONFIG_READ = "config:read"
    """Read the configuration in force."""


class Section(BaseModel):
    """Base of all sections: immutable, and a name that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class When(Section):
    """Condition of a rule. A dimension left out matches anything."""

    roles: tuple[Name, ...] | None = Field(default=None, min_length=1)
    """The principal has at least one of these roles."""
    departments: tuple[Name, ...] | None = Field(default=None, min_length=1)
    """The principal's department is one of these."""
    kinds: tuple[PrincipalKind, ...] | None = Field(default=None, min_length=1)
    """Who stands behind the credential: ``user``, ``service`` or ``key``."""
    models: tuple[ModelName, ...] | None = Field(default=None, min_length=1)
    """Model ids, or tiers as ``tier:small``. In an ``allow`` rule a tier means the models of the
    tier themselves: a LoRA adapter, often trained on one department's data, is reached by its own
    id only. In a rule that restricts, a tier covers adapters too."""
    operations: tuple[Operation, ...] | None = Field(default=None, min_length=1)
    """``chat``, ``completions``, ``embeddings``."""


class LimitsConfig(Section):
    """Bounds that an allow rule sets; a bound left out is not set by this rule."""

    max_tokens: Count | None = None
    """Most tokens that one request may generate, over all its choices."""
    context_tokens: Count | None = None
    """Most tokens of prompt and answer together."""
    requests_per_minute: Annotated[int, Field(strict=True, ge=1, le=100_000)] | None = None
    """Most requests that one principal may start in any 60 seconds."""
    parallel_requests: Annotated[int, Field(strict=True, ge=1, le=100_000)] | None = None
    """Most requests that one principal may have open at the same time."""


class Rule(Section):
    """One rule."""

    id: RuleId
    """Unique; stands in every decision and record that the rule is responsible for."""
    description: str = Field(default="", max_length=500)
    """Why the rule exists, for people who read the file or a decision."""
    when: When = When()
    """Condition."""
    everyone: bool = Field(default=False, strict=True)
    """Says that an allow rule without roles and departments is meant to be one."""
    effect: Effect
    """What the rule does: ``allow`` grants, all others restrict what is granted."""
    limits: LimitsConfig = LimitsConfig()
    """Bounds; only an ``allow`` rule has them."""
    priority: Literal["critical", "standard", "batch"] | None = None
    """Priority class of what the rule allows; left out, the rule sets none."""
    on_exhaustion: Literal["refuse", "small"] | None = None
    """Of an allow rule, for a large model that is named and has no room for a request, in the
    budget or in the queue: ``small`` lets a model of the small tier answer in its place, if the
    caller may use one; headers, answer and record say so. ``refuse`` forbids it. Left out, the rule
    says nothing; where no rule does, the request is refused."""
    message: str | None = Field(default=None, min_length=1, max_length=500)
    """Told to a caller whom a restricting rule stops. Say what to do; name no secret."""


class TestPrincipal(Section):
    """Principal of an inline test."""

    __test__ = False

    roles: tuple[Name, ...] = ()
    department: Name
    kind: PrincipalKind = PrincipalKind.USER


class InlineTest(Section):
    """One expectation, checked whenever the file is loaded; a failing one refuses the file."""

    name: str = Field(min_length=1, max_length=200)
    principal: TestPrincipal
    model: ModelName
    """A served model's id, or a tier: then every model of the tier must meet the expectation,
    and so must one that is not served today."""
    operation: Operation
    expect: Effect
    rule: RuleId | None = None
    """Rule that must be among the responsible ones."""
    limits: LimitsConfig = LimitsConfig()
    """Bounds that the decision must carry exactly; those left out are not looked at."""
    on_exhaustion: Literal["refuse", "small"] | None = None
    """What the decision must say of a named large model that has no room; left out, it is not
    looked at. ``refuse`` is met where no rule says anything."""


class PolicyConfig(Section):
    """A policy file."""

    version: Literal[1]
    """Version of the format."""
    roles: tuple[Name, ...] = Field(min_length=1)
    """Every role that rules may speak of; identity mappings grant them."""
    departments: tuple[Name, ...] = Field(min_length=1)
    """Every department that rules may speak of."""
    default_message: str | None = Field(default=None, min_length=1, max_length=500)
    """Told to a caller to whom no rule grants what was asked."""
    administration: dict[Permission, tuple[Name, ...]] = Field(default_factory=dict)
    """Permission -> roles that have it. A permission left out is nobody's."""
    rules: tuple[Rule, ...] = Field(min_length=1)
    """Order does not matter to decisions; ids are reported in this order."""
    tests: tuple[InlineTest, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 in hex of the canonical JSON: sorted keys, defaults written out, no floats."""
        dump = self.model_dump(mode="json")
        return hashlib.sha256(orjson.dumps(dump, option=orjson.OPT_SORT_KEYS)).hexdigest()
