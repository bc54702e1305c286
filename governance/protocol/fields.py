"""Which fields of a request go to the engine, and which do not: one table an operation.

A field is in exactly one of these:

- *forwarded*: checked, and sent on.
- *set by the gateway* from what was read (``model``, ``stream``, answer length).
- *ignored*: means something to other platforms; checked, accepted, not sent on.
- *forbidden*: the engine knows it, and a client that could set it would choose its own priority,
  read another department's cache, swap the chat template, or get text past inspection.
- anything else is *unsupported*. ``null`` stands for "not given" in the first three.

A test holds the tables to the request classes of the engine, so that a field which a new engine
version brings is decided on and not let through.
"""

from __future__ import annotations

from typing import Any

from governance.protocol.messages import messages
from governance.protocol.tools import response_format, tool_choice, tools
from governance.protocol.values import (
    INT64_MAX,
    INT64_MIN,
    MAX_TOKENS,
    Check,
    RequestLimits,
    array,
    boolean,
    expected,
    free_form,
    integer,
    join,
    mapping,
    number,
    one_of,
    only,
    text,
)
from governance.types import Operation


def _stop(value: Any, path: str, limits: RequestLimits) -> Any:
    """One string or several at which an answer ends."""
    if type(value) is list:
        if not value:
            return []
        items = array(value, path, limits.max_stops)
    else:
        items = [value]
    for i, item in enumerate(items):
        where = join(path, i) if type(value) is list else path
        if type(item) is not str or not 0 < len(item) <= limits.max_stop_chars:
            raise expected(f"a string of 1 to {limits.max_stop_chars} characters", where)
    return items


def _logit_bias(value: Any, path: str, limits: RequestLimits) -> Any:
    """Token id (as a string of digits) -> bias from -100 to 100."""
    biases = mapping(value, path)
    if len(biases) > limits.max_logit_biases:
        raise expected(f"an object of at most {limits.max_logit_biases} token ids", path)
    for token, bias in biases.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise expected("an object whose keys are token ids", path)
        number(-100, 100)(bias, join(path, token), limits)
    return biases


def _prompts(value: Any, path: str, limits: RequestLimits, at_most: int) -> Any:
    """A string, strings, token ids, or lists of token ids; never a mixture."""
    if type(value) is str:
        return value
    if type(value) is not list:
        raise expected("a string, a list of strings, or token ids", path)
    if value and type(value[0]) is int:
        _token_ids(value, path, limits.max_prompt_tokens)
        return value
    items = array(value, path, at_most)
    if type(items[0]) is str:
        for i, item in enumerate(items):
            if type(item) is not str:
                raise expected("a string, as the first item is", join(path, i))
        return items
    left = limits.max_prompt_tokens
    for i, item in enumerate(items):
        left -= _token_ids(item, join(path, i), left)
    return items


def _token_ids(value: Any, path: str, at_most: int) -> int:
    ids = array(value, path, at_most)
    for i, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < 2**31:
            raise expected("a token id", join(path, i))
    return len(ids)


def _prompt(value: Any, path: str, limits: RequestLimits) -> Any:
    return _prompts(value, path, limits, limits.max_prompts)


def _input(value: Any, path: str, limits: RequestLimits) -> Any:
    return _prompts(value, path, limits, limits.max_inputs)


def _choices(value: Any, path: str, limits: RequestLimits) -> Any:
    return integer(1, limits.max_choices)(value, path, limits)


def _stream_options(value: Any, path: str, limits: RequestLimits) -> Any:
    options = mapping(value, path)
    only(options, frozenset({"include_usage", "include_obfuscation"}), path)
    for key, option in options.items():
        if option is not None:
            boolean(option, join(path, key), limits)
    return options


def _text_only(value: Any, path: str, limits: RequestLimits) -> Any:
    if value != ["text"]:
        raise expected('["text"]', path)
    return value


_SAMPLING: dict[str, Check] = {
    "temperature": number(0, 2),
    "top_p": number(0, 1, above_low=True),
    "top_k": integer(-1, 2**31 - 1),
    "min_p": number(0, 1),
    "n": _choices,
    "stop": _stop,
    "seed": integer(INT64_MIN, INT64_MAX),
    "min_tokens": integer(0, MAX_TOKENS),
    "ignore_eos": boolean,
    "include_stop_str_in_output": boolean,
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": number(0, 10, above_low=True),
    "logit_bias": _logit_bias,
    "response_format": response_format,
}

FORWARDED: dict[Operation, dict[str, Check]] = {
    Operation.CHAT: {
        "messages": messages,
        "tools": tools,
        "tool_choice": tool_choice,
        "parallel_tool_calls": boolean,
        **_SAMPLING,
        "logprobs": boolean,
        "top_logprobs": integer(0, 20),
        "reasoning_effort": one_of("none", "minimal", "low", "medium", "high", "xhigh", "max"),
    },
    Operation.COMPLETIONS: {
        "prompt": _prompt,
        **_SAMPLING,
        "logprobs": integer(0, 20),
    },
    Operation.EMBEDDINGS: {
        "input": _input,
        "dimensions": integer(1, 65_536),
        "encoding_format": one_of("float", "base64"),
    },
}
"""Fields sent on, in the order in which they are written."""

REQUIRED = {
    Operation.CHAT: "messages",
    Operation.COMPLETIONS: "prompt",
    Operation.EMBEDDINGS: "input",
}

_STREAMED: dict[str, Check] = {
    "stream": boolean,
    "stream_options": _stream_options,
    "max_tokens": integer(1, MAX_TOKENS),
}

READ: dict[Operation, dict[str, Check]] = {
    Operation.CHAT: {**_STREAMED, "max_completion_tokens": integer(1, MAX_TOKENS)},
    Operation.COMPLETIONS: _STREAMED,
    Operation.EMBEDDINGS: {},
}
"""Fields that are read and then written by the gateway itself; ``model`` is one of them too."""

IGNORED: dict[Operation, dict[str, Check]] = {
    Operation.CHAT: {
        "user": text(),
        "metadata": free_form,
        "store": boolean,
        "safety_identifier": text(),
        "prompt_cache_key": text(),
        "service_tier": one_of("auto", "default"),
        "modalities": _text_only,
    },
    Operation.COMPLETIONS: {
        "user": text(),
        "best_of": integer(1, 1),
        "suffix": one_of(""),
    },
    Operation.EMBEDDINGS: {"user": text()},
}
"""Fields accepted and not sent on. None of them says who the caller is."""

_FORBIDDEN_EVERYWHERE = frozenset(
    {
        "priority",
        "request_id",
        "session_id",
        "cache_salt",
        "mm_processor_kwargs",
        "media_io_kwargs",
        "add_special_tokens",
        "truncate_prompt_tokens",
        "truncation_side",
        "padding",
        "prompt_embeds",
        "logits_processors",
        "lora_request",
    }
)

_FORBIDDEN_GENERATING = _FORBIDDEN_EVERYWHERE | frozenset(
    {
        "kv_transfer_params",
        "ec_transfer_params",
        "vllm_xargs",
        "structured_outputs",
        "echo",
        "prompt_logprobs",
        "logprob_token_ids",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "return_token_offsets",
        "routed_experts_prompt_start",
        "stream_interval",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "allowed_token_ids",
        "bad_words",
        "stop_token_ids",
        "use_beam_search",
        "length_penalty",
        "repetition_detection",
        "thinking_token_budget",
    }
)

_CHAT_TEMPLATE = frozenset(
    {
        "chat_template",
        "chat_template_kwargs",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "return_prompt_text",
        "return_assistant_tokens_mask",
        "include_reasoning",
    }
)

FORBIDDEN: dict[Operation, frozenset[str]] = {
    Operation.CHAT: _FORBIDDEN_GENERATING | _CHAT_TEMPLATE,
    Operation.COMPLETIONS: _FORBIDDEN_GENERATING,
    Operation.EMBEDDINGS: _FORBIDDEN_EVERYWHERE
    | _CHAT_TEMPLATE
    | frozenset({"messages", "embed_dtype", "endianness", "use_activation"}),
}
"""Fields that only the platform may set, in whatever spelling: presence alone refuses them."""

ADVICE = {
    "structured_outputs": "Use response_format.",
    "documents": "Put the text into a message.",
    "stop_token_ids": "Use stop.",
    "functions": "Use tools.",
    "function_call": "Use tool_choice.",
    "suffix": "Only an empty one is.",
    "audio": "Send text.",
}
"""What to use instead of a field that is refused."""
