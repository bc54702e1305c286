-- Question: Who asked for what, what was decided, and how did it end?
-- Grain: one row per request: its decision, its end and the engine's own account folded together.
-- Units: ts, ts_end UTC; *_us microseconds, of device time for gpu_us and charged_us. Of figures
-- that several events report the largest holds, as in the ledger; null where nobody knows.
-- outcome is completed, refused, failed or aborted; open while a request has no end on record.
-- admitted requests may be refused too, such as when a budget cuts an answer short. An
-- end by its gateway outranks one that was written for a gateway that had died.
CREATE VIEW v_requests AS
SELECT
    request_id,
    min(ts) AS ts,
    coalesce(
        max(ts_end) FILTER (WHERE event_type IN ('inference.completed', 'inference.refused')),
        max(ts_end) FILTER (WHERE event_type = 'inference.aborted')
    ) AS ts_end,
    any_value(department) AS department,
    any_value(subject_key) AS subject_key,
    any_value(principal_kind) AS principal_kind,
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
    any_value(reservation_id) AS reservation_id,
    any_value(budget_account) AS budget_account,
    count(*) AS events
FROM audit
WHERE
    request_id IS NOT NULL
    AND (event_type LIKE 'inference.%' OR event_type = 'usage.settled')
GROUP BY request_id;
