"""Budgets of one build of the application, on their way from its gateways to the ledger.

The budgets file is read where the application is built, and its gateways give what it says to the
ledger whenever they find it. The ledger keeps it beside its database: a process that Ray starts
again is given the arguments of its first start, which may be another build's.

A file that somebody applies to a running ledger is kept in the same place, as a build of the moment
in which it was applied: it holds after a restart, against gateways of the build before, and until
the application is built again.
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
from governance.budget.shards import moved
from governance.budget.store import LedgerStore, LedgerStoreError

if TYPE_CHECKING:
    from deployments.config import ModelConfig

log = logging.getLogger("gatehouse.ledger")

CONFIG_NAME = "budgets.json"
SHARDS = "shards"
"""Setting of the database: how many ledgers there are."""
REMEDY = (
    "Go back to the file before; or stop the application, move the ledger folder of the state root"
    " away, and start with the new file: all windows then begin with nothing spent"
)


def kept_beside(database: Path) -> Path:
    """Where a ledger keeps its budgets: ``budgets.json`` beside ``ledger.sqlite``.

    ``budgets-2.json`` beside ``ledger-2.sqlite``, and so on.
    """
    return database.with_name(database.stem.replace("ledger", "budgets", 1) + ".json")


@dataclass(frozen=True, slots=True)
class Budgets:
    """Budgets of one build of the application."""

    config: BudgetsConfig
    built_us: int
    """When the application was built, or the file applied; of two the later one holds."""
    kinds: Mapping[str, str] = field(default_factory=dict)
    """Kind of device of each base model for which one is configured: so that the first requests
    cost what later ones do, before any engine has reported."""

    @classmethod
    def of(cls, config: BudgetsConfig, models: Iterable[ModelConfig], built_us: int) -> Budgets:
        """Budgets of an application that serves these models."""
        kinds = {model.id: model.accelerator.device for model in models}
        return cls(config, built_us, {name: kind for name, kind in kinds.items() if kind})

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Budgets:
        """From ``dump``."""
        config = BudgetsConfig.model_validate(data["config"])
        return cls(config, int(data["built_us"]), dict(data.get("kinds", {})))

    def dump(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "config": self.config.model_dump(mode="json"),
            "built_us": self.built_us,
            "kinds": dict(self.kinds),
        }

    def applied(self, config: BudgetsConfig, now_us: int) -> Budgets:
        """The same build with another file."""
        # Not before the build: its clock may be ahead, and it must not undo what was applied.
        return replace(self, config=config, built_us=max(now_us, self.built_us + 1))

    def weighed(self, reply: RenewReply) -> RenewReply:
        """A reply with the weights of this build, also for models that nothing is known of."""
        known = {price.base_model: price for price in reply.prices}
        for name, kind in self.kinds.items():
            weight_milli = self.config.weight_milli(kind)
            price = known.get(name) or replace(COLD, base_model=name)
            if price.weight_milli != weight_milli or name not in known:
                known[name] = replace(price, weight_milli=weight_milli)
        return replace(reply, prices=tuple(known.values()))

    @classmethod
    def read(cls, path: Path) -> Budgets | None:
        """What ``write`` left there; ``None`` where that is nothing, or nothing of use.

        The first gateway that finds the ledger gives it budgets again.
        """
        try:
            return cls.load(json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            log.error("%s: not readable (%s); waiting for a gateway", path, type(error).__name__)
            return None

    def write(self, path: Path) -> None:
        """Keep them; after a crash the file has these or the ones before."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, json.dumps(self.dump(), sort_keys=True).encode())


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


def check_count(store: LedgerStore, config: BudgetsConfig, path: Path) -> None:
    """Refuse a file that spreads accounts over another number of ledgers than the database.

    Raises:
        LedgerStoreError: It does; the message has the remedy.
    """
    # A file from before there could be several is one of one.
    before = store.setting(SHARDS) or ("1" if store.setting("budgets_digest") else None)
    if before is not None and before != str(config.shards):
        raise LedgerStoreError(
            f"{path}: is one of {before} ledgers, but the budgets file says shards:"
            f" {config.shards}, and accounts would not find what they have spent. {REMEDY}"
        )


def check_homes(before: BudgetsConfig, after: BudgetsConfig) -> None:
    """Refuse a file under which a department would live in another ledger.

    Raises:
        LedgerStoreError: It does; the message has the remedy.
    """
    if before.shards != after.shards:
        raise LedgerStoreError(
            f"There are {before.shards} ledgers, but the budgets file says shards:"
            f" {after.shards}. {REMEDY}"
        )
    if names := moved(before, after):
        raise LedgerStoreError(
            f"By its cohort, department {names[0]} would be in another of the {after.shards}"
            f" ledgers, which does not know what it has spent. {REMEDY}"
        )
