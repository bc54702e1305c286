"""What a token costs: quantiles of recent requests, learned online.

Three quantities a base model, each a ``Sketch``: device-nanoseconds per computed prompt token,
device-nanoseconds per answer token, and prompt tokens per 1,024 bytes of body.

**Sketch.** DDSketch (Masson, Rim, Lee, PVLDB 12(12), arXiv 1908.10693): bucket *i* counts values
in (g^(i-1), g^i] with g = (1 + a) / (1 - a); its middle is within a relative error of a = 2 % of
each of them, so every quantile is. Two sketches merge by adding their buckets. Each new value
counts 2^(1/H) times the one before it, which is exponential decay with a half-life of H = 500
values and without a clock: a model that became slower moves the median after as many requests,
and the 99th percentile after about 1.5 % of that. Values beyond 10^12 are counted as 10^12, so a
sketch has 700 buckets at most.

**Cold start.** Until a quantity has ``MIN_OBSERVATIONS`` values, the defaults below stand in:
about what a 70B model takes at a batch of one, and a token per byte. They err on the dear side;
an estimate that is too high costs a reservation that is given back within moments, one that is too
low costs budget that nobody reserved.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import ceil, log
from typing import Final

from governance.budget.messages import ModelPrice

ERROR: Final = 0.02
HALF_LIFE: Final = 500
"""Values after which a value counts half."""
MIN_OBSERVATIONS: Final = 20
KIB: Final = 1024

_GAMMA: Final = (1 + ERROR) / (1 - ERROR)
_LOG_GAMMA: Final = log(_GAMMA)
_GROWTH: Final = 2 ** (1 / HALF_LIFE)
_RESCALE_AT: Final = 2.0**40
_FORGET_BELOW: Final = 2.0**-20
_MOST: Final = 10**12

COLD: Final = ModelPrice(
    base_model="",
    weight_milli=1000,
    prefill_p50_ns=500_000,
    prefill_p99_ns=2_000_000,
    decode_p50_ns=20_000_000,
    decode_p99_ns=100_000_000,
    prompt_tokens_per_kib_p50=256,
    prompt_tokens_per_kib_p99=1024,
    observations=0,
)
"""Prices of a model that nothing is known of."""


@dataclass(slots=True)
class Sketch:
    """Quantiles of a stream of positive integers, older ones counting less."""

    observations: int = 0
    """Values taken in."""
    _step: float = 1.0
    """What the next value counts."""
    _buckets: dict[int, float] = field(default_factory=dict)

    def add(self, value: int) -> None:
        """Take in one value; less than 1 counts as 1."""
        bucket = ceil(log(min(max(value, 1), _MOST)) / _LOG_GAMMA - 1e-9)
        self._buckets[bucket] = self._buckets.get(bucket, 0.0) + self._step
        self._step *= _GROWTH
        self.observations += 1
        if self._step > _RESCALE_AT:
            self._rescale()

    def merge(self, other: Sketch) -> None:
        """Take in another sketch; both newest values count alike."""
        scale = self._step / other._step
        for bucket, count in other._buckets.items():
            self._buckets[bucket] = self._buckets.get(bucket, 0.0) + count * scale
        self.observations += other.observations

    def quantile(self, per_cent: int) -> int:
        """Value that so many per cent of the values do not exceed; 0 where there are none."""
        total = sum(self._buckets.values())
        rank, seen, last = total * per_cent / 100, 0.0, 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            last = bucket
            if seen >= rank:
                break
        return round(2 * _GAMMA**last / (_GAMMA + 1)) if self._buckets else 0

    def dump(self) -> str:
        """As text, for the store."""
        self._rescale()
        return json.dumps([self.observations, sorted(self._buckets.items())])

    @classmethod
    def load(cls, text: str) -> Sketch:
        """From ``dump``."""
        observations, buckets = json.loads(text)
        return cls(observations, 1.0, {int(bucket): float(count) for bucket, count in buckets})

    def _rescale(self) -> None:
        self._buckets = {
            bucket: count / self._step
            for bucket, count in self._buckets.items()
            if count / self._step > _FORGET_BELOW
        }
        self._step = 1.0


@dataclass(slots=True)
class PriceBook:
    """Prices of one base model."""

    base_model: str
    weight_milli: int = 1000
    """Largest weight of the accelerators that serve it."""
    prefill: Sketch = field(default_factory=Sketch)
    decode: Sketch = field(default_factory=Sketch)
    density: Sketch = field(default_factory=Sketch)
    """Prompt tokens per 1,024 bytes of body."""

    def served(
        self, prefill_us: int, prefill_tokens: int, decode_us: int, decode_tokens: int
    ) -> None:
        """Learn from one request that an engine is through with; raw device-microseconds."""
        if prefill_tokens > 0:
            self.prefill.add(prefill_us * 1000 // prefill_tokens)
        if decode_tokens > 0:
            self.decode.add(decode_us * 1000 // decode_tokens)

    def sent(self, prompt_bytes: int, prompt_tokens: int) -> None:
        """Learn how many tokens a body held."""
        if prompt_bytes > 0 and prompt_tokens > 0:
            self.density.add(prompt_tokens * KIB // prompt_bytes)

    def price(self) -> ModelPrice:
        """The figures for gateways."""
        return ModelPrice(
            self.base_model,
            self.weight_milli,
            *_pair(self.prefill, COLD.prefill_p50_ns, COLD.prefill_p99_ns),
            *_pair(self.decode, COLD.decode_p50_ns, COLD.decode_p99_ns),
            *_pair(self.density, COLD.prompt_tokens_per_kib_p50, COLD.prompt_tokens_per_kib_p99),
            max(self.prefill.observations, self.decode.observations),
        )


def _pair(sketch: Sketch, p50: int, p99: int) -> tuple[int, int]:
    """Median and 99th percentile, or the defaults while too little is known."""
    if sketch.observations < MIN_OBSERVATIONS:
        return p50, p99
    return sketch.quantile(50), sketch.quantile(99)
