"""Content cells: one piece of a prompt or an answer, encrypted and committed to.

**Cell.** ``plaintext = salt (32 random bytes) || encoded content``, encrypted with AES-256-GCM
under a data key (``governance.audit.keystore``). ``encoding`` is ``identity`` or ``deflate``, the
zlib format of RFC 1950. The additional data are length-prefixed (u32, big-endian, then UTF-8), in
this order: ``gatehouse-cell``, schema version, event_id, kind, part (decimal), department, media,
encoding. A ciphertext moved to another event, part, department or format does not open.

**Commitment.** ``commit = SHA-256(salt || content)``, over the content before encoding. The salt is
inside the ciphertext, so a commitment says nothing about a guessable text once the key is gone, and
opening a cell proves that the text is the one that was recorded. The prompt is one cell, part 0,
and ``prompt_commit`` is its commit. An answer has any number of parts, counted from 0, and
``response_commit = SHA-256(0x01 || commit_0 || commit_1 || ...)``, also for a single part; where
nothing was released it is null. Every cell carries its commit in the open, so that a missing part
is seen without a key.

**Nonces.** 96 random bits for each cell: keys are shared by processes that cannot count together.
With n cells under one key two nonces agree with a probability below n^2 / 2^97; NIST SP 800-38D,
section 8.3, allows 2^32 cells, where it is below 2^-33. A data key lasts one month at most: 2^32
cells are 1,600 a second, all month, by one subject.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Literal

import orjson
from cryptography.exceptions import InvalidTag

from governance.audit.hashing import sha256_of
from governance.audit.keystore import DataKey
from governance.audit.schema import SCHEMA_VERSION

CellKind = Literal["input", "output"]
Encoding = Literal["identity", "deflate"]

SALT_BYTES: Final = 32
NONCE_BYTES: Final = 12
_COMMIT_BYTES: Final = 32
_DOMAIN: Final = b"gatehouse-cell"
_DEFLATE_FROM_BYTES: Final[dict[CellKind, int]] = {"input": 4 << 10, "output": 512}
"""Shorter pieces are not worth what deflating costs: 45 us for 2 KiB of prose, of which half stays.
Answers are event streams, which repeat themselves: 10 us for 4 KiB, of which a twentieth stays."""
_SMALL_BYTES: Final = 16 << 10
_SAMPLE_BYTES: Final = 4 << 10
_WORTH: Final = 0.7
"""Larger shares of its length are not worth 20 ms a megabyte."""
_SMALL_WINDOW: Final = 12
_SMALL_MEMORY: Final = 4
_HEAD = struct.Struct("<H")
_LENGTH = struct.Struct(">I")

_VERSION = str(SCHEMA_VERSION).encode()
_AAD_HEAD: Final = b"".join(
    (_LENGTH.pack(len(_DOMAIN)), _DOMAIN, _LENGTH.pack(len(_VERSION)), _VERSION)
)


class CellError(ValueError):
    """A cell does not open: wrong key, altered, moved, or not what was committed to."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One encrypted piece of content."""

    event_id: str
    """Record that it belongs to: the ``inference.decided``, or the refusal."""
    kind: CellKind
    part: int
    """Place among the cells of this event and kind, from 0."""
    media: str
    """Media type of the content."""
    encoding: Encoding
    department: str
    dek_id: str
    nonce: bytes
    ciphertext: bytes
    size_bytes: int
    """Length of the content before encoding."""
    ts_us: int
    """When it was sealed."""
    commit: bytes
    """SHA-256 over salt and content; 32 bytes."""


def seal_cell(
    key: DataKey,
    *,
    event_id: str,
    kind: CellKind,
    part: int,
    media: str,
    content: bytes,
    ts_us: int,
    random_bytes: Callable[[int], bytes],
) -> Cell:
    """Encrypt one piece of content: 5 µs, and what deflating takes."""
    randomness = random_bytes(SALT_BYTES + NONCE_BYTES)
    salt, nonce = randomness[:SALT_BYTES], randomness[SALT_BYTES:]
    encoded, encoding = _encode(content, kind)
    aad = _aad(event_id, kind, part, key.department, media, encoding)
    return Cell(
        event_id=event_id,
        kind=kind,
        part=part,
        media=media,
        encoding=encoding,
        department=key.department,
        dek_id=key.id,
        nonce=nonce,
        ciphertext=key.cipher.encrypt(nonce, salt + encoded, aad),
        size_bytes=len(content),
        ts_us=ts_us,
        commit=sha256_of(salt, content).digest(),
    )


def open_cell(key: DataKey, cell: Cell) -> bytes:
    """The content of a cell, checked against its commitment.

    Raises:
        CellError: It does not open.
    """
    aad = _aad(cell.event_id, cell.kind, cell.part, cell.department, cell.media, cell.encoding)
    try:
        plaintext = key.cipher.decrypt(cell.nonce, cell.ciphertext, aad)
    except (InvalidTag, ValueError):
        raise CellError("the cell does not open with this key") from None
    if len(plaintext) < SALT_BYTES:
        raise CellError("the cell is shorter than its salt")
    salt, encoded = plaintext[:SALT_BYTES], plaintext[SALT_BYTES:]
    content = _decode(encoded, cell.encoding, cell.size_bytes)
    if len(content) != cell.size_bytes or sha256(salt + content).digest() != cell.commit:
        raise CellError("the cell opens, but its content is not what was committed to")
    return content


def joined_commit(commits: Iterable[bytes]) -> str:
    """``response_commit`` of an answer's parts in order, hex; 1 part at least."""
    return sha256(b"\x01" + b"".join(commits)).hexdigest()


def pack_cell(cell: Cell) -> bytes:
    """Payload of a CELL frame: u16 length and JSON of the open fields, nonce, commit, ciphertext.

    The length is little-endian like all of a log's.
    """
    head = orjson.dumps(
        (
            cell.event_id,
            cell.kind,
            cell.part,
            cell.media,
            cell.encoding,
            cell.department,
            cell.dek_id,
            cell.size_bytes,
            cell.ts_us,
        )
    )
    return b"".join((_HEAD.pack(len(head)), head, cell.nonce, cell.commit, cell.ciphertext))


def unpack_cell(payload: bytes) -> Cell:
    """The cell in the payload of a CELL frame.

    Raises:
        ValueError: It is none.
    """
    try:
        (length,) = _HEAD.unpack_from(payload)
        head = orjson.loads(payload[_HEAD.size : _HEAD.size + length])
        event_id, kind, part, media, encoding, department, dek_id, size, ts_us = head
    except (struct.error, TypeError, ValueError):
        raise ValueError("not a content cell") from None
    texts = (event_id, media, department, dek_id)
    if (
        any(type(text) is not str for text in texts)
        or kind not in ("input", "output")
        or encoding not in ("identity", "deflate")
        or any(type(number) is not int or number < 0 for number in (part, size, ts_us))
    ):
        raise ValueError("not a content cell")
    at = _HEAD.size + length
    nonce_end, commit_end = at + NONCE_BYTES, at + NONCE_BYTES + _COMMIT_BYTES
    if len(payload) < commit_end:
        raise ValueError("not a content cell")
    return Cell(
        event_id=event_id,
        kind=kind,
        part=part,
        media=media,
        encoding=encoding,
        department=department,
        dek_id=dek_id,
        nonce=payload[at:nonce_end],
        ciphertext=payload[commit_end:],
        size_bytes=size,
        ts_us=ts_us,
        commit=payload[nonce_end:commit_end],
    )


def _aad(event_id: str, kind: str, part: int, department: str, media: str, encoding: str) -> bytes:
    pieces = [_AAD_HEAD]
    for text in (event_id, kind, str(part), department, media, encoding):
        data = text.encode()
        pieces += (_LENGTH.pack(len(data)), data)
    return b"".join(pieces)


def _encode(content: bytes, kind: CellKind) -> tuple[bytes, Encoding]:
    if len(content) < _DEFLATE_FROM_BYTES[kind]:
        return content, "identity"
    if len(content) > _SMALL_BYTES and not _pays(content):
        return content, "identity"
    if len(content) <= _SMALL_BYTES:
        # 24 KiB of state instead of 268: less than malloc gives back to the system each time.
        deflater = zlib.compressobj(1, zlib.DEFLATED, _SMALL_WINDOW, _SMALL_MEMORY)
        deflated = deflater.compress(content) + deflater.flush()
    else:
        deflated = zlib.compress(content, 1)
    return (deflated, "deflate") if len(deflated) < len(content) else (content, "identity")


def _pays(content: bytes) -> bool:
    """Whether a piece from the middle gets smaller enough; base64 of noise (0.76) does not."""
    middle = len(content) // 2
    sample = content[middle : middle + _SAMPLE_BYTES]
    return len(zlib.compress(sample, 1)) < len(sample) * _WORTH


def _decode(encoded: bytes, encoding: Encoding, size: int) -> bytes:
    if encoding == "identity":
        return encoded
    inflater = zlib.decompressobj()
    try:
        # Bounded by what the cell says it holds; a single byte more shows that it lies.
        content = inflater.decompress(encoded, size + 1)
    except zlib.error:
        raise CellError("the cell opens, but does not inflate") from None
    if not inflater.eof:
        raise CellError("the cell opens, but does not end where it says")
    return content
