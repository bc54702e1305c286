"""The HTTP application: routes, health, errors. Built inside the replica; knows no Ray."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api import models as models_api
from deployments.api.admin import AdminApi
from deployments.api.completions import BodyLimits, Exchange, Trace, read_body
from deployments.api.envelope import error_response, new_id
from deployments.api.schema import CHAT, COMPLETIONS, EMBEDDINGS, ERRORS
from deployments.api.usage import UsageApi
from deployments.api.usage_schema import USAGE, USAGE_ANSWER
from deployments.telemetry.traces import NoTracing
from governance.errors import (
    GatehouseError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    RouteNotFound,
)
from governance.gateway import Gateway
from governance.tracebacks import without_messages
from governance.types import Operation, Principal

log = logging.getLogger("gatehouse.api")

Json = dict[str, Any]
AdminHandler = Callable[[Principal, Json], Awaitable[Json]]
AdminRoutes = Iterable[tuple[str, str, AdminHandler, bool]]


def create_app(
    gateway: Gateway,
    admin: AdminApi,
    limits: BodyLimits,
    *,
    ready: Callable[[], dict[str, bool]],
    created_s: int,
    version: str,
    usage: UsageApi | None = None,
    tracing: Trace | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        gateway: Serves inference.
        admin: Serves administration.
        limits: Bounds on request bodies.
        ready: Parts that must be ready, with their state; asked by ``/readyz``.
        created_s: ``created`` of the model objects: when this gateway started, Unix seconds.
        version: Version of Gatehouse.
        usage: Serves budgets; ``None`` where there are none.
        tracing: Draws the ids of each request's trace; ``None`` for none.
    """
    app = FastAPI(title="Gatehouse", version=version, docs_url=None, redoc_url=None)

    traces = tracing or NoTracing()

    def inference(operation: Operation) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            return Exchange(gateway, operation, request, limits, traces)

        return endpoint

    for path, operation, schema in (
        ("/v1/chat/completions", Operation.CHAT, CHAT),
        ("/v1/completions", Operation.COMPLETIONS, COMPLETIONS),
        ("/v1/embeddings", Operation.EMBEDDINGS, EMBEDDINGS),
    ):
        app.router.add_api_route(
            path,
            inference(operation),
            methods=["POST"],
            name=operation.value,
            response_model=None,
            responses=ERRORS,
            openapi_extra=schema,
            route_class_override=BareRoute,
        )

    @app.get("/v1/models", response_model=None, responses=ERRORS)
    async def list_models(request: Request) -> Response:
        """Models that the caller may use."""
        authorization = request.headers.get("authorization")
        return _json(await models_api.list_models(gateway, authorization, created_s))

    @app.get("/v1/models/{model_id:path}", response_model=None, responses=ERRORS)
    async def get_model(request: Request, model_id: str) -> Response:
        """One model, if the caller may use it."""
        authorization = request.headers.get("authorization")
        return _json(await models_api.get_model(gateway, authorization, model_id, created_s))

    @app.get("/healthz", response_model=None)
    async def healthz() -> Response:
        """The process lives."""
        return _json({"status": "ok"})

    @app.get("/readyz", response_model=None)
    async def readyz() -> Response:
        """Everything that a request needs is there; 503 with the parts that are not."""
        parts = ready()
        return _json(
            {"status": "ready" if all(parts.values()) else "starting", "parts": parts},
            200 if all(parts.values()) else 503,
        )

    _add_admin(app, gateway, admin.routes(), limits)
    if usage is not None:
        _add_usage(app, gateway, usage)
        _add_admin(app, gateway, usage.routes(), limits)
    _add_error_handlers(app)
    return app


class BareRoute(APIRoute):
    """Documented like any route, served without injection: its endpoint takes the request alone.

    FastAPI would resolve dependencies that there are not, which takes a tenth of the
    application's CPU per request.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The endpoint itself."""
        endpoint: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint


def _json(value: Json, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status_code=status, media_type="application/json")


def _add_usage(app: FastAPI, gateway: Gateway, usage: UsageApi) -> None:
    """Mount ``/v1/usage``."""

    async def endpoint(request: Request) -> Response:
        """What is left of a department's budget."""
        principal = await gateway.authenticator.authenticate(request.headers.get("authorization"))
        return _json(await usage.usage(principal, _query(request)))

    app.add_api_route(
        "/v1/usage",
        endpoint,
        methods=["GET"],
        name="usage",
        response_model=None,
        responses={**USAGE_ANSWER, **ERRORS},
        openapi_extra=USAGE,
    )


def _add_admin(app: FastAPI, gateway: Gateway, routes: AdminRoutes, limits: BodyLimits) -> None:
    """Mount administration routes: authenticate, read JSON, hand over."""
    for method, path, handler, takes_body in routes:

        def endpoint_of(
            handler: AdminHandler, takes_body: bool
        ) -> Callable[[Request], Awaitable[Response]]:
            async def endpoint(request: Request) -> Response:
                principal = await gateway.authenticator.authenticate(
                    request.headers.get("authorization")
                )
                body = _object(await read_body(request, limits)) if takes_body else _query(request)
                return _json(await handler(principal, {**body, **request.path_params}))

            return endpoint

        app.add_api_route(
            path,
            endpoint_of(handler, takes_body),
            methods=[method],
            name=f"{method} {path}",
            response_model=None,
            responses=ERRORS,
            openapi_extra={"security": [{"bearer": []}]},
        )


def _query(request: Request) -> Json:
    pairs = request.query_params.multi_items()
    query: Json = dict(pairs)
    if len(query) < len(pairs):
        raise InvalidRequest("A query parameter is given twice.")
    return query


def _object(body: bytes) -> Json:
    try:
        value = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError:
        raise InvalidRequest("The body is not valid JSON.") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.")
    return value


def _add_error_handlers(app: FastAPI) -> None:
    """Every error leaves in our envelope; what is not ours is an internal error without a word."""

    async def ours(request: Request, error: Exception) -> Response:
        known = error if isinstance(error, GatehouseError) else InternalError()
        return error_response(known, new_id("req"))

    async def http(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        known = _HTTP_ERRORS.get(status, InternalError)()
        response = error_response(known, new_id("req"))
        if isinstance(error, HTTPException) and error.headers:
            response.headers.update(error.headers)
        return response

    app.add_exception_handler(GatehouseError, ours)
    app.add_exception_handler(HTTPException, http)
    app.add_middleware(ErrorBoundary)


_HTTP_ERRORS: dict[int, type[GatehouseError]] = {404: RouteNotFound, 405: MethodNotAllowed}


class ErrorBoundary:
    """Outermost: an exception that nobody mapped becomes an internal error, and is logged."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve, and catch what falls through."""
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            request_id = new_id("req")
            log.error("request %s: unmapped exception\n%s", request_id, without_messages(error))
            if started or scope["type"] != "http":
                # The server logs what it is given, and breaks the connection.
                raise InternalError() from None
            await error_response(InternalError(), request_id)(scope, receive, send)
