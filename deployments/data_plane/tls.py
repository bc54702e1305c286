"""Mutual TLS of the data plane, from the variables that secure Ray's own connections.

A cluster is secured once: ``RAY_USE_TLS=1`` with ``RAY_TLS_SERVER_CERT``, ``RAY_TLS_SERVER_KEY``
and ``RAY_TLS_CA_CERT`` (files) covers Ray and this. Both ends present the certificate and check
the other's against the same authority; the certificate must name the node's address, as Ray's does.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping

_FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


class TlsConfigError(Exception):
    """TLS is asked for and cannot be set up; the message names the variable, not its value."""


def server_context(environ: Mapping[str, str]) -> ssl.SSLContext | None:
    """Context of an engine replica; ``None`` when Ray runs without TLS.

    Raises:
        TlsConfigError: TLS is on and a file is not named or not usable.

    """
    return _context(environ, ssl.PROTOCOL_TLS_SERVER)


def client_context(environ: Mapping[str, str]) -> ssl.SSLContext | None:
    """Context of a gateway; ``None`` when Ray runs without TLS.

    Raises:
        TlsConfigError: TLS is on and a file is not named or not usable.

    """
    return _context(environ, ssl.PROTOCOL_TLS_CLIENT)


def _context(environ: Mapping[str, str], protocol: int) -> ssl.SSLContext | None:
    if environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    missing = [name for name in _FILES if not environ.get(name)]
    if missing:
        raise TlsConfigError(f"RAY_USE_TLS is on, but {', '.join(missing)} is not set")
    certificate, key, authority = (environ[name] for name in _FILES)
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(authority)
    except (OSError, ssl.SSLError):
        raise TlsConfigError("RAY_TLS_CA_CERT cannot be read as certificates") from None
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError):
        raise TlsConfigError(
            "RAY_TLS_SERVER_CERT and RAY_TLS_SERVER_KEY cannot be read as a pair"
        ) from None
    context.verify_mode = ssl.CERT_REQUIRED
    return context
