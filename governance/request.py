"""From the bytes of a client to a checked request, and from that to the bytes of the engine.

``parse_request`` keeps an allow-list of fields (``governance.protocol.fields``), each checked in
type and range. ``forward_body`` writes what was kept with the fields that only the platform sets.

What the engine reads is what inspection read: both see the *parsed* value, and the engine gets a
new serialisation of it, never the client's bytes. So a key given twice (the last one counts),
escapes, odd spacing or a number in an unusual notation cannot mean one thing here and another
there. Not JSON at all, and refused: NaN and Infinity, numbers beyond a double, lone surrogates,
invalid UTF-8, a byte order mark.

Token-id prompts are kept by ``parse_request`` but cannot be forwarded or walked: they must be
decoded first (``token_prompts``, ``with_text_prompts``), so that inspection sees their text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson

from governance.errors import ForbiddenField, InvalidRequest, MediaRefused, UnsupportedField
from governance.protocol.fields import ADVICE, FORBIDDEN, FORWARDED, IGNORED, READ, REQUIRED
from governance.protocol.messages import MEDIA
from governance.protocol.tools import settle_tools
from governance.protocol.values import RequestLimits, expected, join
from governance.types import InferenceRequest, Operation

_DEFAULT_LIMITS = RequestLimits()
_MAX_MODEL_CHARS = 256
_OPENING_CHARS = 4096


def parse_request(
    operation: Operation, body: bytes, limits: RequestLimits = _DEFAULT_LIMITS
) -> InferenceRequest:
    """Read and check a request body.

    Args:
        operation: What the endpoint does.
        body: JSON in UTF-8, as received; its size was bounded by who read it.
        limits: Bounds on counts and depth.

    Returns:
        The request; its ``body`` holds the forwarded fields without those that ``forward_body``
        writes (``model``, ``stream``, ``stream_options``, answer length).

    Raises:
        InvalidRequest: Not JSON, not an object, or a field of wrong type or range; ``param``
            is the dotted path.
        UnsupportedField: A field, or a key in one, that is not known here.
        ForbiddenField: A field that only the platform may set.
        MediaRefused: Anything but text.
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise InvalidRequest("The body is not valid JSON.") from None
    if type(fields) is not dict:
        raise InvalidRequest("The body must be a JSON object.")
    _refuse_others(operation, fields)
    kept: dict[str, Any] = {}
    for name, check in FORWARDED[operation].items():
        if fields.get(name) is not None:
            kept[name] = check(fields[name], name, limits)
    read: dict[str, Any] = {}
    for name, check in READ[operation].items():
        if fields.get(name) is not None:
            read[name] = check(fields[name], name, limits)
    for name, check in IGNORED[operation].items():
        if fields.get(name) is not None:
            check(fields[name], name, limits)
    required = REQUIRED[operation]
    if required not in kept:
        raise InvalidRequest(f"{required} is missing.", required)
    _settle(operation, kept, read)
    request = InferenceRequest(
        operation=operation,
        model=_model(fields),
        body=kept,
        stream=read.get("stream", False),
        include_usage=(read.get("stream_options") or {}).get("include_usage") or False,
        max_tokens=_max_tokens(read),
        choices=_choices(operation, kept),
        body_bytes=len(body),
    )
    if request.choices > limits.max_total_choices:
        raise InvalidRequest(
            f"n times the number of prompts must be at most {limits.max_total_choices}.", "n"
        )
    return request


def _refuse_others(operation: Operation, fields: dict[str, Any]) -> None:
    forwarded, read, ignored = FORWARDED[operation], READ[operation], IGNORED[operation]
    for name in fields:
        if name in forwarded or name in read or name in ignored or name == "model":
            continue
        where = join("", name)
        advice = ADVICE.get(name, "")
        if name in FORBIDDEN[operation]:
            # NOTE: ``false`` is what these mean anyway, and SDKs send it as a default.
            if name == "echo" and not fields[name]:
                continue
            raise ForbiddenField(f"{where} may not be set by a client. {advice}".rstrip(), where)
        if name in MEDIA:
            raise MediaRefused("", where)
        raise UnsupportedField(f"{where} is not supported. {advice}".rstrip(), where)


def _settle(operation: Operation, kept: dict[str, Any], read: dict[str, Any]) -> None:
    """Checks over several fields."""
    if read.get("stream_options") and not read.get("stream"):
        raise InvalidRequest("stream_options needs stream: true.", "stream_options")
    if operation is Operation.CHAT:
        settle_tools(kept)
        if kept.get("top_logprobs") and not kept.get("logprobs"):
            raise InvalidRequest("top_logprobs needs logprobs: true.", "top_logprobs")
        if read.get("max_completion_tokens", read.get("max_tokens")) != read.get(
            "max_tokens", read.get("max_completion_tokens")
        ):
            raise InvalidRequest(
                "max_tokens and max_completion_tokens differ; send one of them.", "max_tokens"
            )
    asked, least = _max_tokens(read), kept.get("min_tokens", 0)
    if asked is not None and least > asked:
        raise expected(f"at most max_tokens ({asked})", "min_tokens")


def _model(fields: dict[str, Any]) -> str:
    model = fields.get("model")
    if model is None:
        raise InvalidRequest("model is missing; GET /v1/models lists yours.", "model")
    if type(model) is not str or not 0 < len(model) <= _MAX_MODEL_CHARS:
        raise expected(f"a string of 1 to {_MAX_MODEL_CHARS} characters", "model")
    if not model.isprintable():
        raise expected("a string of printable characters", "model")
    return model


def _max_tokens(read: dict[str, Any]) -> int | None:
    asked: int | None = read.get("max_completion_tokens", read.get("max_tokens"))
    return asked


def _choices(operation: Operation, kept: dict[str, Any]) -> int:
    """Answers that the engine will give: ``n`` for each prompt."""
    if operation is Operation.EMBEDDINGS:
        return 1
    n: int = kept.get("n", 1)
    prompt = kept.get("prompt")
    several = type(prompt) is list and type(prompt[0]) is not int
    return n * len(prompt) if several and prompt is not None else n


def token_prompts(request: InferenceRequest) -> list[list[int]]:
    """Prompts given as token ids, in order; empty when the request holds text."""
    prompt = request.body.get(REQUIRED[request.operation])
    if type(prompt) is not list or request.operation is Operation.CHAT:
        return []
    if type(prompt[0]) is int:
        return [prompt]
    return prompt if type(prompt[0]) is list else []


def with_text_prompts(request: InferenceRequest, texts: Sequence[str]) -> InferenceRequest:
    """The same request with its token-id prompts replaced by their text.

    The engine encodes the text again. Where decoding and encoding are not inverse, it sees what
    inspection saw, which is what counts.

    Raises:
        ValueError: Not one text for each token-id prompt.
    """
    field = REQUIRED[request.operation]
    tokens = token_prompts(request)
    if not tokens or len(texts) != len(tokens):
        raise ValueError(f"{len(texts)} texts for {len(tokens)} token-id prompts")
    single = type(request.body[field][0]) is int
    prompt: str | list[str] = texts[0] if single else list(texts)
    return replace(request, body={**request.body, field: prompt})


def opening(request: InferenceRequest) -> list[str]:
    """What names a conversation: its first two messages, or the first prompt.

    Cut short: a prompt may have megabytes.
    """
    if request.operation is not Operation.CHAT:
        prompt = request.body[REQUIRED[request.operation]]
        first = prompt if isinstance(prompt, str) else prompt[0]
        return [str(first)[:_OPENING_CHARS]]
    return [_beginning(message.get("content")) for message in request.body["messages"][:2]]


def _beginning(content: Any) -> str:
    if isinstance(content, str):
        return content[:_OPENING_CHARS]
    found = ""
    for part in content or ():
        found += part["text"][: _OPENING_CHARS - len(found)] + "\0"
        if len(found) >= _OPENING_CHARS:
            break
    return found


def question(request: InferenceRequest) -> str:
    """What an answer answers: the last message of the user, or the first prompt."""
    if request.operation is not Operation.CHAT:
        prompt = request.body[REQUIRED[request.operation]]
        return prompt if isinstance(prompt, str) else str(prompt[0])
    messages = request.body["messages"]
    asked = next((m for m in reversed(messages) if m["role"] == "user"), messages[-1])
    content = asked.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content or ())


def forward_body(
    request: InferenceRequest, *, model: str, max_tokens: int, cache_salt: str, priority: int
) -> bytes:
    """The exact bytes that the engine gets.

    Equal requests give equal bytes: fields stand in a fixed order, and the content of schemas in
    the client's own, because the order of properties steers a structured answer. Answers that
    generate are always streamed, with usage, so that the gateway can stop one at any chunk.

    Args:
        request: Parsed, and its token-id prompts decoded.
        model: Id of the model or adapter chosen.
        max_tokens: Answer tokens per choice, at least 1; ignored for embeddings.
        cache_salt: Keeps prefix caches of departments apart; not empty.
        priority: vLLM priority, lower is served earlier; 0 is left out, because an engine
            without priority scheduling refuses the field.

    Raises:
        ValueError: Token-id prompts are left, or an argument is out of range.
    """
    if token_prompts(request):
        raise ValueError("token-id prompts must be decoded before they are forwarded")
    if not cache_salt:
        raise ValueError("cache_salt must not be empty")
    body: dict[str, Any] = {"model": model, **request.body}
    if request.operation is not Operation.EMBEDDINGS:
        if max_tokens < 1:
            raise ValueError("max_tokens must be at least 1")
        chat = request.operation is Operation.CHAT
        body["max_completion_tokens" if chat else "max_tokens"] = max_tokens
        if "min_tokens" in body:
            body["min_tokens"] = min(body["min_tokens"], max_tokens)
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
    body["cache_salt"] = cache_salt
    if priority:
        body["priority"] = priority
    return orjson.dumps(body)
