-- Question: What did each department spend on each model, day by day?
-- Grain: one row per UTC day on which requests ended, department and model.
-- Units: requests, of which one that several models were tried for counts under each; gpu_seconds
-- metered and charged_seconds weighted device-seconds, for people; gpu_us and charged_us the same
-- exactly; tokens; unmetered counts requests whose device time nobody knows.
CREATE VIEW v_spend_daily AS
SELECT
    ended_ts::DATE AS day,
    department,
    model,
    count(*) AS requests,
    round(coalesce(sum(gpu_us), 0) / 1e6, 3) AS gpu_seconds,
    round(coalesce(sum(charged_us), 0) / 1e6, 3) AS charged_seconds,
    coalesce(sum(gpu_us), 0)::BIGINT AS gpu_us,
    coalesce(sum(charged_us), 0)::BIGINT AS charged_us,
    sum(coalesce(input_tokens, 0))::BIGINT AS input_tokens,
    sum(coalesce(output_tokens, 0))::BIGINT AS output_tokens,
    count(*) FILTER (WHERE gpu_us IS NULL) AS unmetered
FROM v_charges
GROUP BY day, department, model
ORDER BY day, department, model;
