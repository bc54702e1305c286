"""The choice behind ``auto``: what it rests on, and that there always is one."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from routing.auto import AutoAsk, AutoChoice, AutoRouter, Candidate
from routing.cards import Cascade, Hysteresis, ModelCard, RoutingConfig, Target
from routing.departments import MAX_DEPARTMENTS
from routing.need import Need
from routing.reasons import Reason
from routing.types import ModelLoad, Score, ScorerUnavailable

PLAIN = Need(prompt_tokens_estimate=100, answer_tokens=0)
IDLE = ModelLoad(replicas=1, slots=8)
DOWN = ModelLoad()
FULL = ModelLoad(replicas=1, slots=8, in_flight=8)
SMALL = Candidate("small", "small", 4096, IDLE)
LARGE = Candidate("large", "large", 8192, IDLE)
ADAPTER = Candidate("small-hr", "small", 4096, IDLE)
CARDS = (ModelCard(id="small"), ModelCard(id="large"))
REFERENCE = [i / 100 for i in range(101)]
"""Every gain from 0 to 1 is equally likely: a share of 0.3 cuts at 0.7."""


def share(value: float) -> tuple[Target, ...]:
    return (Target(departments=("*",), large_share=value),)


@dataclass
class World:
    """A router with a scorer that says what it is told."""

    config: RoutingConfig = RoutingConfig(targets=share(0.3))  # noqa: RUF009
    cards: tuple[ModelCard, ...] = CARDS
    gain: float = 0.5
    error: BaseException | None = None
    now_s: float = 0.0
    takes_s: float = 0.0
    asked: list[str] = field(default_factory=list)
    number: int = 0

    def __post_init__(self) -> None:
        self.router = AutoRouter(self.cards, self.config, self, REFERENCE, lambda: self.now_s)

    async def score(self, prompt: str) -> Score:
        self.asked.append(prompt)
        self.now_s += self.takes_s
        if self.error is not None:
            raise self.error
        return Score(self.gain, 0.4, 0.4 + self.gain, 0.8, 3, 0.9, "0123456789ab")

    def ask(self, **fields: Any) -> AutoAsk:
        self.number += 1
        given: dict[str, Any] = {
            "text": "text",
            "need": PLAIN,
            "candidates": (SMALL, LARGE),
            "department": "hr",
            "conversation": "",
            "request_id": f"r{self.number}",
            "pressure_milli": 0,
            "priority_class": "standard",
        }
        return AutoAsk(**{**given, **fields})

    async def choose(self, gain: float | None = None, **fields: Any) -> AutoChoice:
        self.gain = self.gain if gain is None else gain
        return await self.router.choose(self.ask(**fields))


async def test_the_record_says_what_a_choice_rests_on() -> None:
    world = World(takes_s=0.012345)
    choice = await world.choose(0.5, pressure_milli=900)
    assert choice.model_id == "small"
    assert choice.reason == "auto:small gain below threshold"
    assert (choice.fallbacks, choice.draft) == (("large",), None)
    assert choice.detail == {
        "gain_milli": 500,
        "threshold_milli": 700,
        "aimed_milli": 300,
        "weak_milli": 400,
        "strong_milli": 900,
        "trust_milli": 800,
        "similarity_milli": 900,
        "cluster": 3,
        "scorer": "0123456789ab",
        "score_us": 12345,
        "pressure_milli": 900,
        "target": "large_share=0.300",
        "tier": "small",
        "wanted_tier": "small",
    }
    above = await world.choose(0.9)
    assert (above.model_id, above.reason) == ("large", "auto:large gain above threshold")
    assert above.fallbacks == ("small",)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ScorerUnavailable("late"), Reason.DEFAULT_LATE),
        (ScorerUnavailable("unreachable"), Reason.DEFAULT_UNREACHABLE),
        (ScorerUnavailable("failed"), Reason.DEFAULT_FAILED),
        (ScorerUnavailable("a text from elsewhere"), Reason.DEFAULT_FAILED),
        (ValueError("broken"), Reason.DEFAULT_FAILED),
        (TimeoutError(), Reason.DEFAULT_LATE),
    ],
)
@pytest.mark.parametrize("tier", ["small", "large"])
async def test_without_a_score_the_default_tier_answers(
    tier: str, error: Exception, reason: Reason
) -> None:
    config = RoutingConfig.model_validate({"default_tier": tier})
    world = World(config, error=error)
    choice = await world.choose()
    assert choice.reason == f"auto:{tier} {reason.value}"
    assert choice.model_id == tier
    assert choice.detail["default"] == reason.value
    assert "gain_milli" not in choice.detail
    (found,) = world.router.achieved()
    assert (found.requests, found.free) == (1, 0)


@pytest.mark.parametrize("gain", [math.nan, math.inf, -math.inf])
async def test_a_score_that_is_no_number_is_none(gain: float) -> None:
    choice = await World().choose(gain)
    assert choice.detail["default"] == "default scorer failed"


async def test_numbers_beside_the_gain_may_be_anything() -> None:
    world = World()

    async def odd(prompt: str) -> Score:
        return Score(7.0, math.nan, math.inf, -9.0, 1, math.nan, "x")

    world.score = odd  # type: ignore[method-assign]
    choice = await world.choose()
    assert choice.model_id == "large"
    assert choice.detail["gain_milli"] == 1000
    assert choice.detail["weak_milli"] == choice.detail["strong_milli"] == 0
    assert choice.detail["trust_milli"] == -1000


async def test_a_scorer_that_keeps_to_no_time_is_left_alone() -> None:
    world = World(RoutingConfig(score_timeout_ms=1))

    async def never(prompt: str) -> Score:
        await asyncio.sleep(60)
        raise AssertionError

    world.score = never  # type: ignore[method-assign]
    choice = await world.choose()
    assert choice.reason == "auto:small default scorer late"


async def test_who_hangs_up_while_a_score_is_waited_for_leaves_no_trace() -> None:
    world = World(error=asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        await world.choose()
    assert world.router.achieved() == ()


# -- what fits --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "need", "reason"),
    [
        ({"tools": False}, {"tools": True}, "capability tools"),
        ({"json_mode": False}, {"json_mode": True}, "capability json"),
        ({"context_tokens": 120}, {"answer_tokens": 21}, "capability context"),
        ({}, {"prompt_tokens_estimate": 5000}, "capability context"),
        ({"languages": ("en",)}, {"language": "pl"}, "capability language"),
        ({"data_classes": ("public",)}, {"data_class": "restricted"}, "capability data_class"),
    ],
)
async def test_what_only_one_tier_can_do_goes_there_without_a_score(
    card: dict[str, Any], need: dict[str, Any], reason: str
) -> None:
    world = World(cards=(ModelCard(id="small", **card), ModelCard(id="large")))
    choice = await world.choose(need=replace(PLAIN, **need))
    assert (choice.model_id, choice.reason) == ("large", f"auto:large {reason}")
    assert choice.fallbacks == ()
    assert world.asked == []


async def test_the_language_is_found_in_the_text() -> None:
    world = World(cards=(ModelCard(id="small", languages=("en",)), ModelCard(id="large")))
    choice = await world.choose(0.1, text="Napisz krótki wiersz o jesieni w Warszawie.")
    assert choice.reason == "auto:large capability language"
    assert choice.detail["language"] == "pl"
    choice = await world.choose(
        0.1, text="Who wrote the poem about autumn in Warsaw, and when was that?"
    )
    assert (choice.model_id, choice.detail["language"]) == ("small", "en")
    choice = await world.choose(0.1, text="ok")
    assert choice.model_id == "small"
    assert "language" not in choice.detail


async def test_where_nothing_fits_the_least_is_missing() -> None:
    cards = (
        ModelCard(id="small", tools=False, languages=("en",)),
        ModelCard(id="large", languages=("en", "de")),
    )
    world = World(cards=cards)
    polish = replace(PLAIN, language="pl")
    weak = await world.choose(0.1, need=polish)
    assert (weak.model_id, weak.detail["lacks"]) == ("small", "language")
    tools = await world.choose(0.1, need=replace(polish, tools=True))
    assert (tools.model_id, tools.fallbacks, tools.detail["lacks"]) == ("large", (), "language")
    huge = await world.choose(0.1, need=replace(PLAIN, prompt_tokens_estimate=10**9))
    assert huge.detail["lacks"] == "context"


async def test_a_longer_context_is_no_reason_where_neither_is_long_enough() -> None:
    choice = await World().choose(need=replace(PLAIN, prompt_tokens_estimate=5000))
    assert choice.model_id == "large"


async def test_one_tier_is_no_choice() -> None:
    world = World()
    for candidate in (SMALL, LARGE):
        choice = await world.choose(candidates=(candidate,))
        assert choice.reason == f"auto:{candidate.tier} only tier permitted"
    assert world.asked == []


async def test_a_model_without_a_card_is_chosen_only_where_none_has_one() -> None:
    world = World()
    choice = await world.choose(0.1, candidates=(ADAPTER, SMALL, LARGE))
    assert (choice.model_id, choice.fallbacks) == ("small", ("large",))
    choice = await world.choose(candidates=(ADAPTER,))
    assert (choice.model_id, choice.reason) == (
        "small-hr", "auto:small only models without card",
    )  # fmt: skip


async def test_no_candidate_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="no model is permitted"):
        await World().choose(candidates=())


# -- targets and budget -----------------------------------------------------------------------


async def test_targets_of_nothing_and_of_everything_need_no_score() -> None:
    never, always = World(RoutingConfig(targets=share(0))), World(RoutingConfig(targets=share(1)))
    assert (await never.choose()).reason == "auto:small target never large"
    assert (await always.choose()).reason == "auto:large target always large"
    assert never.asked == always.asked == []
    # A small model that only is busy is not replaced where the target has no room; a dead one is.
    busy = (replace(SMALL, load=FULL), LARGE)
    assert (await never.choose(candidates=busy)).model_id == "small"
    dead = (replace(SMALL, load=DOWN), LARGE)
    assert (await never.choose(candidates=dead)).reason == "auto:large other tier down"


async def test_the_budget_takes_the_large_tier_away() -> None:
    world = World(RoutingConfig(targets=share(0.5)))
    for pressure, reason in (
        (1100, "auto:large gain above threshold"),
        (1550, "auto:small budget ahead of pace"),
        (2000, "auto:small budget ahead of pace"),
        (10**12, "auto:small budget ahead of pace"),
        (-5, "auto:large gain above threshold"),
    ):
        choice = await world.choose(0.6, pressure_milli=pressure)
        assert choice.reason == reason
    assert len(world.asked) == 3
    always = World(RoutingConfig(targets=share(1)))
    assert (await always.choose(0.9, pressure_milli=1200)).model_id == "large"
    assert (await always.choose(0.01, pressure_milli=1900)).model_id == "small"


async def test_a_department_cannot_move_the_threshold_of_another() -> None:
    world = World()
    for _ in range(1000):
        await world.choose(1.0, department="mallory")
    quiet = await world.choose(0.71, department="alice")
    assert (quiet.model_id, quiet.detail["threshold_milli"]) == ("large", 700)
    loud = await world.choose(0.71, department="mallory")
    assert loud.model_id == "small"
    assert {each.department for each in world.router.achieved()} == {"mallory", "alice"}


async def test_memory_is_bounded_by_departments_and_conversations() -> None:
    config = RoutingConfig(hysteresis=Hysteresis(conversations=5))
    world = World(config)
    for number in range(2 * MAX_DEPARTMENTS):
        await world.choose(0.5, department=f"d{number}")
    assert len(world.router.achieved()) == MAX_DEPARTMENTS
    for number in range(100):
        await world.choose(0.5, department="one", conversation=f"c{number}")
    assert len(world.router._departments.peek("one").conversations) == 5


async def test_equal_gains_are_parted_by_request_and_repeatably() -> None:
    world, again = World(), World()
    first = [(await world.choose(0.25)).model_id for _ in range(3000)]
    assert first == [(await again.choose(0.25)).model_id for _ in range(3000)]
    assert first[1000:].count("large") / 2000 == pytest.approx(0.3, abs=0.03)
    tied = await world.choose(0.25)
    assert tied.detail["threshold_milli"] == 250
    assert 200 <= int(tied.detail["tie_milli"] or 0) <= 400


async def test_what_was_achieved_is_reported() -> None:
    world = World()
    assert world.router.achieved() == ()
    for number in range(3000):
        await world.choose(number % 100 / 100)
    for _ in range(100):
        await world.choose(0.9, candidates=(LARGE,))
    (found,) = world.router.achieved()
    assert (found.department, found.target) == ("hr", "large_share=0.300")
    assert (found.requests, found.free, found.aimed_milli) == (2048, 1948, 300)
    assert found.free_large_milli == pytest.approx(300, abs=20)
    assert found.large_milli > found.free_large_milli


async def test_what_load_decided_is_not_made_up_for() -> None:
    world = World()
    down = (SMALL, replace(LARGE, load=DOWN))
    for _ in range(2000):
        choice = await world.choose(0.9, candidates=down)
        assert choice.model_id == "small"
    after = [(await world.choose(0.9)).model_id for _ in range(400)]
    assert after.count("large") / 400 == pytest.approx(0.3, abs=0.1)


# -- conversations and load -------------------------------------------------------------------


async def test_a_conversation_stays() -> None:
    world = World()
    gains = [0.72, 0.69, 0.71, 0.66, 0.66]
    choices = [await world.choose(gain, conversation="c") for gain in gains]
    assert [choice.model_id for choice in choices] == ["large"] * 4 + ["small"]
    assert choices[1].reason == "auto:large conversation kept"
    # What load decides for one turn is not the conversation's tier.
    down = (replace(SMALL, load=DOWN), LARGE)
    assert (await world.choose(0.1, conversation="c", candidates=down)).model_id == "large"
    assert (await world.choose(0.69, conversation="c")).model_id == "small"


async def test_load_and_class_decide_last() -> None:
    world = World()
    full = (SMALL, replace(LARGE, load=FULL))
    choice = await world.choose(0.9, candidates=full)
    assert choice.reason == "auto:small other tier saturated"
    assert (choice.detail["tier"], choice.detail["wanted_tier"]) == ("small", "large")
    batch = await world.choose(0.9, candidates=full, priority_class="batch")
    assert batch.model_id == "large"
    gone = (replace(SMALL, load=DOWN), replace(LARGE, load=DOWN))
    nobody = await world.choose(0.1, candidates=gone)
    assert (nobody.model_id, nobody.fallbacks) == ("small", ("large",))
    world.error = ScorerUnavailable("late")
    late = await world.choose(candidates=(replace(SMALL, load=DOWN), LARGE))
    assert late.reason == "auto:large other tier down"
    assert late.detail["default"] == "default scorer late"


# -- cascade, explanation ---------------------------------------------------------------------


async def test_a_cascade_judges_small_answers_of_its_departments() -> None:
    cascade = Cascade(departments=("lab",), escalate_share=0.2, hold_tokens=32)
    world = World(RoutingConfig(targets=share(0.3), cascade=cascade))
    other = replace(SMALL, id="other")
    world.router._cards["other"] = ModelCard(id="other")
    choice = await world.choose(0.1, department="lab", candidates=(SMALL, other, LARGE))
    assert choice.draft is not None
    assert choice.draft.hold_tokens == 32
    assert (choice.detail["cascade"], choice.fallbacks) == (True, ("large", "other"))
    assert choice.draft.verdict("stop").reason == "empty"
    for fields in (
        {"department": "hr"},
        {"gain": 0.9},
        {"need": replace(PLAIN, tools=True)},
        {"need": replace(PLAIN, choices=2)},
        {"pressure_milli": 2000},
        {"candidates": (SMALL,)},
        {"candidates": (SMALL, replace(LARGE, load=DOWN))},
        {"candidates": (SMALL, replace(LARGE, load=FULL)), "gain": 0.9},
    ):
        given: dict[str, Any] = {"department": "lab", "gain": 0.1, **fields}
        choice = await world.choose(**given)
        assert choice.draft is None, fields
        assert "cascade" not in choice.detail
    world.error = ScorerUnavailable("late")
    assert (await world.choose(department="lab")).draft is None


async def test_an_explanation_changes_nothing() -> None:
    world, untouched = World(), World()
    for number in range(300):
        gain = number % 100 / 100
        one = await world.choose(gain, conversation=f"c{number % 7}")
        untouched.gain = gain
        ask = untouched.ask(conversation=f"c{number % 7}")
        for _ in range(3):
            told = await untouched.router.explain(ask)
        two = await untouched.router.choose(ask)
        assert one == two == told
    assert (await untouched.router.explain(world.ask(department="new"))).model_id
    assert [each.department for each in untouched.router.achieved()] == ["hr"]


async def test_a_decision_takes_under_a_hundred_microseconds() -> None:
    world = World()
    asks = [world.ask(conversation=f"c{number % 300}") for number in range(3000)]
    times = []
    for number, ask in enumerate(asks):
        world.gain = number % 97 / 97
        began_s = time.perf_counter()
        await world.router.choose(ask)
        times.append(time.perf_counter() - began_s)
    # Measured at 35 us; the rest is for a machine that does other things as well.
    assert statistics.median(times) < 200e-6


def test_every_reason_is_explained() -> None:
    assert len({reason.value for reason in Reason}) == len(Reason)
    assert all(reason.value == reason.value.strip() for reason in Reason)
