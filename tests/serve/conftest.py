"""Tests of the whole system; the ``platform`` that they share is in ``tests/conftest.py``."""

from benchmarks.platform import Platform

__all__ = ["Platform"]
