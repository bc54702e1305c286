"""Names that a replica and its engine core agree on."""

from __future__ import annotations

METER_KEY = "gatehouse_meter"
"""Extra argument of a request that names the exchange which pays for it: a positive integer. The
core knows no tenant, request id or reservation."""

FAIR_KEY = "gatehouse_fair"
"""Extra argument with what the queue must know, see ``deployments.scheduling.terms``."""

SOCKET_VARIABLE = "GATEHOUSE_METER_SOCKET"
"""Environment of the core, set by the replica: path of the replica's datagram socket."""
ACCELERATOR_VARIABLE = "GATEHOUSE_METER_ACCELERATOR"
"""The same, configured accelerator type; empty where the core is to ask its driver."""

FAIRNESS_VARIABLE = "GATEHOUSE_FAIRNESS"
"""Environment of the core: ``fair``, or ``fcfs`` for whoever wants to compare: first come, first
served, whatever the class."""


def scheduler_class(async_scheduling: bool) -> str:
    """Class of ``deployments.metering.scheduler`` for an engine.

    Args:
        async_scheduling: As vLLM has resolved it; a CPU never does.
    """
    name = "MeteredAsyncScheduler" if async_scheduling else "MeteredScheduler"
    return f"deployments.metering.scheduler.{name}"
