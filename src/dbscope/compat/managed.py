"""The managed session: `init_engine`, `init_session_factory`, and blocks that commit or roll back."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session, sessionmaker

from dbscope.compat.scoping import scoped_session
from dbscope.errors import RollbackOnlyError

__all__ = ["ManagedSession", "init_engine", "init_session_factory"]

# The names of the original, which programs read from the module.
engine: Engine | None = None
thread_safe_session_factory: scoped_session[Session] | None = None

_first: URL | None = None
_KEY = "dbscope.compat.managed"


class _Block:
    """The outermost block on a session."""

    failed: BaseException | None = None  # what an inner block raised


def init_engine(uri: str | URL, **kwargs: Any) -> Engine:
    """The engine of the process, made at the first call. Later calls return it, and warn if they name another URI.

    Args:
        uri: the database's URL.
        kwargs: options of `create_engine`, for the first call.
    """
    global engine, _first
    if engine is None:
        _first = make_url(uri)
        engine = create_engine(_first, **kwargs)
    elif (url := _parsed(uri)) != _first:
        second = repr(url) if url else "something that is no URL"
        warnings.warn(
            f"init_engine was called with {second}, but the engine was made for {_first!r} and stays so.\n"
            "For a second database, use `dbscope.Database`.",
            stacklevel=2,
        )
    return engine


def _parsed(uri: str | URL) -> URL | None:
    try:
        return make_url(uri)
    except ArgumentError:
        return None


def init_session_factory() -> "scoped_session[Session]":
    """The registry of the process, made at the first call.

    Raises:
        ValueError: `init_engine` was not called before.
    """
    global thread_safe_session_factory
    if engine is None:
        raise ValueError("Initialize engine by calling init_engine before calling init_session_factory!")
    if thread_safe_session_factory is None:
        thread_safe_session_factory = scoped_session(sessionmaker(bind=engine))
    return thread_safe_session_factory


@contextmanager
def ManagedSession() -> Iterator[Session]:
    """A block on the scope's session, or outside of scopes the thread's: committed at its end, and removed.

    An error rolls back and is raised as it was. A block inside another joins it: the outer one commits or rolls back
    the work of both.

    Raises:
        ValueError: on entering, if `init_session_factory` was not called before.
        RollbackOnlyError: on leaving, if a block inside failed and its error was hidden.
    """
    registry = thread_safe_session_factory
    if registry is None:
        raise ValueError("Call init_session_factory before using ManagedSession!")
    session = registry()
    outer: _Block | None = session.info.get(_KEY)
    if outer is not None:
        try:
            yield session
        except BaseException as error:
            outer.failed = outer.failed or error
            raise
        return
    block = session.info[_KEY] = _Block()
    try:
        yield session
        if block.failed is not None:
            raise RollbackOnlyError(
                f"a ManagedSession inside of this one failed with {block.failed!r}, and the error was hidden: the "
                "work of both is rolled back.\nLet the error out, or use a savepoint (`session.begin_nested()`)."
            ) from block.failed
        session.commit()
    except BaseException as error:
        for clean_up in (session.rollback, registry.remove):
            try:
                clean_up()
            except Exception as failure:
                error.add_note(f"and its session failed to be given back: {failure!r}")
        raise
    else:
        registry.remove()
    finally:
        session.info.pop(_KEY, None)
