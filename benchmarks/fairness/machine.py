"""What a step of continuous batching takes on an accelerator, and who pays which part of it.

**Time.** A step that computes tokens ``t_i`` over contexts ``c_i`` takes

    seconds = fixed + max(FLOPs / (F x f), bytes / (B x b))

with the FLOPs and bytes of ``deployments/metering/cost.py`` (linear layers, attention, logits;
weights once, KV cache of every request), ``F`` and ``B`` the peaks of a data sheet
(``deployments/metering/devices.py``), and ``f`` and ``b`` the shares of them that an engine
reaches: a roofline (Williams, Waterman and Patterson, CACM 52(4), 2009). ``f`` = 0.4 is what
``benchmarks/routing/prices.py`` takes; ``b`` = 0.7 is an assumption of the same kind. All
arms run on the same machine.

**Who pays.** The time of a step is divided as the meter divides it, by ``CostModel``'s weights.
Those add the two terms where the clock takes the larger one, so that what is metered is not exactly
what the machine does; no more is it in reality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import NamedTuple

from deployments.metering.cost import CostModel, ModelShape, model_shape
from deployments.metering.devices import DEVICES, Device

LLAMA_8B = model_shape(
    SimpleNamespace(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128_256,
        intermediate_size=14_336,
    ),
    weight_bytes=2.0,
    kv_bytes=2.0,
)
"""Llama-3.1-8B in BF16, from its published configuration."""


class Share(NamedTuple):
    """What one department has in a step, summed over its requests."""

    requests: int
    tokens: int
    pairs: float
    """Sum of ``t (c + (t + 1) / 2)``: what attention multiplies."""
    context: int
    """Sum of ``c + t``: tokens of KV cache read and written."""


@dataclass(frozen=True)
class Machine:
    """An engine on a device, with the settings of its scheduler."""

    shape: ModelShape = LLAMA_8B
    device: Device = DEVICES["H100"]
    max_seqs: int = 256
    """Requests that run at once (``max_num_seqs``)."""
    step_tokens: int = 2048
    """Tokens of a step (``max_num_batched_tokens``)."""
    kv_tokens: int = 400_000
    """Room of the KV cache: 0.9 of 80 GB less 16 GB of weights and 3.5 GB for a step, at 128 KiB
    a token."""
    flops_share: float = 0.4
    bytes_share: float = 0.7
    fixed_s: float = 0.5e-3
    """Of a step on the host that asynchronous scheduling does not hide; an assumption."""

    @cached_property
    def cost(self) -> CostModel:
        """The meter's weights."""
        return CostModel.of(self.shape, self.device)

    def step_s(self, shares: Sequence[Share]) -> float:
        """Seconds of a step."""
        shape, device = self.shape, self.device
        requests = tokens = context = 0
        pairs = 0.0
        for share in shares:
            requests += share.requests
            tokens += share.tokens
            pairs += share.pairs
            context += share.context
        flops = (
            2.0 * shape.token_params * tokens
            + 4.0 * shape.layers * shape.heads * shape.head_size * pairs
            + 2.0 * shape.hidden * shape.vocabulary * requests
        )
        moved = shape.weight_bytes + shape.kv_token_bytes * context
        return self.fixed_s + max(
            flops / (device.flops * self.flops_share),
            moved / (device.bytes_per_s * self.bytes_share),
        )

    def divide(self, shares: Sequence[Share], span_ns: int) -> tuple[list[int], float]:
        """Parts of a step's time, in whole nanoseconds that add up to it, as the meter cuts it.

        Returns:
            The parts, and nanoseconds of time per second of weight.
        """
        cost, requests = self.cost, sum(share.requests for share in shares)
        base_s = cost.shared_s / requests + cost.request_s
        weights = [
            share.requests * base_s
            + cost.token_s * share.tokens
            + cost.pair_s * share.pairs
            + cost.context_s * share.context
            for share in shares
        ]
        scale, running, before, parts = span_ns / sum(weights), 0.0, 0, []
        for weight in weights[:-1]:
            running += weight
            cut = min(span_ns, int(running * scale))
            parts.append(cut - before)
            before = cut
        return [*parts, span_ns - before], scale

    def token_us(self, context: int) -> tuple[float, float]:
        """Price of a prompt token and of an answer token in a full step, in microseconds.

        The step is half prompt and half answers of requests whose context is as given; the prompt
        is one request's.

        Args:
            context: Tokens that an answer token looks back on.
        """
        answers = min(self.max_seqs, self.step_tokens // 2)
        chunk = self.step_tokens - answers
        shares = (
            Share(1, chunk, chunk * (context / 2), context),
            Share(answers, answers, float(answers * context), answers * (context + 1)),
        )
        (prompt_ns, answer_ns), _ = self.divide(shares, round(self.step_s(shares) * 1e9))
        return prompt_ns / chunk / 1e3, answer_ns / answers / 1e3
