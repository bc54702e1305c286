from __future__ import annotations

import json
import os
import secrets
import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from governance.control.database import StoreError
from governance.control.pepper import PepperError, create_pepper, read_pepper
from governance.control.plane import load_pepper
from governance.control.records import MAX_TOKEN_REVOCATION_S, KeySpec, KeyStatus, RevocationKind
from governance.control.store import ControlStore
from governance.errors import InvalidRequest, ObjectNotFound

SECOND_US = 1_000_000
DAY_S = 86_400
DAY_US = DAY_S * SECOND_US
A, B, C = "a" * 12, "b" * 12, "c" * 12
HASH, OTHER_HASH = "1" * 64, "2" * 64
BY = "f" * 64
SPEC = KeySpec("nightly report", "hr", ("analyst", "reader"), DAY_S, ("small",), ("chat",))


@dataclass
class Time:
    now_us: int = 1_700_000_000_000_000

    def __call__(self) -> int:
        return self.now_us


@pytest.fixture
def clock() -> Time:
    return Time()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control" / "control.sqlite"


@pytest.fixture
def store(path: Path, clock: Time) -> Iterator[ControlStore]:
    store = ControlStore(path, clock)
    yield store
    store.close()


def reopened(path: Path, clock: Time) -> ControlStore:
    return ControlStore(path, clock)


# Limits that must hold


@pytest.mark.parametrize("lifetime_s", [0, -1, 90 * DAY_S + 1, 10**12])
def test_a_lifetime_out_of_range_is_refused(store: ControlStore, lifetime_s: int) -> None:
    spec = KeySpec("x", "hr", ("analyst",), lifetime_s)
    with pytest.raises(InvalidRequest) as refused:
        store.keys.create(A, HASH, spec, BY)
    assert refused.value.param == "expires_in_s"
    assert store.keys.all() == ()
    assert store.version == 0


def test_the_database_itself_refuses_a_longer_life(store: ControlStore, path: Path) -> None:
    store.keys.create(A, HASH, SPEC, BY)
    with sqlite3.connect(path) as other:
        for attack in (
            "UPDATE service_key SET expires_us = expires_us + 1",
            "UPDATE service_key SET expires_us = created_us + 91 * 86400000000",
        ):
            with pytest.raises(sqlite3.IntegrityError):
                other.execute(attack)
    other.close()


def test_the_database_itself_refuses_to_take_back(store: ControlStore, path: Path) -> None:
    store.keys.create(A, HASH, SPEC, BY)
    store.keys.revoke(A, BY)
    with sqlite3.connect(path) as other:
        for attack in (
            "UPDATE service_key SET revoked_us = NULL",
            "UPDATE admin_event SET by = 'someone else'",
            "DELETE FROM admin_event",
        ):
            with pytest.raises(sqlite3.IntegrityError):
                other.execute(attack)
    other.close()


@pytest.mark.parametrize(
    "key_id", ["", "A" * 12, "a" * 11, "a" * 13, "aaaaaaaaaaa1", "../../etc/p"]
)
def test_a_key_id_of_another_form_is_refused(store: ControlStore, key_id: str) -> None:
    with pytest.raises(InvalidRequest):
        store.keys.create(key_id, HASH, SPEC, BY)


def test_a_taken_key_id_never_gets_another_secret(store: ControlStore) -> None:
    store.keys.create(A, HASH, SPEC, BY)
    with pytest.raises(InvalidRequest):
        store.keys.create(A, OTHER_HASH, SPEC, BY)
    with pytest.raises(InvalidRequest):
        store.keys.rotate(A, A, HASH, BY, None, 0)
    assert store.keys.get(A).record.secret_hash == HASH


def test_a_key_made_twice_is_one_key(store: ControlStore) -> None:
    assert store.keys.create(A, HASH, SPEC, BY) == store.keys.create(A, HASH, SPEC, BY)
    assert len(store.keys.all()) == store.version == 1


def test_sql_in_a_field_is_text(store: ControlStore) -> None:
    name = "'); DROP TABLE service_key; --"
    spec = KeySpec(name, "hr", ("analyst",), DAY_S)
    assert store.keys.create(A, HASH, spec, BY).record.name == name
    assert store.keys.get(A).record.name == name


# Rotation


def test_rotation_keeps_rights_and_ends_the_old_key(store: ControlStore, clock: Time) -> None:
    old = store.keys.create(A, HASH, KeySpec("x", "hr", ("analyst",), 30 * DAY_S, ("small",)), BY)
    clock.now_us += DAY_US
    new = store.keys.rotate(A, B, OTHER_HASH, BY, None, DAY_S)
    assert new.record.replaces == A
    assert new.record.expires_us == clock.now_us + 30 * DAY_US
    assert (new.record.department, new.record.roles, new.record.models) == (
        old.record.department,
        old.record.roles,
        old.record.models,
    )
    assert store.keys.get(A).record.expires_us == clock.now_us + DAY_US
    clock.now_us += DAY_US
    assert store.keys.get(A).status(clock.now_us) is KeyStatus.EXPIRED
    assert store.keys.get(B).status(clock.now_us) is KeyStatus.ACTIVE


def test_rotation_never_prolongs_the_old_key(store: ControlStore, clock: Time) -> None:
    before = store.keys.create(A, HASH, KeySpec("x", "hr", ("analyst",), 60), BY)
    store.keys.rotate(A, B, OTHER_HASH, BY, DAY_S, 7 * DAY_S)
    assert store.keys.get(A).record.expires_us == before.record.expires_us


def test_a_rotation_sent_twice_is_one(store: ControlStore) -> None:
    store.keys.create(A, HASH, SPEC, BY)
    first = store.keys.rotate(A, B, OTHER_HASH, BY, None, 0)
    assert store.keys.rotate(A, B, OTHER_HASH, BY, None, 0) == first
    assert store.version == 2


def test_what_cannot_be_rotated(store: ControlStore, clock: Time) -> None:
    with pytest.raises(ObjectNotFound):
        store.keys.rotate(A, B, OTHER_HASH, BY, None, 0)
    store.keys.create(A, HASH, SPEC, BY)
    for grace_s in (-1, 7 * DAY_S + 1):
        with pytest.raises(InvalidRequest):
            store.keys.rotate(A, B, OTHER_HASH, BY, None, grace_s)
    with pytest.raises(InvalidRequest):
        store.keys.rotate(A, B, OTHER_HASH, BY, 91 * DAY_S, 0)
    store.keys.rotate(A, B, OTHER_HASH, BY, None, DAY_S // 2)
    with pytest.raises(InvalidRequest, match=B):
        store.keys.rotate(A, C, "3" * 64, BY, None, 0)
    store.keys.revoke(B, BY)
    with pytest.raises(InvalidRequest, match="revoked"):
        store.keys.rotate(B, C, "3" * 64, BY, None, 0)
    clock.now_us += DAY_US
    with pytest.raises(InvalidRequest, match="expired"):
        store.keys.rotate(A, C, "3" * 64, BY, None, 0)
    assert {entry.record.key_id for entry in store.keys.all()} == {A, B}


# Revocation


def test_revoking_twice_keeps_the_first_moment(store: ControlStore, clock: Time) -> None:
    store.keys.create(A, HASH, SPEC, BY)
    first = store.keys.revoke(A, BY, "leaked")
    clock.now_us += 1
    assert store.keys.revoke(A, "0" * 64, "again") == first
    assert store.version == 2
    with pytest.raises(ObjectNotFound):
        store.keys.revoke(B, BY)


def test_a_token_stays_revoked_until_it_has_expired(store: ControlStore, clock: Time) -> None:
    start_us = clock.now_us
    store.revocations.revoke_token("jti-1", BY, start_us + 3600 * SECOND_US)
    store.revocations.revoke_token("jti-2", BY)
    clock.now_us = start_us + (3600 + 300) * SECOND_US - 1
    assert store.revocations.published().token_ids == {"jti-1", "jti-2"}
    clock.now_us += 1
    assert store.revocations.published().token_ids == {"jti-2"}
    clock.now_us = start_us + (MAX_TOKEN_REVOCATION_S + 300) * SECOND_US
    assert store.revocations.published().token_ids == frozenset()


def test_a_token_revocation_is_never_shortened(store: ControlStore, clock: Time) -> None:
    long = store.revocations.revoke_token("jti", BY)
    assert store.revocations.revoke_token("jti", BY, clock.now_us) == long
    assert store.version == 1


def test_token_expiries_that_would_revoke_nothing_are_refused(
    store: ControlStore, clock: Time
) -> None:
    too_late_us = clock.now_us + MAX_TOKEN_REVOCATION_S * SECOND_US + 1
    for expires_us in (0, clock.now_us - DAY_US, too_late_us, clock.now_us * 1000):
        with pytest.raises(InvalidRequest) as refused:
            store.revocations.revoke_token("jti", BY, expires_us)
        assert refused.value.param == "expires_at"


def test_a_subject_is_never_let_in_again_by_an_earlier_moment(
    store: ControlStore, clock: Time
) -> None:
    store.revocations.revoke_subject("entra", "tid/oid", BY)
    store.revocations.revoke_subject("entra", "tid/oid", BY, clock.now_us - DAY_US)
    expected = {("entra", "tid/oid"): clock.now_us}
    assert store.revocations.published().subjects == expected
    clock.now_us += 400 * DAY_US
    assert store.revocations.published().subjects == expected
    with pytest.raises(InvalidRequest):
        store.revocations.revoke_subject("entra", "x", BY, clock.now_us + 2 * DAY_US)


# What gateways get


def test_ended_keys_leave_the_published_copy_after_a_month(
    store: ControlStore, clock: Time
) -> None:
    store.keys.create(A, HASH, SPEC, BY)
    clock.now_us += 31 * DAY_US - 1
    assert set(store.keys.published()) == {A}
    clock.now_us += 1
    assert store.keys.published() == {}
    assert len(store.keys.all()) == 1


def test_last_use_is_noted_and_is_no_new_version(store: ControlStore, clock: Time) -> None:
    store.keys.create(A, HASH, SPEC, BY)
    start_us = clock.now_us
    clock.now_us += DAY_US
    store.keys.touch({A: start_us + 5, B: start_us})
    store.keys.touch({A: start_us + 3})
    assert store.keys.get(A).last_used_us == start_us + 5
    store.keys.touch({A: clock.now_us + DAY_US})
    assert store.keys.get(A).last_used_us == clock.now_us
    assert store.version == 1


# Durability


def test_a_restart_keeps_everything(path: Path, clock: Time) -> None:
    first = ControlStore(path, clock)
    first.keys.create(A, HASH, SPEC, BY)
    first.keys.rotate(A, B, OTHER_HASH, BY, None, 60)
    first.keys.revoke(B, BY, "leaked")
    first.keys.touch({A: clock.now_us})
    first.revocations.revoke_token("jti", BY)
    first.revocations.revoke_subject("entra", "tid/oid", BY)

    def contents(store: ControlStore) -> tuple[object, ...]:
        return (
            store.keys.all(),
            store.keys.published(),
            store.revocations.entries(),
            store.revocations.published(),
            store.events(),
            store.version,
        )

    before = contents(first)
    first.close()
    second = reopened(path, clock)
    assert contents(second) == before
    assert {e.kind for e in second.revocations.entries()} == set(RevocationKind)
    second.close()


def test_events_tell_who_did_what_and_hold_no_secret(store: ControlStore, clock: Time) -> None:
    store.keys.create(A, HASH, SPEC, BY)
    store.keys.rotate(A, B, OTHER_HASH, "e" * 64, None, 60)
    store.keys.revoke(B, BY, "leaked")
    store.revocations.revoke_token("jti", BY)
    store.revocations.revoke_subject("entra", "tid/oid", BY)
    events = store.events()
    assert [(e.seq, e.action, e.target) for e in events] == [
        (1, "key.created", A),
        (2, "key.rotated", B),
        (3, "key.revoked", B),
        (4, "token.revoked", "jti"),
        (5, "subject.revoked", "tid/oid"),
    ]
    assert events[1].by == "e" * 64
    assert {e.at_us for e in events} == {clock.now_us}
    assert json.loads(events[1].detail)["replaces"] == A
    assert HASH not in str(events)
    assert [e.seq for e in store.events(after_seq=2, limit=2)] == [3, 4]


def test_a_failed_change_leaves_nothing(
    store: ControlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise sqlite3.OperationalError("disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(store._db, "event", full)
        with pytest.raises(sqlite3.OperationalError):
            store.keys.create(A, HASH, SPEC, BY)
    assert store.keys.all() == ()
    store.keys.create(A, HASH, SPEC, BY)


def test_files_are_for_the_owner_only(store: ControlStore, path: Path) -> None:
    store.keys.create(A, HASH, SPEC, BY)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name


def test_another_process_is_noticed(store: ControlStore, path: Path, clock: Time) -> None:
    store.keys.create(A, HASH, SPEC, BY)
    assert not store.changed_elsewhere()
    other = ControlStore(path, clock)
    other.keys.revoke(A, BY)
    other.close()
    assert store.changed_elsewhere()
    assert not store.changed_elsewhere()


def test_a_file_of_another_program_or_version_is_refused(path: Path, clock: Time) -> None:
    ControlStore(path, clock).close()
    newer = sqlite3.connect(path)
    newer.execute("UPDATE schema_version SET version = 99")
    newer.commit()
    newer.close()
    with pytest.raises(StoreError, match="99"):
        ControlStore(path, clock)
    path.write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(StoreError):
        ControlStore(path, clock)


# Pepper


def test_the_pepper_is_made_once(store: ControlStore, tmp_path: Path) -> None:
    path = tmp_path / "keys" / "pepper"
    pepper = load_pepper(path, store, secrets.token_bytes)
    assert len(pepper) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert load_pepper(path, store, secrets.token_bytes) == pepper
    assert [p.name for p in path.parent.iterdir()] == ["pepper"]


def test_a_lost_pepper_is_not_replaced(store: ControlStore, tmp_path: Path) -> None:
    path = tmp_path / "pepper"
    load_pepper(path, store, secrets.token_bytes)
    path.unlink()
    with pytest.raises(PepperError, match="restore"):
        load_pepper(path, store, secrets.token_bytes)
    assert not path.exists()


def test_a_pepper_of_another_installation_is_refused(store: ControlStore, tmp_path: Path) -> None:
    load_pepper(tmp_path / "pepper", store, secrets.token_bytes)
    create_pepper(tmp_path / "other", secrets.token_bytes)
    with pytest.raises(PepperError, match="not the pepper"):
        load_pepper(tmp_path / "other", store, secrets.token_bytes)


def test_two_that_create_at_once_get_one_pepper(tmp_path: Path) -> None:
    path = tmp_path / "pepper"
    first = create_pepper(path, secrets.token_bytes)
    assert create_pepper(path, secrets.token_bytes) == first
    assert [p.name for p in tmp_path.iterdir()] == ["pepper"]


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33])
def test_a_pepper_of_the_wrong_size_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pepper"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(PepperError, match="32 bytes"):
        read_pepper(path)


def test_a_pepper_that_is_not_private_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pepper"
    path.write_bytes(b"x" * 32)
    path.chmod(0o640)
    with pytest.raises(PepperError, match="chmod 600"):
        read_pepper(path)
    path.chmod(0o600)
    os.symlink(path, tmp_path / "link")
    with pytest.raises(PepperError):
        read_pepper(tmp_path / "link")
    assert read_pepper(tmp_path / "absent") is None
