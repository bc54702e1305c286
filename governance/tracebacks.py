"""Where an exception came from, without what it says.

The message of a foreign exception may quote what it choked on: a prompt, a token, a path. A log
keeps classes, modules and lines, which is what finds a defect, and no message and no source line.
"""

from __future__ import annotations

import traceback

_MAX_CHAIN = 8


def without_messages(error: BaseException) -> str:
    """An exception and what it came from, as ``class: module:line in function < caller < ...``.

    Returns:
        One line for each exception of the chain, the last raised first.
    """
    lines: list[str] = []
    link: BaseException | None = error
    while link is not None and len(lines) < _MAX_CHAIN:
        frames = [
            f"{frame.f_globals.get('__name__', '?')}:{line} in {frame.f_code.co_name}"
            for frame, line in traceback.walk_tb(link.__traceback__)
        ]
        lines.append(f"{type(link).__qualname__}: {' < '.join(reversed(frames)) or 'no frames'}")
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "\n".join(lines)
