"""Whatever administrators do in whatever order, a revoked or expired key is never accepted."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from governance.control.plane import ControlPlane
from governance.control.records import DEFAULT_GRACE_S, KeySpec
from governance.control.store import ControlStore
from governance.errors import GatehouseError, InvalidRequest, Unauthenticated
from governance.identity.service_keys import (
    ServiceKey,
    ServiceKeyChecker,
    hash_secret,
    mint,
    parse,
)

PEPPER = bytes(range(32))
SECOND_US = 1_000_000
DAY_S = 86_400
BY = "f" * 64


@dataclass
class Expected:
    """What the test knows about a key, kept apart from the store."""

    key: ServiceKey
    expires_us: int
    revoked: bool = False
    rotated: bool = False


@dataclass
class Clock:
    now_us: int = 1_700_000_000_000_000

    def __call__(self) -> int:
        return self.now_us


DAYS = st.integers(1, 90 * DAY_S)
WHICH = st.integers(0, 30)
STEPS = st.one_of(
    st.tuples(st.just("create"), DAYS),
    st.tuples(st.just("rotate"), WHICH, st.none() | DAYS, st.integers(0, 7 * DAY_S)),
    st.tuples(st.just("rotate"), WHICH, st.none(), st.just(DEFAULT_GRACE_S)),
    st.tuples(st.just("revoke"), WHICH),
    st.tuples(st.just("wait"), st.integers(1, 30 * DAY_S)),
    st.tuples(st.just("restart")),
)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(STEPS, min_size=3, max_size=14), seed=st.integers(0, 2**32))
def test_a_revoked_or_expired_key_is_never_accepted(
    steps: list[tuple[object, ...]], seed: int
) -> None:
    random, clock = Random(seed), Clock()
    keys: list[Expected] = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "control.sqlite"
        store = ControlStore(path, clock)
        try:
            plane = ControlPlane(store, PEPPER, lambda: 0.0)
            for name, *args in steps:
                if name == "restart":
                    store.close()
                    store = ControlStore(path, clock)
                    plane = ControlPlane(store, PEPPER, lambda: 0.0)
                else:
                    _step(plane, clock, random, keys, str(name), args)
                _check_all(plane, clock, keys)
        finally:
            store.close()


def _step(
    plane: ControlPlane,
    clock: Clock,
    random: Random,
    keys: list[Expected],
    name: str,
    args: list[object],
) -> None:
    new = mint(random.randbytes)
    secret_hash = hash_secret(PEPPER, new.secret)
    if name == "wait":
        clock.now_us += int(str(args[0])) * SECOND_US
    elif name == "create":
        lifetime_s = int(str(args[0]))
        plane.create_key(new.key_id, secret_hash, KeySpec("x", "hr", ("a",), lifetime_s), BY)
        keys.append(Expected(new, clock.now_us + lifetime_s * SECOND_US))
    elif keys:
        chosen = keys[int(str(args[0])) % len(keys)]
        if name == "revoke":
            plane.revoke_key(chosen.key.key_id, BY)
            chosen.revoked = True
            return
        lifetime_s = None if args[1] is None else int(str(args[1]))
        grace_s = int(str(args[2]))
        dead = chosen.revoked or chosen.rotated or clock.now_us >= chosen.expires_us
        try:
            entry = plane.rotate_key(
                chosen.key.key_id, new.key_id, secret_hash, BY, lifetime_s, grace_s
            )
        except InvalidRequest:
            assert dead
            return
        assert not dead
        chosen.rotated = True
        chosen.expires_us = min(chosen.expires_us, clock.now_us + grace_s * SECOND_US)
        assert entry.record.expires_us <= clock.now_us + 90 * DAY_S * SECOND_US
        keys.append(Expected(new, entry.record.expires_us))


def _check_all(plane: ControlPlane, clock: Clock, keys: list[Expected]) -> None:
    checker = ServiceKeyChecker(lambda: plane.snapshot, lambda: 0.0, PEPPER, clock)
    for expected in keys:
        alive = not expected.revoked and clock.now_us < expected.expires_us
        try:
            principal = checker.check(expected.key.text())
        except Unauthenticated:
            assert not alive
        else:
            assert alive
            assert principal.key_id == expected.key.key_id
            assert principal.expires_at_us == expected.expires_us


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=120) | st.text("ghk_abcdefz234567", min_size=70, max_size=80))
def test_whatever_is_presented_gets_one_kind_of_answer(text: str) -> None:
    refused: Exception | None = None
    try:
        key = parse(text)
    except GatehouseError as error:
        refused = error
    else:
        assert key.text() == text
    assert refused is None or type(refused) is Unauthenticated


@given(st.binary(min_size=40, max_size=40))
def test_every_key_is_read_back(random_bytes: bytes) -> None:
    key = mint(lambda count: random_bytes[:8] if count == 8 else random_bytes[8:])
    assert parse(key.text()) == key
