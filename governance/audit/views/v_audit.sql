-- Question: What happened, event by event?
-- Grain: one row per event of the audit trail.
-- Units: ts and ts_end UTC; gpu_us, charged_us device-microseconds.
CREATE VIEW v_audit AS
SELECT
    ts,
    event_type,
    department,
    subject_key,
    principal_kind,
    operation,
    coalesce(response_model, request_model) AS model,
    route_target,
    decision,
    rule_ids,
    outcome,
    status,
    error_code,
    input_tokens,
    output_tokens,
    gpu_us,
    charged_us,
    request_id,
    entity_type,
    entity_id,
    ts_end,
    dt,
    event_id,
    sealed
FROM audit;
