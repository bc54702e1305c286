"""``/v1/models``: only what the caller may use."""

from __future__ import annotations

from typing import Any

from governance.errors import ModelNotFound
from governance.gateway import Gateway
from governance.types import ModelInfo


def model_object(model: ModelInfo, created_s: int) -> dict[str, Any]:
    """OpenAI's model object, with what a caller needs in order to choose."""
    return {
        "id": model.id,
        "object": "model",
        "created": created_s,
        "owned_by": "gatehouse",
        "root": model.base,
        "parent": model.base if model.base != model.id else None,
        "max_model_len": model.context_tokens,
        "tier": model.tier,
        "operations": sorted(operation.value for operation in model.operations),
    }


async def list_models(
    gateway: Gateway, authorization: str | None, created_s: int
) -> dict[str, Any]:
    """The caller's models as OpenAI's list object."""
    models = await gateway.visible_models(authorization)
    return {"object": "list", "data": [model_object(model, created_s) for model in models]}


async def get_model(
    gateway: Gateway, authorization: str | None, model_id: str, created_s: int
) -> dict[str, Any]:
    """One model of the caller's.

    Raises:
        ModelNotFound: It does not exist, or the caller may not use it: the same answer.
    """
    for model in await gateway.visible_models(authorization):
        if model.id == model_id:
            return model_object(model, created_s)
    raise ModelNotFound("", "model")
