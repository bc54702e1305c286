"""Keys of content cells: a data key for each department, subject and month, wrapped.

A **data key** (DEK) encrypts cells; deleting it makes them unreadable for good, and nothing else.
It is wrapped (AES key wrap, RFC 3394) by its department's **key-encryption key** (KEK). What a key
covers is its ``KeyScope``; in mode ``department`` the subject is left out. ``Keystore`` is what a
key service implements as well; ``FileKeystore`` keeps both kinds in files:

    <root>/kek/<H(department)>                 32 bytes
    <root>/dek/<month>/<H(scope)>              JSON: dek_id, department, subject, month, wrapped
    <root>/id/<dek_id>                         the same file, by id

H is SHA-256 over the length-prefixed texts, in hex. Files appear whole, synced and under a name
that was free (``link``), before the first cell uses the key: of two processes that make the same
key at once, both use the one that was first. Folders are 0700 and files 0600, owned by the user
that runs this; anything else is refused, and so are links.

To destroy a key, delete both names, that under ``dek`` first. Processes that have it in memory look
for the file again after ``TRUST_S``: from then on the scope has a new key. An answer under way is
finished with the key that it began with.

A file keystore protects content against who gets at the evidence, not against who gets at the
state root: KEK and wrapped DEK lie side by side there.
"""

from __future__ import annotations

import os
import secrets
import stat
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Protocol

import orjson
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from governance.audit.files import Files
from governance.audit.ulid import ULID, new_ulid
from governance.ports import Clock

_KEY_BYTES: Final = 32
TRUST_S: Final = 3.0
"""How long a key in memory is used before its file is looked at again."""
_PREFIX: Final = "dek_"
_CACHED_KEYS: Final = 4096
_MAX_FILE_BYTES: Final = 4096
_HOUR_US: Final = 3_600_000_000


class KeystoreError(RuntimeError):
    """A key cannot be had; the message names the file and what to do, never a key."""


@dataclass(frozen=True, slots=True)
class KeyScope:
    """What one data key covers."""

    department: str
    subject: str
    """Pseudonym of the caller; empty in mode ``department``."""
    month: str
    """``YYYY-MM`` in UTC."""

    @classmethod
    def of(cls, department: str, subject: str, ts_us: int, *, per_subject: bool = True) -> KeyScope:
        """The scope of a cell sealed at a time."""
        return cls(department, subject if per_subject else "", _month(ts_us // _HOUR_US))


@lru_cache(maxsize=8)
def _month(hour: int) -> str:
    """``YYYY-MM`` of an hour since 1970: asked for each request, and the same for long."""
    return datetime.fromtimestamp(hour * 3600, UTC).strftime("%Y-%m")


@dataclass(frozen=True, slots=True)
class DataKey:
    """A data key, ready for use."""

    id: str
    department: str
    cipher: AESGCM = field(repr=False)


@dataclass(slots=True)
class _Held:
    """A key in memory."""

    key: DataKey
    file: tuple[int, int]
    """Device and inode of its file."""
    seen_s: float
    """When the file was last seen to be there."""


class Keystore(Protocol):
    """Where data keys come from. Safe to use from several threads."""

    def cached(self, scope: KeyScope) -> DataKey | None:
        """The scope's key, if it is at hand and known not to be destroyed; never waits."""
        ...

    def data_key(self, scope: KeyScope) -> DataKey:
        """The scope's key, made durable before it is first given out. Blocks.

        Raises:
            KeystoreError: It cannot be had.
        """
        ...

    def by_id(self, dek_id: str) -> DataKey:
        """The key that a cell names. Blocks.

        Raises:
            KeystoreError: It cannot be had; also where it was destroyed.
        """
        ...


class FileKeystore:
    """``Keystore`` in files.

    Args:
        root: Folder of the keys; made if it is missing.
        clock: Wall clock, microseconds; for ids.
        files: File operations.
        random_bytes: Source of keys and ids.
        monotonic: Seconds that never go back.

    Raises:
        KeystoreError: The folder is open to others.
    """

    def __init__(
        self,
        root: Path,
        *,
        clock: Clock,
        files: Files | None = None,
        random_bytes: Callable[[int], bytes] = os.urandom,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monotonic = monotonic
        self._root = root
        self._clock = clock
        self._files = files or Files()
        self._random_bytes = random_bytes
        self._guard = threading.Lock()
        self._making = threading.Lock()
        self._keys: OrderedDict[KeyScope, _Held] = OrderedDict()
        for folder in (root, root / "kek", root / "dek", root / "id"):
            self._folder(folder)

    def cached(self, scope: KeyScope) -> DataKey | None:
        """The scope's key, if it is in memory and its file was there ``TRUST_S`` ago or later."""
        with self._guard:
            held = self._keys.get(scope)
            if held is None or self._monotonic() - held.seen_s > TRUST_S:
                return None
            self._keys.move_to_end(scope)
            return held.key

    def data_key(self, scope: KeyScope) -> DataKey:
        """The scope's key: from memory, from its file, or new.

        Raises:
            KeystoreError: A file is damaged or open to others, or cannot be written.
        """
        with self._making:
            key = self.cached(scope)
            if key is not None:
                return key
            with self._guard:
                held = self._keys.get(scope)
            seen_s = self._monotonic()
            if held is not None and held.file == self._present(scope):
                held.seen_s = seen_s
                return held.key
            with self._guard:
                self._keys.pop(scope, None)
            key, file = self._load_or_make(scope)
            with self._guard:
                self._keys[scope] = _Held(key, file, seen_s)
                while len(self._keys) > _CACHED_KEYS:
                    self._keys.popitem(last=False)
            return key

    def _path(self, scope: KeyScope) -> Path:
        name = _digest(scope.department, scope.subject, scope.month)
        return self._root / "dek" / scope.month / name

    def _present(self, scope: KeyScope) -> tuple[int, int] | None:
        """Device and inode of a scope's file; ``None`` if there is none."""
        path = self._path(scope)
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return None
        _check(path, status, folder=False)
        return status.st_dev, status.st_ino

    def by_id(self, dek_id: str) -> DataKey:
        """The key that a cell names.

        Raises:
            KeystoreError: There is none, or its file is damaged or open to others.
        """
        if ULID.fullmatch(dek_id.removeprefix(_PREFIX)) is None:
            raise KeystoreError("not an id of a data key")
        data = self._read(self._root / "id" / dek_id)
        if data is None:
            raise KeystoreError(f"{self._root / 'id' / dek_id}: no such key, or destroyed")
        return self._unwrap(self._root / "id" / dek_id, data)[0]

    def forget(self) -> None:
        """Drop all keys from memory; the next use reads the files again."""
        with self._guard:
            self._keys.clear()

    # -- data keys ----------------------------------------------------------------------------

    def _load_or_make(self, scope: KeyScope) -> tuple[DataKey, tuple[int, int]]:
        path = self._path(scope)
        try:
            self._folder(path.parent)
            data = self._read(path)
            if data is None:
                self._make(scope, path)
                data = self._read(path)
            file = self._present(scope)
        except OSError as error:
            raise KeystoreError(f"{path}: {error.strerror}") from error
        if data is None or file is None:
            raise KeystoreError(f"{path}: vanished as it was made")
        key, found = self._unwrap(path, data)
        if found != scope:
            raise KeystoreError(f"{path}: holds the key of another scope; restore it")
        return key, file

    def _make(self, scope: KeyScope, path: Path) -> None:
        dek_id = _PREFIX + new_ulid(self._clock(), self._random_bytes)
        wrapped = aes_key_wrap(self._kek(scope.department), self._random_bytes(_KEY_BYTES))
        data = orjson.dumps(
            {
                "version": 1,
                "dek_id": dek_id,
                "department": scope.department,
                "subject": scope.subject,
                "month": scope.month,
                "wrapped": wrapped.hex(),
            }
        )
        by_id = self._root / "id" / dek_id
        self._files.publish(by_id, data)
        try:
            os.link(by_id, path)
        except FileExistsError:  # Another process was first: its key is the scope's.
            self._files.unlink(by_id)
        # Also for the loser: the winner may not have synced the name yet.
        self._files.sync_folder(path.parent)

    def _unwrap(self, path: Path, data: bytes) -> tuple[DataKey, KeyScope]:
        try:
            fields = orjson.loads(data)
            scope = KeyScope(fields["department"], fields["subject"], fields["month"])
            dek_id, wrapped = str(fields["dek_id"]), bytes.fromhex(fields["wrapped"])
        except (ValueError, TypeError, KeyError):
            raise KeystoreError(f"{path}: damaged; restore it from a backup") from None
        kek = self._kek(scope.department, make=False)
        try:
            cipher = AESGCM(aes_key_unwrap(kek, wrapped))
        except (InvalidUnwrap, ValueError):
            raise KeystoreError(
                f"{path}: does not open with its department's key; restore both from one backup"
            ) from None
        return DataKey(dek_id, scope.department, cipher), scope

    def _kek(self, department: str, *, make: bool = True) -> bytes:
        path = self._root / "kek" / _digest(department)
        data = self._read(path)
        if data is None and make:
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            self._files.publish(temporary, self._random_bytes(_KEY_BYTES))
            try:
                os.link(temporary, path)
            except FileExistsError:
                pass
            finally:
                self._files.unlink(temporary)
            self._files.sync_folder(path.parent)
            data = self._read(path)
        if data is None:
            raise KeystoreError(f"{path}: the department's key is missing; restore it")
        if len(data) != _KEY_BYTES:
            raise KeystoreError(f"{path}: not a key of {_KEY_BYTES} bytes; restore it")
        return data

    # -- files --------------------------------------------------------------------------------

    def _folder(self, path: Path) -> None:
        """Make a folder if need be, and check that nobody else has access."""
        try:
            self._files.make_folder(path)
            _check(path, os.lstat(path), folder=True)
        except OSError as error:
            raise KeystoreError(f"{path}: {error.strerror}") from error

    def _read(self, path: Path) -> bytes | None:
        """Content of a key file; ``None`` if there is none."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise KeystoreError(f"{path}: {error.strerror}; it must be a plain file") from error
        try:
            _check(path, os.fstat(descriptor), folder=False)
            return os.read(descriptor, _MAX_FILE_BYTES)
        finally:
            os.close(descriptor)


def _check(path: Path, status: os.stat_result, *, folder: bool) -> None:
    form: Callable[[int], bool] = stat.S_ISDIR if folder else stat.S_ISREG
    if not form(status.st_mode):
        raise KeystoreError(f"{path}: must be a {'folder' if folder else 'plain file'}, not a link")
    if status.st_uid != os.geteuid():
        raise KeystoreError(f"{path}: must belong to the user that runs this (chown)")
    if status.st_mode & 0o077:
        mode = "700" if folder else "600"
        raise KeystoreError(f"{path}: others have access; chmod {mode} {path}")


def _digest(*texts: str) -> str:
    digest: Any = sha256()
    for text in texts:
        data = text.encode()
        digest.update(struct.pack(">I", len(data)) + data)
    return str(digest.hexdigest())
