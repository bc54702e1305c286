"""Every error a client can see, and nothing else a client can see.

    GatehouseError                      status  code
    ├── InvalidRequest                  400     invalid_request
    │   ├── UnsupportedField            400     unsupported_field
    │   ├── ForbiddenField              400     forbidden_field
    │   ├── MediaRefused                400     media_not_supported
    │   ├── LimitExceeded               400     limit_exceeded
    │   └── ContextLengthExceeded       400     context_length_exceeded
    ├── Unauthenticated                 401     invalid_credential
    │   ├── MissingCredential           401     missing_credential
    │   ├── ExpiredCredential           401     expired_credential
    │   └── RevokedCredential           401     revoked_credential
    ├── NotPermitted                    403     not_permitted
    │   ├── BlockedByPolicy             403     blocked_by_policy
    │   └── NoAccount                   403     no_budget_account
    ├── RouteNotFound                   404     not_found
    ├── ModelNotFound                   404     model_not_found
    ├── ObjectNotFound                  404     object_not_found
    ├── MethodNotAllowed                405     method_not_allowed
    ├── RequestTimeout                  408     request_timeout
    ├── ApprovalPending                 409     approval_pending
    ├── RequestTooLarge                 413     request_too_large
    ├── UnsupportedMediaType            415     unsupported_media_type
    ├── RateLimited                     429     rate_limit_exceeded
    │   ├── TooManyParallel             429     too_many_parallel_requests
    │   ├── BudgetExhausted             429     budget_exhausted
    │   └── Overloaded                  429     overloaded
    │       └── DepartmentShareTaken    429     department_share_taken
    ├── ClientClosed                    499     client_closed_request
    ├── InternalError                   500     internal_error
    │   └── EngineFailed                500     engine_failed
    ├── Unavailable                     503     unavailable
    │   ├── IdentityUnavailable         503     identity_unavailable
    │   ├── ControlUnavailable          503     control_plane_unavailable
    │   ├── AuditUnavailable            503     audit_unavailable
    │   ├── LedgerUnavailable           503     ledger_unavailable
    │   └── EngineUnavailable           503     engine_unavailable
    └── EngineTimeout                   504     engine_timeout

Arguments are positional, because an exception with keyword-only arguments cannot cross a Ray
handle. Messages are ours: the text of a library, a path, a secret or another tenant's data never
becomes one.
"""

from __future__ import annotations

from dataclasses import dataclass


class GatehouseError(Exception):
    """Base of all client-visible errors.

    Args:
        message: One sentence for the caller: what is wrong and what to do.
        param: Field of the request at fault, dotted path, or ``None``.
        retry_after_s: Seconds after which a retry makes sense, or ``None``.
        rule_ids: Policy rules responsible, for decisions.
    """

    status = 500
    code = "error"
    type = "server_error"

    def __init__(
        self,
        message: str = "",
        param: str | None = None,
        retry_after_s: int | None = None,
        rule_ids: tuple[str, ...] = (),
    ) -> None:
        message = message or (self.__doc__ or "").strip().splitlines()[0]
        super().__init__(message, param, retry_after_s, rule_ids)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.rule_ids = rule_ids

    def __str__(self) -> str:
        return self.message


class InvalidRequest(GatehouseError):
    """The request is not valid."""

    status, code, type = 400, "invalid_request", "invalid_request_error"


class UnsupportedField(InvalidRequest):
    """The request has a field that this endpoint does not know."""

    code = "unsupported_field"


class ForbiddenField(InvalidRequest):
    """The request sets a field that only the platform may set."""

    code = "forbidden_field"


class MediaRefused(InvalidRequest):
    """Images, audio, files and URLs to them are not accepted; send text."""

    code = "media_not_supported"


class LimitExceeded(InvalidRequest):
    """The request asks for more than the policy allows in one request."""

    code = "limit_exceeded"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer together are longer than the model's context."""

    code = "context_length_exceeded"


class Unauthenticated(GatehouseError):
    """The credential is not valid."""

    status, code, type = 401, "invalid_credential", "authentication_error"


class MissingCredential(Unauthenticated):
    """Send an access token or a service key in the Authorization header, as a Bearer token."""

    code = "missing_credential"


class ExpiredCredential(Unauthenticated):
    """The credential has expired; get a new one."""

    code = "expired_credential"


class RevokedCredential(Unauthenticated):
    """The credential has been revoked."""

    code = "revoked_credential"


class NotPermitted(GatehouseError):
    """Not permitted to this identity."""

    status, code, type = 403, "not_permitted", "permission_error"


class BlockedByPolicy(NotPermitted):
    """The policy blocks this request."""

    code = "blocked_by_policy"


class NoAccount(NotPermitted):
    """Your department has no budget account; the owner of budgets can open one."""

    code = "no_budget_account"


class RouteNotFound(GatehouseError):
    """There is no such endpoint."""

    status, code, type = 404, "not_found", "invalid_request_error"


class ModelNotFound(GatehouseError):
    """The model does not exist or is not available to you; GET /v1/models lists yours."""

    status, code, type = 404, "model_not_found", "invalid_request_error"


class ObjectNotFound(GatehouseError):
    """There is no such object."""

    status, code, type = 404, "object_not_found", "invalid_request_error"


class MethodNotAllowed(GatehouseError):
    """The endpoint does not accept this HTTP method."""

    status, code, type = 405, "method_not_allowed", "invalid_request_error"


class RequestTimeout(GatehouseError):
    """The request was not received in time."""

    status, code, type = 408, "request_timeout", "invalid_request_error"


class ApprovalPending(GatehouseError):
    """The request waits for an approval."""

    status, code, type = 409, "approval_pending", "permission_error"


class RequestTooLarge(GatehouseError):
    """The request body is too large."""

    status, code, type = 413, "request_too_large", "invalid_request_error"


class UnsupportedMediaType(GatehouseError):
    """Send the body as application/json."""

    status, code, type = 415, "unsupported_media_type", "invalid_request_error"


class RateLimited(GatehouseError):
    """Too many requests in this minute."""

    status, code, type = 429, "rate_limit_exceeded", "rate_limit_error"


class TooManyParallel(RateLimited):
    """Too many requests at the same time."""

    code = "too_many_parallel_requests"


@dataclass(frozen=True, slots=True)
class Allowed:
    """What an account that cannot cover a request would still cover; estimates."""

    answer_tokens: int
    """Longest answer per choice to the same prompt by the same model; 0 for none."""
    model: str | None = None
    """A model of the small tier that may be asked instead, where one fits."""
    model_answer_tokens: int = 0
    """Longest answer per choice to the same prompt by that model."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """What is left of an account that cannot cover a request; ``None`` where it has no limit."""

    account: str
    """What ran out: the account that is charged, or one above it."""
    reset_us: int
    """When the budget is fresh again, microseconds since 1970 UTC."""
    gpu_us: int | None
    """Charged device-microseconds that a smaller request could still have."""
    tokens: int | None
    window: str | None = None
    """Kind of the window that ends then, such as ``month``."""
    quantity: str | None = None
    """``tokens`` or ``gpu_time``: which of the two is short."""
    limit: int | None = None
    """Of that quantity in the window: tokens, or charged device-microseconds."""
    spent: int | None = None
    """Of that quantity so far; same unit."""
    owner: str | None = None
    """Who owns the budget."""
    allowed: Allowed | None = None
    """What could be asked for instead; ``None`` where that was not looked at."""


class BudgetExhausted(RateLimited):
    """The account's budget is used up."""

    code = "budget_exhausted"

    def __init__(
        self,
        message: str = "",
        param: str | None = None,
        retry_after_s: int | None = None,
        rule_ids: tuple[str, ...] = (),
        shortage: Shortage | None = None,
    ) -> None:
        super().__init__(message, param, retry_after_s, rule_ids)
        self.args = (message, param, retry_after_s, rule_ids, shortage)
        self.shortage = shortage


class Overloaded(RateLimited):
    """The platform is at its limit; try again shortly."""

    code = "overloaded"


class DepartmentShareTaken(Overloaded):
    """The department uses its share of a model's engines while others wait; try again shortly."""

    code = "department_share_taken"


class ClientClosed(GatehouseError):
    """The client closed the connection."""

    status, code, type = 499, "client_closed_request", "invalid_request_error"


class InternalError(GatehouseError):
    """Something went wrong on our side; the request id helps to find out what."""

    code = "internal_error"


class EngineFailed(InternalError):
    """The engine failed while answering."""

    code = "engine_failed"


class Unavailable(GatehouseError):
    """The service is not available; try again shortly."""

    status, code, type = 503, "unavailable", "server_error"


class IdentityUnavailable(Unavailable):
    """The identity provider's keys cannot be had; try again shortly."""

    code = "identity_unavailable"


class ControlUnavailable(Unavailable):
    """The control plane has not been heard of for too long; service keys are refused meanwhile."""

    code = "control_plane_unavailable"


class AuditUnavailable(Unavailable):
    """The audit trail cannot be written, so nothing is answered."""

    code = "audit_unavailable"


class LedgerUnavailable(Unavailable):
    """The budget ledger cannot be reached, and what it lent is used up; try again shortly."""

    code = "ledger_unavailable"


class EngineUnavailable(Unavailable):
    """No engine for this model is ready; try again shortly."""

    code = "engine_unavailable"


class EngineTimeout(GatehouseError):
    """The engine did not answer in time."""

    status, code, type = 504, "engine_timeout", "server_error"
