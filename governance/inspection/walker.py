"""Every piece of client text in a request, once, with the place it came from.

``walk`` yields what the engine will get (``governance.request.forward_body``), so that nothing
reaches a model unseen: strings and keys, and numbers inside free-form objects, because a card
number needs no quotes. Not yielded are the values that were checked to be one of a few constants
(``CONSTANTS``) and the token ids of ``logit_bias``, which are digits only.

Tool call arguments are a string that holds JSON. The engine decodes it before it writes the
prompt, so both forms are yielded: the string, and what it decodes to, at a path that continues
into the string (``/messages/2/tool_calls/0/function/arguments/city``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from governance.protocol.messages import decode_arguments
from governance.request import token_prompts
from governance.types import InferenceRequest, Operation, Surface, TextLeaf

CONSTANTS = (
    "/messages/*/role",
    "/messages/*/content/*/type",
    "/messages/*/tool_calls/*/type",
    "/tools/*/type",
    "/tool_choice",
    "/tool_choice/type",
    "/response_format/type",
    "/reasoning_effort",
    "/encoding_format",
)
"""Places of strings that are not yielded: ``parse_request`` lets only known constants through.
``/tool_choice`` is one while it is a string; a tool's name in it is yielded."""

_SURFACE_OF_ROLE = {
    "system": Surface.SYSTEM,
    "developer": Surface.SYSTEM,
    "user": Surface.PROMPT,
    "assistant": Surface.ASSISTANT,
    "tool": Surface.TOOL_OUTPUT,
}


def walk(request: InferenceRequest) -> Iterator[TextLeaf]:
    """Yield every text of a request, in the order in which the engine gets it.

    ``path`` is a JSON Pointer into ``request.body``; a key is yielded at the path of its value.

    Raises:
        ValueError: Token-id prompts have not been decoded, so part of the text is not there.
    """
    if token_prompts(request):
        raise ValueError("token-id prompts must be decoded before they are walked")
    body = request.body
    if request.operation is Operation.CHAT:
        for i, message in enumerate(body["messages"]):
            yield from _message(message, f"/messages/{i}")
        yield from _tools(body)
    else:
        field = "prompt" if request.operation is Operation.COMPLETIONS else "input"
        yield from _texts(body[field], f"/{field}", Surface.PROMPT)
    if "response_format" in body and "json_schema" in body["response_format"]:
        yield from _tree(
            body["response_format"]["json_schema"], "/response_format/json_schema", Surface.SCHEMA
        )
    if "stop" in body:
        yield from _texts(body["stop"], "/stop", Surface.METADATA)


def _message(message: dict[str, Any], path: str) -> Iterator[TextLeaf]:
    surface = _SURFACE_OF_ROLE[message["role"]]
    content = message.get("content")
    if type(content) is str:
        yield TextLeaf(f"{path}/content", surface, content)
    elif content is not None:
        for i, part in enumerate(content):
            yield TextLeaf(f"{path}/content/{i}/text", surface, part["text"])
    for key in ("reasoning", "tool_call_id", "name"):
        if key in message:
            yield TextLeaf(f"{path}/{key}", surface, message[key])
    for i, call in enumerate(message.get("tool_calls", ())):
        yield from _tool_call(call, f"{path}/tool_calls/{i}")


def _tool_call(call: dict[str, Any], path: str) -> Iterator[TextLeaf]:
    function = call["function"]
    yield TextLeaf(f"{path}/id", Surface.TOOL_CALL, call["id"])
    yield TextLeaf(f"{path}/function/name", Surface.TOOL_CALL, function["name"])
    arguments = function["arguments"]
    where = f"{path}/function/arguments"
    yield TextLeaf(where, Surface.TOOL_CALL, arguments)
    decoded = decode_arguments(arguments)
    if type(decoded) is dict:  # the engine puts an empty object in place of anything else
        yield from _tree(decoded, where, Surface.TOOL_CALL)


def _tools(body: Any) -> Iterator[TextLeaf]:
    for i, tool in enumerate(body.get("tools", ())):
        yield from _tree(tool["function"], f"/tools/{i}/function", Surface.TOOL_DEFINITION)
    choice = body.get("tool_choice")
    if type(choice) is dict:
        name = choice["function"]["name"]
        yield TextLeaf("/tool_choice/function/name", Surface.TOOL_DEFINITION, name)


def _texts(value: Any, path: str, surface: Surface) -> Iterator[TextLeaf]:
    """A string or a list of strings."""
    if type(value) is str:
        yield TextLeaf(path, surface, value)
        return
    for i, text in enumerate(value):
        yield TextLeaf(f"{path}/{i}", surface, text)


def _tree(root: Any, path: str, surface: Surface) -> Iterator[TextLeaf]:
    """Keys, strings and numbers of a free-form value, in document order, without recursion."""
    stack = [(path, root)]
    while stack:
        where, node = stack.pop()
        kind = type(node)
        if kind is str:
            yield TextLeaf(where, surface, node)
        elif kind is dict:
            children = [(f"{where}/{_escaped(key)}", value) for key, value in node.items()]
            for (child, _), key in zip(children, node, strict=True):
                yield TextLeaf(child, surface, key)
            stack.extend(reversed(children))
        elif kind is list:
            stack.extend((f"{where}/{i}", node[i]) for i in reversed(range(len(node))))
        elif kind is int or kind is float:
            yield TextLeaf(where, surface, repr(node))


def _escaped(key: str) -> str:
    """A key as a reference token of a JSON Pointer."""
    return key.replace("~", "~0").replace("/", "~1")
