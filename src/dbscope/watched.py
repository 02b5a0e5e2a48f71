"""Engines that dbscope only watches: who holds their connections, for sessions that know nothing of dbscope.

The pool tells what is taken and given back, the dialect what is executed: of SQLAlchemy's events those that cost least.
Nothing here may keep a connection alive that its user has dropped, and so a hold has weak references to it.
"""

import os
import sys
import threading
import time
from copy import copy
from types import FrameType, TracebackType
from typing import Any, Self
from weakref import ref

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import Pool

from dbscope import fork, lifecycle
from dbscope.connection import OwnedConnection
from dbscope.errors import ConfigurationError, GuardError
from dbscope.events import EngineMade, SessionDropped, SyncOnLoop, emit, log
from dbscope.lifecycle import State, commits_at_once, taken_by
from dbscope.scope import Scope, current_scope
from dbscope.where import UNKNOWN, Place, Worker, here, is_between, running_loop, thread_id, worker

__all__ = ["Watch", "watch"]

_HOLD = "dbscope.hold"  # in the `info` that a pool keeps for each connection
_monotonic = time.monotonic
_getframe = sys._getframe
_on_loop, _dropped, _made = SyncOnLoop.observers, SessionDropped.observers, EngineMade.observers
_installing = threading.Lock()


def _free_lock() -> None:
    global _installing
    _installing = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_lock)  # the thread that held it may be the parent's alone


class _Taken:
    """What is asked of a session's connection, for one that has no session that we know of."""

    __slots__ = ("_dbapi_connection", "engine")

    def __init__(self, engine: Engine, record: Any) -> None:
        self.engine = engine
        self._dbapi_connection = record


class Hold:
    """A connection that somebody has taken from a watched engine: what a `Lifecycle` is for a session of ours.

    No slots: what most holds never set is on the class, and one is made for each checkout.
    """

    holds_write_lock = False  # nobody knows what its statements do
    held = True
    alone = True  # nobody comes after us who wants to hear of statements, so that their end can be seen
    running = False
    sent: str | None = None
    statements = 0
    undone: Exception | None = None
    _connection: "ref[Connection] | None" = None  # of the last statement
    _transaction: "ref[Any] | None" = None  # the same

    def __init__(self, engine: Engine, record: Any, fairy: Any) -> None:
        self._engine = engine
        self._record = record
        self._fairy = ref(fairy)
        self.home: Scope | None = current_scope()
        self.user: Worker = thread_id() if running_loop() is None else worker()
        self.taken: Place = _line() or UNKNOWN
        self.since = _monotonic()

    @property
    def connection(self) -> _Taken | None:
        """The connection, while it is held."""
        return _Taken(self._engine, self._record) if self.held else None

    @property
    def state(self) -> State:
        """What it does now."""
        if self.running:
            return "active"
        connection = None if self._connection is None else self._connection()
        if connection is None or connection.closed or not connection.in_transaction() or commits_at_once(connection):
            return "idle"
        return "idle in transaction" if self.alone else "active"

    @property
    def whose(self) -> str:
        """Whose connection it is, as errors name it."""
        return "a session outside of every scope" if self.home is None else self.home.describe()

    @property
    def dropped(self) -> bool:
        """Whether the garbage collector gives it back, and nobody else."""
        return self._fairy() is None

    def executes(self, connection: Connection, statement: str) -> None:
        """A statement is about to be executed.

        Raises:
            GuardError: a guard says that the transaction must not go on.
        """
        transaction = connection.get_transaction()
        if self._transaction is None or self._transaction() is not transaction:
            self._connection = ref(connection)
            if self._transaction is not None:  # it was taken for several
                self.since = _monotonic()
                self.undone = None
            self._transaction = None if transaction is None else ref(transaction)
        elif self.undone is not None:
            raise copy(self.undone)  # whose own traceback would keep what was dropped, and so the connection
        self.sent = statement
        self.statements += 1


_depth = 0  # how far above `_line` the user's own line was the last time


def _line() -> Place | None:
    """The user's line that takes a connection.

    It lies some fifteen frames up, and to walk through all of them costs a SELECT a tenth: so look first where it was
    the last time, right above SQLAlchemy.
    """
    global _depth
    depth = _depth
    if depth:
        try:
            frame = _getframe(depth)
            if not is_between(frame) and is_between(_getframe(depth - 1)):
                return frame.f_code, frame.f_lasti
        except ValueError:  # the stack is not as deep
            pass
    found = here()
    if found is not None:
        above: FrameType | None = _getframe()
        depth = 0
        while above is not None and above.f_code is not found[0]:
            above, depth = above.f_back, depth + 1
        _depth = 0 if above is None else depth  # of async code it lies in another greenlet
    return found


class Watch:
    """An engine that is watched, until `stop()`. Made by `dbscope.watch`.

    It is what guards and the view take for a database; `guards.configure(watch, ...)` sets its levels.
    """

    apart_for = None

    def __init__(self, engine: Engine) -> None:
        self.name = engine.url.render_as_string(hide_password=True)
        self.is_async = engine.dialect.is_async
        self._sync_engine = engine
        self._held: set[Hold] = set()
        self._watching = False
        self._own = {
            "do_execute": self._execute,
            "do_executemany": self._execute_many,
            "do_execute_no_params": self._execute_no_params,
        }
        self._last: dict[str, Any] = {}  # SQLAlchemy's lists of whom it calls for these
        self._listeners: list[tuple[str, Any]] = [
            ("checkout", self._checkout),
            ("checkin", self._checkin),
            ("detach", self._checkin),
            *self._own.items(),
        ]

    # -- what guards and the view ask --------------------------------------------------------------------------

    @property
    def holders(self) -> list["ref[Hold]"]:
        """What is held, except by sessions that know more of themselves."""
        known = {
            id(taken.dbapi_connection)
            for database in list(fork.databases)
            if not isinstance(database, Watch) and database._sync_engine.pool is self._sync_engine.pool
            for life in [reference() for reference in list(database.holders)]
            if life is not None and (taken := taken_by(life.connection)) is not None
        }
        return [ref(hold) for hold in list(self._held) if id(hold._record.dbapi_connection) not in known]

    def _pools(self) -> list[Pool]:
        return [self._sync_engine.pool]

    def after_fork(self) -> None:
        """In the child of a fork: what is held is the parent's."""
        self._held.clear()

    # -- from the beginning to the end -------------------------------------------------------------------------

    def start(self) -> Self:
        """Begin to watch; does nothing where that is done."""
        if not self._watching:
            self._watching = True
            engine = self._sync_engine
            if engine._connection_cls is Connection:  # it tells of a pool that is exhausted
                engine._connection_cls = OwnedConnection
            for name, listener in self._listeners:
                event.listen(engine, name, listener)
            dispatch = engine.dialect.dispatch
            self._last = {name: getattr(dispatch, name).listeners for name in self._own}
            fork.databases.add(self)
        return self

    def stop(self) -> None:
        """Watch no longer; what is held is forgotten. Calling it again is harmless."""
        with _installing:
            if not self._watching:
                return
            self._watching = False
            engine = self._sync_engine
            fork.databases.discard(self)
            for name, listener in self._listeners:
                event.remove(engine, name, listener)
            if engine._connection_cls is OwnedConnection and "_dbscope" not in vars(engine.dialect):
                engine._connection_cls = Connection
            vars(engine.dialect).pop("_dbscope_watch", None)
            for hold in list(self._held):
                hold.held = False
            self._held.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Watch of {self.name}{'' if self._watching else ', stopped'}>"

    # -- what SQLAlchemy tells ---------------------------------------------------------------------------------

    def _checkout(self, dbapi_connection: Any, record: Any, fairy: Any) -> None:
        engine = self._sync_engine
        hold = record.info[_HOLD] = Hold(engine, record, fairy)
        self._held.add(hold)
        if lifecycle.sleepers:
            lifecycle.wake()
        if _on_loop and running_loop() is not None and not self.is_async:
            emit(SyncOnLoop(database=self, scope=hold.home, session=None, engine=engine))

    def _checkin(self, dbapi_connection: Any, record: Any) -> None:
        hold = record.info.pop(_HOLD, None)
        if hold is not None:
            self._given_back(hold)

    def _given_back(self, hold: Hold) -> None:
        hold.held = False
        self._held.discard(hold)
        if _dropped and hold.dropped and hold.sent is not None and not sys.is_finalizing():
            home = hold.home
            name, opened = (None, None) if home is None or home.ended else (home.name, home.place)
            try:
                emit(SessionDropped(database=self, name=name, opened=opened, taken=hold.taken))
            except GuardError as error:  # the pool would not take the connection back
                log.error("%s", error)

    def _begins(self, context: Any, statement: str, execute: str) -> Hold | None:
        """The hold on whose connection a statement is about to be executed, if that can be done in SQLAlchemy's place.

        That is how its end is seen: an event after it would cost every statement a quarter.
        """
        connection = context.root_connection
        hold: Hold | None = getattr(connection, "_hold", None)
        if hold is None or not hold.held:
            try:
                hold = connection._hold = connection.info.get(_HOLD)
            except NotImplementedError:  # a new connection, which the dialect asks what it can do: nobody has it yet
                return None
            if hold is None:  # taken before it was watched
                return None
        hold.executes(connection, statement)
        if self._last[execute][-1] != self._own[execute]:  # whoever listens after us wants to hear of it, too
            hold.alone = False
            return None
        return hold

    def _execute(self, cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
        hold = self._begins(context, statement, "do_execute")
        if hold is None:
            return False
        hold.running = True
        try:
            context.dialect.do_execute(cursor, statement, parameters, context)
        finally:
            hold.running = False
        return True

    def _execute_many(self, cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
        hold = self._begins(context, statement, "do_executemany")
        if hold is None:
            return False
        hold.running = True
        try:
            context.dialect.do_executemany(cursor, statement, parameters, context)
        finally:
            hold.running = False
        return True

    def _execute_no_params(self, cursor: Any, statement: str, context: Any) -> bool:
        hold = self._begins(context, statement, "do_execute_no_params")
        if hold is None:
            return False
        hold.running = True
        try:
            context.dialect.do_execute_no_params(cursor, statement, context)
        finally:
            hold.running = False
        return True


def watch(engine: Any) -> Watch:
    """Let the guards and the view see who holds an engine's connections, whatever sessions it serves.

    For an application that has engines and sessions already: one line, and nothing else of dbscope. It changes nothing
    that the engine does. Calling it again for the same engine gives the same watch.

    Args:
        engine: an `Engine` or an `AsyncEngine`; or a database, which then names its engine's other users, too.

    Returns:
        the watch; `stop()` ends it, and so does the end of a `with` block around it. It lives as long as the engine.

    Raises:
        ConfigurationError: it is no engine.
    """
    given = getattr(engine, "_sync_engine", getattr(engine, "sync_engine", engine))
    if not isinstance(given, Engine):
        raise ConfigurationError(
            f"watch() is given an Engine or an AsyncEngine, not {_shown(engine)}.\n"
            "It is what create_engine() gave; a session maker has it as its `bind`."
        )
    dialect: Any = given.dialect  # which the engines share that `execution_options()` made
    with _installing:
        known: Watch | None = vars(dialect).get("_dbscope_watch")
        if known is None or known._sync_engine.pool is not given.pool:
            known = dialect._dbscope_watch = Watch(given)
            if _made:
                emit(EngineMade(database=known, engine=given, place=here()))
        return known.start()


def _shown(thing: Any) -> str:
    return f"a {type(thing).__name__}" if isinstance(thing, str) or hasattr(thing, "password") else repr(thing)
