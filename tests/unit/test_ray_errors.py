"""The table of Ray's and Serve's exceptions: complete, unwrapped, and silent about their text."""

from __future__ import annotations

import inspect

import pytest
from ray import exceptions as ray_errors
from ray.serve import exceptions as serve_errors

from deployments.data_plane.tickets import TRANSIENT, TicketRefusal, TicketRefused
from deployments.errors import TABLE, map_error
from governance.errors import (
    ClientClosed,
    ContextLengthExceeded,
    EngineFailed,
    EngineUnavailable,
    GatehouseError,
    InternalError,
    Overloaded,
)


def exceptions_of(module: object) -> list[type[BaseException]]:
    return [
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, BaseException) and cls.__module__ == module.__name__  # type: ignore[attr-defined]
    ]


NOT_AN_OUTCOME = {
    ray_errors.UserCodeException,  # base of RayTaskError's Data subclass; never raised bare
    ray_errors.RpcError,
    ray_errors.ObjectFreedError,
    ray_errors.ObjectRefStreamEndOfStreamError,  # consumed by Ray's generators
    ray_errors.StreamingGeneratorReplayInconsistentError,
    ray_errors.RayDirectTransportError,
}
"""Mapped by their base class on purpose."""


@pytest.mark.parametrize(
    "cls",
    [*exceptions_of(ray_errors), *exceptions_of(serve_errors)],
    ids=lambda cls: cls.__name__,
)
def test_every_exception_is_decided_upon(cls: type[BaseException]) -> None:
    assert (cls in TABLE) != (cls in NOT_AN_OUTCOME)


def wrapped(cause: Exception) -> Exception:
    """As an exception arrives from a replica."""
    text = "Traceback (most recent call last): /secret/path"
    error: Exception = ray_errors.RayTaskError(
        "run", text, cause, "ray::engine", 1, "127.0.0.1"
    ).as_instanceof_cause()
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ray_errors.ActorDiedError(), EngineFailed),
        (ray_errors.ActorUnavailableError("gone", None), EngineFailed),
        (ray_errors.WorkerCrashedError(), EngineFailed),
        (ray_errors.ObjectFreedError("00", "owner", "stack"), EngineFailed),
        (serve_errors.BackPressureError(9, 8), Overloaded),
        (serve_errors.DeploymentUnavailableError(None), EngineUnavailable),
        (serve_errors.RequestCancelledError("r-1"), ClientClosed),
        (wrapped(serve_errors.BackPressureError(9, 8)), Overloaded),
        (wrapped(ValueError("/secret/path")), InternalError),
        (ValueError("/secret/path"), InternalError),
    ],
)
def test_an_error_is_mapped_without_its_text(
    error: Exception, expected: type[GatehouseError]
) -> None:
    mapped = map_error(error)

    assert type(mapped) is expected
    assert mapped.message == expected().message
    assert "secret" not in repr(mapped)


def test_what_can_be_tried_again_says_when() -> None:
    assert map_error(serve_errors.BackPressureError(9, 8)).retry_after_s == 2
    assert map_error(ray_errors.ActorDiedError()).retry_after_s is None


def test_our_own_error_arrives_as_the_replica_raised_it() -> None:
    raised = ContextLengthExceeded("2,000 tokens; at most 1,024.", "messages")

    mapped = map_error(wrapped(raised))

    assert type(mapped) is ContextLengthExceeded
    assert (mapped.message, mapped.param) == ("2,000 tokens; at most 1,024.", "messages")


def test_serves_status_wrapper_is_taken_off() -> None:
    inner = ContextLengthExceeded("Too long.")

    assert map_error(wrapped(serve_errors.gRPCStatusError(inner))) is inner


@pytest.mark.parametrize("reason", TicketRefusal)
def test_a_refused_ticket_is_our_defect_unless_it_can_pass(reason: TicketRefusal) -> None:
    mapped = map_error(wrapped(TicketRefused(reason)))

    assert type(mapped) is (EngineUnavailable if reason in TRANSIENT else InternalError)
