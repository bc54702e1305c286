from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from governance.control.plane import SWEEP_INTERVAL_S, ControlPlane
from governance.control.records import KeySpec
from governance.control.snapshot import ControlSnapshot, GatewayIdentity, ReplicaAddress
from governance.control.store import ControlStore
from governance.errors import InvalidRequest

PEPPER = bytes(32)
BY = "f" * 64
A = "a" * 12
SPEC = KeySpec("x", "hr", ("analyst",), 3600)
REPLICA = ReplicaAddress("r1", "small", ("small",), "127.0.0.1", 9000, "sha256:00", "0.29.0")
GATEWAY = GatewayIdentity("g1", bytes(32))


@dataclass
class Seconds:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def seconds() -> Seconds:
    return Seconds()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ControlStore]:
    store = ControlStore(tmp_path / "control.sqlite", lambda: time.time_ns() // 1000)
    yield store
    store.close()


@pytest.fixture
def plane(store: ControlStore, seconds: Seconds) -> ControlPlane:
    return ControlPlane(store, PEPPER, seconds)


async def latest(plane: ControlPlane) -> ControlSnapshot:
    snapshot = await plane.watch("", 0, None, 2)
    assert snapshot is not None
    return snapshot


async def test_the_first_watch_answers_at_once(plane: ControlPlane) -> None:
    async with asyncio.timeout(0.2):
        assert (await latest(plane)).epoch


async def test_no_news_confirms_after_the_timeout(plane: ControlPlane) -> None:
    known = await latest(plane)
    started = time.monotonic()
    assert await plane.watch(known.epoch, known.version, None, 0.1) is None
    assert 0.09 < time.monotonic() - started < 1


async def test_a_watch_is_never_longer_than_half_a_registration(store: ControlStore) -> None:
    plane = ControlPlane(store, PEPPER, time.monotonic, registration_ttl_s=0.2)
    known = await latest(plane)
    async with asyncio.timeout(1):
        assert await plane.watch(known.epoch, known.version, None, 3600) is None


async def test_a_revocation_wakes_all_waiters_at_once(plane: ControlPlane) -> None:
    plane.create_key(A, "1" * 64, SPEC, BY)
    known = await latest(plane)
    waiting = [
        asyncio.create_task(plane.watch(known.epoch, known.version, None, 2)) for _ in range(50)
    ]
    await asyncio.sleep(0.02)
    # CPU of the test machine is shared: the fastest of a few tries says what the code costs.
    took_s = []
    for turn in range(3):
        plane.revoke_token(f"jti-{turn}", BY)
        changed = time.monotonic()
        snapshots = await asyncio.gather(*waiting)
        took_s.append(time.monotonic() - changed)
        assert all(s and f"jti-{turn}" in s.revocations.token_ids for s in snapshots)
        assert snapshots[0] is not None
        assert snapshots[0].version > known.version
        known = snapshots[0]
        waiting = [
            asyncio.create_task(plane.watch(known.epoch, known.version, None, 2)) for _ in range(50)
        ]
        await asyncio.sleep(0.02)
    for task in waiting:
        task.cancel()
    assert min(took_s) < 0.5


async def test_a_change_between_two_watches_is_not_missed(plane: ControlPlane) -> None:
    known = await latest(plane)
    plane.create_key(A, "1" * 64, SPEC, BY)
    async with asyncio.timeout(0.5):
        snapshot = await plane.watch(known.epoch, known.version, None, 2)
    assert snapshot is not None
    assert set(snapshot.service_keys) == {A}


async def test_each_change_is_published(plane: ControlPlane) -> None:
    plane.create_key(A, "1" * 64, SPEC, BY)
    plane.rotate_key(A, "b" * 12, "2" * 64, BY, None, 60)
    plane.revoke_key(A, BY)
    plane.revoke_token("jti", BY)
    entry = plane.revoke_subject("entra", "tid/oid", BY)
    snapshot = await latest(plane)
    assert set(snapshot.service_keys) == {A, "b" * 12}
    assert snapshot.revocations.key_ids == {A}
    assert snapshot.revocations.token_ids == {"jti"}
    assert snapshot.revocations.subjects == {("entra", "tid/oid"): entry.not_before_us}
    assert len(plane.events()) == 5
    assert len(plane.list_revocations()) == 3


async def test_an_answer_never_changes_later(plane: ControlPlane) -> None:
    before = await latest(plane)
    plane.create_key(A, "1" * 64, SPEC, BY)
    assert before.service_keys == {}


async def test_last_use_wakes_nobody(plane: ControlPlane) -> None:
    plane.create_key(A, "1" * 64, SPEC, BY)
    known = await latest(plane)
    plane.touch_keys({A: 1})
    assert await plane.watch(known.epoch, known.version, None, 0.05) is None
    assert plane.get_key(A).last_used_us == 1


async def test_registrations_live_five_seconds_after_the_last_watch(
    plane: ControlPlane, seconds: Seconds
) -> None:
    first = await plane.watch("", 0, REPLICA, 0)
    second = await plane.watch("", 0, GATEWAY, 0)
    assert first is not None
    assert second is not None
    assert (second.replicas, second.gateways) == ((REPLICA,), (GATEWAY,))
    seconds.now_s += 4.9
    assert await plane.watch(second.epoch, second.version, REPLICA, 0) is None
    seconds.now_s += 4.9
    plane.sweep()
    assert (plane.snapshot.replicas, plane.snapshot.gateways) == ((REPLICA,), ())
    seconds.now_s += 0.1
    plane.sweep()
    assert plane.snapshot.replicas == ()


async def test_an_expired_registration_wakes_waiters(plane: ControlPlane, seconds: Seconds) -> None:
    await plane.watch("", 0, REPLICA, 0)
    known = await latest(plane)
    waiting = asyncio.create_task(plane.watch(known.epoch, known.version, None, 2))
    sweeper = asyncio.create_task(plane.run())
    await asyncio.sleep(0)
    seconds.now_s += 5
    async with asyncio.timeout(SWEEP_INTERVAL_S + 1):
        snapshot = await waiting
    assert snapshot is not None
    assert snapshot.replicas == ()
    sweeper.cancel()
    with suppress(asyncio.CancelledError):
        await sweeper


async def test_a_sweep_without_news_publishes_nothing(plane: ControlPlane) -> None:
    version = plane.snapshot.version
    plane.sweep()
    assert plane.snapshot.version == version


async def test_deregistering_is_immediate(plane: ControlPlane) -> None:
    await plane.watch("", 0, REPLICA, 0)
    await plane.watch("", 0, GATEWAY, 0)
    plane.deregister("r1")
    plane.deregister("unknown")
    assert (plane.snapshot.replicas, plane.snapshot.gateways) == ((), (GATEWAY,))


async def test_a_changed_registration_replaces_the_old_one(plane: ControlPlane) -> None:
    await plane.watch("", 0, REPLICA, 0)
    moved = replace(REPLICA, port=9001)
    snapshot = await plane.watch("", 0, moved, 0)
    assert snapshot is not None
    assert snapshot.replicas == (moved,)


@pytest.mark.parametrize(
    "registration",
    [
        GatewayIdentity("g", bytes(31)),
        GatewayIdentity("g", b""),
        replace(REPLICA, port=0),
        replace(REPLICA, port=65_536),
    ],
)
async def test_a_registration_that_cannot_be_one_is_refused(
    plane: ControlPlane, registration: GatewayIdentity | ReplicaAddress
) -> None:
    with pytest.raises(InvalidRequest):
        await plane.watch("", 0, registration, 0)
    assert plane.snapshot.replicas == ()
    assert plane.snapshot.gateways == ()


async def test_a_restart_is_another_epoch_with_the_same_keys(
    plane: ControlPlane, store: ControlStore, seconds: Seconds
) -> None:
    plane.create_key(A, "1" * 64, SPEC, BY)
    plane.revoke_key(A, BY)
    known = await plane.watch("", 0, REPLICA, 0)
    assert known is not None
    restarted = ControlPlane(store, PEPPER, seconds)
    while restarted.snapshot.version < known.version:
        restarted.revoke_token(f"jti-{restarted.snapshot.version}", BY)
    async with asyncio.timeout(0.5):
        snapshot = await restarted.watch(known.epoch, known.version, None, 2)
    assert snapshot is not None
    assert snapshot.epoch != known.epoch
    assert (snapshot.service_keys, snapshot.replicas) == (known.service_keys, ())
    assert A in snapshot.revocations.key_ids


async def test_what_another_process_writes_is_published(
    plane: ControlPlane, tmp_path: Path
) -> None:
    plane.create_key(A, "1" * 64, SPEC, BY)
    other = ControlStore(tmp_path / "control.sqlite", lambda: time.time_ns() // 1000)
    other.keys.revoke(A, BY)
    other.close()
    plane.sweep()
    assert plane.snapshot.revocations.key_ids == {A}


async def test_a_failing_sweep_is_tried_again(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def sweep() -> None:
        calls.append(1)
        raise OSError("disk")

    monkeypatch.setattr(plane, "sweep", sweep)
    monkeypatch.setattr("governance.control.plane.SWEEP_INTERVAL_S", 0.01)
    task = asyncio.create_task(plane.run())
    await asyncio.sleep(0.1)
    assert len(calls) > 1
    task.cancel()
