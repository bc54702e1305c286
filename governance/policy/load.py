"""Loads ``config/policy.yaml``, or refuses it with file, line, place and reason.

Nothing is repaired or left for a request to find out: a policy that loads has only known names,
only rules that can act, and meets its own tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from governance.policy.analysis import problems
from governance.policy.model import PolicyConfig
from governance.types import Effect, ModelInfo
from governance.yaml_config import read_yaml, validate

SUPPORTED_EFFECTS = frozenset({Effect.ALLOW, Effect.BLOCK})
"""Effects that this version carries out; the others are known to the format and refused."""


def load_policy(
    path: str | Path,
    models: Sequence[ModelInfo],
    supported_effects: frozenset[Effect] = SUPPORTED_EFFECTS,
) -> PolicyConfig:
    """Read, validate and analyse a policy.

    Args:
        path: The file.
        models: All served models; rules may name these and no others.
        supported_effects: What the platform can carry out.

    Raises:
        ConfigError: The first thing that is wrong, in the order of the file.
    """
    source = read_yaml(path)
    config = validate(source, PolicyConfig)
    found = [
        source.error(problem.place, problem.reason)
        for problem in problems(config, models, supported_effects)
    ]
    if found:
        raise min(found, key=lambda error: error.line or 0)
    return config
