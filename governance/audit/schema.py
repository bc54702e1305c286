"""The audit record: one list of columns makes the canonical bytes, Arrow, Parquet and the page.

**Canonical bytes** of a record are JSON in UTF-8 with sorted keys and no white space, with every
column of ``COLUMNS`` that is not ``derived``, ``null`` where there is no value. There are no
floating-point numbers: times are microseconds, fractions are thousandths. 32-byte values are lower
case hex in JSON, fixed-size binary in Parquet. Two records are equal exactly when their canonical
bytes are, and any other program can make them from a row.

**Leaf hash** (RFC 6962, section 2.1): SHA-256 of a zero byte and the canonical bytes.
``prev_hash`` of a record is the leaf hash of the record before it by the same writer and epoch,
and 32 zero bytes for the first: who changes a record changes every later one of its writer.

A column is never removed and never changes its meaning; a new one raises ``SCHEMA_VERSION`` and is
null in older records, which keep the version they were written with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

SCHEMA_VERSION: Final = 1


class EventType(StrEnum):
    """What happened. Events of administration and of later capabilities join this list."""

    DECIDED = "inference.decided"
    """A request was admitted; durable before any engine sees it. Has a prompt."""
    COMPLETED = "inference.completed"
    """An admitted request ended, in whatever way its ``outcome`` says; ``parent_event_id`` is
    its ``decided``."""
    REFUSED = "inference.refused"
    """A request ended before it was admitted: by identity, policy, limit or budget."""
    ABORTED = "inference.aborted"
    """Written for a ``decided`` whose gateway died before it could record an end."""
    SETTLED = "usage.settled"
    """The engine's own account of a request whose gateway did not get it: it hung up or died."""
    SHADOW = "route.shadow"
    """The large model answered a request, in idle time, that the small one had answered, for
    comparison; ``parent_event_id`` is the ``decided`` of the latter, ``detail`` says how far the
    answers agree."""
    METER_INTERVAL = "meter.interval"
    """Device time of one engine replica since its last such event; ``detail`` says busy,
    attributed, idle and unattributed microseconds."""
    ENGINE_LOST = "engine.lost"
    """A replica ended without its last report; ``detail`` bounds what is unattributed."""
    BUDGET_SET = "budget.set"
    """Somebody overrode an account's budget for a time."""
    BUDGETS_LOADED = "budget.loaded"
    """The ledger took up a budgets file; ``detail`` has its digest."""
    BUDGET_TRANSFER = "budget.transfer"
    """Somebody moved budget from one account to another, for a window."""
    BUDGET_THRESHOLD = "budget.threshold"
    """An account crossed a threshold of its limit; once a window and threshold. Once more, with the
    state ``undelivered``, where the webhook could not be told."""
    BUDGET_WINDOW = "budget.window"
    """The window of an account ended in which something was spent; ``detail`` says how much."""
    WRITER_STARTED = "writer.started"
    """A process began to write: the first record of its chain."""
    WRITER_STOPPED = "writer.stopped"
    """A process ended in order: the last record of its chain."""


class Kind(StrEnum):
    """Type of a column."""

    U16 = "u16"
    U32 = "u32"
    U64 = "u64"
    I16 = "i16"
    I32 = "i32"
    I64 = "i64"
    BOOL = "bool"
    TEXT = "text"
    ENUM = "enum"
    """Text out of a fixed set; dictionary-encoded in Parquet."""
    HEX32 = "hex32"
    """32 bytes; lower case hex in canonical bytes."""
    TEXTS = "texts"
    """List of text."""
    PARTS = "parts"
    """List of ``PART_FIELDS`` structs."""
    FINDINGS = "findings"
    """List of ``FINDING_FIELDS`` structs."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the record."""

    name: str
    kind: Kind
    group: str
    doc: str
    values: tuple[str, ...] = ()
    """Permitted values of an enum."""
    required: bool = False
    """Whether it is never null."""
    derived: bool = False
    """Computed from the canonical bytes, so not part of them."""


PART_FIELDS: Final[tuple[tuple[str, Kind, str], ...]] = (
    ("kind", Kind.TEXT, "prompt, upload, retrieval, tool_call, tool_output, tool_definition"),
    ("source_id", Kind.TEXT, "where it came from, as declared"),
    ("class", Kind.TEXT, "data class"),
    ("bytes", Kind.I64, "bytes of UTF-8"),
    ("commit", Kind.HEX32, "SHA-256 over salt and text"),
)
FINDING_FIELDS: Final[tuple[tuple[str, Kind, str], ...]] = (
    ("finding_id", Kind.TEXT, "unique id"),
    ("detector", Kind.TEXT, "which detector"),
    ("version", Kind.TEXT, "its version"),
    ("category", Kind.TEXT, "what was found"),
    ("severity", Kind.TEXT, "low, medium, high, critical"),
    ("part", Kind.TEXT, "JSON Pointer of the text"),
    ("count", Kind.I32, "occurrences"),
    ("score_milli", Kind.I32, "score in thousandths"),
    ("action", Kind.TEXT, "what was done about it"),
)

_EFFECTS = ("allow", "redact", "reroute", "require_approval", "block")
_T, _E, _H, _L = Kind.TEXT, Kind.ENUM, Kind.HEX32, Kind.TEXTS
_I16, _I32, _I64, _B = Kind.I16, Kind.I32, Kind.I64, Kind.BOOL


def _column(group: str, name: str, kind: Kind, doc: str, *values: str) -> Column:
    return Column(name, kind, group, doc, values)


def _required(group: str, name: str, kind: Kind, doc: str, *values: str) -> Column:
    return Column(name, kind, group, doc, values, required=True)


COLUMNS: Final[tuple[Column, ...]] = (
    _required("record", "schema_version", Kind.U16, "version of this schema"),
    _required("record", "event_id", _T, "ULID; sorts by time"),
    _required("record", "event_type", _E, "what happened", *EventType),
    _required("record", "ts_us", _I64, "when it began, microseconds since 1970 UTC"),
    _column("record", "ts_end_us", _I64, "when it ended, microseconds since 1970 UTC"),
    _required("record", "writer_id", _T, "process that wrote it"),
    _required("record", "writer_epoch", Kind.U32, "start number of the writer, from 1"),
    _required("record", "writer_seq", Kind.U64, "place in the writer's chain, from 1, no gaps"),
    _required("record", "prev_hash", _H, "leaf hash of the writer's record before"),
    Column("leaf_hash", _H, "record", "SHA-256 of 0x00 and the canonical bytes", (), True, True),
    _column("links", "request_id", _T, "the request, as in x-gatehouse-request-id"),
    _column("links", "decision_id", _T, "the decision, as in x-gatehouse-decision-id"),
    _column("links", "conversation_id", _T, "conversation, where one is known"),
    _column("links", "trace_id", _T, "W3C trace id"),
    _column("links", "span_id", _T, "W3C span id"),
    _column("links", "parent_event_id", _T, "the inference.decided that this belongs to"),
    _column("links", "reservation_id", _T, "hold on the budget"),
    _column("links", "lease_id", _T, "lease that the hold was taken from"),
    _column("links", "exception_id", _T, "approved exception that applied"),
    _column("who", "subject_key", _T, "pseudonym of the caller (HMAC)"),
    _column("who", "principal_kind", _E, "kind of caller", "user", "service", "key", "system"),
    _column("who", "issuer", _T, "configured name of the issuer"),
    _column("who", "tenant_id", _T, "tenant within the issuer"),
    _column("who", "client_id", _T, "application that the token was issued to"),
    _column("who", "auth_method", _E, "how the caller proved it", "oidc", "service_key", "none"),
    _column("who", "key_id", _T, "service key, or key that signed the token"),
    _column("who", "token_hash", _H, "SHA-256 of the credential"),
    _column("who", "roles", _L, "roles, sorted"),
    _column("who", "department", _T, "department of the caller"),
    _column("who", "groups_overage", _B, "the issuer left groups out"),
    _column("what", "operation", _T, "chat, completions, embeddings; or an administrative act"),
    _column("what", "provider", _T, "gatehouse, or the external provider"),
    _column("what", "request_model", _T, "model that the caller named"),
    _column("what", "response_model", _T, "model that answered"),
    _column("what", "model_revision", _T, "sha256 digest of the weights that answered"),
    _column("what", "adapter", _T, "LoRA adapter, if one answered"),
    _column("what", "engine_version", _T, "engine and version"),
    _column("what", "route_target", _E, "where it was sent", "internal", "external"),
    _column("what", "route_reason", _T, "why that model"),
    _column("what", "replica_id", _T, "engine replica"),
    _column("what", "max_tokens", _I32, "answer tokens per choice that were allowed"),
    _column("what", "choices", _I32, "answers asked for"),
    _column("what", "temperature_milli", _I32, "temperature in thousandths"),
    _column("what", "seed", _I64, "seed of the sampler"),
    _column("what", "stream", _B, "the answer was streamed"),
    _column(
        "data", "data_class", _E, "class of the content",
        "public", "internal", "confidential", "restricted",
    ),
    _column("data", "class_source", _T, "what set the class"),
    _column("data", "inspector", _T, "inspector of the input; none where inspection is off"),
    _column("data", "parts", Kind.PARTS, "pieces of content that were inspected"),
    _column("data", "findings", Kind.FINDINGS, "what inspection found"),
    _column("decision", "decision", _E, "effect of the policy", *_EFFECTS),
    _column("decision", "rule_ids", _L, "rules responsible, in file order"),
    _column("decision", "policy_digest", _H, "SHA-256 of the canonical policy"),
    _column("decision", "mode", _E, "whether the decision was enforced", "enforce", "shadow"),
    _column("decision", "shadow_decision", _E, "effect of rules in shadow mode", *_EFFECTS),
    _column("decision", "approver_key", _T, "pseudonym of who approved"),
    _column("content", "prompt_commit", _H, "commitment to the input, see content cells"),
    _column("content", "response_commit", _H, "commitment to the output, see content cells"),
    _column("content", "prompt_bytes", _I64, "bytes of the input"),
    _column("content", "response_bytes", _I64, "bytes of the output that was released"),
    _column("content", "dek_id", _T, "data key of the content cells"),
    _column("usage", "input_tokens", _I32, "prompt tokens, cached ones included"),
    _column("usage", "cached_tokens", _I32, "prompt tokens found in the prefix cache"),
    _column("usage", "output_tokens", _I32, "answer tokens over all choices"),
    _column("usage", "reasoning_tokens", _I32, "of those, reasoning"),
    _column("usage", "gpu_us", _I64, "device-microseconds metered, not weighted"),
    _column(
        "usage", "gpu_us_method", _E, "how gpu_us was found", "step_split", "pending", "none"
    ),
    _column("usage", "charged_us", _I64, "gpu_us times the accelerator's weight"),
    _column("usage", "cost_micro", _I64, "cost in millionths of the currency unit"),
    _column("usage", "budget_account", _T, "account that was charged"),
    _column("usage", "priority_class", _E, "class of service", "critical", "standard", "batch"),
    _column("usage", "reserved_us", _I64, "charged device time held at the end"),
    _column("usage", "queue_us", _I64, "time from receipt to acceptance by an engine"),
    _column("usage", "ttft_us", _I64, "time from receipt to the first piece of the answer"),
    _column("usage", "latency_us", _I64, "time from receipt to the end"),
    _column(
        "usage", "outcome", _E, "how it ended", "completed", "refused", "failed", "aborted"
    ),
    _column("usage", "status", _I16, "HTTP status, 499 for a client that hung up"),
    _column("usage", "error_code", _T, "code of the error, as the client saw it"),
    _column("usage", "finish_reason", _T, "finish reason of the last choice"),
    _column("workflow", "entity_type", _T, "what an administrative event is about"),
    _column("workflow", "entity_id", _T, "which one"),
    _column("workflow", "state", _T, "state it is in now"),
    _column("workflow", "owner_role", _T, "owner responsible"),
    _column("workflow", "reason_code", _T, "why"),
    _column("workflow", "ticket", _T, "ticket in another system"),
    _column("workflow", "due_us", _I64, "when it is due, microseconds since 1970 UTC"),
    _column("workflow", "detail", _T, "further values of the event, canonical JSON"),
)  # fmt: skip

BY_NAME: Final[Mapping[str, Column]] = {column.name: column for column in COLUMNS}
CANONICAL: Final[tuple[str, ...]] = tuple(
    sorted(column.name for column in COLUMNS if not column.derived)
)
"""Names of the columns in canonical bytes, in their order."""
