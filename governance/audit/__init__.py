# Not quite empty: ``governance.audit.connect()`` is what notebooks call. It is found when it is
# asked for, so that importing this package imports nothing and the request path loads no DuckDB.
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from governance.audit.query import connect as connect


def __getattr__(name: str) -> Any:
    if name == "connect":
        from governance.audit.query import connect

        return connect
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
