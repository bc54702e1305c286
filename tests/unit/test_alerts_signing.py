"""Secrets and signatures of webhooks."""

from __future__ import annotations

import base64
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deployments.alerts.signing import (
    MAX_SECRETS,
    SecretError,
    headers,
    new_secret,
    parse_secret,
    read_secrets,
    signature,
)
from tests.docs.pages import ROOT, blocks

PUBLISHED = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
BODY = b'{"test": 2432232314}'


def private(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def documented() -> Callable[[str, dict[str, str], bytes], bool]:
    """The receiver's side, as ``operate.md`` has it."""
    page = ROOT / "docs/guides/operate.md"
    (text,) = [block.text for block in blocks(page) if "webhook-signature" in block.text]
    names: dict[str, Callable[[str, dict[str, str], bytes], bool]] = {}
    exec(compile(text, str(page), "exec"), names)
    return names["genuine"]


def test_the_vector_that_the_reference_libraries_test_with() -> None:
    key = parse_secret(PUBLISHED.encode(), Path("x"))
    found = signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, BODY)
    assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_documented_receiver_takes_ours_and_nothing_else() -> None:
    genuine, secret, now_s = documented(), new_secret(os.urandom), int(time.time())
    key = base64.b64decode(secret.removeprefix("whsec_"))
    sent = headers([key], "alert_1", now_s, BODY)
    assert genuine(secret, sent, BODY)
    assert not genuine(secret, sent, BODY + b" ")
    assert not genuine(secret, {**sent, "webhook-id": "alert_2"}, BODY)
    assert not genuine(secret, {**sent, "webhook-timestamp": str(now_s + 1)}, BODY)
    assert not genuine(new_secret(os.urandom), sent, BODY)
    assert not genuine(secret, headers([key], "alert_1", now_s - 301, BODY), BODY)


def test_while_a_secret_is_replaced_both_verify() -> None:
    genuine, old, new = documented(), new_secret(os.urandom), new_secret(os.urandom)
    keys = [parse_secret(each.encode(), Path("x")) for each in (new, old)]
    sent = headers(keys, "alert_1", int(time.time()), BODY)
    assert len(sent["webhook-signature"].split(" ")) == 2
    assert genuine(new, sent, BODY)
    assert genuine(old, sent, BODY)


def test_a_file_of_secrets_newest_first(tmp_path: Path) -> None:
    first, second = new_secret(os.urandom), new_secret(os.urandom)
    path = private(tmp_path / "s", f"# since May\n{first}\n\n  {second}  \n")
    assert read_secrets(path) == tuple(
        base64.b64decode(each.removeprefix("whsec_")) for each in (first, second)
    )


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620])
def test_a_file_that_others_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = private(tmp_path / "s", new_secret(os.urandom))
    path.chmod(mode)
    with pytest.raises(SecretError, match="others may read it"):
        read_secrets(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SecretError, match="cannot be read"):
        read_secrets(tmp_path / "none")
    with pytest.raises(SecretError, match="plain file"):
        read_secrets(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(SecretError, match="plain file"):
        read_secrets(tmp_path / "pipe")  # and does not wait for a writer


def encoded(length: int) -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(length)).decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        base64.b64encode(secrets.token_bytes(32)).decode(),
        encoded(23),
        encoded(65),
        "whsec_not-base64!",
        f"{encoded(32)}\nwhsec_\n",
        f"{encoded(32)}\n" * (MAX_SECRETS + 1),
        f"{encoded(32)}\n#{'x' * 5000}",
    ],
)
def test_what_is_no_secret_is_refused_and_not_repeated(tmp_path: Path, text: str) -> None:
    path = private(tmp_path / "s", text)
    with pytest.raises(SecretError) as caught:
        read_secrets(path)
    told = str(caught.value)
    assert not [word for word in re.findall(r"[\w+/=!-]{12,}", text) if word in told]
