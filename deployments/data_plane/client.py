"""The ``Engine`` port over the gateway's own connections to engine replicas."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import random
import ssl
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import orjson

from deployments.data_plane.connection import RequestConnection
from deployments.data_plane.frames import FrameError, FrameType
from deployments.data_plane.options import ClientOptions
from deployments.data_plane.replica import Replica
from deployments.data_plane.session import DETOKENIZE
from deployments.data_plane.tickets import TicketSigner
from governance.control.snapshot import ReplicaAddress
from governance.errors import (
    DepartmentShareTaken,
    EngineFailed,
    EngineTimeout,
    EngineUnavailable,
    GatehouseError,
    Overloaded,
    RequestTooLarge,
)
from governance.types import Dispatch, EngineEvent, EngineFinished, EngineStarted
from routing.affinity import DepartmentShare, choose
from routing.types import ModelLoad

RETRY_UNAVAILABLE_S = 2
RETRY_OVERLOADED_S = 1
DEFAULT_SLOTS = 256

_TRY_ANOTHER = (EngineUnavailable, Overloaded)
"""What a replica answers when it has not begun: the request may go elsewhere."""


class _NotTaken(Exception):
    """A replica did not take the request, and certainly has not begun it."""

    def __init__(self, error: GatehouseError) -> None:
        super().__init__(error)
        self.error = error


class DataPlaneEngine:
    """Chooses a replica, sends the request with its ticket, and streams the answer.

    A request is offered to each replica at most once, and only while it is certain that none has
    begun it: the connection was refused, or the replica said so. A replica that dies after the
    request was sent fails the request, also before its first event. Sending it on could replay
    what killed that replica on all the others, and would charge the work twice.

    Use it on one event loop; ``update`` from the same.

    Args:
        signer: Mints a ticket per attempt.
        start_timeout_s: Time until an engine has taken the request, over all replicas tried.
        chunk_timeout_s: Longest silence of an engine while its answer is being waited for.
        max_in_flight: Requests that this gateway has open at one replica, by base model; 256 for
            a model that is not named. The replica has the same bound over all gateways.
        options: The other bounds.
        tls: Context for mutual TLS (``tls.client_context``), or ``None``.
        rng: Draws of the replica choice and of reconnect jitter.

    """

    def __init__(
        self,
        signer: TicketSigner,
        *,
        start_timeout_s: float = 30.0,
        chunk_timeout_s: float = 120.0,
        max_in_flight: Mapping[str, int] | None = None,
        options: ClientOptions | None = None,
        tls: ssl.SSLContext | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.options = options or ClientOptions()
        self.in_flight = 0
        self.refused: Counter[str] = Counter()
        """Tickets of ours that replicas refused, by reason."""
        self.retries = 0
        """Requests offered to one more replica."""
        self._start_timeout_s = start_timeout_s
        self._chunk_timeout_s = chunk_timeout_s
        self._slots = dict(max_in_flight or {})
        self._signer = signer
        self._tls = tls
        self._rng = rng or random.Random()  # noqa: S311 - load balancing, not security
        self._share = DepartmentShare(self.options.department_share_milli)
        self._replicas: dict[str, Replica] = {}
        self._closing: set[asyncio.Task[None]] = set()

    # -- replicas -----------------------------------------------------------------------------

    def update(self, addresses: Sequence[ReplicaAddress]) -> None:
        """Take in the replicas of a control snapshot.

        New ones are connected to; those that vanished are used while their connection lives.
        """
        for gone in [key for key, replica in self._replicas.items() if replica.ended]:
            del self._replicas[gone]
        named = {address.replica_id: address for address in addresses}
        for replica_id, replica in self._replicas.items():
            replica.retired = named.get(replica_id) != replica.address
        for replica_id, address in named.items():
            known = self._replicas.get(replica_id)
            if known is not None and known.address == address:
                continue
            if known is not None:
                self._discard(known)
            self._replicas[replica_id] = Replica(
                address, self._signer, self.options, self._tls, self._rng
            )

    def _discard(self, replica: Replica) -> None:
        task = asyncio.get_running_loop().create_task(replica.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def ready(self, base_model: str) -> bool:
        """Whether at least one replica of this model can take requests."""
        return any(
            replica.live and replica.address.base_model == base_model
            for replica in self._replicas.values()
        )

    def load(self, base_model: str) -> ModelLoad:
        """How busy the live replicas of this model are, by what they pushed last."""
        live = [
            replica
            for replica in self._replicas.values()
            if replica.address.base_model == base_model and replica.live
        ]
        states = [replica.state(with_prefixes=False) for replica in live]
        return ModelLoad(
            replicas=len(live),
            running=sum(state.running for state in states),
            waiting=sum(state.waiting for state in states),
            slots=len(live) * self._slots.get(base_model, DEFAULT_SLOTS),
            in_flight=sum(state.in_flight for state in states),
        )

    @property
    def buffered_bytes(self) -> int:
        """Bytes of answers in user space that consumers have not taken yet."""
        return sum(replica.buffered_bytes for replica in self._replicas.values())

    async def close(self) -> None:
        """Close every connection; requests in flight fail."""
        for replica in self._replicas.values():
            self._discard(replica)
        self._replicas.clear()
        await asyncio.gather(*self._closing)

    # -- the port -----------------------------------------------------------------------------

    async def stream(self, dispatch: Dispatch) -> AsyncGenerator[EngineEvent, None]:
        """Run a request; see ``governance.ports.Engine.stream``.

        Raises:
            EngineUnavailable: No replica is ready, or none took the request.
            Overloaded: Every replica, this gateway, or the department's share is full.
            EngineFailed: The replica died after it was sent the request.
            EngineTimeout: Not started within ``start_timeout_s``, or silent for
                ``chunk_timeout_s``.
            GatehouseError: As the engine reported it.

        """
        if self.in_flight >= self.options.max_open_requests:
            raise Overloaded("", None, RETRY_OVERLOADED_S)
        start_by = asyncio.get_running_loop().time() + self._start_timeout_s
        digest = hashlib.sha256(dispatch.body).digest()
        tried: dict[str, GatehouseError] = {}
        self.in_flight += 1
        try:
            while True:
                replica = self._choose(dispatch, tried)
                replica.enter(dispatch.department, dispatch.affinity)
                connection: RequestConnection | None = None
                try:
                    connection = await self._acquire(replica, start_by)
                    ticket = self._signer.mint(dispatch, digest, replica.id)
                    header = {
                        "ticket": base64.b64encode(ticket).decode(),
                        "operation": dispatch.operation.value,
                    }
                    if dispatch.affinity is not None:
                        header["affinity"] = dispatch.affinity
                    started = await self._begin(
                        connection, FrameType.REQUEST, header, dispatch.body, start_by
                    )
                    yield replace(cast(EngineStarted, started), replicas_asked=len(tried) + 1)
                    connection.set_chunk_timeout(self._chunk_timeout_s)
                    while True:
                        event = cast(EngineEvent, await connection.receive())
                        if type(event) is EngineFinished:
                            break
                        yield event
                except _NotTaken as refusal:
                    tried[replica.id] = refusal.error
                    self.retries += 1
                    continue
                finally:
                    replica.leave(dispatch.department)
                    if connection is not None:
                        replica.release(connection)
                yield event
                return
        finally:
            self.in_flight -= 1

    async def detokenize(self, base_model: str, prompts: list[list[int]]) -> list[str]:
        """Text of token-id prompts; see ``governance.ports.Engine.detokenize``.

        Raises:
            InvalidRequest: An id is outside the vocabulary.
            EngineUnavailable: No replica is ready.
            EngineFailed: The replica died, or answered something else.

        """
        body = orjson.dumps(prompts)
        start_by = asyncio.get_running_loop().time() + self._start_timeout_s
        tried: dict[str, GatehouseError] = {}
        while True:
            live = self._live(base_model, base_model, tried)
            replica = min(live, key=lambda replica: replica.in_flight)
            connection: RequestConnection | None = None
            try:
                connection = await self._acquire(replica, start_by)
                ticket = self._signer.mint_internal(DETOKENIZE, base_model, body, replica.id)
                header = {"ticket": base64.b64encode(ticket).decode()}
                answer = await self._begin(connection, FrameType.DETOKENIZE, header, body, start_by)
            except _NotTaken as refusal:
                tried[replica.id] = refusal.error
                continue
            finally:
                if connection is not None:
                    replica.release(connection)
            texts = orjson.loads(answer) if type(answer) is bytes else None
            if not isinstance(texts, list) or len(texts) != len(prompts):
                raise EngineFailed()
            return texts

    # -- steps --------------------------------------------------------------------------------

    def _live(self, base_model: str, model: str, tried: dict[str, GatehouseError]) -> list[Replica]:
        """Replicas that may still be asked; raises when there are none."""
        live = [
            replica
            for replica in self._replicas.values()
            if replica.address.base_model == base_model
            and replica.id not in tried
            and model in replica.address.served
            and replica.live
        ]
        if live:
            return live
        for error in tried.values():
            if not isinstance(error, EngineUnavailable):
                raise error
        raise EngineUnavailable("", None, RETRY_UNAVAILABLE_S)

    def _choose(self, dispatch: Dispatch, tried: dict[str, GatehouseError]) -> Replica:
        """Replica for the next attempt.

        Raises:
            EngineUnavailable: None is left that is ready.
            Overloaded: All that are ready are full, for everyone or for this department.

        """
        live = self._live(dispatch.base_model, dispatch.model, tried)
        slots = self._slots.get(dispatch.base_model, DEFAULT_SLOTS)
        free = [replica for replica in live if replica.in_flight < slots]
        if not free:
            raise Overloaded("", None, RETRY_OVERLOADED_S)
        keyed = dispatch.affinity is not None
        states = {}
        for replica in free:
            state = replica.state(keyed)
            held = replica.departments[dispatch.department]
            if self._share.admits(state, slots, held, replica.in_flight - held):
                states[replica.id] = state
        chosen = choose(list(states.values()), dispatch.affinity, self._rng)
        if chosen is None:
            raise DepartmentShareTaken(
                "Your department has its share of this model's engines in use while others wait; "
                "try again shortly.",
                None,
                RETRY_OVERLOADED_S,
            )
        return self._replicas[chosen.replica_id]

    async def _acquire(self, replica: Replica, start_by: float) -> RequestConnection:
        """A connection; one that cannot be had is a reason to try another replica."""
        try:
            return await replica.acquire(start_by)
        except OSError:  # TimeoutError among them
            if asyncio.get_running_loop().time() >= start_by:
                raise EngineTimeout() from None
            raise _NotTaken(EngineUnavailable("", None, RETRY_UNAVAILABLE_S)) from None
        except EngineUnavailable as error:
            raise _NotTaken(error) from None

    async def _begin(
        self,
        connection: RequestConnection,
        kind: FrameType,
        header: dict[str, str],
        body: bytes,
        start_by: float,
    ) -> EngineStarted | bytes:
        """Send, and wait for the first event."""
        try:
            connection.send(kind, header, body, start_by)
        except FrameError:
            raise RequestTooLarge() from None
        except EngineUnavailable as error:
            raise _NotTaken(error) from None
        try:
            event = await connection.receive()
        except GatehouseError as error:
            if connection.refusal is not None:
                self.refused[connection.refusal] += 1
            if isinstance(error, _TRY_ANOTHER):
                raise _NotTaken(error) from None
            raise
        if not isinstance(event, EngineStarted | bytes):
            raise EngineFailed()
        return event
