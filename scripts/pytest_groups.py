"""pytest plugin: where the time went, one line per folder of tests, above the closing line."""

from __future__ import annotations

from collections import defaultdict

import pytest

_seconds: defaultdict[str, float] = defaultdict(float)
_tests: defaultdict[str, int] = defaultdict(int)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up set-up, call and tear-down."""
    group = "/".join(report.nodeid.split("/")[:2])
    _seconds[group] += report.duration
    _tests[group] += report.when == "call"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the lines."""
    for group, seconds in _seconds.items():
        terminalreporter.write_line(f"{group}: {_tests[group]} tests in {seconds:.0f} s")
