-- Question: Who used what: which person, application, account and model, at what cost?
-- Grain: one row per reservation, or per request where there was none, once it has an end, as in
-- v_charges.
-- Units: started_ts, ended_ts UTC; gpu_us metered, charged_us weighted device-microseconds, tokens;
-- 0 where nobody knows. account is the one that was charged, such as hr/recruiting~PERSON; path is
-- it and all above it, in no order; department the one that was charged, and part the team or
-- application within it, null where there is none. application is the id of a service key, or of the
-- application that a token was issued to; person is the pseudonym of a user, null for others.
CREATE VIEW v_usage AS
WITH charges AS (
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
        any_value(subject_key) AS subject_key,
        any_value(principal_kind) FILTER (WHERE event_type <> 'usage.settled') AS principal_kind,
        any_value(client_id) AS client_id,
        any_value(key_id) AS key_id,
        any_value(roles) AS roles,
        any_value(operation) AS operation,
        any_value(priority_class) AS priority_class,
        any_value(error_code) FILTER (WHERE event_type <> 'usage.settled') AS error_code,
        min(ts) AS started_ts,
        min(coalesce(ts_end, ts)) AS ended_ts,
        coalesce(max(gpu_us), 0) AS gpu_us,
        coalesce(max(charged_us), 0) AS charged_us,
        coalesce(max(input_tokens), 0) AS input_tokens,
        coalesce(max(output_tokens), 0) AS output_tokens
    FROM audit
    WHERE event_type IN ('inference.completed', 'inference.aborted', 'usage.settled')
    GROUP BY charge_id
)

SELECT
    charge_id,
    request_id,
    account,
    list_distinct([
        account,
        regexp_extract(account, '^[^~@]+'),
        regexp_extract(account, '^[^/~@]+')
    ]) AS path,
    coalesce(regexp_extract(account, '^[^/~@]+'), department) AS department,
    nullif(regexp_extract(account, '^[^/~@]+/([^~@]+)', 1), '') AS part,
    CASE WHEN principal_kind = 'key' THEN key_id ELSE client_id END AS application,
    CASE WHEN principal_kind = 'user' THEN subject_key END AS person,
    principal_kind,
    subject_key,
    roles,
    model,
    operation,
    priority_class,
    error_code,
    started_ts,
    ended_ts,
    gpu_us,
    charged_us,
    input_tokens,
    output_tokens,
    input_tokens + output_tokens AS tokens
FROM charges;
