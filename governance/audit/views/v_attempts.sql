-- Question: Which models were tried for each request, and how did each attempt end?
-- Grain: one row per attempt of a request at a model: its decision, its end and the engine's own
-- account folded together. A request that was refused before any model has one row as well.
-- Units: ts, ts_end UTC, of this attempt; *_us microseconds, of device time for gpu_us and
-- charged_us, and since the request was received for queue_us, ttft_us and latency_us. Of figures
-- that several events report the largest holds, as in the ledger; null where nobody knows.
-- attempt counts from 1 within a request, and one that the budget refused has a number and no row.
-- superseded is cascade or fallback where the answer was not released; auto says that the platform
-- chose the model; detail is canonical JSON with its reasons under route.
-- outcome is completed, refused, failed or aborted; open while an attempt has no end on record. An
-- end by its gateway outranks one that was written for a gateway that had died.
CREATE VIEW v_attempts AS
SELECT
    request_id,
    coalesce(max(try_cast(facts[1] AS INTEGER)), 1) AS attempt,
    coalesce(bool_or(facts[2] = 'true'), FALSE) AS auto,
    any_value(facts[3]) AS superseded,
    min(ts) AS ts,
    coalesce(
        max(ts_end) FILTER (WHERE event_type IN ('inference.completed', 'inference.refused')),
        max(ts_end) FILTER (WHERE event_type = 'inference.aborted')
    ) AS ts_end,
    coalesce(
        any_value(department) FILTER (WHERE event_type <> 'usage.settled'), any_value(department)
    ) AS department,
    any_value(subject_key) AS subject_key,
    coalesce(
        any_value(principal_kind) FILTER (WHERE event_type <> 'usage.settled'),
        any_value(principal_kind)
    ) AS principal_kind,
    any_value(operation) AS operation,
    any_value(request_model) AS request_model,
    any_value(response_model) AS response_model,
    any_value(model_revision) AS model_revision,
    any_value(route_target) AS route_target,
    any_value(route_reason) AS route_reason,
    any_value(replica_id) AS replica_id,
    bool_or(event_type <> 'inference.refused') AS admitted,
    any_value(stream) AS stream,
    any_value(data_class) AS data_class,
    any_value(decision) AS decision,
    any_value(rule_ids) AS rule_ids,
    coalesce(
        any_value(outcome) FILTER (WHERE event_type = 'inference.completed'),
        any_value(outcome) FILTER (WHERE event_type = 'inference.refused'),
        any_value(outcome) FILTER (WHERE event_type = 'inference.aborted'),
        'open'
    ) AS outcome,
    coalesce(
        any_value(status) FILTER (WHERE event_type = 'inference.completed'),
        any_value(status) FILTER (WHERE event_type = 'inference.refused'),
        any_value(status) FILTER (WHERE event_type = 'inference.aborted')
    ) AS status,
    coalesce(
        any_value(error_code) FILTER (WHERE event_type = 'inference.completed'),
        any_value(error_code) FILTER (WHERE event_type = 'inference.refused'),
        any_value(error_code) FILTER (WHERE event_type = 'inference.aborted')
    ) AS error_code,
    any_value(finish_reason) AS finish_reason,
    max(input_tokens) AS input_tokens,
    max(cached_tokens) AS cached_tokens,
    max(output_tokens) AS output_tokens,
    max(gpu_us) AS gpu_us,
    max(charged_us) AS charged_us,
    max(queue_us) AS queue_us,
    max(ttft_us) AS ttft_us,
    max(latency_us) AS latency_us,
    reservation_id,
    any_value(budget_account) AS budget_account,
    -- The end's reasons say more than the decision's: what became of a cascade.
    coalesce(
        any_value(detail) FILTER (WHERE event_type IN ('inference.completed', 'inference.refused')),
        any_value(detail) FILTER (WHERE event_type = 'inference.decided')
    ) AS detail,
    count(*) AS events
FROM (
    SELECT
        *,
        -- Once for all: parsing is what takes time here.
        json_extract_string(
            CASE WHEN json_valid(detail) THEN detail END,
            ['$.route.attempt', '$.route.auto', '$.route.superseded']
        ) AS facts
    FROM audit
    WHERE
        request_id IS NOT NULL
        AND (event_type LIKE 'inference.%' OR event_type = 'usage.settled')
)
GROUP BY request_id, reservation_id;
