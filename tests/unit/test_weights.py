"""Digests of weights: what they cover, what the cache may and may not do."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from deployments.weights import (
    DigestCache,
    WeightsError,
    adapter_version,
    digest_directory,
    loaded_files,
    local_directory,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    for name, content in {
        "model-00001.safetensors": b"one",
        "model-00002.safetensors": b"two",
        "config.json": b"{}",
        "tokenizer.json": b"[]",
        "chat_template.jinja": b"{{ messages }}",
        "README.md": b"not loaded",
        "pytorch_model.bin": b"not loaded beside safetensors",
    }.items():
        (directory / name).write_bytes(content)
    (directory / "original").mkdir()
    (directory / "original" / "params.json").write_bytes(b"not loaded")
    return directory


def cache(tmp_path: Path) -> DigestCache:
    return DigestCache(tmp_path / "state" / "weights.json")


def test_the_version_is_the_digest_of_the_loaded_files(checkpoint: Path, tmp_path: Path) -> None:
    names = [path.name for path in loaded_files(checkpoint)]
    assert names == [
        "chat_template.jinja",
        "config.json",
        "model-00001.safetensors",
        "model-00002.safetensors",
        "tokenizer.json",
    ]
    whole = hashlib.sha256()
    for name in names:
        content = (checkpoint / name).read_bytes()
        whole.update(f"{hashlib.sha256(content).hexdigest()} {len(content)} {name}\n".encode())
    assert digest_directory(checkpoint, cache(tmp_path)) == f"sha256:{whole.hexdigest()}"


@pytest.mark.parametrize("name", ["model-00001.safetensors", "config.json", "chat_template.jinja"])
def test_any_changed_byte_is_another_version(checkpoint: Path, tmp_path: Path, name: str) -> None:
    before = digest_directory(checkpoint, cache(tmp_path))
    content = bytearray((checkpoint / name).read_bytes())
    content[0] ^= 1
    (checkpoint / name).write_bytes(content)
    assert digest_directory(checkpoint, cache(tmp_path)) != before


def test_files_that_are_not_loaded_do_not_count(checkpoint: Path, tmp_path: Path) -> None:
    before = digest_directory(checkpoint, cache(tmp_path))
    (checkpoint / "README.md").write_bytes(b"changed")
    (checkpoint / "original" / "params.json").write_bytes(b"changed")
    assert digest_directory(checkpoint, cache(tmp_path)) == before


def test_a_file_is_read_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest_directory(checkpoint, cache(tmp_path))

    def refuse(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(hashlib, "file_digest", refuse)
    assert digest_directory(checkpoint, cache(tmp_path)) == before
    stamp = (checkpoint / "config.json").stat().st_mtime_ns + 1
    os.utime(checkpoint / "config.json", ns=(stamp, stamp))
    with pytest.raises(AssertionError):
        digest_directory(checkpoint, cache(tmp_path))


@pytest.mark.parametrize("content", ["", "[]", '{"1:2:3:4": 5}', '{"1:2:3:4": "../../etc"}', "{"])
def test_a_damaged_cache_is_forgotten(checkpoint: Path, tmp_path: Path, content: str) -> None:
    right = digest_directory(checkpoint, cache(tmp_path / "other"))
    path = tmp_path / "state" / "weights.json"
    path.parent.mkdir()
    path.write_text(content)
    assert digest_directory(checkpoint, DigestCache(path)) == right


def test_a_hub_blob_must_be_what_its_name_says(checkpoint: Path, tmp_path: Path) -> None:
    content = (checkpoint / "model-00001.safetensors").read_bytes()
    plain = digest_directory(checkpoint, cache(tmp_path))
    blob = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir()
    blob.write_bytes(content)
    (checkpoint / "model-00001.safetensors").unlink()
    (checkpoint / "model-00001.safetensors").symlink_to(blob)
    assert digest_directory(checkpoint, cache(tmp_path)) == plain

    blob.write_bytes(b"bad")
    with pytest.raises(WeightsError, match="damaged"):
        digest_directory(checkpoint, cache(tmp_path))


def test_no_weights_no_version(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="no weights"):
        digest_directory(tmp_path, cache(tmp_path))


def test_a_dangling_link_is_not_skipped_silently(checkpoint: Path, tmp_path: Path) -> None:
    before = digest_directory(checkpoint, cache(tmp_path))
    (checkpoint / "model-00002.safetensors").unlink()
    (checkpoint / "model-00002.safetensors").symlink_to(tmp_path / "gone")
    assert digest_directory(checkpoint, cache(tmp_path)) != before


def test_an_adapter_is_a_version_of_its_own() -> None:
    assert adapter_version("sha256:aa", "sha256:bb") == "sha256:aa+sha256:bb"


def test_a_hub_id_that_is_not_here_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match="not been downloaded"):
        local_directory("someone/some-model", "0" * 40)
