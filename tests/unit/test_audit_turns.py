"""The request path's records: complete, in time, without content, and never in silence."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from governance.audit.answers import LARGE_PART_BYTES, PART_BYTES
from governance.audit.content import Cell, joined_commit, open_cell, unpack_cell
from governance.audit.frames import FrameType
from governance.audit.keystore import DataKey, FileKeystore, KeyScope, KeystoreError
from governance.audit.record import check_record
from governance.audit.refusals import (
    ANONYMOUS_PER_S,
    CALLERS,
    CELLS_PER_S,
    RECORDS_PER_S,
    Refusals,
)
from governance.audit.segments import read_records, read_segment, segment_files
from governance.audit.turns import TurnAudit
from governance.audit.writer import AuditWriter
from governance.errors import AuditUnavailable
from governance.types import (
    Amount,
    Decision,
    Effect,
    Finding,
    InferenceRequest,
    Inspection,
    Limits,
    ModelInfo,
    Operation,
    Outcome,
    Principal,
    PrincipalKind,
    Reservation,
    Route,
    Surface,
    Turn,
    Usage,
)
from tests.unit.audit_kit import (
    FailingFiles,
    io_error,
    no_space,
    now_us,
    open_writer,
    without_syncs,
)

SECRET = "the-secret-of-the-prompt"
ANSWER = b'data: {"choices":[{"delta":{"content":"the-secret-of-the-answer"}}]}\n\n'


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_syncs(monkeypatch)


class Rig:
    """A writer, keys and the object under test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = FailingFiles()
        self.writer: AuditWriter = open_writer(root / "wal", files=self.files)
        self.keys = FileKeystore(root / "keys", clock=now_us)
        self.audit = TurnAudit(self.writer, self.keys, now_us)

    def records(self) -> list[dict[str, Any]]:
        found = list(read_records(self.root / "wal"))
        for record in found:
            check_record(record)
        return [r for r in found if not r["event_type"].startswith("writer.")]

    def cells(self) -> list[Cell]:
        return [
            unpack_cell(payload)
            for _e, _n, path in segment_files(self.root / "wal" / "gw-1")
            for kind, payload in read_segment(path).frames
            if kind is FrameType.CELL
        ]

    def opened(self, cell: Cell) -> bytes:
        return open_cell(self.keys.by_id(cell.dek_id), cell)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    await rig.audit.close()
    await rig.writer.close()


def principal(**more: Any) -> Principal:
    values: dict[str, Any] = {
        "kind": PrincipalKind.USER,
        "subject": "jane@example.org",
        "issuer": "entra",
        "department": "hr",
        "roles": frozenset({"b", "a"}),
        "key": "pseudonym",
        "tenant_id": "t",
        "client_id": "c",
        "key_id": "kid",
        "token_hash": "ab" * 32,
    }
    return Principal(**(values | more))


def new_turn(**more: Any) -> Turn:
    """A turn that is ready to be decided."""
    body = {"messages": [{"role": "user", "content": SECRET}], "temperature": 0.25, "seed": 7}
    turn = Turn("req_1", "dec_1", now_us(), Operation.CHAT, notes={"trace_id": "t1"})
    turn.principal = principal()
    turn.request = InferenceRequest(
        Operation.CHAT, "small", body, stream=True, include_usage=False, max_tokens=None, choices=2
    )
    turn.input_inspection = Inspection(
        "rules", (Finding("pii", "high", "regex", "/messages/0", Surface.PROMPT),)
    )
    turn.decision = Decision(Effect.ALLOW, ("r1",), "cd" * 32, Limits(max_tokens=300), "batch")
    turn.max_tokens = 150
    model = ModelInfo("small-lora", "small", frozenset({Operation.CHAT}), 4096, "small")
    turn.route = Route(model, "named")
    turn.reservation = Reservation("rsv_gw_1", "hr", Amount(900, 50))
    turn.body = orjson.dumps({"model": "small-lora", **body})
    for name, value in more.items():
        setattr(turn, name, value)
    return turn


def end(turn: Turn, outcome: Outcome = Outcome.COMPLETED, status: int = 200) -> Turn:
    turn.outcome, turn.status = outcome, status
    turn.ended_us = turn.started_us + 5000
    return turn


class TestTurn:
    async def test_a_whole_turn(self, rig: Rig) -> None:
        turn = new_turn()
        await rig.audit.decided(turn)
        (decided,) = rig.records()
        (prompt,) = rig.cells()
        assert turn.decided_event_id == decided["event_id"] == prompt.event_id
        assert rig.opened(prompt) == turn.body
        assert decided["prompt_commit"] == prompt.commit.hex()
        assert decided["dek_id"] == prompt.dek_id

        turn.accepted_us, turn.first_chunk_us = turn.started_us + 10, turn.started_us + 20
        turn.replica_id, turn.model_version, turn.engine_version = "r", "sha256:x", "vllm 0.29"
        rig.audit.output(turn, ANSWER)
        rig.audit.output(turn, b"")
        rig.audit.output(turn, ANSWER)
        turn.sent_bytes = 2 * len(ANSWER)
        turn.usage, turn.gpu_us, turn.charged = Usage(9, 4, 3), 700, Amount(1400, 13)
        turn.finish_reason = "stop"
        await rig.audit.completed(end(turn))
        completed = rig.records()[1]
        answer = rig.cells()[1]
        assert rig.opened(answer) == ANSWER * 2
        assert answer.event_id == decided["event_id"]
        expected = {
            "event_type": "inference.completed",
            "parent_event_id": decided["event_id"],
            "request_id": "req_1",
            "decision_id": "dec_1",
            "trace_id": "t1",
            "conversation_id": None,
            "subject_key": "pseudonym",
            "principal_kind": "user",
            "issuer": "entra",
            "auth_method": "oidc",
            "roles": ["a", "b"],
            "department": "hr",
            "token_hash": "ab" * 32,
            "operation": "chat",
            "request_model": "small",
            "response_model": "small-lora",
            "adapter": "small-lora",
            "max_tokens": 150,
            "choices": 2,
            "temperature_milli": 250,
            "seed": 7,
            "stream": True,
            "inspector": "rules",
            "decision": "allow",
            "rule_ids": ["r1"],
            "policy_digest": "cd" * 32,
            "priority_class": "batch",
            "reservation_id": "rsv_gw_1",
            "budget_account": "hr",
            "reserved_us": 900,
            "replica_id": "r",
            "model_revision": "sha256:x",
            "response_commit": joined_commit([answer.commit]),
            "response_bytes": 2 * len(ANSWER),
            "input_tokens": 9,
            "cached_tokens": 3,
            "output_tokens": 4,
            "gpu_us": 700,
            "gpu_us_method": "step_split",
            "charged_us": 1400,
            "queue_us": 10,
            "ttft_us": 20,
            "latency_us": 5000,
            "outcome": "completed",
            "status": 200,
            "finish_reason": "stop",
        }
        assert {name: completed[name] for name in expected} == expected
        assert completed["findings"][0]["category"] == "pii"

    async def test_no_content_and_no_subject_in_any_column_or_on_disk(self, rig: Rig) -> None:
        turn = new_turn()
        await rig.audit.decided(turn)
        rig.audit.output(turn, ANSWER)
        await rig.audit.completed(end(turn))
        data = b"".join(p.read_bytes() for p in (rig.root / "wal" / "gw-1").glob("*.wal"))
        for secret in (SECRET.encode(), b"the-secret-of-the-answer", b"jane@example.org"):
            assert secret not in data

    async def test_long_answers_become_parts(self, rig: Rig) -> None:
        turn = new_turn()
        await rig.audit.decided(turn)
        for index in range(5):
            rig.audit.output(turn, bytes([65 + index]) * (PART_BYTES // 2))
        await rig.audit.completed(end(turn))
        cells = rig.cells()[1:]
        assert [cell.part for cell in cells] == [0, 1, 2]
        assert len(b"".join(rig.opened(cell) for cell in cells)) == 5 * (PART_BYTES // 2)
        assert rig.records()[1]["response_commit"] == joined_commit(c.commit for c in cells)

    async def test_pieces_are_durable_within_a_second(self, rig: Rig) -> None:
        turns = [new_turn() for _ in range(3)]
        for turn in turns:
            await rig.audit.decided(turn)
            rig.audit.output(turn, ANSWER)
        assert len(rig.cells()) == 3
        await asyncio.sleep(0.95)
        assert len(rig.cells()) == 6
        assert rig.audit._timer is None, "no timer runs while nothing waits"
        for turn in turns:
            await rig.audit.completed(end(turn))
        assert len(rig.cells()) == 6

    async def test_an_abort_without_output(self, rig: Rig) -> None:
        turn = new_turn()
        await rig.audit.decided(turn)
        await rig.audit.completed(end(turn, Outcome.ABORTED, 499))
        record = rig.records()[1]
        assert record["response_commit"] is None
        assert record["response_bytes"] == 0
        assert record["gpu_us_method"] == "none"
        assert record["outcome"] == "aborted"

    async def test_a_large_prompt(self, rig: Rig) -> None:
        turn = new_turn(body=b"x" * 2_000_000)
        await rig.audit.decided(turn)
        assert rig.opened(rig.cells()[0]) == turn.body
        await rig.audit.completed(end(turn))

    async def test_one_key_for_each_subject_or_department(self, rig: Rig) -> None:
        by_department = TurnAudit(rig.writer, rig.keys, now_us, per_subject=False)
        for audit in (rig.audit, by_department):
            for key in ("one", "two"):
                turn = new_turn(principal=principal(key=key))
                await audit.decided(turn)
                await audit.completed(end(turn))
        ids = [cell.dek_id for cell in rig.cells()]
        assert ids[0] != ids[1]
        assert ids[2] == ids[3]
        await by_department.close()

    async def test_misuse_is_an_error(self, rig: Rig) -> None:
        turn = new_turn()
        with pytest.raises(ValueError, match="before the decision"):
            rig.audit.output(turn, b"x")
        with pytest.raises(ValueError, match="caller and its body"):
            await rig.audit.decided(new_turn(body=None))
        await rig.audit.decided(turn)
        await rig.audit.completed(end(turn))
        with pytest.raises(ValueError, match="ends once"):
            await rig.audit.completed(turn)


class TestRefusals:
    async def test_a_refused_request_keeps_its_input(self, rig: Rig) -> None:
        turn = new_turn(body=None, route=None, reservation=None)
        await rig.audit.completed(end(turn, Outcome.REFUSED, 403))
        (record,) = rig.records()
        (cell,) = rig.cells()
        assert record["event_type"] == "inference.refused"
        assert record["event_id"] == cell.event_id
        content = orjson.loads(rig.opened(cell))
        assert content["model"] == "small"
        assert content["messages"][0]["content"] == SECRET

    async def test_without_a_body_there_is_no_content(self, rig: Rig) -> None:
        turn = Turn("r", "d", now_us(), Operation.CHAT, principal=principal())
        await rig.audit.completed(end(turn, Outcome.REFUSED, 413))
        assert rig.cells() == []
        assert rig.records()[0]["subject_key"] == "pseudonym"

    async def test_a_flood_without_a_principal_is_bounded_and_counted(self, rig: Rig) -> None:
        turn = Turn("r", "d", now_us(), Operation.CHAT)
        for _ in range(1000):
            await rig.audit.completed(end(turn, Outcome.REFUSED, 401))
        written = len(rig.records())
        assert ANONYMOUS_PER_S <= written < ANONYMOUS_PER_S * 4
        await rig.audit.close()
        found = rig.records()
        counted = [orjson.loads(r["detail"])["suppressed"] for r in found if r["detail"]]
        own = sum(1 for r in found if r["reason_code"] != "suppressed")
        assert own + sum(counted) == 1000
        assert rig.cells() == []
        assert found[0]["auth_method"] == "none"

    async def test_the_count_does_not_wait_for_the_next_request(self, rig: Rig) -> None:
        turn = Turn("r", "d", now_us(), Operation.CHAT)
        for _ in range(300):
            await rig.audit.completed(end(turn, Outcome.REFUSED, 401))
        await asyncio.sleep(0.3)
        assert any(r["reason_code"] == "suppressed" for r in rig.records())
        assert rig.audit.suppressed == 0

    async def test_a_flood_of_one_caller_is_bounded_and_counted(self, rig: Rig) -> None:
        other = new_turn(principal=principal(key="other"), body=b"{}")
        for _ in range(500):
            await rig.audit.completed(end(new_turn(body=b"{}"), Outcome.REFUSED, 403))
        await rig.audit.completed(end(other, Outcome.REFUSED, 403))
        await rig.audit.close()
        found = rig.records()
        details = [orjson.loads(r["detail"] or "{}") for r in found]
        own = sum(1 for r in found if r["reason_code"] != "suppressed")
        assert RECORDS_PER_S < own < RECORDS_PER_S * 4
        assert own + sum(detail.get("suppressed", 0) for detail in details) == 501
        left_out = sum(detail.get("content") == "left_out" for detail in details)
        kept = {cell.event_id for cell in rig.cells()}
        assert CELLS_PER_S < len(kept) == own - left_out < CELLS_PER_S * 4
        assert {r["subject_key"] for r in found} == {"pseudonym", "other"}
        assert next(r for r in found if r["subject_key"] == "other")["prompt_commit"]

    async def test_content_of_refusals_is_bounded_in_bytes(self, rig: Rig) -> None:
        for _ in range(5):
            turn = new_turn(body=os.urandom(5 << 20))
            await rig.audit.completed(end(turn, Outcome.REFUSED, 403))
        assert len(rig.records()) == 5
        assert [cell.size_bytes for cell in rig.cells()] == [5 << 20]
        assert [r["detail"] for r in rig.records()][1:] == ['{"content":"left_out"}'] * 4

    @pytest.mark.parametrize(
        "code", ["rate_limit_exceeded", "too_many_parallel_requests", "model_not_found"]
    )
    async def test_what_costs_nothing_to_be_refused_leaves_no_content(
        self, rig: Rig, code: str
    ) -> None:
        turn = new_turn(error_code=code)
        await rig.audit.completed(end(turn, Outcome.REFUSED, 429))
        assert rig.cells() == []
        assert rig.records()[0]["error_code"] == code

    def test_memory_for_callers_is_bounded(self) -> None:
        refusals = Refusals(now_us)
        refusals.caller(principal(key="first")).suppressed = 3
        for index in range(CALLERS + 5):
            refusals.caller(principal(key=str(index)))
        assert len(refusals._named) == CALLERS
        assert refusals.suppressed == 3
        assert refusals.caller(None).suppressed == 3


class TestLargePieces:
    async def test_the_event_loop_goes_on(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        threads = []
        seal = rig.audit._cells.seal

        def watched(*args: Any) -> Cell:
            threads.append(threading.current_thread() is threading.main_thread())
            return seal(*args)

        monkeypatch.setattr(rig.audit._cells, "seal", watched)
        turn = new_turn()
        await rig.audit.decided(turn)
        threads.clear()
        body = os.urandom(LARGE_PART_BYTES * 3 + 5)
        rig.audit.output(turn, body)
        rig.audit.output(turn, b"behind")
        rig.audit.output(turn, b"it")
        assert threads == []
        await rig.audit.completed(end(turn))
        assert threads == [False] * 4
        cells = rig.cells()[1:]
        assert [cell.part for cell in cells] == list(range(4))
        assert b"".join(rig.opened(cell) for cell in cells) == body + b"behindit"
        assert max(cell.size_bytes for cell in cells) == LARGE_PART_BYTES
        record = rig.records()[1]
        assert record["response_commit"] == joined_commit(cell.commit for cell in cells)
        assert record["outcome"] == "completed"

    async def test_a_loss_in_the_thread_is_a_loss(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        turn = new_turn()
        await rig.audit.decided(turn)

        def fail(*args: Any) -> Cell:
            raise MemoryError

        monkeypatch.setattr(rig.audit._cells, "seal", fail)
        rig.audit.output(turn, bytes(LARGE_PART_BYTES))
        with pytest.raises(AuditUnavailable):
            await rig.audit.completed(end(turn))
        assert rig.records()[1]["detail"] == '{"output":"incomplete"}'

    async def test_noise_is_not_deflated(self, rig: Rig) -> None:
        for body, encoding in (
            (base64.b64encode(os.urandom(150_000)), "identity"),
            (os.urandom(200_000), "identity"),
            (b'{"text":"the same again"}' * 8000, "deflate"),
        ):
            turn = new_turn(body=body)
            await rig.audit.decided(turn)
            cell = rig.cells()[-1]
            assert cell.encoding == encoding
            assert rig.opened(cell) == body
            await rig.audit.completed(end(turn))


class TestEndsThatDoNotFit:
    @pytest.mark.parametrize("pause_s", [0.0, 0.3], ids=["at once", "seen before the end"])
    async def test_an_end_does_not_claim_what_was_lost(self, rig: Rig, pause_s: float) -> None:
        turn = new_turn()
        await rig.audit.decided(turn)
        rig.files.fail = lambda name, _index: no_space() if name == "zero" else None
        with contextlib.suppress(AuditUnavailable):  # Where the loss is seen that soon.
            for _ in range(4):
                rig.audit.output(turn, os.urandom(90_000))
            rig.audit.output(turn, b"tail")
        await asyncio.to_thread(time.sleep, pause_s)
        with pytest.raises(AuditUnavailable):
            await rig.audit.completed(end(turn))
        assert turn.outcome is Outcome.FAILED, "observers are told the same"
        rig.files.fail = lambda name, _index: None
        record = await self.the_end(rig)
        assert record["outcome"] == "failed"
        assert record["status"] == 503
        assert record["error_code"] == "audit_unavailable"
        assert record["detail"] == '{"output":"incomplete"}'

    async def test_an_end_is_written_when_there_is_room(self, rig: Rig) -> None:
        turns = [new_turn() for _ in range(3)]
        for turn in turns:
            await rig.audit.decided(turn)
        rig.files.fail = lambda name, _index: no_space() if name == "zero" else None
        for turn in turns:
            rig.audit.output(turn, os.urandom(90_000)[:60_000])
            # Larger than what was zeroed ahead.
            turn.finish_reason = "x" * 600_000
            with pytest.raises(AuditUnavailable):
                await rig.audit.completed(end(turn))
        assert len(rig.audit._unwritten) == 3
        await asyncio.sleep(0.2)
        assert len(rig.audit._unwritten) == 3
        rig.files.fail = lambda name, _index: None
        record = await self.the_end(rig)
        assert (record["outcome"], record["status"]) == ("failed", 503)
        assert record["detail"] is None
        await rig.audit._unwritten.close()
        ends = [r for r in rig.records() if r["event_type"] == "inference.completed"]
        assert {r["parent_event_id"] for r in ends} == {t.decided_event_id for t in turns}
        assert len(ends) == 3
        assert [c.kind for c in rig.cells()].count("output") == 3, "what was released is there"

    async def test_what_does_not_fit_memory_is_left_to_the_sealer(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("governance.audit.unwritten.MOST_ENDS", 1)
        for _ in range(3):
            rig.audit._unwritten.keep({"request_id": "r"}, ())
        assert len(rig.audit._unwritten) == 1
        rig.audit._unwritten._ends.clear()

    async def the_end(self, rig: Rig) -> dict[str, Any]:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for record in rig.records():
                if record["event_type"] == "inference.completed":
                    return record
            await asyncio.sleep(0.05)
        raise AssertionError("no end")


class TestFailure:
    async def test_no_room_refuses_before_anything(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rig.writer._room, "enough", lambda: False)
        turn = new_turn()
        with pytest.raises(AuditUnavailable):
            await rig.audit.decided(turn)
        assert turn.decided_event_id is None
        await rig.audit.completed(end(turn, Outcome.FAILED, 503))
        (record,) = rig.records()
        assert record["event_type"] == "inference.refused"
        assert rig.cells() == [], "content of refusals does not use the reserve"

    async def test_a_broken_log(self, rig: Rig) -> None:
        turn, other = new_turn(), new_turn()
        await rig.audit.decided(turn)
        rig.files.fail = lambda name, _index: io_error() if name == "sync" else None
        with pytest.raises(AuditUnavailable):
            await rig.audit.decided(other)
        assert other.decided_event_id is None
        with pytest.raises(AuditUnavailable):
            rig.audit.output(turn, ANSWER)
        with pytest.raises(AuditUnavailable):
            await rig.audit.completed(end(turn))

    async def test_a_lost_part_stops_the_answer_and_its_end(self, rig: Rig) -> None:
        turn = new_turn()
        await rig.audit.decided(turn)
        answer = rig.audit._answers[turn.decided_event_id or ""]
        rig.audit.output(turn, ANSWER)
        answer.lose()
        with pytest.raises(AuditUnavailable):
            rig.audit.output(turn, ANSWER)
        with pytest.raises(AuditUnavailable):
            await rig.audit.completed(end(turn, Outcome.FAILED, 503))
        assert rig.records()[1]["detail"] == '{"output":"incomplete"}'

    async def test_a_key_that_cannot_be_had(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(scope: KeyScope) -> DataKey:
            raise KeystoreError("dek/x: others have access; chmod 600 dek/x")

        monkeypatch.setattr(rig.keys, "data_key", fail)
        for _ in range(3):
            with pytest.raises(AuditUnavailable):
                await rig.audit.decided(new_turn())
        assert rig.records() == []
        assert caplog.text.count("chmod 600 dek/x") == 1, "said, and not for each request"

    async def test_a_caller_that_hangs_up_while_it_is_decided(self, rig: Rig) -> None:
        rig.keys.data_key(KeyScope.of("hr", "pseudonym", now_us()))
        turn = new_turn()
        task = asyncio.create_task(rig.audit.decided(turn))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await rig.audit.completed(end(turn, Outcome.ABORTED, 499))
        decided, completed = rig.records()
        assert completed["parent_event_id"] == decided["event_id"]
        assert completed["event_type"] == "inference.completed"
