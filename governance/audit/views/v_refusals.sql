-- Question: Which rules and limits turn requests away, how often, and for how many people?
-- Grain: one row per error code and rule; a request that several rules refused counts once under
-- each, and one that no rule refused (credential, limit, budget) has no rule_id.
-- Units: requests; admitted counts those that were refused after they had been admitted, such as
-- answers that a budget cut short; first_ts and last_ts UTC.
CREATE VIEW v_refusals AS
SELECT
    error_code,
    rule_id,
    any_value(status) AS status,
    count(DISTINCT coalesce(request_id, event_id)) AS refusals,
    count(DISTINCT request_id) FILTER (WHERE event_type = 'inference.completed') AS admitted,
    count(DISTINCT department) AS departments,
    count(DISTINCT subject_key) AS subjects,
    min(ts) AS first_ts,
    max(ts) AS last_ts
FROM (
    SELECT
        *,
        unnest(
            -- A budget or limit refuses what rules had allowed: those rules are not to blame.
            CASE WHEN decision <> 'allow' AND len(rule_ids) > 0 THEN rule_ids ELSE [NULL] END
        ) AS rule_id
    FROM audit
    WHERE outcome = 'refused' AND event_type IN ('inference.refused', 'inference.completed')
)
GROUP BY error_code, rule_id
ORDER BY refusals DESC, error_code, rule_id;
