"""Exceptions of Ray and Ray Serve -> ``governance.errors``: the one table.

The original of an exception that crossed a handle is in ``.cause``; ``str()`` of the wrapper is a
traceback of the replica, so neither is ever put into a message. A class that the table does not
name is mapped by its nearest base, in the end ``InternalError``; a test fails when Ray adds one.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray import exceptions as ray_errors
from ray.serve import exceptions as serve_errors

from deployments.data_plane.tickets import TicketRefused
from deployments.data_plane.wire_errors import refusal_error
from governance.errors import (
    ClientClosed,
    EngineFailed,
    EngineTimeout,
    EngineUnavailable,
    GatehouseError,
    InternalError,
    Overloaded,
)

RETRY_AFTER_S = 2

TABLE: Mapping[type[BaseException], type[GatehouseError]] = {
    # Serve
    serve_errors.BackPressureError: Overloaded,
    serve_errors.DeploymentUnavailableError: EngineUnavailable,
    serve_errors.ReplicaUnavailableError: EngineUnavailable,
    serve_errors.RequestCancelledError: ClientClosed,
    serve_errors.gRPCStatusError: InternalError,
    serve_errors.RayServeException: InternalError,
    # The replica's process, node or storage died under the request
    ray_errors.ActorDiedError: EngineFailed,
    ray_errors.ActorUnavailableError: EngineFailed,
    ray_errors.RayActorError: EngineFailed,
    ray_errors.WorkerCrashedError: EngineFailed,
    ray_errors.LocalRayletDiedError: EngineFailed,
    ray_errors.NodeDiedError: EngineFailed,
    ray_errors.OwnerDiedError: EngineFailed,
    ray_errors.OutOfMemoryError: EngineFailed,
    ray_errors.OutOfDiskError: EngineFailed,
    ray_errors.ObjectStoreFullError: EngineFailed,
    ray_errors.ObjectLostError: EngineFailed,
    ray_errors.ObjectFetchTimedOutError: EngineFailed,
    ray_errors.ObjectReconstructionFailedError: EngineFailed,
    ray_errors.ReferenceCountingAssertionError: EngineFailed,
    ray_errors.PlasmaObjectNotAvailable: EngineFailed,
    ray_errors.AsyncioActorExit: EngineFailed,
    ray_errors.RayTaskError: EngineFailed,
    ray_errors.UnserializableException: EngineFailed,
    # Nothing to run on
    ray_errors.ActorUnschedulableError: EngineUnavailable,
    ray_errors.TaskUnschedulableError: EngineUnavailable,
    ray_errors.ActorPlacementGroupRemoved: EngineUnavailable,
    ray_errors.TaskPlacementGroupRemoved: EngineUnavailable,
    ray_errors.RuntimeEnvSetupError: EngineUnavailable,
    ray_errors.ActorHandleNotFoundError: EngineUnavailable,
    ray_errors.PendingCallsLimitExceeded: Overloaded,
    ray_errors.RayCgraphCapacityExceeded: Overloaded,
    # Time
    ray_errors.GetTimeoutError: EngineTimeout,
    ray_errors.RayChannelTimeoutError: EngineTimeout,
    TimeoutError: EngineTimeout,
    # Cancelled on our side
    ray_errors.TaskCancelledError: ClientClosed,
    # A defect of ours
    ray_errors.ActorAlreadyExistsError: InternalError,
    ray_errors.AuthenticationError: InternalError,
    ray_errors.CrossLanguageError: InternalError,
    ray_errors.OufOfBandObjectRefSerializationException: InternalError,
    ray_errors.RayChannelError: InternalError,
    ray_errors.RaySystemError: InternalError,
    ray_errors.RayError: InternalError,
}

_TRY_AGAIN = (Overloaded, EngineUnavailable)


def unwrap(error: BaseException) -> BaseException:
    """The exception that the replica raised, out of Ray's wrappers."""
    for _ in range(8):
        cause = (
            error.original_exception
            if isinstance(error, serve_errors.gRPCStatusError)
            else getattr(error, "cause", None)
        )
        if not isinstance(error, ray_errors.RayTaskError | serve_errors.gRPCStatusError) or (
            not isinstance(cause, BaseException)
        ):
            break
        error = cause
    return error


def map_error(error: BaseException) -> GatehouseError:
    """The client-visible error for whatever a handle raised.

    Our own errors pass through as the replica raised them.
    """
    error = unwrap(error)
    if isinstance(error, GatehouseError):
        return error
    if isinstance(error, TicketRefused):
        return refusal_error(error.reason)
    for cls in type(error).__mro__:
        mapped = TABLE.get(cls)
        if mapped is not None:
            return mapped("", None, RETRY_AFTER_S if issubclass(mapped, _TRY_AGAIN) else None)
    return InternalError()
