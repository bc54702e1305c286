"""What a gateway tells a stranger about itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from deployments.api.models import model_object
from deployments.config import AppConfig
from deployments.ingress import GatewayIngress
from governance.types import ModelInfo, Operation

MODEL = {"tier": "small", "source": "./model", "context_tokens": 64}


def test_readiness_needs_no_credential_and_names_no_model() -> None:
    gateway: Any = SimpleNamespace(
        config=AppConfig.model_validate(
            {
                "mode": "local",
                "models": [{"id": "layoffs-2027", **MODEL}, {"id": "small", **MODEL}],
            }
        ),
        control=SimpleNamespace(age_s=lambda: 1.0),
        engine=SimpleNamespace(ready=lambda model: model == "small"),
    )
    ready = GatewayIngress._ready(gateway)
    assert ready == {"control plane": True, "model 1": False, "model 2": True}


def test_an_adapter_does_not_betray_a_base_that_the_caller_may_not_use() -> None:
    adapter = ModelInfo("hr-letters", "small", frozenset({Operation.CHAT}), 64, "hidden-base")
    alone = model_object(adapter, 1, {"hr-letters"})
    assert "hidden-base" not in repr(alone)
    both = model_object(adapter, 1, {"hr-letters", "hidden-base"})
    assert (both["root"], both["parent"]) == ("hidden-base", "hidden-base")
