"""The replica choice, over any replicas, loads and keys."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from routing.affinity import AFFINITY_SLACK, DepartmentShare, choose, load, load_bound
from routing.types import ReplicaState

KEYS = st.sampled_from([f"{n:032x}" for n in range(6)])


@st.composite
def replica_sets(draw: st.DrawFn, min_size: int = 0) -> list[ReplicaState]:
    size = draw(st.integers(min_size, 8))
    return [
        ReplicaState(
            f"replica-{n}",
            running=draw(st.integers(0, 40)),
            waiting=draw(st.integers(0, 40)),
            in_flight=draw(st.integers(0, 60)),
            kv_usage_milli=draw(st.integers(0, 1000)),
            prefixes=draw(st.frozensets(KEYS, max_size=3)),
            draining=draw(st.booleans()),
        )
        for n in range(size)
    ]


SEEDS = st.integers(0, 2**32)


@given(replica_sets(), st.none() | KEYS, SEEDS)
def test_one_is_chosen_exactly_when_one_can_be(
    replicas: list[ReplicaState], key: str | None, seed: int
) -> None:
    chosen = choose(replicas, key, random.Random(seed))

    if all(replica.draining for replica in replicas):
        assert chosen is None
    else:
        assert chosen in replicas
        assert chosen is not None
        assert not chosen.draining


@given(replica_sets(2), SEEDS)
def test_the_most_loaded_is_never_chosen_without_a_key(
    replicas: list[ReplicaState], seed: int
) -> None:
    eligible = [r for r in replicas if not r.draining]
    chosen = choose(replicas, None, random.Random(seed))

    loads = sorted(map(load, eligible))
    if chosen is not None and len(eligible) > 1 and loads[-1] > loads[-2]:
        assert load(chosen) < loads[-1]


@given(replica_sets(1), KEYS, SEEDS)
def test_a_keyed_request_keeps_within_the_load_bound(
    replicas: list[ReplicaState], key: str, seed: int
) -> None:
    eligible = [r for r in replicas if not r.draining]
    chosen = choose(replicas, key, random.Random(seed))

    if chosen is not None and len(eligible) > 1:
        assert load(chosen) + 1 <= max(load_bound(eligible), AFFINITY_SLACK)
        if key not in chosen.prefixes:
            assert load(chosen) + 1 <= load_bound(eligible)


@given(replica_sets(2), KEYS, SEEDS)
def test_a_holder_within_the_bound_is_preferred(
    replicas: list[ReplicaState], key: str, seed: int
) -> None:
    eligible = [r for r in replicas if not r.draining]
    chosen = choose(replicas, key, random.Random(seed))
    if chosen is None:
        return
    bound = max(load_bound(eligible), AFFINITY_SLACK)
    holders = [r for r in eligible if key in r.prefixes and load(r) < bound]

    if holders:
        assert chosen in holders
        assert load(chosen) == min(map(load, holders))


@given(replica_sets(2), KEYS, SEEDS, SEEDS)
def test_all_gateways_rank_a_new_key_alike(
    replicas: list[ReplicaState], key: str, one: int, two: int
) -> None:
    chosen = choose(replicas, key, random.Random(one))

    assert choose(replicas[::-1], key, random.Random(two)) in (
        {chosen}
        if chosen is None or key not in chosen.prefixes
        else {r for r in replicas if key in r.prefixes}
    )


@given(st.integers(2, 8), st.text(max_size=40))
def test_a_replica_that_leaves_moves_only_its_own_keys(size: int, key: str) -> None:
    replicas = [ReplicaState(f"replica-{n}") for n in range(size)]
    rng = random.Random(0)
    before = choose(replicas, key, rng)

    for gone in replicas:
        rest = [r for r in replicas if r is not gone]
        after = choose(rest, key, rng)
        assert after == before or gone == before


def test_keys_spread_evenly() -> None:
    replicas = [ReplicaState(f"replica-{n}") for n in range(4)]
    rng = random.Random(0)
    counts = dict.fromkeys((r.replica_id for r in replicas), 0)
    for number in range(2000):
        chosen = choose(replicas, f"{number:032x}", rng)
        assert chosen
        counts[chosen.replica_id] += 1

    assert min(counts.values()) > 400


def test_two_choices_balance_better_than_one() -> None:
    rng = random.Random(11)
    in_flight = dict.fromkeys((f"replica-{n}" for n in range(20)), 0)
    for _ in range(2000):
        chosen = choose([ReplicaState(n, in_flight=c) for n, c in in_flight.items()], None, rng)
        assert chosen
        in_flight[chosen.replica_id] += 1
    blind = [0] * 20
    for _ in range(2000):
        blind[rng.randrange(20)] += 1

    assert max(in_flight.values()) <= 103
    assert max(blind) > 110


@given(
    st.integers(1, 1000),
    st.integers(1, 512),
    st.integers(0, 512),
    st.integers(0, 512),
    st.integers(0, 5),
)
def test_a_department_is_bound_only_while_others_wait(
    share_milli: int, slots: int, held: int, others: int, waiting: int
) -> None:
    admitted = DepartmentShare(share_milli).admits(
        ReplicaState("r", waiting=waiting), slots, held, others
    )

    if waiting == 0 or others == 0 or held == 0:
        assert admitted
    else:
        assert admitted == (held < max(1, slots * share_milli // 1000))
