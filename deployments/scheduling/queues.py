"""vLLM's two queues of requests that wait, in the order of one ``FairQueue``.

vLLM keeps those that could start (``waiting``) and those that must wait for something else, such as
a grammar that is being compiled (``skipped_waiting``). Both are views of one queue here, so that
nobody gains by being skipped.

Truth of a queue is what vLLM's loop asks before it takes one: whether somebody *may start now*. So
a floor (``Gate``) ends the loop, without the loop knowing of floors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request

from routing.fairness import FairQueue

Gate = Callable[[Request], bool]
"""Whether a request may start now."""


class _View(RequestQueue):
    """What both have in common.

    Args:
        fair: Order; every request in a queue has arrived there.
        gate: See the module.
    """

    def __init__(self, fair: FairQueue[str], gate: Gate) -> None:
        self._fair = fair
        self._gate = gate
        self._members: dict[str, Request] = {}
        self.now_us = 0
        """When the step began."""

    def begin(self, now_us: int) -> None:
        """A step begins."""
        self.now_us = now_us

    def prepend_request(self, request: Request) -> None:
        """Take one back; its place is by order, not by who was put back last."""
        self.add_request(request)

    def prepend_requests(self, requests: RequestQueue) -> None:
        """Take some back."""
        for request in requests:
            self.add_request(request)

    def pop_request(self) -> Request:
        """Take the first out: it starts, unless it is put back within the step."""
        request = self.peek_request()
        self._out(request)
        self._fair.take(request.request_id)
        return request

    def remove_request(self, request: Request) -> None:
        """Take one out that is not to start."""
        if request.request_id not in self._members:
            raise ValueError("the request does not wait here")
        self._out(request)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Take out those of some that wait here."""
        for request in requests:
            if request.request_id in self._members:
                self._out(request)

    def _out(self, request: Request) -> None:
        del self._members[request.request_id]

    def __bool__(self) -> bool:
        return bool(self._members) and self._gate(self.peek_request())

    def __len__(self) -> int:
        return len(self._members)


class WaitingQueue(_View):
    """Those that could start."""

    def add_request(self, request: Request) -> None:
        """Queue a request that is new, or was preempted."""
        self._members[request.request_id] = request
        self._fair.put_back(request.request_id)

    def peek_request(self) -> Request:
        """Who is next."""
        name = self._fair.head(self.now_us)
        if name is None:
            raise IndexError("peek from an empty queue")
        return self._members[name]

    def _out(self, request: Request) -> None:
        super()._out(request)
        self._fair.set_aside(request.request_id)

    def __iter__(self) -> Iterator[Request]:
        return iter([self._members[name] for name in self._fair.order(self.now_us)])


class SkippedQueue(_View):
    """Those that wait for something else; few as a rule, so they are put in order once a step."""

    def __init__(self, fair: FairQueue[str], gate: Gate) -> None:
        super().__init__(fair, gate)
        self._order: list[str] = []
        """Last first; may name some that are gone."""
        self._sorted = False

    def begin(self, now_us: int) -> None:
        """A step begins."""
        super().begin(now_us)
        self._sorted = False

    def add_request(self, request: Request) -> None:
        """Set a request aside."""
        self._members[request.request_id] = request
        self._fair.set_aside(request.request_id)
        self._sorted = False

    def peek_request(self) -> Request:
        """Who would be next."""
        if not self._sorted:
            self._order = self._in_order()[::-1]
            self._sorted = True
        while self._order:
            request = self._members.get(self._order[-1])
            if request is not None:
                return request
            self._order.pop()
        raise IndexError("peek from an empty queue")

    def __iter__(self) -> Iterator[Request]:
        return iter([self._members[name] for name in self._in_order()])

    def _in_order(self) -> list[str]:
        return sorted(self._members, key=lambda name: self._fair.place(name, self.now_us))
