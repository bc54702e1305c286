"""HTTP to a gateway, on the standard library: a command starts in milliseconds."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from deployments.cli.errors import CliError, Exit, from_answer

Json = dict[str, Any]
MAX_BODY_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: Any


class GatewayClient:
    """One gateway, one credential.

    Args:
        url: Base URL without ``/v1``.
        token: Bearer token or service key, or ``None``.
        timeout_s: Longest silence of the gateway.
    """

    def __init__(self, url: str, token: str | None, timeout_s: float = 120.0) -> None:
        where = urlsplit(url)
        if where.scheme not in {"http", "https"} or not where.hostname:
            raise CliError(
                f"not a base URL: {url}", "such as http://127.0.0.1:8000", code=Exit.USAGE
            )
        if token is not None and not (token.isascii() and token.isprintable()):
            raise CliError("the token has characters that no token has", code=Exit.USAGE)
        self.url = url.rstrip("/").removesuffix("/v1")
        self._where = urlsplit(self.url)
        self._token = token
        self._timeout_s = timeout_s

    def call(self, method: str, path: str, body: Json | None = None) -> Answer:
        """One request and its whole answer.

        Raises:
            CliError: No answer, or an error.
        """
        with self._exchange(method, path, body) as response:
            return _read(response)

    def stream(self, path: str, body: Json) -> tuple[Mapping[str, str], Iterator[Json]]:
        """POST, and the events of the answer as they arrive.

        Returns:
            Headers with names in lower case, and the parsed events up to ``[DONE]``.

        Raises:
            CliError: No answer, or an error; from the iterator: an error event, or an end
                without ``[DONE]``.
        """
        response = self._exchange("POST", path, body)
        return _headers(response), _events(response)

    def _exchange(self, method: str, path: str, body: Json | None) -> http.client.HTTPResponse:
        headers = {"Accept": "application/json, text/event-stream", "User-Agent": "gatehouse-cli"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        connection = self._connect()
        try:
            connection.request(method, self._where.path + path, data, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._no_answer(error) from None
        if response.status >= 400:
            answer = _read(response)
            raise from_answer(answer.status, answer.body)
        return response

    def _connect(self) -> http.client.HTTPConnection:
        if self._where.scheme == "https":
            return http.client.HTTPSConnection(
                self._where.netloc, timeout=self._timeout_s, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(self._where.netloc, timeout=self._timeout_s)

    def _no_answer(self, error: Exception) -> CliError:
        remedy = "start it with `make serve`, or name another with --url or GATEHOUSE_URL"
        if isinstance(error, ssl.SSLError):
            return CliError(
                f"no TLS with {self.url}: {error.reason}", "check the certificate", Exit.UNAVAILABLE
            )
        if isinstance(error, socket.gaierror):
            return CliError(f"unknown host: {self._where.hostname}", remedy, Exit.UNAVAILABLE)
        if isinstance(error, TimeoutError):
            return CliError(
                f"no answer from {self.url} within {self._timeout_s:g} s",
                "see `gatehouse doctor`",
                Exit.UNAVAILABLE,
            )
        return CliError(f"nothing answers at {self.url}", remedy, Exit.UNAVAILABLE)


def _read(response: http.client.HTTPResponse) -> Answer:
    try:
        raw = response.read(MAX_BODY_BYTES)
    except (OSError, http.client.HTTPException):
        raise CliError("the answer was cut off", code=Exit.UNAVAILABLE) from None
    try:
        body = json.loads(raw) if raw else None
    except ValueError:
        body = None
    return Answer(response.status, _headers(response), body)


def _headers(response: http.client.HTTPResponse) -> dict[str, str]:
    # The first of a name counts: what a proxy adds comes after ours.
    return {name.lower(): value for name, value in reversed(response.getheaders())}


def _events(response: http.client.HTTPResponse) -> Iterator[Json]:
    """Events of OpenAI's stream: each is one ``data:`` line."""
    with response:
        try:
            for line in response:
                field, _, value = line.decode("utf-8", "replace").rstrip("\r\n").partition(":")
                if field != "data":
                    continue
                value = value.removeprefix(" ")
                if value == "[DONE]":
                    return
                event = json.loads(value)
                if "error" in event:
                    raise from_answer(500, event)
                yield event
        except (OSError, http.client.HTTPException):
            raise CliError("the answer was cut off", code=Exit.UNAVAILABLE) from None
        except ValueError:
            raise CliError("the answer is not an event stream", "check --url") from None
    raise CliError("the answer ended without [DONE]; it is not complete", code=Exit.UNAVAILABLE)
