"""Messages of a chat: which roles, which parts, which keys.

Every message and part is rebuilt from what was checked. The engine infers the type of a part that
names none, takes parts that carry a text *and* an image, and reads keys that its documentation
does not name (``tools`` of a developer message, ``task``); a copy of known keys leaves no room.
"""

from __future__ import annotations

import json
from typing import Any

from governance.errors import InvalidRequest, MediaRefused, UnsupportedField
from governance.protocol.tools import TOOL_NAME
from governance.protocol.values import RequestLimits, array, bounded, expected, join, mapping, only

ROLES = ("system", "developer", "user", "assistant", "tool")

TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
"""Parts that hold text; forwarded as ``text``."""

MEDIA = frozenset(
    {
        "image", "image_url", "input_image", "image_embeds", "image_pil",
        "audio", "audio_url", "input_audio", "audio_embeds",
        "video", "video_url", "video_embeds",
        "file", "input_file", "document", "prompt_embeds",
    }
)  # fmt: skip
"""Part types and keys that carry or fetch something that is not text."""

_COMMON = frozenset({"role", "content", "name"})
_KEYS = {
    "system": _COMMON,
    "developer": _COMMON,
    "user": _COMMON,
    "assistant": _COMMON
    | {"tool_calls", "refusal", "reasoning", "reasoning_content"}
    | {"annotations", "audio", "function_call"},
    "tool": _COMMON | {"tool_call_id"},
}
_EMPTY_ONLY = ("annotations", "audio", "function_call")
"""Keys of an answer that a client sends back as it got them: accepted while empty, dropped."""


def messages(value: Any, path: str, limits: RequestLimits) -> list[dict[str, Any]]:
    """All messages of a chat, rebuilt."""
    items = array(value, path, limits.max_messages)
    return [_message(item, join(path, i), limits) for i, item in enumerate(items)]


def _message(value: Any, path: str, limits: RequestLimits) -> dict[str, Any]:
    message = mapping(value, path)
    role = message.get("role")
    if type(role) is not str or role not in ROLES:
        raise expected("one of " + ", ".join(ROLES), join(path, "role"))
    for key in message:
        if key in MEDIA and message[key] is not None:
            raise MediaRefused("", join(path, key))
    only(message, _KEYS[role], path)
    clean: dict[str, Any] = {"role": role}
    content = message.get("content")
    if role == "assistant":
        _assistant(message, clean, path, limits)
        if content is None and clean.keys() == {"role"}:
            raise expected("a string or a list of text parts", join(path, "content"))
        if content is not None and content != []:
            clean["content"] = _content(content, role, join(path, "content"), limits)
    else:
        clean["content"] = _content(content, role, join(path, "content"), limits)
    if role == "tool":
        clean["tool_call_id"] = _string(message, "tool_call_id", path, limits.max_name_chars)
    if message.get("name") is not None:
        clean["name"] = _string(message, "name", path, limits.max_name_chars)
    return clean


def _assistant(
    message: dict[str, Any], clean: dict[str, Any], path: str, limits: RequestLimits
) -> None:
    """What only an assistant message has."""
    for key in _EMPTY_ONLY:
        if message.get(key):
            raise UnsupportedField(f"{join(path, key)} is not supported.", join(path, key))
    if message.get("refusal") is not None:
        refusal = _string(message, "refusal", path, None)
        if message.get("content") is None:
            clean["content"] = refusal
    for key in ("reasoning", "reasoning_content"):
        if message.get(key) is not None:
            clean["reasoning"] = _string(message, key, path, None)
    if calls := message.get("tool_calls"):
        where = join(path, "tool_calls")
        clean["tool_calls"] = [
            _tool_call(call, join(where, i), limits)
            for i, call in enumerate(array(calls, where, limits.max_tool_calls))
        ]


def _content(value: Any, role: str, path: str, limits: RequestLimits) -> Any:
    if type(value) is str:
        return value
    if type(value) is not list:
        raise expected("a string or a list of text parts", path)
    parts = array(value, path, limits.max_parts)
    return [_part(part, role, join(path, i)) for i, part in enumerate(parts)]


def _part(value: Any, role: str, path: str) -> dict[str, str]:
    part = mapping(value, path)
    kind = part.get("type")
    if not MEDIA.isdisjoint(part) or (type(kind) is str and kind in MEDIA):
        raise MediaRefused("", path)
    if type(kind) is str and kind in TEXT_PARTS:
        only(part, frozenset({"type", "text"}), path)
        return {"type": "text", "text": _string(part, "text", path, None)}
    if kind == "refusal" and role == "assistant":
        only(part, frozenset({"type", "refusal"}), path)
        return {"type": "text", "text": _string(part, "refusal", path, None)}
    raise expected("text", join(path, "type"))


def _tool_call(value: Any, path: str, limits: RequestLimits) -> dict[str, Any]:
    call = mapping(value, path)
    # NOTE: ``index`` comes with calls that a client collected from a stream; it means nothing here.
    only(call, frozenset({"id", "type", "function", "index"}), path)
    if call.get("type", "function") != "function":
        raise expected("function", join(path, "type"))
    where = join(path, "function")
    function = mapping(call.get("function"), where)
    only(function, frozenset({"name", "arguments"}), where)
    name = function.get("name")
    if type(name) is not str or not TOOL_NAME.fullmatch(name):
        raise expected("the name of a tool", join(where, "name"))
    arguments = function.get("arguments")
    clean = {"name": name, "arguments": ""}
    if arguments is not None:
        clean["arguments"] = _string(function, "arguments", where, None)
        _readable(clean["arguments"], join(where, "arguments"), limits)
    return {
        "id": _string(call, "id", path, limits.max_name_chars),
        "type": "function",
        "function": clean,
    }


def _readable(arguments: str, path: str, limits: RequestLimits) -> None:
    """Refuse arguments that the engine would read and inspection could not.

    Arguments are a string of JSON that the engine decodes (with the standard library's parser)
    and writes into the prompt. Text that is no JSON at all is let through, because models do
    produce it and the engine then puts an empty object in its place; inspection sees it raw.
    """
    try:
        tree = decode_arguments(arguments)
    except (RecursionError, ValueError):
        raise InvalidRequest(f"{path} holds JSON that cannot be read.", path) from None
    bounded(tree, path, limits)


def decode_arguments(arguments: str) -> Any:
    """JSON value that tool call arguments hold, as the engine reads it; ``None`` for no JSON.

    Raises:
        ValueError: A number with too many digits, or a lone surrogate behind an escape.
        RecursionError: Nested too deep to be read.
    """
    try:
        tree = json.loads(arguments)
    except json.JSONDecodeError:
        return None
    if "\\u" in arguments:
        json.dumps(tree, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return tree


def _string(holder: dict[str, Any], key: str, path: str, max_chars: int | None) -> str:
    value = holder.get(key)
    where = join(path, key)
    if type(value) is not str:
        raise expected("a string", where)
    if max_chars is not None and len(value) > max_chars:
        raise expected(f"a string of at most {max_chars} characters", where)
    return value
