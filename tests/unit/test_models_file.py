"""Models files that are refused, with line, place and reason; and the one that is shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from governance.models_file import eligible, load_models
from governance.types import ModelInfo, Operation
from governance.yaml_config import ConfigError

ROOT = Path(__file__).parents[2]
GENERATE = frozenset({Operation.CHAT})
SERVED = (
    ModelInfo("s", "small", GENERATE, 4096, "s"),
    ModelInfo("s-hr", "small", GENERATE, 4096, "s"),
    ModelInfo("l", "large", GENERATE, 8192, "l"),
    ModelInfo("v", "embedding", frozenset({Operation.EMBEDDINGS}), 512, "v"),
)


def refusal(tmp_path: Path, text: str) -> ConfigError:
    path = tmp_path / "models.yaml"
    path.write_text("version: 1\n" + text)
    with pytest.raises(ConfigError) as caught:
        load_models(path, SERVED)
    return caught.value


@pytest.mark.parametrize(
    ("text", "line", "place", "reason"),
    [
        ("models:\n- id: s\n- id: l\n- id: s", 5, "models.2.id", "a card above"),
        ("models:\n- id: s\n  context_tokens: 4097", 4, "models.0.context_tokens", "4096 tokens"),
        ("models:\n- {id: s, speed: 1}", 3, "models.0.speed", "not permitted"),
        ("models:\n- {id: s, id: l}", 3, "models.0.id", "given twice"),
        ("models:\n- {id: s, languages: [de, '*']}", 3, "models.0.languages", "stands alone"),
        (
            "routing:\n  targets:\n  - {departments: [hr], quality: 1}\n"
            "  - {departments: [a, hr], quality: 1}",
            5,
            "routing.targets.1.departments.1",
            "has a target above",
        ),
        ("routing:\n  targets: []", 3, "routing.targets", "at least 1"),
        (
            "routing:\n  targets:\n  - {departments: [hr]}",
            4,
            "routing.targets.0",
            "either large_share or quality",
        ),
        ("routing:\n  default_tier: huge", 3, "routing.default_tier", "'small'"),
        ("routing:\n  score_timeout_ms: 0", 3, "routing.score_timeout_ms", "greater"),
        ("routing:\n  cascade: {}", 3, "routing.cascade.departments", "required"),
        ("routing:\n  shadow: {share_milli: 5}", 3, "routing.shadow.account", "required"),
        ("routing:\n  pressure: {start_milli: 2000}", 3, "routing.pressure", "above start_milli"),
    ],
)
def test_a_wrong_file_is_refused(
    tmp_path: Path, text: str, line: int, place: str, reason: str
) -> None:
    error = refusal(tmp_path, text)
    assert (error.line, error.place) == (line, place)
    assert reason in error.reason


def test_cards_of_what_is_not_served_mean_nothing(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text("models:\n- {id: other, context_tokens: 999999}\n- id: l\n- id: v\n")
    models = load_models(path, SERVED)
    assert [model.id for model in eligible(models, SERVED)] == ["l"]


def test_an_adapter_is_chosen_only_with_a_card_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text("models: [{id: s}]")
    assert [m.id for m in eligible(load_models(path, SERVED), SERVED)] == ["s"]
    path.write_text("models: [{id: s}, {id: s-hr}]")
    assert [m.id for m in eligible(load_models(path, SERVED), SERVED)] == ["s", "s-hr"]


def test_an_empty_file_gives_no_choice(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text("version: 1")
    assert eligible(load_models(path, SERVED), SERVED) == ()


@pytest.mark.parametrize("name", ["serve_config.yaml", "serve_config.local.yaml"])
def test_the_shipped_file_has_a_card_for_each_model_of_the_shipped_profiles(name: str) -> None:
    args = yaml.safe_load((ROOT / name).read_text())["applications"][0]["args"]
    served = [
        ModelInfo(m["id"], m["tier"], GENERATE, m["context_tokens"], m["id"])
        for m in args["models"]
    ]
    models = load_models(ROOT / "config" / "models.yaml", served)
    assert {m.id for m in eligible(models, served)} == {m.id for m in served}
    assert {m.tier for m in served} == {"small", "large"}


def test_the_shipped_file_names_departments_of_the_policy_and_no_price() -> None:
    models = load_models(ROOT / "config" / "models.yaml", ())
    policy = yaml.safe_load((ROOT / "config" / "policy.yaml").read_text())
    named = {name for target in models.routing.targets for name in target.departments}
    assert named <= {*policy["departments"], "*"}
    assert "*" in named
    assert {card.price for card in models.models} == {None}
    assert models.routing.cascade is models.routing.shadow is None
