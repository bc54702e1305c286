"""Which weights a replica serves: a digest of the files that vLLM loads.

The version of a model is ``sha256:`` and the SHA-256 of one line per file, sorted by name: the
file's own SHA-256, its size in bytes, its name. It covers weights, configuration, tokenizer and
chat template, so a change of any of them is a new version. An adapter is a version of its own:
``<version of the base>+sha256:<hex>``, the second digest over the adapter's files.

A file is read once: its SHA-256 is remembered by device, inode, size and time of change. Names
prove nothing, not even those of hub blobs, which are the SHA-256 of their content: they are
checked against it at first sight.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_WEIGHTS = ("*.safetensors",)
_OLDER_WEIGHTS = ("*.bin", "*.pt")
_OTHERS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HASHERS = 4
"""Files hashed at once; one thread reads and hashes 1 to 2 GB/s."""


class WeightsError(Exception):
    """The files of a checkpoint are missing, changing or damaged; the message is for operators."""


@dataclass(frozen=True, slots=True)
class FileDigest:
    """One file of a checkpoint."""

    name: str
    size_bytes: int
    sha256: str


class DigestCache:
    """SHA-256 of files seen before, in a JSON file that replicas of a node share.

    Args:
        path: The file; created with its directory when there is something to remember.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._known = self._read()
        self._saved = True

    def get(self, status: os.stat_result) -> str | None:
        """Digest of a file that has not changed since, or ``None``."""
        return self._known.get(_identity(status))

    def put(self, status: os.stat_result, sha256: str) -> None:
        """Remember a digest."""
        with self._lock:
            self._known[_identity(status)] = sha256
            self._saved = False

    def save(self) -> None:
        """Write what is new, together with what other processes wrote meanwhile."""
        if self._saved:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, self._path.with_suffix(".lock").open("w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            self._known = {**self._read(), **self._known}
            scratch = self._path.with_suffix(f".{os.getpid()}.new")
            scratch.write_text(json.dumps(self._known, sort_keys=True))
            scratch.replace(self._path)
            self._saved = True

    def _read(self) -> dict[str, str]:
        try:
            known = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(known, dict):
            return {}
        return {k: v for k, v in known.items() if isinstance(v, str) and _SHA256.fullmatch(v)}


def _identity(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def loaded_files(directory: Path) -> list[Path]:
    """The files of a checkpoint or adapter that decide what is served, sorted by name.

    All top-level weights count, so the digest covers at least what vLLM loads; subdirectories
    (hub repositories keep other formats there) do not.

    Raises:
        WeightsError: There are no weights.
    """
    for patterns in (_WEIGHTS, _OLDER_WEIGHTS):
        weights = _glob(directory, patterns)
        if weights:
            return sorted({*weights, *_glob(directory, _OTHERS)}, key=lambda path: path.name)
    raise WeightsError(f"no weights (*.safetensors, *.bin) in {directory}")


def _glob(directory: Path, patterns: Iterable[str]) -> set[Path]:
    return {path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}


def file_digest(path: Path, cache: DigestCache) -> FileDigest:
    """Digest of one file, from the cache if it has not changed.

    Raises:
        WeightsError: It cannot be read, changed while it was read, or is a hub blob whose content
            is not what its name says.
    """
    try:
        real = path.resolve(strict=True)
        with real.open("rb") as file:
            before = os.fstat(file.fileno())
            known = cache.get(before)
            if known is None:
                known = hashlib.file_digest(file, "sha256").hexdigest()
                if _identity(os.fstat(file.fileno())) != _identity(before):
                    raise WeightsError(f"{path} changed while it was read")
                _check_blob(path, real, known)
                cache.put(before, known)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    return FileDigest(path.name, before.st_size, known)


def _check_blob(path: Path, real: Path, sha256: str) -> None:
    """Large files of the hub's cache are links to blobs named by their SHA-256."""
    if real != path.absolute() and _SHA256.fullmatch(real.name) and real.name != sha256:
        raise WeightsError(f"{path} is damaged: its content has SHA-256 {sha256}")


def digest_directory(directory: Path, cache: DigestCache) -> str:
    """Version (``sha256:<hex>``) of a checkpoint or adapter. Blocks for as long as reading takes.

    Raises:
        WeightsError: The files are missing, changing or damaged.
    """
    files = loaded_files(directory)
    with ThreadPoolExecutor(min(_HASHERS, len(files))) as pool:
        digests = list(pool.map(lambda path: file_digest(path, cache), files))
    cache.save()
    whole = hashlib.sha256()
    for item in digests:
        whole.update(f"{item.sha256} {item.size_bytes} {item.name}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def adapter_version(base: str, adapter: str) -> str:
    """Version of an adapter on a base."""
    return f"{base}+{adapter}"


def local_directory(source: str, revision: str | None = None) -> Path:
    """Directory of a checkpoint: itself, or the hub snapshot that has been downloaded.

    Args:
        source: Directory, or hub id.
        revision: Commit or branch of the hub repository.

    Raises:
        WeightsError: The hub id is not in the cache of this node.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        raise WeightsError(f"{source} has not been downloaded to this node") from None
