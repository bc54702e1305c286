"""Whatever order steps, stops and aborts come in, time is split exactly and never twice."""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deployments.metering.cost import CostModel
from deployments.metering.meter import StepMeter, Work

DEPTH = 3


class Engine(RuleBasedStateMachine):
    """Stands for an engine core that schedules up to three steps ahead."""

    @initialize(devices=st.integers(1, 8))
    def start(self, devices: int) -> None:
        self.meter = StepMeter(CostModel(2e-3, 1e-6, 1e-5, 1e-9, 1e-8, 1e-6), devices)
        self.devices = devices
        self.now = 1_000
        self.names = 0
        self.live: dict[str, Work] = {}
        self.every: list[Work] = []
        self.flying: deque[tuple[int, int, dict[str, Work]]] = deque()
        self.steps = 0
        self.covered: list[tuple[int, int]] = []
        self.frozen: dict[int, int] = {}

    def tick(self, ns: int) -> int:
        self.now += ns
        return self.now

    @rule(key=st.integers(0, 3), adapter=st.booleans())
    def add(self, key: int, adapter: bool) -> None:
        self.names += 1
        work = self.meter.added(f"r{self.names}", key, adapter=adapter)
        assert work.prefill_ns == work.decode_ns == 0
        self.live[f"r{self.names}"] = work
        self.every.append(work)

    @precondition(lambda self: len(self.flying) < DEPTH)
    @rule(data=st.data(), ns=st.integers(0, 10**7))
    def schedule(self, data: st.DataObject, ns: int) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.live)), unique=True)
                           if self.live else st.just([]))  # fmt: skip
        start = self.tick(ns)
        self.steps += 1
        self.meter.scheduled(
            self.steps,
            start,
            [
                (
                    name,
                    data.draw(st.integers(1, 4096)),
                    data.draw(st.integers(0, 10**6)),
                    data.draw(st.booleans()),
                )
                for name in chosen
            ],
        )
        self.flying.append((self.steps, start, {name: self.live[name] for name in chosen}))

    @precondition(lambda self: bool(self.flying))
    @rule(data=st.data(), ns=st.integers(0, 10**10))
    def update(self, data: st.DataObject, ns: int) -> None:
        step, start, inside = self.flying.popleft()
        able = sorted(name for name in inside if name in self.live)
        stopped = data.draw(st.lists(st.sampled_from(able), unique=True) if able else st.just([]))
        before = {work.row: work.prefill_ns + work.decode_ns for work in self.every}
        self.meter.updated(step, self.tick(ns), stopped)
        if inside:
            self.covered.append((start, self.now))
        for work in self.every:
            if work not in inside.values():
                assert work.prefill_ns + work.decode_ns == before[work.row]
        for name in stopped:
            assert self.live.pop(name).ended

    @precondition(lambda self: bool(self.live))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        work = self.live.pop(name)
        under_way = any(name in inside for _, _, inside in self.flying)
        self.meter.aborted([name])
        assert work.ended is not under_way

    @invariant()
    def exact(self) -> None:
        if not hasattr(self, "meter"):
            return
        meter = self.meter
        assert meter.busy_ns == meter.attributed_ns + meter.unattributed_ns
        assert meter.attributed_ns == sum(
            work.prefill_ns + work.decode_ns for work in self.every if work.key
        )
        assert meter.busy_ns == self.devices * union_ns(self.covered)
        assert meter.overrun_ns <= meter.unattributed_ns
        for work in self.every:
            spent = work.prefill_ns + work.decode_ns
            assert work.prefill_ns >= 0 <= work.decode_ns
            if not work.key:
                assert spent == 0
            if work.ended:
                assert self.frozen.setdefault(work.row, spent) == spent
        assert meter.running == len(self.live)


def union_ns(spans: list[tuple[int, int]]) -> int:
    """Length of the union of spans."""
    total, reached = 0, 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


Engine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestEngine = Engine.TestCase
