"""The ``queue`` of a serve file: what may stand there, and what the gateway makes of it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from deployments.config import AppConfig, QueueConfig
from governance.admission.shedding import QueueLimits


def app(all_: dict[str, Any] | None = None, **of_the_large: Any) -> AppConfig:
    def model(name: str, **more: Any) -> dict[str, Any]:
        return {"id": name, "tier": name, "source": f"./{name}", "context_tokens": 64, **more}

    return AppConfig.model_validate(
        {
            "mode": "local",
            "models": [model("small"), model("large", **of_the_large)],
            **({} if all_ is None else {"queue": all_}),
        }
    )


def test_what_is_not_set_is_what_the_shedder_takes_anyway() -> None:
    assert app().queue_limits() == {"small": QueueLimits(), "large": QueueLimits()}


def test_a_model_may_have_a_queue_of_its_own() -> None:
    own = {"max_waiting": 7, "patience_s": {"critical": 0.5}}
    limits = app({"max_waiting": 9, "share_percent": {"batch": 10}}, queue=own).queue_limits()
    assert (limits["small"].waiting, limits["large"].waiting) == (9, 7)
    assert limits["small"].share_percent == {"critical": 100, "standard": 80, "batch": 10}
    assert limits["large"].share_percent == {"critical": 100, "standard": 80, "batch": 50}
    assert limits["large"].patience_ms == {"critical": 500, "standard": 60_000, "batch": 600_000}


@pytest.mark.parametrize(
    ("queue", "reason"),
    [
        ({"max_waiting": 0}, "greater than or equal to 1"),
        ({"share_percent": {"batch": 90}}, "more urgent"),
        ({"share_percent": {"critical": 70}}, "more urgent"),
        ({"share_percent": {"critical": 101}}, "less than or equal to 100"),
        ({"share_percent": {"urgent": 100}}, "not permitted"),
        ({"patience_s": {"batch": 0}}, "greater than 0"),
        ({"waiting": 3}, "not permitted"),
    ],
)
def test_a_wrong_queue_is_refused(queue: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        QueueConfig.model_validate(queue)
