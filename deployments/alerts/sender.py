"""One attempt to deliver one message over HTTP, and what its answer means.

Where it goes is the operators' choice alone: the URL stands in the budgets file, and nothing that a
client sends becomes part of it. Whoever may apply a budgets file can make the ledger's node POST to
any host that it reaches; so no redirect is followed, nothing of an answer is used but its status
and ``Retry-After``, and only https is spoken, or http on loopback. Let the network bound it where
that is not enough. Certificates are checked. Nothing is taken from the environment: a ``.netrc``
would send its passwords along.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum

import aiohttp

from deployments import __version__
from deployments.alerts.signing import headers
from governance.identity.config import is_safe_url
from governance.ports import Clock

TIMEOUT_S = 10.0
"""How long one attempt may take, in seconds."""
MAX_RETRY_AFTER_S = 3600.0
"""A receiver cannot ask for a longer pause."""
_ANSWER_BYTES = 1024
"""Read of an answer at most, so that its connection ends in order; none of it is used."""
_RETRIED = frozenset({408, 425, 429})
"""Of 4xx, those that may pass."""


class Result(StrEnum):
    """What became of one attempt."""

    DELIVERED = "delivered"
    REFUSED = "refused"
    """For good: sending the same again would be answered the same."""
    LATER = "later"


@dataclass(frozen=True, slots=True)
class Attempt:
    """The outcome of one attempt."""

    result: Result
    why: str
    """``answered 503``, or the class of an error; never text of the answer or of the secret."""
    retry_after_s: float | None = None
    """Pause that the receiver asked for."""


class WebhookSender:
    """Sends signed messages to one receiver, one at a time or several.

    Args:
        clock: Wall clock, microseconds.
        timeout_s: Longest attempt.
        tls: Context to check certificates with; ``None`` for the system's authorities.
    """

    def __init__(
        self, *, clock: Clock, timeout_s: float = TIMEOUT_S, tls: ssl.SSLContext | None = None
    ) -> None:
        self._clock = clock
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._tls: ssl.SSLContext | bool = True if tls is None else tls

    async def send(
        self, url: str, secrets: Sequence[bytes], message_id: str, body: bytes
    ) -> Attempt:
        """Try once; never raises but when it is cancelled.

        Args:
            url: Of the receiver.
            secrets: To sign with; see ``read_secrets``.
            message_id: Value of ``webhook-id``.
            body: What to send.
        """
        if not safe(url):
            # Kept for later: a file that is applied next may have a better one.
            return Attempt(Result.LATER, "the URL is not https, or holds a password")
        fields = {
            "content-type": "application/json",
            "user-agent": f"gatehouse/{__version__}",
            "accept-encoding": "identity",
            **headers(secrets, message_id, self._clock() // 1_000_000, body),
        }
        try:
            async with (
                aiohttp.ClientSession(
                    timeout=self._timeout, trust_env=False, auto_decompress=False
                ) as session,
                session.post(
                    url, data=body, headers=fields, allow_redirects=False, ssl=self._tls
                ) as answer,
            ):
                status = answer.status
                asked = answer.headers.get("retry-after")
                await answer.content.read(_ANSWER_BYTES)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            return Attempt(Result.LATER, type(error).__name__)
        return judge(status, asked, self._clock)


def safe(url: str) -> bool:
    """Whether messages may be sent there: https, or http on loopback, without a password."""
    return is_safe_url(url, allow_loopback_http=True)


def judge(status: int, retry_after: str | None, clock: Callable[[], int]) -> Attempt:
    """What a receiver's answer means.

    Any 2xx is success. A redirect is not followed and not success either; it may be an outage
    page, so it is tried again. A 410 says that nobody listens there any more.

    Args:
        status: HTTP status.
        retry_after: The header of that name.
        clock: Wall clock, microseconds.
    """
    why = f"answered {status}"
    if 200 <= status < 300:
        return Attempt(Result.DELIVERED, why)
    if 400 <= status < 500 and status not in _RETRIED:
        return Attempt(Result.REFUSED, why)
    return Attempt(Result.LATER, why, _pause_s(retry_after, clock()))


def _pause_s(value: str | None, now_us: int) -> float | None:
    """``Retry-After`` in seconds, given as a number or a date; ``None`` where it is neither."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), MAX_RETRY_AFTER_S)
    try:
        at = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    now = datetime.fromtimestamp(now_us / 1e6, UTC)
    return min(max((at - now).total_seconds(), 0.0), MAX_RETRY_AFTER_S)
