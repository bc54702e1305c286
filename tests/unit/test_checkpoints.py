"""The local checkpoints: deterministic, whole or absent, usable by their own template."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from deployments.checkpoints import (
    CHAT_TEMPLATE,
    RECIPES,
    build_all,
    build_apart,
    main,
    train_tokenizer,
)
from deployments.weights import DigestCache, digest_directory

QUICK = tuple(replace(r, hidden=32, heads=2, kv_heads=1, layers=1, steps=2) for r in RECIPES)


def built(root: Path) -> dict[str, str]:
    cache = DigestCache(root / "digests")
    return {d.name: digest_directory(d, cache) for d in root.iterdir() if d.is_dir()}


def test_the_same_recipe_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build_all(tmp_path / name, lambda _: None, QUICK)
    one = built(tmp_path / "one")
    assert set(one) == {"small", "large", "small-adapter"}
    assert one == built(tmp_path / "two")


def test_what_stands_is_left_alone_and_what_is_torn_is_built(tmp_path: Path) -> None:
    lines: list[str] = []
    build_all(tmp_path, lines.append, QUICK[:1])
    first = (tmp_path / "small" / "model.safetensors").stat().st_ino
    half = tmp_path / ".small-adapter.building"
    half.mkdir()
    (half / "adapter_config.json").write_text("{")
    (tmp_path / "small-adapter" / ".recipe").write_text('{"fingerprint": "older"}')
    lines.clear()
    build_all(tmp_path, lines.append, QUICK[:1])
    assert (tmp_path / "small" / "model.safetensors").stat().st_ino == first
    assert lines[0] == "small: there already"
    assert lines[1].startswith("small-adapter: built")
    assert not half.exists()


def test_a_directory_of_somebody_else_is_not_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine").write_text("keep")
    assert main([str(tmp_path)]) == 1
    assert "move it away" in capsys.readouterr().err
    assert (tmp_path / "small" / "mine").read_text() == "keep"


def test_a_failure_apart_is_reported(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    with pytest.raises(OSError, match="move it away"):
        build_apart(tmp_path, lambda _: None)


def test_the_config_fits_the_files(tmp_path: Path) -> None:
    build_all(tmp_path, lambda _: None, QUICK[:1])
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(tmp_path / "small" / "tokenizer.json"))
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert tokenizer.token_to_id("<|im_end|>") == config["eos_token_id"]
    adapter = json.loads((tmp_path / "small-adapter" / "adapter_config.json").read_text())
    assert adapter["peft_type"] == "LORA"


@pytest.mark.parametrize("text", ["Grüße, 世界 🙂", "def f(x):\n\treturn x\r\n", "\x00\x7f", ""])
def test_the_tokenizer_can_write_any_text(text: str) -> None:
    tokenizer = train_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def render(messages: list[dict[str, object]], **more: object) -> str:
    environment = ImmutableSandboxedEnvironment()

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment.globals["raise_exception"] = refuse
    template = environment.from_string(CHAT_TEMPLATE)
    return template.render(messages=messages, add_generation_prompt=True, **more)


def test_the_chat_template_writes_every_role() -> None:
    call = {"function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
    text = render(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "sunny"},
        ],
        tools=[{"type": "function", "function": {"name": "get_weather"}}],
    )
    assert text.startswith("<|im_start|>system\nBe brief.\nYou can call these tools:\n")
    assert text.count("Be brief.") == 1
    assert "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n" in text
    assert '"city": "Rome"' in text
    assert text.endswith("<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n")


def test_the_chat_template_refuses_an_unknown_role() -> None:
    with pytest.raises(TemplateError):
        render([{"role": "wizard", "content": "x"}])
