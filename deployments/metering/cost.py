"""What part of a step's time a request is to pay: a weight by compute and memory traffic. Pure.

A request that takes part in a step with ``t`` new tokens over ``c`` tokens of context has weight

    seconds = FLOPs / peak FLOP/s + bytes / bandwidth

    FLOPs = 2 P t                                 linear layers, P parameters that a token uses
          + 4 L H d t (c + (t + 1) / 2)           attention: QK and AV, causal within the chunk
          + 2 D V                                 logits of the one position that is sampled
          + 2 R t                                 low-rank adapter with R parameters, if any
    bytes = K (c + t)                             KV cache: read of the context, write of the chunk
          + W / n                                 weights, read once a step for its n requests

and fixed times of the host a step (split like the weights) and a request, where a device has them,

with L layers, H query heads of size d, hidden size D, vocabulary V, K bytes of KV cache a token
and W bytes of weights. That is ``a + b t + e t (c + t / 2) + k (c + t)``; the coefficients are
computed once, and a weight is six operations.

The two terms are added although a device overlaps them: the sum is within a factor of two of
the roofline's maximum (Williams, Waterman and Patterson, CACM 52(4), 2009), has no kink at which
two nearly equal requests would pay differently, and only ratios within one step matter: whatever
the weights, parts add up to the time of the step. FLOPs per token and the KV traffic follow
Kaplan et al., arXiv 2001.08361, s. 2.1, and Pope et al., arXiv 2211.05102, s. 2.

Tokens found in the prefix cache are not scheduled, so they cost what reading them costs and no
compute. Left out: activations (proportional to ``b t``), softmax and norms, communication
(proportional to tokens), sliding windows (context counts whole), and speculative drafts, which
count as tokens where they are scheduled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deployments.metering.devices import Device


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model, whole (over all devices that hold a part of it)."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    token_params: int
    """Parameters of linear layers that one token uses, logits apart."""
    weight_bytes: float
    """Bytes of weights that a step reads."""
    kv_token_bytes: float
    """Bytes of KV cache per token."""
    adapter_params: int = 0
    """Parameters that a token of a request with an adapter uses besides."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Coefficients in seconds; see the module."""

    shared_s: float
    """A step's weight traffic and fixed time, split over its requests."""
    request_s: float
    token_s: float
    pair_s: float
    """Per token and token of context."""
    context_s: float
    adapter_token_s: float = 0.0

    @classmethod
    def of(cls, shape: ModelShape, device: Device) -> CostModel:
        """Coefficients of a model on a device."""
        return cls(
            shared_s=device.step_s + shape.weight_bytes / device.bytes_per_s,
            request_s=device.request_s + 2.0 * shape.hidden * shape.vocabulary / device.flops,
            token_s=2.0 * shape.token_params / device.flops,
            pair_s=4.0 * shape.layers * shape.heads * shape.head_size / device.flops,
            context_s=shape.kv_token_bytes / device.bytes_per_s,
            adapter_token_s=2.0 * shape.adapter_params / device.flops,
        )

    def weight(
        self, tokens: int, context: int, requests: int = 1, *, adapter: bool = False
    ) -> float:
        """Weight of one request in one step, in seconds; positive.

        Args:
            tokens: Tokens computed for it in this step, at least 1.
            context: Tokens before them, cached ones included.
            requests: Requests in the step.
            adapter: Whether it runs with a low-rank adapter.
        """
        token_s = self.token_s + (self.adapter_token_s if adapter else 0.0)
        return (
            self.shared_s / requests
            + self.request_s
            + tokens * (token_s + self.pair_s * (context + 0.5 * (tokens + 1)))
            + self.context_s * (context + tokens)
        )


FLAT = CostModel(0.0, 0.0, 1.0, 0.0, 0.0)
"""Tokens alone; the baseline of the accuracy benchmark."""


def model_shape(
    config: Any, *, weight_bytes: float, kv_bytes: float, adapter_rank: int = 0
) -> ModelShape:
    """Sizes from a Hugging Face text configuration; what it lacks is estimated.

    Args:
        config: Object with the usual fields; those of mixtures of experts and of multi-head
            latent attention are understood.
        weight_bytes: Bytes per parameter.
        kv_bytes: Bytes per number in the KV cache.
        adapter_rank: Largest rank of the low-rank adapters; 0 for none.
    """

    def number(*names: str, default: int = 0) -> int:
        for name in names:
            if isinstance(value := getattr(config, name, None), int) and value > 0:
                return value
        return default

    hidden = number("hidden_size", "n_embd", "d_model", default=4096)
    layers = number("num_hidden_layers", "n_layer", "num_layers", default=32)
    heads = number("num_attention_heads", "n_head", default=max(1, hidden // 128))
    kv_heads = number("num_key_value_heads", "num_kv_heads", default=heads)
    head_size = number("head_dim", default=max(1, hidden // heads))
    vocabulary = number("vocab_size", default=32_000)
    inner = number("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    attention = hidden * (2 * heads + 2 * kv_heads) * head_size
    dense = 3 * hidden * inner
    experts = number("num_experts", "num_local_experts", "n_routed_experts")
    used = all_of_it = dense
    if experts:
        expert = 3 * hidden * number("moe_intermediate_size", default=inner)
        always = number("n_shared_experts") * expert
        used = number("num_experts_per_tok", default=2) * expert + always
        all_of_it = experts * expert + always
    latent = number("kv_lora_rank")
    kv_width = (
        latent + number("qk_rope_head_dim", default=64) if latent else 2 * kv_heads * head_size
    )
    adapter = adapter_rank * (
        2 * (hidden + heads * head_size)
        + 2 * (hidden + kv_heads * head_size)
        + 3 * (hidden + inner)
    )
    return ModelShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocabulary=vocabulary,
        token_params=layers * (attention + used),
        weight_bytes=weight_bytes * (layers * (attention + all_of_it) + hidden * vocabulary),
        kv_token_bytes=kv_bytes * layers * kv_width,
        adapter_params=layers * adapter,
    )
