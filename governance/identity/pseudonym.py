"""The name under which a principal appears everywhere but in its own credential.

Records, tickets, metrics and budgets carry this pseudonym and never the subject itself. It is
keyed, so that someone who holds the records but not the pepper cannot test guesses ("is this the
HR lead?"), which a plain hash of an e-mail address or an object id would allow.
"""

from __future__ import annotations

import hashlib
import hmac

PEPPER_BYTES = 32
"""Size of the pepper, in bytes; a shorter one would be weaker than the hash it keys."""


def principal_key(pepper: bytes, issuer: str, tenant: str | None, subject: str) -> str:
    """Pseudonym of a principal: HMAC-SHA256 over (issuer, tenant, subject).

    Each field is preceded by its length in eight bytes, so that no two different triples give the
    same input (``("a", "bc")`` and ``("ab", "c")`` do not meet). A tenant that is absent is told
    apart from one that is empty.

    Args:
        pepper: Secret of this installation, at least ``PEPPER_BYTES`` long. A new pepper gives
            everybody a new pseudonym.
        issuer: Configured name of the issuer, ``gatehouse`` for service keys.
        tenant: Tenant within the issuer, or ``None`` where the issuer has none.
        subject: Stable identifier within issuer and tenant.

    Returns:
        64 lower-case hexadecimal digits.

    Raises:
        ValueError: The pepper is too short.
    """
    if len(pepper) < PEPPER_BYTES:
        raise ValueError(f"the pepper must have at least {PEPPER_BYTES} bytes")
    mac = hmac.new(pepper, digestmod=hashlib.sha256)
    for field in (issuer, tenant, subject):
        data = b"" if field is None else b"\x01" + field.encode("utf-8", "surrogatepass")
        mac.update(len(data).to_bytes(8, "big"))
        mac.update(data)
    return mac.hexdigest()
