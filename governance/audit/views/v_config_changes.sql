-- Question: Who changed what about budgets and other administration, when, and why?
-- Grain: one row per administrative event.
-- Units: ts UTC; detail canonical JSON.
CREATE VIEW v_config_changes AS
SELECT
    ts,
    event_type,
    entity_type,
    entity_id,
    state,
    principal_kind,
    subject_key,
    roles,
    department,
    owner_role,
    reason_code,
    ticket,
    make_timestamp(due_us) AS due,
    detail,
    event_id,
    sealed
FROM audit
WHERE
    NOT (
        event_type LIKE 'inference.%'
        OR event_type LIKE 'usage.%'
        OR event_type LIKE 'meter.%'
        OR event_type LIKE 'engine.%'
        OR event_type LIKE 'writer.%'
    )
-- An event that its writer repeated after a crash is one.
QUALIFY
    row_number() OVER (
        PARTITION BY ts, event_type, entity_type, entity_id, state, subject_key, detail
        ORDER BY event_id
    ) = 1
ORDER BY ts, event_id;
