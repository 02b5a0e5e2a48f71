"""Managed transactions: the block that commits, or rolls back and re-raises; readers; and the decorator.

The rules stand in plans, once; `Transaction` and `AsyncTransaction` only carry them out.
"""

import asyncio
import functools
import inspect
from collections.abc import Callable
from enum import Enum
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar, cast

from sqlalchemy.orm import Session

from dbscope import scope as _scope
from dbscope import sqlite
from dbscope.errors import ConfigurationError, ReadOnlyError, ScopeMisuseError, TransactionInProgress
from dbscope.hooks import Hook, asettle, settle, title
from dbscope.lifecycle import Lifecycle, Owner, life_of
from dbscope.plan import OnSession, Plan, arun, finish, run
from dbscope.scope import Colour, PlacedScope, Scope, commit_owned, implicit_scope
from dbscope.where import Place, here, place_of, running_loop, spell

__all__ = ["AsyncTransaction", "Transaction", "transactional"]

SessionT = TypeVar("SessionT")
F = TypeVar("F", bound=Callable[..., Any])


class Kind(Enum):
    """What a block does where a managed transaction is open already."""

    REQUIRED = "join it"
    NESTED = "a savepoint in it"
    NEW = "an independent one beside it"
    READER = "a reader of its own"


class _Part(Enum):
    """What a block turned out to be, once entered."""

    ROOT = "begins and ends the transaction"
    JOINED = "works in the transaction of somebody else"
    SAVEPOINT = "begins and ends a savepoint"


class _Block(Generic[SessionT]):
    """What both colours share: the plans to begin and to end."""

    def __init__(self, source: Any, kind: Kind, name: str | None = None) -> None:
        self._source = source
        self._kind = kind
        self._name = name
        self._scope: Scope | None = None  # opened for this block alone
        self._session: Any = None
        self._savepoint: Any = None
        self._part: _Part | None = None

    # -- beginning ---------------------------------------------------------------------------------------------

    def _begin(self, frame: FrameType, colour: Colour) -> Plan[SessionT]:
        if self._part is not None:
            raise ScopeMisuseError(
                f"{self._title()} was entered again at {spell(here())}. Make a new one for each block: "
                f"`with db.{'reader' if self._kind is Kind.READER else 'transaction'}():`."
            )
        source = self._source
        home = self._home(source)
        life = None if home is None or not home.has(source) else life_of(home.open(source))
        owner = None if life is None else life.owner
        if self._kind is Kind.READER:
            if owner is not None and owner.reader:
                return self._join(home)
            own = self._own_scope(frame, colour)
            own.put(source, source.make_reader(own))
            life_of(own.open(source)).own(Owner(self._title(), place_of(frame), reader=True))
            return self._take(own, _Part.ROOT)
        if self._kind is Kind.NEW or home is None:
            own = self._own_scope(frame, colour)
            try:
                life_of(own.open(source)).own(self._owner(frame))
            except BaseException:
                own._state = _scope._ENDED
                own._leave()
                raise
            return self._take(own, _Part.ROOT)
        session = home.open(source)
        life = life_of(session)
        owner = life.owner
        if owner is None:
            yield from self._adopt(session, life, frame)
            return self._take(home, _Part.ROOT)
        if owner.reader:
            raise ReadOnlyError(
                f"a transaction was asked for at {spell(here())}, inside {owner}. A reader cannot become a writer.\n"
                "Open the transaction around the reader, or use `transaction(new=True)`."
            )
        life.refuse_doomed()
        if self._kind is Kind.NESTED:
            self._savepoint = yield OnSession(session, _begin_nested, begins=True)
            return self._take(home, _Part.SAVEPOINT)
        return self._join(home)

    def _home(self, source: Any) -> Scope | None:
        """The scope whose session the block uses; None if it opens one for itself."""
        home = _scope._get()
        if home is None or home.ended:  # what inherited a dead scope and opens a block does the right thing
            thread = implicit_scope() if running_loop() is None else None
            home = thread if thread is not None and thread.has(source) else None
        return home

    def _own_scope(self, frame: FrameType, colour: Colour) -> Scope:
        own = Scope(self._name)
        own._colour = colour
        own._enter(frame, block=self._name is None)
        self._scope = own
        return own

    def _take(self, home: Scope, part: _Part) -> SessionT:
        self._session = home.open(self._source)
        self._part = part
        return cast("SessionT", self._session)

    def _join(self, home: Scope | None) -> SessionT:
        return self._take(cast("Scope", home), _Part.JOINED)

    def _owner(self, frame: FrameType) -> Owner:
        return Owner(self._title(), place_of(frame), immediate=True)

    def _title(self) -> str:
        if self._kind is Kind.READER:
            return "the reader"
        return f"the transaction of {self._name}()" if self._name else "the transaction"

    def _adopt(self, session: Any, life: Lifecycle, frame: FrameType) -> Plan[None]:
        """Make what is open on the scope's session this block's own."""
        sync = getattr(session, "sync_session", session)
        if sync.in_nested_transaction():
            raise TransactionInProgress(
                f"{self._owner(frame)} found a savepoint open that nobody owns (`session.begin_nested()`).\n"
                "Open the transaction around it."
            )
        life.refuse_sibling("transaction()")
        life.own(self._owner(frame))
        if self._source.own_begin and life.connection is not None and life.shared is None:
            try:
                life.refuse_second_writer()
                life.acting = True
                yield OnSession(session, sqlite.restart)
            except BaseException:
                life.disown()
                raise
            finally:
                life.acting = False

    # -- ending ------------------------------------------------------------------------------------------------

    def _end(self, error: BaseException | None) -> Plan[tuple[BaseException | None, list[Hook]]]:
        if self._part is None:
            raise ScopeMisuseError(
                f"{self._title()} was left at {spell(here())}, but never entered. Use it in a `with`."
            )
        session = self._session
        life = life_of(session)
        if self._part is _Part.JOINED:
            if error is not None and self._kind is not Kind.READER and life.owner is not None:
                life.fail(getattr(session, "sync_session", session), "a block", error)
            return None, []
        if self._part is _Part.SAVEPOINT:
            return (yield from self._end_savepoint(session, life, error)), []
        if self._scope is not None:
            return (yield from self._scope._conclude(error))
        return (yield from self._end_adopted(session, life, error))

    def _end_savepoint(self, session: Any, life: Lifecycle, error: BaseException | None) -> Plan[BaseException | None]:
        savepoint = self._savepoint
        failure: BaseException | None = None
        if error is None:
            try:
                life.refuse_doomed()
                yield OnSession(session, lambda _: savepoint.commit(), begins=True)
                return None
            except BaseException as problem:
                failure = problem
        if _is_open(getattr(session, "sync_session", session), savepoint):
            try:
                yield OnSession(session, lambda _: savepoint.rollback(), begins=True)
            except BaseException as problem:
                failure = failure or problem
                life.fail(getattr(session, "sync_session", session), "the rollback to a savepoint", problem)
        return failure

    def _end_adopted(
        self, session: Any, life: Lifecycle, error: BaseException | None
    ) -> Plan[tuple[BaseException | None, list[Hook]]]:
        failure: BaseException | None = None
        committed = False
        try:
            if error is None:
                try:
                    if life.doom is not None:
                        raise life.rollback_only(life.doom)
                    yield OnSession(session, commit_owned)
                    committed = True
                except BaseException as problem:
                    failure = problem
            if not committed:
                try:
                    yield OnSession(session, _rollback_owned)
                except BaseException as problem:
                    failure = failure or problem
        finally:
            life.disown()
        hooks = life.take_hooks(committed=committed)
        if life.close_waits:
            life.close_waits = False
            yield OnSession(session, Session.close)
        return failure, hooks

    def _outcome(self, failure: BaseException | None, error: BaseException | None) -> None:
        if failure is None:
            return
        if error is None or not isinstance(failure, Exception):
            raise failure
        error.add_note(f"and {self._title()} failed to roll back: {failure!r}")

    def _leave(self) -> None:
        if self._scope is not None:
            self._scope._leave()


class Transaction(_Block[SessionT]):
    """A managed transaction: what `db.transaction()` and `db.reader()` return. Enter it once, with `with`."""

    def __enter__(self) -> SessionT:
        return run(self._begin(_scope._getframe(1), Colour.SYNC))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            failure, hooks = run(self._end(error))
            if hooks:
                run(settle(hooks, error or failure))
            self._outcome(failure, error)
        finally:
            self._leave()


class AsyncTransaction(_Block[SessionT]):
    """Async version of `Transaction`. Enter it once, with `async with`."""

    async def __aenter__(self) -> SessionT:
        return await arun(self._begin(_scope._getframe(1), Colour.ASYNC))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            plan = self._end(error)
            cancelled: asyncio.CancelledError | None = None
            if self._part in (_Part.ROOT, _Part.SAVEPOINT) and self._session.in_transaction():
                # In a task of its own: however often this one is cancelled, what is held is given back.
                (failure, hooks), cancelled = await finish(plan, forward=error is None)
            else:
                failure, hooks = await arun(plan)
            if hooks:
                await asettle(hooks, error or failure, cancelled)
            self._outcome(failure, error)
            if cancelled is not None and error is None:
                raise cancelled  # an error of the user's stays on top
        finally:
            self._leave()


def _begin_nested(session: Session) -> Any:
    return session.begin_nested()


def _is_open(session: Session, savepoint: Any) -> bool:
    """Whether a savepoint has yet to be ended: after a flush that failed it is not `is_active`, but in the way."""
    found: Any = session.get_nested_transaction()
    while found is not None and found is not savepoint:
        found = found.parent
    return found is savepoint


def _rollback_owned(session: Session) -> None:
    life = life_of(session)
    life.acting = True
    try:
        if life.broken:
            session.invalidate()
        else:
            session.rollback()
    finally:
        life.acting = False


def call_of(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], place: Place | None, *, is_async: bool
) -> Callable[[], Any]:
    """A call of the user's function, in a scope of its own.

    Raises:
        ConfigurationError: it is no function, or a coroutine function given to a sync database.
    """
    if not callable(function):
        raise ConfigurationError(f"a hook is a function, and its arguments follow it; this is {function!r}.")
    inner: Any = function
    while isinstance(inner, partial):
        inner = inner.func
    name = f"hook {title(function)}"
    if inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__):
        if not is_async:
            raise ConfigurationError(
                f"{title(function)} is a coroutine function, and a sync database has no loop to await it on. "
                "Give it a plain function, such as one that hands the work to a task queue."
            )

        async def awaited() -> None:
            async with PlacedScope(name, place):
                await function(*args, **kwargs)

        return awaited

    def called() -> None:
        with PlacedScope(name, place):
            function(*args, **kwargs)

    return called


# -- the decorator -----------------------------------------------------------------------------------------------


def transactional(source: Any, function: F, kind: Kind) -> F:
    """`function`, each call of which runs in a managed transaction of `source`."""
    what = _refuse_undecoratable(source, function)
    name = title(function)
    if what == "async":

        @functools.wraps(function)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            async with AsyncTransaction[Any](source, kind, name):
                return await function(*args, **kwargs)

        return cast("F", awaited)

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with Transaction[Any](source, kind, name):
            return function(*args, **kwargs)

    return cast("F", called)


def _refuse_undecoratable(source: Any, function: Any) -> str:
    """Which colour the function has; raise if a transaction around its call would not be one around its work."""
    if isinstance(function, staticmethod | classmethod | property):
        raise ConfigurationError(
            f"@transactional was put on a {type(function).__name__}. Put it below "
            f"@{type(function).__name__}, next to the function."
        )
    if not callable(function):
        raise ConfigurationError(f"@transactional decorates functions, not {function!r}.")
    inner: Any = function
    while isinstance(inner, partial):
        inner = inner.func
    call = inner if inspect.isroutine(inner) else type(inner).__call__
    if inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call):
        raise ConfigurationError(
            f"{title(function)} is a generator: calling it runs nothing yet, so the transaction would be over before "
            "its first line. Use `with db.transaction():` inside of it, under @contextmanager, or return a list."
        )
    is_async = inspect.iscoroutinefunction(call)
    if is_async and not source.is_async:
        raise ConfigurationError(
            f"{title(function)} is a coroutine function, and {source.name} is a sync database: it would block the "
            "loop. Use an AsyncDatabase, or `with db.transaction():` in a worker thread."
        )
    if source.is_async and not is_async:
        raise ConfigurationError(
            f"{title(function)} is a sync function, and {source.name} is an async database, which has to be awaited. "
            "Make it an `async def`, or use a Database."
        )
    return "async" if is_async else "sync"
