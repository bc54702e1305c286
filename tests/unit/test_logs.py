"""Our lines go where Serve's go."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from deployments.logs import join_serve_log, withhold_content


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
