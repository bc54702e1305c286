"""Fetches discovery and key documents of identity providers."""

from __future__ import annotations

import aiohttp

from governance.identity.config import is_safe_url

MAX_BYTES = 1 << 20
TIMEOUT_S = 5.0


class JwksFetcher:
    """Gets a document over https: bounded in time and size, no redirects.

    A redirect would let whoever controls one host choose another; providers do not use them for
    these documents. Proxy settings of the environment apply, since clusters often have no other
    way out; the certificate is checked end to end.

    Args:
        allow_loopback_http: Local mode: http on loopback is allowed.
    """

    def __init__(self, *, allow_loopback_http: bool = False) -> None:
        self._allow_loopback_http = allow_loopback_http

    async def __call__(self, url: str) -> bytes:
        """Get a document.

        Raises:
            OSError: It cannot be had, is too large, or the URL is not safe.
        """
        if not is_safe_url(url, allow_loopback_http=self._allow_loopback_http):
            raise OSError("the URL is not https")
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        loopback = url.startswith("http://")
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout, trust_env=not loopback) as session,
                session.get(url, allow_redirects=False) as answer,
            ):
                if answer.status != 200:
                    raise OSError(f"answered {answer.status}")
                body = await answer.content.read(MAX_BYTES + 1)
                while len(body) <= MAX_BYTES and (more := await answer.content.read(MAX_BYTES)):
                    body += more
        except (aiohttp.ClientError, TimeoutError) as error:
            raise OSError(type(error).__name__) from None
        if len(body) > MAX_BYTES:
            raise OSError("the document is too large")
        return body
