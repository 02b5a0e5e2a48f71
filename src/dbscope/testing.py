"""For your tests: databases whose work is undone after each test, captured hooks, and a check that nothing stays open.

`sandbox` keeps one connection in a transaction that is never committed, and lets every session work on it, each inside
of a savepoint of its own: what the code under test commits is released into that transaction, and rolled back with it.

A savepoint lives inside of the ones begun before it, and independent transactions do not. Where that would show, the
rules are: a session that has only read never undoes what others saved meanwhile, and is never in their way; two that
have written must end in the reverse order of their beginning, and where they do not, the error names both.
"""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from threading import Lock
from types import TracebackType
from typing import Any, Self, cast
from weakref import WeakSet

from sqlalchemy.engine import Connection, NestedTransaction, Transaction
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from dbscope.database import BaseDatabase
from dbscope.errors import (
    ConfigurationError,
    LeftOpenError,
    NotTheOwnerError,
    OverlapError,
    ScopeEndedError,
    ScopeMisuseError,
)
from dbscope.implicit import implicit_scope
from dbscope.lifecycle import End, Lifecycle, life_of
from dbscope.plan import to_completion
from dbscope.scope import Colour, Scope, open_scopes_of_this_context
from dbscope.session import ScopedSession, release
from dbscope.statements import Kind
from dbscope.where import Place, Worker, here, name_of, spell, worker

__all__ = ["CapturedHook", "LeftOpenError", "capture_on_commit", "sandbox"]

_CLEAN_UP = frozenset({"close", "rollback", "reset", "invalidate"})


class sandbox:  # as `scope`: used as a word, not as a type
    """A block after which the databases are as before: for one test, or for the data that several tests share.

    Use it with `with`, or with `async with` where one of the databases is async. Sessions that are made meanwhile, in
    whichever scope, thread or task, work on one connection for each database; what they commit is seen by the others,
    and gone after the block. A sandbox inside another undoes its own part.

    Args:
        databases: a `Database` or `AsyncDatabase`, or several.
        name: what errors call the test; pytest's own name for the running one, if not given.

    Raises:
        LeftOpenError: at the end, if a scope that was opened meanwhile is still open, or a connection still out. They
            are closed all the same, and whoever goes on with them gets an error that names the test.
        ConfigurationError: at the beginning, for what is no database, or one whose sessions use other engines, too.
        ScopeMisuseError: at the beginning, if a session that this code would go on with holds a connection.

    >>> from dbscope import Database
    >>> from sqlalchemy import text
    >>> db = Database("sqlite://")
    >>> with db.transaction() as session:
    ...     _ = session.execute(text("CREATE TABLE notes (body TEXT)"))
    >>> with sandbox(db):
    ...     with db.transaction() as session:
    ...         _ = session.execute(text("INSERT INTO notes VALUES ('a test')"))
    >>> with db.reader() as session:
    ...     session.scalar(text("SELECT count(*) FROM notes"))
    0
    >>> db.dispose()
    """

    def __init__(self, *databases: BaseDatabase, name: str | None = None) -> None:
        if not databases:
            raise ConfigurationError("a sandbox is made for at least one database: sandbox(db).")
        for database in databases:
            if not isinstance(database, BaseDatabase):
                raise ConfigurationError(f"a sandbox takes a Database or an AsyncDatabase, not {database!r}.")
            for bind in (database._maker.kw.get("binds") or {}).values():
                if getattr(bind, "sync_engine", bind) is not database._sync_engine:
                    raise ConfigurationError(
                        f"sessions of {database.name} use {bind!r}, too, by their option `binds`; a sandbox undoes the "
                        "work of one engine. Make a Database for each engine, and a sandbox of both."
                    )
        self._databases = databases
        self.name = name or _running_test() or f"the sandbox opened at {spell(here())}"
        self._entered = False
        self._levels: list[_Level] = []
        self._around: list[Scope] = []

    def __enter__(self) -> Self:
        for database in self._databases:
            if database.is_async:
                raise ConfigurationError(
                    f"{database.name} is an async database, whose sandbox has to be awaited: "
                    "`async with sandbox(...):`, in a fixture that is an `async def`."
                )
        self._enter()
        with ExitStack() as stack:
            for database in self._databases:
                level = _Level(database, self.name)
                level.set_aside()
                stack.callback(level.put_back)
                level.take(None if level.inside else cast("Any", database).engine.connect())
                stack.callback(level.give_back)
                level.begin()
                self._levels.append(level)
            self._stack: Any = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        problems, leaked = self._leave()
        failure: BaseException | None = None
        for scope in leaked:
            failure = _trying(failure, scope.__exit__, LeftOpenError, LeftOpenError(), None)
        for level in reversed(self._levels):
            level.wind_up(None, self._around)
            failure = failure or level.reported
        failure = _trying(failure, self._stack.close)
        self._outcome(problems, failure, error)

    async def __aenter__(self) -> Self:
        self._enter()
        async with AsyncExitStack() as stack:
            for database in self._databases:
                level = _Level(database, self.name)
                level.set_aside()
                stack.callback(level.put_back)
                if not database.is_async:
                    level.take(None if level.inside else cast("Any", database).engine.connect())
                    stack.callback(level.give_back)
                    level.begin()
                else:
                    level.take(None if level.inside else await cast("Any", database).engine.connect())
                    stack.push_async_callback(level.agive_back)
                    await level.asyncio.run_sync(level.begin)
                self._levels.append(level)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        problems, leaked = self._leave()
        failure: BaseException | None = None
        for scope in leaked:
            try:
                await scope.__aexit__(LeftOpenError, LeftOpenError(), None)
            except Exception as problem:
                failure = failure or problem
        failure = await to_completion(asyncio.ensure_future(self._awind_up(failure)))
        self._outcome(problems, failure, error)

    async def _awind_up(self, failure: BaseException | None) -> BaseException | None:
        for level in reversed(self._levels):
            if level.database.is_async:
                await level.asyncio.run_sync(level.wind_up, self._around)
            else:
                level.wind_up(None, self._around)
            failure = failure or level.reported
        try:
            await self._stack.aclose()
        except Exception as problem:
            failure = failure or problem
        return failure

    def _enter(self) -> None:
        if self._entered:
            raise ScopeMisuseError(
                f"the sandbox of {self.name} was entered again. Make one for each test: sandbox(db)."
            )
        self._entered = True
        self._around = open_scopes_of_this_context()

    def _leave(self) -> tuple[list[str], list[Scope]]:
        """What was left open, and the scopes of this context among it, the innermost first."""
        leaked = [scope for scope in open_scopes_of_this_context() if scope not in self._around]
        problems = [f"{scope.describe()} is still open" for scope in leaked]
        for level in self._levels:
            problems += level.left_open({*self._around, *leaked})
        return problems, leaked

    def _outcome(self, problems: list[str], failure: BaseException | None, error: BaseException | None) -> None:
        if problems:
            found = LeftOpenError(
                f"{self.name} ended, but {'; and '.join(problems)}.\n"
                "Leave every scope and session in the test that opened it, and wait for the threads and tasks it began."
            )
            if failure is not None:
                found.add_note(f"and then: {failure!r}")
            failure = found
        if failure is None:
            return
        if error is None:
            raise failure
        error.add_note(f"and {failure}")


def _trying(failure: BaseException | None, call: Callable[..., Any], *args: Any) -> BaseException | None:
    try:
        call(*args)
    except Exception as problem:
        return failure or problem
    return failure


def _running_test() -> str | None:
    """What pytest calls the test that it is running, without needing pytest."""
    test = os.environ.get("PYTEST_CURRENT_TEST")
    return f"test {test.rpartition(' (')[0]}" if test else None


class _Level:
    """One database in one sandbox."""

    def __init__(self, database: BaseDatabase, name: str) -> None:
        self.database = database
        self.name = name
        self.inside = database.shared is not None
        self.asyncio: Any = None  # the AsyncConnection, if it is one
        self.root: Transaction
        self.made: WeakSet[ScopedSession] = WeakSet()
        self.aside: list[tuple[Scope, Any]] = []
        self.reported: BaseException | None = None
        self.before = 0

    # -- beginning ---------------------------------------------------------------------------------------------

    def take(self, connection: Any) -> None:
        """Work on a new connection, or on that of the sandbox around this one."""
        database = self.database
        if connection is None:
            self.shared = cast("_Shared", database.shared)
            self.asyncio = self.shared.asyncio
        else:
            self.asyncio = connection if database.is_async else None
            self.shared = _Shared(database, connection)

    def begin(self, _: Any = None) -> None:
        """Begin what will be rolled back, and let the database's sessions share it."""
        database, shared = self.database, self.shared
        if self.inside:
            self.root = shared.connection.begin_nested()
            cast("_Savepoint", self.root).session = None
            cast("_Savepoint", self.root).dirty = True
        else:
            self.root = shared.begin()
        self.outer, shared.level = shared.level, self
        self.before = _checked_out(database)
        database.shared = shared

    def set_aside(self) -> None:
        """Sessions that are there already do not work on the shared connection: they come back after the test."""
        database = self.database
        for home in filter(None, [*open_scopes_of_this_context(), implicit_scope()]):
            if not home.has(database):
                continue
            session = home.open(database)
            if session.in_transaction():
                raise ScopeMisuseError(
                    f"{self.name} cannot have a sandbox of {database.name}: a session of {home.describe()} holds a "
                    f"connection since {spell(life_of(session).taken)}.\n"
                    "End its transaction first, or open its scope inside of the sandbox."
                )
            self.aside.append((home, session))
        for home, _ in self.aside:
            home.forget(database)

    def put_back(self) -> None:
        """Let the sessions that were there before be found again."""
        for home, session in self.aside:
            if not home.ended:
                home.put(self.database, session)

    # -- ending ------------------------------------------------------------------------------------------------

    def left_open(self, known: set[Scope]) -> list[str]:
        """What work begun in this sandbox still holds; not what the scopes hold that were there before it."""
        found = []
        for session in self.made:
            life = life_of(session)
            home = cast("Scope | None", life.home)
            if life.ended is not None or home in known:
                continue
            if home is not None and home._colour is Colour.IMPLICIT and home is implicit_scope():
                continue  # it lasts as long as its thread
            if life.connection is not None:
                found.append(f"{life.whose} holds a connection of {self.database.name} since {spell(life.taken)}")
            elif home is not None and not home.ended and home._colour is not Colour.IMPLICIT:
                found.append(f"{home.describe()} is still open")
        lost = _checked_out(self.database) - self.before
        if lost > 0:
            found.append(
                f"{lost} connection{'s' if lost > 1 else ''} taken from the engine of {self.database.name} "
                f"{'are' if lost > 1 else 'is'} still checked out"
            )
        return found

    def wind_up(self, _: Any, around: list[Scope]) -> None:
        """End every session that was made in this sandbox, the last one first."""
        database, shared = self.database, self.shared
        shared.winding_up = True
        sessions = sorted(self.made, key=shared.depth, reverse=True)
        for session in sessions:
            life = life_of(session)
            home = cast("Scope | None", life.home)
            if life.ended is None and home is not None and life.owner is None:
                place = life.unsaved(session)
                if place is not None and (home in around or home._colour is Colour.IMPLICIT):
                    self.reported = home._report(database, place, self.reported)
            title = home.describe() if home is not None else f"{database.name}"
            life.ended = life.ended or End(title, how=f"{self.name} ended")
            if home is None or not (home in around or home._colour is Colour.IMPLICIT):
                continue
            if home.has(database) and life_of(home.open(database)) is life:
                home.forget(database)  # it goes on after the test, with another session
        for session in sessions:
            try:
                release(session)
            except Exception as problem:
                self.reported = self.reported or problem
        shared.level = self.outer
        shared.winding_up = False
        if self.inside:
            self.root.rollback()
        else:
            database.shared = None

    def give_back(self) -> None:
        """Roll back, and give the connection back."""
        if not self.inside:
            self.database.shared = None
            self.shared.roll_back()
            self.shared.connection.close()

    async def agive_back(self) -> None:
        """Async version of `give_back`: the connection belongs to the test's loop, so it is not left in the pool."""
        if not self.inside:
            self.database.shared = None
            await self.asyncio.run_sync(self.shared.roll_back)
            await self.asyncio.close()


def _checked_out(database: BaseDatabase) -> int:
    count = getattr(database._sync_engine.pool, "checkedout", None)  # SQLite's pools of one thread do not count
    return 0 if count is None else int(count())


# -- the connection that all sessions share --------------------------------------------------------------------------


class _Shared:
    """A connection, and the savepoints that are open on it: one for each session, the oldest first."""

    def __init__(self, database: BaseDatabase, connection: Any) -> None:
        self.database = database
        self.asyncio = connection if database.is_async else None
        sync: Any = connection.sync_connection if database.is_async else connection
        kw = database._maker.kw
        self.options: dict[str, Any] = {"bind": connection, "join_transaction_mode": "create_savepoint"}
        if kw.get("twophase"):
            self.options["twophase"] = False
        if kw.get("binds"):
            self.options["binds"] = dict.fromkeys(kw["binds"], connection)
        sync.__class__ = _SharedConnection
        sync._shared = self
        sync._dbscope = None
        self.connection: _SharedConnection = sync
        self.level: _Level | None = None
        self.over = False
        self.winding_up = False
        self.savepoints: list[_Savepoint] = []
        self._turn = Lock()
        self._user: Worker | None = None
        self._using: list[ScopedSession] = []

    def begin(self) -> Transaction:
        """Begin the transaction that is rolled back in the end."""
        connection = self.connection
        root = connection.begin()
        if self.database._sync_engine.dialect.name == "sqlite":
            driver: Any = connection.connection.driver_connection
            if not driver.in_transaction:  # or the first savepoint would begin it, and its release commit it
                connection.exec_driver_sql("BEGIN IMMEDIATE")
        return root

    def roll_back(self, _: Any = None) -> None:
        """Undo everything; a connection on which that fails, or that a loop owns, is closed for good."""
        connection = self.connection
        self.over = True
        root = connection.get_transaction()
        try:
            if root is not None:
                root.rollback()
        except Exception:
            connection.invalidate()
        else:
            if self.asyncio is not None and not connection.invalidated:
                connection.invalidate()  # not detached: what SQLAlchemy detaches of psycopg's it never closes

    def adopt(self, session: ScopedSession, life: Lifecycle) -> None:
        """A session was made that works on the connection."""
        life.shared = self
        cast("_Level", self.level).made.add(session)

    def depth(self, session: ScopedSession) -> int:
        """How many savepoints were open before the session's own; -1 if it has none."""
        return next((i for i, savepoint in enumerate(self.savepoints) if savepoint.session is session), -1)

    # -- what sessions do --------------------------------------------------------------------------------------

    @contextmanager
    def using(self, session: ScopedSession, use: str) -> Iterator[None]:
        """Around each call of a session that may talk to the database."""
        if self.winding_up or (use in _CLEAN_UP and not session.in_transaction()):
            yield  # that touches nobody's work, or is the end of everybody's
            return
        me = worker()
        if not self._turn.acquire(False) and self._user != me:
            raise OverlapError(
                f"session.{use}() was called by {name_of(me)} at {spell(here())}, while {name_of(self._user)} is "
                f"using the one connection of {self._name()}.\n{_ALONE}"
            )
        self._user = me
        self._using.append(session)
        self.connection._dbscope = session
        try:
            if use not in _CLEAN_UP:
                self._refuse(session)
            yield
            if use == "connection":  # it has a savepoint now, if it had none
                self._wrote(session)  # what is done with it cannot be seen
        except DBAPIError:
            if self._own(session):
                self._own(session)[-1].dirty = True  # PostgreSQL refuses everything until this is rolled back
            raise
        finally:
            self._using.pop()
            if self._using:
                self.connection._dbscope = self._using[-1]
            else:
                self._turn.release()

    def statement(self, session: Session, kind: Kind, text: str) -> None:
        """A session is about to execute a statement other than a plain read."""
        if kind is Kind.WRITE:
            self._wrote(cast("ScopedSession", session))
        elif kind is Kind.CONTROL and life_of(session).owner is None:
            raise _not_to_be_ended(repr(" ".join(text.split())[:40]), self)

    def _name(self) -> str:
        return f"the sandbox of {self.level.name if self.level else 'a test'}"

    def _own(self, session: Session) -> "list[_Savepoint]":
        return [savepoint for savepoint in self.savepoints if savepoint.session is session]

    def _refuse(self, session: ScopedSession) -> None:
        if self.connection.invalidated:
            raise ScopeEndedError(
                f"{self._name()} has lost its connection, and with it all that the test had done: "
                f"nothing can be done by {name_of(worker())} at {spell(here())}.\n"
                "A task that is cancelled, or a thread that is interrupted, in the middle of a statement loses it. "
                "Give tests of that a database of their own."
            )
        for savepoint in self._own(session):
            if savepoint.lost is not None:
                raise OverlapError(savepoint.lost)

    def _wrote(self, session: ScopedSession) -> None:
        own = self._own(session)
        if own:
            self._uncover(session)
            own[-1].dirty = True

    def _uncover(self, session: ScopedSession) -> None:
        """Take the savepoints of others away from above the session's: they must not undo what it does."""
        own = self._own(session)
        if not own:
            return
        if own[-1].lapsed:
            raise OverlapError(
                f"a session was to write at {spell(here())}, whose transaction (since {spell(own[-1].place)}) began "
                f"inside of another one on the one connection of {self._name()}, which has gone on since.\n{_ALONE}"
            )
        above = self.above(own[-1])
        for savepoint in above:
            if savepoint.dirty:
                raise self.overlap(own[-1], savepoint)
        self.drop(above)

    def above(self, savepoint: "_Savepoint") -> "list[_Savepoint]":
        """The savepoints that were begun after this one, and are still open."""
        return self.savepoints[self.savepoints.index(savepoint) + 1 :]

    def drop(self, above: "list[_Savepoint]") -> None:
        """Forget savepoints, the newest ones: nothing is sent for them any more."""
        for savepoint in reversed(above):
            savepoint.lapsed = True
            savepoint._deactivate_from_connection(warn=False)
            self.savepoints.remove(savepoint)
            self.savepoints.insert(0, savepoint)  # below everything: it undoes nothing, and is in nobody's way

    def overlap(self, one: "_Savepoint", other: "_Savepoint") -> OverlapError:
        """The error for two that have written, and do not end in the reverse order of beginning."""
        return OverlapError(
            f"{_whose(one)} (in a transaction since {spell(one.place)}) went on at {spell(here())}, while "
            f"{_whose(other)} (since {spell(other.place)}) was in the middle of a transaction that has written, on the "
            f"one connection of {self._name()}.\n{_ALONE}"
        )


_ALONE = (
    "In a sandbox work that writes goes one after the other, or one inside of the other. "
    "Give tests of work that runs side by side a database of their own, which they empty afterwards."
)


def _whose(savepoint: "_Savepoint") -> str:
    home = None if savepoint.session is None else life_of(savepoint.session).home
    return "a session outside of every scope" if home is None else home.describe()


def _not_to_be_ended(what: str, shared: _Shared) -> NotTheOwnerError:
    return NotTheOwnerError(
        f"{what} was called at {spell(here())}, on the one connection of {shared._name()}, whose transaction ends "
        "with the test.\nUse `session.commit()` and `session.rollback()`, or `db.transaction()`."
    )


class _SharedConnection(Connection):
    """The connection itself: nobody but the sandbox ends its transaction."""

    _shared: _Shared
    _dbscope: ScopedSession | None

    def begin_nested(self) -> NestedTransaction:
        """Begin a savepoint: of a session's transaction, or in one."""
        return _Savepoint(self)

    def commit(self) -> None:
        """Refused."""
        raise _not_to_be_ended("connection.commit()", self._shared)

    def rollback(self) -> None:
        """Refused."""
        raise _not_to_be_ended("connection.rollback()", self._shared)

    def close(self) -> None:
        """Close it, if the test is over."""
        if not self._shared.over:
            raise _not_to_be_ended("connection.close()", self._shared)
        super().close()

    def _commit_impl(self) -> None:
        raise _not_to_be_ended("a commit of the connection", self._shared)

    def _rollback_impl(self) -> None:
        if not self._shared.over:
            raise _not_to_be_ended("a rollback of the connection", self._shared)
        super()._rollback_impl()


class _Savepoint(NestedTransaction):
    """What a session's transaction, or a savepoint in it, is on a shared connection."""

    def __init__(self, connection: _SharedConnection) -> None:
        shared = self.shared = connection._shared
        self.session: ScopedSession | None = connection._dbscope
        self.place: Place | None = here()
        self.dirty = False  # it has written, or cannot be known not to have
        self.keeps = False  # another session's work was saved inside of it
        self.lapsed = False  # nothing is to be sent for it
        self.lost: str | None = None  # what was done in it was undone with another's, and how
        super().__init__(connection)
        shared.savepoints.append(self)

    def _do_commit(self) -> None:
        if self.lost is not None:
            self._undo()
            raise OverlapError(self.lost)
        shared = self.shared
        others = self._others()
        writing = [savepoint for savepoint in others if savepoint.dirty]
        if self.dirty and writing and not self.lapsed:
            error = shared.overlap(self, writing[-1])
            self._undo()  # as after a COMMIT that failed; it takes what the others did with it
            raise error
        if self.lapsed or writing:
            self._lapse()
        else:
            shared.drop(others)
            super()._do_commit()
        self._over(saved=True)

    def _do_rollback(self) -> None:
        self._undo()

    def _do_close(self) -> None:
        self._undo()

    def _undo(self) -> None:
        others = self._others()
        writing = any(savepoint.dirty for savepoint in others)
        if self.lapsed or not self.is_active or (not self.dirty and (writing or self.keeps)):
            self._lapse()
        else:
            if writing:
                lost = str(self.shared.overlap(self, others[-1]))
                for savepoint in others:
                    savepoint.lost = lost
            self.shared.drop(others)
            super()._do_close()
        self._over(saved=False)

    def _others(self) -> "list[_Savepoint]":
        if self not in self.shared.savepoints or self.lapsed:
            return []
        return [savepoint for savepoint in self.shared.above(self) if savepoint.session is not self.session]

    def _lapse(self) -> None:
        """End without a word to the server: the savepoint goes with those around it."""
        self.lapsed = True
        self.is_active = False
        self._deactivate_from_connection(warn=False)

    def _over(self, *, saved: bool) -> None:
        while (top := self.connection.get_nested_transaction()) is not None and not top.is_active:
            top._deactivate_from_connection(warn=False)  # it ended before this one, and could not go then
        savepoints = self.shared.savepoints
        if self not in savepoints:
            return
        below = savepoints[: savepoints.index(self)]
        savepoints.remove(self)
        for savepoint in below:
            if saved and self.dirty and savepoint.session is self.session:
                savepoint.dirty = True
            elif saved and self.dirty:
                savepoint.keeps = True


# -- hooks -----------------------------------------------------------------------------------------------------------


class CapturedHook:
    """A function that was given to `on_commit`; call it to run it, in a scope of its own, and await what it gives.

    Attributes:
        function: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """

    def __init__(
        self, call: Callable[[], Any], function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._call = call
        self.function = function
        self.args = args
        self.kwargs = kwargs

    def __call__(self) -> Any:
        return self._call()

    def __repr__(self) -> str:
        return f"<CapturedHook {self.function!r} {self.args!r} {self.kwargs!r}>"


class capture_on_commit:  # as `scope`: used as a word, not as a type
    """A block in which functions given to `on_commit` are kept instead of called, when their transaction commits.

    Without it hooks run in tests as in production. Those of a transaction that rolls back are dropped here, too.

    Args:
        databases: whose hooks.
        execute: call them when the block ends without an error, in their order, and those they give in turn; with
            hooks that are coroutine functions, use `async with`.

    >>> from dbscope import Database
    >>> db = Database("sqlite://")
    >>> with capture_on_commit(db) as hooks:
    ...     with db.transaction():
    ...         db.on_commit(print, "sent")
    >>> hooks[0].args
    ('sent',)
    >>> hooks[0]()
    sent
    >>> db.dispose()
    """

    def __init__(self, *databases: BaseDatabase, execute: bool = False) -> None:
        if not databases:
            raise ConfigurationError("hooks are captured of at least one database: capture_on_commit(db).")
        self._databases = databases
        self._execute = execute
        self._hooks: list[CapturedHook] = []
        self._open = False

    def __enter__(self) -> list[CapturedHook]:
        self._before = [database.capture for database in self._databases]
        for database in self._databases:
            database.capture = self._capture
        self._open = True
        return self._hooks

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if self._execute and error is None:
                for hook in self._hooks:  # which grows meanwhile
                    result = hook()
                    if asyncio.iscoroutine(result):
                        result.close()
                        raise ConfigurationError(
                            f"{hook!r} is a coroutine function, and has to be awaited: use "
                            "`async with capture_on_commit(..., execute=True):`."
                        )
        finally:
            self._close()

    async def __aenter__(self) -> list[CapturedHook]:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            if self._execute and error is None:
                for hook in self._hooks:  # which grows meanwhile
                    result = hook()
                    if asyncio.iscoroutine(result):
                        await result
        finally:
            self._close()

    def _close(self) -> None:
        self._open = False
        for database, before in zip(self._databases, self._before, strict=True):
            database.capture = before

    def _capture(
        self, call: Callable[[], Any], function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[], Any]:
        def due() -> Any:
            if not self._open:
                return call()
            self._hooks.append(CapturedHook(call, function, args, kwargs))
            return None

        return due
