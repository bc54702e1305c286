"""Reads ``config/models.yaml`` against what is served; see ``routing.cards`` for its keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from governance.selection import TIERS
from governance.types import ModelInfo
from governance.yaml_config import Place, YamlFile, read_yaml, validate
from routing.cards import ModelsFile


def load_models(path: str | Path, served: Sequence[ModelInfo]) -> ModelsFile:
    """Read and check the file.

    Cards of models that are not served are kept and mean nothing. Departments are not checked:
    who belongs to which is the identity provider's to say.

    Args:
        path: The file.
        served: All served models, adapters included.

    Raises:
        ConfigError: Names the file, the line, the place and the reason.
    """
    source = read_yaml(path)
    models = validate(source, ModelsFile)
    _refuse_repeats(
        source,
        [(("models", i, "id"), card.id) for i, card in enumerate(models.models)],
        "is the id of a card above; give each model one card",
    )
    _refuse_repeats(
        source,
        [
            (("routing", "targets", i, "departments", j), department)
            for i, target in enumerate(models.routing.targets)
            for j, department in enumerate(target.departments)
        ],
        "has a target above; name each department once",
    )
    _refuse_long_contexts(source, models, served)
    return models


def eligible(models: ModelsFile, served: Sequence[ModelInfo]) -> tuple[ModelInfo, ...]:
    """The served models that ``auto`` chooses among: of its tiers, and with a card."""
    return tuple(m for m in served if m.tier in TIERS and models.card(m.id) is not None)


def _refuse_repeats(source: YamlFile, named: Sequence[tuple[Place, str]], reason: str) -> None:
    seen: set[str] = set()
    for place, name in named:
        if name in seen:
            raise source.error(place, reason)
        seen.add(name)


def _refuse_long_contexts(
    source: YamlFile, models: ModelsFile, served: Sequence[ModelInfo]
) -> None:
    """A card may keep requests from a model, and cannot lengthen what its engine was given."""
    contexts = {model.id: model.context_tokens for model in served}
    for i, card in enumerate(models.models):
        most = contexts.get(card.id)
        if most is not None and card.context_tokens is not None and card.context_tokens > most:
            raise source.error(
                ("models", i, "context_tokens"),
                f"is more than the {most} tokens that are served; lower it, raise context_tokens "
                "in the serve file, or leave it out",
            )
