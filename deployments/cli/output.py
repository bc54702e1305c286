"""Tables for people, JSON for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click


def print_json(value: Any) -> None:
    """One JSON document on standard output; indented on a terminal."""
    click.echo(json.dumps(value, indent=2 if sys.stdout.isatty() else None, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], empty: str = "none") -> None:
    """Aligned columns: with colours on a terminal, tab-separated into a pipe.

    Args:
        columns: Headings.
        rows: Cells as text.
        empty: What to say when there are no rows.
    """
    if not rows:
        click.echo(empty, err=True)
        return
    if not sys.stdout.isatty():
        for row in rows:
            click.echo("\t".join(row))
        return
    # Imported late: a command without a table does without.
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # NOTE: ``Text``, because cells may hold what others wrote and must not act as markup.
        table.add_row(*(Text(printable(cell), style=_STYLES.get(cell, "")) for cell in row))
    Console().print(table)


_STYLES = {"ok": "green", "active": "green", "warn": "yellow", "expired": "yellow", "fail": "red"}
_STYLES["revoked"] = "red"


def printable(text: str) -> str:
    """Without control characters, which could steer the terminal; newline and tab stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
