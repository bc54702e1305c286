-- Question: What did each reservation cost, and whom?
-- Grain: one row per reservation, or per request where there was none, once it has an end. Each
-- attempt of a request at a model has a reservation. Of several events about it (an end, the
-- engine's own account) the largest figures hold. department is that of the caller; of a shadow
-- comparison, which nobody asked for, the one that pays.
-- Units: gpu_us metered, charged_us weighted device-microseconds, null where nobody metered; tokens
-- prompt plus answer; cost_micro millionths of the currency unit; ended_ts UTC, when it first had
-- an end.
CREATE VIEW v_charges AS
SELECT
    coalesce(reservation_id, request_id, event_id) AS charge_id,
    any_value(request_id) AS request_id,
    coalesce(any_value(budget_account), any_value(department)) AS account,
    CASE
        WHEN bool_or(route_reason = 'shadow') THEN any_value(budget_account)
        ELSE coalesce(
            any_value(department) FILTER (WHERE event_type <> 'usage.settled'),
            any_value(department)
        )
    END AS department,
    coalesce(any_value(response_model), any_value(request_model)) AS model,
    min(coalesce(ts_end, ts)) AS ended_ts,
    max(gpu_us) AS gpu_us,
    max(charged_us) AS charged_us,
    max(input_tokens) AS input_tokens,
    max(output_tokens) AS output_tokens,
    coalesce(max(input_tokens), 0) + coalesce(max(output_tokens), 0) AS tokens,
    max(cost_micro) AS cost_micro
FROM audit
WHERE event_type IN ('inference.completed', 'inference.aborted', 'usage.settled')
GROUP BY charge_id;
