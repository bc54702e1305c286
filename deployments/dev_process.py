"""The development identity provider as a process of its own: started, watched, stopped."""

from __future__ import annotations

import http.client
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from deployments.processes import die_with_parent

START_S = 30.0
STOP_S = 5.0


class IssuerError(Exception):
    """The identity provider did not start; one line."""


class DevIdentityProvider:
    """``python -m deployments.dev_idp`` for one issuer URL on loopback."""

    def __init__(self, issuer: str, state: Path) -> None:
        self.issuer = issuer
        self._keys = state / "keys" / "dev_idp"
        self.log = state / "logs" / "dev_idp.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until its discovery document answers.

        Raises:
            IssuerError: It ended at once, or did not answer in time.
        """
        port = urlsplit(self.issuer).port or 80
        for folder in (self._keys.parent, self._keys):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        command = [sys.executable, "-m", "deployments.dev_idp", "--port", str(port)]
        command += ["--issuer", self.issuer, "--key-dir", str(self._keys)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own module, no shell
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Whoever starts it may be killed; one system call is all this does after the fork.
                preexec_fn=die_with_parent,
            )
        deadline = time.monotonic() + START_S
        while not answers(f"{self.issuer}/.well-known/openid-configuration"):
            if self._process.poll() is not None:
                raise IssuerError(f"it ended with status {self._process.returncode}: {self.log}")
            if time.monotonic() > deadline:
                raise IssuerError(f"no answer within {START_S:g} s: {self.log}")
            time.sleep(0.1)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End it, by force after ``STOP_S``."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def answers(url: str, timeout_s: float = 2.0) -> bool:
    """Whether a URL on this machine answers 200."""
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.netloc, timeout=timeout_s)
    try:
        connection.request("GET", where.path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
