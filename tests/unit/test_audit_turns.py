"""The request path's records: complete, in time, without content, and never in silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from governance.audit.content import Cell, joined_commit, open_cell, unpack_cell
from governance.audit.frames import FrameType
from governance.audit.keystore import DataKey, FileKeystore, KeyScope, KeystoreError
from governance.audit.record import check_record
from governance.audit.segments import read_records, read_segment, segment_files
from governance.audit.turns import ANONYMOUS_PER_S, PART_BYTES, TurnAudit
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
from tests.unit.audit_kit import FailingFiles, io_error, now_us, open_writer, without_syncs

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
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(scope: KeyScope) -> DataKey:
            raise KeystoreError("no")

        monkeypatch.setattr(rig.keys, "data_key", fail)
        turn = new_turn()
        with pytest.raises(AuditUnavailable):
            await rig.audit.decided(turn)
        assert rig.records() == []

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
