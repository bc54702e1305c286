"""Fetches discovery and key documents of identity providers."""

from __future__ import annotations

import aiohttp

from governance.identity.config import is_safe_url

MAX_BYTES = 1 << 20
TIMEOUT_S = 5.0


class JwksFetcher:
    """Gets a document over https: bounded in time and size, no redirects, no compression.

    A redirect would let whoever controls one host choose another; providers do not use them for
    these documents. Nothing is taken from the environment: with it, a ``.netrc`` would send its
    passwords along, and a stray ``HTTPS_PROXY`` would stand between us and the issuer.

    Args:
        allow_loopback_http: Local mode: http on loopback is allowed.
        proxy: URL of an HTTP proxy for https documents, where there is no other way out; the
            certificate is checked end to end.
    """

    def __init__(self, *, allow_loopback_http: bool = False, proxy: str | None = None) -> None:
        self._allow_loopback_http = allow_loopback_http
        self._proxy = proxy

    async def __call__(self, url: str) -> bytes:
        """Get a document.

        Raises:
            OSError: It cannot be had, is too large, or the URL is not safe.
        """
        if not is_safe_url(url, allow_loopback_http=self._allow_loopback_http):
            raise OSError("the URL is not https")
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        proxy = self._proxy if url.startswith("https:") else None
        try:
            async with (
                # A few compressed kilobytes can hold gigabytes, so none are asked for or unpacked.
                aiohttp.ClientSession(
                    timeout=timeout,
                    trust_env=False,
                    auto_decompress=False,
                    headers={"accept": "application/json", "accept-encoding": "identity"},
                ) as session,
                session.get(url, allow_redirects=False, proxy=proxy) as answer,
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
