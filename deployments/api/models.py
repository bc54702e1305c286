"""``/v1/models``: only what the caller may use."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from governance.errors import ModelNotFound
from governance.gateway import Gateway
from governance.types import ModelInfo


def model_object(model: ModelInfo, created_s: int, visible: Collection[str]) -> dict[str, Any]:
    """OpenAI's model object, with what a caller needs in order to choose.

    An adapter's base is named only to a caller who may use it (``visible``).
    """
    base = model.base if model.base in visible else model.id
    return {
        "id": model.id,
        "object": "model",
        "created": created_s,
        "owned_by": "gatehouse",
        "root": base,
        "parent": base if base != model.id else None,
        "max_model_len": model.context_tokens,
        "tier": model.tier,
        "operations": sorted(operation.value for operation in model.operations),
    }


async def list_models(
    gateway: Gateway, authorization: str | None, created_s: int
) -> dict[str, Any]:
    """The caller's models as OpenAI's list object."""
    models = await gateway.visible_models(authorization)
    visible = {model.id for model in models}
    data = [model_object(model, created_s, visible) for model in models]
    return {"object": "list", "data": data}


async def get_model(
    gateway: Gateway, authorization: str | None, model_id: str, created_s: int
) -> dict[str, Any]:
    """One model of the caller's.

    Raises:
        ModelNotFound: It does not exist, or the caller may not use it: the same answer.
    """
    models = await gateway.visible_models(authorization)
    for model in models:
        if model.id == model_id:
            return model_object(model, created_s, {other.id for other in models})
    raise ModelNotFound("", "model")
