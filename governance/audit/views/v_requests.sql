-- Question: Who asked for what, what was decided, and how did it end?
-- Grain: one row per request: its attempts folded together; what the last one of them says, holds.
-- Units: ts, ts_end UTC; *_us microseconds. gpu_us and charged_us are device time of all attempts
-- together, answers that were not released included; tokens are those of the last attempt. Null
-- where nobody knows. attempts counts models that were tried; routed says that the platform chose
-- among them, because the caller had asked for auto.
-- outcome is completed, refused, failed or aborted; open while a request has no end on record.
-- admitted requests may be refused too, such as when a budget cuts an answer short. Where a caller
-- went before the next model was tried, the last attempt's answer was never released: aborted.
CREATE VIEW v_requests AS
SELECT
    request_id,
    min(ts) AS ts,
    arg_max_null(ts_end, attempt) AS ts_end,
    arg_max_null(department, attempt) AS department,
    arg_max_null(subject_key, attempt) AS subject_key,
    arg_max_null(principal_kind, attempt) AS principal_kind,
    arg_max_null(operation, attempt) AS operation,
    arg_max_null(request_model, attempt) AS request_model,
    arg_max_null(response_model, attempt) AS response_model,
    arg_max_null(model_revision, attempt) AS model_revision,
    arg_max_null(route_target, attempt) AS route_target,
    arg_max_null(route_reason, attempt) AS route_reason,
    arg_max_null(replica_id, attempt) AS replica_id,
    bool_or(admitted) AS admitted,
    arg_max_null(stream, attempt) AS stream,
    arg_max_null(data_class, attempt) AS data_class,
    arg_max_null(decision, attempt) AS decision,
    arg_max_null(rule_ids, attempt) AS rule_ids,
    CASE
        WHEN arg_max_null(superseded, attempt) IS NOT NULL THEN 'aborted'
        ELSE arg_max_null(outcome, attempt)
    END AS outcome,
    CASE
        WHEN arg_max_null(superseded, attempt) IS NOT NULL THEN 499
        ELSE arg_max_null(status, attempt)
    END::SMALLINT AS status,
    arg_max_null(error_code, attempt) AS error_code,
    arg_max_null(finish_reason, attempt) AS finish_reason,
    arg_max_null(input_tokens, attempt) AS input_tokens,
    arg_max_null(cached_tokens, attempt) AS cached_tokens,
    arg_max_null(output_tokens, attempt) AS output_tokens,
    sum(gpu_us)::BIGINT AS gpu_us,
    sum(charged_us)::BIGINT AS charged_us,
    arg_max_null(queue_us, attempt) AS queue_us,
    arg_max_null(ttft_us, attempt) AS ttft_us,
    arg_max_null(latency_us, attempt) AS latency_us,
    arg_max_null(reservation_id, attempt) AS reservation_id,
    arg_max_null(budget_account, attempt) AS budget_account,
    sum(events)::BIGINT AS events,
    greatest(count(*), max(attempt)) AS attempts,
    bool_or(auto) AS routed
FROM v_attempts
GROUP BY request_id;
