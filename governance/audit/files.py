"""The file operations that durability hangs on, in one place.

Each can fail and be failed: tests put a subclass in place that raises at any of them, as a full
disk or a process killed at that moment would.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path

_ZEROS = bytes(1 << 18)
_TEMPORARY = ".tmp"


class Locked(RuntimeError):
    """Another process holds the lock."""


class Files:
    """Operations on the local file system. They raise ``OSError`` and retry nothing."""

    def create(self, path: Path, size_bytes: int) -> int:
        """Make a new file of zeros and give its descriptor; it is durable under its name."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            self.zero(descriptor, 0, size_bytes)
            self.sync_folder(path.parent)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def zero(self, descriptor: int, start: int, end: int) -> None:
        """Fill a range with zeros, durably: later writes to it change no metadata."""
        while start < end:
            start += os.pwrite(descriptor, _ZEROS[: end - start], start)
        os.fdatasync(descriptor)

    def write(self, descriptor: int, data: bytes, offset: int) -> None:
        """Write all of ``data`` at an offset."""
        written = os.pwrite(descriptor, data, offset)
        while written < len(data):
            written += os.pwrite(descriptor, data[written:], offset + written)

    def sync(self, descriptor: int) -> None:
        """Make what was written durable."""
        os.fdatasync(descriptor)

    def sync_folder(self, folder: Path) -> None:
        """Make the names in a folder durable."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def publish(self, path: Path, data: bytes, mode: int = 0o600) -> None:
        """Make a file appear whole and durable, replacing one of that name."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")
        descriptor = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode
        )
        try:
            self.write(descriptor, data, 0)
            os.fsync(descriptor)
        except BaseException:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
            raise
        os.close(descriptor)
        self.rename(temporary, path)
        self.sync_folder(path.parent)

    def rename(self, source: Path, target: Path) -> None:
        """Rename, replacing."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Remove a file that may be gone already."""
        path.unlink(missing_ok=True)

    def make_folder(self, path: Path, mode: int = 0o700) -> None:
        """Make a folder and those above it, durable under their names."""
        if path.is_dir():
            return
        self.make_folder(path.parent, mode)
        path.mkdir(mode=mode, exist_ok=True)
        self.sync_folder(path.parent)


def is_temporary(path: Path) -> bool:
    """Whether a file is what ``publish`` leaves behind when it is killed."""
    return path.name.startswith(".") and path.name.endswith(_TEMPORARY)


def take_lock(path: Path) -> int:
    """Lock a file, made if need be, against every other process and opening; the fence.

    The lock lasts until the descriptor is closed or the process ends, however it ends.

    Raises:
        Locked: Somebody holds it.
        OSError: It cannot be opened.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed the file: then this is a lock on nothing.
            current = os.stat(path, follow_symlinks=False)
            if os.path.samestat(os.fstat(descriptor), current):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise Locked(f"{path} is held by another process") from None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
