"""The ledger's alerts on their way to the webhook: a task beside the ledger, never in its way.

It asks the ledger for waiting alerts like any other caller, once a second, and waits for the
receiver in a task of its own: however slow that is, no charge and no lease waits for it. Without
webhook or receiver budgets work as ever; what cannot be told waits in the database for a day.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from deployments.alerts.delivery import Delivery, DeliveryStats, Sender, Source
from deployments.alerts.sender import WebhookSender
from deployments.alerts.signing import SecretError, read_secrets
from governance.ports import Clock

SECRET_FILE = "GATEHOUSE_ALERT_SECRET_FILE"  # noqa: S105 - a name of a variable


class LedgerAlerts:
    """See the module.

    Args:
        source: The ledger, as a caller sees it.
        webhook: URL by the budgets that hold now; ``None``: nobody is told.
        clock: Wall clock, microseconds.
        sender: Delivers one message; ``None`` for HTTP.
        secret_file: File with the secrets; ``None`` for what the environment names.
    """

    def __init__(
        self,
        source: Source,
        webhook: Callable[[], str | None],
        *,
        clock: Clock,
        sender: Sender | None = None,
        secret_file: Path | None = None,
    ) -> None:
        self._file = secret_file
        self._delivery = Delivery(
            source, sender or WebhookSender(clock=clock), webhook, self._secrets, clock
        )

    @property
    def stats(self) -> DeliveryStats:
        """Counts since the process started."""
        return self._delivery.stats

    async def run(self) -> None:
        """Deliver for ever."""
        await self._delivery.run()

    def _secrets(self) -> tuple[bytes, ...]:
        return read_secrets(self._file or secret_file())


def secret_file() -> Path:
    """The file that the environment names.

    Raises:
        SecretError: It names none.
    """
    name = os.environ.get(SECRET_FILE)
    if not name:
        raise SecretError(f"no alert is sent: {SECRET_FILE} names no file with a secret")
    return Path(name)
