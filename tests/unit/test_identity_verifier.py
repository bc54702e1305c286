"""Attacks on the token verifier: each must be refused, and only for its own reason.

Every case starts from a token that is accepted (``test_a_good_token``) and changes one thing.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jose import jwk as jose_jwk

from governance.errors import ExpiredCredential, Unauthenticated
from governance.identity.config import IdentityConfig
from governance.identity.verifier import (
    LEEWAY_S,
    MAX_TOKEN_BYTES,
    Key,
    TokenVerifier,
    UnusableKey,
    VerifiedToken,
    build_key,
)
from tests.unit import forge
from tests.unit.forge import NOW_S, TENANT_A, TENANT_B, good_claims, good_header, without


class Keys:
    """Published keys of one issuer, without discovery; records which were asked for."""

    def __init__(self, *published: dict[str, Any]) -> None:
        self._published = {key["kid"]: key for key in published}
        self.asked: list[tuple[str, str]] = []

    async def key(self, kid: str, algorithm: str) -> Key | None:
        self.asked.append((kid, algorithm))
        published = self._published.get(kid)
        try:
            return build_key(published, algorithm) if published else None
        except UnusableKey:
            return None


def default_keys() -> Keys:
    return Keys(forge.rsa_jwk(forge.rsa_key()), forge.ec_jwk(forge.ec_key()))


def verifier(config: IdentityConfig | None = None, keys: Keys | None = None) -> TokenVerifier:
    config = config or forge.identity()
    keys = keys or default_keys()
    urls = [url for issuer in config.issuers for url in issuer.issuer_urls()]
    return TokenVerifier(config.issuers, dict.fromkeys(urls, keys), lambda: NOW_S * 1_000_000)


async def verify(token: str, config: IdentityConfig | None = None) -> VerifiedToken:
    return await verifier(config).verify(token)


async def refused(token: str, config: IdentityConfig | None = None) -> None:
    with pytest.raises(Unauthenticated) as caught:
        await verify(token, config)
    assert type(caught.value) is Unauthenticated
    # The message tells an attacker nothing about which check failed.
    assert caught.value.message == "The credential is not valid."


async def test_a_good_token() -> None:
    token = await verify(forge.good_token())
    assert token.issuer.name == "idp"
    assert token.kid == "k1"
    assert token.claims["sub"] == "person-1"
    assert token.issued_at_us == (NOW_S - 10) * 1_000_000
    assert token.expires_at_us == (NOW_S + 600) * 1_000_000


async def test_a_good_elliptic_curve_token() -> None:
    header = good_header(alg="ES256", kid="e1")
    token = await verify(forge.sign_es256(header, good_claims(), forge.ec_key()))
    assert token.kid == "e1"


async def test_a_good_token_with_several_audiences() -> None:
    await verify(forge.good_token(aud=["other", "gatehouse"]))


# Signature and algorithm


@pytest.mark.parametrize("name", ["none", "None", "NONE", "nOnE", ""])
async def test_no_signature(name: str) -> None:
    signed = f"{forge.encode(good_header(alg=name))}.{forge.encode(good_claims())}"
    await refused(f"{signed}.")
    await refused(f"{signed}.{forge.good_token().split('.')[2]}")


def public_key_forms() -> dict[str, bytes]:
    """Everything public that a verifier may hold and take for an HMAC secret."""
    public = forge.rsa_key().public_key()
    jwk = forge.rsa_jwk(forge.rsa_key())
    spki = PublicFormat.SubjectPublicKeyInfo
    return {
        "pem": public.public_bytes(Encoding.PEM, spki),
        "pem without newline": public.public_bytes(Encoding.PEM, spki).strip(),
        "pkcs1 pem": public.public_bytes(Encoding.PEM, PublicFormat.PKCS1),
        "der": public.public_bytes(Encoding.DER, spki),
        "pkcs1 der": public.public_bytes(Encoding.DER, PublicFormat.PKCS1),
        "modulus": base64.urlsafe_b64decode(jwk["n"] + "=="),
        "modulus text": jwk["n"].encode(),
        "jwk": json.dumps(jwk).encode(),
        "jwks": json.dumps({"keys": [jwk]}).encode(),
        "empty": b"",
    }


@pytest.mark.parametrize("form", list(public_key_forms()))
async def test_public_key_as_hmac_secret(form: str) -> None:
    secret = public_key_forms()[form]
    await refused(forge.sign_hs256(good_header(alg="HS256"), good_claims(), secret))
    # Nor with the asymmetric name kept.
    await refused(forge.sign_hs256(good_header(), good_claims(), secret))


@pytest.mark.parametrize("form", ["pem", "der", "jwks"])
def test_the_library_would_take_such_a_secret(form: str) -> None:
    """Why the fence is needed: some of these secrets are keys to the library itself."""
    secret = public_key_forms()[form]
    if form == "pem":
        with pytest.raises(Exception, match="asymmetric key"):
            jose_jwk.construct(secret, "HS256")
    else:
        assert jose_jwk.construct(secret, "HS256")


@pytest.mark.parametrize("algorithm", ["HS256", "HS512", "PS256", "RS384", "ES384", "EdDSA", "dir"])
async def test_an_algorithm_that_the_issuer_does_not_use(algorithm: str) -> None:
    await refused(forge.sign_rs256(good_header(alg=algorithm), good_claims()))


@pytest.mark.parametrize("algorithm", [None, 7, ["RS256"], {"RS256": 1}])
async def test_an_algorithm_that_is_no_text(algorithm: object) -> None:
    await refused(forge.sign_rs256(good_header(alg=algorithm), good_claims()))


async def test_a_missing_algorithm() -> None:
    await refused(forge.sign_rs256(without(good_header(), "alg"), good_claims()))


async def test_another_key_of_the_same_size() -> None:
    await refused(forge.sign_rs256(good_header(), good_claims(), forge.rsa_key(2048, 1)))


async def test_claims_changed_after_signing() -> None:
    header, _, signature = forge.good_token().split(".")
    await refused(f"{header}.{forge.encode(good_claims(roles=['platform-admin']))}.{signature}")


async def test_an_elliptic_curve_signature_of_zeros() -> None:
    """CVE-2022-21449: r = s = 0 verifies anything in a careless implementation."""
    signed = f"{forge.encode(good_header(alg='ES256', kid='e1'))}.{forge.encode(good_claims())}"
    await refused(f"{signed}.{forge.b64(bytes(64))}")
    await refused(f"{signed}.{forge.b64(bytes(63))}")


async def test_key_type_and_algorithm_do_not_fit() -> None:
    await refused(forge.sign_rs256(good_header(kid="e1"), good_claims()))
    header = good_header(alg="ES256", kid="k1")
    await refused(forge.sign_es256(header, good_claims(), forge.ec_key()))


async def test_the_twin_of_an_elliptic_curve_signature_is_known() -> None:
    """(r, -s) is as good as (r, s), so both texts must be known to be one token."""
    token = forge.sign_es256(good_header(alg="ES256", kid="e1"), good_claims(), forge.ec_key())
    twin = (await verify(token)).twin
    assert twin is not None
    assert twin != token
    assert twin.rpartition(".")[0] == token.rpartition(".")[0]
    assert (await verify(twin)).twin == token
    assert (await verify(forge.good_token())).twin is None


async def test_an_rsa_signature_has_no_twin() -> None:
    head, _, signature = forge.good_token().rpartition(".")
    number = int.from_bytes(base64.urlsafe_b64decode(signature + "=="), "big")
    modulus = forge.rsa_key().public_key().public_numbers().n
    for other in (number + modulus, modulus - number):
        size = (other.bit_length() + 7) // 8
        await refused(f"{head}.{forge.b64(other.to_bytes(size, 'big'))}")


# Header


@pytest.mark.parametrize(
    "extra",
    [
        {"crit": ["exp"]},
        {"crit": []},
        {"crit": ["b64"], "b64": False},
        {"b64": True},
        {"jku": "https://attacker.example/keys"},
        {"jwk": forge.rsa_jwk(forge.rsa_key(2048, 1))},
        {"x5u": "https://attacker.example/chain"},
        {"x5c": ["MIIB"]},
        {"zip": "DEF"},
        {"enc": "A256GCM"},
        {"jku": None},
    ],
    ids=lambda extra: "+".join(extra),
)
async def test_headers_that_bring_a_key_or_change_what_is_signed(extra: dict[str, object]) -> None:
    await refused(forge.sign_rs256(good_header(**extra), good_claims()))


async def test_an_embedded_key_is_not_used() -> None:
    key = forge.rsa_key(2048, 1)
    await refused(forge.sign_rs256(good_header(jwk=forge.rsa_jwk(key)), good_claims(), key))
    await refused(forge.sign_rs256(good_header(), good_claims(), key))


@pytest.mark.parametrize("kid", ["", "k" * 257, 1, None, ["k1"]])
async def test_key_ids_that_are_not_even_looked_up(kid: object) -> None:
    """An id nobody publishes may cost a renewal, so what cannot be one is refused before."""
    keys = default_keys()
    with pytest.raises(Unauthenticated):
        await verifier(keys=keys).verify(forge.sign_rs256(good_header(kid=kid), good_claims()))
    assert keys.asked == []


@pytest.mark.parametrize("kid", [None, "", "k2", 1, ["k1"], {"k1": 1}, "k" * 257, "../k1"])
async def test_key_ids_that_are_not_published(kid: object) -> None:
    await refused(forge.sign_rs256(good_header(kid=kid), good_claims()))


async def test_a_missing_key_id() -> None:
    """Though one key alone is published, nothing is tried."""
    keys = default_keys()
    token = forge.sign_rs256(without(good_header(), "kid"), good_claims())
    with pytest.raises(Unauthenticated):
        await verifier(keys=keys).verify(token)
    assert keys.asked == []


@pytest.mark.parametrize("kind", ["at+jwt", "AT+JWT", "application/at+jwt", "JWT", "jwt"])
async def test_types_that_count(kind: str) -> None:
    await verify(forge.sign_rs256(good_header(typ=kind), good_claims()))


@pytest.mark.parametrize(
    "kind",
    [
        "logout+jwt",
        "dpop+jwt",
        "JOSE",
        "id+jwt",
        "absent",
        "text/jwt",
        "application/application/jwt",
        "",
        None,
        1,
        ["JWT"],
    ],
)
async def test_types_that_do_not(kind: object) -> None:
    await refused(forge.sign_rs256(good_header(typ=kind), good_claims()))


async def test_a_missing_type_counts_only_where_the_issuer_is_known_to_leave_it_out() -> None:
    token = forge.sign_rs256(without(good_header(), "typ"), good_claims())
    await refused(token)
    okta = forge.identity(forge.issuer_section(types=["absent"]))
    assert (await verify(token, okta)).kid == "k1"
    await refused(forge.good_token(), okta)


async def test_an_id_token_where_the_issuer_follows_rfc_9068() -> None:
    strict = forge.identity(forge.issuer_section(types=["at+jwt"]))
    await refused(forge.sign_rs256(good_header(typ="JWT"), good_claims()), strict)
    await verify(forge.good_token(), strict)


# Form


async def test_a_token_that_is_too_large() -> None:
    await refused(forge.good_token(padding="x" * 20_000))
    room = (MAX_TOKEN_BYTES - len(forge.good_token(padding=""))) * 3 // 4 - 4
    await verify(forge.good_token(padding="x" * room))


@pytest.mark.parametrize("parts", [1, 2, 4, 5])
async def test_a_wrong_number_of_parts(parts: int) -> None:
    token = forge.good_token().split(".")
    await refused(".".join((token + token)[:parts]))


@pytest.mark.parametrize("token", ["", ".", "..", "...", "a.b.c", "\x00.\x00.\x00", "ü.ü.ü"])
async def test_what_is_no_token(token: str) -> None:
    await refused(token)


@pytest.mark.parametrize("change", ["{}=", "{}==", "{} ", " {}", "{}\n", "{}\t"])
async def test_spellings_of_the_signature(change: str) -> None:
    head, _, signature = forge.good_token().rpartition(".")
    await refused(f"{head}.{change.format(signature)}")


async def test_the_other_alphabet_and_leftover_bits() -> None:
    """A second spelling of one token would escape a revocation of its hash."""
    for serial in range(64):
        token = forge.good_token(jti=f"t-{serial}")
        head, _, signature = token.rpartition(".")
        if "-" in signature or "_" in signature:
            break
    await refused(f"{head}.{signature.replace('-', '+').replace('_', '/')}")
    # 256 bytes leave four unused bits in the last character.
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    twin = signature[:-1] + alphabet[alphabet.index(signature[-1]) ^ 1]
    assert base64.urlsafe_b64decode(twin + "==") == base64.urlsafe_b64decode(signature + "==")
    await refused(f"{head}.{twin}")
    await verify(token)


@pytest.mark.parametrize(
    "header",
    [
        '{"alg":"none","alg":"RS256","typ":"JWT","kid":"k1"}',
        '{"alg":"RS256","typ":"JWT","kid":"k1","kid":"k1"}',
        '{"alg":"RS256","typ":"JWT","kid":"k1","x":{"a":1,"a":2}}',
        '["RS256"]',
        '"RS256"',
        "null",
        "",
        "{",
        '{"alg":"RS256","typ":"JWT","kid":"k1","x":NaN}',
        '{"alg":"RS256","typ":"JWT","kid":"k1"}{}',
        "\ufeff" + '{"alg":"RS256","typ":"JWT","kid":"k1"}',
    ],
)
async def test_headers_that_are_read_in_two_ways(header: str) -> None:
    await refused(forge.sign_rs256(header, good_claims()))


@pytest.mark.parametrize("name", ["aud", "iss", "sub", "exp", "roles"])
async def test_claims_given_twice(name: str) -> None:
    claims = json.dumps(good_claims())
    twice = claims[:-1] + f", {json.dumps(name)}: {json.dumps(good_claims()[name])}}}"
    await refused(forge.sign_rs256(good_header(), twice))


async def test_claims_that_are_no_object_or_no_text() -> None:
    for claims in ("[]", "null", "1", '"x"', b"\xff\xfe{\x00}\x00"):
        await refused(forge.sign_rs256(good_header(), claims))


@pytest.mark.parametrize("name", ["jti", "sub", "client_id", "anything"])
async def test_half_a_character(name: str) -> None:
    await refused(forge.good_token(**{name: "\ud800"}))
    await verify(forge.good_token(**{name: "\U0001f600"}))


async def test_nesting_and_numbers_without_end() -> None:
    deep = "[" * 5_000 + "]" * 5_000
    await refused(forge.sign_rs256(good_header(), f'{{"iss":"{forge.ISSUER}","x":{deep}}}'))
    await refused(forge.sign_rs256(good_header(), f'{{"iss":"{forge.ISSUER}","exp":{"9" * 9000}}}'))
    many = {f"c{i}": i for i in range(300)}
    await refused(forge.sign_rs256(good_header(), good_claims(**many)))


# Claims


@pytest.mark.parametrize("name", ["iss", "aud", "sub", "exp", "iat"])
async def test_a_missing_claim(name: str) -> None:
    await refused(forge.sign_rs256(good_header(), without(good_claims(), name)))


@pytest.mark.parametrize(
    "issuer",
    [
        "https://attacker.example",
        "https://idp.example.com/",
        "https://IDP.example.com",
        "http://idp.example.com",
        " https://idp.example.com",
        "https://idp.example.com.attacker.example",
        None,
        1,
        ["https://idp.example.com"],
        {},
    ],
)
async def test_issuers_that_are_not_exactly_ours(issuer: object) -> None:
    await refused(forge.good_token(iss=issuer))


@pytest.mark.parametrize(
    "audience",
    ["other", "Gatehouse", "", None, 1, [], ["other"], [["gatehouse"]], {"gatehouse": 1}],
)
async def test_audiences_that_are_not_us(audience: object) -> None:
    await refused(forge.good_token(aud=audience))


@pytest.mark.parametrize("subject", ["", None, 1, True, ["person-1"], {}])
async def test_subjects_that_name_nobody(subject: object) -> None:
    await refused(forge.good_token(sub=subject))


@pytest.mark.parametrize("name", ["exp", "iat", "nbf"])
@pytest.mark.parametrize("value", [True, False, "1800000600", None, [], {}, 0, -1])
async def test_times_that_are_no_times(name: str, value: object) -> None:
    await refused(forge.good_token(**{name: value}))


@pytest.mark.parametrize("name", ["exp", "iat", "nbf"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
async def test_times_that_are_no_numbers_of_json(name: str, value: str) -> None:
    claims = json.dumps(without(good_claims(), name))[:-1] + f', "{name}": {value}}}'
    await refused(forge.sign_rs256(good_header(), claims))


async def test_a_time_in_milliseconds() -> None:
    await refused(forge.good_token(exp=(NOW_S + 600) * 1000))


async def test_a_fraction_of_a_second_is_a_time() -> None:
    token = await verify(forge.good_token(exp=NOW_S + 0.5))
    assert token.expires_at_us == NOW_S * 1_000_000 + 500_000


async def test_expiry_with_a_minute_of_tolerance() -> None:
    await verify(forge.good_token(exp=NOW_S - LEEWAY_S + 1, iat=NOW_S - 600))
    for late_s in (LEEWAY_S, LEEWAY_S + 1, 100_000):
        with pytest.raises(ExpiredCredential):
            await verify(forge.good_token(exp=NOW_S - late_s, iat=NOW_S - 100_600))


async def test_an_expired_forgery_is_not_called_expired() -> None:
    """Otherwise the answer would say something about a token that was never checked."""
    claims = good_claims(exp=NOW_S - 600, iat=NOW_S - 900)
    await refused(forge.sign_rs256(good_header(), claims, forge.rsa_key(2048, 1)))


@pytest.mark.parametrize("name", ["nbf", "iat"])
async def test_a_token_from_the_future(name: str) -> None:
    await verify(forge.good_token(**{name: NOW_S + LEEWAY_S}))
    await refused(forge.good_token(**{name: NOW_S + LEEWAY_S + 1}))


async def test_a_token_that_ends_before_it_begins_or_lives_for_days() -> None:
    await refused(forge.good_token(exp=NOW_S + 10, iat=NOW_S + 20))
    await refused(forge.good_token(exp=NOW_S + 40 * 3600))


# Tenants


def entra_claims(tenant: str, issuer_tenant: str | None = None) -> dict[str, Any]:
    url = f"https://login.example.com/{issuer_tenant or tenant}/v2.0"
    return good_claims(iss=url, tid=tenant, oid="object-1")


@pytest.mark.parametrize("tenant", [TENANT_A, TENANT_B])
async def test_tenants_that_are_accepted(tenant: str) -> None:
    config = forge.identity(forge.entra_section())
    await verify(forge.sign_rs256(good_header(), entra_claims(tenant)), config)


@pytest.mark.parametrize(
    "claims",
    [
        entra_claims("cccccccc-0000-4000-8000-000000000003"),
        entra_claims(TENANT_A, TENANT_B),
        entra_claims(TENANT_A, "{tid}"),
        entra_claims(TENANT_A, "common"),
        entra_claims("common", "common"),
        entra_claims(TENANT_A.upper()),
        without(entra_claims(TENANT_A), "tid"),
        {**entra_claims(TENANT_A), "tid": [TENANT_A]},
        {**entra_claims(TENANT_A), "tid": None},
    ],
)
async def test_tenants_that_are_not(claims: dict[str, Any]) -> None:
    config = forge.identity(forge.entra_section())
    await refused(forge.sign_rs256(good_header(), claims), config)


async def test_one_tenants_key_does_not_speak_for_another() -> None:
    config = forge.identity(forge.entra_section())
    urls = config.issuers[0].issuer_urls()
    keys = {urls[0]: default_keys(), urls[1]: Keys(forge.rsa_jwk(forge.rsa_key(2048, 1)))}
    checks = TokenVerifier(config.issuers, keys, lambda: NOW_S * 1_000_000)
    await checks.verify(forge.sign_rs256(good_header(), entra_claims(TENANT_A)))
    with pytest.raises(Unauthenticated):
        await checks.verify(forge.sign_rs256(good_header(), entra_claims(TENANT_B)))


# Published keys


def test_a_whole_key_set_is_no_key() -> None:
    with pytest.raises(UnusableKey):
        build_key({"keys": [forge.rsa_jwk(forge.rsa_key())]}, "RS256")


@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [("RS256", "EC"), ("ES256", "RSA")]
    + [(a, k) for a in ("RS256", "ES256") for k in ("oct", "OKP", "rsa", "ec", None, ["RSA"])],
)
def test_the_key_type_is_our_own_check(algorithm: str, kind: object) -> None:
    """Refused before the library sees the key, which has an opinion of its own."""
    key = forge.rsa_jwk(forge.rsa_key()) | forge.ec_jwk(forge.ec_key())
    with pytest.raises(UnusableKey, match="key type"):
        build_key({**key, "kty": kind}, algorithm)


@pytest.mark.parametrize(
    "change",
    [
        {"kty": "EC"},
        {"kty": "oct", "k": "c2VjcmV0"},
        {"kty": None},
        {"use": "enc"},
        {"use": ["sig"]},
        {"alg": "RS512"},
        {"alg": None},
        {"key_ops": []},
        {"key_ops": ["encrypt"]},
        {"key_ops": 5},
        {"key_ops": "verify"},
        {"d": "AQAB"},
        {"k": "c2VjcmV0"},
        {"n": ""},
        {"n": "!!"},
        {"n": 5},
        {"n": "ü"},
        {"e": "!!"},
        {"e": 65537},
        {"e": "AQ"},
        {"e": None},
    ],
    ids=str,
)
def test_rsa_keys_that_may_not_be_used(change: dict[str, object]) -> None:
    with pytest.raises(UnusableKey):
        build_key({**forge.rsa_jwk(forge.rsa_key()), **change}, "RS256")


@pytest.mark.parametrize("bits", [1024, 2040, 8200])
@pytest.mark.parametrize("padding_bytes", [0, 128])
def test_rsa_keys_of_the_wrong_size(bits: int, padding_bytes: int) -> None:
    """Leading zeros do not make a short key long."""
    modulus = bytes(padding_bytes) + ((1 << bits) - 1).to_bytes(bits // 8, "big")
    with pytest.raises(UnusableKey, match="bits"):
        build_key({**forge.rsa_jwk(forge.rsa_key()), "n": forge.b64(modulus)}, "RS256")


@pytest.mark.parametrize(
    "change",
    [
        {"crv": "P-384"},
        {"crv": None},
        {"crv": "secp256k1"},
        {"kty": "RSA"},
        {"x": "AA"},
        {"y": forge.b64(bytes(32))},
        {"x": 5},
        {"x": 10**30},
        {"d": "AQAB"},
    ],
    ids=str,
)
def test_elliptic_curve_keys_that_may_not_be_used(change: dict[str, object]) -> None:
    with pytest.raises(UnusableKey):
        build_key({**forge.ec_jwk(forge.ec_key()), **change}, "ES256")


def test_a_curve_belongs_to_its_algorithm() -> None:
    large = forge.ec_jwk(forge.ec_key(ec.SECP384R1))
    assert build_key(large, "ES384")
    with pytest.raises(UnusableKey):
        build_key(large, "ES256")


@pytest.mark.parametrize("algorithm", ["HS256", "none", "", "PS256", "dir"])
def test_no_key_is_built_for_another_algorithm(algorithm: str) -> None:
    with pytest.raises(UnusableKey):
        build_key(forge.rsa_jwk(forge.rsa_key()), algorithm)


def test_parts_that_are_not_the_key_are_left_out() -> None:
    with_chain = forge.rsa_jwk(forge.rsa_key(), use="sig", alg="RS256", x5c=["MIIB"], x5t="a")
    assert build_key(with_chain, "RS256")
