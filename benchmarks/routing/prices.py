"""What a request costs at the small and at the large model: GPU time per token.

Two pairs of prices, each with what it rests on:

* ``metered()``: both checkpoints of the local profile under one and the same load, as the engines'
  meter had it in ``benchmarks/results/prove_meter.json``. They are tiny and alike, and ran on a
  CPU: the ratio is real, and says little about models that differ by a factor of nine. Lengths of
  prompts are in words there, which are taken for tokens.
* ``PARAMETERS``: time proportional to the published number of parameters (Llama-3.1: 8.03 and 70.55
  thousand millions), for prompt and answer tokens alike. An assumption: per prompt token the
  arithmetic grows so, per answer token the weights that are read. Batch sizes, parallelism over
  several devices (which wastes some) and attention over long prompts are left out. The small
  model's own prices are those of a roofline on an H100 (989 TFLOP/s of bfloat16 at 40 %; 3.35 TB/s
  of memory shared by a batch of 32); they set the unit, not the saving.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

METER = Path(__file__).parents[1] / "results" / "prove_meter.json"

_SMALL, _LARGE = 8.03e9, 70.55e9
_PREFILL_NS = round(2 * _SMALL / (989e12 * 0.4) * 1e9)
_DECODE_NS = round(2 * _SMALL / 3.35e12 / 32 * 1e9)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Price:
    """GPU-nanoseconds of one model."""

    prefill_ns: float
    """For each prompt token."""
    decode_ns: float
    """For each answer token."""
    request_ns: float = 0.0
    """For each request, however short."""

    def seconds(self, prompt_tokens: npt.ArrayLike, answer_tokens: npt.ArrayLike) -> Floats:
        """GPU-seconds of requests."""
        prompt = np.asarray(prompt_tokens, dtype=np.float64)
        answer = np.asarray(answer_tokens, dtype=np.float64)
        total: Floats = self.request_ns + prompt * self.prefill_ns + answer * self.decode_ns
        return total / 1e9


@dataclass(frozen=True, slots=True)
class Prices:
    """Of both models, and where they come from."""

    small: Price
    large: Price
    basis: str

    def ratio(self, prompt_tokens: float, answer_tokens: float) -> float:
        """Cost of a request at the large model in units of the small one."""
        large = float(self.large.seconds(prompt_tokens, answer_tokens))
        return large / float(self.small.seconds(prompt_tokens, answer_tokens))


def scaled(price: Price, factor: float) -> Price:
    """A price times a factor."""
    return Price(price.prefill_ns * factor, price.decode_ns * factor, price.request_ns * factor)


PARAMETERS = Prices(
    Price(_PREFILL_NS, _DECODE_NS),
    scaled(Price(_PREFILL_NS, _DECODE_NS), _LARGE / _SMALL),
    f"assumed: GPU time proportional to parameters, {_LARGE / _SMALL:.2f} to 1",
)


def metered(path: Path = METER) -> Prices:
    """Prices of the local checkpoints, from the recorded proof of metering.

    The small one's are fitted (least squares, none below zero) to requests that ran alone, with
    prompts and answers of many lengths; the large one's are those times what it took more for an
    equal load of 48 requests each.
    """
    figures = json.loads(path.read_text())["figures"]
    accuracy, sums = figures["accuracy"], figures["sums"]
    asked = np.asarray(accuracy["asks"], dtype=np.float64)
    took_ns = np.asarray(accuracy["alone_us"], dtype=np.float64) * 1e3
    inputs = np.stack([np.ones(len(asked)), asked[:, 0], asked[:, 1]], axis=1)
    kept = [0, 1, 2]
    while True:
        found, *_ = np.linalg.lstsq(inputs[:, kept], took_ns, rcond=None)
        if (found >= 0).all():
            break
        kept = [place for place, value in zip(kept, found, strict=True) if value >= 0]
    every = dict.fromkeys(range(3), 0.0) | dict(zip(kept, map(float, found), strict=True))
    small = Price(every[1], every[2], every[0])
    factor = sums["large"]["requests_us"] / sums["small"]["requests_us"]
    return Prices(
        small,
        scaled(small, factor),
        f"metered: local checkpoints under equal load, {factor:.3f} to 1 ({path.name})",
    )
