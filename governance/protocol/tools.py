"""Tool definitions, tool choice and answer formats."""

from __future__ import annotations

import re
from typing import Any

from governance.errors import InvalidRequest
from governance.protocol.schemas import refuse_costly
from governance.protocol.values import (
    RequestLimits,
    array,
    boolean,
    expected,
    free_form,
    join,
    mapping,
    only,
    text,
)

TOOL_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
"""Name of a tool: OpenAI's alphabet, and the separators that tool servers put before it."""

_TOOL_KEYS = frozenset({"type", "function"})
_FUNCTION_KEYS = frozenset({"name", "description", "parameters", "strict"})
_SCHEMA_KEYS = frozenset({"name", "description", "schema", "strict"})


def tools(value: Any, path: str, limits: RequestLimits) -> list[dict[str, Any]]:
    """Definitions of functions; names are unique."""
    items = array(value, path, limits.max_tools)
    clean = [_tool(item, join(path, i), limits) for i, item in enumerate(items)]
    refuse_costly([tool["function"].get("parameters") for tool in clean], path, limits)
    names = [tool["function"]["name"] for tool in clean]
    if len(set(names)) < len(names):
        raise InvalidRequest(f"{path} defines a name twice.", path)
    return clean


def _tool(value: Any, path: str, limits: RequestLimits) -> dict[str, Any]:
    tool = mapping(value, path)
    only(tool, _TOOL_KEYS, path)
    if tool.get("type") != "function":
        raise expected("function", join(path, "type"))
    where = join(path, "function")
    function = mapping(tool.get("function"), where)
    only(function, _FUNCTION_KEYS, where)
    clean: dict[str, Any] = {"name": _tool_name(function, where)}
    if function.get("description") is not None:
        clean["description"] = text()(function["description"], join(where, "description"), limits)
    if function.get("parameters") is not None:
        clean["parameters"] = free_form(function["parameters"], join(where, "parameters"), limits)
    if function.get("strict") is not None:
        clean["strict"] = boolean(function["strict"], join(where, "strict"), limits)
    return {"type": "function", "function": clean}


def _tool_name(function: dict[str, Any], path: str) -> str:
    name = function.get("name")
    if type(name) is not str or not TOOL_NAME.fullmatch(name):
        raise expected("1 to 128 letters, digits and _ . : / -", join(path, "name"))
    return name


def tool_choice(value: Any, path: str, limits: RequestLimits) -> Any:
    """``none``, ``auto``, ``required`` or one function by name."""
    if type(value) is str and value in ("none", "auto", "required"):
        return value
    if type(value) is not dict:
        raise expected("none, auto, required or a function", path)
    only(value, _TOOL_KEYS, path)
    if value.get("type") != "function":
        raise expected("function", join(path, "type"))
    where = join(path, "function")
    function = mapping(value.get("function"), where)
    only(function, frozenset({"name"}), where)
    return {"type": "function", "function": {"name": _tool_name(function, where)}}


def settle_tools(body: dict[str, Any]) -> None:
    """Make ``tools`` and what depends on it agree, in place.

    Without tools, ``none``, ``auto`` and ``parallel_tool_calls`` mean nothing and are dropped.
    """
    defined = {tool["function"]["name"] for tool in body.get("tools", ())}
    choice = body.get("tool_choice")
    if not defined:
        body.pop("parallel_tool_calls", None)
        if choice in ("none", "auto"):
            del body["tool_choice"]
        elif choice is not None:
            raise InvalidRequest("tool_choice asks for a tool, but there are none.", "tool_choice")
    elif type(choice) is dict and choice["function"]["name"] not in defined:
        raise InvalidRequest(
            "tool_choice names a tool that is not defined.", "tool_choice.function.name"
        )


def response_format(value: Any, path: str, limits: RequestLimits) -> Any:
    """``text``, ``json_object`` or ``json_schema``.

    The engine's ``structural_tag`` is refused: it takes raw grammars, which cost compile time
    without bound.
    """
    wanted = mapping(value, path)
    kind = wanted.get("type")
    if kind in ("text", "json_object"):
        only(wanted, frozenset({"type"}), path)
        return {"type": kind}
    if kind != "json_schema":
        raise expected("text, json_object or json_schema", join(path, "type"))
    only(wanted, frozenset({"type", "json_schema"}), path)
    where = join(path, "json_schema")
    wrapper = mapping(wanted.get("json_schema"), where)
    only(wrapper, _SCHEMA_KEYS, where)
    clean: dict[str, Any] = {
        "name": text(limits.max_name_chars)(wrapper.get("name"), join(where, "name"), limits)
    }
    if wrapper.get("description") is not None:
        clean["description"] = text()(wrapper["description"], join(where, "description"), limits)
    clean["schema"] = free_form(wrapper.get("schema"), join(where, "schema"), limits)
    refuse_costly([clean["schema"]], join(where, "schema"), limits)
    if wrapper.get("strict") is not None:
        clean["strict"] = boolean(wrapper["strict"], join(where, "strict"), limits)
    return {"type": "json_schema", "json_schema": clean}
