"""What a metric is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

PREFIX = "ray_"
"""Ray puts it in front of every name that it exports."""


class Kind(StrEnum):
    """What kind of figure a metric is."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


_SCALES = {"seconds": 1e-6, "ratio": 1e-3}


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric."""

    name: str
    """As declared to Ray, without ``ray_``; a counter's ends in ``_total``."""
    kind: Kind
    unit: str
    """Unit of the exported value: ``seconds``, ``bytes``, ``ratio``, or what is counted."""
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[int, ...] = ()
    """Upper bounds of a histogram's buckets, as recorded; the last bucket has none."""

    @property
    def scale(self) -> float:
        """Exported value of a recorded 1."""
        return _SCALES.get(self.unit, 1.0)

    @property
    def exported(self) -> dict[str, tuple[str, ...]]:
        """Names in Prometheus, each with its own labels.

        A histogram's parts are counters (``deployments.telemetry.export`` says why), and a
        counter's name ends in ``_total``.
        """
        if self.kind is Kind.HISTOGRAM:
            base = f"{PREFIX}{self.name}"
            return {
                f"{base}_bucket_total": (*self.labels, "le"),
                f"{base}_sum_total": self.labels,
                f"{base}_count_total": self.labels,
            }
        return {f"{PREFIX}{self.name}": self.labels}
