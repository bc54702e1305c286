"""Budgets of one build of the application, on their way from its gateways to the ledger.

The budgets file is read where the application is built, and its gateways give what it says to the
ledger whenever they find it. The ledger keeps it beside its database: a process that Ray starts
again is given the arguments of its first start, which may be another build's.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from governance.budget.config import BudgetsConfig
from governance.budget.messages import RenewReply
from governance.budget.prices import COLD

if TYPE_CHECKING:
    from deployments.config import ModelConfig

log = logging.getLogger("gatehouse.ledger")

CONFIG_NAME = "budgets.json"


@dataclass(frozen=True, slots=True)
class Budgets:
    """Budgets of one build of the application."""

    config: BudgetsConfig
    built_us: int
    """When the application was built; of two builds the later one holds."""
    weights_milli: Mapping[str, int] = field(default_factory=dict)
    """Weight of the accelerator of each base model whose kind is configured, in thousandths: so
    that the first requests cost what later ones do, before any engine has reported."""

    @classmethod
    def of(cls, config: BudgetsConfig, models: Iterable[ModelConfig], built_us: int) -> Budgets:
        """Budgets of an application that serves these models."""
        kinds = {model.id: model.accelerator.device for model in models}
        weights = {name: config.weight_milli(kind) for name, kind in kinds.items() if kind}
        return cls(config, built_us, weights)

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Budgets:
        """From ``dump``."""
        config = BudgetsConfig.model_validate(data["config"])
        return cls(config, int(data["built_us"]), dict(data["weights_milli"]))

    def dump(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "config": self.config.model_dump(mode="json"),
            "built_us": self.built_us,
            "weights_milli": dict(self.weights_milli),
        }

    def weighed(self, reply: RenewReply) -> RenewReply:
        """A reply with the weights of this build, also for models that nothing is known of."""
        known = {price.base_model: price for price in reply.prices}
        for name, weight_milli in self.weights_milli.items():
            price = known.get(name) or replace(COLD, base_model=name)
            if price.weight_milli != weight_milli or name not in known:
                known[name] = replace(price, weight_milli=weight_milli)
        return replace(reply, prices=tuple(known.values()))

    @classmethod
    def read(cls, folder: Path) -> Budgets | None:
        """What ``write`` left there; ``None`` where that is nothing, or nothing of use.

        The first gateway that finds the ledger gives it budgets again.
        """
        path = folder / CONFIG_NAME
        try:
            return cls.load(json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            log.error("%s: not readable (%s); waiting for a gateway", path, type(error).__name__)
            return None

    def write(self, folder: Path) -> None:
        """Keep them; after a crash the folder has these or the ones before."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(folder / CONFIG_NAME, json.dumps(self.dump(), sort_keys=True).encode())


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file by new content; after a crash it has either the old or the new."""
    temporary = path.with_name(path.name + ".new")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
