"""Tokens made by hand, without any JWT library, so that an attack is exactly what it says."""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from governance.identity.config import IdentityConfig

NOW_S = 1_800_000_000
ISSUER = "https://idp.example.com"
JWKS_URI = "https://idp.example.com/keys"
TENANT_A = "aaaaaaaa-0000-4000-8000-000000000001"
TENANT_B = "bbbbbbbb-0000-4000-8000-000000000002"
PEPPER = b"p" * 32


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def number(value: int) -> str:
    return b64(value.to_bytes((value.bit_length() + 7) // 8, "big"))


@functools.cache
def rsa_key(bits: int = 2048, serial: int = 0) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


@functools.cache
def ec_key(curve: type[ec.EllipticCurve] = ec.SECP256R1) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve())


def rsa_jwk(key: rsa.RSAPrivateKey, kid: str = "k1", **more: Any) -> dict[str, Any]:
    public = key.public_key().public_numbers()
    return {"kty": "RSA", "kid": kid, "n": number(public.n), "e": number(public.e), **more}


def ec_jwk(key: ec.EllipticCurvePrivateKey, kid: str = "e1", **more: Any) -> dict[str, Any]:
    public = key.public_key().public_numbers()
    size = (key.curve.key_size + 7) // 8
    name = {256: "P-256", 384: "P-384", 521: "P-521"}[key.curve.key_size]
    x, y = (b64(v.to_bytes(size, "big")) for v in (public.x, public.y))
    return {"kty": "EC", "kid": kid, "crv": name, "x": x, "y": y, **more}


def good_header(**more: Any) -> dict[str, Any]:
    return {"alg": "RS256", "typ": "at+jwt", "kid": "k1", **more}


def good_claims(**more: Any) -> dict[str, Any]:
    return {
        "iss": ISSUER,
        "aud": "gatehouse",
        "sub": "person-1",
        "exp": NOW_S + 600,
        "iat": NOW_S - 10,
        "jti": "t-1",
        "roles": ["hr-analyst"],
        **more,
    }


def without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def encode(part: Mapping[str, Any] | str | bytes) -> str:
    if isinstance(part, bytes):
        return b64(part)
    return b64((part if isinstance(part, str) else json.dumps(part)).encode())


def sign_rs256(
    header: Mapping[str, Any] | str,
    claims: Mapping[str, Any] | str | bytes,
    key: rsa.RSAPrivateKey | None = None,
) -> str:
    signed = f"{encode(header)}.{encode(claims)}"
    signature = (key or rsa_key()).sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
    return f"{signed}.{b64(signature)}"


def sign_es256(
    header: Mapping[str, Any], claims: Mapping[str, Any], key: ec.EllipticCurvePrivateKey
) -> str:
    signed = f"{encode(header)}.{encode(claims)}"
    r, s = decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{signed}.{b64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def sign_hs256(header: Mapping[str, Any], claims: Mapping[str, Any], secret: bytes) -> str:
    signed = f"{encode(header)}.{encode(claims)}"
    return f"{signed}.{b64(hmac.new(secret, signed.encode(), hashlib.sha256).digest())}"


def good_token(**more: Any) -> str:
    return sign_rs256(good_header(), good_claims(**more))


def issuer_section(**more: Any) -> dict[str, Any]:
    return {
        "name": "idp",
        "issuer": ISSUER,
        "audiences": ["gatehouse"],
        "algorithms": ["RS256", "ES256"],
        "jwks_uri": JWKS_URI,
        "groups_claim": "groups",
        **more,
    }


def entra_section(**more: Any) -> dict[str, Any]:
    return issuer_section(
        issuer="https://login.example.com/{tid}/v2.0",
        tenants=[TENANT_A, TENANT_B],
        subject=["tid", "oid"],
        jwks_uri="https://login.example.com/{tid}/keys",
        **more,
    )


MAPPINGS: list[dict[str, Any]] = [
    {"when": {"role": "hr-analyst"}, "grant": ["employee", "analyst"], "department": "hr"}
]


def identity(
    *issuers: dict[str, Any], mappings: list[dict[str, Any]] | None = None
) -> IdentityConfig:
    return IdentityConfig.model_validate(
        {"issuers": list(issuers) or [issuer_section()], "mappings": mappings or MAPPINGS}
    )


class Clocks:
    """A wall clock and a monotonic one, moved by hand."""

    def __init__(self) -> None:
        self.wall_s: float = NOW_S
        self.steady_s = 1000.0

    def now_us(self) -> int:
        return int(self.wall_s * 1_000_000)

    def monotonic(self) -> float:
        return self.steady_s

    def advance(self, seconds: float) -> None:
        self.wall_s += seconds
        self.steady_s += seconds


class Web:
    """Documents by URL; counts what is asked for. A missing one cannot be had."""

    def __init__(self, **documents: Any) -> None:
        self.documents: dict[str, Any] = dict(documents)
        self.asked: list[str] = []

    def publish(self, *keys: Mapping[str, Any], url: str = JWKS_URI) -> None:
        self.documents[url] = {"keys": list(keys)}

    async def __call__(self, url: str) -> bytes:
        self.asked.append(url)
        if url not in self.documents:
            raise OSError("answered 404")
        document = self.documents[url]
        return document if isinstance(document, bytes) else json.dumps(document).encode()
