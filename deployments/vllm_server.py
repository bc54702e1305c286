"""The data plane's ``Backend`` over one vLLM engine.

Imports vLLM, which takes seconds and half a gigabyte: for engine replicas only. vLLM's OpenAI
layer is driven directly, always as a stream: Ray's own methods batch events for 50 ms and cannot
be told the request id.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

import orjson
import vllm
from jinja2 import TemplateError
from pydantic import ValidationError
from ray.serve.llm import LLMConfig
from starlette.requests import Request
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.models.protocol import LoRAModulePath
from vllm.entrypoints.pooling.embed.protocol import EmbeddingCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMNotFoundError
from vllm.v1.engine.exceptions import EngineDeadError

from deployments.data_plane.backend import EngineLoad
from deployments.data_plane.ticket_form import Ticket
from deployments.engine_stream import StreamReader, engine_error, usage_of
from deployments.logs import concern, withhold_content
from deployments.metering.collector import MeterCollector
from deployments.metering.reporter import MeterReporter, Send, Watcher
from deployments.vllm_engine import ADMISSION, Admission, GovernedLLMServer
from governance.errors import (
    EngineFailed,
    EngineUnavailable,
    GatehouseError,
    InvalidRequest,
    Overloaded,
)
from governance.types import (
    EngineChunk,
    EngineEvent,
    EngineFinished,
    EngineStarted,
    Operation,
)

log = logging.getLogger("gatehouse.engine")

ENGINE_VERSION = f"vllm-{vllm.__version__}"


class VLLMBackend:
    """Serves requests whose ticket has been verified; see ``Backend``.

    Args:
        server: Started.
        meter: Receives what its core meters.
    """

    def __init__(self, server: GovernedLLMServer, meter: MeterCollector) -> None:
        self.server = server
        self.meter = meter
        self.reporter: MeterReporter | None = None
        self.engine = server.engine
        self.replica_id = ""
        self.versions: dict[str, str] = {}
        # vLLM's fingerprint names its configuration; ours names the weights.
        for serving in (self.engine._oai_serving_chat, self.engine._oai_serving_completion):
            if serving is not None:
                serving.system_fingerprint = None

    @classmethod
    async def create(cls, config: dict[str, Any]) -> VLLMBackend:
        """Start an engine.

        Args:
            config: Arguments of ``LLMConfig``, see ``deployments.engine_config.llm_config``.
        """
        arguments = dict(config["engine_kwargs"])
        if "lora_modules" in arguments:
            arguments["lora_modules"] = [LoRAModulePath(**m) for m in arguments["lora_modules"]]
        llm_config = LLMConfig(**{**config, "engine_kwargs": arguments})
        server: Any = GovernedLLMServer.sync_init(llm_config)
        meter = MeterCollector(str(config["model_loading_config"]["model_id"]))
        server.meter_path = meter.path
        try:
            await server.start()
        except BaseException:
            meter.close()
            raise
        meter.start()
        # Not before: what goes wrong at start quotes no request, and is needed whole.
        withhold_content("vllm")
        return cls(server, meter)

    def identify(self, replica_id: str, versions: dict[str, str]) -> None:
        """Say who answers; needed before the first request.

        Args:
            replica_id: Id under which the replica registers.
            versions: Model version by served id, adapters included.
        """
        self.replica_id = replica_id
        self.versions = versions

    def report_to(self, send: Send, watcher: Watcher | None = None) -> None:
        """Report what is metered from now on; needs ``identify`` before.

        Args:
            send: Gives a report to the ledger, raises where it was not taken.
            watcher: Told of every report.
        """
        self.reporter = MeterReporter(
            self.meter,
            send,
            replica_id=self.replica_id,
            accelerator=self.engine.accelerator,
            devices=self.engine.devices,
            watcher=watcher,
        )
        self.reporter.start()

    async def run(
        self, operation: str, body: bytes, ticket: Ticket
    ) -> AsyncGenerator[EngineEvent, None]:
        """Answer one request; see ``Backend.run``."""
        concern(ticket)
        exchange = _Exchange(self, operation, body, ticket)
        async with aclosing(exchange.events()) as events:
            async for event in events:
                yield event

    async def detokenize(self, model: str, prompts: list[list[int]]) -> list[str]:
        """Text of token-id prompts, special tokens included; see ``Backend.detokenize``."""
        tokenizer: Any = self.engine.client.renderer.tokenizer

        def decode() -> list[str]:
            size = len(tokenizer)
            for prompt in prompts:
                if not all(type(token) is int and 0 <= token < size for token in prompt):
                    raise InvalidRequest("A token id is outside the model's vocabulary.", "prompt")
            return [tokenizer.decode(prompt, skip_special_tokens=False) for prompt in prompts]

        return await asyncio.to_thread(decode)

    def delivered(self, ticket: Ticket) -> None:
        """The answer's end is on its way; see ``Backend.delivered``."""
        self.meter.delivered(ticket)

    def load(self) -> EngineLoad:
        """Current load; see ``Backend.load``."""
        load = self.engine.load()
        waiting, oldest_us = self.meter.unbegun()
        return replace(load, waiting_by_class=waiting, oldest_wait_us=oldest_us)

    @property
    def dead(self) -> bool:
        """Whether the engine's process is gone; it does not come back."""
        return bool(self.engine.client.errored)

    async def check_health(self) -> None:
        """Raise whatever killed the engine."""
        await self.engine.check_health()

    async def engine_died(self) -> None:
        """The engine's process is gone: report what it cost, with a bound on what it did not tell.

        Once, and again with every report that follows.
        """
        self.meter.core_died()
        if self.reporter is not None:
            await self.reporter.report(force=True)

    async def stop(self) -> None:
        """Stop the engine's processes, tell the last figures; requests in flight fail."""
        await self.engine.shutdown()
        if self.reporter is not None:
            await self.reporter.stop()
        self.meter.close()


class _Exchange:
    """One request, from its body to its last event."""

    def __init__(self, backend: VLLMBackend, operation: str, body: bytes, ticket: Ticket) -> None:
        self._engine = backend.engine
        self._meter = backend.meter
        self._ticket = ticket
        self._operation = operation
        self._version = backend.versions[ticket.audience]
        self._replica_id = backend.replica_id
        self._fields = fields = orjson.loads(body)
        if fields.get("model") != ticket.audience:
            raise EngineFailed()
        asked = fields.pop("max_completion_tokens", None), fields.pop("max_tokens", None)
        self._metered = self._meter.open(ticket)
        self._admission = Admission(
            ticket,
            self._metered,
            next((tokens for tokens in asked if tokens is not None), ticket.max_tokens),
            fields.pop("min_tokens", None) or 0,
        )
        fields.pop("priority", None)

    async def events(self) -> AsyncGenerator[EngineEvent, None]:
        """``EngineStarted`` as soon as the engine has taken the request, then the answer."""
        opening = asyncio.create_task(self._open())
        accepted, metered = self._admission.accepted, self._metered
        stream: AsyncGenerator[Any, None] | None = None
        try:
            await asyncio.wait((opening, accepted), return_when=asyncio.FIRST_COMPLETED)
            reader = StreamReader(self._version, self._choices(), metered.progress)
            if not accepted.done():
                # Refused: raised, or as the first event of the stream.
                first, stream = await opening
                reader.feed(first)
                raise EngineFailed()
            yield EngineStarted(
                self._replica_id, self._version, ENGINE_VERSION, metered.prompt_tokens
            )
            await self._begun(opening)
            first, stream = await opening
            if stream is None:
                usage = usage_of(orjson.loads(first.body)["usage"])
                yield EngineChunk(first.body, 0, metered.total_us)
                yield await self._finished(EngineFinished(usage))
                return
            if (chunk := reader.feed(first)) is not None:
                yield chunk
            async for item in stream:
                if (chunk := reader.feed(item)) is not None:
                    yield chunk
            yield await self._finished(reader.finish())
        except GatehouseError:
            raise
        except Exception as error:
            raise self._mapped(error) from None
        finally:
            try:
                await self._abort(opening, stream)
            finally:
                metered.close()

    async def _begun(self, opening: asyncio.Task[Any]) -> None:
        """Wait for the first output, or until the request has waited too long for its turn.

        Raises:
            Overloaded: The engine has not begun it within the ticket's patience.
        """
        patience_s = self._ticket.patience_ms / 1000
        if patience_s:
            await asyncio.wait((opening,), timeout=patience_s)
            if not opening.done() and not self._metered.begun:
                raise Overloaded("", None, max(1, round(patience_s)))

    async def _finished(self, event: EngineFinished) -> EngineFinished:
        """The last event, with what the request has cost."""
        gpu_us = await self._metered.final()
        self._metered.finished = True
        return replace(event, gpu_us=gpu_us)

    async def _open(self) -> tuple[Any, AsyncGenerator[Any, None] | None]:
        """Start the request under its admission; gives the first item and the stream.

        Runs as a task, so that the admission is seen by this request only.
        """
        ADMISSION.set(self._admission)
        answer = await self._ask()
        if isinstance(answer, _Whole):
            return answer, None
        try:
            return await anext(answer), answer
        except StopAsyncIteration:
            raise EngineFailed() from None

    async def _ask(self) -> AsyncGenerator[Any, None] | _Whole:
        fields, engine = self._fields, self._engine
        if self._operation == Operation.EMBEDDINGS:
            return await self._embed()
        # One token, so that vLLM checks that the prompt leaves room for an answer; the admission
        # sets the real length where the prompt has been counted.
        fields |= {
            "max_tokens": 1,
            "stream": True,
            "stream_options": {"include_usage": True},
            "request_id": self._ticket.request_id,
        }
        if self._operation == Operation.CHAT and engine._oai_serving_chat:
            chat = ChatCompletionRequest(**fields)
            answer: Any = await engine._oai_serving_chat.create_chat_completion(chat)
        elif self._operation == Operation.COMPLETIONS and engine._oai_serving_completion:
            completion = CompletionRequest(**fields)
            answer = await engine._oai_serving_completion.create_completion(completion)
        else:
            raise InvalidRequest("The model does not answer requests of this kind.", "model")
        if isinstance(answer, ErrorResponse):
            raise engine_error(answer.error.code, answer.error.param)
        stream: AsyncGenerator[Any, None] = answer
        return stream

    async def _embed(self) -> _Whole:
        if self._engine._oai_serving_embedding is None:
            raise InvalidRequest("The model does not answer requests of this kind.", "model")
        request = EmbeddingCompletionRequest(**self._fields)
        name = self._ticket.request_id.encode()
        scope = {"type": "http", "headers": [(b"x-request-id", name)]}
        answer = await self._engine._oai_serving_embedding(request, raw_request=Request(scope))
        return _Whole(bytes(answer.body))

    def _choices(self) -> int:
        prompt = self._fields.get("prompt")
        several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        return (self._fields.get("n") or 1) * (len(prompt) if several and prompt else 1)

    async def _abort(
        self, opening: asyncio.Task[Any], stream: AsyncGenerator[Any, None] | None
    ) -> None:
        """Leave nothing running, whatever vLLM's layers hold on to."""
        if not opening.done():
            opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        for generator in (stream, *self._admission.streams):
            if generator is not None:
                # RuntimeError: it is still running in a task of vLLM's that was cancelled.
                with suppress(RuntimeError, EngineDeadError):
                    await generator.aclose()

    def _mapped(self, error: Exception) -> GatehouseError:
        """Our error for what vLLM raised, by its class."""
        taken = self._admission.accepted.done()
        if isinstance(error, EngineDeadError):
            return EngineFailed() if taken else EngineUnavailable("", None, 2)
        if isinstance(error, GracefulHTTPError):
            return engine_error(error.http_status.value)
        if isinstance(error, VLLMNotFoundError):
            return engine_error(404)
        if isinstance(error, VLLMClientError):
            return engine_error(400, getattr(error, "parameter", None))
        if isinstance(error, ValidationError):
            places = error.errors(include_url=False, include_context=False, include_input=False)
            return engine_error(400, str(places[0]["loc"][0]) if places[0]["loc"] else None)
        if isinstance(error, TemplateError):
            return InvalidRequest("The model does not accept this order of messages.", "messages")
        if isinstance(error, (ValueError, TypeError, OverflowError)) and not taken:
            return engine_error(400)
        log.error("engine raised %s", type(error).__name__)
        return EngineFailed()


class _Whole:
    """An answer in one piece."""

    __slots__ = ("body",)

    def __init__(self, body: bytes) -> None:
        self.body = body
