"""A trained scorer on disk: a folder of files and a manifest that names the digest of each.

``manifest.json`` lists every file with its size and SHA-256. `load` reads each file once, compares
the digest of the bytes it read, and hands those bytes out, so that what was checked is what is
used, even when the folder changes meanwhile. A file that the manifest does not name is refused as
well. The manifest itself is trusted: whoever may write it may replace the scorer, so its digest
(`Artefact.digest`) belongs into the record of what ran.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
CARD = "MODEL_CARD.md"
FORMAT = 1
"""Version of the layout; another one is refused."""


class ArtefactError(Exception):
    """A scorer's folder cannot be used; the message says which file and why."""


@dataclass(frozen=True, slots=True)
class Artefact:
    """What a folder holds, checked."""

    digest: str
    """``sha256:`` and the digest of the manifest: names this scorer exactly."""
    settings: Mapping[str, Any]
    """Names, sizes and seeds that the manifest states."""
    files: Mapping[str, bytes]
    """Content by file name."""

    def file(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            ArtefactError: There is none of that name.

        """
        try:
            return self.files[name]
        except KeyError:
            raise ArtefactError(
                f"{name}: missing from the manifest; train the scorer anew"
            ) from None


def load(folder: Path) -> Artefact:
    """Read and check a folder.

    Raises:
        ArtefactError: The folder or manifest is missing or malformed, or a file is missing,
            unexpected, or not the one that the manifest names.

    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        manifest = json.loads(raw)
    except FileNotFoundError:
        raise ArtefactError(f"{path}: no such file; is this the folder of a scorer?") from None
    except (OSError, ValueError):
        raise ArtefactError(f"{path}: cannot be read as JSON; restore the folder") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtefactError(f"{path}: not of format {FORMAT}; train the scorer anew")
    entries = manifest.get("files")
    settings = manifest.get("settings")
    if not isinstance(entries, dict) or not isinstance(settings, dict):
        raise ArtefactError(f"{path}: lacks files or settings; restore the folder")
    present = {entry.name for entry in folder.iterdir()} - {MANIFEST, CARD}
    if extra := sorted(present - entries.keys()):
        raise ArtefactError(f"{folder / extra[0]}: not in the manifest; remove it")
    files = {name: _checked(folder, name, entry) for name, entry in entries.items()}
    digest = "sha256:" + hashlib.sha256(raw).hexdigest()
    return Artefact(digest, settings, files)


def save(folder: Path, settings: Mapping[str, Any], files: Mapping[str, bytes]) -> str:
    """Write files and manifest; other files of the folder are left alone. Returns the digest."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    manifest = {
        "format": FORMAT,
        "settings": dict(settings),
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in sorted(files.items())
        },
    }
    raw = (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()
    (folder / MANIFEST).write_bytes(raw)
    return "sha256:" + hashlib.sha256(raw).hexdigest()


def _checked(folder: Path, name: str, entry: Any) -> bytes:
    path = folder / name
    if Path(name).name != name or not isinstance(entry, dict):
        raise ArtefactError(f"{folder / MANIFEST}: bad entry for a file; restore the folder")
    try:
        content = path.read_bytes()
    except OSError:
        raise ArtefactError(f"{path}: cannot be read; restore the folder") from None
    if hashlib.sha256(content).hexdigest() != entry.get("sha256"):
        raise ArtefactError(f"{path}: is not the file that the manifest names; restore the folder")
    return content
