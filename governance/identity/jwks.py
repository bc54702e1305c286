"""Keys of one issuer: discovered, cached, and renewed when a new key id shows up.

    fresh (1 h)  -> used as it is
    older        -> used, and renewed in the background
    over 24 h    -> not used: IdentityUnavailable until the issuer answers, asked every 5 s
    unknown kid  -> one renewal per issuer per 60 s, shared by all who wait for it

Providers rotate keys without notice (Entra) or a few times a year (Okta), so an unknown key id is
usually a rotation; but anybody can send tokens with made-up ids, so renewals are rationed. Within
the 60 s every id that is not published is known to be unknown: the set of keys is its own negative
cache, and made-up ids take no memory.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from governance.errors import IdentityUnavailable
from governance.identity.config import is_safe_url
from governance.identity.verifier import Key, UnusableKey, build_key

log = logging.getLogger("gatehouse.identity")

FRESH_S = 3600.0
USABLE_S = 24 * 3600.0
RETRY_S = 60.0
"""Least time between two renewals while there are usable keys, in seconds."""
RETRY_WITHOUT_KEYS_S = 5.0
"""The same while there are none and every token is refused."""
MAX_KEYS = 64
_DISCOVERY = "/.well-known/openid-configuration"

Fetch = Callable[[str], Awaitable[bytes]]
"""Gets a document; raises OSError when it cannot be had."""


class KeySet:
    """Keys of one issuer; belongs to one event loop.

    Args:
        name: Configured name of the issuer, for the log.
        url: Its exact ``iss``.
        jwks_uri: Where its keys are, or ``None`` to discover that.
        fetch: Gets documents.
        monotonic: Seconds of a clock that never goes back.
        allow_loopback_http: Local mode: key URLs may be http on loopback.
    """

    def __init__(
        self,
        name: str,
        url: str,
        jwks_uri: str | None,
        fetch: Fetch,
        monotonic: Callable[[], float],
        *,
        allow_loopback_http: bool = False,
    ) -> None:
        self._name = name
        self._url = url
        self._jwks_uri = jwks_uri
        self._fetch = fetch
        self._monotonic = monotonic
        self._allow_loopback_http = allow_loopback_http
        self._published: dict[str, Mapping[str, Any]] = {}
        self._built: dict[tuple[str, str], Key | None] = {}
        self._loaded_s = float("-inf")
        self._tried_s = float("-inf")
        self._renewal: asyncio.Task[None] | None = None

    async def key(self, kid: str, algorithm: str) -> Key | None:
        """The key of that id, prebuilt for that algorithm; ``None`` when there is none.

        Raises:
            IdentityUnavailable: No keys were ever loaded, or only too long ago.
        """
        if self._age_s() > USABLE_S:
            await self._renew(RETRY_WITHOUT_KEYS_S, wait=True)
            if self._age_s() > USABLE_S:
                raise IdentityUnavailable("", None, int(RETRY_WITHOUT_KEYS_S))
        elif self._age_s() > FRESH_S:
            await self._renew(RETRY_S, wait=False)
        if kid not in self._published:
            await self._renew(RETRY_S, wait=True)
        return self._key(kid, algorithm)

    def _age_s(self) -> float:
        return self._monotonic() - self._loaded_s

    def _key(self, kid: str, algorithm: str) -> Key | None:
        published = self._published.get(kid)
        if published is None:
            return None
        if (kid, algorithm) not in self._built:
            try:
                self._built[kid, algorithm] = build_key(published, algorithm)
            except UnusableKey as error:
                # Remembered too: a client must not be able to fill the log with it.
                self._built[kid, algorithm] = None
                log.warning("issuer %s: a key is not usable: %s", self._name, error)
        return self._built[kid, algorithm]

    async def _renew(self, least_s: float, *, wait: bool) -> None:
        """Renew, unless tried less than ``least_s`` ago; join a renewal under way."""
        if self._renewal is None or self._renewal.done():
            if self._monotonic() - self._tried_s < least_s:
                return
            self._tried_s = self._monotonic()
            self._renewal = asyncio.create_task(self._load())
        if wait:
            # Shielded: a client that goes must not take the renewal from those who wait with it.
            await asyncio.shield(self._renewal)

    async def _load(self) -> None:
        try:
            uri = self._jwks_uri or await self._discover()
            keys = self._keys_of(await self._document(uri))
        except (OSError, ValueError) as error:
            log.warning("issuer %s: keys not renewed: %s", self._name, error)
            return
        self._published = keys
        self._built.clear()
        self._loaded_s = self._monotonic()

    async def _discover(self) -> str:
        document = await self._document(self._url.rstrip("/") + _DISCOVERY)
        if document.get("issuer") != self._url:
            raise ValueError("the discovery document is another issuer's")
        uri = document.get("jwks_uri")
        if not isinstance(uri, str):
            raise ValueError("the discovery document names no keys")
        return uri

    async def _document(self, url: str) -> dict[str, Any]:
        if not is_safe_url(url, allow_loopback_http=self._allow_loopback_http):
            raise ValueError("a URL is not https")
        try:
            document = json.loads(await self._fetch(url))
        except (json.JSONDecodeError, RecursionError, UnicodeDecodeError):
            raise ValueError("a document is not JSON") from None
        if not isinstance(document, dict):
            raise ValueError("a document is not a JSON object")
        return document

    @staticmethod
    def _keys_of(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        listed = document.get("keys")
        if not isinstance(listed, list) or not 0 < len(listed) <= MAX_KEYS:
            raise ValueError("the key document holds no list of keys, or too many")
        keys: dict[str, Mapping[str, Any]] = {}
        for key in listed:
            kid = key.get("kid") if isinstance(key, dict) else None
            if isinstance(kid, str) and kid:
                if kid in keys:
                    raise ValueError("two keys have the same id")
                keys[kid] = key
        if not keys:
            raise ValueError("the key document holds no key with an id")
        return keys
