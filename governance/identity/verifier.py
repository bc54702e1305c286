"""The fence around the JWT library: the only module that imports it, and it only checks signatures.

python-jose accepts, with default options: a token without ``aud`` or ``exp``, any ``typ``, unknown
``crit`` extensions, a whole key set regardless of ``kid``, and PEM or DER keys as HMAC secrets.
So nothing of a token is left to it: header and claims are parsed and checked here, one key is
chosen by (issuer, kid), and the library gets that key and the signed bytes.

Order matters: shape and header, then the issuer's key, then the signature, and only then are
claims believed.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric import ec
from jose import jwk as jose_jwk
from jose.exceptions import JOSEError

from governance.control.records import MAX_TOKEN_REVOCATION_S
from governance.errors import ExpiredCredential, Unauthenticated
from governance.identity.config import TENANT, IssuerConfig
from governance.ports import Clock

MAX_TOKEN_BYTES = 16 * 1024
LEEWAY_S = 60
"""Difference of clocks that is tolerated, in seconds."""
MAX_TIME_S = 10**11
"""A NumericDate beyond the year 5000 is a mistake, usually milliseconds."""
MAX_CLAIMS = 256
MIN_RSA_BITS = 2048
MAX_RSA_BITS = 8192
"""A larger key makes every check slow."""

_REFUSED_HEADERS = frozenset({"crit", "jku", "jwk", "x5u", "x5c", "zip", "b64", "enc"})
"""Headers that bring a key or change what is signed. Not ``x5t``: Entra sends it as a mere hint
beside ``kid``, and nothing here reads it."""
_KEY_TYPES = {"RS": "RSA", "ES": "EC"}
_CURVES = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521"}
_ORDERS = {
    "ES256": ec.SECP256R1.group_order,
    "ES384": ec.SECP384R1.group_order,
    "ES512": ec.SECP521R1.group_order,
}
_BASE64URL = re.compile(rb"[A-Za-z0-9_-]+\Z")


class Key(Protocol):
    """A prebuilt verification key."""

    def verify(self, message: bytes, signature: bytes) -> bool:
        """Whether the signature is good."""
        ...


class KeySource(Protocol):
    """Where an issuer's keys come from (``governance.identity.jwks``)."""

    async def key(self, kid: str, algorithm: str) -> Key | None:
        """The key of that id, prebuilt for that algorithm; ``None`` when there is none.

        Raises:
            IdentityUnavailable: The issuer's keys cannot be had.
        """
        ...


@dataclass(frozen=True, slots=True)
class VerifiedToken:
    """A token whose signature and standard claims have been checked."""

    issuer: IssuerConfig
    kid: str
    claims: Mapping[str, Any]
    issued_at_us: int
    expires_at_us: int
    twin: str | None = None
    """The one other text that passes for this token, or ``None`` with RSA: if (r, s) is an ECDSA
    signature then so is (r, -s), and no key is needed to compute it."""


class UnusableKey(ValueError):
    """A published key that may not be used, with the reason."""


def build_key(published: Mapping[str, Any], algorithm: str) -> Key:
    """Prebuild one published key for one algorithm.

    Args:
        published: A JWK (RFC 7517), public part only.
        algorithm: The algorithm it will verify.

    Raises:
        UnusableKey: Wrong type, curve, size, use or algorithm; or it holds a private part.
    """
    family = algorithm[:2]
    if published.get("kty") != _KEY_TYPES.get(family):
        raise UnusableKey("key type does not fit the algorithm")
    if "d" in published or "k" in published:
        raise UnusableKey("a private or symmetric key is published")
    if published.get("use", "sig") != "sig":
        raise UnusableKey("not a signature key")
    operations = published.get("key_ops", ["verify"])
    if not isinstance(operations, list) or "verify" not in operations:
        raise UnusableKey("key operations do not include verify")
    if published.get("alg", algorithm) != algorithm:
        raise UnusableKey("published for another algorithm")
    if family == "ES" and published.get("crv") != _CURVES.get(algorithm):
        raise UnusableKey("curve does not fit the algorithm")
    if family == "RS" and not MIN_RSA_BITS <= _bits(published.get("n")) <= MAX_RSA_BITS:
        raise UnusableKey(f"RSA key has not {MIN_RSA_BITS} to {MAX_RSA_BITS} bits")
    public = ("kty", "n", "e", "crv", "x", "y")
    parts = {name: published[name] for name in public if name in published}
    if not all(isinstance(part, str) for part in parts.values()):
        raise UnusableKey("malformed key")
    try:
        key: Key = jose_jwk.construct(parts, algorithm)
    except (JOSEError, ValueError, TypeError, KeyError, AttributeError):
        raise UnusableKey("malformed key") from None
    return key


def _bits(number: object) -> int:
    """Length of a published number; leading zero bytes add nothing to it."""
    try:
        data = _decode(number.encode("ascii")) if isinstance(number, str) else b""
    except ValueError:
        raise UnusableKey("malformed key") from None
    return int.from_bytes(data, "big").bit_length()


class TokenVerifier:
    """Verifies access tokens of the configured issuers.

    Args:
        issuers: The issuers.
        keys: Their keys, by ``iss``: a tenant's tokens are checked with that tenant's keys.
        clock: Wall clock.
    """

    def __init__(
        self, issuers: tuple[IssuerConfig, ...], keys: Mapping[str, KeySource], clock: Clock
    ) -> None:
        self._by_url = {url: issuer for issuer in issuers for url in issuer.issuer_urls()}
        self._keys = keys
        self._clock = clock

    async def verify(self, token: str) -> VerifiedToken:
        """Check a token.

        Raises:
            Unauthenticated: Anything about it is wrong; the message says no more than that.
            ExpiredCredential: It was good, and is no longer.
            IdentityUnavailable: The issuer's keys cannot be had.
        """
        header, claims, signed, signature = _parse(token)
        url, issuer = self._issuer(claims)
        algorithm, kid = _check_header(header, issuer)
        key = await self._keys[url].key(kid, algorithm)
        if key is None or not _signature_is_good(key, signed, signature):
            raise Unauthenticated()
        issued_s, expires_s = self._check_claims(issuer, claims)
        return VerifiedToken(
            issuer=issuer,
            kid=kid,
            claims=claims,
            issued_at_us=int(issued_s * 1_000_000),
            expires_at_us=int(expires_s * 1_000_000),
            twin=_twin(signed, signature, algorithm),
        )

    def _issuer(self, claims: Mapping[str, Any]) -> tuple[str, IssuerConfig]:
        """Choose the configured issuer by the unverified ``iss``; it only selects keys."""
        url = claims.get("iss")
        issuer = self._by_url.get(url) if isinstance(url, str) else None
        if not isinstance(url, str) or issuer is None:
            raise Unauthenticated()
        return url, issuer

    def _check_claims(self, issuer: IssuerConfig, claims: Mapping[str, Any]) -> tuple[float, float]:
        """Check what the token says; gives the times of issue and expiry, in seconds."""
        now_s = self._clock() / 1_000_000
        audience = claims.get("aud")
        audiences = [audience] if isinstance(audience, str) else audience
        if not isinstance(audiences, list) or not any(
            isinstance(a, str) and a in issuer.audiences for a in audiences
        ):
            raise Unauthenticated()
        subject = claims.get("sub")
        if not isinstance(subject, str) or not subject:
            raise Unauthenticated()
        if TENANT in issuer.issuer and claims.get("iss") != issuer.issuer.replace(
            TENANT, str(claims.get("tid"))
        ):
            raise Unauthenticated()
        expires_s, issued_s = _time(claims, "exp"), _time(claims, "iat")
        # A token that outlives the memory of its revocation would come back to life.
        if issued_s > now_s + LEEWAY_S or not 0 < expires_s - issued_s <= MAX_TOKEN_REVOCATION_S:
            raise Unauthenticated()
        if "nbf" in claims and _time(claims, "nbf") > now_s + LEEWAY_S:
            raise Unauthenticated()
        if expires_s <= now_s - LEEWAY_S:
            raise ExpiredCredential()
        return issued_s, expires_s


def _parse(token: str) -> tuple[dict[str, Any], dict[str, Any], bytes, bytes]:
    """Header, claims, signed bytes and signature of a compact JWS."""
    try:
        raw = token.encode("ascii")
    except UnicodeEncodeError:
        raise Unauthenticated() from None
    parts = raw.split(b".")
    if len(raw) > MAX_TOKEN_BYTES or len(parts) != 3:
        raise Unauthenticated()
    try:
        header, claims, signature = (_decode(part) for part in parts)
        return _object(header), _object(claims), parts[0] + b"." + parts[1], signature
    except (ValueError, RecursionError):
        raise Unauthenticated() from None


def _decode(part: bytes) -> bytes:
    """Strict base64url without padding (RFC 7515 section 2).

    Raises:
        ValueError: Another alphabet, padding, or bits left over: two spellings of one token would
            escape a revocation of its hash.
    """
    if not _BASE64URL.match(part):
        raise ValueError("not base64url")
    try:
        value = base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))
    except binascii.Error:
        raise ValueError("not base64url") from None
    if base64.urlsafe_b64encode(value).rstrip(b"=") != part:
        raise ValueError("not canonical base64url")
    return value


def _object(data: bytes) -> dict[str, Any]:
    """A JSON object without duplicate names, NaN, Infinity or lone surrogates."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs) or len(value) > MAX_CLAIMS:
            raise ValueError("duplicate or too many names")
        return value

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    if b"\\u" in data:
        # Half a character can be escaped in JSON, but no record could hold it.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _check_header(header: Mapping[str, Any], issuer: IssuerConfig) -> tuple[str, str]:
    """Algorithm and key id of an acceptable header."""
    if not _REFUSED_HEADERS.isdisjoint(header):
        raise Unauthenticated()
    if _kind(header) not in issuer.types:
        raise Unauthenticated()
    algorithm, kid = header.get("alg"), header.get("kid")
    if not isinstance(algorithm, str) or algorithm not in issuer.algorithms:
        raise Unauthenticated()
    if not isinstance(kid, str) or not 0 < len(kid) <= 256:
        raise Unauthenticated()
    return algorithm, kid


def _kind(header: Mapping[str, Any]) -> str | None:
    """The ``typ`` as configuration spells it; a media type, so case does not count."""
    if "typ" not in header:
        return "absent"
    kind = header["typ"]
    if not isinstance(kind, str):
        return None
    return {"jwt": "JWT", "at+jwt": "at+jwt"}.get(kind.lower().removeprefix("application/"))


def _signature_is_good(key: Key, signed: bytes, signature: bytes) -> bool:
    try:
        return key.verify(signed, signature)
    except (JOSEError, ValueError, TypeError):
        return False


def _twin(signed: bytes, signature: bytes, algorithm: str) -> str | None:
    order = _ORDERS.get(algorithm)
    if order is None:
        return None
    half = len(signature) // 2
    other = order - int.from_bytes(signature[half:], "big")
    encoded = base64.urlsafe_b64encode(signature[:half] + other.to_bytes(half, "big"))
    return (signed + b"." + encoded.rstrip(b"=")).decode("ascii")


def _time(claims: Mapping[str, Any], name: str) -> float:
    """A NumericDate (RFC 7519 section 2)."""
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unauthenticated()
    # Also refuses NaN, infinities, and integers too long for a float.
    if not 0 < value < MAX_TIME_S:
        raise Unauthenticated()
    return float(value)
