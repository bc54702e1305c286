"""What the routing section accepts, and which target holds for whom."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from routing.cards import Cascade, ModelCard, ModelsFile, Pressure, RoutingConfig, Target


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        ({"id": ""}, "at least 1"),
        ({"id": "a", "context_tokens": 0}, "greater"),
        ({"id": "a", "languages": ["*", "de"]}, "stands alone"),
        ({"id": "a", "languages": ["german"]}, "ISO 639-1"),
        ({"id": "a", "languages": []}, "at least 1"),
        ({"id": "a", "data_classes": ["secret"]}, "'public'"),
        ({"id": "a", "price": {"prefill_ns": 1, "decode_ns": 1}}, "measured_on"),
        ({"id": "a", "speed": 1}, "not permitted"),
    ],
)
def test_a_wrong_card_is_refused(card: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ModelCard.model_validate(card)


@pytest.mark.parametrize(
    "target",
    [
        {"departments": ["hr"]},
        {"departments": ["hr"], "large_share": 0.5, "quality": 0.5},
        {"departments": ["hr"], "large_share": 1.5},
        {"departments": ["hr"], "quality": float("nan")},
        {"departments": [], "quality": 0.5},
    ],
)
def test_a_target_is_one_share_of_somebody(target: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Target.model_validate(target)


def test_a_department_has_its_own_target_or_that_of_the_others() -> None:
    config = RoutingConfig(
        targets=(
            Target(departments=("*", "ops"), large_share=0.2),
            Target(departments=("hr", "lab"), quality=0.9),
        )
    )
    assert config.target("lab").text == "quality=0.900"
    assert config.target("nobody").text == config.target("ops").text == "large_share=0.200"
    alone = RoutingConfig(targets=(Target(departments=("hr",), large_share=1.0),))
    assert alone.target("hr").always_large
    assert alone.target("lab").text == RoutingConfig().target("lab").text == "large_share=0.300"


@pytest.mark.parametrize(
    ("use", "share"), [(-5, 0), (0, 0), (1000, 0), (1500, 0.5), (2000, 1), (10**9, 1)]
)
def test_pressure_is_linear_between_its_ends(use: int, share: float) -> None:
    assert Pressure(start_milli=1000, full_milli=2000).share(use) == share


def test_pressure_needs_room_between_its_ends() -> None:
    with pytest.raises(ValidationError, match="above start_milli"):
        Pressure(start_milli=1000, full_milli=1000)


def test_a_cascade_is_for_those_it_names() -> None:
    assert not RoutingConfig().cascades("hr")
    config = RoutingConfig(cascade=Cascade(departments=("lab",)))
    assert (config.cascades("lab"), config.cascades("hr")) == (True, False)
    assert RoutingConfig(cascade=Cascade(departments=("*",))).cascades("hr")


def test_a_file_knows_its_cards() -> None:
    file = ModelsFile(models=(ModelCard(id="a"), ModelCard(id="b", languages=("de",))))
    found = file.card("b")
    assert found is not None
    assert (found.any_language, file.card("c")) == (False, None)
