"""JSON schemas that an engine compiles into a grammar: bounded in what compiling them costs.

The engine turns a schema into a grammar when a request arrives, part of it on the event loop that
all its streams share. Regular expressions are spelled out (``(a{1,100}){1,100}`` is ten thousand
letters), and each optional property may follow each other one, so a small schema can cost minutes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from governance.errors import InvalidRequest
from governance.protocol.values import RequestLimits

_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_REPEAT = re.compile(r"\{(\d{0,9})(?:,(\d{0,9}))?\}")


def refuse_costly(trees: Iterable[Any], path: str, limits: RequestLimits) -> None:
    """Refuse schemas with an object of too many properties, or with too much in patterns.

    Args:
        trees: Schemas that are compiled together, already bounded in depth and number of values.
        path: Where they stand, for the error.
        limits: ``max_properties`` and ``max_pattern_cost``.

    Raises:
        InvalidRequest: They cost too much.
    """
    left = limits.max_pattern_cost
    stack = list(trees)
    while stack:
        node = stack.pop()
        if type(node) is list:
            stack.extend(node)
        if type(node) is not dict:
            continue
        if len(node) > limits.max_properties:
            raise InvalidRequest(
                f"{path} has an object with more than {limits.max_properties} properties.", path
            )
        stack.extend(node.values())
        by_pattern = node.get("patternProperties")
        for pattern in (node.get("pattern"), *(by_pattern if type(by_pattern) is dict else ())):
            if type(pattern) is str:
                left -= len(pattern) if len(pattern) > left else pattern_cost(pattern)
            if left < 0:
                raise InvalidRequest(
                    f"{path} has regular expressions that amount to more than "
                    f"{limits.max_pattern_cost} characters with their repetitions spelled out.",
                    path,
                )


def pattern_cost(pattern: str) -> int:
    """Characters and classes of a regular expression, with counted repetitions spelled out.

    Reads any text, in linear time; what is no regular expression, the engine refuses.
    """
    groups: list[int] = []
    total = last = 0  # of the group that is open, and of the item that a repetition would repeat
    at, classes = 0, True
    while at < len(pattern):
        char = pattern[at]
        if char == "{" and (repeat := _REPEAT.match(pattern, at)) is not None:
            times = max(1, *(int(count or 1) for count in repeat.groups(default="1")))
            total += last * (times - 1)
            last *= times
            at = repeat.end()
            continue
        if char == "(":
            groups.append(total)
            total = last = 0
        elif char == ")" and groups:
            last = total
            total += groups.pop()
        else:
            total += 1
            if char not in "*+?":
                last = 1
        if char == "\\":
            at += 1
        elif char == "[" and classes:
            inside = _CLASS.match(pattern, at)
            # One that does not end here ends nowhere: looking again at each one would be quadratic.
            classes = inside is not None
            at = inside.end() - 1 if inside is not None else at
        at += 1
    return total + sum(groups)
