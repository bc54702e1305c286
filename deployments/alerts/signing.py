"""Signatures of webhooks by the Standard Webhooks specification, symmetric scheme ``v1``.

    signature = base64(HMAC-SHA256(secret, "<webhook-id>.<webhook-timestamp>.<body>"))

over the bytes of the body as they are sent (https://www.standardwebhooks.com, ``v1``; libraries for
receivers exist in many languages). The header ``webhook-signature`` has one ``v1,<signature>`` for
each secret, separated by spaces: while a secret is replaced, both are signed with, and a receiver
may change over whenever it likes.

Secrets are in a file of their own, one ``whsec_<base64>`` a line, that only its owner may read.
Nothing here logs, and no error holds what stands in the file.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

PREFIX = "whsec_"
MIN_BYTES, MAX_BYTES = 24, 64
"""Length of a secret by the specification."""
MAX_SECRETS = 4
"""More than two are never needed at a time."""
_FILE_BYTES = 4096


class SecretError(RuntimeError):
    """The secrets cannot be used; the message is for the operator and names the remedy."""


def read_secrets(path: Path) -> tuple[bytes, ...]:
    """The secrets in a file, the newest first. Blank lines and lines with ``#`` do not count.

    Raises:
        SecretError: No such file, not a plain one, readable by others, or not of the form.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SecretError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise SecretError(f"{path}: not a plain file")
        if mode & 0o077:
            raise SecretError(f"{path}: others may read it; chmod 600, and consider a new secret")
        text = os.read(descriptor, _FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    lines = [line.strip() for line in text.splitlines()]
    found = [parse_secret(line, path) for line in lines if line and not line.startswith(b"#")]
    if not found or len(found) > MAX_SECRETS or len(text) > _FILE_BYTES:
        raise SecretError(f"{path}: must hold 1 to {MAX_SECRETS} secrets, one a line")
    return tuple(found)


def parse_secret(line: bytes, path: Path) -> bytes:
    """The bytes of one ``whsec_`` line.

    Raises:
        SecretError: It has another form.
    """
    problem = SecretError(
        f"{path}: a line is not {PREFIX} and the base64 of {MIN_BYTES} to {MAX_BYTES} bytes;"
        " `gatehouse budget alerts secret` writes such a file"
    )
    if not line.startswith(PREFIX.encode()):
        raise problem
    try:
        secret = base64.b64decode(line[len(PREFIX) :], validate=True)
    except binascii.Error:
        raise problem from None
    if not MIN_BYTES <= len(secret) <= MAX_BYTES:
        raise problem
    return secret


def new_secret(random_bytes: Callable[[int], bytes]) -> str:
    """A fresh secret, as it stands in a file and in a receiver's configuration."""
    return PREFIX + base64.b64encode(random_bytes(32)).decode()


def signature(secret: bytes, message_id: str, timestamp_s: int, body: bytes) -> str:
    """One signature, ``v1,<base64>``.

    Args:
        secret: Decoded secret.
        message_id: Value of ``webhook-id``; has no ``.``, so that the parts cannot be shifted.
        timestamp_s: Value of ``webhook-timestamp``: seconds since 1970 UTC, of this attempt.
        body: Bytes that are sent.
    """
    signed = b"%s.%d.%s" % (message_id.encode("ascii"), timestamp_s, body)
    return "v1," + base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()


def headers(
    secrets: Sequence[bytes], message_id: str, timestamp_s: int, body: bytes
) -> dict[str, str]:
    """The three headers of a signed message; arguments as of ``signature``."""
    signatures = (signature(secret, message_id, timestamp_s, body) for secret in secrets)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": " ".join(signatures),
    }
