"""Our lines go where Serve's go."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Iterator

import pytest

from deployments.data_plane.ticket_form import Ticket
from deployments.logs import concern, join_serve_log, withhold_content
from governance.types import Operation, Reservation, Turn


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    kept = []
    for name in ("ray.serve", "gatehouse", "library"):
        logger = logging.getLogger(name)
        kept.append((logger, logger.handlers[:], logger.level, logger.propagate))
    yield
    for logger, handlers, level, propagate in kept:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def test_a_line_of_ours_is_written_once_by_serves_handler() -> None:
    stream = io.StringIO()
    serve = logging.getLogger("ray.serve")
    serve.handlers[:] = [logging.StreamHandler(stream)]
    serve.setLevel(logging.INFO)
    join_serve_log()
    join_serve_log()
    logging.getLogger("gatehouse.engine").info("serving small")
    logging.getLogger("gatehouse.engine").debug("too much")
    assert stream.getvalue() == "serving small\n"


def test_without_serve_lines_still_reach_the_root_logger(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("ray.serve").handlers[:] = []
    join_serve_log()
    logging.getLogger("gatehouse.control").warning("heard")
    assert "heard" in caplog.text


def test_an_exception_of_a_library_is_logged_without_what_it_quotes() -> None:
    stream = io.StringIO()
    library = logging.getLogger("library")
    library.handlers[:] = [logging.StreamHandler(stream)]
    withhold_content("library")
    withhold_content("library")
    deep = logging.getLogger("library.tool_parsers.pythonic")
    try:
        compile("patient(4711", "answer", "eval")
    except SyntaxError as error:
        deep.exception("Error in extracting tool call from response.")
        deep.exception(f"Error in streaming tool calls: {error.text}")
        deep.exception("Error: %s", error.text)
    deep.warning("%d requests", 3)
    written = stream.getvalue()
    assert "4711" not in written
    assert written.count("SyntaxError") == 3
    assert "library.tool_parsers.pythonic:" in written
    assert "3 requests" in written


def test_exceptions_of_others_are_logged_whole() -> None:
    stream = io.StringIO()
    ours = logging.getLogger("gatehouse")
    ours.handlers[:] = [logging.StreamHandler(stream)]
    logging.getLogger("library").handlers[:] = ours.handlers
    withhold_content("library")
    try:
        raise ValueError("place")
    except ValueError:
        ours.exception("failed")
    assert "Traceback" in stream.getvalue()
    assert "place" in stream.getvalue()


@pytest.fixture
def fielded() -> list[dict[str, object]]:
    """Fields of the lines that Serve's handler writes, of Serve and of us."""
    seen: list[dict[str, object]] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(dict(vars(record)))

    def drawn_by_serve(record: logging.LogRecord) -> bool:
        record.request_id = "serve-1"
        return True

    serve = logging.getLogger("ray.serve")
    handler = Handler()
    handler.addFilter(drawn_by_serve)
    serve.handlers[:] = [handler]
    serve.setLevel(logging.INFO)
    join_serve_log()
    join_serve_log()
    assert len(handler.filters) == 2
    return seen


async def test_each_line_of_a_request_carries_its_ids(fielded: list[dict[str, object]]) -> None:
    async def request(number: int) -> None:
        turn = Turn(f"req_{number}", f"dec_{number}", 0, Operation.CHAT)
        concern(turn)
        await asyncio.sleep(0)
        logging.getLogger("gatehouse.gateway").info("early %d", number)
        turn.reservation = Reservation(f"rsv_{number}")
        turn.notes["trace_id"] = f"trace_{number}"
        await asyncio.create_task(closing(number))

    async def closing(number: int) -> None:
        logging.getLogger("ray.serve").info("late %d", number)

    await asyncio.gather(*(request(number) for number in range(3)))
    logging.getLogger("gatehouse.ingress").info("nobody's")
    by_message = {str(line["msg"]) % line["args"] if line["args"] else str(line["msg"]): line
                  for line in fielded}  # fmt: skip
    for number in range(3):
        early, late = by_message[f"early {number}"], by_message[f"late {number}"]
        assert (early["request_id"], early["decision_id"]) == (f"req_{number}", f"dec_{number}")
        assert early["serve_request_id"] == "serve-1"
        assert "reservation_id" not in early
        assert late["request_id"] == f"req_{number}"
        assert late["reservation_id"] == f"rsv_{number}"
        assert late["trace_id"] == f"trace_{number}"
    assert by_message["nobody's"]["request_id"] == "serve-1"
    assert "decision_id" not in by_message["nobody's"]


async def test_in_an_engine_the_ids_are_those_of_the_ticket(
    fielded: list[dict[str, object]],
) -> None:
    async def run() -> None:
        concern(
            Ticket(
                gateway_id="gw",
                audience="small",
                operation="chat",
                request_id="req_1",
                decision_id="dec_1",
                reservation_id="rsv_1",
                principal_key="who",
                department="hr",
                priority=0,
                max_tokens=1,
                context_tokens=None,
                issued_at_us=0,
                ticket_id=b"",
                body_sha256=b"",
            )
        )
        logging.getLogger("gatehouse.engine").warning("slow")

    await asyncio.create_task(run())
    (line,) = fielded
    assert (line["request_id"], line["reservation_id"]) == ("req_1", "rsv_1")
    assert "who" not in str(line)
