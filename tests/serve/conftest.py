"""Tests of the whole system; the ``platform`` that they share is in ``tests/conftest.py``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from benchmarks.platform import Platform

__all__ = ["Platform"]


@pytest.fixture(scope="module")
def ray_local() -> Iterator[None]:
    """A Ray of its own, unless the process has one already."""
    started = not ray.is_initialized()
    if started:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
    yield
    if started:
        ray.shutdown()
