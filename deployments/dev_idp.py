"""Development identity provider: five sample identities, on loopback, without passwords.

A real OpenID provider in small, on Flask and Authlib: discovery, authorization code with PKCE,
RFC 9068 access tokens, published keys. It exists so that identity works on a laptop the way it
does in production. Anybody who reaches it gets any identity, so it binds loopback only, and a
gateway outside local mode refuses an issuer like it.

Run by the supervisor: ``python -m deployments.dev_idp --port 8100 --key-dir DIR``.
"""

from __future__ import annotations

import argparse
import html
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from authlib.integrations.flask_oauth2 import AuthorizationServer
from authlib.oauth2 import OAuth2Error
from authlib.oauth2.rfc6749 import AuthorizationCodeMixin, ClientMixin
from authlib.oauth2.rfc6749.grants import AuthorizationCodeGrant
from authlib.oauth2.rfc7636 import CodeChallenge
from authlib.oauth2.rfc9068 import JWTBearerTokenGenerator
from flask import Flask, Response, request
from joserfc.jwk import KeySet, RSAKey
from werkzeug.serving import make_server

AUDIENCE = "gatehouse"
CLIENT_ID = "gatehouse-cli"
REDIRECT_URI = "http://127.0.0.1/callback"
TOKEN_LIFETIME_S = 3600
CODE_LIFETIME_S = 60
LOOPBACK = ("127.0.0.1", "::1")
HOSTS = ["127.0.0.1", "[::1]", "localhost"]
"""Accepted ``Host`` headers: a web page whose name was rebound to loopback must get no token."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A sample person."""

    name: str
    role: str
    department: str

    def get_user_id(self) -> str:
        """``sub`` of tokens; Authlib's interface."""
        return self.name


IDENTITIES: Mapping[str, Identity] = {
    identity.name: identity
    for identity in (
        Identity("hr-analyst", "hr-analyst", "hr"),
        Identity("data-scientist", "data-scientist", "data-science"),
        Identity("marketing-intern", "marketing-intern", "marketing"),
        Identity("platform-admin", "platform-admin", "platform"),
        Identity("security-officer", "security-officer", "security"),
    )
}


@dataclass(frozen=True, slots=True)
class _Code(AuthorizationCodeMixin):  # type: ignore[misc]
    """An authorization code; good once, for a minute."""

    code: str
    identity: Identity
    redirect_uri: str
    scope: str
    code_challenge: str
    code_challenge_method: str
    expires_s: float

    def get_redirect_uri(self) -> str:
        return self.redirect_uri

    def get_scope(self) -> str:
        return self.scope


class _Client(ClientMixin):  # type: ignore[misc]
    """The one public client: the command line."""

    def get_client_id(self) -> str:
        return CLIENT_ID

    def get_default_redirect_uri(self) -> str:
        return REDIRECT_URI

    def get_allowed_scope(self, scope: str) -> str:
        return " ".join(word for word in (scope or "").split() if word == "openid")

    def check_redirect_uri(self, redirect_uri: str) -> bool:
        # RFC 8252 section 7.3: any port of a loopback redirect.
        parts = urlsplit(redirect_uri)
        return parts.scheme == "http" and parts.hostname in LOOPBACK

    def check_client_secret(self, client_secret: str) -> bool:
        return False

    def check_endpoint_auth_method(self, method: str, endpoint: str) -> bool:
        return method == "none"

    def check_response_type(self, response_type: str) -> bool:
        return response_type == "code"

    def check_grant_type(self, grant_type: str) -> bool:
        return grant_type == "authorization_code"


class _Tokens(JWTBearerTokenGenerator):  # type: ignore[misc]
    """Access tokens with the sample person's role and department."""

    def __init__(self, issuer: str, key: RSAKey) -> None:
        super().__init__(issuer=issuer, alg="RS256", expires_generator=lambda *_: TOKEN_LIFETIME_S)
        self._key = key

    def get_jwks(self) -> KeySet:
        return KeySet([self._key])

    def get_audiences(self, client: object, user: object, scope: str) -> str:
        return AUDIENCE

    def get_extra_claims(
        self, client: object, grant_type: str, user: Identity, scope: str
    ) -> dict[str, Any]:
        return {"roles": [user.role], "department": user.department}


def load_key(directory: Path) -> RSAKey:
    """The signing key, made at the first start and kept so that tokens survive a restart."""
    path = directory / "dev-idp.json"
    if path.exists():
        return RSAKey.import_key(json.loads(path.read_text()))
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = RSAKey.generate_key(2048, {"use": "sig", "alg": "RS256"}, auto_kid=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(key.as_dict(private=True), file)
    temporary.replace(path)
    return key


def create_app(issuer: str, key: RSAKey) -> Flask:
    """Build the provider.

    Args:
        issuer: Its URL, on loopback.
        key: Signs tokens.
    """
    app = Flask(__name__)
    app.config["TRUSTED_HOSTS"] = HOSTS
    codes: dict[str, _Code] = {}

    class CodeGrant(AuthorizationCodeGrant):  # type: ignore[misc]
        TOKEN_ENDPOINT_AUTH_METHODS = ("none",)

        def save_authorization_code(self, code: str, request: Any) -> None:
            data = request.payload.data
            now_s = time.monotonic()
            for old in [c for c, kept in list(codes.items()) if kept.expires_s <= now_s]:
                codes.pop(old, None)
            codes[code] = _Code(
                code,
                request.user,
                request.payload.redirect_uri or REDIRECT_URI,
                request.payload.scope or "",
                data.get("code_challenge", ""),
                data.get("code_challenge_method", ""),
                now_s + CODE_LIFETIME_S,
            )

        def query_authorization_code(self, code: str, client: object) -> _Code | None:
            found = codes.get(code)
            return found if found and found.expires_s > time.monotonic() else None

        def delete_authorization_code(self, authorization_code: _Code) -> None:
            codes.pop(authorization_code.code, None)

        def authenticate_user(self, authorization_code: _Code) -> Identity:
            return authorization_code.identity

    server = AuthorizationServer(
        app,
        query_client=lambda client_id: _Client() if client_id == CLIENT_ID else None,
        save_token=lambda token, request: None,
    )
    server.register_token_generator("default", _Tokens(issuer, key))
    server.register_grant(CodeGrant, [CodeChallenge(required=True)])

    @app.get("/.well-known/openid-configuration")
    def discovery() -> dict[str, Any]:
        return {
            "issuer": issuer,
            "authorization_endpoint": f"{issuer}/authorize",
            "token_endpoint": f"{issuer}/token",
            "jwks_uri": f"{issuer}/jwks",
            "response_types_supported": ["code"],
            "grant_types_supported": ["authorization_code"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["RS256"],
            "code_challenge_methods_supported": ["S256"],
            "token_endpoint_auth_methods_supported": ["none"],
        }

    @app.get("/jwks")
    def jwks() -> dict[str, Any]:
        return {"keys": [key.as_dict(private=False)]}

    @app.get("/authorize")
    def authorize() -> Response:
        if request.args.get("code_challenge_method") != "S256":
            return Response("PKCE with S256 is required", 400)
        identity = IDENTITIES.get(request.args.get("login_hint", ""))
        if identity is None:
            return _choices()
        try:
            grant = server.get_consent_grant(end_user=identity)
        except OAuth2Error as error:
            return Response(error.error, 400)
        answer: Response = server.create_authorization_response(grant=grant, grant_user=identity)
        return answer

    @app.post("/token")
    def token() -> Response:
        answer: Response = server.create_token_response()
        return answer

    @app.get("/")
    def home() -> Response:
        names = "".join(f"<li>{html.escape(name)}</li>" for name in IDENTITIES)
        return Response(
            "<!doctype html><title>Gatehouse development identities</title>"
            f"<h1>Development identities</h1><ul>{names}</ul>"
            "<p>Get a token with <code>gatehouse token NAME</code>.</p>"
        )

    return app


def _choices() -> Response:
    """A page to choose an identity on; keeps the rest of the authorization request."""
    fields = "".join(
        f'<input type="hidden" name="{html.escape(name)}" value="{html.escape(value)}">'
        for name, value in request.args.items()
        if name != "login_hint"
    )
    buttons = "".join(
        f'<p><button name="login_hint" value="{html.escape(name)}">{html.escape(name)}</button></p>'
        for name in IDENTITIES
    )
    return Response(
        "<!doctype html><title>Choose an identity</title><h1>Choose a development identity</h1>"
        f'<form action="authorize">{fields}{buttons}</form>'
    )


def main(arguments: list[str] | None = None) -> int:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(prog="dev_idp", description="Development identity provider.")
    parser.add_argument("--host", default="127.0.0.1", choices=LOOPBACK, help="loopback only")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--issuer", help="public URL; default http://HOST:PORT")
    parser.add_argument("--key-dir", type=Path, required=True, help="where the signing key is kept")
    options = parser.parse_args(arguments)
    host = f"[{options.host}]" if ":" in options.host else options.host
    issuer = options.issuer or f"http://{host}:{options.port}"
    if urlsplit(issuer).hostname not in LOOPBACK:
        parser.error("the development identity provider is for loopback only")
    # Authlib insists on https, for which loopback needs no substitute (RFC 8252 section 8.3).
    os.environ["AUTHLIB_INSECURE_TRANSPORT"] = "1"
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = create_app(issuer, load_key(options.key_dir))
    app.secret_key = secrets.token_bytes(16)
    make_server(options.host, options.port, app, threaded=True).serve_forever()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
