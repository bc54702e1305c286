"""The pepper: the one secret that keys the hashes of service keys and the pseudonyms.

Losing it invalidates every service key and cuts every pseudonym off from its history, so it is
never replaced silently (``ControlStore.bind_pepper``).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Callable
from pathlib import Path

from governance.identity.pseudonym import PEPPER_BYTES


class PepperError(RuntimeError):
    """The pepper cannot be used; the message is for the operator and names the remedy."""


def read_pepper(path: Path) -> bytes | None:
    """The pepper in a file, or ``None`` if there is no such file.

    Raises:
        PepperError: Not a plain file, readable by others, or of the wrong size.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PepperError(f"{path}: cannot be read ({error.strerror})") from None
    with os.fdopen(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise PepperError(f"{path}: not a plain file")
        if mode & 0o077:
            raise PepperError(f"{path}: others may read it; chmod 600, and consider a new one")
        pepper = file.read(PEPPER_BYTES + 1)
    if len(pepper) != PEPPER_BYTES:
        raise PepperError(f"{path}: must hold exactly {PEPPER_BYTES} bytes; restore it")
    return pepper


def create_pepper(path: Path, random_bytes: Callable[[int], bytes]) -> bytes:
    """Write a new pepper with mode 0600, or give the one that another process wrote first.

    The bytes are on disk under another name before the file appears under its own, so that a
    crash leaves either no pepper or a whole one.

    Raises:
        PepperError: The file of another process cannot be used.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{random_bytes(8).hex()}")
    pepper = random_bytes(PEPPER_BYTES)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pepper)
            file.flush()
            os.fsync(descriptor)
        os.link(draft, path)
    except FileExistsError:
        existing = read_pepper(path)
        if existing is None:
            raise PepperError(f"{path}: vanished while it was read") from None
        return existing
    finally:
        draft.unlink()
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return pepper


def fingerprint(pepper: bytes) -> str:
    """Tells one pepper from another and gives neither away."""
    return hmac.new(pepper, b"gatehouse pepper fingerprint", hashlib.sha256).hexdigest()
