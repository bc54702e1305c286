"""A credential in, a principal out: tokens and service keys, with revocation on every use."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from governance.control.snapshot import Revocations
from governance.errors import MissingCredential, RevokedCredential, Unauthenticated
from governance.identity.claims import principal_of
from governance.identity.config import IdentityConfig
from governance.identity.jwks import Fetch, KeySet
from governance.identity.service_keys import is_service_key
from governance.identity.verifier import MAX_TOKEN_BYTES, TokenVerifier
from governance.ports import Clock
from governance.types import Principal

CACHE_S = 60
"""A verified token is believed without a new signature check for this long, in seconds. Key
rotation is noticed within it; revocation and expiry at once."""
MAX_CACHED = 10_000


class KeyChecker(Protocol):
    """Turns a service key into a principal (``governance.identity.service_keys``)."""

    def check(self, presented: str) -> Principal:
        """Verify a key.

        Raises:
            Unauthenticated: It does not count.
            ControlUnavailable: The copy of keys is too old to say.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Verified:
    """A token that was checked, as the cache keeps it."""

    principal: Principal
    twin_hash: str | None
    """SHA-256 in hex of ``VerifiedToken.twin``: revoking one text revokes the other."""
    until_s: float
    """End of its stay in the cache, on the monotonic clock."""


class BearerAuthenticator:
    """Implements ``governance.ports.Authenticator``; belongs to one event loop.

    Args:
        config: Issuers and mappings.
        fetch: Gets discovery and key documents.
        pepper: Keys pseudonyms.
        service_keys: Checks service keys.
        revocations: The latest revocations; asked on every use.
        clock: Wall clock in microseconds.
        monotonic: Seconds of a clock that never goes back.
        allow_loopback_http: Local mode: an issuer may be http on loopback.
    """

    def __init__(
        self,
        config: IdentityConfig,
        *,
        fetch: Fetch,
        pepper: bytes,
        service_keys: KeyChecker,
        revocations: Callable[[], Revocations],
        clock: Clock,
        monotonic: Callable[[], float],
        allow_loopback_http: bool = False,
    ) -> None:
        self._config = config
        self._pepper = pepper
        self._service_keys = service_keys
        self._revocations = revocations
        self._clock = clock
        self._monotonic = monotonic
        keys = {
            url: KeySet(
                issuer.name,
                url,
                jwks_uri,
                fetch,
                monotonic,
                allow_loopback_http=allow_loopback_http,
            )
            for issuer in config.issuers
            for url, jwks_uri in issuer.key_urls().items()
        }
        self._verifier = TokenVerifier(config.issuers, keys, clock)
        self._verified: OrderedDict[bytes, _Verified] = OrderedDict()
        """By token digest; least recently used first."""

    async def authenticate(self, authorization: str | None) -> Principal:
        """Verify the value of an Authorization header.

        Raises:
            MissingCredential: None, or not a Bearer credential.
            Unauthenticated: It does not count, is expired or revoked.
            NotPermitted: It is good, and its owner has no place here.
            IdentityUnavailable: The issuer's keys cannot be had.
            ControlUnavailable: Service keys cannot be judged.
        """
        scheme, _, credential = (authorization or "").strip().partition(" ")
        credential = credential.strip()
        if scheme.lower() != "bearer" or not credential:
            raise MissingCredential()
        if len(credential) > MAX_TOKEN_BYTES:
            raise Unauthenticated()
        if is_service_key(credential):
            return self._service_keys.check(credential)
        verified = await self._token(credential)
        self._refuse_revoked(verified)
        return verified.principal

    def clear(self) -> None:
        """Forget verified tokens."""
        self._verified.clear()

    async def _token(self, token: str) -> _Verified:
        digest = _digest(token)
        known = self._verified.get(digest)
        # Both clocks: the cached minute must not grow when the wall clock is set back.
        if (
            known is not None
            and self._monotonic() < known.until_s
            and self._clock() < known.principal.expires_at_us
        ):
            self._verified.move_to_end(digest)
            return known
        checked = await self._verifier.verify(token)
        verified = _Verified(
            principal=principal_of(checked, self._config, self._pepper, digest.hex()),
            twin_hash=_digest(checked.twin).hex() if checked.twin else None,
            until_s=self._monotonic() + CACHE_S,
        )
        self._verified[digest] = verified
        self._verified.move_to_end(digest)
        if len(self._verified) > MAX_CACHED:
            self._verified.popitem(last=False)
        return verified

    def _refuse_revoked(self, verified: _Verified) -> None:
        principal, revoked = verified.principal, self._revocations()
        not_before_us = revoked.subjects.get((principal.issuer, principal.subject))
        if (
            principal.token_hash in revoked.token_ids
            or verified.twin_hash in revoked.token_ids
            or principal.token_id in revoked.token_ids
            or (not_before_us is not None and principal.issued_at_us < not_before_us)
        ):
            raise RevokedCredential()


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
