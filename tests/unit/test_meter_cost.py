"""The weight of a request in a step, and the figures of devices."""

from __future__ import annotations

import timeit
from types import SimpleNamespace

import pytest

from deployments.metering.cost import CostModel, model_shape
from deployments.metering.devices import CPU, DEVICES, GENERIC, accelerator_name, device

LLAMA_8B = SimpleNamespace(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=14336,
    vocab_size=128256,
)
H100 = DEVICES["H100"]


def cost(config: SimpleNamespace = LLAMA_8B, rank: int = 0) -> CostModel:
    return CostModel.of(model_shape(config, weight_bytes=2, kv_bytes=2, adapter_rank=rank), H100)


def test_the_sizes_of_a_known_model() -> None:
    shape = model_shape(LLAMA_8B, weight_bytes=2, kv_bytes=2)
    assert shape.token_params == 32 * (4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 14336)
    assert shape.token_params + 2 * 128256 * 4096 == pytest.approx(8.03e9, rel=0.01)
    assert shape.kv_token_bytes == 131_072


def test_the_weight_is_the_formula() -> None:
    shape = model_shape(LLAMA_8B, weight_bytes=2, kv_bytes=2)
    tokens, context, requests = 100, 500, 4
    pairs = sum(context + t for t in range(1, tokens + 1))
    flops = 2 * shape.token_params * tokens + 4 * 32 * 32 * 128 * pairs + 2 * 4096 * 128256
    bytes_ = 131_072 * (context + tokens) + shape.weight_bytes / requests
    assert cost().weight(tokens, context, requests) == pytest.approx(
        flops / 989e12 + bytes_ / 3.35e12
    )


def test_a_prompt_weighs_the_same_in_one_piece_or_in_chunks() -> None:
    """But for what each step costs again: logits, weights, and the context read again."""
    model = cost()
    whole = model.weight(1000, 0)
    parts = model.weight(600, 0) + model.weight(400, 600)
    again = model.shared_s + model.request_s + model.context_s * 600
    assert parts - whole == pytest.approx(again)


def test_cached_tokens_cost_their_reading_only() -> None:
    model = cost()
    fresh, cached = model.weight(1000, 0, 8), model.weight(16, 984, 8)
    assert cached < fresh / 5
    assert cached > model.weight(16, 0, 8)


def test_decoding_is_bound_by_memory_and_prompts_by_compute() -> None:
    model = cost()
    assert model.shared_s > 100 * model.token_s
    assert model.token_s * 2000 > model.shared_s


def test_an_adapter_and_experts() -> None:
    plain, adapted = cost(rank=16).weight(10, 0), cost(rank=16).weight(10, 0, adapter=True)
    assert plain < adapted < 1.05 * plain
    assert cost().weight(10, 0, adapter=True) == cost().weight(10, 0)
    mixture = SimpleNamespace(
        **{**vars(LLAMA_8B), "num_local_experts": 8, "num_experts_per_tok": 2}
    )
    sparse, dense = (
        model_shape(config, weight_bytes=2, kv_bytes=2) for config in (mixture, LLAMA_8B)
    )
    assert dense.token_params < sparse.token_params < 2 * dense.token_params
    assert sparse.weight_bytes > 4 * dense.weight_bytes


def test_latent_attention_keeps_little() -> None:
    latent = SimpleNamespace(**{**vars(LLAMA_8B), "kv_lora_rank": 512, "qk_rope_head_dim": 64})
    shape = model_shape(latent, weight_bytes=1, kv_bytes=2)
    assert shape.kv_token_bytes == 2 * 32 * 576


def test_a_configuration_without_fields_still_weighs() -> None:
    shape = model_shape(SimpleNamespace(), weight_bytes=2, kv_bytes=2)
    assert CostModel.of(shape, GENERIC).weight(1, 0) > 0


@pytest.mark.parametrize("tokens", [1, 7, 4096, 10**6])
@pytest.mark.parametrize("context", [0, 1, 10**7])
def test_more_work_weighs_more(tokens: int, context: int) -> None:
    model = cost()
    weight = model.weight(tokens, context, 3)
    assert 0 < weight < model.weight(tokens + 1, context, 3)
    assert weight < model.weight(tokens, context + 1, 3)
    assert weight > model.weight(tokens, context, 4)


def test_weighing_is_quick() -> None:
    model = cost()
    best = min(timeit.repeat(lambda: model.weight(1, 500, 8), number=10_000, repeat=5))
    assert best / 10_000 < 5e-6  # 0.3 us on an idle core


@pytest.mark.parametrize(
    ("configured", "reported", "name"),
    [
        ("H100", None, "H100"),
        (None, "NVIDIA H100 80GB HBM3", "H100"),
        (None, "NVIDIA H200", "H200"),
        (None, "NVIDIA A100-SXM4-80GB", "A100"),
        (None, "NVIDIA L4", "L4"),
        (None, "NVIDIA L40S", "L40S"),
        (None, "Tesla V100-SXM2-16GB", "V100"),
        (None, "NVIDIA A10G", "A10G"),
        (None, "cpu", CPU),
        (None, "Wonder 9", "Wonder 9"),
        (None, None, "generic"),
    ],
)
def test_a_device_has_one_name(configured: str | None, reported: str | None, name: str) -> None:
    assert accelerator_name(configured, reported) == name


def test_a_device_is_found_by_ray_type_and_by_driver_name() -> None:
    assert device("AMD-Instinct-MI300X-OAM") is DEVICES["MI300X"]
    assert device("A100-40G") is DEVICES["A100"]
    assert device("TPU-V6E") is DEVICES["TPU-V6E"]
    assert device("Wonder 9") is GENERIC
    for known in DEVICES.values():
        assert device(known.name) is known
