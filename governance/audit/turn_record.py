"""From a ``Turn`` to the columns of an audit record: the one place where the two meet.

Content never becomes a column: prompts and answers go into cells, and only their commitments,
lengths and keys stand here. What a stage has not found yet is null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from governance.audit.schema import EventType
from governance.classes import effective_class
from governance.types import Inspection, Outcome, Principal, Route, Turn

_PROVIDER = "gatehouse"
_I64 = 2**63
_MAX_TEMPERATURE = 1000


def decided_event(turn: Turn, event_id: str) -> dict[str, Any]:
    """Columns of ``inference.decided``; who calls it adds those of the content."""
    event = _common(turn, event_id)
    event["event_type"] = EventType.DECIDED._value_
    event["gpu_us_method"] = "pending"
    return event


def ended_event(turn: Turn, event_id: str) -> dict[str, Any]:
    """Columns of ``inference.completed``, or of ``inference.refused`` where nothing was decided."""
    event = _common(turn, event_id)
    decided = turn.decided_event_id
    event["event_type"] = (EventType.COMPLETED if decided else EventType.REFUSED)._value_
    event["parent_event_id"] = decided
    event["ts_end_us"] = turn.ended_us or None
    event["outcome"] = (turn.outcome or Outcome.FAILED)._value_
    event["status"] = turn.status
    event["error_code"] = turn.error_code
    event["finish_reason"] = turn.finish_reason
    if turn.ended_us:
        event["latency_us"] = max(0, turn.ended_us - turn.started_us)
    if turn.accepted_us:
        event["queue_us"] = max(0, turn.accepted_us - turn.started_us)
    if turn.first_chunk_us:
        event["ttft_us"] = max(0, turn.first_chunk_us - turn.started_us)
    if decided:
        event["response_bytes"] = 0 if turn.superseded else turn.sent_bytes
    _usage(event, turn)
    return event


def _usage(event: dict[str, Any], turn: Turn) -> None:
    usage = turn.usage
    if usage is not None:
        event["input_tokens"] = usage.prompt_tokens
        event["cached_tokens"] = usage.cached_tokens
        event["output_tokens"] = usage.completion_tokens
    event["gpu_us"] = turn.gpu_us
    if turn.gpu_us is not None:
        event["gpu_us_method"] = "step_split"
    else:
        # With an engine involved, its own account follows as usage.settled.
        event["gpu_us_method"] = "pending" if turn.accepted_us else "none"
    if turn.charged is not None:
        event["charged_us"] = turn.charged.gpu_us


def _common(turn: Turn, event_id: str) -> dict[str, Any]:
    """What both records of a turn carry."""
    notes = turn.notes
    event: dict[str, Any] = {
        "event_id": event_id,
        "ts_us": turn.attempt_us or turn.started_us,
        "request_id": turn.request_id,
        "decision_id": turn.decision_id,
        "trace_id": notes.get("trace_id"),
        "span_id": notes.get("span_id"),
        "operation": turn.operation._value_,
        "provider": _PROVIDER,
        "replica_id": turn.replica_id,
        "model_revision": turn.model_version,
        "engine_version": turn.engine_version,
    }
    if turn.principal is not None:
        _who(event, turn.principal)
    _what(event, turn)
    if turn.input_inspection is not None or turn.output_inspection is not None:
        _data(event, turn)
    decision = turn.decision
    if decision is not None:
        event["decision"] = decision.effect._value_
        event["rule_ids"] = list(decision.rule_ids)
        event["policy_digest"] = decision.policy_digest
        event["mode"] = "enforce"
        given = None if turn.charge is None else turn.charge.priority_class
        event["priority_class"] = effective_class(decision.priority_class, given)
    reservation = turn.reservation
    if reservation is not None:
        event["reservation_id"] = reservation.id
        event["budget_account"] = reservation.account
        event["reserved_us"] = reservation.reserved.gpu_us
    elif turn.account is not None:
        event["budget_account"] = turn.account.account
    return event


def _who(event: dict[str, Any], principal: Principal) -> None:
    event["subject_key"] = principal.key
    event["principal_kind"] = principal.kind._value_
    event["issuer"] = principal.issuer
    event["tenant_id"] = principal.tenant_id
    event["client_id"] = principal.client_id
    event["auth_method"] = "service_key" if principal.kind._value_ == "key" else "oidc"
    event["key_id"] = principal.key_id
    event["token_hash"] = principal.token_hash
    event["roles"] = sorted(principal.roles)
    event["department"] = principal.department
    event["groups_overage"] = principal.groups_overage


def _what(event: dict[str, Any], turn: Turn) -> None:
    request, route = turn.request, turn.route
    if request is not None:
        body = request.body
        event["request_model"] = request.model
        event["stream"] = request.stream
        event["choices"] = request.choices
        event["prompt_bytes"] = request.body_bytes or None
        # Of a request that was refused before: what it asked for.
        event["max_tokens"] = request.max_tokens if turn.max_tokens is None else turn.max_tokens
        temperature, seed = body.get("temperature"), body.get("seed")
        if isinstance(temperature, int | float) and abs(temperature) <= _MAX_TEMPERATURE:
            event["temperature_milli"] = round(temperature * 1000)
        if type(seed) is int and -_I64 <= seed < _I64:
            event["seed"] = seed
    if route is not None:
        event["response_model"] = route.model.id
        event["adapter"] = route.model.id if route.model.id != route.model.base else None
        event["route_target"] = "internal"
        event["route_reason"] = route.reason
    if detail := _detail(turn):
        event["detail"] = canonical_detail(detail)


def _detail(turn: Turn) -> dict[str, Any]:
    """What has no column: the choice of the model, and why an answer or a request ended early."""
    detail: dict[str, Any] = {}
    if turn.route is not None and (route := _route_detail(turn, turn.route)):
        detail["route"] = route
    if (stop := turn.stopped) is not None:
        detail["stopped"] = {
            "code": stop.code,
            "account": stop.account,
            "window": stop.window,
            "reset_us": stop.reset_us,
        }
    if (shed := turn.shed) is not None:
        detail["shed"] = {
            "reason": shed.reason,
            "model": shed.model,
            "class": shed.priority_class,
            "waiting": shed.waiting,
            "wait_ms": shed.wait_ms,
        }
    return detail


def _route_detail(turn: Turn, route: Route) -> dict[str, Any]:
    """What a choice of the platform rests on, in thousandths; and what was not the usual way."""
    detail: dict[str, Any] = dict(route.detail)
    if route.auto:
        detail |= {"auto": True, "attempt": turn.attempt}
    if route.instead_of is not None:
        detail |= {"instead_of": route.instead_of, "attempt": turn.attempt}
    if turn.superseded is not None:
        detail["superseded"] = turn.superseded
    if turn.replicas_asked > 1:
        detail["replicas_asked"] = turn.replicas_asked
    return detail


def canonical_detail(detail: Mapping[str, Any]) -> str:
    """The ``detail`` column: JSON with sorted keys."""
    return orjson.dumps(detail, option=orjson.OPT_SORT_KEYS).decode()


def _data(event: dict[str, Any], turn: Turn) -> None:
    both = (turn.input_inspection, turn.output_inspection)
    event["inspector"] = next(i.inspector for i in both if i is not None)
    event["findings"] = _findings(event["event_id"], both) or None


def _findings(event_id: str, inspections: tuple[Inspection | None, ...]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for inspection in inspections:
        for finding in inspection.findings if inspection is not None else ():
            found.append(
                {
                    "finding_id": f"{event_id}-{len(found)}",
                    "detector": finding.detector,
                    "version": None,
                    "category": finding.category,
                    "severity": finding.severity,
                    "part": finding.path,
                    "count": 1,
                    "score_milli": finding.score_milli,
                    "action": None,
                }
            )
    return found


def refused_input(turn: Turn) -> bytes | None:
    """The request of a turn that was refused, as JSON; ``None`` where none was read."""
    if turn.body is not None:
        return turn.body
    if turn.request is None:
        return None
    return orjson.dumps({"model": turn.request.model, **turn.request.body})
