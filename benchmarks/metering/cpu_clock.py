"""The metered scheduler with the process's CPU time for a clock: runs in the engine core.

On a shared machine a step's wall time has in it whatever else ran meanwhile. How fairly a step is
split is measured without that: the small model computes in the core's own process, so its CPU time
is its work.
"""

from __future__ import annotations

import time

from deployments.metering.scheduler import MeteredScheduler


class CpuClockScheduler(MeteredScheduler):
    """For the accuracy part of the benchmark only."""

    clock = staticmethod(time.process_time_ns)
