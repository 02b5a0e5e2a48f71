"""Jobs for other processes, which import this module: with `spawn` and `forkserver` it is all that they get."""

import os
from typing import Any

from sqlalchemy import text

import dbscope
from tests.support.kits import Payment

_db: Any = None


def connect(url: str) -> None:
    """The initializer of a pool: a database of the process's own."""
    global _db
    _db = dbscope.Database(url)


def use(db: Any) -> None:
    """In the parent, before a fork: the database that its children inherit."""
    global _db
    _db = db


def backend() -> int:
    """The process of the server's that serves the current session's connection."""
    pid: int = _db.session.scalar(text("SELECT pg_backend_pid()"))
    return pid


@dbscope.scope("job", commit="on-success")
def pay(amount: int) -> dict[str, Any]:
    """One job, in a scope of its own."""
    _db.session.add(Payment(amount=amount))
    current = dbscope.current_scope()
    assert current is not None
    return {"pid": os.getpid(), "backend": backend(), "inside": current.is_inside, "name": current.name}


def look() -> dict[str, Any]:
    """One job that opens no scope."""
    current = dbscope.current_scope()
    return {"scope": None if current is None else current.name, "session": id(_db.session()), "backend": backend()}


def forget(amount: int) -> None:
    """One job that opens no scope, and forgets to commit."""
    _db.session.add(Payment(amount=amount))
    _db.session.flush()


def nothing(*_: Any) -> None:
    """One job that takes what it is given."""
