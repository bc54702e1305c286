"""A development token, by the standard flow: authorization code with PKCE (RFC 7636).

The command line plays the browser: the development provider consents at once to the identity
named in ``login_hint``.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import secrets
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

CLIENT_ID = "gatehouse-cli"
REDIRECT_URI = "http://127.0.0.1/callback"
TIMEOUT_S = 10.0


class TokenError(Exception):
    """No token; the message says why and what to do."""


class UnknownIdentity(TokenError):
    """The provider does not know the identity."""


def fetch_token(issuer: str, identity: str) -> str:
    """Get an access token for a sample identity.

    Args:
        issuer: URL of the development provider, on loopback.
        identity: Name of the sample identity.

    Raises:
        TokenError: The provider cannot be reached, or does not know the identity.
    """
    verifier = secrets.token_urlsafe(48)
    digest = hashlib.sha256(verifier.encode()).digest()
    state = secrets.token_urlsafe(16)
    query = urlencode(
        {
            "response_type": "code",
            "client_id": CLIENT_ID,
            "redirect_uri": REDIRECT_URI,
            "scope": "openid",
            "state": state,
            "login_hint": identity,
            "code_challenge": base64.urlsafe_b64encode(digest).rstrip(b"=").decode(),
            "code_challenge_method": "S256",
        }
    )
    status, location, _ = _call(issuer, "GET", f"/authorize?{query}", None)
    answer = parse_qs(urlsplit(location or "").query)
    if status not in (302, 303) or answer.get("state") != [state] or "code" not in answer:
        raise UnknownIdentity(f"the identity provider does not know {identity!r}")
    form = urlencode(
        {
            "grant_type": "authorization_code",
            "client_id": CLIENT_ID,
            "redirect_uri": REDIRECT_URI,
            "code": answer["code"][0],
            "code_verifier": verifier,
        }
    )
    status, _, body = _call(issuer, "POST", "/token", form)
    token = body.get("access_token")
    if status != 200 or not isinstance(token, str):
        raise TokenError("the identity provider gave no token")
    return token


def _call(
    issuer: str, method: str, path: str, form: str | None
) -> tuple[int, str | None, dict[str, Any]]:
    """One HTTP call; redirects are answers here, not to be followed."""
    parts = urlsplit(issuer)
    if parts.scheme != "http" or parts.hostname not in ("127.0.0.1", "::1"):
        raise TokenError("development tokens come from a provider on loopback only")
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)
    headers = {"content-type": "application/x-www-form-urlencoded"} if form else {}
    try:
        connection.request(method, path, form, headers)
        response = connection.getresponse()
        raw = response.read()
    except OSError:
        raise TokenError(
            f"no development identity provider at {issuer}; is `make serve` running?"
        ) from None
    finally:
        connection.close()
    try:
        body = json.loads(raw)
    except ValueError:
        body = {}
    return response.status, response.headers.get("location"), body
