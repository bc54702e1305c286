"""Errors in OpenAI's envelope, and the headers that go with every answer."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import orjson
from starlette.responses import Response

from deployments.api.accounts import budget_headers, cost_headers
from governance.budget.messages import AccountState
from governance.budget.refusals import TOKENS
from governance.errors import BudgetExhausted, GatehouseError, Shortage, Unauthenticated
from governance.types import Turn

REQUEST_ID = "x-gatehouse-request-id"
DECISION_ID = "x-gatehouse-decision-id"
MODEL = "x-gatehouse-model"
MODEL_VERSION = "x-gatehouse-model-version"
ENGINE_VERSION = "x-gatehouse-engine-version"
ROUTE_REASON = "x-gatehouse-route-reason"
ATTEMPTS = "x-gatehouse-attempts"
REPLICAS_ASKED = "x-gatehouse-replicas-asked"
RULES = "x-gatehouse-rules"

_CHALLENGE = 'Bearer realm="gatehouse"'


def new_id(prefix: str) -> str:
    """A fresh identifier: ``prefix_`` and 128 random bits in hex."""
    return f"{prefix}_{secrets.token_hex(16)}"


def error_body(error: GatehouseError, request_id: str, decision_id: str = "") -> bytes:
    """The JSON envelope of an error; the same in a body and in an error event of a stream."""
    detail: dict[str, object] = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
        "request_id": request_id,
    }
    if error.rule_ids:
        detail["rule_ids"] = list(error.rule_ids)
        detail["decision_id"] = decision_id
    if isinstance(error, BudgetExhausted) and error.shortage is not None:
        detail |= _shortage(error.shortage)
    return orjson.dumps({"error": detail})


def _shortage(left: Shortage) -> dict[str, object]:
    """What ran out, until when, whom to ask, and what a client could ask for instead.

    A dimension without a limit is ``null``. ``limit`` and ``spent`` are of the quantity that ran
    out: tokens, or milliseconds of charged device time.
    """
    gpu_ms = None if left.gpu_us is None else left.gpu_us // 1000
    shown: dict[str, object] = {
        "account": left.account,
        "reset_at": -(-left.reset_us // 1_000_000),
        "still_fits": {"tokens": left.tokens, "gpu_ms": gpu_ms},
    }
    if left.quantity is not None:
        per = 1 if left.quantity == TOKENS else 1000
        shown |= {
            "window": left.window,
            "ran_out": left.quantity if left.quantity == TOKENS else "gpu_ms",
            "limit": (left.limit or 0) // per,
            "spent": (left.spent or 0) // per,
            "owner": left.owner,
        }
    if left.allowed is not None:
        allowed = left.allowed
        shown["allowed"] = {
            "answer_tokens": allowed.answer_tokens,
            "instead": None
            if allowed.model is None
            else {"model": allowed.model, "answer_tokens": allowed.model_answer_tokens},
        }
    return shown


def error_response(
    error: GatehouseError,
    request_id: str,
    decision_id: str = "",
    account: AccountState | None = None,
) -> Response:
    """The HTTP answer to an error; ``account`` is the caller's, where it is known."""
    headers = {REQUEST_ID: request_id}
    if decision_id:
        headers[DECISION_ID] = decision_id
    if isinstance(error, Unauthenticated):
        # RFC 6750 section 3.1: name the error only where a credential was sent.
        sent = error.code != "missing_credential"
        headers["www-authenticate"] = _CHALLENGE + (', error="invalid_token"' if sent else "")
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, error.retry_after_s))
    if account is not None:
        headers |= budget_headers(account)
    return Response(
        error_body(error, request_id, decision_id),
        status_code=error.status,
        headers=headers,
        media_type="application/json",
    )


def turn_headers(turn: Turn) -> Mapping[str, str]:
    """What a client may know of how its request was decided and served."""
    headers = {REQUEST_ID: turn.request_id, DECISION_ID: turn.decision_id}
    if turn.route is not None:
        headers[MODEL] = turn.route.model.id
        headers[ROUTE_REASON] = turn.route.reason
        if turn.earlier:
            tried = [f"{attempt.model}={attempt.why}" for attempt in turn.earlier]
            headers[ATTEMPTS] = ",".join([*tried, turn.route.model.id])
    if turn.replicas_asked > 1:
        headers[REPLICAS_ASKED] = str(turn.replicas_asked)
    if turn.model_version:
        headers[MODEL_VERSION] = turn.model_version
    if turn.engine_version:
        headers[ENGINE_VERSION] = turn.engine_version
    if turn.decision is not None:
        headers[RULES] = ",".join(turn.decision.rule_ids)
    if turn.account is not None:
        headers |= budget_headers(turn.account)
    return headers


def answer_headers(turn: Turn) -> Mapping[str, str]:
    """Headers of an answer that is complete when they are sent: with what it took."""
    return {**turn_headers(turn), **cost_headers(turn)}
