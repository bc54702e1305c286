"""Price quantiles: accuracy, change, merging, the store, and what stands in at first."""

from __future__ import annotations

from random import Random

import pytest

from governance.budget.prices import COLD, ERROR, HALF_LIFE, MIN_OBSERVATIONS, PriceBook, Sketch


def exact(values: list[int], per_cent: int) -> int:
    return sorted(values)[max(0, -(-len(values) * per_cent // 100) - 1)]


@pytest.mark.parametrize("shape", ["flat", "steep", "same"])
def test_quantiles_are_within_three_per_cent(shape: str) -> None:
    rng = Random(7)
    draw = {
        "flat": lambda: rng.randint(1_000, 900_000),
        "steep": lambda: int(rng.lognormvariate(13, 1)),
        "same": lambda: 123_456,
    }[shape]
    values = [draw() for _ in range(400)]
    sketch = Sketch()
    # Decay within so few values is undone here, so that all count alike.
    for value in values:
        sketch.add(value)
        sketch._step = 1.0
    for per_cent in (50, 99):
        assert abs(sketch.quantile(per_cent) / exact(values, per_cent) - 1) <= ERROR + 0.01


def test_it_follows_a_change() -> None:
    sketch = Sketch()
    for _ in range(5_000):
        sketch.add(1_000)
    for _ in range(20):
        sketch.add(9_000)
    assert sketch.quantile(50) == pytest.approx(1_000, rel=ERROR)
    assert sketch.quantile(99) == pytest.approx(9_000, rel=ERROR)
    for _ in range(HALF_LIFE + 20):
        sketch.add(9_000)
    assert sketch.quantile(50) == pytest.approx(9_000, rel=ERROR)


def test_it_stays_small_and_finite() -> None:
    rng, sketch = Random(1), Sketch()
    for _ in range(60_000):
        sketch.add(int(10 ** rng.uniform(-1, 20)))
    assert len(sketch._buckets) <= 700
    assert sketch._step < 2.0**41
    assert 1 <= sketch.quantile(50) <= 10**12 * (1 + 2 * ERROR)


def test_merged_and_stored_sketches_say_the_same() -> None:
    rng = Random(3)
    one, two, both = Sketch(), Sketch(), Sketch()
    for _ in range(3_000):
        a, b = rng.randint(10, 10_000), rng.randint(5_000, 80_000)
        one.add(a)
        two.add(b)
        both.add(a)
        both.add(b)
    one.merge(two)
    for per_cent in (50, 99):
        assert one.quantile(per_cent) == pytest.approx(both.quantile(per_cent), rel=0.1)
        assert Sketch.load(one.dump()).quantile(per_cent) == one.quantile(per_cent)
    assert Sketch.load(one.dump()).observations == 6_000


def test_defaults_stand_in_until_enough_is_known() -> None:
    book = PriceBook("tiny")
    assert Sketch().quantile(50) == 0
    for n in range(MIN_OBSERVATIONS):
        assert book.price().decode_p99_ns == COLD.decode_p99_ns
        book.served(500, 10, 8_000 + n, 80)
        book.sent(1024, 200)
    price = book.price()
    assert price.prefill_p50_ns == pytest.approx(50_000, rel=ERROR)
    assert price.decode_p99_ns == pytest.approx(100_000, rel=ERROR)
    assert price.prompt_tokens_per_kib_p50 == pytest.approx(200, rel=ERROR)
    assert price.observations == MIN_OBSERVATIONS


def test_nothing_served_teaches_nothing() -> None:
    book = PriceBook("tiny")
    book.served(0, 0, 0, 0)
    book.sent(0, 5)
    book.sent(5, 0)
    assert book.price().observations == 0
