-- Question: What did each department spend on each model altogether, and what share is that?
-- Grain: one row per department and model, over everything on record.
-- Units: as in v_spend_daily; share_percent of all that was charged.
CREATE VIEW v_spend AS
SELECT
    department,
    model,
    min(day) AS first_day,
    max(day) AS last_day,
    sum(requests)::BIGINT AS requests,
    round(sum(gpu_us) / 1e6, 3) AS gpu_seconds,
    round(sum(charged_us) / 1e6, 3) AS charged_seconds,
    sum(gpu_us)::BIGINT AS gpu_us,
    sum(charged_us)::BIGINT AS charged_us,
    sum(input_tokens)::BIGINT AS input_tokens,
    sum(output_tokens)::BIGINT AS output_tokens,
    round(100 * sum(charged_us) / nullif(sum(sum(charged_us)) OVER (), 0), 1) AS share_percent
FROM v_spend_daily
GROUP BY department, model
ORDER BY charged_us DESC, department, model;
