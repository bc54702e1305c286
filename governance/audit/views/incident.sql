-- Question: What happened to one request, in order? A table macro: FROM incident('REQUEST_ID').
-- Grain: one row per event of that request, by any writer.
-- Units: as in audit; ts and ts_end UTC.
CREATE MACRO incident(wanted_request_id) AS TABLE
SELECT *
FROM audit
WHERE request_id = wanted_request_id
ORDER BY coalesce(ts_end_us, ts_us), writer_id, writer_epoch, writer_seq;
