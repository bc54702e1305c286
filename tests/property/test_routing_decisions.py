"""Whatever is asked and whatever the gains are: a choice, at the target, within bounds."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from routing.auto import AutoAsk, AutoRouter, Candidate
from routing.cards import Cascade, Hysteresis, ModelCard, RoutingConfig, Target
from routing.conversations import Conversations
from routing.need import Need, fits, severity
from routing.reasons import Reason
from routing.recent import Cut, Recent
from routing.targets import STEP, Steering
from routing.types import ModelLoad, Score, ScorerUnavailable

millis = st.integers(-1000, 1000)
shares = st.floats(0, 1)


class Scripted:
    """Says the next gain, or raises."""

    def __init__(self, gains: Sequence[float | None]) -> None:
        self._gains = iter(gains)

    async def score(self, prompt: str) -> Score:
        gain = next(self._gains)
        if gain is None:
            raise ScorerUnavailable("late")
        return Score(gain, 0.5, 0.5, 1.0, 0, 1.0, "x")


@given(
    share=shares,
    pieces=st.lists(st.tuples(millis, st.integers(-3, 3), st.integers(1, 300)), min_size=1),
    reference=st.lists(millis, max_size=5),
    draws=st.randoms(use_true_random=False),
)
def test_the_achieved_share_is_off_by_no_more_than_the_bound(
    share: float,
    pieces: list[tuple[int, int, int]],
    reference: list[int],
    draws: object,
) -> None:
    steering = Steering(Target(departments=("*",), large_share=share), reference)
    large = total = 0
    for start, slope, length in pieces:
        for number in range(length):
            gain = max(-1000, min(1000, start + slope * number))
            aim = steering.aim(0.0)
            went = aim.cut.admits(gain, draws.random())  # type: ignore[attr-defined]
            steering.saw(gain)
            steering.went(went, aim)
            large += went
            total += 1
    assert abs(large - share * total) <= (max(share, 1 - share) + STEP) / STEP + 1e-6


@given(values=st.lists(millis, min_size=1, max_size=200), share=st.floats(0.001, 0.999))
def test_a_cut_is_exact(values: list[int], share: float) -> None:
    recent = Recent(size=100)
    for value in values:
        recent.add(value)
    kept = values[-100:]
    # Sums may lag behind by a thirty-second part of the window.
    recent._added = len(values) * 100
    cut = recent.cut(share)
    mass = sum(v > cut.level for v in kept) + cut.part * sum(v == cut.level for v in kept)
    assert math.isclose(mass, share * len(kept), rel_tol=1e-9, abs_tol=1e-6)


@given(values=st.lists(millis, min_size=1, max_size=100), part=shares)
def test_a_quality_is_kept_by_the_least_share(values: list[int], part: float) -> None:
    recent = Recent()
    for value in values:
        recent.add(value)
    recent._added = 1000
    share = recent.least_share(part)
    wanted = part * sum(values)
    assert 0 <= share <= 1
    if wanted <= 0:
        assert share == 0
        return
    count, kept = share * len(values), 0.0
    for value in sorted(values, reverse=True):
        kept += value * min(1.0, max(0.0, count))
        count -= 1
    assert math.isclose(kept, wanted, rel_tol=1e-6, abs_tol=1e-9)


@given(
    first=st.booleans(),
    level=st.integers(-900, 900),
    margin=st.integers(1, 100),
    offsets=st.lists(st.floats(-1, 1), max_size=50),
)
def test_within_the_margin_a_conversation_does_not_flap(
    first: bool, level: int, margin: int, offsets: list[float]
) -> None:
    memory = Conversations(Hysteresis(margin_milli=margin, idle_s=10, conversations=3))
    cut = Cut(level, 0.5)
    gains = [level + 1 if first else level - 1]
    gains += [level + round(offset * (margin - 1)) for offset in offsets]
    tiers = []
    for number, gain in enumerate(gains):
        stay = memory.judge("c", gain, cut, 0.25, float(number))
        memory.remember("c", stay, float(number))
        tiers.append(stay.large)
    assert set(tiers) == {first}


@given(
    gains=st.lists(millis, max_size=100),
    level=st.integers(-900, 900),
    margin=st.integers(0, 100),
)
def test_a_large_conversation_is_left_after_two_clear_turns_and_never_after_one(
    gains: list[int], level: int, margin: int
) -> None:
    memory = Conversations(Hysteresis(margin_milli=margin, idle_s=10, conversations=3))
    cut, before, below = Cut(level, 1.0), False, 0
    for gain in gains:
        stay = memory.judge("c", gain, cut, 0.5, 0.0)
        memory.remember("c", stay, 0.0)
        below = below + 1 if gain < level - margin else 0
        if before and not stay.large:
            assert below >= 2
        if below >= 2:
            assert not stay.large
        before = stay.large


@given(
    steps=st.lists(
        st.tuples(st.text(max_size=2), st.floats(-1e9, 1e9), millis), min_size=1, max_size=200
    ),
    size=st.integers(0, 5),
)
def test_conversations_stay_bounded_whatever_the_clock_says(
    steps: list[tuple[str, float, int]], size: int
) -> None:
    memory = Conversations(Hysteresis(idle_s=10, conversations=size))
    for key, now_s, gain in steps:
        memory.remember(key, memory.judge(key, gain, Cut(0, 0.5), 0.5, now_s), now_s)
        assert len(memory) <= size


loads = st.builds(
    ModelLoad,
    replicas=st.integers(0, 2),
    waiting=st.integers(0, 2),
    slots=st.integers(0, 2),
    in_flight=st.integers(0, 3),
)
IDS = ("s1", "s2", "l1", "l2", "adapter")
candidates = st.lists(
    st.builds(
        lambda name, context, load: Candidate(
            name, "large" if name.startswith("l") else "small", context, load
        ),
        st.sampled_from(IDS),
        st.sampled_from([10, 1000, 100_000]),
        loads,
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda candidate: candidate.id,
).map(tuple)
cards = st.tuples(
    *(
        st.builds(
            ModelCard,
            id=st.just(name),
            context_tokens=st.sampled_from([None, 500]),
            tools=st.booleans(),
            json_mode=st.booleans(),
            languages=st.sampled_from([("*",), ("en",), ("en", "de")]),
            data_classes=st.sampled_from([("public",), ("public", "restricted")]),
        )
        for name in IDS[:4]
    )
)
needs = st.builds(
    Need,
    prompt_tokens_estimate=st.sampled_from([0, 5, 600, 10**12]),
    answer_tokens=st.sampled_from([0, 5, 600]),
    tools=st.booleans(),
    json_mode=st.booleans(),
    choices=st.integers(1, 3),
    language=st.sampled_from([None, "en", "pl"]),
    data_class=st.sampled_from([None, "public", "restricted"]),
)
asks = st.builds(
    AutoAsk,
    text=st.text(max_size=40),
    need=needs,
    candidates=candidates,
    department=st.sampled_from(["hr", "lab", ""]),
    conversation=st.sampled_from(["", "a", "b"]),
    request_id=st.text(max_size=5) | st.just("\ud800"),
    pressure_milli=st.sampled_from([-1, 0, 1000, 1500, 10**15]),
    priority_class=st.sampled_from(["critical", "standard", "batch", "?"]),
)
targets = st.one_of(
    st.builds(Target, departments=st.just(("*",)), large_share=shares),
    st.builds(Target, departments=st.just(("hr",)), quality=shares),
)


@settings(deadline=None)
@given(
    cards=cards,
    target=targets,
    steps=st.lists(st.tuples(asks, st.none() | st.floats()), min_size=1, max_size=8),
    times=st.lists(st.floats(-1e6, 1e6), min_size=1),
    tier=st.sampled_from(["small", "large"]),
)
def test_a_choice_is_total_and_names_only_what_is_permitted_and_fits(
    cards: tuple[ModelCard, ...],
    target: Target,
    steps: list[tuple[AutoAsk, float | None]],
    times: list[float],
    tier: str,
) -> None:
    config = RoutingConfig.model_validate(
        {"targets": [target], "default_tier": tier, "cascade": Cascade(departments=("*",))}
    )
    clock = iter(times * 100)
    router = AutoRouter(cards, config, Scripted([g for _, g in steps]), (), lambda: next(clock))
    by_id = {card.id: card for card in cards}
    for ask, _ in steps:
        choice = asyncio.run(router.choose(ask))
        permitted = {candidate.id: candidate for candidate in ask.candidates}
        named = [choice.model_id, *choice.fallbacks]
        assert len(set(named)) == len(named)
        assert set(named) <= set(permitted)
        model = permitted[choice.model_id]
        prefix = f"auto:{model.tier} "
        assert choice.reason.startswith(prefix)
        assert choice.reason.removeprefix(prefix) in set(Reason)
        for value in choice.detail.values():
            assert type(value) in (int, str, bool)
        if set(permitted) & set(by_id):
            need = ask.need
            lacks = {
                name: severity(fits(by_id[name], permitted[name].context_tokens, need))
                for name in permitted
                if name in by_id
            }
            if need.language is not None:
                assert {lacks[name] for name in named} == {min(lacks.values())}
            assert set(named) <= set(lacks)
        if choice.draft is not None:
            assert model.tier == "small"
            assert permitted[choice.fallbacks[0]].tier == "large"
