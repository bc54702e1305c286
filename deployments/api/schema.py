"""OpenAPI fragments: what the endpoints take and answer.

The engine's full request classes are not imported at the edge (seconds and half a gigabyte);
these fragments name what governance reads and the common generation fields.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_TEXT_PART: Schema = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {
            "anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART, "minItems": 1}]
        },
    },
    "required": ["role", "content"],
}
_TOOL: Schema = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
                "description": {"type": "string"},
                "parameters": {"type": "object"},
            },
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
_GENERATION: Schema = {
    "model": {"type": "string", "description": "One of GET /v1/models."},
    "max_tokens": {"type": "integer", "minimum": 1},
    "n": {"type": "integer", "minimum": 1, "maximum": 16},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "stop": {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "maxItems": 16},
        ]
    },
    "seed": {"type": "integer"},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "stream": {"type": "boolean"},
    "stream_options": {
        "type": "object",
        "properties": {"include_usage": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "user": {"type": "string"},
}


def _body(properties: Schema, required: list[str]) -> Schema:
    schema: Schema = {"type": "object", "properties": properties, "required": required}
    schema["additionalProperties"] = False
    return {
        "security": [{"bearer": []}],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        },
    }


CHAT = _body(
    {
        **_GENERATION,
        "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
        "max_completion_tokens": {"type": "integer", "minimum": 1},
        "tools": {"type": "array", "items": _TOOL, "minItems": 1},
        "logprobs": {"type": "boolean"},
        "response_format": {
            "type": "object",
            "properties": {"type": {"enum": ["text", "json_object"]}},
            "required": ["type"],
            "additionalProperties": False,
        },
    },
    ["model", "messages"],
)
COMPLETIONS = _body(
    {
        **_GENERATION,
        "prompt": {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
            ]
        },
        "logprobs": {"type": "integer", "minimum": 0, "maximum": 5},
    },
    ["model", "prompt"],
)
EMBEDDINGS = _body(
    {
        "model": {"type": "string"},
        "input": {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
            ]
        },
        "encoding_format": {"enum": ["float", "base64"]},
        "user": {"type": "string"},
    },
    ["model", "input"],
)

ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
                "request_id": {"type": "string"},
                "decision_id": {"type": "string"},
                "rule_ids": {"type": "array", "items": {"type": "string"}},
                "account": {"type": "string"},
                "reset_at": {"type": "integer"},
                "still_fits": {
                    "type": "object",
                    "properties": {
                        "tokens": {"type": ["integer", "null"]},
                        "gpu_ms": {"type": ["integer", "null"]},
                    },
                },
                "window": {"type": "string"},
                "ran_out": {"enum": ["tokens", "gpu_ms"]},
                "limit": {"type": "integer"},
                "spent": {"type": "integer"},
                "owner": {"type": ["string", "null"]},
                "allowed": {
                    "type": "object",
                    "properties": {
                        "answer_tokens": {"type": "integer"},
                        "instead": {
                            "type": ["object", "null"],
                            "properties": {
                                "model": {"type": "string"},
                                "answer_tokens": {"type": "integer"},
                            },
                        },
                    },
                },
            },
            "required": ["message", "type", "param", "code", "request_id"],
        }
    },
    "required": ["error"],
}


def _error(description: str) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": ERROR}}}


ERRORS: dict[int | str, Schema] = {
    400: _error("The request is not valid."),
    401: _error("No credential, or one that does not count."),
    403: _error("Blocked by policy, or not permitted."),
    404: _error("Unknown, or not visible to the caller."),
    408: _error("The body was not received in time."),
    413: _error("The body is too large."),
    415: _error("The body is not declared as JSON."),
    429: _error("Over a rate, a limit or a budget; Retry-After says when to come back."),
    500: _error("Our fault; nothing internal is told."),
    503: _error("Something that the request needs is not available."),
    504: _error("The engine did not answer in time."),
}
