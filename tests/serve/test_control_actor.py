"""The control plane as a real Ray actor: it dies, comes back, and nobody who watches is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from deployments.control_actor import (
    ACTOR_NAME,
    ControlClient,
    ControlStartError,
    get_or_start_control,
)
from governance.control.records import KeySpec
from governance.control.snapshot import GatewayIdentity, ReplicaAddress
from governance.errors import InvalidRequest, ObjectNotFound, RevokedCredential
from governance.identity.service_keys import ServiceKeyChecker

BY = "f" * 64
SPEC = KeySpec("x", "hr", ("analyst",), 3600)
GATEWAY = GatewayIdentity("g1", bytes(32))
REPLICA = ReplicaAddress("r1", "small", ("small",), "127.0.0.1", 9000, "sha256:00", "0.29.0")


@pytest.fixture
def namespace(ray_local: None, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of its own, so that each test starts with no control plane."""
    name = f"test-{request.node.name}"
    yield name
    try:
        ray.kill(ray.get_actor(ACTOR_NAME, name), no_restart=True)
    except ValueError:
        assert request.node.name == "test_a_lost_pepper_is_a_clear_error"


@pytest.fixture
async def clients(namespace: str, tmp_path: Path) -> AsyncIterator[list[ControlClient]]:
    """A gateway and an engine replica."""
    pair = [ControlClient(tmp_path, namespace=namespace) for _ in range(2)]
    for client, registration in zip(pair, (GATEWAY, REPLICA), strict=True):
        await client.start(registration)
    for client in pair:
        await client.ready(60)
    yield pair
    for client in pair:
        await client.stop()


async def until(condition: Callable[[], object], timeout_s: float) -> float:
    """Wait for a condition; gives the seconds it took."""
    started = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)
    return time.monotonic() - started


def here(client: ControlClient) -> tuple[int, int]:
    return len(client.snapshot.replicas), len(client.snapshot.gateways)


async def test_both_see_each_other_and_a_revocation_within_two_seconds(
    clients: list[ControlClient],
) -> None:
    await until(lambda: all(here(client) == (1, 1) for client in clients), 5)
    issued = await clients[0].create_key(SPEC, BY)
    key_id = issued.key.key_id
    await until(lambda: all(key_id in c.snapshot.service_keys for c in clients), 2)
    pepper = await clients[0].pepper()
    assert pepper == await clients[1].pepper()
    checkers = [
        ServiceKeyChecker(
            lambda client=client: client.snapshot,  # type: ignore[misc]
            client.age_s,
            pepper,
            lambda: time.time_ns() // 1000,
        )
        for client in clients
    ]
    for checker in checkers:
        assert checker.check(issued.key.text()).key_id == key_id
    await clients[0].revoke_key(key_id, BY)
    took_s = await until(lambda: all(c.snapshot.revocations.key_ids for c in clients), 2)
    for checker in checkers:
        with pytest.raises(RevokedCredential):
            checker.check(issued.key.text())
    print(f"revocation seen by both after {took_s * 1000:.0f} ms")


async def test_errors_cross_the_actor_as_ours(clients: list[ControlClient]) -> None:
    with pytest.raises(ObjectNotFound):
        await clients[0].revoke_key("a" * 12, BY)
    with pytest.raises(InvalidRequest) as refused:
        await clients[0].revoke_token("jti", BY, expires_us=1)
    assert refused.value.param == "expires_at"
    assert refused.value.message == "The token has expired already."


@pytest.mark.parametrize("forever", [False, True])
async def test_clients_recover_when_the_actor_is_killed(
    clients: list[ControlClient], namespace: str, forever: bool
) -> None:
    await until(lambda: all(here(client) == (1, 1) for client in clients), 5)
    issued = await clients[0].create_key(SPEC, BY)
    key_id = issued.key.key_id
    await until(lambda: all(key_id in c.snapshot.service_keys for c in clients), 2)
    epoch = clients[0].snapshot.epoch
    worst: list[tuple[int, int]] = []
    clients[0].on_change(lambda snapshot: worst.append(here(clients[0])))

    handle: Any = await asyncio.to_thread(ray.get_actor, ACTOR_NAME, namespace)
    await asyncio.to_thread(ray.kill, handle, no_restart=forever)
    assert key_id in clients[0].snapshot.service_keys, "requests go on with the copy"
    took_s = await until(lambda: all(c.snapshot.epoch != epoch for c in clients), 40)
    print(f"another epoch after {took_s:.1f} s")

    assert key_id in clients[1].snapshot.service_keys
    assert min(worst) == (1, 1), "no healthy engine or gateway was dropped meanwhile"
    await clients[1].revoke_key(key_id, BY)
    await until(lambda: all(c.snapshot.revocations.key_ids for c in clients), 2)
    await asyncio.sleep(5.5)
    assert [here(client) for client in clients] == [(1, 1), (1, 1)], "both registered again"
    assert all(client.age_s() < 5 for client in clients)


async def test_stopping_deregisters_at_once(clients: list[ControlClient]) -> None:
    await until(lambda: here(clients[0]) == (1, 1), 5)
    await clients[1].stop()
    await until(lambda: here(clients[0]) == (0, 1), 1)


@ray.remote(num_cpus=0)
class Gateway:
    """A client in another process, as gateways are."""

    def __init__(self, state_dir: str, namespace: str) -> None:
        self._client = ControlClient(state_dir, namespace=namespace)

    async def start(self) -> bytes:
        await self._client.start(GatewayIdentity("far", bytes(32)))
        await self._client.ready(60)
        return await self._client.pepper()

    async def revoked(self) -> frozenset[str]:
        return self._client.snapshot.revocations.token_ids


async def test_a_gateway_that_dies_disappears_and_one_far_away_hears_of_revocations(
    clients: list[ControlClient], namespace: str, tmp_path: Path
) -> None:
    far: Any = Gateway.remote(str(tmp_path), namespace)  # type: ignore[attr-defined]
    assert await far.start.remote() == await clients[0].pepper()
    await until(lambda: here(clients[0]) == (1, 2), 5)
    await clients[0].revoke_token("jti", BY)
    async with asyncio.timeout(2):
        while "jti" not in await far.revoked.remote():  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
    await asyncio.to_thread(ray.kill, far)
    took_s = await until(lambda: here(clients[0]) == (1, 1), 8)
    print(f"a dead gateway was gone after {took_s:.1f} s")


async def test_a_lost_pepper_is_a_clear_error(namespace: str, tmp_path: Path) -> None:
    handle = await asyncio.to_thread(get_or_start_control, tmp_path, None, namespace)
    await asyncio.to_thread(ray.kill, handle, no_restart=True)
    (tmp_path / "keys" / "pepper").unlink()
    await asyncio.sleep(0.5)
    with pytest.raises(ControlStartError, match="missing"):
        await asyncio.to_thread(get_or_start_control, tmp_path, None, namespace)
