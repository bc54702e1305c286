"""Shadow traffic: it compares, it is on record, and no user's request ever notices it."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.routing.scoring import BUILT_IN
from deployments.routing.shadow import encoder_similarity
from governance import dispatching, shadow, shadow_exchange
from governance.audit.content import open_cell, unpack_cell
from governance.audit.frames import FrameType
from governance.audit.keystore import FileKeystore, KeyScope
from governance.audit.record import check_record
from governance.audit.segments import read_records, read_segment, segment_files
from governance.audit.turns import TurnAudit
from governance.errors import (
    AuditUnavailable,
    BudgetExhausted,
    ContextLengthExceeded,
    EngineFailed,
    EngineUnavailable,
    GatehouseError,
    NoAccount,
)
from governance.nulls import NullHold, NullLedger
from governance.shadow import ShadowRunner, idle
from governance.shadow_exchange import answer_text
from governance.shadow_tap import ShadowTap
from governance.types import (
    Amount,
    BudgetAsk,
    Decision,
    Effect,
    InferenceRequest,
    Inspection,
    Limits,
    ModelInfo,
    Operation,
    Outcome,
    Principal,
    Reservation,
    Route,
    Stop,
    Turn,
    Usage,
)
from routing.artefact import ArtefactError
from routing.types import ModelLoad
from tests.doubles import RecordingAudit, ScriptedEngine, principal, sse
from tests.unit.audit_kit import now_us, open_writer, without_syncs

GENERATE = frozenset({Operation.CHAT, Operation.COMPLETIONS})
SMALL = ModelInfo("small", "small", GENERATE, 512, "small")
LARGE = ModelInfo("large", "large", GENERATE, 1024, "large-base")
SECRET = "the-secret-of-the-prompt"
IDLE = ModelLoad(replicas=1, slots=256)


class Policy:
    """Allows, or says what it is told to."""

    digest = "d" * 64

    def __init__(self) -> None:
        self.effect = Effect.ALLOW
        self.asked: list[tuple[Principal, ModelInfo, str, Inspection | None]] = []

    def visible(self, who: Principal, model: ModelInfo) -> bool:
        return True

    def decide(
        self,
        who: Principal,
        model: ModelInfo,
        operation: str,
        inspection: Inspection | None = None,
    ) -> Decision:
        self.asked.append((who, model, operation, inspection))
        return Decision(self.effect, ("staff",), self.digest, Limits(max_tokens=40), "critical")


class Hold(NullHold):
    def __init__(self, account: str, left: int) -> None:
        super().__init__(Reservation("res-1", account, Amount(5, 5)))
        self.left = left
        self.settled: list[tuple[Usage | None, int | None]] = []

    def consumed(self, tokens: int, gpu_us: int) -> bool:
        return True

    async def extend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise BudgetExhausted()

    def settle(self, usage: Usage | None, gpu_us: int | None) -> None:
        self.settled.append((usage, gpu_us))


class Ledger(NullLedger):
    def __init__(self) -> None:
        self.asks: list[BudgetAsk] = []
        self.holds: list[Hold] = []
        self.refuse: GatehouseError | None = None
        self.left = 1000

    async def reserve(self, ask: BudgetAsk) -> Hold:
        self.asks.append(ask)
        if self.refuse:
            raise self.refuse
        self.holds.append(Hold(ask.account, self.left))
        return self.holds[-1]


class Engine(ScriptedEngine):
    """An engine whose load is what the test says."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.busy: Callable[[], ModelLoad] = lambda: IDLE

    def load(self, base_model: str) -> ModelLoad:
        assert base_model == "large-base"
        return self.busy()


class Log:
    def __init__(self) -> None:
        self.events: list[Mapping[str, Any]] = []
        self.refuse: Exception | None = None

    async def shadow(self, event: Mapping[str, Any]) -> None:
        await asyncio.sleep(0)
        if self.refuse:
            raise self.refuse
        self.events.append(event)


def request(text: str = SECRET, **more: Any) -> InferenceRequest:
    body = {"messages": [{"role": "user", "content": text}], **more}
    return InferenceRequest(Operation.CHAT, "auto", body, True, False, None, 1, 64)


def ended(number: int = 1, **more: Any) -> Turn:
    """A turn that the small model answered for ``auto``."""
    values: dict[str, Any] = {
        "principal": principal(),
        "request": request(),
        "route": Route(
            SMALL,
            "auto:small gain below threshold",
            True,
            (LARGE,),
            detail={"gain_milli": 120, "threshold_milli": 150},
        ),
        "decided_event_id": f"event-of-{number}",
        "usage": Usage(3, 2),
        "outcome": Outcome.COMPLETED,
        "status": 200,
        **more,
    }
    return Turn(f"req_{number}", f"dec_{number}", 1, Operation.CHAT, **values)


def said(text: str) -> bytes:
    """A small answer, as it was released."""
    return sse({"choices": [{"index": 0, "delta": {"content": text}}]})


class Rig:
    def __init__(self, engine: Engine | None = None, **more: Any) -> None:
        self.engine = engine or Engine(("Good", " morning"))
        self.policy, self.ledger, self.log = Policy(), Ledger(), Log()
        self.audit: Any = more.pop("audit", None) or RecordingAudit()
        self.now_s = 1000.0
        values: dict[str, Any] = {
            "share_milli": 1000,
            "account": "platform",
            "max_per_minute": 100,
            "max_answer_tokens": 64,
            "policy": self.policy,
            "ledger": self.ledger,
            "audit": self.audit,
            "shadow_log": self.log,
            "engine": self.engine,
            "clock": now_us,
            "monotonic": lambda: self.now_s,
            **more,
        }
        self.runner = ShadowRunner(**values)
        self.stats = self.runner.stats

    @property
    def detail(self) -> dict[str, Any]:
        (event,) = self.log.events
        found: dict[str, Any] = json.loads(event["detail"])["shadow"]
        return found

    async def settled(self, count: int) -> None:
        """Wait until so many sampled offers were compared or dropped."""
        await until(lambda: self.stats.compared + self.stats.dropped.total() >= count)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@asynccontextmanager
async def running(rig: Rig) -> AsyncGenerator[Rig, None]:
    rig.runner.start()
    try:
        yield rig
    finally:
        await rig.runner.close()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "POLL_S", 0.001)


# -- one comparison -------------------------------------------------------------------------------


async def test_a_small_answer_is_compared_with_the_large_one() -> None:
    async with running(Rig()) as rig:
        rig.runner.offer(ended(), said("good morning!"))
        await rig.settled(1)
    (event,) = rig.log.events
    assert rig.detail == {
        "agreement_milli": 1000,
        "method": "exact",
        "small_model": "small",
        "large_model": "large",
        "small_tokens": 2,
        "large_tokens": 2,
        "gain_milli": 120,
        "threshold_milli": 150,
        "run_request_id": "req_1-shadow",
    }
    assert event["event_type"] == "route.shadow"
    assert event["request_id"] == "req_1"
    assert event["parent_event_id"] == "event-of-1"
    assert (event["department"], event["budget_account"]) == ("hr", "platform")
    assert (event["gpu_us"], event["gpu_us_method"]) == (3000, "step_split")
    assert (rig.stats.compared, rig.stats.agreement_milli) == (1, 1000)


async def test_the_run_is_a_request_of_its_own_in_the_books() -> None:
    async with running(Rig()) as rig:
        rig.runner.offer(ended(), said("no"))
        await rig.settled(1)
    assert rig.audit.kinds == ["decided", "completed"]
    turn = rig.audit.entries[-1][1]
    assert turn.request_id == "req_1-shadow"
    assert turn.principal == principal()
    assert (turn.outcome, turn.status) == (Outcome.COMPLETED, 200)
    assert turn.route == Route(LARGE, "shadow")
    assert turn.decision.priority_class == "batch"
    assert turn.sent_bytes == 0, "nothing was released to anybody"
    assert rig.audit.outputs["req_1-shadow"].count(b"data: ") == 2
    (ask,) = rig.ledger.asks
    assert (ask.account, ask.model, ask.max_tokens) == ("platform", "large", 40)
    (hold,) = rig.ledger.holds
    assert hold.settled == [(Usage(3, 2), 3000)]


async def test_the_engine_serves_it_after_everybody_else_and_apart_from_other_departments() -> None:
    async with running(Rig()) as rig:
        rig.runner.offer(ended(), said("no"))
        await rig.settled(1)
    (dispatch,) = rig.engine.dispatched
    body = json.loads(dispatch.body)
    assert dispatch.priority == dispatching.PRIORITY["batch"] == body["priority"]
    assert (dispatch.department, dispatch.account) == ("platform", "platform"), "who pays"
    assert dispatch.principal_key == principal().key
    assert body["cache_salt"] == "hr"
    assert body["model"] == "large"


async def test_the_caller_needs_no_valid_token_but_the_right_to_use_the_model() -> None:
    async with running(Rig()) as rig:
        expired = replace(principal(), expires_at_us=1)
        rig.runner.offer(ended(principal=expired, input_inspection=Inspection("x")), said("no"))
        await rig.settled(1)
        assert rig.stats.compared == 1
        assert rig.policy.asked == [(expired, LARGE, "chat", Inspection("x"))]
        for effect in Effect:
            if effect is not Effect.ALLOW:
                rig.policy.effect = effect
                rig.runner.offer(ended(2), said("no"))
        await rig.settled(5)
    assert rig.stats.dropped == {"not_permitted": 4, "stopped": 0}
    assert len(rig.engine.dispatched) == len(rig.ledger.asks) == 1


# -- what is offered ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        (ended(outcome=Outcome.ABORTED), "not_answered"),
        (ended(outcome=None), "not_answered"),
        (ended(superseded="cascade"), "not_answered"),
        (ended(stopped=Stop("budget_exhausted")), "not_answered"),
        (ended(decided_event_id=None), "not_answered"),
        (ended(principal=None), "not_answered"),
        (ended(route=None), "not_answered"),
        (ended(route=Route(SMALL, "named", False, (LARGE,))), "not_small"),
        (ended(route=Route(LARGE, "auto:large", True, (SMALL,))), "not_small"),
        (ended(earlier=("something",)), "not_small"),
        (ended(route=Route(SMALL, "auto:small", True, ())), "no_large"),
        (
            ended(route=Route(SMALL, "auto", True, (replace(LARGE, operations=frozenset()),))),
            "no_large",
        ),
        (ended(request=replace(request(), choices=2)), "not_comparable"),
        (ended(request=request(tools=[{"type": "function"}])), "not_comparable"),
        (ended(request=replace(request(), body_bytes=1 << 20)), "too_large"),
    ],
)
async def test_what_cannot_be_compared_is_not_taken(turn: Turn, why: str) -> None:
    async with running(Rig()) as rig:
        rig.runner.offer(turn, said("no"))
        assert rig.stats.dropped == {why: 1}
        rig.runner.offer(ended(), said("x" * (1 << 17)))
        await rig.settled(2)
        assert rig.stats.dropped["too_large"] == 1 + (why == "too_large")
    assert not rig.engine.dispatched


async def test_the_sample_is_the_share_asked_for_and_always_the_same() -> None:
    names = [f"req_{number}" for number in range(20_000)]
    chosen = {}
    for share in (0, 10, 100, 1000):
        runner = Rig(share_milli=share).runner
        chosen[share] = {name for name in names if runner.wants(name)}
        assert chosen[share] == {
            name for name in names if Rig(share_milli=share).runner.wants(name)
        }
    assert not chosen[0]
    assert 130 < len(chosen[10]) < 270
    assert 1800 < len(chosen[100]) < 2200
    assert chosen[10] < chosen[100] < chosen[1000] == set(names)


async def test_an_offer_never_raises_whatever_it_is_given() -> None:
    async with running(Rig()) as rig:
        broken = ended()
        broken.route = "nonsense"  # type: ignore[assignment]
        rig.runner.offer(broken, b"")
        rig.runner.offer(ended(), None)  # type: ignore[arg-type]
        await rig.settled(2)
    assert rig.stats.dropped["broken"] == 2


# -- users come first -----------------------------------------------------------------------------


def test_idle() -> None:
    assert idle(IDLE)
    assert idle(replace(IDLE, running=1, in_flight=1))
    assert not idle(replace(IDLE, replicas=0))
    assert not idle(replace(IDLE, waiting=1))
    assert not idle(replace(IDLE, running=2))
    assert not idle(replace(IDLE, in_flight=2))


async def test_nothing_runs_while_the_large_model_works_for_others() -> None:
    async with running(Rig()) as rig:
        rig.engine.busy = lambda: replace(IDLE, running=5)
        rig.runner.offer(ended(), said("no"))
        await asyncio.sleep(0.03)
        assert not rig.engine.dispatched
        assert not rig.ledger.asks
        rig.engine.busy = lambda: IDLE
        await rig.settled(1)
    assert rig.stats.compared == 1


async def test_what_waited_too_long_is_dropped() -> None:
    async with running(Rig()) as rig:
        rig.engine.busy = lambda: replace(IDLE, waiting=1)
        rig.runner.offer(ended(), said("no"))
        await asyncio.sleep(0.01)
        rig.now_s += shadow.STALE_S + 1
        await rig.settled(1)
    assert rig.stats.dropped["stale"] == 1
    assert not rig.engine.dispatched


async def test_it_gives_way_in_mid_answer_and_its_end_is_on_record() -> None:
    rig = Rig(Engine(("a", "b", "c")))
    rig.engine.busy = lambda: replace(IDLE, waiting=int(bool(rig.engine.dispatched)))
    async with running(rig):
        rig.runner.offer(ended(), said("no"))
        await rig.settled(1)
    assert rig.stats.dropped["gave_way"] == 1
    assert rig.engine.closed == 1
    assert rig.audit.kinds == ["decided", "completed"]
    assert rig.audit.entries[-1][1].outcome is Outcome.ABORTED
    assert rig.ledger.holds[0].settled == [(None, None)]
    assert not rig.log.events


async def test_a_flood_of_offers_is_bounded_in_memory_and_in_runs() -> None:
    async with running(Rig(max_per_minute=3)) as rig:
        for number in range(2000):
            rig.runner.offer(ended(number), said("no"))
        assert len(rig.runner._queue) == shadow.MAX_QUEUED
        await until(lambda: rig.stats.compared == 3)
        await asyncio.sleep(0.02)
        assert len(rig.engine.dispatched) == 3
        rig.now_s += 59
        await asyncio.sleep(0.02)
        assert len(rig.engine.dispatched) == 3
        rig.now_s += 2
        await until(lambda: rig.stats.compared == 6)
    assert rig.stats.dropped["queue_full"] == 2000 - shadow.MAX_QUEUED
    assert rig.stats.sampled == rig.stats.compared + rig.stats.dropped.total()


async def test_none_a_minute_is_none() -> None:
    async with running(Rig(max_per_minute=0)) as rig:
        rig.runner.offer(ended(), said("no"))
        await asyncio.sleep(0.01)
    assert not rig.engine.dispatched


# -- what may break -------------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", [BudgetExhausted(), NoAccount()])
async def test_an_account_without_means_leaves_no_record_and_is_not_asked_again_at_once(
    refusal: GatehouseError,
) -> None:
    async with running(Rig()) as rig:
        rig.ledger.refuse = refusal
        for number in range(3):
            rig.runner.offer(ended(number), said("no"))
        await rig.settled(1)
        await asyncio.sleep(0.02)
        assert len(rig.ledger.asks) == 1
        assert rig.audit.entries == []
        assert rig.engine.dispatched == []
        rig.ledger.refuse = None
        rig.now_s += shadow.PAUSE_S + 1
        await until(lambda: rig.stats.compared == 2)
    assert rig.stats.dropped[refusal.code] == 1


async def test_an_account_that_ends_in_mid_answer_ends_the_run() -> None:
    async with running(Rig(Engine(("a", "b", "c")))) as rig:
        rig.ledger.left = 1
        rig.runner.offer(ended(), said("no"))
        await rig.settled(1)
    assert rig.stats.dropped["budget_exhausted"] == 1
    assert rig.audit.kinds == ["decided", "completed"]
    assert rig.audit.entries[-1][1].outcome is Outcome.REFUSED
    assert rig.engine.closed == 1


async def test_without_an_audit_trail_no_engine_sees_it_and_the_hold_goes_back() -> None:
    async with running(Rig(audit=RecordingAudit(refuse=AuditUnavailable()))) as rig:
        rig.runner.offer(ended(), said("no"))
        await rig.settled(1)
    assert rig.stats.dropped[AuditUnavailable.code] == 1
    assert rig.engine.dispatched == []
    assert rig.audit.entries == []
    assert rig.ledger.holds[0].settled == [(None, None)]


@pytest.mark.parametrize(
    ("failure", "fail_at", "outcome", "rests"),
    [
        (EngineUnavailable(), None, Outcome.FAILED, True),
        (EngineFailed(), 1, Outcome.FAILED, True),
        (ContextLengthExceeded(), None, Outcome.REFUSED, False),
        (RuntimeError(SECRET), 1, Outcome.FAILED, True),
    ],
)
async def test_an_engine_that_dies_is_on_record_and_the_next_one_waits(
    failure: Any, fail_at: int | None, outcome: Outcome, rests: bool
) -> None:
    async with running(Rig(Engine(fail_at=fail_at, failure=failure))) as rig:
        rig.runner.offer(ended(1), said("no"))
        await rig.settled(1)
        assert rig.audit.kinds == ["decided", "completed"]
        assert rig.audit.entries[-1][1].outcome is outcome
        rig.engine.failure = None
        rig.runner.offer(ended(2), said("no"))
        await asyncio.sleep(0.03)
        assert (rig.stats.compared == 0) is rests
        rig.now_s += shadow.PAUSE_S + 1
        await until(lambda: rig.stats.compared == 1)


async def test_a_run_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "RUN_S", 0.02)
    async with running(Rig(Engine(hang_at=1))) as rig:
        rig.runner.offer(ended(), said("no"))
        await rig.settled(1)
    assert rig.stats.dropped["timeout"] == 1
    assert rig.audit.kinds == ["decided", "completed"]
    assert rig.engine.closed == 1


async def test_a_comparison_that_cannot_be_recorded_is_dropped() -> None:
    async with running(Rig()) as rig:
        rig.log.refuse = AuditUnavailable()
        rig.runner.offer(ended(), said("no"))
        await rig.settled(1)
    assert (rig.stats.compared, rig.stats.dropped[AuditUnavailable.code]) == (0, 1)


async def test_a_broken_encoder_leaves_words_in_common() -> None:
    def broken(one: str, other: str) -> float:
        raise RuntimeError(SECRET)

    async with running(Rig(similarity=broken)) as rig:
        rig.runner.offer(ended(), said("something else"))
        await rig.settled(1)
    assert rig.detail["method"] == "words"


async def test_similarity_does_not_hold_the_event_loop() -> None:
    threads = []

    def similarity(one: str, other: str) -> float:
        threads.append(threading.current_thread())
        return 0.25

    async with running(Rig(similarity=similarity)) as rig:
        rig.runner.offer(ended(), said("something else"))
        await rig.settled(1)
    assert (rig.detail["method"], rig.detail["agreement_milli"]) == ("cosine", 250)
    assert threads[0] is not threading.main_thread()


async def test_a_comparison_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "COMPARE_S", 0.02)
    over = threading.Event()

    def similarity(one: str, other: str) -> float:
        over.wait(5)
        return 0.5

    async with running(Rig(similarity=similarity)) as rig:
        rig.runner.offer(ended(), said("something else"))
        await rig.settled(1)
        over.set()
    assert (rig.stats.compared, rig.stats.dropped["timeout"]) == (0, 1)
    assert rig.audit.kinds == ["decided", "completed"]


async def test_hostile_answers_are_compared_soon() -> None:
    hostile = ("i" + " " * 20_000, "a" + "\u0301" * 30_000 + "\u0323" * 30_000)
    for text in hostile:
        async with running(Rig(Engine((text, "x")))) as rig:
            began_s = time.process_time()
            rig.runner.offer(ended(), said(text))
            await rig.settled(1)
            assert time.process_time() - began_s < 2
        assert rig.stats.compared == 1


# -- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [b"", said("no")], ids=["nothing to read", "text"])
@pytest.mark.parametrize("steps", range(12))
async def test_whenever_it_is_stopped_what_was_decided_has_one_end(steps: int, raw: bytes) -> None:
    rig = Rig(Engine(("a", "b", "c"), delay_s=0))
    rig.runner.start()
    for number in range(3):
        rig.runner.offer(ended(number), raw)
    for _ in range(steps):
        await asyncio.sleep(0)
    await rig.runner.close()
    kinds = rig.audit.kinds
    assert kinds.count("decided") == kinds.count("completed")
    assert len(rig.ledger.holds) == sum(len(hold.settled) for hold in rig.ledger.holds)
    assert len(rig.engine.dispatched) == rig.engine.closed
    completed = [t for k, t in rig.audit.entries if k == "completed"]
    answered = sum(turn.outcome is Outcome.COMPLETED for turn in completed)
    assert rig.stats.compared == len(rig.log.events) == answered
    assert rig.stats.sampled == rig.stats.compared + rig.stats.dropped.total()
    rig.runner.offer(ended(9), said("no"))
    assert rig.runner.start() is None
    assert len(rig.runner._queue) == 0
    await rig.runner.close()


async def test_a_worker_that_is_not_started_takes_offers_and_nothing_happens() -> None:
    rig = Rig()
    rig.runner.offer(ended(), said("no"))
    await asyncio.sleep(0.01)
    assert not rig.engine.dispatched
    await rig.runner.close()


# -- content --------------------------------------------------------------------------------------


async def test_content_is_encrypted_under_the_callers_key_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_syncs(monkeypatch)
    caplog.set_level(logging.DEBUG)
    writer = open_writer(tmp_path / "wal")
    keys = FileKeystore(tmp_path / "keys", clock=now_us)
    audit = TurnAudit(writer, keys, now_us)
    engine = Engine(("the-secret", "-of-the-answer", "."))
    async with running(Rig(engine, audit=audit, shadow_log=audit)) as rig:
        rig.runner.offer(ended(decided_event_id="01J" + "0" * 23), said("the-secret-of-the-small"))
        await rig.settled(1)
        engine.failure, engine.fail_at = RuntimeError(SECRET), 1
        rig.runner.offer(ended(2), said("the-secret-of-the-small"))
        await rig.settled(2)
    await audit.close()
    await writer.close()
    records = [r for r in read_records(tmp_path / "wal") if "writer" not in r["event_type"]]
    for record in records:
        check_record(record)
    assert [r["event_type"] for r in records] == [
        "inference.decided",
        "inference.completed",
        "route.shadow",
        "inference.decided",
        "inference.completed",
    ]
    assert "secret" not in json.dumps(records)
    assert "secret" not in caplog.text
    cells = [
        unpack_cell(payload)
        for _e, _n, path in segment_files(tmp_path / "wal" / "gw-1")
        for kind, payload in read_segment(path).frames
        if kind is FrameType.CELL
    ]
    key = keys.data_key(KeyScope.of("hr", principal().key, now_us(), per_subject=True))
    texts = [open_cell(key, cell) for cell in cells]
    assert sum(SECRET.encode() in text for text in texts) == 2
    assert any(b"-of-the-answer" in text for text in texts)


# -- texts ----------------------------------------------------------------------------------------


def test_text_of_an_answer() -> None:
    chat = sse({"choices": [{"index": 0, "delta": {"content": "a\n\nb"}}]})
    other = sse({"choices": [{"index": 1, "delta": {"content": "z"}}]})
    nothing = sse({"choices": [{"index": 0, "delta": {}}]}) + sse({"choices": []})
    assert answer_text(Operation.CHAT, chat + other + nothing + chat) == "a\n\nba\n\nb"
    assert answer_text(Operation.COMPLETIONS, sse({"choices": [{"text": "c"}]})) == "c"
    assert answer_text(Operation.CHAT, b"") == ""


# -- listening at the trail -----------------------------------------------------------------------


PIECE = said("Good")


async def through(tap: ShadowTap, turn: Turn, *pieces: bytes) -> None:
    """A turn on its way through the trail, as the gateway takes it."""
    turn.outcome = None
    await tap.decided(turn)
    for piece in pieces:
        tap.output(turn, piece)
    turn.outcome, turn.status = Outcome.COMPLETED, 200
    await tap.completed(turn)


async def test_what_passes_the_trail_is_offered_once_with_its_text() -> None:
    trail = RecordingAudit()
    async with running(Rig(Engine(("Good", "Good")))) as rig:
        tap = ShadowTap(trail, rig.runner)
        await through(tap, ended(), PIECE, PIECE)
        await rig.settled(1)
        await through(tap, ended(2, route=Route(SMALL, "named")), PIECE)
        await through(tap, ended(3, route=Route(LARGE, "auto:large", True, (SMALL,))), PIECE)
    assert trail.kinds == ["decided", "completed"] * 3
    assert trail.outputs["req_1"] == PIECE + PIECE
    assert (rig.detail["method"], rig.detail["agreement_milli"]) == ("exact", 1000)
    assert rig.stats.offered == 1
    assert tap._gathered == {}


async def test_what_is_not_sampled_is_not_gathered() -> None:
    rig = Rig(share_milli=0)
    tap = ShadowTap(RecordingAudit(), rig.runner)
    turn = ended()
    await tap.decided(turn)
    tap.output(turn, PIECE)
    assert tap._gathered == {}


async def test_the_trail_is_what_it_was_without_listening() -> None:
    rig = Rig()
    tap = ShadowTap(RecordingAudit(refuse=AuditUnavailable()), rig.runner)
    with pytest.raises(AuditUnavailable):
        await tap.decided(ended())
    assert tap._gathered == {}

    class Broken(RecordingAudit):
        async def completed(self, turn: Turn) -> None:
            raise AuditUnavailable()

    tap = ShadowTap(Broken(), rig.runner)
    with pytest.raises(AuditUnavailable):
        await through(tap, ended(), PIECE)
    assert rig.stats.offered == 0
    assert tap._gathered == {}

    tap = ShadowTap(RecordingAudit(), rig.runner)
    await through(tap, ended(2), *[PIECE * 100] * 1000)
    assert rig.stats.offered == 0, "an answer that was not gathered whole is not compared"
    assert tap._gathered == {}


@pytest.mark.parametrize(
    "fields",
    [
        {"request": replace(request(), choices=2)},
        {"request": request(tools=[{"type": "function"}])},
        {"request": replace(request(), body_bytes=shadow.MAX_REQUEST_BYTES + 1)},
        {"request": None},
        {"route": Route(SMALL, "auto:small", True, ())},
        {"route": Route(SMALL, "named", False, (LARGE,))},
        {"route": "nonsense"},
        {"earlier": ("something",)},
    ],
)
async def test_what_would_not_be_offered_is_not_gathered(fields: dict[str, Any]) -> None:
    rig = Rig()
    tap = ShadowTap(RecordingAudit(), rig.runner)
    turn = ended(**fields)
    await tap.decided(turn)
    tap.output(turn, PIECE)
    assert tap._gathered == {}
    await rig.runner.close()
    await tap.decided(ended())
    assert tap._gathered == {}, "nor once it is over"


async def test_an_answer_is_read_in_a_thread_and_no_end_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[threading.Thread] = []

    def read(operation: Operation, data: bytes) -> str:
        threads.append(threading.current_thread())
        return answer_text(operation, data)

    monkeypatch.setattr(shadow_exchange, "answer_text", read)
    rig = Rig()
    tap = ShadowTap(RecordingAudit(), rig.runner)
    await through(tap, ended(), PIECE, PIECE)
    await asyncio.sleep(0.01)
    assert not threads, "nothing is read on the way of a request"
    rig.engine.busy = lambda: replace(IDLE, running=5)
    async with running(rig):
        await until(lambda: not rig.runner._queue[0].raw)
        assert rig.runner._queue[0].answer == "GoodGood"
    assert threads
    assert threading.main_thread() not in threads


async def test_an_answer_that_cannot_be_read_is_dropped_and_the_next_one_does_not_wait(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running(Rig()) as rig:
        tap = ShadowTap(RecordingAudit(), rig.runner)
        await through(tap, ended(), b'data: {"' + SECRET.encode() + b"\n\n")
        await through(tap, ended(2), PIECE)
        await rig.settled(2)
    assert (rig.stats.dropped["broken"], rig.stats.compared) == (1, 1)
    assert SECRET not in caplog.text
    assert len(rig.engine.dispatched) == 1


async def test_answers_that_wait_to_be_read_are_bounded_in_bytes() -> None:
    rig = Rig()
    half = said("x" * (shadow.MAX_QUEUED_BYTES // 2 - 1000))
    for number in range(3):
        rig.runner.offer(ended(number), half)
    assert len(rig.runner._queue) == 2
    assert rig.stats.dropped == {"queue_full": 1}
    await rig.runner.close()


def test_texts_are_compared_by_the_encoder_of_the_artefact() -> None:
    similarity = encoder_similarity(BUILT_IN)
    near = similarity("The capital of France is Paris.", "Paris is the capital city of France.")
    far = similarity("The capital of France is Paris.", "Photosynthesis turns light into sugar.")
    assert near > 0.8
    assert far < 0.2
    with pytest.raises(ArtefactError):
        encoder_similarity(Path("/nowhere"))("a", "b")
