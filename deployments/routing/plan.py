"""How ``auto`` works in one application: decided where it is built, given to every gateway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deployments.config import AppConfig
from deployments.routing.scoring import ScorerFacts, inspect_artefact
from governance.budget.config import BudgetsConfig
from governance.models_file import eligible, load_models
from governance.selection import TIERS
from governance.types import ModelInfo
from governance.yaml_config import ConfigError, read_yaml
from routing.artefact import ArtefactError
from routing.cards import ModelCard, ModelsFile


@dataclass(frozen=True, slots=True)
class RoutingPlan:
    """The models file, and which scorer if one is needed."""

    models: ModelsFile
    scorer: ScorerFacts | None
    """``None`` where ``auto`` has at most one tier to choose from: nothing needs a score."""

    @classmethod
    def of(cls, app: AppConfig, root: Path, budgets: BudgetsConfig) -> RoutingPlan:
        """Load and check what the configuration names.

        Args:
            app: What runs.
            root: Directory that relative paths start from.
            budgets: Accounts that there are.

        Raises:
            ConfigError: The models file is wrong, or the artefact is missing or changed.
        """
        models = checked_models(app, root, budgets)
        facts = checked_artefact(app, root)
        tiers = {model.tier for model in eligible(models, app.model_infos())}
        return cls(models, facts if tiers.issuperset(TIERS) else None)

    def dump(self) -> dict[str, Any]:
        """As plain values, for a process on another node."""
        scorer = None if self.scorer is None else asdict(self.scorer)
        return {"models": self.models.model_dump(mode="json"), "scorer": scorer}

    @classmethod
    def load(cls, dump: Mapping[str, Any]) -> RoutingPlan:
        """What ``dump`` gave."""
        scorer = dump["scorer"]
        return cls(
            ModelsFile.model_validate(dump["models"]),
            None if scorer is None else ScorerFacts.load(scorer),
        )

    def eligible(self, served: Sequence[ModelInfo]) -> tuple[ModelInfo, ...]:
        """The models that ``auto`` chooses among; none where it is not offered."""
        return eligible(self.models, served)

    def cards(self, served: Sequence[ModelInfo]) -> tuple[ModelCard, ...]:
        """The cards of those: others would only cost, a guess of the language for instance."""
        names = {model.id for model in self.eligible(served)}
        return tuple(card for card in self.models.models if card.id in names)


def checked_models(app: AppConfig, root: Path, budgets: BudgetsConfig | None) -> ModelsFile:
    """The models file; the account that pays for comparisons exists.

    Args:
        app: What runs.
        root: Directory that relative paths start from.
        budgets: Accounts that there are; ``None`` where that cannot be said.

    Raises:
        ConfigError: The file is wrong, or there is no such account.
    """
    path = root / app.models_file
    models = load_models(path, app.model_infos())
    shadow = models.routing.shadow
    if shadow and budgets and budgets.account(shadow.account) is None:
        reason = f"{shadow.account!r} has no budget; give it an account in {app.budgets}"
        raise read_yaml(path).error(("routing", "shadow", "account"), reason)
    return models


def checked_artefact(app: AppConfig, root: Path) -> ScorerFacts:
    """The scorer that is configured, its files compared with their digests.

    Raises:
        ConfigError: It is missing or changed.
    """
    try:
        return inspect_artefact(root, app.router.artefact)
    except ArtefactError as error:
        raise ConfigError("router.artefact", None, "", str(error)) from None
