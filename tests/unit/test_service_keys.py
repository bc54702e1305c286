"""Attacks on service keys first, then what must work."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import re
import secrets
import string
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from governance.control.snapshot import ControlSnapshot, Revocations, ServiceKeyRecord
from governance.errors import (
    ControlUnavailable,
    ExpiredCredential,
    RevokedCredential,
    Unauthenticated,
)
from governance.identity import service_keys
from governance.identity.pseudonym import principal_key
from governance.identity.service_keys import (
    ServiceKey,
    ServiceKeyChecker,
    hash_secret,
    is_service_key,
    mint,
    parse,
)
from governance.types import PrincipalKind

PEPPER = bytes(range(32))
NOW_US = 1_700_000_000_000_000
HOUR_US = 3_600_000_000


def record(key: ServiceKey, **changes: object) -> ServiceKeyRecord:
    fields: dict[str, object] = {
        "key_id": key.key_id,
        "secret_hash": hash_secret(PEPPER, key.secret),
        "name": "nightly report",
        "department": "hr",
        "roles": ("analyst",),
        "models": None,
        "operations": None,
        "created_us": NOW_US - HOUR_US,
        "expires_us": NOW_US + HOUR_US,
        "created_by": "0" * 64,
    }
    return ServiceKeyRecord(**{**fields, **changes})  # type: ignore[arg-type]


@dataclass
class Bench:
    """A checker over a copy that tests change."""

    snapshot: ControlSnapshot = field(default_factory=ControlSnapshot)
    age_s: float = 0.0
    now_us: int = NOW_US
    used: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.checker = ServiceKeyChecker(
            lambda: self.snapshot,
            lambda: self.age_s,
            PEPPER,
            lambda: self.now_us,
            self.used.append,
        )

    def publish(self, *records: ServiceKeyRecord, revocations: Revocations | None = None) -> None:
        self.snapshot = ControlSnapshot(
            "epoch", 1, {r.key_id: r for r in records}, revocations or Revocations()
        )


@pytest.fixture
def key() -> ServiceKey:
    return mint(secrets.token_bytes)


@pytest.fixture
def bench(key: ServiceKey) -> Bench:
    bench = Bench()
    bench.publish(record(key))
    return bench


def checksummed(body: str) -> str:
    return f"{body}_{zlib.crc32(body.encode()):08x}"


# Attacks


def test_every_changed_character_is_refused(bench: Bench, key: ServiceKey) -> None:
    text = key.text()
    for place in range(len(text)):
        for other in "a7_Z 0":
            if text[place] != other:
                with pytest.raises(Unauthenticated):
                    bench.checker.check(text[:place] + other + text[place + 1 :])


def test_every_flipped_bit_is_refused(bench: Bench, key: ServiceKey) -> None:
    data = key.text().encode()
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Unauthenticated):
            bench.checker.check(flipped.decode("latin-1"))


def test_every_flipped_bit_of_the_secret_is_refused_with_a_right_checksum(
    bench: Bench, key: ServiceKey
) -> None:
    for bit in range(256):
        secret = bytearray(key.secret)
        secret[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Unauthenticated):
            bench.checker.check(ServiceKey(key.key_id, bytes(secret)).text())


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-1],
        lambda text: text[:-9],
        lambda text: text[:17],
        lambda text: text + "0",
        lambda text: text + "\n",
        lambda text: " " + text,
        lambda text: text.upper(),
        lambda text: text.replace("ghk_", "ghx_"),
        lambda text: text[:-1] + "٣",
        lambda text: text[:20] + "\ud800" + text[21:],
        lambda text: text[:20] + "\x00" + text[21:],
        lambda text: "ghk_",
        lambda text: "",
        lambda text: "ghk_" + "a" * 100_000,
    ],
)
def test_damaged_keys_are_refused(
    bench: Bench, key: ServiceKey, damage: Callable[[str], str]
) -> None:
    with pytest.raises(Unauthenticated):
        bench.checker.check(damage(key.text()))


def test_a_second_spelling_of_a_secret_is_refused(bench: Bench) -> None:
    """52 base32 characters hold four bits more than the secret; they must be zero."""
    key = ServiceKey("a" * 12, bytes(32))
    bench.publish(record(key))
    body = key.text()[:-9]
    assert bench.checker.check(checksummed(body)).key_id == key.key_id
    for last in "bcdefghijklmnop":
        with pytest.raises(Unauthenticated):
            bench.checker.check(checksummed(body[:-1] + last))


def test_unknown_key_and_wrong_secret_look_the_same(bench: Bench, key: ServiceKey) -> None:
    answers = []
    for attempt in (
        ServiceKey(key.key_id, bytes(32)).text(),
        mint(secrets.token_bytes).text(),
        key.text()[:-1],
    ):
        with pytest.raises(Unauthenticated) as refused:
            bench.checker.check(attempt)
        error = refused.value
        answers.append((type(error), error.message, error.param, error.code, error.retry_after_s))
    assert len(set(answers)) == 1


def test_unknown_key_costs_the_same_hash_and_comparison(
    bench: Bench, key: ServiceKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def compare(a: str, b: str) -> bool:
        compared.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(service_keys.hmac, "compare_digest", compare)
    paths = []
    for attempt in (ServiceKey(key.key_id, bytes(32)), mint(secrets.token_bytes), key):
        compared.clear()
        with contextlib.suppress(Unauthenticated):
            bench.checker.check(attempt.text())
        paths.append(list(compared))
    assert paths[0] == paths[1] == paths[2]
    assert paths[0][-1] == (64, 64), "the hash is compared in constant time"


def test_wrong_secret_learns_neither_expiry_nor_revocation(bench: Bench, key: ServiceKey) -> None:
    bench.publish(
        record(key, expires_us=NOW_US - 1), revocations=Revocations(frozenset({key.key_id}))
    )
    with pytest.raises(Unauthenticated) as refused:
        bench.checker.check(ServiceKey(key.key_id, bytes(32)).text())
    assert type(refused.value) is Unauthenticated


def test_a_stored_hash_is_not_a_secret(bench: Bench, key: ServiceKey) -> None:
    """Someone who reads the store cannot present what it holds."""
    stored = bytes.fromhex(hash_secret(PEPPER, key.secret))
    with pytest.raises(Unauthenticated):
        bench.checker.check(ServiceKey(key.key_id, stored).text())


def test_a_key_of_another_installation_is_refused(bench: Bench, key: ServiceKey) -> None:
    bench.publish(record(key, secret_hash=hash_secret(b"x" * 32, key.secret)))
    with pytest.raises(Unauthenticated):
        bench.checker.check(key.text())


def test_expired(bench: Bench, key: ServiceKey) -> None:
    bench.now_us = NOW_US + HOUR_US - 1
    bench.checker.check(key.text())
    bench.now_us += 1
    with pytest.raises(ExpiredCredential):
        bench.checker.check(key.text())


@pytest.mark.parametrize(
    "revocations",
    [
        lambda key: Revocations(key_ids=frozenset({key.key_id})),
        lambda key: Revocations(
            token_ids=frozenset({hashlib.sha256(key.text().encode()).hexdigest()})
        ),
        lambda key: Revocations(subjects={("gatehouse", key.key_id): NOW_US}),
    ],
)
def test_revoked(
    bench: Bench, key: ServiceKey, revocations: Callable[[ServiceKey], Revocations]
) -> None:
    bench.publish(record(key), revocations=revocations(key))
    with pytest.raises(RevokedCredential):
        bench.checker.check(key.text())
    bench.now_us = NOW_US + 2 * HOUR_US
    with pytest.raises(RevokedCredential):
        bench.checker.check(key.text())


def test_revocations_of_others_do_not_matter(bench: Bench, key: ServiceKey) -> None:
    others = Revocations(
        key_ids=frozenset({"b" * 12}),
        token_ids=frozenset({"0" * 64}),
        subjects={("gatehouse", key.key_id): NOW_US - HOUR_US, ("entra", key.key_id): NOW_US},
    )
    bench.publish(record(key), revocations=others)
    bench.checker.check(key.text())


@pytest.mark.parametrize("age_s", [10.001, float("inf"), float("nan")])
def test_a_stale_copy_refuses(bench: Bench, key: ServiceKey, age_s: float) -> None:
    bench.age_s = age_s
    with pytest.raises(ControlUnavailable) as refused:
        bench.checker.check(key.text())
    assert refused.value.status == 503
    assert bench.used == []


def test_a_copy_of_ten_seconds_still_counts(bench: Bench, key: ServiceKey) -> None:
    bench.age_s = 10.0
    bench.checker.check(key.text())


def test_secrets_stay_out_of_repr_and_errors(bench: Bench, key: ServiceKey) -> None:
    encoded = key.text().split("_")[2]
    assert encoded not in repr(key)
    assert repr(key.secret) not in repr(key)
    with pytest.raises(Unauthenticated) as refused:
        bench.checker.check(ServiceKey("c" * 12, key.secret).text())
    assert encoded not in f"{refused.value} {refused.value!r} {refused.value.args}"


# What works


def test_format() -> None:
    for _ in range(200):
        text = mint(secrets.token_bytes).text()
        assert re.fullmatch(r"ghk_[a-z2-7]{12}_[a-z2-7]{52}_[0-9a-f]{8}", text)
        assert set(text) <= set(string.ascii_lowercase + string.digits + "_")
        assert is_service_key(text)
        assert parse(text).text() == text
    assert not is_service_key("eyJhbGciOi.J9.x")


def test_mint_uses_all_of_the_randomness() -> None:
    drawn: list[int] = []

    def random_bytes(count: int) -> bytes:
        drawn.append(count)
        return bytes(range(len(drawn), len(drawn) + count))

    key = mint(random_bytes)
    assert drawn == [8, 32]
    assert key.secret == bytes(range(2, 34))
    assert len({mint(secrets.token_bytes).key_id for _ in range(500)}) == 500


def test_principal_carries_what_the_record_says(bench: Bench, key: ServiceKey) -> None:
    bench.publish(record(key, models=("small",), operations=("chat",)))
    principal = bench.checker.check(key.text())
    assert principal.kind is PrincipalKind.KEY
    assert (principal.issuer, principal.subject) == ("gatehouse", key.key_id)
    assert (principal.department, principal.roles) == ("hr", frozenset({"analyst"}))
    assert (principal.models, principal.operations) == (frozenset({"small"}), frozenset({"chat"}))
    assert principal.key == principal_key(PEPPER, "gatehouse", None, key.key_id)
    assert principal.token_hash == hashlib.sha256(key.text().encode()).hexdigest()
    assert principal.expires_at_us == NOW_US + HOUR_US
    assert bench.used == [key.key_id]


def test_a_key_without_limits_has_none(bench: Bench, key: ServiceKey) -> None:
    principal = bench.checker.check(key.text())
    assert principal.models is None
    assert principal.operations is None


# Pseudonyms


def test_pseudonym_is_the_documented_hmac() -> None:
    fields = (b"\x01entra", b"\x01tenant", b"\x01subject")
    message = b"".join(len(f).to_bytes(8, "big") + f for f in fields)
    expected = hmac.new(PEPPER, message, hashlib.sha256).hexdigest()
    assert principal_key(PEPPER, "entra", "tenant", "subject") == expected


def test_pseudonyms_of_different_principals_differ() -> None:
    triples = [
        ("a", "b", "c"),
        ("ab", "", "c"),
        ("a", "", "bc"),
        ("a", None, "bc"),
        ("", "ab", "c"),
        ("a", None, "b\x01c"),
        ("b", "a", "c"),
    ]
    assert len({principal_key(PEPPER, *triple) for triple in triples}) == len(triples)
    assert principal_key(b"y" * 32, "a", "b", "c") != principal_key(PEPPER, "a", "b", "c")


def test_a_short_pepper_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        principal_key(b"short", "a", None, "b")
