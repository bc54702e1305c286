"""Frames and the replay cache, over any input."""

from __future__ import annotations

from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from deployments.data_plane import frames
from deployments.data_plane.frames import FrameDecoder, FrameError, FrameType
from deployments.data_plane.replay import ReplayCache, Seen
from deployments.data_plane.ticket_form import Ticket, decode, encode

PAYLOADS = st.lists(
    st.tuples(
        st.sampled_from([FrameType.CHUNK, FrameType.ERROR, FrameType.FINISHED]),
        st.binary(max_size=300),
    ),
    max_size=8,
)


@given(PAYLOADS, st.lists(st.integers(1, 64), min_size=1, max_size=40))
def test_frames_do_not_depend_on_how_bytes_arrive(
    sent: list[tuple[FrameType, bytes]], cuts: list[int]
) -> None:
    data = b"".join(frames.frame(kind, payload) for kind, payload in sent)
    decoder = FrameDecoder(frames.GATEWAY_LIMITS)
    got: list[tuple[int, bytes]] = []
    at = turn = 0
    while at < len(data):
        step = cuts[turn % len(cuts)]
        got += decoder.feed(data[at : at + step])
        at, turn = at + step, turn + 1

    assert got == sent
    assert decoder.buffered_bytes == 0


@given(st.lists(st.binary(max_size=100), max_size=20))
def test_any_bytes_are_frames_or_an_error_and_little_is_kept(parts: list[bytes]) -> None:
    decoder = FrameDecoder(frames.HELLO_LIMITS)
    with suppress(FrameError):
        for part in parts:
            for kind, payload in decoder.feed(part):
                assert kind == FrameType.HELLO
                assert len(payload) <= frames.MAX_HELLO_BYTES
            assert decoder.buffered_bytes <= frames.MAX_HELLO_BYTES + 5


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(
    st.lists(TEXTS, min_size=9, max_size=9),
    st.integers(-(2**31), 2**31 - 1),
    st.integers(0, 2**32 - 1),
    st.none() | st.integers(1, 2**32 - 1),
    st.integers(0, 2**62),
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=32, max_size=32),
)
def test_a_ticket_has_one_form(
    texts: list[str],
    priority: int,
    max_tokens: int,
    context: int | None,
    issued: int,
    ticket_id: bytes,
    digest: bytes,
) -> None:
    one, two, three, four, five, six, seven, eight, nine = texts
    ticket = Ticket(
        one,
        two,
        three,
        four,
        five,
        six,
        seven,
        eight,
        priority,
        max_tokens,
        context,
        issued,
        ticket_id,
        digest,
        nine,
    )

    assert decode(encode(ticket)) == ticket
    assert encode(decode(encode(ticket))) == encode(ticket)


LIFE_US = 34_000_000


class Replays(RuleBasedStateMachine):
    """Whatever the clock does, no id is new twice, and memory is bounded."""

    capacity = 5

    @initialize()
    def start(self) -> None:
        self.cache = ReplayCache(self.capacity)
        self.now_us = 1_700_000_000_000_000
        self.issued: dict[bytes, int] = {}
        self.used: set[bytes] = set()

    @rule(seconds=st.floats(-50, 50))
    def move_clock(self, seconds: float) -> None:
        self.now_us += int(seconds * 1_000_000)

    @rule(name=st.integers(0, 12))
    def present(self, name: int) -> None:
        identifier = bytes([name])
        expires = self.issued.setdefault(identifier, self.now_us) + LIFE_US
        if self.now_us > expires:
            return  # the verifier refuses it before it asks the cache
        seen = self.cache.use(identifier, expires, self.now_us)
        if identifier in self.used:
            assert seen is not Seen.NEW
        if seen is Seen.NEW:
            self.used.add(identifier)

    @invariant()
    def bounded(self) -> None:
        if hasattr(self, "cache"):
            assert len(self.cache) <= self.capacity


TestReplays = Replays.TestCase
