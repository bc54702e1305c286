"""A conversation keeps its model, unless its prompts say clearly otherwise."""

from __future__ import annotations

import pytest

from routing.cards import Hysteresis
from routing.conversations import Conversations
from routing.recent import EVERYTHING, NOTHING, Cut

CUT = Cut(200, 1.0)


class Talk:
    def __init__(self, margin_milli: int = 30, conversations: int = 10) -> None:
        config = Hysteresis(margin_milli=margin_milli, idle_s=100, conversations=conversations)
        self.memory = Conversations(config)
        self.now_s = 0.0

    def turn(self, gain: int, key: str = "a", cut: Cut = CUT, draw: float = 0.5) -> bool:
        stay = self.memory.judge(key, gain, cut, draw, self.now_s)
        assert stay.kept == (stay.large != cut.admits(gain, draw)) or not stay.kept
        self.memory.remember(key, stay, self.now_s)
        return stay.large


@pytest.mark.parametrize(
    ("gains", "large"),
    [
        ([200, 171, 229, 171, 171], [True] * 5),
        ([199, 229, 171, 229], [False] * 4),
        ([199, 230], [False, True]),
        ([300, 169, 170, 169, 170], [True] * 5),
        ([300, 169, 169, 229], [True, True, False, False]),
        ([300, 0, 300, 0, 300], [True] * 5),
    ],
)
def test_turns(gains: list[int], large: list[bool]) -> None:
    talk = Talk()
    assert [talk.turn(gain) for gain in gains] == large


def test_kept_is_said_only_where_the_prompt_alone_would_have_gone_elsewhere() -> None:
    talk = Talk()
    talk.turn(300)
    assert talk.memory.judge("a", 190, CUT, 0.5, 0.0).kept
    assert not talk.memory.judge("a", 210, CUT, 0.5, 0.0).kept
    talk.turn(100, "b")
    assert talk.memory.judge("b", 210, CUT, 0.5, 0.0).kept
    assert not talk.memory.judge("b", 230, CUT, 0.5, 0.0).kept


def test_judging_remembers_nothing() -> None:
    talk = Talk()
    talk.memory.judge("a", 300, CUT, 0.5, 0.0)
    assert len(talk.memory) == 0


def test_the_ends_of_a_target_reach_conversations_too() -> None:
    talk = Talk()
    assert [talk.turn(1000, cut=cut) for cut in (CUT, CUT)] == [True, True]
    assert [talk.turn(900, cut=NOTHING) for _ in range(2)] == [True, False]
    assert talk.turn(-900, cut=EVERYTHING)


def test_without_margin_ties_are_drawn_in_conversations_too() -> None:
    talk = Talk(margin_milli=0)
    half = Cut(200, 0.5)
    assert [talk.turn(200, cut=half, draw=draw) for draw in (0.9, 0.6, 0.4)] == [
        False, False, True,
    ]  # fmt: skip
    assert [talk.turn(200, cut=half, draw=0.9) for _ in range(2)] == [True, False]


def test_a_silent_conversation_is_forgotten() -> None:
    talk = Talk()
    talk.turn(300)
    talk.now_s = 100.0
    assert talk.turn(180)
    talk.now_s = 201.0
    assert not talk.turn(180)


def test_a_clock_that_goes_back_forgets_nobody_and_grows_nothing() -> None:
    talk = Talk()
    talk.now_s = 1e6
    talk.turn(300)
    talk.now_s = 5.0
    assert talk.turn(180)
    for number in range(100):
        talk.turn(300, f"k{number}")
    assert len(talk.memory) == 10


def test_memory_is_bounded_and_shrinks_with_silence() -> None:
    talk = Talk(conversations=50)
    for number in range(500):
        talk.turn(300, f"k{number}")
    assert len(talk.memory) == 50
    talk.now_s = 1000.0
    for _ in range(30):
        talk.turn(300, "one")
    assert len(talk.memory) == 1


def test_no_key_and_no_room_remember_nothing() -> None:
    talk = Talk()
    assert [talk.turn(300, ""), talk.turn(180, "")] == [True, False]
    off = Talk(conversations=0)
    assert [off.turn(300), off.turn(180)] == [True, False]
    assert len(talk.memory) == len(off.memory) == 0
