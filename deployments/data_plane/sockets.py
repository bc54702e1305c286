"""Socket options of both ends."""

from __future__ import annotations

import asyncio
import socket

STREAM_BUFFER_BYTES = 64 << 10
"""Per direction and end: user-space high-water mark, and the kernel buffer of an answer.

A fixed kernel buffer turns off autotuning, which would let each slow reader pin some megabytes.
It bounds one answer to 64 KiB per round trip (hundreds of MB/s inside a cluster), and an answer is
a few tens of kB/s. Requests, which are larger and short-lived, keep the system's defaults.
"""

_KEEPALIVE = (
    ("TCP_KEEPIDLE", 5),
    ("TCP_KEEPINTVL", 2),
    ("TCP_KEEPCNT", 3),
)


def tune(transport: asyncio.BaseTransport, answer_buffer: int | None) -> None:
    """Set TCP_NODELAY, keepalive and the kernel buffer of answers.

    Keepalive is answered by the peer's kernel: it finds a dead host in about 11 s, and does not
    take a busy process for one.

    Args:
        transport: A connected transport.
        answer_buffer: ``SO_SNDBUF`` on a replica, ``SO_RCVBUF`` on a gateway, or ``None``.

    """
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    if answer_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, answer_buffer, STREAM_BUFFER_BYTES)
