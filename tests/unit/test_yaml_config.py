"""Configuration files that are refused, and how."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from governance.yaml_config import MAX_CONFIG_BYTES, ConfigError, load_yaml_model

SECRET = "do-not-repeat-me"


class Item(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    size: int = 1


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    items: tuple[Item, ...] = ()
    title: str = ""


def refusal(tmp_path: Path, text: str | bytes) -> ConfigError:
    path = tmp_path / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_yaml_model(path, Settings)
    assert SECRET not in str(caught.value)
    assert caught.value.file == str(path)
    return caught.value


def test_a_good_file_loads(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("title: x\nitems:\n- {name: a}\n- name: b\n  size: 2\n")
    loaded = load_yaml_model(path, Settings)
    assert loaded == Settings(title="x", items=(Item(name="a"), Item(name="b", size=2)))


@pytest.mark.parametrize(
    ("text", "line", "place"),
    [
        (f"title: x\ntitle: {SECRET}\n", 2, "title"),
        (f"items:\n- name: a\n  name: {SECRET}\n", 3, "items.0.name"),
        (f"title: x\nunknown: {SECRET}\n", 2, "unknown"),
        (f"items:\n- name: a\n- name: b\n  size: {SECRET}\n", 4, "items.1.size"),
        ("items:\n- size: 5\n", 2, "items.0.name"),
        ("title: [x\n", 2, ""),
        ("title: *nowhere\n", 1, ""),
        ("? [a, b]\n: 1\n", 1, ""),
        ("title: !!python/object/apply:os.system [id]\n", 1, ""),
        ("- a\n- b\n", 1, ""),
        ("", 1, ""),
        ("title: 2020-99-99\n", None, ""),
        ("a: 1\n---\nb: 2\n", 2, ""),
    ],
)
def test_a_wrong_file_is_refused_with_line_and_place(
    tmp_path: Path, text: str, line: int | None, place: str
) -> None:
    error = refusal(tmp_path, text)
    assert (error.line, error.place) == (line, place)


@pytest.mark.parametrize("text", [b"\xff\xfe\x00", b"title: \x00", b"a: &a [*a]\n", b"[" * 5000])
def test_odd_bytes_are_refused(tmp_path: Path, text: bytes) -> None:
    refusal(tmp_path, text)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_bytes(b"#" * (MAX_CONFIG_BYTES + 1))
    for name in ("missing.yaml", ".", "big.yaml"):
        with pytest.raises(ConfigError) as caught:
            load_yaml_model(tmp_path / name, Settings)
        assert caught.value.line is None


def test_the_first_wrong_line_is_reported(tmp_path: Path) -> None:
    error = refusal(tmp_path, "items:\n- {name: a, size: x}\n- {name: 5}\nunknown: 1\n")
    assert error.line == 2
    assert str(error).startswith(f"{error.file}:2: items.0.size: ")
