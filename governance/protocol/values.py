"""Checks of single values of a request, shared by all fields.

A check takes a parsed JSON value, its dotted path and the limits, and gives the value to forward.
It raises an error that names the path and what was expected, and never repeats the value: what a
caller sent by mistake does not belong in an error or a log.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from governance.errors import InvalidRequest, UnsupportedField

_FIELD_NAME = re.compile(r"[A-Za-z0-9_.$-]{1,64}")


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Bounds on the shape of a request; the size of the body is bounded where it is read."""

    max_depth: int = 64
    """Levels of objects and arrays inside a tool definition, a schema or tool call arguments."""
    max_nodes: int = 20_000
    """Values inside one tool definition, schema or tool call."""
    max_properties: int = 512
    """Keys of one object in a schema or tool definition."""
    max_pattern_cost: int = 8192
    """Characters of all regular expressions of one answer format, or of all tools together, with
    their repetitions spelled out."""
    max_messages: int = 2048
    max_parts: int = 1024
    """Content parts of one message."""
    max_tools: int = 128
    max_tool_calls: int = 128
    """Tool calls of one message."""
    max_choices: int = 16
    """Largest ``n``."""
    max_prompts: int = 64
    """Prompts of one completions request."""
    max_total_choices: int = 128
    """``n`` times prompts."""
    max_inputs: int = 2048
    """Inputs of one embeddings request."""
    max_prompt_tokens: int = 1_048_576
    """Token ids of one request, over all its prompts."""
    max_stops: int = 16
    max_stop_chars: int = 256
    max_name_chars: int = 256
    max_logit_biases: int = 1024


Check = Callable[[Any, str, RequestLimits], Any]
"""(value, dotted path, limits) -> value to forward."""

MAX_TOKENS = 10_000_000
"""Largest number of tokens that a field may name; anything above is a mistake."""
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


def join(path: str, key: object) -> str:
    """Dotted path of a child; a key that is no plain name is not repeated."""
    name = key if isinstance(key, int) or _FIELD_NAME.fullmatch(str(key)) else "?"
    return f"{path}.{name}" if path else str(name)


def expected(what: str, path: str) -> InvalidRequest:
    """Error for a value of the wrong type or outside its range."""
    return InvalidRequest(f"{path} must be {what}.", path)


def boolean(value: Any, path: str, limits: RequestLimits) -> Any:
    """``true`` or ``false``."""
    if type(value) is not bool:
        raise expected("true or false", path)
    return value


def integer(low: int, high: int) -> Check:
    """An integer from ``low`` to ``high``, both included; ``true`` is none, nor is ``1.0``."""

    def check(value: Any, path: str, limits: RequestLimits) -> Any:
        if type(value) is not int or not low <= value <= high:
            raise expected(f"an integer from {low} to {high}", path)
        return value

    return check


def number(low: float, high: float, *, above_low: bool = False) -> Check:
    """A number from ``low`` to ``high``; ``above_low`` leaves ``low`` itself out."""
    what = f"above {low} and at most {high}" if above_low else f"from {low} to {high}"

    def check(value: Any, path: str, limits: RequestLimits) -> Any:
        if type(value) not in (int, float) or not low <= value <= high:
            raise expected(f"a number {what}", path)
        if above_low and value == low:
            raise expected(f"a number {what}", path)
        return value

    return check


def text(max_chars: int | None = None) -> Check:
    """A string of at most ``max_chars`` code points."""

    def check(value: Any, path: str, limits: RequestLimits) -> Any:
        if type(value) is not str:
            raise expected("a string", path)
        if max_chars is not None and len(value) > max_chars:
            raise expected(f"a string of at most {max_chars} characters", path)
        return value

    return check


def one_of(*values: str) -> Check:
    """One of a few known strings."""
    what = "one of " + ", ".join(values)

    def check(value: Any, path: str, limits: RequestLimits) -> Any:
        if type(value) is not str or value not in values:
            raise expected(what, path)
        return value

    return check


def array(value: Any, path: str, at_most: int) -> list[Any]:
    """A list of 1 to ``at_most`` items."""
    if type(value) is not list or not value:
        raise expected("a list with at least one item", path)
    if len(value) > at_most:
        raise expected(f"a list of at most {at_most} items", path)
    return value


def mapping(value: Any, path: str) -> dict[str, Any]:
    """A JSON object."""
    if type(value) is not dict:
        raise expected("an object", path)
    return value


def only(value: dict[str, Any], known: frozenset[str], path: str) -> None:
    """Refuse keys that are not ``known``.

    The engine accepts and keeps keys that it does not know, and acts on some that its
    documentation does not name, so nothing unknown goes through.
    """
    for key in value:
        if key not in known:
            where = join(path, key)
            raise UnsupportedField(f"{where} is not supported.", where)


def free_form(value: Any, path: str, limits: RequestLimits) -> dict[str, Any]:
    """An object of any content, bounded in depth and in number of values."""
    tree = mapping(value, path)
    bounded(tree, path, limits)
    return tree


def bounded(tree: Any, path: str, limits: RequestLimits) -> None:
    """Refuse a tree that is too deep or has too many values; never recurses itself."""
    nodes, depth, level = 0, 0, [tree]
    while level:
        depth += 1
        nodes += len(level)
        if depth > limits.max_depth + 1:
            raise InvalidRequest(f"{path} is nested deeper than {limits.max_depth} levels.", path)
        if nodes > limits.max_nodes:
            raise InvalidRequest(f"{path} has more than {limits.max_nodes} values.", path)
        below: list[Any] = []
        for node in level:
            if type(node) is dict:
                below.extend(node.values())
            elif type(node) is list:
                below.extend(node)
        level = below
