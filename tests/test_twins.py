"""The two colours are twins: the same public names and parameters, but for the differences listed here."""

import inspect
from typing import Any

import pytest

from dbscope import Database
from dbscope.registry import SessionRegistry
from dbscope.transaction import AsyncTransaction, Transaction
from tests.support import needs


@pytest.fixture
def twins() -> dict[str, tuple[type, type]]:
    """Each pair of classes, by the sync one's name."""
    needs.module("greenlet", extra="async")
    from dbscope.aio import AsyncDatabase, AsyncSessionRegistry

    return {
        "Database": (Database, AsyncDatabase),
        "SessionRegistry": (SessionRegistry, AsyncSessionRegistry),
        "Transaction": (Transaction, AsyncTransaction),
    }


def public(cls: type) -> set[str]:
    """The names of the class's public members."""
    return {name for name in dir(cls) if not name.startswith("_")}


def own(cls: type) -> set[str]:
    """The public methods that dbscope itself defines on the class, or on a base of its."""
    return {
        name
        for base in cls.__mro__
        if base.__module__.startswith("dbscope")
        for name, member in vars(base).items()
        if not name.startswith("_") and inspect.isfunction(member)
        if not hasattr(member, "__wrapped__")  # a registry's, which stands for the session's
    }


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    """What is given to a function: names, kinds and defaults."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_twins_databases_have_the_same_members(twins: dict[str, tuple[type, type]]) -> None:
    """`Database` and `AsyncDatabase` have the same public members."""
    sync, twin = twins["Database"]
    assert own(sync) == own(twin)
    assert public(sync) == public(twin)


def test_twins_databases_take_the_same_parameters(twins: dict[str, tuple[type, type]]) -> None:
    """Every method of theirs takes the same parameters; `implicit_scopes` alone is the sync constructor's."""
    sync, twin = twins["Database"]
    for name in sorted(own(sync)):
        assert parameters(getattr(sync, name)) == parameters(getattr(twin, name)), name
    made, made_twin = parameters(sync.__init__), parameters(twin.__init__)
    names = [name for name, *_ in made]
    assert names == ["self", "target", "name", "session_class", "implicit_scopes", "uncommitted", "outcome", "options"]
    defaults = {name: default for name, _, default in made if name not in ("implicit_scopes", "session_class")}
    assert defaults == {name: default for name, _, default in made_twin if name != "session_class"}


def test_twins_what_is_awaited(twins: dict[str, tuple[type, type]]) -> None:
    """Of the async database's methods these are awaited; the others decide or hand out, and wait for nothing."""
    _, twin = twins["Database"]
    assert {name for name in own(twin) if inspect.iscoroutinefunction(getattr(twin, name))} == {
        "check_capacity",
        "dispose",
        "fan_out",
        "run",
    }


def test_twins_both_are_context_managers_of_their_colour(twins: dict[str, tuple[type, type]]) -> None:
    """Databases and transactions are entered with `with` in one colour, and `async with` in the other, never both."""
    for name in ("Database", "Transaction"):
        sync, twin = twins[name]
        assert hasattr(sync, "__enter__")
        assert not hasattr(sync, "__aenter__")
        assert hasattr(twin, "__aenter__")
        assert not hasattr(twin, "__enter__")
        assert parameters(sync.__exit__) == parameters(twin.__aexit__)


def test_twins_transactions_have_the_same_members(twins: dict[str, tuple[type, type]]) -> None:
    """`Transaction` and `AsyncTransaction` have the same public members."""
    sync, twin = twins["Transaction"]
    assert public(sync) == public(twin)


def test_twins_registries_have_the_same_members(twins: dict[str, tuple[type, type]]) -> None:
    """The registries have the same members, but for those that SQLAlchemy's two session classes do not share."""
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
    from sqlalchemy.orm import Session, scoped_session

    sync, twin = twins["SessionRegistry"]
    sqlalchemys = public(Session) ^ public(AsyncSession) | public(scoped_session) ^ public(async_scoped_session)
    attributes = {"autobegin", "enable_baked_queries", "expire_on_commit", "hash_key", "join_transaction_mode"}
    assert (public(sync) - public(twin)) - sqlalchemys <= {*attributes, "twophase"}  # what Session's __init__ sets
    assert (public(twin) - public(sync)) - sqlalchemys <= {"sync_session"}
    assert parameters(sync.__call__) == parameters(twin.__call__)
    assert parameters(sync.remove) == parameters(twin.remove)


def test_twins_registries_stand_for_their_sessions(twins: dict[str, tuple[type, type]]) -> None:
    """Every public member of the session is one of the registry's."""
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

    sync, twin = twins["SessionRegistry"]
    assert public(Session) - public(sync) == set()
    assert public(AsyncSession) - public(twin) == set()


def test_twins_every_async_method_says_that_it_is_one(twins: dict[str, tuple[type, type]]) -> None:
    """The docstring of an async twin says "Async version of" or "Async …", and only the differences."""
    _, twin = twins["Database"]
    for name in own(twin) & set(vars(twin)) - {"run_hooks"}:
        assert (getattr(twin, name).__doc__ or "").startswith("Async version of"), name
