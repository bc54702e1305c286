"""Fixtures for every folder of tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from benchmarks.platform import Platform


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """The whole system, started once per run as a user starts it: real Ray, real vLLM, real tokens.

    Stopped as a user stops it, and nothing of it may be left. It stands here and not in a folder's
    own conftest because a fixture that two of those import is two fixtures, and two platforms.
    """
    # Imported here: unit tests need no OpenAI SDK.
    from benchmarks.platform import running

    with running(tmp_path_factory.mktemp("platform")) as started:
        yield started
        left = started.stop()
        assert started.process.returncode == 0, started.log.read_text()[-3000:]
        assert not left, [process.cmdline() for process in left]
