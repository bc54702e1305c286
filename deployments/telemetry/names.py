"""Every metric of Gatehouse, once: what is exported, tested, drawn and documented comes from here.

Names are Prometheus's, in base units. What the code records is whole numbers in the platform's
units, so that nothing is rounded on the way: microseconds for ``seconds``, thousandths for
``ratio``. ``Spec.scale`` is the factor between the two.

Labels are bounded: models and departments come from configuration, stages, outcomes and error
codes from the code. Nothing that a client sends becomes a label, and no person does.
"""

from __future__ import annotations

from deployments.telemetry.budget_names import (
    ENGINE_METRICS,
    GATEWAY_METRICS,
    LEDGER_METRICS,
)
from deployments.telemetry.spec import PREFIX, Kind, Spec


def _bounds(*seconds: float) -> tuple[int, ...]:
    return tuple(round(each * 1_000_000) for each in seconds)


_STAGE_BOUNDS = _bounds(0.0001, 0.0005, 0.002, 0.01, 0.05, 0.2, 1, 5, 30)
_SCORE_BOUNDS = _bounds(0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5)
_WAIT_BOUNDS = _bounds(0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_WHOLE_BOUNDS = _bounds(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

REQUESTS = "gatehouse_requests_total"
REFUSALS = "gatehouse_refusals_total"
REQUEST = "gatehouse_request_seconds"
FIRST_CHUNK = "gatehouse_first_chunk_seconds"
STAGE = "gatehouse_stage_seconds"
TOKENS = "gatehouse_tokens_total"
GPU = "gatehouse_gpu_seconds_total"
CHARGED = "gatehouse_charged_gpu_seconds_total"
FAULTS = "gatehouse_telemetry_faults_total"
ROUTES = "gatehouse_routes_total"
ROUTE_LARGE = "gatehouse_route_large_ratio"
SUPERSEDED = "gatehouse_superseded_answers_total"
SCORES = "gatehouse_scores_total"
SCORE = "gatehouse_score_seconds"
SCORER_WAITING = "gatehouse_scorer_waiting"
SCORER_BATCHES = "gatehouse_scorer_batches_total"
SCORER_PROMPTS = "gatehouse_scorer_prompts_total"
SCORER_BUSY = "gatehouse_scorer_busy_seconds_total"
SCORER_UNUSED = "gatehouse_scorer_unused_total"
SHADOWS = "gatehouse_shadow_answers_total"
MODEL_READY = "gatehouse_model_ready"
CONTROL_AGE = "gatehouse_control_age_seconds"
WAL_RECORDS = "gatehouse_wal_records_total"
WAL_BYTES = "gatehouse_wal_bytes_total"
WAL_SYNCS = "gatehouse_wal_syncs_total"
WAL_SYNC_TIME = "gatehouse_wal_sync_seconds_total"
WAL_REFUSED = "gatehouse_wal_refused_total"
WAL_QUEUE = "gatehouse_wal_queued"
WAL_LAG = "gatehouse_wal_lag_seconds"
DISK_FREE = "gatehouse_disk_free_bytes"
DISK_RESERVE = "gatehouse_disk_reserve_bytes"
SEAL_LAG = "gatehouse_seal_lag_seconds"
SEALED_ROWS = "gatehouse_sealed_rows_total"
SEAL_FAULTS = "gatehouse_seal_faults_total"
ENGINE_RUNNING = "gatehouse_engine_running"
ENGINE_WAITING = "gatehouse_engine_waiting"
ENGINE_KV = "gatehouse_engine_kv_usage_ratio"
ENGINE_TIME = "gatehouse_engine_device_seconds_total"
METERING_TIME = "gatehouse_engine_metering_seconds_total"
ENGINE_DEAD = "gatehouse_engine_dead"
METER_FAILURES = "gatehouse_meter_report_failures_total"

METRICS: tuple[Spec, ...] = (
    # -- the request path, in the gateway ------------------------------------------------------
    Spec(
        REQUESTS,
        _C,
        "requests",
        "Requests that ended, refused ones included. `model` is `none` where the request named "
        "no model of this platform; `department` is `none` where the caller was not identified.",
        ("model", "department", "operation", "outcome", "status"),
    ),
    Spec(
        REFUSALS,
        _C,
        "requests",
        "Requests that did not end well, by the code of the error (errors.md): refused, failed, "
        "given up by the client (`client_closed_request`), or stopped at the limit of a budget "
        "(`budget_exhausted` with the outcome `completed`).",
        ("model", "department", "outcome", "code"),
    ),
    Spec(
        REQUEST,
        _H,
        "seconds",
        "From the arrival of a request to its durable end.",
        ("model", "operation"),
        _WHOLE_BOUNDS,
    ),
    Spec(
        FIRST_CHUNK,
        _H,
        "seconds",
        "From the arrival of a request to the first piece of its answer that may be released.",
        ("model", "operation"),
        _WAIT_BOUNDS,
    ),
    Spec(
        STAGE,
        _H,
        "seconds",
        "Time in one stage of the request path: `identify`, `read`, `inspect_input`, `decide`, "
        "`route`, `reserve`, `record_decided`, `engine_start`, `stream`, `settle`, "
        "`record_completed`; `unfinished` is the stage in which a refused request ended.",
        ("model", "operation", "stage"),
        _STAGE_BOUNDS,
    ),
    Spec(
        TOKENS,
        _C,
        "tokens",
        "Tokens of answered requests. `kind` is `prompt` (cached ones included), `cached` or "
        "`completion`.",
        ("model", "department", "kind"),
    ),
    Spec(
        GPU,
        _C,
        "seconds",
        "Device time that engines metered for requests, as far as gateways were told.",
        ("model", "department"),
    ),
    Spec(
        CHARGED,
        _C,
        "seconds",
        "Device time charged to accounts: metered time times the accelerator's weight.",
        ("model", "department"),
    ),
    Spec(
        FAULTS,
        _C,
        "faults",
        "Requests that telemetry itself could not count, trace or log.",
    ),
    # -- routing --------------------------------------------------------------------------------
    Spec(
        ROUTES,
        _C,
        "requests",
        "Requests whose model the platform chose (`auto`, or the small tier instead of a large "
        "model that was named), by the model that was tried last and by the reason for the one "
        "that was chosen first.",
        ("model", "department", "reason"),
    ),
    Spec(
        ROUTE_LARGE,
        _G,
        "ratio",
        "Part of a department's latest `auto` requests that was chosen for the large tier, in one "
        "gateway. `of` is `all`; `free`, those that could have gone either way; or `aimed`: what "
        "the department's target and budget wanted for the free ones.",
        ("department", "of"),
    ),
    Spec(
        SUPERSEDED,
        _C,
        "answers",
        "Attempts given up for another model's answer. `why` is `cascade` (the answer was not sure "
        "enough) or the code of the error (errors.md).",
        ("model", "why"),
    ),
    Spec(
        SCORES,
        _C,
        "scores",
        "Scores that requests asked for. `result` is `scored`, `late` (not within "
        "`score_timeout_ms`, or too many waited), `failed` (the scorer could not read the prompt), "
        "`unreachable`, or `spared` (not asked: it did not answer lately). Without a score a "
        "request goes to the default tier.",
        ("result",),
    ),
    Spec(
        SCORE,
        _H,
        "seconds",
        "From asking for a score to having it, in a gateway; those that were had.",
        (),
        _SCORE_BOUNDS,
    ),
    Spec(SCORER_WAITING, _G, "prompts", "Prompts that wait at a scorer."),
    Spec(SCORER_BATCHES, _C, "batches", "Batches that scorers worked on."),
    Spec(SCORER_PROMPTS, _C, "prompts", "Prompts that scorers worked on."),
    Spec(SCORER_BUSY, _C, "seconds", "Time in which scorers worked, one thread each."),
    Spec(
        SCORER_UNUSED,
        _C,
        "prompts",
        "Prompts without a use at a scorer. `why` is `refused` (too many waited), `expired` (given "
        "up before their turn) or `dropped` (scored when nobody waited any more).",
        ("why",),
    ),
    Spec(
        SHADOWS,
        _C,
        "answers",
        "Answers of the small tier that were sampled for a comparison with the large tier. "
        "`result` is `compared`, or why there was none: `queue_full`, `stale` (no idle moment in "
        "ten minutes), `gave_way` (somebody waited), `not_permitted`, or the code of an error "
        "(errors.md).",
        ("result",),
    ),
    # -- what a gateway sees of the rest -------------------------------------------------------
    Spec(
        MODEL_READY,
        _G,
        "1 or 0",
        "Whether this gateway knows an engine replica that takes requests for the model.",
        ("model",),
    ),
    Spec(
        CONTROL_AGE,
        _G,
        "seconds",
        "Age of this gateway's copy of keys, revocations and replicas; after 10 s service keys "
        "are refused.",
    ),
    # -- budgets ---------------------------------------------------------------------------------
    *GATEWAY_METRICS,
    *LEDGER_METRICS,
    # -- audit ---------------------------------------------------------------------------------
    Spec(
        WAL_RECORDS,
        _C,
        "events",
        "Audit events made durable. `writer` is `gateway`, `ledger` or `sealer`.",
        ("writer",),
    ),
    Spec(WAL_BYTES, _C, "bytes", "Bytes written to audit logs.", ("writer",)),
    Spec(WAL_SYNCS, _C, "syncs", "Syncs of audit logs, one for each group of events.", ("writer",)),
    Spec(WAL_SYNC_TIME, _C, "seconds", "Time in which audit logs were being written.", ("writer",)),
    Spec(
        WAL_REFUSED,
        _C,
        "events",
        "Audit events that could not be recorded: no room on the disk, a full queue, a broken log.",
        ("writer",),
    ),
    Spec(WAL_QUEUE, _G, "events", "Audit events that wait to be written.", ("writer",)),
    Spec(
        WAL_LAG,
        _G,
        "seconds",
        "For how long audit events have been waiting without one having been written.",
        ("writer",),
    ),
    Spec(
        DISK_FREE,
        _G,
        "bytes",
        "Free space where audit logs (`state`) or sealed evidence (`evidence`) are kept.",
        ("root",),
    ),
    Spec(
        DISK_RESERVE,
        _G,
        "bytes",
        "Free space below which nothing new is served.",
        ("root",),
    ),
    Spec(SEAL_LAG, _G, "seconds", "Age of the oldest audit event that is not sealed yet."),
    Spec(SEALED_ROWS, _C, "events", "Audit events sealed."),
    Spec(
        SEAL_FAULTS,
        _C,
        "faults",
        "Things in a log that the sealer could not read, verify or write.",
    ),
    # -- engines -------------------------------------------------------------------------------
    Spec(ENGINE_RUNNING, _G, "requests", "Requests in the running batch.", ("model",)),
    Spec(ENGINE_WAITING, _G, "requests", "Requests that wait for a place in it.", ("model",)),
    Spec(ENGINE_KV, _G, "ratio", "Part of the KV cache in use.", ("model",)),
    Spec(
        ENGINE_TIME,
        _C,
        "seconds",
        "Device time of an engine replica since it started. `state` is `attributed` (to requests), "
        "`unattributed` (busy for nobody who pays) or `idle`.",
        ("model", "state"),
    ),
    Spec(
        METERING_TIME,
        _C,
        "seconds",
        "Time that an engine's core spent on metering; part of its busy time.",
        ("model",),
    ),
    Spec(ENGINE_DEAD, _G, "1 or 0", "Whether the engine of this replica has died.", ("model",)),
    Spec(
        METER_FAILURES,
        _C,
        "reports",
        "Reports of metered time that the ledger did not take; the next one repeats them.",
        ("model",),
    ),
    *ENGINE_METRICS,
)

SPECS = {spec.name: spec for spec in METRICS}

EXPORTED: dict[str, tuple[str, ...]] = {
    name: labels for spec in METRICS for name, labels in spec.exported.items()
}
"""Labels of ours by name in Prometheus. Ray adds its own: ``RAY_LABELS``."""

RAY_LABELS = ("Component", "NodeAddress", "SessionName", "Version", "WorkerId")
"""Labels that Ray adds; ``WorkerId`` tells processes apart."""


def page() -> str:
    """The reference page."""
    lines = [
        "# Metrics",
        "",
        "Generated by `scripts/reference.py` from `deployments/telemetry/names.py`.",
        "",
        "Every node's Ray agent serves them for Prometheus at `/metrics`; [operate.md]"
        "(../guides/operate.md#metrics) says where that is. Ray adds the labels",
        ", ".join(f"`{label}`" for label in RAY_LABELS) + ";",
        "`WorkerId` names the process, so sum over it. A value arrives up to eleven seconds late,",
        "and a gauge of a process that has ended stays for twenty.",
        "",
        "A histogram is three counters. The names end in `_total`, as Ray's counters do, and every",
        "function of PromQL takes them:",
        "",
        "```promql",
        "histogram_quantile(0.95,",
        "  sum by (model, le) (rate(ray_gatehouse_first_chunk_seconds_bucket_total[5m])))",
        "```",
        "",
        "| name | kind | unit | labels | meaning |",
        "|---|---|---|---|---|",
    ]
    for spec in METRICS:
        name = PREFIX + spec.name
        if spec.kind is Kind.HISTOGRAM:
            name += "_bucket_total`, also `_sum_total` and `_count_total"
        labels = ", ".join(f"`{label}`" for label in spec.labels)
        lines.append(f"| `{name}` | {spec.kind} | {spec.unit} | {labels} | {spec.help} |")
    lines += ["", "## Buckets", "", "| name | upper bounds, seconds |", "|---|---|"]
    for spec in METRICS:
        if spec.bounds:
            bounds = ", ".join(le(bound * spec.scale) for bound in spec.bounds)
            lines.append(f"| `{PREFIX}{spec.name}_bucket_total` | {bounds} |")
    return "\n".join([*lines, ""])


def le(bound: float) -> str:
    """A bucket's upper bound as Prometheus writes it."""
    return f"{bound:.12g}"
