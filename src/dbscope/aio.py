"""Async databases. Loaded only when asked for: SQLAlchemy's asyncio part needs greenlet, which 2.1 leaves optional."""

import asyncio
import contextlib
import importlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    Self,
    TypeVar,
    TypeVarTuple,
    Unpack,
    cast,
    overload,
)

from sqlalchemy.engine import URL
from sqlalchemy.orm import Session

try:
    importlib.import_module("greenlet")  # SQLAlchemy 2.0 imports without it, and fails at the first use
    from sqlalchemy.ext.asyncio import (
        AsyncEngine,
        AsyncSession,
        AsyncSessionTransaction,
        async_scoped_session,
        async_sessionmaker,
        create_async_engine,
    )
    from sqlalchemy.util import await_only
except ImportError as error:
    raise ImportError('async databases need greenlet: pip install "dbscope[async]"', name=error.name) from error

from dbscope import sqlite
from dbscope.apart import work_of
from dbscope.capacity import Capacity, capacity_of, refuse_more, refuse_processes
from dbscope.database import (
    BaseDatabase,
    make_engine,
    refuse_class,
    refuse_options,
    refuse_second,
    refuse_unbound,
    session_options,
    url_of,
)
from dbscope.errors import ConfigurationError, DBScopeError, OverlapError
from dbscope.fanout import afan_out
from dbscope.hooks import Hook, settle
from dbscope.instrument import instrument_sessions
from dbscope.lifecycle import life_of
from dbscope.plan import arun, to_completion
from dbscope.registry import be_a_dependency, forget, registry_for, stand_for, waits_for_owner
from dbscope.retry import Retry
from dbscope.session import derive, itself, refuse_copy, release
from dbscope.settings import Seconds
from dbscope.terms import DEFAULT, Resolution, TransactionOptions
from dbscope.transaction import AsyncTransaction, transactional

__all__ = ["AsyncDatabase", "AsyncSessionRegistry"]

S = TypeVar("S", bound=AsyncSession)
T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")

_hooks_at_once: set["asyncio.Future[Any]"] = set()  # a loop keeps tasks weakly


class AsyncSessionRegistry(async_scoped_session[S]):
    """The current scope's `AsyncSession`: call it for the session itself, or use it as if it were one."""

    registry: Any

    if TYPE_CHECKING:  # the members that `stand_for` adds below
        sync_session: Session

        def get_nested_transaction(self) -> AsyncSessionTransaction | None: ...
        def get_transaction(self) -> AsyncSessionTransaction | None: ...
        def in_nested_transaction(self) -> bool: ...
        def in_transaction(self) -> bool: ...
        async def run_sync(self, fn: Callable[Concatenate[Session, P], T], *arg: P.args, **kw: P.kwargs) -> T: ...

    def __init__(self, source: Any, factory: "async_sessionmaker[S]") -> None:
        self.session_factory = factory
        self._source = source
        be_a_dependency(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse_copy(repr(self))

    def __call__(self, **kw: Any) -> S:
        """The current scope's session, made now if there is none yet.

        Args:
            kw: options for the session, where it is made by this very call.

        Raises:
            InvalidRequestError: options were given and the session is there already.
            ScopeEndedError: the current scope is over.
            NoScopeError: no scope is open, or one that was opened with `with`.
        """
        return self.registry.session(**kw)  # type: ignore[no-any-return]  # an S; a database's own class is faster

    async def remove(self) -> None:
        """Async version of `SessionRegistry.remove`."""
        registry = self.registry
        if not registry.has():
            return
        session: AsyncSession = registry()
        if waits_for_owner(session):
            return
        try:
            await session.close()
        except DBScopeError:
            raise  # refused: nothing has happened
        except BaseException:
            forget(self, session)
            with contextlib.suppress(Exception):  # what closing raised stays on top
                await session.run_sync(release)
            raise
        forget(self, session)
        release(session.sync_session)

    def __repr__(self) -> str:
        return f"<the session of {self._source.name} in the current scope>"


stand_for(AsyncSessionRegistry, AsyncSession)


class AsyncDatabase(BaseDatabase, Generic[S]):
    """Async version of `Database`: for async drivers, with `async with` and `await`.

    Differences: sessions keep their loaded state after a commit (`expire_on_commit=False`), because reading an
    expired attribute would need an await; there is no implicit scope, because nobody would await its end.
    """

    is_async = True
    engine: AsyncEngine
    session: AsyncSessionRegistry[S]

    @overload
    def __init__(
        self,
        target: "str | URL | AsyncEngine",
        *,
        name: str | None = None,
        session_class: type[S],
        uncommitted: Literal["warn", "raise", "off"] = "warn",
        outcome: Resolution = "raise",
        **options: Any,
    ) -> None: ...

    @overload
    def __init__(
        self: "AsyncDatabase[AsyncSession]",
        target: "str | URL | AsyncEngine",
        *,
        name: str | None = None,
        uncommitted: Literal["warn", "raise", "off"] = "warn",
        outcome: Resolution = "raise",
        **options: Any,
    ) -> None: ...

    @overload
    def __init__(
        self,
        target: "async_sessionmaker[S]",
        *,
        name: str | None = None,
        uncommitted: Literal["warn", "raise", "off"] = "warn",
        outcome: Resolution = "raise",
    ) -> None: ...

    def __init__(
        self,
        target: Any,
        *,
        name: str | None = None,
        session_class: Any = AsyncSession,
        uncommitted: Literal["warn", "raise", "off"] = "warn",
        outcome: Resolution = "raise",
        **options: Any,
    ) -> None:
        url: URL | None = None
        memory: sqlite.Memory | None = None
        kw: dict[str, Any]
        refuse_class(session_class, AsyncSession)
        if isinstance(target, async_sessionmaker):
            refuse_options(options, "an async_sessionmaker")
            session_class, kw = target.class_, target.kw
            engine = refuse_unbound(kw.get("bind"), AsyncEngine)
        elif isinstance(target, AsyncEngine):
            engine = target
            kw = self._options(session_class, options)
            refuse_options(options, "an AsyncEngine")
            kw["bind"] = engine
        else:
            url = url_of(target, is_async=True)
            kw = self._options(session_class, options)
            engine, memory = make_engine(url, create_async_engine, options)
            kw["bind"] = engine
            refuse_second(self, url, memory)
        self.engine = engine
        self._set_up(
            engine,
            url=url,
            name=name,
            implicit_scopes=False,
            uncommitted=uncommitted,
            outcome=outcome,
            memory=memory,
        )
        sync_class: type[Session] = kw.pop("sync_session_class", None) or session_class.sync_session_class
        self.sync_session_class = derive(sync_class)
        instrument_sessions(self.sync_session_class)
        kw["sync_session_class"] = self.sync_session_class
        guarded = type(session_class.__name__, (_Guarded, session_class), {"__module__": session_class.__module__})
        self._maker = async_sessionmaker(class_=guarded)
        self._maker.kw = kw
        self._class = self._maker.class_
        self.session = registry_for(AsyncSessionRegistry, self, session_class, AsyncSession)(self, self._maker)
        self._tell_made()

    @staticmethod
    def _options(session_class: type[AsyncSession], options: dict[str, Any]) -> dict[str, Any]:
        sync_class = options.get("sync_session_class", session_class.sync_session_class)
        taken = {
            **session_options(session_class, options),
            **session_options(sync_class, options),
        }
        taken.setdefault("expire_on_commit", False)
        return taken

    def transaction(self, **options: Unpack[TransactionOptions]) -> AsyncTransaction[S]:
        """Async version of `Database.transaction`."""
        return AsyncTransaction(self, self._terms(options))

    def reader(self, *, autocommit: bool = False) -> AsyncTransaction[S]:
        """Async version of `Database.reader`."""
        return AsyncTransaction(self, self._reader_terms(autocommit))

    async def run(self, function: Callable[[*Ts], Awaitable[R]], *args: *Ts, retry: Retry | int = 3) -> R:
        """Async version of `Database.run`, for a coroutine function. A cancel ends a pause at once."""
        if not callable(function):
            raise ConfigurationError(f"run() is given a function, and its arguments follow it; this is {function!r}.")
        return await transactional(self, function, DEFAULT, retry)(*args)

    def on_commit(
        self, function: Callable[..., Any], /, *args: Any, robust: bool = False, **kwargs: Any
    ) -> Awaitable[None]:
        """Async version of `Database.on_commit`: the function may be a coroutine function.

        Returns:
            an awaitable that need not be awaited. Outside of a transaction a coroutine function is started at once,
            and this waits for it.
        """
        return _started(self._hook("commit", function, args, kwargs, robust=robust))

    def on_rollback(self, function: Callable[..., Any], /, *args: Any, robust: bool = False, **kwargs: Any) -> None:
        """Async version of `Database.on_rollback`: the function may be a coroutine function."""
        self._hook("rollback", function, args, kwargs, robust=robust)

    def run_hooks(self, hooks: Sequence[Hook]) -> None:
        """Run the hooks of a transaction that its user ended: SQLAlchemy calls this inside of its greenlet."""
        await_only(arun(settle(hooks, None)))

    async def fan_out(
        self,
        function: Callable[[T], Awaitable[R]],
        items: Iterable[T],
        *,
        name: str | None = None,
        limit: int | None = None,
    ) -> list[R]:
        """Async version of `Database.fan_out`, for a coroutine function, in tasks: an error cancels the others."""
        return await afan_out(self, self.slots, function, items, name=name, limit=limit)

    async def check_capacity(self, processes: int) -> Capacity:
        """Async version of `Database.check_capacity`."""
        refuse_processes(processes)
        async with self.engine.connect() as connection:
            found = await connection.run_sync(lambda sync: capacity_of(self._pools(), processes, sync))
        return refuse_more(found, self.name)

    def apart(
        self,
        name: str,
        *,
        connections: int = 1,
        lock_timeout: Seconds | None = 5.0,
        statement_timeout: Seconds | None = None,
    ) -> Self:
        """Async version of `Database.apart`: use it in an `async with` block."""
        work = work_of(self._sync_engine, name, connections, lock_timeout, statement_timeout)
        return self._apart(work, AsyncEngine)

    def new_session(self, **options: Any) -> S:
        """Async version of `Database.new_session`."""
        session = self.make(None, options or None)
        self._loose.add(session.sync_session)
        return cast("S", session)

    async def dispose(self) -> None:
        """Async version of `Database.dispose`."""
        self._disposing()
        loop, self._loop = self._loop, None
        if loop is None or loop is asyncio.get_running_loop() or self._drops_loops:
            await self._close_pools()
        elif loop.is_running():
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._close_pools(), loop))
        else:
            for engine in (self._sync_engine, *self._engines.apart()):
                engine.dispose(close=False)  # closing would need the loop, which is gone
        if self._memory is not None:
            self._memory.close()

    async def _close_pools(self) -> None:
        for engine in (self.engine, *map(AsyncEngine, self._engines.apart())):
            await engine.dispose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await to_completion(asyncio.ensure_future(self.dispose()))


class _Guarded:
    """Goes before the user's session class."""

    __await__ = itself

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Close; SQLAlchemy does so in a task of its own, where nobody sees that the body has failed."""
        life = life_of(self)
        dropped = life.dropped
        try:
            await super().__aexit__(kind, error, tb)  # type: ignore[misc]  # AsyncSession's
        except OverlapError as refused:
            if error is None:
                raise
            error.add_note(str(refused))  # this is clean-up: the user's error stays on top
        if error is not None:
            life.dropped = dropped  # the error says that the work is undone


def _started(call: Callable[[], Any] | None) -> Awaitable[None]:
    """Call a hook at once; what can be awaited where it is still running, or was never needed."""
    result = None if call is None else call()
    if asyncio.iscoroutine(result):
        task = asyncio.ensure_future(result)
        _hooks_at_once.add(task)
        task.add_done_callback(_hooks_at_once.discard)
        return task
    return _Done()


class _Done:
    """An awaitable that is through already."""

    def __await__(self) -> Any:
        return
        yield
