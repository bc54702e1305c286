"""What ``config/models.yaml`` may say: what each model can do, and how ``auto`` chooses.

A card describes a model; it serves none. Cards of models that are not served are ignored, so one
file suits several clusters. A served model without a card is not chosen by ``auto`` while a model
with a card is permitted: adapters in particular are asked for by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

OTHERS = "*"
"""In a list of departments: every department that the file does not name elsewhere."""

DataClass = Literal["public", "internal", "confidential", "restricted"]
Tier = Literal["small", "large"]
ModelId = Annotated[str, Field(min_length=1, max_length=256)]
Department = Annotated[str, Field(min_length=1, max_length=64)]
Departments = Annotated[tuple[Department, ...], Field(min_length=1, max_length=1_000)]

ALL_DATA: tuple[DataClass, ...] = ("public", "internal", "confidential", "restricted")


class Section(BaseModel):
    """Base of all sections: immutable, and a name that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Price(Section):
    """What a token of a model costs, where somebody has measured it.

    Raw device time: nanoseconds of the step's share, summed over the devices of the replica, not
    weighted by the kind of device.
    """

    prefill_ns: int = Field(ge=0)
    """Device-nanoseconds per prompt token that is computed."""
    decode_ns: int = Field(ge=0)
    """Device-nanoseconds per answer token."""
    measured_on: str = Field(min_length=1, max_length=200)
    """Devices, load and date of the measurement, for people."""


class ModelCard(Section):
    """What one model can do."""

    id: ModelId
    """Id under which it is served."""
    context_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt plus answer that ``auto`` sends there, in tokens; ``null`` is what the serve
    file says, and more than that is refused."""
    tools: bool = True
    """Whether it can be given tools: the engine has a parser for its calls."""
    json_mode: bool = True
    """Whether its answers can be held to JSON or to a schema."""
    languages: tuple[str, ...] = Field(default=(OTHERS,), min_length=1, max_length=200)
    """Languages it is good at, ISO 639-1 such as ``de``; ``*`` for any."""
    data_classes: tuple[DataClass, ...] = ALL_DATA
    """Classes of data that it may be sent. Policy decides who may; this decides where."""
    price: Price | None = None
    """``null`` where nobody measured: the ledger's learned price is used."""

    @field_validator("languages")
    @classmethod
    def _codes(cls, languages: tuple[str, ...]) -> tuple[str, ...]:
        if OTHERS in languages and len(languages) > 1:
            raise ValueError("'*' stands alone: it is every language")
        if not all(code == OTHERS or re.fullmatch("[a-z]{2}", code) for code in languages):
            raise ValueError("give ISO 639-1 codes of two small letters, such as de, or '*'")
        return languages

    @property
    def any_language(self) -> bool:
        """Whether the language of a request does not matter."""
        return OTHERS in self.languages


class Target(Section):
    """What some departments want of ``auto``: a share of the large tier, or a quality."""

    departments: Departments
    """Departments, each with a window of its own; ``*`` is every department not named."""
    large_share: float | None = Field(default=None, ge=0, le=1)
    """Share of the requests that could go either way which go to the large tier."""
    quality: float | None = Field(default=None, ge=0, le=1)
    """Part to keep of the gain that is expected of sending everything to the large tier; the least
    share of large requests that keeps it is found in the department's own traffic."""

    @model_validator(mode="after")
    def _one(self) -> Target:
        if (self.large_share is None) == (self.quality is None):
            raise ValueError("give either large_share or quality, and not both")
        return self

    @property
    def never_large(self) -> bool:
        """Nothing goes to the large tier, whatever its score."""
        return self.large_share == 0 or self.quality == 0

    @property
    def always_large(self) -> bool:
        """Everything goes to the large tier, whatever its score."""
        return self.large_share == 1

    @property
    def text(self) -> str:
        """As it stands in records, such as ``large_share=0.300``."""
        if self.large_share is not None:
            return f"large_share={self.large_share:.3f}"
        return f"quality={self.quality:.3f}"


class Hysteresis(Section):
    """When a conversation changes its model: a change costs the cached prefix, and is noticed."""

    margin_milli: int = Field(default=30, ge=0, le=1000)
    """How far from the threshold a gain must be to change the tier, in thousandths of gain."""
    idle_s: int = Field(default=1800, ge=1, le=86_400)
    """A conversation that is silent for so long is forgotten, in seconds."""
    conversations: int = Field(default=2_000, ge=0, le=100_000)
    """Conversations remembered of each department and gateway; 0 remembers none, and each request
    stands alone."""


class Pressure(Section):
    """How the budget lowers a target: use against pace, in thousandths.

    1000 is on pace to use the budget up exactly when its window ends, 2000 twice as fast.
    """

    start_milli: int = Field(default=1100, ge=0, le=1_000_000)
    """Up to here the target holds."""
    full_milli: int = Field(default=2000, ge=1, le=1_000_000)
    """From here on nothing goes to the large tier that can go elsewhere; linear between."""

    @model_validator(mode="after")
    def _ordered(self) -> Pressure:
        if self.full_milli <= self.start_milli:
            raise ValueError("full_milli must be above start_milli")
        return self

    def share(self, pressure_milli: int) -> float:
        """How much of a target is taken away: 0 for nothing, 1 for all of it."""
        over = pressure_milli - self.start_milli
        return min(1.0, max(0.0, over / (self.full_milli - self.start_milli)))


class Cascade(Section):
    """The small model answers first, and the large one where that answer looks bad."""

    departments: Departments
    """Departments whose requests are treated so; ``*`` is all of them."""
    escalate_share: float = Field(default=0.1, ge=0, le=0.9)
    """Share of the small model's answers that is given up, the least sure ones first; at most
    twice that where so many are refusals, empty, cut or no JSON."""
    hold_tokens: int = Field(default=128, ge=8, le=4096)
    """Answer tokens that are held back at most before it is decided; a longer answer is judged by
    its beginning."""


class Shadow(Section):
    """A sample of the small model's answers is compared with the large one's, in idle time."""

    share_milli: int = Field(default=10, ge=1, le=1000)
    """Sampled share of the requests answered by the small model, in thousandths."""
    account: Department
    """Department whose budget pays for it; a platform's own."""
    max_per_minute: int = Field(default=6, ge=1, le=600)
    """Comparisons that one gateway starts in a minute at most."""


class RoutingConfig(Section):
    """How ``auto`` chooses."""

    default_tier: Tier = "small"
    """Tier that is taken where no score can be had in time."""
    score_timeout_ms: int = Field(default=100, ge=1, le=5_000)
    """Longest wait for a score, in milliseconds."""
    targets: tuple[Target, ...] = Field(
        default=(Target(departments=(OTHERS,), large_share=0.3),), min_length=1, max_length=1_000
    )
    """A department belongs to the one that names it, else to the one with ``*``."""
    hysteresis: Hysteresis = Hysteresis()
    pressure: Pressure = Pressure()
    cascade: Cascade | None = None
    """``null`` is off."""
    shadow: Shadow | None = None
    """``null`` is off."""

    def target(self, department: str) -> Target:
        """The target of a department; of the sample ``0.3`` where the file has none for it."""
        named = _find(self.targets, department) or _find(self.targets, OTHERS)
        return named or Target(departments=(OTHERS,), large_share=0.3)

    def cascades(self, department: str) -> bool:
        """Whether the small model's answers to a department are judged before they are released."""
        names = () if self.cascade is None else self.cascade.departments
        return department in names or OTHERS in names


class ModelsFile(Section):
    """The whole file."""

    version: Literal[1] = 1
    models: tuple[ModelCard, ...] = Field(default=(), max_length=1_000)
    routing: RoutingConfig = RoutingConfig()

    def card(self, model_id: str) -> ModelCard | None:
        """The card of a model, if it has one."""
        return next((card for card in self.models if card.id == model_id), None)


def _find(targets: Sequence[Target], department: str) -> Target | None:
    return next((target for target in targets if department in target.departments), None)
