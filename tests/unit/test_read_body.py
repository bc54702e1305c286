"""Declared lengths that no server should let through, and that are not trusted to be kept out."""

from __future__ import annotations

import pytest
from starlette.requests import Request
from starlette.types import Message

from deployments.api.completions import BodyLimits, read_body
from governance.errors import RequestTooLarge


def request(declared: bytes, body: bytes = b"{}") -> Request:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request({"type": "http", "headers": [(b"content-length", declared)]}, receive)


@pytest.mark.parametrize("declared", [b"\xb2", b"9" * 5000, b"-1", b"", b"1e3", b"1025", b"0x2"])
async def test_a_length_that_is_none_is_refused(declared: bytes) -> None:
    with pytest.raises(RequestTooLarge):
        await read_body(request(declared), BodyLimits(1024, 1.0))


@pytest.mark.parametrize("declared", [b"2", b"0", b"0002", b"1024"])
async def test_a_length_within_bounds_is_read(declared: bytes) -> None:
    assert await read_body(request(declared), BodyLimits(1024, 1.0)) == b"{}"
