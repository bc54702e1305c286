"""The whole way from an Authorization header to a principal, with its cache and revocations."""

from __future__ import annotations

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from governance.control.snapshot import Revocations
from governance.errors import (
    ExpiredCredential,
    IdentityUnavailable,
    MissingCredential,
    NotPermitted,
    RevokedCredential,
    Unauthenticated,
)
from governance.identity import authenticator as module
from governance.identity.authenticator import CACHE_S, BearerAuthenticator
from governance.types import Principal, PrincipalKind
from tests.unit import forge
from tests.unit.forge import JWKS_URI, NOW_S, TENANT_A, TENANT_B, Clocks, Web, good_claims

KEY_PRINCIPAL = Principal(
    PrincipalKind.KEY, "key-1", "gatehouse", "hr", frozenset({"batch"}), "0" * 64, key_id="key-1"
)


class ServiceKeys:
    """Knows one key."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def check(self, presented: str) -> Principal:
        self.asked.append(presented)
        if presented != "ghk_good":
            raise Unauthenticated()
        return KEY_PRINCIPAL


class World:
    """An authenticator with everything around it."""

    def __init__(self, *issuers: dict[str, object]) -> None:
        self.clocks = Clocks()
        self.web = Web()
        self.web.publish(forge.rsa_jwk(forge.rsa_key()))
        self.service_keys = ServiceKeys()
        self.revoked = Revocations()
        self.door = BearerAuthenticator(
            forge.identity(*issuers),
            fetch=self.web,
            pepper=forge.PEPPER,
            service_keys=self.service_keys,
            revocations=lambda: self.revoked,
            clock=self.clocks.now_us,
            monotonic=self.clocks.monotonic,
        )
        self.checked = 0
        verify = self.door._verifier.verify

        async def counted(token: str) -> object:
            self.checked += 1
            return await verify(token)

        self.door._verifier.verify = counted  # type: ignore[method-assign,assignment]

    async def enter(self, token: str) -> Principal:
        return await self.door.authenticate(f"Bearer {token}")


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize(
    "header",
    [None, "", " ", "Bearer", "Bearer ", "Basic dTpw", "Token abc", "ghk_good", "bearer\t"],
)
async def test_no_credential(world: World, header: str | None) -> None:
    with pytest.raises(MissingCredential):
        await world.door.authenticate(header)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
async def test_the_scheme_has_no_case(world: World, scheme: str) -> None:
    principal = await world.door.authenticate(f"{scheme} {forge.good_token()}")
    assert principal.department == "hr"


async def test_service_keys_go_to_their_own_checker(world: World) -> None:
    assert await world.enter("ghk_good") is KEY_PRINCIPAL
    with pytest.raises(Unauthenticated):
        await world.enter("ghk_bad")
    assert world.service_keys.asked == ["ghk_good", "ghk_bad"]
    assert world.checked == 0
    await world.enter(forge.good_token())
    assert len(world.service_keys.asked) == 2


async def test_what_is_too_large_is_not_looked_at(world: World) -> None:
    for credential in ("x" * 20_000, "ghk_" + "x" * 20_000):
        with pytest.raises(Unauthenticated):
            await world.enter(credential)
    assert world.checked == 0
    assert world.service_keys.asked == []


@pytest.mark.parametrize("credential", ["ü", "\ud800.\ud800.\ud800", "a b", "null", "undefined"])
async def test_what_is_no_token(world: World, credential: str) -> None:
    with pytest.raises(Unauthenticated):
        await world.enter(credential)


async def test_a_good_token_of_somebody_without_a_place(world: World) -> None:
    for _ in range(2):
        with pytest.raises(NotPermitted):
            await world.enter(forge.good_token(roles=["stranger"]))
    assert world.checked == 2


async def test_the_signature_is_checked_once_a_minute(world: World) -> None:
    token = forge.good_token()
    first = await world.enter(token)
    world.clocks.advance(CACHE_S - 1)
    assert await world.enter(token) is first
    assert world.checked == 1
    world.clocks.advance(1)
    await world.enter(token)
    assert world.checked == 2
    world.door.clear()
    await world.enter(token)
    assert world.checked == 3


async def test_the_minute_does_not_grow_when_the_clock_is_set_back(world: World) -> None:
    token = forge.good_token(iat=NOW_S - 3600)
    await world.enter(token)
    world.clocks.wall_s -= 1800
    world.clocks.steady_s += CACHE_S
    await world.enter(token)
    assert world.checked == 2


async def test_expiry_ends_a_cached_token_too(world: World) -> None:
    token = forge.good_token(exp=NOW_S + 10)
    await world.enter(token)
    world.clocks.advance(10)
    await world.enter(token)
    assert world.checked == 2  # within the tolerance, but no longer from the cache
    world.clocks.advance(60)
    with pytest.raises(ExpiredCredential):
        await world.enter(token)


async def test_a_refusal_is_not_cached_and_does_not_shadow_a_token(world: World) -> None:
    token = forge.good_token()
    head, _, signature = token.rpartition(".")
    for _ in range(3):
        with pytest.raises(Unauthenticated):
            await world.enter(f"{head}.{'A' * len(signature)}")
    await world.enter(token)
    assert world.checked == 4


async def test_the_cache_is_bounded_and_keeps_what_is_used(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CACHED", 3)
    tokens = [forge.good_token(jti=f"t-{i}") for i in range(4)]
    for token in tokens[:3]:
        await world.enter(token)
    await world.enter(tokens[0])
    await world.enter(tokens[3])
    assert len(world.door._verified) == 3
    assert world.checked == 4
    await world.enter(tokens[0])
    assert world.checked == 4
    await world.enter(tokens[1])
    assert world.checked == 5


# Revocation


def revocations(token: str) -> dict[str, Revocations]:
    return {
        "by id": Revocations(token_ids=frozenset({"t-1"})),
        "by hash": Revocations(token_ids=frozenset({hashlib.sha256(token.encode()).hexdigest()})),
        "by subject": Revocations(subjects={("idp", "person-1"): NOW_S * 1_000_000}),
    }


@pytest.mark.parametrize("kind", list(revocations("")))
@pytest.mark.parametrize("cached", [False, True])
async def test_revocation_counts_at_once(world: World, kind: str, cached: bool) -> None:
    token = forge.good_token()
    if cached:
        await world.enter(token)
    world.revoked = revocations(token)[kind]
    for _ in range(2):
        with pytest.raises(RevokedCredential):
            await world.enter(token)
    assert world.checked == 1  # refused from the cache as well
    world.revoked = Revocations()
    await world.enter(token)


async def test_a_revoked_hash_cannot_be_escaped_by_respelling_the_signature(world: World) -> None:
    """The holder of an ECDSA token can compute a second text of it without any key."""
    world.web.publish(forge.ec_jwk(forge.ec_key()))
    header = forge.good_header(alg="ES256", kid="e1")
    token = forge.sign_es256(header, good_claims(), forge.ec_key())
    head, _, signature = token.rpartition(".")
    raw = base64.urlsafe_b64decode(signature + "==")
    other = ec.SECP256R1.group_order - int.from_bytes(raw[32:], "big")
    twin = f"{head}.{forge.b64(raw[:32] + other.to_bytes(32, 'big'))}"
    await world.enter(token)
    await world.enter(twin)
    for revoked in (token, twin):
        world.revoked = revocations(revoked)["by hash"]
        for presented in (token, twin):
            with pytest.raises(RevokedCredential):
                await world.enter(presented)


async def test_revocation_hits_nobody_else(world: World) -> None:
    token = forge.good_token()
    world.revoked = Revocations(
        key_ids=frozenset({"k1"}),
        token_ids=frozenset({"t-2", ""}),
        subjects={("idp", "person-2"): NOW_S * 1_000_000, ("other", "person-1"): NOW_S * 1_000_000},
    )
    await world.enter(token)


async def test_a_token_without_an_id_is_not_revoked_by_an_empty_one(world: World) -> None:
    world.revoked = Revocations(token_ids=frozenset({"", "None"}))
    claims = forge.without(good_claims(), "jti")
    await world.enter(forge.sign_rs256(forge.good_header(), claims))


async def test_a_subject_may_come_back_with_a_newer_token(world: World) -> None:
    world.revoked = Revocations(subjects={("idp", "person-1"): (NOW_S - 5) * 1_000_000})
    with pytest.raises(RevokedCredential):
        await world.enter(forge.good_token(iat=NOW_S - 6))
    await world.enter(forge.good_token(iat=NOW_S - 5))


async def test_an_entra_subject_is_revoked_by_tenant_and_object() -> None:
    world = World(forge.entra_section())
    url = f"https://login.example.com/{TENANT_A}/keys"
    world.web.publish(forge.rsa_jwk(forge.rsa_key()), url=url)
    token = forge.good_token(
        iss=f"https://login.example.com/{TENANT_A}/v2.0", tid=TENANT_A, oid="object-1"
    )
    principal = await world.enter(token)
    world.revoked = Revocations(subjects={("idp", principal.subject): NOW_S * 1_000_000})
    with pytest.raises(RevokedCredential):
        await world.enter(token)


# Keys


async def test_rotation_is_noticed(world: World) -> None:
    await world.enter(forge.good_token())
    key = forge.rsa_key(2048, 1)
    world.web.publish(forge.rsa_jwk(forge.rsa_key()), forge.rsa_jwk(key, "k2"))
    rotated = forge.sign_rs256(forge.good_header(kid="k2"), good_claims(jti="t-2"), key)
    with pytest.raises(Unauthenticated):
        await world.enter(rotated)
    world.clocks.advance(60)
    assert (await world.enter(rotated)).key_id == "k2"


async def test_an_issuer_that_is_down(world: World) -> None:
    del world.web.documents[JWKS_URI]
    with pytest.raises(IdentityUnavailable):
        await world.enter(forge.good_token())


async def test_a_stranger_makes_nobody_fetch_anything(world: World) -> None:
    for claims in ({"iss": "https://attacker.example"}, {"iss": None}, {"iss": JWKS_URI}):
        with pytest.raises(Unauthenticated):
            await world.enter(forge.good_token(**claims))
    with pytest.raises(Unauthenticated):
        await world.enter(forge.sign_rs256(forge.good_header(alg="none"), good_claims()))
    assert world.web.asked == []


async def test_a_tenants_keys_come_from_that_tenant() -> None:
    world = World(forge.entra_section())
    other = forge.rsa_key(2048, 1)
    for tenant, key in ((TENANT_A, forge.rsa_key()), (TENANT_B, other)):
        world.web.publish(forge.rsa_jwk(key), url=f"https://login.example.com/{tenant}/keys")
    claims = good_claims(
        iss=f"https://login.example.com/{TENANT_B}/v2.0", tid=TENANT_B, oid="object-1"
    )
    await world.enter(forge.sign_rs256(forge.good_header(), claims, other))
    with pytest.raises(Unauthenticated):
        await world.enter(forge.sign_rs256(forge.good_header(), claims))
    assert world.web.asked == [f"https://login.example.com/{TENANT_B}/keys"]
