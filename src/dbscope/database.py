"""Databases: an engine, how its sessions are made, and the doors to them."""

import asyncio
import difflib
import functools
import gc
import inspect
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Generic, Literal, Protocol, Self, TypeVar, TypeVarTuple, Unpack, cast, overload
from weakref import WeakSet, WeakValueDictionary

from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL, Connection, Engine, ExceptionContext, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import Pool, QueuePool

from dbscope import fork, hooks, sqlite
from dbscope.apart import Work, engine_for, work_of
from dbscope.capacity import Capacity, capacity_of, refuse_more, refuse_processes, size_of
from dbscope.engines import Engines, rebind
from dbscope.errors import ConfigurationError, NoScopeError, ScopeMisuseError, ScopeWarning
from dbscope.events import EngineMade, SessionCreated, emit
from dbscope.fanout import Slots, fan_out
from dbscope.hooks import Hook, Outcome, settle, title
from dbscope.implicit import implicit_scope
from dbscope.instrument import instrument_engine, instrument_sessions, watch_waits
from dbscope.lifecycle import Lifecycle, Mark, Owner, Shared, life_of
from dbscope.lockwatch import knows_waits
from dbscope.plan import run
from dbscope.registry import SessionRegistry, registry_beside, registry_for
from dbscope.retry import Retry
from dbscope.scope import Scope, current_scope
from dbscope.session import ScopedSession, adopt, derive, refuse_copy
from dbscope.settings import Seconds, Settings
from dbscope.terms import (
    AUTOCOMMIT_READER,
    DEFAULT,
    READER,
    Resolution,
    Terms,
    TransactionOptions,
    refuse_resolution,
    terms_of,
)
from dbscope.transaction import Transaction, call_of, doom, owned, refuse_hook, set_rollback_only, transactional
from dbscope.where import (
    Place,
    ago,
    here,
    name_of,
    name_of_loop,
    refuse_late_patch,
    running_loop,
    spell,
    thread_id,
    worker,
)

__all__ = ["Database"]

S = TypeVar("S", bound=Session)
F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")

_by_url: "WeakValueDictionary[tuple[str, bool], BaseDatabase]" = WeakValueDictionary()

_EXTRAS = {
    "psycopg": "postgresql",
    "asyncpg": "asyncpg",
    "aiosqlite": "aiosqlite",
    "greenlet": "async",
}
_PACKAGES = {"MySQLdb": "mysqlclient"}  # of drivers that are installed by another name


class SharedConnection(Shared, Protocol):
    """What `dbscope.testing` puts into a database, so that its sessions share a connection."""

    options: dict[str, Any]

    @property
    def connection(self) -> Connection:
        """The connection, below an `AsyncConnection` if it is one."""

    def adopt(self, session: ScopedSession, life: Lifecycle) -> None:
        """A session was made that works on the connection."""


_created, _made = SessionCreated.observers, EngineMade.observers


class BaseDatabase:
    """What both colours share. Not public: use `Database` or `AsyncDatabase`."""

    is_async = False
    name: str
    uncommitted: Literal["warn", "raise", "off"]
    outcome: Resolution
    shared: SharedConnection | None = None  # in the sandbox of a test: what all sessions work on
    capture: Callable[..., Callable[[], Any]] | None = None  # in a test: what becomes of the hooks

    _maker: Any  # sessionmaker | async_sessionmaker
    _class: type[Any]
    _sync_engine: Engine

    def _set_up(
        self,
        engine: Any,
        *,
        url: URL | None,
        name: str | None,
        implicit_scopes: bool,
        uncommitted: Literal["warn", "raise", "off"],
        outcome: Resolution,
        memory: sqlite.Memory | None,
    ) -> None:
        if threading.get_ident is not thread_id:
            refuse_late_patch()
        if uncommitted not in ("warn", "raise", "off"):
            raise ConfigurationError(f'uncommitted is "warn", "raise" or "off", not {uncommitted!r}.')
        sync: Engine = getattr(engine, "sync_engine", engine)
        self._sync_engine = sync
        self._memory = memory
        # Without what follows the "?", which may hold a password, too.
        self.name = name or (url or sync.url).set(query={}).render_as_string(hide_password=True)
        refuse_resolution(outcome)
        self.uncommitted = uncommitted
        self.outcome = outcome
        self.implicit_scopes = implicit_scopes
        self.place: Place | None = here()
        self.apart_for: str | None = None  # the long work whose connections these are
        self._loop: asyncio.AbstractEventLoop | None = None  # which an async database was used on last
        self._met: Place | None = None
        self.own_begin = url is not None and sync.dialect.name == "sqlite"
        self.one_writer = sync.dialect.name == "sqlite"
        self.knows_waits = knows_waits(sync.dialect.name)
        self.holders: set[Mark] = set()
        self._loose: WeakSet[Session] = WeakSet()
        self.slots = Slots(self)
        self._engines = Engines()
        if self.own_begin:
            sqlite.set_up(sync, memory)
        instrument_engine(sync, own_begin=self.own_begin)
        event.listen(sync, "handle_error", _explain)
        fork.databases.add(self)

    def _tell_made(self) -> None:
        if _made:
            emit(EngineMade(database=self, engine=self._sync_engine, place=self.place))

    def _apart(self, work: Work, wrap: Callable[[Engine], Any]) -> Self:
        """A database like this one in all but its engine, which has a pool for the work alone."""
        made: Any = object.__new__(type(self))
        vars(made).update(vars(self))
        made.engine = wrap(engine_for(self._sync_engine, work))
        made._maker = type(self._maker)(class_=self._class)
        made._maker.kw = {**self._maker.kw, "bind": made.engine}
        made._class = made._maker.class_
        made._set_up(
            made.engine,
            url=None,
            name=f"{self.name} apart for {work.name!r}",
            implicit_scopes=self.implicit_scopes,
            uncommitted=self.uncommitted,
            outcome=self.outcome,
            memory=None,
        )
        made.own_begin = self.own_begin
        made.apart_for = work.name
        limit = work.limits.lock_timeout
        if self.knows_waits and limit is not None:
            watch_waits(made._sync_engine, limit)
        made.session = registry_beside(made.session, made, made._maker)
        return cast("Self", made)

    # -- what the core asks ------------------------------------------------------------------------------------

    def make(self, home: Scope | None, options: dict[str, Any] | None = None) -> Any:
        """A new session, with its life begun in `home`."""
        if threading.get_ident is not thread_id:
            refuse_late_patch()
        shared = self.shared
        if shared is not None:
            options = {**shared.options, **(options or {})}
        kw = self._maker.kw
        session = self._class(**kw) if options is None else self._class(**{**kw, **options})
        if self.is_async:
            sync: ScopedSession = session.sync_session
            session._dbscope = life = adopt(sync, home, self)
            if self._loop is not (loop := running_loop()) and loop is not None:
                self._meet(loop)
        else:
            sync = session
            life = sync._dbscope = Lifecycle(home, self)  # as `adopt` does
        if shared is not None and sync.bind is shared.connection:
            shared.adopt(sync, life)
        if _created:
            emit(SessionCreated(database=self, scope=home, session=sync))
        return session

    def make_reader(self, home: Scope, owner: Owner) -> Any:
        """A new session that only reads, kept to that by the server, where it knows how to."""
        session = self.make(home)
        life_of(session).own(owner)
        if self._sync_engine.dialect.name == "postgresql" and self.shared is None:
            owner.apart = owner.autocommit
            engines = self._engines
            rebind(
                getattr(session, "sync_session", session),
                engines.committing_at_once if owner.autocommit else engines.reading,
            )
        return session

    def shape(self, session: Session, settings: Settings) -> None:
        """Let a session's next transactions begin as `settings` say, until `unbind`."""
        options = settings.begin_options(self._sync_engine.dialect.name)
        if options:
            rebind(session, self._engines.shaping(options))

    def _meet(self, loop: asyncio.AbstractEventLoop) -> None:
        """An async database is used on another loop than before: take its pool there, if that can be.

        Raises:
            ScopeMisuseError: the pool has connections of the other loop, which cannot be used on this one.
        """
        before = self._loop
        if before is not None and self.shared is None and (before.is_running() or not self._drops_loops):
            for engine in (self._sync_engine, *self._engines.apart()):
                pool = engine.pool
                if isinstance(pool, QueuePool) and pool.checkedin() + pool.checkedout() > 0:
                    raise ScopeMisuseError(
                        f"{self.name} was used by {name_of(worker())} at {spell(here())} on {name_of_loop(loop)}, but "
                        f"its pool has connections of {name_of_loop(before)}, on which it was used at "
                        f"{spell(self._met)}.\n"
                        "A connection belongs to the loop that opened it. At the end of each `asyncio.run()` say "
                        "`await db.dispose()`; loops that run side by side have an AsyncDatabase each."
                    )
        self._loop, self._met = loop, here()

    @property
    def _drops_loops(self) -> bool:
        """Whether an idle connection of the driver's can be used on another loop, once its own does not run."""
        return self._sync_engine.dialect.driver in ("aiosqlite", "psycopg")

    def _terms(self, options: TransactionOptions) -> Terms:
        """The checked options of a block.

        Raises:
            ConfigurationError: one is unknown, contradicts another, or is not to be had on this kind of database.
        """
        terms = terms_of(options)
        if terms.settings is not None:
            terms.settings.refuse_unknown(self._sync_engine.dialect.name)
        return terms

    def _reader_terms(self, autocommit: bool) -> Terms:
        if not autocommit:
            return READER
        dialect = self._sync_engine.dialect.name
        if dialect not in ("postgresql", "sqlite"):
            raise ConfigurationError(
                f"reader(autocommit=True) is known on PostgreSQL and SQLite; on {dialect} use `reader()`."
            )
        return AUTOCOMMIT_READER

    def accept(self, session: Any, home: Scope) -> Any:
        """A session that was put into the registry by hand."""
        sync = getattr(session, "sync_session", session)
        if not isinstance(sync, ScopedSession):
            raise ConfigurationError(
                f"{session!r} was not made by {self.name}. Use `db.new_session()`, or `dbscope.compat.scoped_session`."
            )
        life = life_of(session)
        life.home, life.source = home, self
        session._dbscope = life  # on the async shell, too
        return session

    def refuse_implicit(self) -> None:
        """Raise where a session outside of every scope is not to be had."""
        if self.is_async:
            raise NoScopeError(
                f"an async session of {self.name} was asked for by {name_of(worker())} at {spell(here())}, outside of "
                "every scope: nobody would await its end.\nOpen one around the work: `async with scope(): ...`, "
                "for each message of a websocket, too; dbscope.integrations.asgi.ScopeMiddleware does for each HTTP "
                "request."
            )
        if not self.implicit_scopes:
            raise NoScopeError(
                f"a session of {self.name} was asked for by {name_of(worker())} at {spell(here())}, outside of every "
                "scope, and this database has implicit_scopes=False.\nOpen one around the work: `with scope(): ...`."
            )

    def capacity(self) -> float:
        """How many connections the pool gives out at most."""
        if self.shared is not None:
            return self.slots.stuck + 1  # one part of a fan-out at a time, whatever its callers hold
        return size_of(self._sync_engine.pool)

    def _pools(self) -> list[Pool]:
        return [engine.pool for engine in (self._sync_engine, *self._engines.apart())]

    def run_hooks(self, hooks: Sequence[Hook]) -> None:
        """Run the hooks of a transaction that its user ended, each in a scope of its own."""
        run(settle(hooks, None))

    def after_fork(self) -> None:
        """In the child of a fork: leave the parent's connections to it."""
        for engine in (self._sync_engine, *self._engines.apart()):
            engine.dispose(close=False)
        fork.keep_alive([*self._loose])
        self.holders.clear()

    # -- the decorator -----------------------------------------------------------------------------------------

    @overload
    def transactional(self, function: F) -> F: ...

    @overload
    def transactional(
        self, *, retry: Retry | int | None = None, **options: Unpack[TransactionOptions]
    ) -> Callable[[F], F]: ...

    def transactional(
        self, function: Any = None, *, retry: Retry | int | None = None, **options: Unpack[TransactionOptions]
    ) -> Any:
        """Decorate a function or a method, so that each call runs in `transaction()`, with the same options.

        An async database decorates coroutine functions, and no others.

        With `retry` each attempt runs in a scope, a session and a transaction of its own, and a conflict with other
        work (a serialization failure, a deadlock) repeats the whole call.

        Args:
            function: what to decorate.
            retry: how many attempts may follow the first one, or a `Retry`.
            options: as for `transaction`.

        Raises:
            ConfigurationError: on decorating, for generators, and functions of the other colour.
            TransactionInProgress: on calling, where retry was asked for and a managed transaction is open.
        """
        terms = self._terms(options)
        if function is None:
            return lambda decorated: transactional(self, decorated, terms, retry)
        return transactional(self, function, terms, retry)

    # -- hooks -------------------------------------------------------------------------------------------------

    def before_commit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        """Call a function when the open managed transaction is about to be committed, as a part of it.

        It runs in the owner's scope and transaction, before the last flush, in the order of the calls; it may write,
        and give further hooks. If it raises, the transaction rolls back. It is dropped if the transaction, or the
        savepoint in which it was given, rolls back. An async database takes coroutine functions, too.

        Raises:
            NoTransactionError: no managed transaction is open.
        """
        refuse_hook(function, is_async=self.is_async)
        session, life = owned(self, "before_commit()")
        call = functools.partial(function, *args, **kwargs)
        savepoint = session.get_nested_transaction()
        life.hooks += (Hook(call, "before commit", savepoint, name=title(function), blocking=not self.is_async),)

    def _hook(
        self,
        outcome: Outcome,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        robust: bool,
    ) -> Callable[[], Any] | None:
        """Keep a hook for the end of the open transaction; give its call back if there is none."""
        call = call_of(function, args, kwargs, here(), is_async=self.is_async)
        if robust:
            call = hooks.robust(call, title(function))
        if outcome == "commit" and self.capture is not None:
            call = self.capture(call, function, args, kwargs)
        home = current_scope()
        while home is not None and home.has(self) and (reader := life_of(home.open(self)).owner) and reader.reader:
            home = home._outer  # it commits nothing: the hook belongs to the transaction around it, if there is one
        if home is None and running_loop() is None:
            home = implicit_scope()
        if home is not None and not home.ended and (home.commit is not None or home.has(self)):
            session = home.open(self)
            sync: Session = getattr(session, "sync_session", session)
            life = life_of(session)
            if life.owner is not None or life.uncommitted(sync) is not None:
                savepoint = sync.get_nested_transaction()
                hook = Hook(call, outcome, savepoint, name=title(function), blocking=not self.is_async)
                life.hooks += (hook,)
                return None
        return call

    def set_rollback_only(self) -> None:
        """Let the innermost block roll back when it ends, without an error.

        That is a savepoint of `nested=True`, or the whole transaction. In a block that has joined one, whoever began
        it gets a `RollbackOnlyError`, and does not take the work for saved.

        Raises:
            NoTransactionError: no managed transaction is open.
        """
        set_rollback_only(self)

    def doom(self, reason: str) -> None:
        """Make sure that nothing of the whole open transaction is committed: its owner gets a `RollbackOnlyError`.

        Args:
            reason: for that error.

        Raises:
            NoTransactionError: no managed transaction is open.
        """
        doom(self, reason)

    def _open_scopes(self) -> str:
        lives = [life for held in [*self.holders] if (life := held()) is not None]
        return ", ".join(f"{life.whose} since {spell(life.taken)}" for life in lives)

    def _disposing(self) -> None:
        held = self._open_scopes()
        if held:
            for life in [*self.holders]:
                connection = getattr(life(), "connection", None)
                if connection is not None and not connection.closed and not connection.invalidated:
                    connection.detach()  # or the old pool would take it back, and keep it open
            warnings.warn(
                f"{self.name} was disposed of while connections were held by {held}.\n"
                "They are closed when they are given back. End the scopes first.",
                ScopeWarning,
                stacklevel=3,
            )
        for reference in _by_url.valuerefs():  # in one go: other threads may make a database meanwhile
            if reference() is self:
                _by_url.pop(reference.key, None)

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse_copy(repr(self))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


class Database(BaseDatabase, Generic[S]):
    """An engine, and sessions for the work that is done with it. Make one for the process; share it everywhere.

    Args:
        target: a URL (string or `URL`), an `Engine`, or a configured `sessionmaker`. An engine that you made is left
            as it is; one that is made here from a URL has these defaults, each with its reason:

            - SQLite: foreign keys are enforced, as on every other database; files use write-ahead logging, so that
              readers and the writer do not wait for each other; each transaction begins explicitly, so that its reads
              are consistent and savepoints work; a database in memory is one, whichever thread uses it, and serves
              one transaction at a time.
            - others: `pool_pre_ping=True`, so that a connection that died in the pool is never handed out.
        name: what errors call this database; its URL without the password, if not given.
        session_class: the class of the sessions, such as SQLModel's.
        implicit_scopes: whether `db.session` works outside of every scope, in one of the thread's own.
        uncommitted: what a scope's end does about writes that nobody committed: `"warn"`, `"raise"` or `"off"`.
        outcome: what is done where a connection is lost during COMMIT: `"raise"` that the outcome is unknown, or
            `"resolve"` it (PostgreSQL), for one trip more with each commit.
        options: options of `Session` and, with a URL, of `create_engine`.

    Raises:
        ConfigurationError: the target cannot be used, or an option is unknown.

    >>> from sqlalchemy import text
    >>> with Database("sqlite://") as db:
    ...     with db.transaction() as session:
    ...         session.scalar(text("SELECT 42"))
    42
    """

    engine: Engine
    session: SessionRegistry[S]

    @overload
    def __init__(
        self,
        target: "str | URL | Engine",
        *,
        name: str | None = None,
        session_class: type[S],
        implicit_scopes: bool = True,
        uncommitted: Literal["warn", "raise", "off"] = "warn",
        outcome: Resolution = "raise",
        **options: Any,
    ) -> None: ...

    @overload
    def __init__(
        self: "Database[Session]",
        target: "str | URL | Engine",
        *,
        name: str | None = None,
        implicit_scopes: bool = True,
        uncommitted: Literal["warn", "raise", "off"] = "warn",
        outcome: Resolution = "raise",
        **options: Any,
    ) -> None: ...

    @overload
    def __init__(
        self,
        target: "sessionmaker[S]",
        *,
        name: str | None = None,
        implicit_scopes: bool = True,
        uncommitted: Literal["warn", "raise", "off"] = "warn",
        outcome: Resolution = "raise",
    ) -> None: ...

    def __init__(
        self,
        target: Any,
        *,
        name: str | None = None,
        session_class: Any = Session,
        implicit_scopes: bool = True,
        uncommitted: Literal["warn", "raise", "off"] = "warn",
        outcome: Resolution = "raise",
        **options: Any,
    ) -> None:
        url: URL | None = None
        memory: sqlite.Memory | None = None
        kw: dict[str, Any]
        refuse_class(session_class, Session)
        if isinstance(target, sessionmaker):
            refuse_options(options, "a sessionmaker")
            session_class, kw, engine = target.class_, target.kw, target.kw.get("bind")
            engine = refuse_unbound(engine, Engine)
        elif isinstance(target, Engine):
            engine = target
            kw = session_options(session_class, options)
            refuse_options(options, "an Engine")
            kw["bind"] = engine
        else:
            url = url_of(target, is_async=False)
            kw = session_options(session_class, options)
            engine, memory = make_engine(url, create_engine, options)
            kw["bind"] = engine
            refuse_second(self, url, memory)
        self.engine = engine
        self._set_up(
            engine,
            url=url,
            name=name,
            implicit_scopes=implicit_scopes,
            uncommitted=uncommitted,
            outcome=outcome,
            memory=memory,
        )
        self._maker = sessionmaker(class_=derive(session_class))
        self._maker.kw = kw
        self._class = self._maker.class_
        instrument_sessions(self._class)
        self.session = registry_for(SessionRegistry, self, session_class, Session)(self, self._maker)
        self._tell_made()

    def transaction(self, **options: Unpack[TransactionOptions]) -> Transaction[S]:
        """A block whose work is committed when it ends, or rolled back, and the error re-raised.

        Joins a managed transaction that is open; begins one otherwise, on the scope's session, or in a scope of its
        own where none is open. What the scope's session has merely read, or has pending, becomes part of it.

        Args:
            nested: inside of an open transaction, work in a savepoint: an error undoes this block's work alone.
            new: work beside what is open, in a session and a transaction of its own.
            kind: the same, and more, by Spring's names: `"required"` (the default), `"requires-new"`, `"nested"`;
                `"mandatory"` joins and never begins; `"supports"` joins, or works without a transaction;
                `"not-supported"` works without one, beside what is open; `"never"` refuses where one is open.
                Work without a transaction is that of a plain scope: the session is the user's to commit.
            durable: refuse to be inside of another transaction, whose rollback would take this work with it.
            no_rollback_for: errors after which the work is committed all the same; they are re-raised.
            rollback_for: errors among those that roll back nevertheless. The nearest class decides.
            outcome: `"raise"` or `"resolve"`, as the database's, for this block; one that joins leaves it to the one
                that commits.
            isolation: `"READ COMMITTED"`, `"REPEATABLE READ"`, `"SERIALIZABLE"`, as the database knows them.
            read_only: refuse writes, and have PostgreSQL and SQLite refuse them, too.
            deferrable: with `"SERIALIZABLE"` and `read_only`, wait for a snapshot that cannot fail (PostgreSQL).
            statement_timeout: seconds, or a timedelta, that one statement may take (PostgreSQL).
            lock_timeout: how long one statement may wait for a lock (PostgreSQL, SQLite).
            idle_timeout: how long the transaction may stay without a statement (PostgreSQL).
            timeout: how long the whole transaction may take (PostgreSQL 17).

        What is asked of the server ends with the transaction. A block that joins may ask for what is there already.

        Raises:
            ConfigurationError: an option is unknown here, or two contradict each other.
            TransactionInProgress: on entering, if the session has written something that nobody owns, or if a
                transaction is open and the block must not be in one, or asks for another isolation, time-out, ....
            NoTransactionError: on entering, if the block must join a transaction, and none is open.
            RollbackOnlyError: on leaving, if a part of the work failed or was rolled back, and the error was hidden.
            ReadOnlyError: on entering, inside of a reader.
            TransactionAbortedError: on leaving, if PostgreSQL has aborted the transaction.
            CommitOutcomeUnknown: on leaving, if the connection was lost during COMMIT.
            NotCommittedError: the same, where the server was asked, and has rolled back.
        """
        return Transaction(self, self._terms(options))

    def reader(self, *, autocommit: bool = False) -> Transaction[S]:
        """A block that reads, in a session of its own: writes are refused, and by PostgreSQL's server too.

        It sees what is committed when its first statement runs. What it returned can still be read after the block,
        without a transaction; what was not loaded stays unloaded.

        Args:
            autocommit: begin no transaction, and spare PostgreSQL the trips for its BEGIN and its ROLLBACK. Each
                statement sees what is committed when it runs: two that belong together may see different states.
                On PostgreSQL its connections are of a pool of their own, as large as the database's.

        Raises:
            ReadOnlyError: by whatever writes inside; with `autocommit`, by a `SET`, too.
            ConfigurationError: `autocommit` is not known on this database; by the first statement, if there is a
                pooler such as PgBouncer between.
        """
        return Transaction(self, self._reader_terms(autocommit))

    def run(self, function: Callable[[*Ts], R], *args: *Ts, retry: Retry | int = 3) -> R:
        """Call a function in a managed transaction, again and again as long as it meets conflicts.

        For work that cannot be decorated: `run(pay, 500)` is `transactional(retry=3)(pay)(500)`. A function, and no
        block, because a block cannot be repeated without hiding its exceptions from whoever reads the code.

        Args:
            function: the whole unit of work; `db.session` is its session.
            args: what to call it with.
            retry: how many attempts may follow the first one, or a `Retry`.

        Returns:
            what the function returned in the attempt that was committed.

        Raises:
            TransactionInProgress: a managed transaction is open, of which this would be a part.
            Exception: what came out of the last attempt.
        """
        if not callable(function):
            raise ConfigurationError(f"run() is given a function, and its arguments follow it; this is {function!r}.")
        return transactional(self, function, DEFAULT, retry)(*args)

    def on_commit(self, function: Callable[..., Any], /, *args: Any, robust: bool = False, **kwargs: Any) -> None:
        """Call a function when the open transaction has been committed, its connection being back in the pool.

        It runs after the outermost COMMIT, in the order of the calls, in a scope of its own. It is dropped if the
        transaction, or the savepoint in which it was given, rolls back. Outside of a transaction it is called at
        once, as Django's is.

        Args:
            function: what to call.
            args: its arguments.
            robust: an error of the function is logged, and not raised.
            kwargs: its arguments by name. (One that is called `robust` goes by `functools.partial`.)
        """
        call = self._hook("commit", function, args, kwargs, robust=robust)
        if call is not None:
            call()

    def on_rollback(self, function: Callable[..., Any], /, *args: Any, robust: bool = False, **kwargs: Any) -> None:
        """Call a function when the open transaction, or the savepoint in which it was given, has rolled back.

        Outside of a transaction there is nothing to roll back, and it is dropped.
        """
        self._hook("rollback", function, args, kwargs, robust=robust)

    def fan_out(
        self,
        function: Callable[[T], R],
        items: Iterable[T],
        *,
        name: str | None = None,
        limit: int | None = None,
    ) -> list[R]:
        """Call a function with each item in threads, each call in a scope of its own.

        No more calls run at once than the pool has connections for: overflow counts, and so do the caller's own
        connection and what other fan-outs use. A call that fans out again cannot starve itself.

        Args:
            function: what to do with one item.
            items: one call for each.
            name: what errors call the scopes; the function's name, if not given.
            limit: how many calls may run at once, if the pool could serve more; 32 threads, if not given.

        Returns:
            the results, in the order of the items.

        Raises:
            FanOutError: the callers of fan-outs hold every connection, so that no call could ever begin.
            Exception: the first one that a call raised; no further call was begun after it.
        """
        return fan_out(self, self.slots, function, items, name=name, limit=limit)

    def check_capacity(self, processes: int) -> Capacity:
        """Check that all processes together can be given the connections that they may ask for: say it at start-up.

        Args:
            processes: how many make this database, on all hosts together: web workers, task workers, jobs.

        Returns:
            the figures, to be logged. The pools that this process has now count: those of readers with `autocommit`
            from their first use on, those of `apart()` by themselves.

        Raises:
            ConfigurationError: there are fewer, or a pool has no limit. What other applications and people use is not
                counted.
        """
        refuse_processes(processes)
        with self.engine.connect() as connection:
            found = capacity_of(self._pools(), processes, connection)
        return refuse_more(found, self.name)

    def apart(
        self,
        name: str,
        *,
        connections: int = 1,
        lock_timeout: Seconds | None = 5.0,
        statement_timeout: Seconds | None = None,
    ) -> Self:
        """This database for long work, such as a migration or a back-fill: on connections of its own.

        They are of a pool of their own, so that none is taken from the application's, and the limits that those have
        do not apply: of time-outs there are the two below, and no others. Sessions, scopes and blocks work as on any
        database, with the same session class and options; a scope has another session on each of the two.

        Whoever asked for it disposes of it: use it in a `with` block.

        Args:
            name: what the work is called, in errors and, on PostgreSQL, in `pg_stat_activity`: behind the
                application's own name there, or behind "dbscope".
            connections: how many it may use at once.
            lock_timeout: seconds, or a timedelta, that one statement may wait for a lock; an error names who holds it
                (PostgreSQL; on SQLite, where it is a session of this process). None: as long as it takes.
            statement_timeout: how long one statement may take (PostgreSQL, MariaDB). None: as long as it takes.

        Raises:
            ConfigurationError: an option cannot be meant, or is unknown on this kind of database, or it is a SQLite
                database in memory. By the first statement, if there is a pooler such as PgBouncer between.
        """
        return self._apart(work_of(self.engine, name, connections, lock_timeout, statement_timeout), _as_it_is)

    def new_session(self, **options: Any) -> S:
        """A session outside of every scope: whoever asked for it closes it."""
        session = self.make(None, options or None)
        self._loose.add(session)
        return cast("S", session)

    def dispose(self) -> None:
        """Close the pool. Connections that are still held are named in a warning, and closed when they come back."""
        self._disposing()
        for engine in (self.engine, *self._engines.apart()):
            engine.dispose()
        if self._memory is not None:
            self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.dispose()


def _as_it_is(engine: Engine) -> Engine:
    return engine


# -- setting up --------------------------------------------------------------------------------------------------


def url_of(target: Any, *, is_async: bool) -> URL:
    """The URL that `target` is, for a database of this colour.

    Raises:
        ConfigurationError: it is none, or its driver is unknown, not installed, or of the other colour.
    """
    mine, other = ("AsyncDatabase", "Database") if is_async else ("Database", "AsyncDatabase")
    if hasattr(target, "sync_engine") or type(target).__name__ == "async_sessionmaker":
        raise ConfigurationError(f"{target!r} is async: give it to AsyncDatabase.")
    if isinstance(target, Engine | sessionmaker):
        raise ConfigurationError(f"{target!r} is sync: give it to Database.")
    if not isinstance(target, str | URL):
        raise ConfigurationError(f"{mine} takes a URL, an engine or a configured session maker, not {target!r}.")
    try:
        url = make_url(target)
    except (ArgumentError, ValueError):  # the latter of a port that is no number
        raise ConfigurationError(
            "this is not a database URL; it should look like 'sqlite:///payments.db' or "
            "'postgresql+psycopg://user:password@host/database'. (It is not shown, for it may hold a password.)"
        ) from None
    if "@" in (url.host or ""):  # which a driver's error would quote
        raise ConfigurationError(
            "the URL has more than one '@': in a user's name or a password write it as '%40', and '/' as '%2F'. "
            "(It is not shown, for it may hold a password.)"
        )
    try:
        dialect = url.get_dialect()
        if is_async:  # psycopg answers to one name in both colours
            dialect = dialect.get_async_dialect_cls(url)
    except NoSuchModuleError:
        hint = "Write 'postgresql'" if url.drivername == "postgres" else "Check the part of the URL before '://'"
        raise ConfigurationError(
            f"SQLAlchemy knows no database {url.drivername!r}. {hint}, or install the package that brings it."
        ) from None
    if url.get_backend_name() == "sqlite" and url.host:
        raise ConfigurationError(
            "the URL of a SQLite file has three slashes, and four before an absolute path: 'sqlite:///payments.db', "
            "'sqlite:////var/lib/payments.db'. This one names a server, which SQLite has none of."
        )
    if is_async:
        dialect = dialect.get_async_dialect_cls(url)  # psycopg's name stands for both colours
    if dialect.is_async != is_async:
        found, wanted, example = (
            ("a sync", "an async", "sqlite+aiosqlite:// or postgresql+asyncpg://")
            if is_async
            else ("an async", "a sync", "sqlite:// or postgresql+psycopg://")
        )
        raise ConfigurationError(
            f"{url.drivername} is {found} driver: use {other} for it, or give {mine} the URL of {wanted} one, "
            f"such as {example}."
        )
    return url


def make_engine(url: URL, create: Callable[..., Any], options: dict[str, Any]) -> tuple[Any, sqlite.Memory | None]:
    """An engine for a URL, with dbscope's defaults under the user's options.

    Raises:
        ConfigurationError: the driver is not installed, or an option is unknown.
    """
    memory: sqlite.Memory | None = None
    defaults: dict[str, Any] = {"pool_pre_ping": True}
    shown = url.render_as_string(hide_password=True)
    if url.get_backend_name() == "sqlite":
        if sqlite.is_memory(url):
            memory = sqlite.Memory(url)
            url = memory.url
        defaults = sqlite.pool_options(url, memory)
    given = {**defaults, **options}
    if "connect_args" in options:  # of these the user gives some, and keeps our others
        given["connect_args"] = {**defaults.get("connect_args", {}), **options["connect_args"]}
    try:
        return create(url, **given), memory
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "")
        package = f'"dbscope[{extra}]"' if extra else _PACKAGES.get(error.name or "", error.name)
        raise ConfigurationError(
            f"{shown} needs the driver {error.name}, which is not installed: pip install {package}"
        ) from error
    except TypeError as error:
        known = [*inspect.signature(create_engine).parameters, *_POOL_OPTIONS, *_SESSION_OPTIONS]
        hints = [f"{name!r}: did you mean {close[0]!r}?" for name in options if (close := _like(name, known))]
        unknown = "; ".join(hints) or ", ".join(map(repr, options))
        raise ConfigurationError(
            f"{shown} was given an option that neither Session nor create_engine knows: {unknown}"
        ) from error


_POOL_OPTIONS = ("pool_size", "max_overflow", "pool_timeout", "pool_recycle", "pool_pre_ping", "pool_use_lifo", "echo")
_SESSION_OPTIONS = frozenset(inspect.signature(Session.__init__).parameters) - {"self", "bind", "execution_options"}


def _like(name: str, known: Sequence[str]) -> list[str]:
    return [] if name in known else difflib.get_close_matches(name, known, 1, 0.7)


def refuse_class(session_class: Any, wanted: type[Any]) -> None:
    """Raise if `session_class` is not a class of the sessions that this database makes."""
    if not (isinstance(session_class, type) and issubclass(session_class, wanted)):
        raise ConfigurationError(
            f"session_class is {wanted.__name__} or a class derived from it, not {session_class!r}."
        )


def session_options(session_class: type[Any], options: dict[str, Any]) -> dict[str, Any]:
    """Take the session's options out of `options`, those of the user's own session class included."""
    own: set[str] = set(_SESSION_OPTIONS)
    for cls in session_class.__mro__:
        init = cls.__dict__.get("__init__")
        if init is not None and cls is not object:
            own |= {
                name
                for name, p in inspect.signature(init).parameters.items()
                if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
            }
    own -= {"self", "bind", "execution_options"}
    taken = {name: options.pop(name) for name in list(options) if name in own}
    # A session that may not be used again after close() cannot serve a scope; the scope ends it for good itself.
    taken.pop("close_resets_only", None)
    return taken


def refuse_options(options: dict[str, Any], what: str) -> None:
    """Raise if there are options left that `what` can no longer take."""
    if options:
        raise ConfigurationError(
            f"{what} is configured already, and cannot take {', '.join(map(repr, options))}: set it there."
        )


def refuse_unbound(engine: Any, wanted: type[Any]) -> Any:
    """The engine of a session maker; raise if it has none."""
    if isinstance(engine, Connection):
        return engine.engine
    if not isinstance(engine, wanted):
        raise ConfigurationError(
            f"the session maker has no {wanted.__name__} as its bind, but {engine!r}: "
            "configure it with bind=, or give the database the engine."
        )
    return engine


def refuse_second(database: BaseDatabase, url: URL, memory: sqlite.Memory | None) -> None:
    """Raise if there is a database for this URL already: with a pool for each, the server runs out of connections.

    Databases in memory are each their own.
    """
    if memory is not None:
        return
    key = (sqlite.absolute(url).render_as_string(hide_password=False), database.is_async)
    if key in _by_url:
        gc.collect()  # one that was dropped may only be waiting for this
    first = _by_url.get(key)
    if first is not None:
        raise ConfigurationError(
            f"there is a database for {url.render_as_string(hide_password=True)} already, "
            f"made at {spell(first.place)}.\n"
            "Make one for the process and share it; or dispose() of the first; or, for a second pool on purpose, "
            "use its `apart()`, which is for long work, or give this one an engine of your own."
        )
    _by_url[key] = database


def _explain(context: ExceptionContext) -> None:
    """Say in a note what a lost connection means; the exception stays SQLAlchemy's."""
    error = context.sqlalchemy_exception
    if error is None:
        return
    if context.connection is None and isinstance(error, OperationalError) and context.engine is not None:
        url = context.engine.url.render_as_string(hide_password=True)
        is_file = context.engine.dialect.name == "sqlite"
        hint = "Is its folder there, and writable?" if is_file else "Is the server up, and the address right?"
        error.add_note(f"No connection could be made to {url}. {hint}")
    elif context.is_disconnect and not getattr(context.connection, "_lost", False):
        session = getattr(context.connection, "_dbscope", None)
        life = None if session is None else life_of(session)
        taken = f" It was taken at {spell(life.taken)}, {ago(life.since)}." if life is not None and life.taken else ""
        error.add_note(
            "The connection was lost in the middle, and the server has rolled back what was open on it."
            f"{taken} Repeat the whole piece of work, in a new scope; the pool will connect again."
        )
