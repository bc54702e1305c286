"""Our lines go where Serve's go."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from deployments.logs import join_serve_log


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    kept = []
    for name in ("ray.serve", "gatehouse"):
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
