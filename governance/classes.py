"""Priority classes: who is served first at peak, and whose requests are shed first."""

from __future__ import annotations

PRIORITY_CLASSES = ("critical", "standard", "batch")
"""Most urgent first."""
DEFAULT_CLASS = "standard"
"""Class of what neither a rule nor an account gives one."""


def effective_class(*given: str | None) -> str:
    """The least urgent of the classes that are given; the default where none is.

    A policy and an account may both set one: neither can lift what the other holds down.
    """
    places = [PRIORITY_CLASSES.index(each) for each in given if each is not None]
    return PRIORITY_CLASSES[max(places)] if places else DEFAULT_CLASS
