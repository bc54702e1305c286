"""The copy over a control plane in the same process, through a link that tests break."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments import control_copy
from deployments.control_copy import ControlCopy
from governance.control.plane import ControlPlane
from governance.control.records import KeySpec
from governance.control.snapshot import ControlSnapshot, GatewayIdentity, ReplicaAddress
from governance.control.store import ControlStore
from governance.errors import ControlUnavailable, ObjectNotFound, RevokedCredential
from governance.identity.service_keys import ServiceKeyChecker

PEPPER = bytes(range(32))
BY = "f" * 64
SPEC = KeySpec("x", "hr", ("analyst",), 3600)
REPLICA = ReplicaAddress("r1", "small", ("small",), "127.0.0.1", 9000, "sha256:00", "0.29.0")
GATEWAY = GatewayIdentity("g1", bytes(32))


def now_us() -> int:
    return time.time_ns() // 1000


class Cluster:
    """A control plane that can be down, lose answers and restart."""

    def __init__(self, store: ControlStore) -> None:
        self.store = store
        self.plane = ControlPlane(store, PEPPER, time.monotonic)
        self.up = True
        self.lose_answers = 0
        self.resolved = 0
        self.skew_s = 0.0

    def restart(self) -> None:
        self.plane = ControlPlane(self.store, PEPPER, time.monotonic)

    async def resolve(self) -> Cluster:
        self.resolved += 1
        if not self.up:
            raise ValueError("no actor with this name in namespace /somewhere")
        return self

    async def __call__(self, method: str, *args: Any) -> Any:
        if not self.up:
            raise OSError("connection refused")
        answer = getattr(self.plane, method)(*args)
        if asyncio.iscoroutine(answer):
            answer = await answer
        if not self.up:
            raise OSError("connection lost")
        if self.lose_answers and method != "watch":
            self.lose_answers -= 1
            raise OSError("connection lost")
        return answer

    def monotonic(self) -> float:
        return time.monotonic() + self.skew_s


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    store = ControlStore(tmp_path / "control.sqlite", now_us)
    yield Cluster(store)
    store.close()


@pytest.fixture
async def copy(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ControlCopy]:
    monkeypatch.setattr(control_copy, "WATCH_TIMEOUT_S", 0.1)
    monkeypatch.setattr(control_copy, "FIRST_BACKOFF_S", 0.02)
    monkeypatch.setattr(control_copy, "LAST_BACKOFF_S", 0.05)
    copy = ControlCopy(cluster.resolve, monotonic=cluster.monotonic)
    yield copy
    await copy.stop()


async def until(condition: Callable[[], object], timeout_s: float = 2) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


def contents(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.iterdir())


async def test_before_the_first_answer_the_copy_is_empty_and_infinitely_old(
    copy: ControlCopy,
) -> None:
    assert copy.snapshot == ControlSnapshot()
    assert copy.age_s() == float("inf")
    with pytest.raises(ControlUnavailable):
        await copy.ready(0.01)


async def test_the_copy_follows(copy: ControlCopy, cluster: Cluster) -> None:
    seen: list[ControlSnapshot] = []
    copy.on_change(seen.append)
    await copy.start(GATEWAY)
    await copy.ready(1)
    assert copy.snapshot.gateways == (GATEWAY,)
    issued = await copy.create_key(SPEC, BY)
    await until(lambda: issued.key.key_id in copy.snapshot.service_keys)
    assert seen[-1] == copy.snapshot
    late: list[ControlSnapshot] = []
    copy.on_change(late.append)
    assert late == [copy.snapshot]


async def test_an_issued_key_works_until_it_is_revoked(copy: ControlCopy, cluster: Cluster) -> None:
    await copy.start(GATEWAY)
    checker = ServiceKeyChecker(lambda: copy.snapshot, copy.age_s, await copy.pepper(), now_us)
    issued = await copy.create_key(SPEC, BY)
    await until(lambda: issued.key.key_id in copy.snapshot.service_keys)
    assert checker.check(issued.key.text()).department == "hr"
    await copy.revoke_key(issued.key.key_id, BY)
    await until(lambda: copy.snapshot.revocations.key_ids)
    with pytest.raises(RevokedCredential):
        checker.check(issued.key.text())


async def test_the_secret_does_not_reach_the_control_plane(
    cluster: Cluster, tmp_path: Path
) -> None:
    sent: list[str] = []
    real = cluster.__call__

    async def spy(method: str, *args: Any) -> Any:
        sent.append(repr(args))
        return await real(method, *args)

    async def resolve() -> Any:
        return spy

    copy = ControlCopy(resolve)
    issued = await copy.create_key(SPEC, BY)
    rotated = await copy.rotate_key(issued.key.key_id, BY, None, 60)
    files = contents(tmp_path)
    for key in (issued.key, rotated.key):
        assert key.text().split("_")[2] not in str(sent)
        assert key.secret.hex() not in str(sent)
        assert repr(key.secret) not in str(sent)
        assert key.secret not in files
        assert key.text().split("_")[2].encode() not in files


async def test_idle_watches_keep_the_copy_fresh(copy: ControlCopy) -> None:
    await copy.start()
    await copy.ready(1)
    for _ in range(10):
        await asyncio.sleep(0.05)
        assert copy.age_s() < 1


async def test_an_outage_ages_the_copy_and_raises_into_nothing(
    copy: ControlCopy, cluster: Cluster
) -> None:
    await copy.start(GATEWAY)
    issued = await copy.create_key(SPEC, BY)
    await until(lambda: issued.key.key_id in copy.snapshot.service_keys)
    checker = ServiceKeyChecker(lambda: copy.snapshot, copy.age_s, PEPPER, now_us)
    cluster.up = False
    await asyncio.sleep(0.2)
    checker.check(issued.key.text())
    cluster.skew_s = 11
    assert copy.age_s() > 10
    with pytest.raises(ControlUnavailable):
        checker.check(issued.key.text())
    cluster.up = True
    await until(lambda: copy.age_s() < 1)
    checker.check(issued.key.text())
    assert cluster.resolved > 1, "the control plane was looked for again"


async def test_age_counts_from_when_the_call_was_sent(cluster: Cluster) -> None:
    """A slow answer may be old when it arrives."""

    async def resolve() -> Any:
        return slow

    async def slow(method: str, *args: Any) -> Any:
        answer = await cluster(method, *args)
        await asyncio.sleep(0.3)
        return answer

    copy = ControlCopy(resolve)
    await copy.start()
    await copy.ready(2)
    assert copy.age_s() >= 0.3
    await copy.stop()


async def test_a_restart_drops_no_healthy_engine_and_forgets_dead_ones(
    copy: ControlCopy, cluster: Cluster
) -> None:
    await copy.start(GATEWAY)
    await cluster.plane.watch("", 0, REPLICA, 0)
    await until(lambda: copy.snapshot.replicas == (REPLICA,))
    seen: list[tuple[ReplicaAddress, ...]] = []
    copy.on_change(lambda snapshot: seen.append(snapshot.replicas))
    epoch = copy.snapshot.epoch
    cluster.restart()
    await until(lambda: copy.snapshot.epoch != epoch)
    await until(lambda: cluster.plane.snapshot.gateways == (GATEWAY,))
    assert cluster.plane.snapshot.replicas == ()
    assert copy.snapshot.replicas == (REPLICA,)
    assert () not in seen
    cluster.skew_s = 5
    await until(lambda: copy.snapshot.replicas == ())
    assert copy.snapshot.gateways == (GATEWAY,)


async def test_revocations_after_a_restart_are_not_held_back(
    copy: ControlCopy, cluster: Cluster
) -> None:
    await copy.start(GATEWAY)
    await copy.ready(1)
    cluster.restart()
    cluster.plane.revoke_token("jti", BY)
    await until(lambda: "jti" in copy.snapshot.revocations.token_ids)


async def test_an_answer_that_got_lost_makes_one_key(copy: ControlCopy, cluster: Cluster) -> None:
    await copy.pepper()
    cluster.lose_answers = 1
    issued = await copy.create_key(SPEC, BY)
    assert [e.record.key_id for e in await copy.list_keys()] == [issued.key.key_id]
    cluster.lose_answers = 1
    rotated = await copy.rotate_key(issued.key.key_id, BY, None, 60)
    assert rotated.entry.record.replaces == issued.key.key_id
    assert len(await copy.list_keys()) == 2
    assert [e.action for e in await copy.events()] == ["key.created", "key.rotated"]


async def test_refusals_come_through_and_are_not_retried(
    copy: ControlCopy, cluster: Cluster
) -> None:
    with pytest.raises(ObjectNotFound):
        await copy.revoke_key("a" * 12, BY)
    assert cluster.resolved == 1


async def test_an_outage_is_one_clean_error_to_administration(
    copy: ControlCopy, cluster: Cluster
) -> None:
    cluster.up = False
    with pytest.raises(ControlUnavailable) as refused:
        await copy.list_keys()
    assert "somewhere" not in str(refused.value)


async def test_a_hanging_control_plane_is_given_up() -> None:
    async def resolve() -> Any:
        return hang

    async def hang(method: str, *args: Any) -> Any:
        await asyncio.sleep(3600)

    copy = ControlCopy(resolve)
    with pytest.raises(ControlUnavailable):
        await copy._call(0.05, "list_keys")


async def test_finding_is_shared_and_survives_an_impatient_caller(cluster: Cluster) -> None:
    found = 0

    async def resolve() -> Any:
        nonlocal found
        found += 1
        await asyncio.sleep(0.2)
        return cluster

    copy = ControlCopy(resolve)
    impatient = [asyncio.create_task(copy._call(0.02, "list_keys")) for _ in range(5)]
    results = await asyncio.gather(*impatient, return_exceptions=True)
    assert all(isinstance(result, ControlUnavailable) for result in results)
    assert await copy.list_keys() == ()
    assert found == 1


async def test_stop_deregisters(copy: ControlCopy, cluster: Cluster) -> None:
    await copy.start(REPLICA)
    await until(lambda: cluster.plane.snapshot.replicas == (REPLICA,))
    await copy.stop()
    assert cluster.plane.snapshot.replicas == ()
    await copy.stop()


async def test_stop_during_an_outage_ends(copy: ControlCopy, cluster: Cluster) -> None:
    await copy.start(REPLICA)
    await copy.ready(1)
    cluster.up = False
    async with asyncio.timeout(3):
        await copy.stop()


async def test_a_draining_replica_withdraws_and_keeps_watching(
    copy: ControlCopy, cluster: Cluster
) -> None:
    await copy.start(REPLICA)
    await until(lambda: cluster.plane.snapshot.replicas == (REPLICA,))
    await copy.set_registration(None)
    assert cluster.plane.snapshot.replicas == ()
    cluster.plane.revoke_token("jti", BY)
    await until(lambda: "jti" in copy.snapshot.revocations.token_ids)
    assert cluster.plane.snapshot.replicas == ()


async def test_a_failing_listener_stops_nothing(
    copy: ControlCopy, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(snapshot: ControlSnapshot) -> None:
        raise RuntimeError("listener")

    seen: list[ControlSnapshot] = []
    copy.on_change(broken)
    copy.on_change(seen.append)
    await copy.start()
    await copy.ready(1)
    cluster.plane.revoke_token("jti", BY)
    await until(lambda: seen and "jti" in seen[-1].revocations.token_ids)
    assert "listener" in caplog.text


async def test_last_use_is_reported(
    copy: ControlCopy, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_copy, "USE_REPORT_INTERVAL_S", 0.0)
    issued = await copy.create_key(SPEC, BY)
    await copy.start()
    await copy.ready(1)
    copy.note_key_used(issued.key.key_id)
    await until(lambda: cluster.plane.get_key(issued.key.key_id).last_used_us is not None)


def test_random_is_cryptographic_by_default() -> None:
    assert ControlCopy.__init__.__kwdefaults__["random_bytes"] is secrets.token_bytes
