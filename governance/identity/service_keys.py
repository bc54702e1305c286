"""Service keys: their format, how they are minted, and how a presented one is checked.

    ghk_<key id>_<secret>_<crc>
        12       52       8        characters

Key id and secret are RFC 4648 base32 in lower case (60 and 256 bits), the checksum is the CRC-32
of everything before it in eight hexadecimal digits. The checksum keeps no secret: it lets a typing
error, a truncated paste or a secret scanner be judged without a lookup. All characters are letters,
digits and underscores, so that a double click selects the whole key.

Only HMAC-SHA256(pepper, secret) is stored. The secret has 256 bits of its own, so a slow password
hash would add latency to every request and no strength.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from governance.control.snapshot import ControlSnapshot, Revocations, ServiceKeyRecord
from governance.errors import (
    ControlUnavailable,
    ExpiredCredential,
    RevokedCredential,
    Unauthenticated,
)
from governance.identity.pseudonym import principal_key
from governance.ports import Clock
from governance.types import Principal, PrincipalKind

PREFIX = "ghk_"
ISSUER = "gatehouse"
"""Issuer name of every principal behind a service key."""
KEY_ID_CHARS = 12
SECRET_BYTES = 32
MAX_COPY_AGE_S = 10.0
"""Oldest copy of keys and revocations, in seconds, that may still authorise a service key. A key
has no expiry of minutes as a token has, so a gateway that is cut off must stop believing it."""

_SECRET_CHARS = 52
_CRC_CHARS = 8
_KEY_CHARS = len(PREFIX) + KEY_ID_CHARS + 1 + _SECRET_CHARS + 1 + _CRC_CHARS
_BASE32 = frozenset("abcdefghijklmnopqrstuvwxyz234567")
_NO_HASH = "0" * 64


@dataclass(frozen=True, slots=True)
class ServiceKey:
    """A key taken apart. The secret stays out of ``repr`` and so out of logs."""

    key_id: str
    secret: bytes = field(repr=False)
    """256 bits."""

    def text(self) -> str:
        """The key as its holder keeps it; show it once and store it nowhere."""
        encoded = base64.b32encode(self.secret).decode("ascii").rstrip("=").lower()
        body = f"{PREFIX}{self.key_id}_{encoded}"
        return f"{body}_{zlib.crc32(body.encode('ascii')):08x}"


def mint(random_bytes: Callable[[int], bytes]) -> ServiceKey:
    """A new key.

    Args:
        random_bytes: Cryptographic randomness, such as ``secrets.token_bytes``.
    """
    key_id = base64.b32encode(random_bytes(8)).decode("ascii").lower()[:KEY_ID_CHARS]
    return ServiceKey(key_id, random_bytes(SECRET_BYTES))


def is_service_key(credential: str) -> bool:
    """Whether a credential claims to be a service key (and so is not a token)."""
    return credential.startswith(PREFIX)


def is_key_id(text: str) -> bool:
    """Whether a text has the form of a key id."""
    return len(text) == KEY_ID_CHARS and _BASE32.issuperset(text)


def parse(presented: str) -> ServiceKey:
    """Take a presented key apart; exactly one text stands for a key.

    Raises:
        Unauthenticated: Not a service key, or mistyped. The message does not say which.
    """
    if len(presented) != _KEY_CHARS or not presented.startswith(PREFIX):
        raise Unauthenticated
    key_id = presented[len(PREFIX) : len(PREFIX) + KEY_ID_CHARS]
    encoded = presented[len(PREFIX) + KEY_ID_CHARS + 1 : -_CRC_CHARS - 1]
    if not is_key_id(key_id) or not _BASE32.issuperset(encoded):
        raise Unauthenticated
    # 52 characters hold 260 bits: the text must be the one that the 256 bits give, or some keys
    # would have 16 spellings and a revocation by the hash of the credential would catch only one.
    key = ServiceKey(key_id, base64.b32decode(encoded.upper() + "===="))
    if not hmac.compare_digest(key.text().encode("ascii"), presented.encode("utf-8", "replace")):
        raise Unauthenticated
    return key


def hash_secret(pepper: bytes, secret: bytes) -> str:
    """What is stored of a secret: HMAC-SHA256(pepper, secret) in hex."""
    return hmac.new(pepper, secret, hashlib.sha256).hexdigest()


class ServiceKeyChecker:
    """Turns a presented service key into a principal, from the local copy of the control plane.

    Costs two hashes and no I/O. Someone without the secret learns nothing: an unknown key, a
    wrong secret and a malformed key give one answer, after the same work. Only the holder of the
    secret is told that a key expired or was revoked.

    Args:
        snapshot: The latest copy.
        confirmed_age_s: Seconds since the control plane last confirmed that copy.
        pepper: Secret of this installation.
        clock: Wall clock.
        used: Called with the id of each accepted key; must be quick and not raise.
    """

    def __init__(
        self,
        snapshot: Callable[[], ControlSnapshot],
        confirmed_age_s: Callable[[], float],
        pepper: bytes,
        clock: Clock,
        used: Callable[[str], None] | None = None,
    ) -> None:
        self._snapshot = snapshot
        self._confirmed_age_s = confirmed_age_s
        self._pepper = pepper
        self._clock = clock
        self._used = used

    def check(self, presented: str) -> Principal:
        """Verify a key.

        Raises:
            Unauthenticated: Malformed, unknown, or the secret is wrong.
            ExpiredCredential: The right secret of a key that has expired.
            RevokedCredential: The right secret of a key that was revoked.
            ControlUnavailable: The copy is older than ``MAX_COPY_AGE_S``.
        """
        key = parse(presented)
        # Written so that a NaN is refused too.
        if not self._confirmed_age_s() <= MAX_COPY_AGE_S:
            raise ControlUnavailable(retry_after_s=2)
        snapshot = self._snapshot()
        record = snapshot.service_keys.get(key.key_id)
        expected = _NO_HASH if record is None else record.secret_hash
        matches = hmac.compare_digest(hash_secret(self._pepper, key.secret), expected)
        if record is None or not matches:
            raise Unauthenticated
        token_hash = hashlib.sha256(presented.encode("ascii")).hexdigest()
        if _revoked(record, token_hash, snapshot.revocations):
            raise RevokedCredential
        if self._clock() >= record.expires_us:
            raise ExpiredCredential
        if self._used is not None:
            self._used(record.key_id)
        return Principal(
            kind=PrincipalKind.KEY,
            subject=record.key_id,
            issuer=ISSUER,
            department=record.department,
            roles=frozenset(record.roles),
            key=principal_key(self._pepper, ISSUER, None, record.key_id),
            key_id=record.key_id,
            token_hash=token_hash,
            issued_at_us=record.created_us,
            expires_at_us=record.expires_us,
            models=None if record.models is None else frozenset(record.models),
            operations=None if record.operations is None else frozenset(record.operations),
        )


def _revoked(record: ServiceKeyRecord, token_hash: str, revocations: Revocations) -> bool:
    not_before_us = revocations.subjects.get((ISSUER, record.key_id))
    return (
        record.key_id in revocations.key_ids
        or token_hash in revocations.token_ids
        or (not_before_us is not None and record.created_us < not_before_us)
    )
