"""Peak figures of accelerators, and the names under which meters and prices know them.

Only the ratio of the two figures matters for who pays what part of a step, so data-sheet peaks do:
dense BF16 (no sparsity) and memory bandwidth, of the largest common variant. Sources: the makers'
product data sheets of each device (NVIDIA H100, H200, HGX B200, A100, A10, L4, L40S, T4, V100;
AMD Instinct MI300X; Google Cloud TPU documentation for v5e and v6e). ``cpu`` is a server core with
AVX-512 in FP32, to its order of magnitude; its fixed costs, which outweigh a small model's own,
were fitted to requests run alone (``benchmarks/metering``, another seed than the reported one).
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator."""

    name: str
    flops: float
    """Peak dense floating-point operations a second."""
    bytes_per_s: float
    """Peak memory bandwidth."""
    step_s: float = 0.0
    """Fixed time of a step on the host, where it is not hidden; in units of the peaks above."""
    request_s: float = 0.0
    """The same for each request in it."""


CPU = "cpu"

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("B200", 2250e12, 8.0e12),
        Device("H200", 989e12, 4.8e12),
        Device("H100", 989e12, 3.35e12),
        Device("A100", 312e12, 2.04e12),
        Device("A10G", 125e12, 0.6e12),
        Device("A10", 125e12, 0.6e12),
        Device("L40S", 362e12, 0.864e12),
        Device("L4", 121e12, 0.3e12),
        Device("T4", 65e12, 0.32e12),
        Device("V100", 125e12, 0.9e12),
        Device("MI300X", 1307e12, 5.3e12),
        Device("TPU-V6E", 918e12, 1.6e12),
        Device("TPU-V5E", 197e12, 0.82e12),
        Device(CPU, 0.1e12, 0.02e12, 1.5e-3, 0.1e-3),
    )
}

GENERIC = Device("generic", 300e12, 1.5e12)
"""For a device that is not in the table: 200 operations a byte, as those that are in it have."""


def accelerator_name(configured: str | None, reported: str | None) -> str:
    """Name of a kind of device.

    Args:
        configured: Ray's accelerator type, which operators write in prices too; it wins.
        reported: What the driver calls it, such as ``NVIDIA H100 80GB HBM3``.
    """
    if configured:
        return configured
    if not reported:
        return GENERIC.name
    if reported.lower() == CPU:
        return CPU
    return known.name if (known := _known(reported)) is not None else reported


def device(accelerator: str) -> Device:
    """Figures of a device by any of its names; ``GENERIC`` where it is not in the table."""
    return DEVICES.get(accelerator) or _known(accelerator) or GENERIC


def _known(name: str) -> Device | None:
    """The device whose name is a word of this one."""
    words = {word.upper() for word in re.split(r"[^A-Za-z0-9]+", name)}
    joined = name.upper()
    for key, known in DEVICES.items():
        upper = key.upper()
        if upper in words or ("-" in upper and upper in joined):
            return known
    return None
