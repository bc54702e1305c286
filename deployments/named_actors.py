"""Named, detached Ray actors: control plane, ledger, sealers. Starting them, and calling them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from governance.errors import GatehouseError

NAMESPACE = "gatehouse"
HEAD_NODE = "node:__internal_head__"
"""Resource that Ray gives to the head node alone."""
START_TIMEOUT_S = 60.0
"""Time that an actor has to start and answer, in seconds."""


def find_or_start(
    actor: type,
    name: str,
    arguments: tuple[Any, ...],
    *,
    node_id: str | None,
    namespace: str,
    max_concurrency: int | None = None,
) -> Any:
    """Handle of the actor of a name, created if there is none; it may not have started yet.

    It outlives who created it, and Ray starts it again when it dies. NOTE: it is never left to
    Ray's choice where: on another node it would find empty stores, and begin anew without a word.

    Args:
        actor: Its class.
        name: Unique within the namespace.
        arguments: For its constructor, also when Ray starts it again.
        node_id: Node of its volume; ``None`` for the head node.
        namespace: Ray namespace.
        max_concurrency: Calls of an asynchronous actor that may be open at once.
    """
    placement: dict[str, Any] = {"resources": {HEAD_NODE: 0.001}}
    if node_id is not None:
        placement = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}
    if max_concurrency is not None:
        placement["max_concurrency"] = max_concurrency
    actor_class: Any = ray.remote(actor)
    return actor_class.options(
        name=name,
        namespace=namespace,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        max_task_retries=-1,
        num_cpus=0,
        **placement,
    ).remote(*arguments)


@contextmanager
def starting(what: str, failure: type[Exception]) -> Iterator[None]:
    """Around the first call to an actor: what Ray raises becomes one line for the operator.

    Args:
        what: What it is to people, such as ``the budget ledger``.
        failure: Raised, with the line.
    """
    try:
        yield
    except RayActorError as error:
        reason = str(error).strip().splitlines()[-1]
        raise failure(f"{what} did not start: {reason}") from None
    except RayError as error:
        raise failure(
            f"{what} did not start within {START_TIMEOUT_S:.0f} s ({type(error).__name__})"
        ) from None


class RayLink:
    """Calls an actor; what Ray raises becomes one of our errors.

    Args:
        handle: The actor.
        what: What it is to people.
        unavailable: Raised when there is no answer.
        log: Where a failure that is not ours is named, by its class only.
    """

    def __init__(
        self, handle: Any, what: str, unavailable: type[GatehouseError], log: logging.Logger
    ) -> None:
        self._handle = handle
        self._what = what
        self._unavailable = unavailable
        self._log = log

    async def __call__(self, method: str, *args: Any) -> Any:
        """Call a method by name; raises what it raised, if it is ours, else ``unavailable``."""
        try:
            return await getattr(self._handle, method).remote(*args)
        except RayTaskError as error:
            if isinstance(error.cause, GatehouseError):
                raise error.cause from None
            self._log.error("%s: %s raised %s", self._what, method, type(error.cause).__name__)
            raise self._unavailable from error
        except RayError as error:
            raise self._unavailable from error
