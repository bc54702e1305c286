"""Which SQL from a person may run against the audit trail: exactly one ``SELECT``.

The statement is parsed by DuckDB itself, never by patterns, and its syntax tree is walked:

1. one statement, and its type is SELECT (``DESCRIBE``, ``SHOW TABLES`` and ``VALUES`` are);
2. no node writes. NOTE: since DuckDB 2.0 the type alone says nothing: the body of a CTE may be an
   ``INSERT``, a ``DELETE`` or a ``COPY ... TO`` a file, and the statement is still a SELECT;
3. every table has a plain name, because DuckDB takes other names for files; and every table
   function is on a list. Those that read files, and those that take SQL as text or addresses in
   memory (``query``, ``json_execute_serialized_sql``, ``arrow_scan``), are not;
4. no function that makes a value of any length out of a few characters (``repeat``, ``lpad``,
   ``range`` as a list), that writes to DuckDB's log, or that tells of the process.

**What is bounded.** Time is (``time_limit``), and callers bound rows. Memory is bounded on a best
effort: DuckDB counts what its operators hold against ``memory_limit``, and not a single value while
a function makes it. Rule 4 takes the short ways to such a value and not every way there is, so give
this to people who may read the trail, and run it where being killed harms nothing.

This is the second of two locks. The first is the connection (``governance.audit.query.connect``),
which has no access to files at all; either alone is meant to hold.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import duckdb

MAX_SQL_BYTES: Final = 65_536
"""Longest statement, in bytes of UTF-8."""

_QUERY_NODES: Final = frozenset(
    {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE", "STATEMENT_NODE"}
)
_TABLE_FUNCTIONS: Final = frozenset(
    {"generate_series", "incident", "json_each", "json_tree", "range", "repeat", "unnest"}
)
_FUNCTIONS_DENIED: Final = frozenset(
    {
        # Length by a number, whatever the memory limit.
        "array_resize",
        "bar",
        "bitstring",
        "format",
        "generate_series",
        "list_resize",
        "lpad",
        "printf",
        "range",
        "repeat",
        "rpad",
        # Effects, and what is none of the trail.
        "currval",
        "getenv",
        "getvariable",
        "nextval",
        "parse_duckdb_log_message",
        "setseed",
        "write_log",
    }
)
_NAME: Final = re.compile(r"\w{1,64}", re.ASCII)


class NotASelect(ValueError):
    """The text is not exactly one statement that only reads the audit trail."""


class QueryTimeout(Exception):
    """A query took longer than it may."""


def check_select(sql: str) -> str:
    """Accept or refuse a statement.

    Args:
        sql: What somebody wants to run.

    Returns:
        The statement, as it was given.

    Raises:
        NotASelect: It is empty, too long, wrong, several, or not a pure SELECT.
    """
    try:
        size = len(sql.encode())
    except UnicodeEncodeError:
        raise NotASelect("not valid text") from None
    if size > MAX_SQL_BYTES:
        raise NotASelect(f"longer than {MAX_SQL_BYTES} bytes")
    if "\0" in sql:
        # NOTE: a parser in C and one in Python may disagree about where such a text ends.
        raise NotASelect("contains a zero byte")
    try:
        statements = duckdb.extract_statements(sql)
        kinds = [statement.type for statement in statements]
    except duckdb.Error as error:
        raise NotASelect(f"not valid SQL: {first_line(error)}") from None
    if not kinds:
        raise NotASelect("no statement")
    if len(kinds) > 1 and duckdb.StatementType.MULTI not in kinds:
        raise NotASelect(f"{len(kinds)} statements, and only one may run")
    if kinds != [duckdb.StatementType.SELECT]:
        raise NotASelect(f"{kinds[0].name} is not permitted, only SELECT")
    tables: set[int] = set()
    for node in _nodes(_tree(sql)):
        kind = node.get("type")
        if isinstance(kind, str) and kind.endswith("_NODE") and kind not in _QUERY_NODES:
            word = kind.removesuffix("_NODE").removesuffix("_QUERY")
            raise NotASelect(f"{word} within a SELECT is not permitted")
        if kind == "TABLE_FUNCTION":
            function = node.get("function") or {}
            tables.add(id(function))  # Met later, as the functions of columns are.
            name = str(function.get("function_name"))
            if name.lower() not in _TABLE_FUNCTIONS:
                raise NotASelect(f"table function {name} is not permitted")
        if node.get("class") == "FUNCTION" and id(node) not in tables:
            name = str(node.get("function_name"))
            if name.lower() in _FUNCTIONS_DENIED:
                raise NotASelect(f"function {name} is not permitted")
        if kind == "BASE_TABLE" and not _NAME.fullmatch(name := str(node.get("table_name"))):
            # A file, for DuckDB: FROM 'events.csv'.
            raise NotASelect(f"{name!r} is not the name of a view")
    return sql


def _tree(sql: str) -> dict[str, Any]:
    """The syntax tree, as DuckDB serialises it."""
    with duckdb.connect(config={"enable_external_access": "false"}) as parser:
        try:
            row = parser.execute("SELECT json_serialize_sql(?)", [sql]).fetchone()
            tree = json.loads(row[0]) if row else None
        except (duckdb.Error, ValueError, RecursionError):
            tree = None
    if not isinstance(tree, dict) or tree.get("error") is not False:
        # What cannot be looked into does not run.
        raise NotASelect("the statement cannot be examined")
    return tree


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object of a JSON value, without recursion."""
    waiting = [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def first_line(error: Exception) -> str:
    """The first line of a message of DuckDB's, without the class in front."""
    line = str(error).strip().split("\n", 1)[0]
    return line.split("Error: ", 1)[-1]


@contextmanager
def time_limit(connection: duckdb.DuckDBPyConnection, seconds: float) -> Iterator[None]:
    """Interrupt what the connection does within this block once the time is up.

    Raises:
        QueryTimeout: It took longer.
    """
    over, done = threading.Event(), threading.Event()

    def watch() -> None:
        if done.wait(seconds):
            return
        over.set()
        # Again and again: an interrupt between two statements, or two fetches, would be lost.
        while not done.is_set():
            connection.interrupt()
            done.wait(0.05)

    watcher = threading.Thread(target=watch, name="sql-time-limit", daemon=True)
    watcher.start()
    try:
        yield
    except duckdb.InterruptException:
        if not over.is_set():
            raise
        raise QueryTimeout(f"stopped after {seconds:g} s") from None
    finally:
        done.set()
        watcher.join()
