"""What routing saves on real traffic: ``python -m benchmarks.routing.savings --data TRACES``.

A published trace is played in time order through the platform's own ``AutoRouter``, with questions
of the held-out set in it (``traffic``, ``heldout``): the predicted gains come from a scorer that
has never seen these questions, and whether an answer is right is what both models really did. For
each way to set a target: GPU-seconds against all requests at the large and all at the small model,
the share of the gain that is kept, and how close the share of large calls stays to the target.
Prices: ``prices``. The answer of a request is taken to have the length that the trace says, whoever
gives it; what scoring takes (some 10 ms of CPU a request, no GPU) is not counted.

Intervals are 95 % bootstrap intervals over questions, since a question occurs many times. ``kept``
is the share of the difference between small and large model; sending the same number of requests to
the large model at random keeps exactly that share, so ``kept minus share`` is what the scores are
worth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.routing import heldout, online
from benchmarks.routing.heldout import Heldout, rounded
from benchmarks.routing.online import Setting
from benchmarks.routing.prices import PARAMETERS, Prices, metered
from benchmarks.routing.traffic import DEPARTMENTS, FOLLOWS, OPEN, SHARES, Traffic, draw, read_trace
from routing import metrics

RESULTS = Path(__file__).parent / "results"
PAIR = "llama31_8b_70b"
TRACES = ("azure_llm_2023_conv", "azure_llm_2023_code")
SEED = 1
WIDTH_S = 300.0
"""Width of the windows over time."""

Floats = npt.NDArray[np.float64]

SETTINGS: Mapping[str, Setting] = {
    "share 10 %": Setting(large_share=0.1),
    "share 30 %": Setting(large_share=0.3),
    "share 50 %": Setting(large_share=0.5),
    "quality 50 %": Setting(quality=0.5),
    "quality 90 %": Setting(quality=0.9),
    "share 30 %, hysteresis": Setting(large_share=0.3, hysteresis=True),
    "share 50 %, small budget": Setting(large_share=0.5, budget=0.35),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one setting did to one trace."""

    large: npt.NDArray[np.bool_]
    """Which requests went to the large model."""
    wanted: Floats
    """Share that the target stood for at each request, after pressure; NaN for a quality."""


def spent(traffic: Traffic, large: npt.NDArray[np.bool_], prices: Prices) -> dict[str, float]:
    """GPU-seconds of a trace: all large, all small, and as routed."""
    trace = traffic.trace
    small = prices.small.seconds(trace.prompt_tokens, trace.answer_tokens)
    big = prices.large.seconds(trace.prompt_tokens, trace.answer_tokens)
    routed = float(np.where(large, big, small).sum())
    return {
        "all large": round(float(big.sum()), 3),
        "all small": round(float(small.sum()), 3),
        "routed": round(routed, 3),
        "saved against all large": round(1 - routed / float(big.sum()), 4),
    }


def quality(
    rows: Heldout,
    question: npt.NDArray[np.int64],
    large: npt.NDArray[np.bool_],
    draws: npt.NDArray[np.int32],
) -> dict[str, Any]:
    """Mean score as routed and at either model alone, and the share of the difference that is kept.

    Args:
        rows: The questions.
        question: Which of them each request asks.
        large: Which requests went to the large model.
        draws: Bootstrap weights of the questions.
    """
    asked = np.bincount(question, minlength=len(rows)).astype(np.float64)
    sent = np.bincount(question, large, minlength=len(rows))
    gain = rows.strong - rows.weak
    weights = np.concatenate([np.ones((1, len(rows))), draws.astype(np.float64)])
    total = weights @ asked
    small = weights @ (asked * rows.weak) / total
    lifted = weights @ (sent * gain) / total
    gap = weights @ (asked * gain) / total
    share = weights @ sent / total
    kept = lifted / gap
    return {
        "score": rounded(small + lifted),
        "score all small": rounded(small),
        "score all large": rounded(small + gap),
        "kept": rounded(kept),
        "kept minus share": rounded(kept - share),
    }


def over_time(at_s: Floats, values: npt.NDArray[Any], width_s: float) -> list[list[float]]:
    """Mean of values in windows: middle of each in seconds, mean, how many values."""
    window = (at_s // width_s).astype(np.int64)
    found = []
    for number in np.unique(window):
        inside = values[window == number]
        middle_s = round((int(number) + 0.5) * width_s, 1)
        found.append([middle_s, round(float(inside.mean()), 4), len(inside)])
    return found


def measure(
    traffic: Traffic, rows: Heldout, found: Outcome, prices: Mapping[str, Prices], rounds: int
) -> dict[str, Any]:
    """All figures of one setting."""
    at_s, large = traffic.trace.at_s, found.large
    target = float(np.nanmean(found.wanted)) if np.isfinite(found.wanted).any() else None
    return {
        "large share": round(float(large.mean()), 4),
        "target share": None if target is None else round(target, 4),
        "large share by department": {
            name: round(float(large[traffic.department == number].mean()), 4)
            for number, name in enumerate(DEPARTMENTS)
        },
        "changes of model within conversations": changes(traffic.conversation, large),
        "gpu seconds": {name: spent(traffic, large, one) for name, one in prices.items()},
        **quality(rows, traffic.question, large, metrics.resamples(len(rows), rounds, SEED)),
        "large share over time": over_time(at_s, large, WIDTH_S),
        "target share over time": over_time(at_s, found.wanted, WIDTH_S)
        if target is not None
        else None,
    }


def changes(conversation: npt.NDArray[np.int64], large: npt.NDArray[np.bool_]) -> float:
    """Share of follow-up requests that got another model than the request before."""
    last: dict[int, bool] = {}
    follow_ups = changed = 0
    for key, value in zip(conversation.tolist(), large.tolist(), strict=True):
        if key in last:
            follow_ups += 1
            changed += last[key] != value
        last[key] = value
    return round(changed / follow_ups, 4) if follow_ups else 0.0


def simulate(
    folder: Path,
    rows: Heldout,
    names: Sequence[str],
    settings: Mapping[str, Setting],
    rounds: int,
    reference: Sequence[float] = (),
) -> dict[str, Any]:
    """Every trace under every setting; the router begins with the quantiles ``reference``."""
    prices = {"metered": metered(), "parameters": PARAMETERS}
    found: dict[str, Any] = {}
    for name in names:
        traffic = draw(read_trace(folder, name), len(rows), SEED)
        found[name] = {"requests": len(traffic.trace), "settings": {}}
        for title, setting in settings.items():
            large, wanted = asyncio.run(
                online.play(traffic, rows.gain, setting, PARAMETERS, reference)
            )
            outcome = Outcome(large, wanted)
            found[name]["settings"][title] = measure(traffic, rows, outcome, prices, rounds)
    return found


def main() -> int:
    """Simulate, print one line per setting, and keep figures and picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing.savings")
    parser.add_argument("--data", type=Path, required=True, help="folder of the traces")
    parser.add_argument("--outcomes", type=Path, default=heldout.HELDOUT, help="see heldout.py")
    parser.add_argument("--rounds", type=int, default=1_000, help="bootstrap rounds")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows = heldout.load("test", PAIR, given.outcomes)
    facts = heldout.facts(given.outcomes)
    reference = facts.pop("reference", ())
    found = simulate(given.data, rows, TRACES, SETTINGS, given.rounds, reference)
    given.out.mkdir(parents=True, exist_ok=True)
    report = {
        "what": "GPU time saved by routing, and quality kept, on public traces",
        "method": (__doc__ or "").strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": SEED,
        "rounds": given.rounds,
        "drawn": {
            "departments": dict(zip(DEPARTMENTS, SHARES, strict=True)),
            "follow-ups": FOLLOWS,
            "open conversations": OPEN,
        },
        "prices": {"metered": metered().basis, "parameters": PARAMETERS.basis},
        "pair": PAIR,
        "scores": facts,
        "settings": {name: setting.described() for name, setting in SETTINGS.items()},
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "pyarrow", "gatehouse")},
        "traces": found,
    }
    (given.out / "savings.json").write_text(json.dumps(report, indent=1) + "\n")
    from benchmarks.routing.savings_picture import draw as picture

    picture(report, given.out / "savings.png")
    for trace, one in found.items():
        for title, cell in one["settings"].items():
            print(f"{trace}, {title}: {shown(cell)}")
    return 0


def shown(cell: Mapping[str, Any]) -> str:
    """One setting in one line."""
    kept, worth = cell["kept"], cell["kept minus share"]
    saved = {k: v["saved against all large"] for k, v in cell["gpu seconds"].items()}
    return (
        f"{cell['large share']:.1%} large; saves {saved['parameters']:.1%} of GPU time by "
        f"parameters, {saved['metered']:.1%} as metered locally; keeps {kept['value']:.1%} "
        f"[{kept['low']:.1%}, {kept['high']:.1%}] of the gain, {worth['value']:+.1%} "
        f"[{worth['low']:+.1%}, {worth['high']:+.1%}] against chance"
    )


if __name__ == "__main__":
    sys.exit(main())
