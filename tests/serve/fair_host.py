"""An engine that many ask at once; tells in which order answers began."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import orjson

from governance.errors import GatehouseError
from governance.types import EngineChunk
from tests.serve.engine_host import EngineHost


class FairHost(EngineHost):
    """Keeps the order of first tokens, by department."""

    async def begun(
        self,
        flood: int,
        before: int,
        body: dict[str, Any],
        late: list[dict[str, Any]],
        seen: list[dict[str, Any]] | None = None,
    ) -> tuple[list[str], dict[str, str]]:
        """Ask many times, and some more when the first of these have begun to answer.

        Args:
            flood: How many requests of the department ``marketing`` come at once.
            before: How many of their answers begin before the others are asked.
            body: What everybody asks.
            late: Fields of the tickets of those who ask then.
            seen: The same, of requests that are answered before all others.

        Returns:
            Departments in the order in which their answers began, without those of ``seen``; and
            codes of the errors, by department.
        """
        order: list[str] = []
        errors: dict[str, str] = {}
        enough = asyncio.Event()

        async def one(fields: dict[str, Any], order: list[str]) -> None:
            raw = orjson.dumps(body)
            ticket = self._ticket("chat", body["model"], raw, **fields)
            first = True
            try:
                async with aclosing(self.backend.run("chat", raw, ticket)) as events:
                    async for event in events:
                        if isinstance(event, EngineChunk) and event.tokens and first:
                            first = False
                            order.append(ticket.department)
                            if len(order) == before:
                                enough.set()
            except GatehouseError as error:
                errors[ticket.department] = error.code
            self.backend.delivered(ticket)

        for fields in seen or ():
            await one(fields, [])
        tasks = [asyncio.create_task(one({"department": "marketing"}, order)) for _ in range(flood)]
        await enough.wait()
        tasks += [asyncio.create_task(one(fields, order)) for fields in late]
        await asyncio.gather(*tasks)
        return order, errors
