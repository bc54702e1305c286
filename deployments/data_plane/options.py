"""Bounds of the data plane on the gateway's side."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ClientOptions(BaseModel):
    """How a gateway talks to engine replicas."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    connect_timeout_s: float = Field(default=2.0, gt=0)
    """Time to connect and exchange HELLO; after it another replica is tried."""
    max_open_requests: int = Field(default=1024, ge=1)
    """Requests that this gateway has open at all replicas together. Each holds at most some
    200 KiB in user space and as much in kernel buffers."""
    max_idle_connections: int = Field(default=64, ge=0)
    """Connections kept open per replica for the next request."""
    department_share_milli: int = Field(default=500, ge=1, le=1000)
    """Share of a replica's slots, in thousandths, that one department holds while others wait."""
    stale_after_s: float = Field(default=3.0, gt=0.5)
    """Silence of a replica's state connection after which it gets no new requests. A replica
    speaks every 0.5 s; one that died closes its connection and is known at once."""
    max_prefixes: int = Field(default=4096, ge=0)
    """Affinity keys remembered per replica."""
