"""Ports for the benchmark's processes."""

from __future__ import annotations

import random
import socket

_FIRST, _LAST = 12_000, 29_000
"""Below the system's ephemeral range, from which Ray's processes take theirs in the meantime, and
below the ports that Serve gives to replicas (30,000 on)."""


def free_port() -> int:
    """A port that is free now on every interface, and that nobody else takes by chance.

    Raises:
        OSError: None was found in a hundred tries.
    """
    for _ in range(100):
        port = random.randint(_FIRST, _LAST)
        with socket.socket() as sock:
            try:
                sock.bind(("", port))
            except OSError:
                continue
        return port
    raise OSError(f"no free port between {_FIRST} and {_LAST}")
