"""Pure parts of the routing benchmarks: what they compute is what they say."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.proof import Proof
from benchmarks.routing import cascade, heldout, online, path_proofs, savings, traffic
from benchmarks.routing.heldout import Heldout
from benchmarks.routing.prices import PARAMETERS, Price, Prices, metered
from routing import artefact, metrics


def questions(size: int = 40, seed: int = 3) -> Heldout:
    rng = np.random.default_rng(seed)
    return Heldout(
        source=np.asarray(["one"] * size),
        gain=rng.random(size),
        ridge=rng.random(size),
        words=rng.random(size),
        weak=rng.integers(0, 2, size).astype(float),
        strong=rng.integers(0, 2, size).astype(float),
        weak_chars=rng.integers(1, 9_000, size).astype(float),
        options=rng.integers(0, 2, size).astype(bool),
    )


# -- held-out scores ------------------------------------------------------------------------------


@pytest.mark.parametrize("part", heldout.PARTS)
@pytest.mark.parametrize("pair", heldout.PAIRS)
def test_the_committed_scores_are_numbers_of_another_scorer_than_the_shipped_one(
    part: str, pair: str
) -> None:
    rows = heldout.load(part, pair)
    assert len(rows) > 500
    assert np.isfinite(rows.gain).all()
    assert ((rows.weak >= 0) & (rows.strong <= 1)).all()
    estimate = heldout.facts()["estimate"]
    assert estimate.startswith("sha256:")
    assert estimate != artefact.load(heldout.ARTEFACT).digest


def test_rounded_is_the_value_and_the_middle_of_its_rounds() -> None:
    found = heldout.rounded(np.asarray([0.5, *np.linspace(0, 1, 1001)]))
    assert found == {"value": 0.5, "low": 0.025, "high": 0.975}


# -- prices ---------------------------------------------------------------------------------------


def test_prices_are_fitted_to_what_was_metered(tmp_path: Path) -> None:
    asks = [[words, tokens, 0] for words in (4, 20, 80) for tokens in (4, 30, 90)]
    alone = [1_000 + 50 * words + 300 * tokens for words, tokens, _ in asks]
    sums = {"small": {"requests_us": 2_000}, "large": {"requests_us": 5_000}}
    path = tmp_path / "meter.json"
    path.write_text(
        json.dumps({"figures": {"accuracy": {"asks": asks, "alone_us": alone}, "sums": sums}})
    )
    found = metered(path)
    assert found.small.prefill_ns == pytest.approx(50_000)
    assert found.small.decode_ns == pytest.approx(300_000)
    assert found.small.request_ns == pytest.approx(1_000_000)
    assert found.ratio(100, 100) == pytest.approx(2.5)
    # A slope that noise made negative counts as nothing.
    rising = [1_000 - 5 * words + 300 * tokens for words, tokens, _ in asks]
    path.write_text(
        json.dumps({"figures": {"accuracy": {"asks": asks, "alone_us": rising}, "sums": sums}})
    )
    assert metered(path).small.prefill_ns == 0


def test_the_committed_meter_gives_prices() -> None:
    assert (
        1 < metered().ratio(1155, 211) < PARAMETERS.ratio(1155, 211) == pytest.approx(70.55 / 8.03)
    )


# -- traffic --------------------------------------------------------------------------------------


def test_traces_are_read_in_order(tmp_path: Path) -> None:
    rows = [
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:50.9951690,396,109",
        "2023-11-16 18:15:46.6805900,374,44",
    ]
    (tmp_path / "one.csv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    found = traffic.read_trace(tmp_path, "one")
    assert found.at_s == pytest.approx([0, 4.314579])
    assert found.prompt_tokens.tolist() == [374, 396]
    assert found.answer_tokens.tolist() == [44, 109]
    lines = [{"timestamp": 3000, "input_length": 5, "output_length": 6, "hash_ids": []}]
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert len(traffic.read_trace(tmp_path, "two")) == 1
    with pytest.raises(FileNotFoundError, match="no trace three"):
        traffic.read_trace(tmp_path, "three")


def trace(size: int) -> traffic.Trace:
    return traffic.Trace(
        "t", np.arange(size) * 1.0, np.full(size, 100), np.full(size, 10, dtype=np.int64)
    )


def test_what_is_drawn_depends_on_the_seed_alone_and_deals_questions_evenly() -> None:
    found = traffic.draw(trace(1_050), 100, 5)
    again, other = traffic.draw(trace(1_050), 100, 5), traffic.draw(trace(1_050), 100, 6)
    for name in ("question", "department", "conversation"):
        assert (getattr(found, name) == getattr(again, name)).all()
        assert (getattr(found, name) != getattr(other, name)).any()
    counts = np.bincount(found.question, minlength=100)
    assert set(counts.tolist()) <= {10, 11}
    for key in np.unique(found.conversation):
        members = np.flatnonzero(found.conversation == key)
        assert members[0] == key, "a conversation is named by its first request"
        assert len(set(found.department[members].tolist())) == 1


# -- savings --------------------------------------------------------------------------------------


def test_spent_adds_up() -> None:
    drawn = traffic.draw(trace(4), 4, 1)
    prices = Prices(Price(1e6, 1e7), Price(1e7, 1e8), "")
    none, every = np.zeros(4, dtype=bool), np.ones(4, dtype=bool)
    assert savings.spent(drawn, none, prices)["routed"] == pytest.approx(4 * 0.2)
    assert savings.spent(drawn, every, prices)["saved against all large"] == 0
    half = savings.spent(drawn, np.asarray([True, False, True, False]), prices)
    assert half["saved against all large"] == pytest.approx(0.45)


def test_quality_agrees_with_counting() -> None:
    rows, rng = questions(), np.random.default_rng(9)
    asked, large = rng.integers(0, len(rows), 500), rng.random(500) < 0.4
    draws = metrics.resamples(len(rows), 50, 1)
    found = savings.quality(rows, asked, large, draws)
    score = np.where(large, rows.strong[asked], rows.weak[asked]).mean()
    small, big = rows.weak[asked].mean(), rows.strong[asked].mean()
    assert found["score"]["value"] == pytest.approx(score, abs=1e-4)
    assert found["kept"]["value"] == pytest.approx((score - small) / (big - small), abs=1e-3)
    assert found["score"]["low"] <= found["score"]["value"] <= found["score"]["high"]
    everything = savings.quality(rows, asked, np.ones(500, dtype=bool), draws)
    assert everything["kept"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert everything["kept minus share"]["value"] == 0


def test_windows_over_time_and_changes() -> None:
    at_s, values = np.asarray([0.0, 1, 10, 25]), np.asarray([1, 0, 1, 1])
    assert savings.over_time(at_s, values, 10) == [
        [5, 0.5, 2],
        [15, 1.0, 1],
        [25, 1.0, 1],
    ]
    assert savings.changes(np.asarray([1, 1, 2, 1, 2]), np.asarray([0, 1, 0, 1, 0])) == 0.3333
    assert savings.changes(np.asarray([1, 2]), np.asarray([0, 1])) == 0


# -- cascade --------------------------------------------------------------------------------------


def test_lines_agree_with_the_metric_they_are_drawn_from() -> None:
    rows = questions()
    score = np.round(rows.gain, 1)
    draws = metrics.resamples(len(rows), 3, 1)
    found = cascade.lines(score, rows, draws, cascade.SHARES)
    curve = metrics.curve(score, rows.weak, rows.strong)
    assert found[0] == pytest.approx([curve.at(share) for share in cascade.SHARES])
    picked = np.repeat(np.arange(len(rows)), draws[0])
    again = metrics.curve(score[picked], rows.weak[picked], rows.strong[picked])
    assert found[1] == pytest.approx([again.at(share) for share in cascade.SHARES])


@pytest.mark.parametrize(("budget", "ratio"), [(0.3, 8.0), (0.9, 1.5), (1.0, 4.0)])
def test_equal_cost_is_equal(budget: float, ratio: float) -> None:
    routed = cascade.share_at(budget, ratio, cascade=False)
    escalated = cascade.share_at(budget, ratio, cascade=True)
    assert 1 + routed * (ratio - 1) == pytest.approx(budget * ratio)
    assert 1 + escalated * ratio == pytest.approx(budget * ratio)
    assert escalated < routed <= 1


def test_folds_do_not_see_their_own_outcomes() -> None:
    rows = questions(400)
    found = cascade.crossfitted(rows, 1)
    # Outcomes are coin flips here: what is learned from the others cannot tell them.
    assert abs(np.corrcoef(found, rows.strong - rows.weak)[0, 1]) < 0.2
    assert np.allclose(found, cascade.crossfitted(rows, 1))


# -- online ---------------------------------------------------------------------------------------


def played(size: int, setting: online.Setting) -> tuple[traffic.Traffic, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    drawn = traffic.draw(trace(size), 50, 1)
    gains = rng.normal(0.2, 0.1, 50)
    large, wanted = asyncio.run(online.play(drawn, gains, setting, PARAMETERS))
    return drawn, large, wanted


def test_a_trace_is_routed_by_the_recorded_gains_at_the_share_asked_for() -> None:
    drawn, large, wanted = played(3_000, online.Setting(large_share=0.3))
    assert large.mean() == pytest.approx(0.3, abs=0.02)
    assert (wanted == 0.3).all()
    rng = np.random.default_rng(2)
    gains = rng.normal(0.2, 0.1, 50)[drawn.question]
    assert gains[large].mean() > gains[~large].mean() + 0.1
    again = played(3_000, online.Setting(large_share=0.3))[1]
    assert (large == again).all()


def test_a_small_budget_lowers_the_share_and_is_not_passed_by_much() -> None:
    setting = online.Setting(large_share=0.9, budget=0.4)
    drawn, large, wanted = played(3_000, setting)
    assert wanted.min() < 0.5
    spent = savings.spent(drawn, large, PARAMETERS)
    assert spent["routed"] / spent["all large"] < 0.65
    assert np.isnan(played(100, online.Setting(quality=0.5))[2]).all()


# -- proofs through the request path --------------------------------------------------------------


def test_proofs_of_the_path_print_a_line_each_and_hold(capsys: pytest.CaptureFixture[str]) -> None:
    proof = Proof()
    for name in ("fallback", "cascade"):
        path_proofs.PARTS[name](proof, {})
    assert [result.holds for result in proof.results] == [True] * 3
    assert len(capsys.readouterr().out.splitlines()) == 3
