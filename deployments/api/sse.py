"""Server-sent events on bare ASGI: one message a chunk, no per-chunk tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping

from starlette.types import Message, Receive, Send

from governance.gateway import GatewayEvent

DONE = b"data: [DONE]\n\n"


def event(payload: bytes) -> bytes:
    """One event with a JSON payload."""
    return b"data: " + payload + b"\n\n"


async def start(send: Send, headers: Mapping[str, str]) -> None:
    """Send the head of an event stream."""
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    raw += [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": raw})


async def write(send: Send, data: bytes) -> None:
    """Send events."""
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def end(send: Send, data: bytes = b"") -> None:
    """Send the last events and close the body."""
    await send({"type": "http.response.body", "body": data, "more_body": False})


class DisconnectWatch:
    """Cancels the task that serves a request when its client goes.

    Started once the body is received (two readers of one ASGI channel would steal from each
    other), so a hang-up is noticed while waiting for an engine as well as in mid-answer.
    Starlette starts a task group per response for this; one watcher task does.

    A client that stays and does not read counts as gone too, after a while: it would hold an
    engine's slot without end.

    Args:
        receive: The request's channel.
        stalled_after_s: Time that one piece of an answer may take to be sent, in seconds.
    """

    def __init__(self, receive: Receive, stalled_after_s: float) -> None:
        self._receive = receive
        self._stalled_after_s = stalled_after_s
        self._watcher: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._sending_since_s: float | None = None
        self.gone = False

    def start(self) -> None:
        """Watch on behalf of the current task."""
        serving = asyncio.current_task()
        if serving is None:
            raise RuntimeError("a disconnect watch needs a task to cancel")
        self._watcher = asyncio.create_task(self._watch(serving))
        self._look_again(serving)

    async def write(self, send: Send, data: bytes) -> None:
        """Send events; a client that does not take them in time is cut off."""
        self._sending_since_s = asyncio.get_running_loop().time()
        await write(send, data)
        self._sending_since_s = None

    def stop(self) -> None:
        """Stop watching; the answer is complete."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self._timer is not None:
            self._timer.cancel()

    def _look_again(self, serving: asyncio.Task[object]) -> None:
        """Look twice in the time allowed whether a piece is stuck: one timer a stream."""
        loop = asyncio.get_running_loop()
        since_s = self._sending_since_s
        if since_s is not None and loop.time() - since_s >= self._stalled_after_s:
            self.gone = True
            serving.cancel()
            return
        self._timer = loop.call_later(self._stalled_after_s / 2, self._look_again, serving)

    async def _watch(self, serving: asyncio.Task[object]) -> None:
        message: Message = {"type": "http.request"}
        while message["type"] != "http.disconnect":
            message = await self._receive()
        self.gone = True
        serving.cancel()


Events = AsyncGenerator[GatewayEvent, None]
"""What a handler consumes: the rest of a gateway exchange."""
