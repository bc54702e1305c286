"""Content cells and their keys: attacks first."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from governance.audit.content import (
    Cell,
    CellError,
    joined_commit,
    open_cell,
    pack_cell,
    seal_cell,
    unpack_cell,
)
from governance.audit.keystore import (
    TRUST_S,
    DataKey,
    FileKeystore,
    KeyScope,
    KeystoreError,
)
from tests.unit.audit_kit import FailingFiles, Killed, no_space, now_us, without_syncs

SCOPE = KeyScope("hr", "someone", "2026-01")
TEXT = "a prompt, żółć 😀 \0".encode() * 100


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_syncs(monkeypatch)


@pytest.fixture
def keys(tmp_path: Path) -> FileKeystore:
    return FileKeystore(tmp_path / "keys", clock=now_us)


def cell(key: DataKey, content: bytes = TEXT, **more: Any) -> Cell:
    values: dict[str, Any] = {
        "event_id": "01K00000000000000000000000",
        "kind": "output",
        "part": 1,
        "media": "application/json",
        "content": content,
        "ts_us": 5,
        "random_bytes": os.urandom,
    }
    return seal_cell(key, **(values | more))


class TestCells:
    @pytest.mark.parametrize("content", [b"", b"x", TEXT, os.urandom(5000), b"a" * 1_000_000])
    def test_round_trip(self, keys: FileKeystore, content: bytes) -> None:
        key = keys.data_key(SCOPE)
        sealed = cell(key, content)
        assert open_cell(key, unpack_cell(pack_cell(sealed))) == content
        assert content not in sealed.ciphertext or len(content) < 2

    def test_long_text_is_deflated(self, keys: FileKeystore) -> None:
        sealed = cell(keys.data_key(SCOPE))
        assert sealed.encoding == "deflate"
        assert len(sealed.ciphertext) < len(TEXT)

    @pytest.mark.parametrize(
        "change",
        [
            {"event_id": "01K00000000000000000000001"},
            {"kind": "input"},
            {"part": 2},
            {"media": "text/plain"},
            {"encoding": "identity"},
            {"department": "it"},
            {"nonce": bytes(12)},
            {"commit": bytes(32)},
            {"size_bytes": len(TEXT) - 1},
            {"size_bytes": len(TEXT) + 1},
            {"size_bytes": 0},
        ],
        ids=str,
    )
    def test_nothing_of_it_can_be_changed(self, keys: FileKeystore, change: dict[str, Any]) -> None:
        key = keys.data_key(SCOPE)
        with pytest.raises(CellError):
            open_cell(key, replace(cell(key), **change))

    def test_neighbouring_fields_do_not_run_together(self, keys: FileKeystore) -> None:
        key = keys.data_key(SCOPE)
        sealed = cell(key, media="ab", event_id="c" * 26)
        with pytest.raises(CellError):
            open_cell(key, replace(sealed, media="a", encoding="bidentity"))  # type: ignore[arg-type]

    @pytest.mark.parametrize("cut", [0, 1, 11, 16, 47, 60])
    def test_truncated(self, keys: FileKeystore, cut: int) -> None:
        key = keys.data_key(SCOPE)
        sealed = cell(key)
        with pytest.raises(CellError):
            open_cell(key, replace(sealed, ciphertext=sealed.ciphertext[:cut]))
        with pytest.raises(CellError):
            open_cell(key, replace(sealed, ciphertext=sealed.ciphertext[:-1]))

    def test_swapped(self, keys: FileKeystore) -> None:
        key = keys.data_key(SCOPE)
        one, two = cell(key, b"one", part=0), cell(key, b"two", part=1)
        swapped = replace(one, nonce=two.nonce, ciphertext=two.ciphertext, commit=two.commit)
        with pytest.raises(CellError):
            open_cell(key, swapped)

    def test_another_key(self, keys: FileKeystore) -> None:
        sealed = cell(keys.data_key(SCOPE))
        for scope in (
            replace(SCOPE, subject="else"),
            replace(SCOPE, month="2026-02"),
            replace(SCOPE, department="it"),
        ):
            with pytest.raises(CellError):
                open_cell(keys.data_key(scope), sealed)

    def test_a_lying_deflate_does_not_fill_memory(self, keys: FileKeystore) -> None:
        key = keys.data_key(SCOPE)
        with pytest.raises(CellError):
            open_cell(key, replace(cell(key, b"a" * 10_000_000), size_bytes=10))

    def test_equal_texts_have_different_commitments(self, keys: FileKeystore) -> None:
        key = keys.data_key(SCOPE)
        assert cell(key).commit != cell(key).commit
        assert cell(key).nonce != cell(key).nonce

    def test_the_joined_commitment_depends_on_number_and_order(self) -> None:
        a, b = b"a" * 32, b"b" * 32
        assert len({joined_commit(c) for c in ([a], [b], [a, b], [b, a], [a, a])}) == 5
        assert joined_commit([a]) != a.hex()

    @pytest.mark.parametrize("size", [0, 1, 2, 3, 40, 100])
    def test_junk_is_no_cell(self, keys: FileKeystore, size: int) -> None:
        packed = pack_cell(cell(keys.data_key(SCOPE), b""))
        for junk in (packed[:size], os.urandom(size), b"\xff" * size):
            with pytest.raises(ValueError, match="not a content cell"):
                unpack_cell(junk)


class TestKeystore:
    def test_a_key_is_found_again(self, keys: FileKeystore, tmp_path: Path) -> None:
        key = keys.data_key(SCOPE)
        assert keys.cached(SCOPE) is key
        again = FileKeystore(tmp_path / "keys", clock=now_us)
        assert again.cached(SCOPE) is None
        sealed = cell(key)
        assert again.data_key(SCOPE).id == key.id
        assert open_cell(again.by_id(sealed.dek_id), sealed) == TEXT

    def test_secrets_are_not_shown(self, keys: FileKeystore) -> None:
        assert "AESGCM" not in repr(keys.data_key(SCOPE))

    def test_a_destroyed_key_is_gone(self, keys: FileKeystore, tmp_path: Path) -> None:
        key = keys.data_key(SCOPE)
        for path in [
            *(tmp_path / "keys" / "id").iterdir(),
            *(tmp_path / "keys" / "dek").rglob("*"),
        ]:
            if path.is_file():
                path.unlink()
        keys.forget()
        with pytest.raises(KeystoreError, match="destroyed"):
            keys.by_id(key.id)
        assert keys.data_key(SCOPE).id != key.id

    def test_a_running_process_stops_using_a_destroyed_key(self, tmp_path: Path) -> None:
        now_s = [0.0]
        keys = FileKeystore(tmp_path / "keys", clock=now_us, monotonic=lambda: now_s[0])
        key = keys.data_key(SCOPE)
        now_s[0] += TRUST_S
        assert keys.cached(SCOPE) is key
        now_s[0] += 0.1
        assert keys.cached(SCOPE) is None, "its file has to be seen again"
        assert keys.data_key(SCOPE) is key
        assert keys.cached(SCOPE) is key
        for path in (tmp_path / "keys").rglob("*"):
            if path.is_file() and "kek" not in path.parts:
                path.unlink()
        now_s[0] += TRUST_S + 0.1
        assert keys.cached(SCOPE) is None
        made = keys.data_key(SCOPE)
        assert made.id != key.id
        with pytest.raises(KeystoreError, match="destroyed"):
            keys.by_id(key.id)
        assert keys.by_id(made.id).id == made.id

    def test_a_key_that_was_opened_to_others_is_not_used(self, tmp_path: Path) -> None:
        now_s = [0.0]
        keys = FileKeystore(tmp_path / "keys", clock=now_us, monotonic=lambda: now_s[0])
        keys.data_key(SCOPE)
        (path,) = (p for p in (tmp_path / "keys" / "dek").rglob("*") if p.is_file())
        path.chmod(0o644)
        now_s[0] += TRUST_S + 0.1
        with pytest.raises(KeystoreError, match="chmod 600"):
            keys.data_key(SCOPE)

    def test_many_at_once_agree(self, tmp_path: Path) -> None:
        stores = [FileKeystore(tmp_path / "keys", clock=now_us) for _ in range(8)]
        found: list[DataKey] = []
        threads = [
            threading.Thread(target=lambda s=store: found.append(s.data_key(SCOPE)))
            for store in stores
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({key.id for key in found}) == 1
        assert len(found) == 8
        sealed = cell(found[0])
        assert all(open_cell(key, sealed) == TEXT for key in found)
        names = [p for p in (tmp_path / "keys").rglob("*") if p.is_file()]
        assert len(names) == 3, names

    @pytest.mark.parametrize("error", [Killed(), no_space()], ids=["killed", "full"])
    def test_killed_at_any_step(self, tmp_path: Path, error: BaseException) -> None:
        counting = FailingFiles()
        FileKeystore(tmp_path / "whole", clock=now_us, files=counting).data_key(SCOPE)
        for step in range(len(counting.calls)):
            root = tmp_path / f"{step}"
            files = FailingFiles()
            files.fail = lambda _name, index, step=step: error if index == step else None
            with pytest.raises((Killed, KeystoreError)):
                FileKeystore(root, clock=now_us, files=files).data_key(SCOPE)
            key = FileKeystore(root, clock=now_us).data_key(SCOPE)
            assert FileKeystore(root, clock=now_us).by_id(key.id).id == key.id

    @pytest.mark.parametrize("place", ["", "kek", "dek", "id", "dek/2026-01"])
    def test_open_folders_are_refused(self, tmp_path: Path, place: str) -> None:
        root = tmp_path / "keys"
        FileKeystore(root, clock=now_us).data_key(SCOPE)
        (root / place).chmod(0o750)
        with pytest.raises(KeystoreError, match="chmod 700"):
            FileKeystore(root, clock=now_us).data_key(SCOPE)

    @pytest.mark.parametrize("place", ["kek", "dek"])
    def test_open_files_are_refused(self, tmp_path: Path, place: str) -> None:
        root = tmp_path / "keys"
        FileKeystore(root, clock=now_us).data_key(SCOPE)
        (path,) = [p for p in (root / place).rglob("*") if p.is_file()]
        path.chmod(0o640)
        with pytest.raises(KeystoreError, match="chmod 600") as caught:
            FileKeystore(root, clock=now_us).data_key(SCOPE)
        assert path.name in str(caught.value) or place == "dek"

    @pytest.mark.parametrize("place", ["kek", "dek"])
    def test_links_are_refused(self, tmp_path: Path, place: str) -> None:
        root = tmp_path / "keys"
        FileKeystore(root, clock=now_us).data_key(SCOPE)
        (path,) = [p for p in (root / place).rglob("*") if p.is_file()]
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(KeystoreError, match="plain file"):
            FileKeystore(root, clock=now_us).data_key(SCOPE)

    def test_a_linked_root_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir(mode=0o700)
        (tmp_path / "keys").symlink_to(tmp_path / "real")
        with pytest.raises(KeystoreError, match="not a link"):
            FileKeystore(tmp_path / "keys", clock=now_us)

    def test_another_scopes_file(self, keys: FileKeystore, tmp_path: Path) -> None:
        folder = tmp_path / "keys" / "dek" / "2026-01"
        keys.data_key(SCOPE)
        (one,) = folder.iterdir()
        keys.data_key(replace(SCOPE, subject="else"))
        (two,) = set(folder.iterdir()) - {one}
        one.write_bytes(two.read_bytes())
        keys.forget()
        with pytest.raises(KeystoreError, match="another scope"):
            keys.data_key(SCOPE)

    @pytest.mark.parametrize("place", ["kek", "dek"])
    def test_damaged_files(self, keys: FileKeystore, tmp_path: Path, place: str) -> None:
        keys.data_key(SCOPE)
        (path,) = [p for p in (tmp_path / "keys" / place).rglob("*") if p.is_file()]
        path.write_bytes(path.read_bytes()[:-5])
        keys.forget()
        with pytest.raises(KeystoreError, match="restore it"):
            keys.data_key(SCOPE)

    def test_a_missing_department_key_is_not_made_anew(
        self, keys: FileKeystore, tmp_path: Path
    ) -> None:
        key = keys.data_key(SCOPE)
        (path,) = (tmp_path / "keys" / "kek").iterdir()
        path.unlink()
        keys.forget()
        with pytest.raises(KeystoreError, match="missing"):
            keys.data_key(SCOPE)
        with pytest.raises(KeystoreError, match="missing"):
            keys.by_id(key.id)

    @pytest.mark.parametrize(
        "dek_id", ["", "dek_", "dek_../../kek/x", "/etc/passwd", "dek_" + "0" * 25]
    )
    def test_ids_that_are_none(self, keys: FileKeystore, dek_id: str) -> None:
        with pytest.raises(KeystoreError, match="not an id"):
            keys.by_id(dek_id)

    def test_scopes(self) -> None:
        assert KeyScope.of("hr", "s", 0) == KeyScope("hr", "s", "1970-01")
        assert KeyScope.of("hr", "s", 0, per_subject=False).subject == ""
