"""Kits: one small API over both colours, so that a promise shared by both is written once and run twice.

    @twice
    async def test_a_commit_is_kept(kit):
        async with kit.scope("booking"):
            session = kit.session()
            session.add(Payment(amount=500))
            await kit.done(session.commit())
        assert kit.count() == 1

With the sync kit nothing in such a test ever waits, and it runs in a plain thread, outside of every event loop; with
the async kit it runs on a loop of its own. After it nothing may be left checked out: that fails the test.

Fixtures: `kit` (SQLite in a file, both colours), `server_kit` (PostgreSQL, both colours), and for tests of one colour
`sync_kit`, `async_kit`, `sync_server_kit`, `async_server_kit`, which need no `@twice`.
"""

import asyncio
import contextvars
import functools
import inspect
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import ForeignKey, NullPool, create_engine, func, make_url, select
from sqlalchemy.engine import URL, Engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import dbscope
from dbscope.conformance import _Now
from tests.support import needs

LIMIT = 60.0  # seconds until a test gives up on something that never happens; a machine may be busy


class Base(DeclarativeBase):
    """What the tests store."""


class Account(Base):
    __tablename__ = "accounts"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="", unique=True)
    balance: Mapped[int] = mapped_column(default=0)


class Payment(Base):
    __tablename__ = "payments"

    id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int] = mapped_column(default=500)
    account_id: Mapped[int | None] = mapped_column(ForeignKey(Account.id))


class Kit:
    """Databases with the tables above, of one colour and one kind. Use a subclass."""

    colour = ""
    drivers: dict[str, str]

    def __init__(self, url: str | URL) -> None:
        """Over the (sync) URL of a database that is there, or of a SQLite file that is made."""
        self.url = make_url(url)
        self.databases: list[Any] = []
        self._own: Any = None
        self._making = threading.RLock()  # several threads of a test may ask at once

    @property
    def db(self) -> Any:
        """The test's database, made when it is first needed; `database(…)` without a target, before, decides how."""
        with self._making:
            return self._own or self.database()

    @functools.cached_property
    def outside(self) -> Engine:
        """An engine that dbscope knows nothing of; it keeps no connections."""
        return create_engine(self.url, poolclass=NullPool)

    def database(self, target: Any = None, **options: Any) -> Any:
        """A new database (`Database` or `AsyncDatabase`); on the kit's own URL, if none is given, with the tables."""
        own = target is None
        if own:
            Base.metadata.create_all(self.outside)
            target = self.url.set(drivername=self.drivers[self.url.get_backend_name()])
        made = self._class()(target, **options)
        if own and self._own is None:
            self._own = made
        self.databases.append(made)
        return made

    def memory(self, *, own: bool = False, **options: Any) -> Any:
        """A new database in memory, without tables; with `own` it is the one that `db` gives."""
        made = self.database(f"{self.drivers['sqlite']}://", **options)
        if own:
            self._own = made
        return made

    def file(self, path: Path, **options: Any) -> Any:
        """A new database in another SQLite file, with the tables."""
        engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)
        Base.metadata.create_all(engine)
        return self.database(f"{self.drivers['sqlite']}:///{path}", **options)

    def session(self, db: Any = None) -> Any:
        """The current scope's session."""
        return (db or self.db).session()

    def count(self, model: type[Base] = Payment) -> int:
        """How many rows are committed, as an independent connection sees it."""
        with self.outside.connect() as connection:
            return connection.scalar(select(func.count()).select_from(model)) or 0

    def amounts(self) -> list[int]:
        """The amounts of the committed payments, as an independent connection sees them, sorted."""
        with self.outside.connect() as connection:
            return sorted(connection.scalars(select(Payment.amount)))

    def checked_out(self, db: Any = None) -> int:
        """How many connections the database's pool has given out now."""
        pool: Any = (db or self.db).engine.pool
        return int(pool.checkedout())

    def done(self, value: Any) -> Awaitable[Any]:
        """What a call of a session gave, for `await`; the awaitable itself, so that the awaiting line is the test's."""
        return value if inspect.isawaitable(value) else _Now(value)

    def block(self, manager: Any) -> AbstractAsyncContextManager[Any]:
        """A context manager of this colour, for `async with`."""
        raise NotImplementedError

    def scope(self, *args: Any, **options: Any) -> AbstractAsyncContextManager[Any]:
        """`with scope(…)` or `async with scope(…)`."""
        return self.block(dbscope.scope(*args, **options))

    def transaction(self, db: Any = None, **options: Any) -> AbstractAsyncContextManager[Any]:
        """`with db.transaction(…)` or `async with db.transaction(…)`."""
        return self.block((db or self.db).transaction(**options))

    def reader(self, db: Any = None, **options: Any) -> AbstractAsyncContextManager[Any]:
        """`with db.reader(…)` or `async with db.reader(…)`."""
        return self.block((db or self.db).reader(**options))

    def event(self) -> Any:
        """Something to `await event.wait()` for, between the parts of `together`."""
        raise NotImplementedError

    async def together(self, *parts: Callable[[], Awaitable[Any]]) -> list[Any]:
        """Run the parts at the same time, in threads or tasks that inherit this context.

        Returns:
            of each part its result, or the exception it raised.
        """
        raise NotImplementedError

    def run(self, test: Coroutine[Any, Any, None]) -> None:
        """Run a test, then dispose of its databases."""
        raise NotImplementedError

    def _class(self) -> Callable[..., Any]:
        raise NotImplementedError


class SyncKit(Kit):
    """Sync databases, in plain threads."""

    colour = "sync"
    drivers = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg"}

    def block(self, manager: Any) -> AbstractAsyncContextManager[Any]:
        return _Block(manager)

    def event(self) -> Any:
        return _Event()

    async def together(self, *parts: Callable[[], Awaitable[Any]]) -> list[Any]:
        def part(function: Callable[[], Awaitable[Any]]) -> Any:
            return drive(function())

        with ThreadPoolExecutor(max(1, len(parts)), thread_name_prefix="part") as threads:
            futures: list[Future[Any]] = [
                threads.submit(contextvars.copy_context().run, part, function) for function in parts
            ]
        return [future.exception() or future.result() for future in futures]

    def run(self, test: Coroutine[Any, Any, None]) -> None:
        try:
            contextvars.copy_context().run(drive, test)  # what a test leaves current is gone with it
        except BaseException:
            self.close(failing=True)
            raise
        self.close()

    def close(self, *, failing: bool = False) -> None:
        """Dispose of the databases, which fails if a connection is still checked out."""
        for db in self.databases:
            try:
                db.dispose()
            except dbscope.ScopeWarning:
                if not failing:
                    raise

    def _class(self) -> Callable[..., Any]:
        return dbscope.Database


class AsyncKit(Kit):
    """Async databases, on a loop of the test's own."""

    colour = "async"
    drivers = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}

    def block(self, manager: Any) -> AbstractAsyncContextManager[Any]:
        block: AbstractAsyncContextManager[Any] = manager
        return block

    def event(self) -> Any:
        return asyncio.Event()

    async def together(self, *parts: Callable[[], Awaitable[Any]]) -> list[Any]:
        return await asyncio.gather(*(_awaited(part) for part in parts), return_exceptions=True)

    def run(self, test: Coroutine[Any, Any, None]) -> None:
        async def main() -> None:
            async with self._closing():
                await test

        asyncio.run(main())

    @asynccontextmanager
    async def _closing(self) -> AsyncIterator[None]:
        try:
            yield
        except BaseException:
            await self.aclose(failing=True)
            raise
        await self.aclose()

    async def aclose(self, *, failing: bool = False) -> None:
        """Dispose of the databases, which fails if a connection is still checked out."""
        for db in self.databases:
            try:
                await db.dispose()
            except dbscope.ScopeWarning:
                if not failing:
                    raise

    def _class(self) -> Callable[..., Any]:
        return dbscope.AsyncDatabase


def twice(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test by its kit, `kit` or `server_kit`: without a loop in sync, on a loop of its own in async."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        kit: Kit = fixtures.get("kit") or fixtures["server_kit"]
        kit.run(test(**fixtures))

    return run


def of_colour(kit: Kit, body: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
    """`body` as a function of the kit's colour."""
    if kit.colour == "async":
        return body

    @functools.wraps(body)
    def call(*args: Any, **kwargs: Any) -> Any:
        return drive(body(*args, **kwargs))

    del call.__wrapped__  # it would be taken for a coroutine function
    return call


def make_kit(colour: str, url: str | URL) -> Kit:
    """A kit of a colour; skips the test where the colour's drivers are not installed."""
    if colour == "sync":
        return SyncKit(url)
    needs.module("greenlet", extra="async")
    if make_url(url).get_backend_name() == "sqlite":
        needs.module("aiosqlite", extra="aiosqlite")
    else:
        needs.module("asyncpg", extra="asyncpg")
    return AsyncKit(url)


def drive(coroutine: Any) -> Any:
    """Run a coroutine that never waits, in this thread and outside of every loop."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    coroutine.close()
    raise AssertionError("with the sync kit a test cannot wait for anything but the kit's own events")


async def _awaited(part: Callable[[], Awaitable[Any]]) -> Any:
    return await part()


class _Block:
    """A sync context manager behind `async with`: it never waits. Errors name its line, which is a user's here."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager

    async def __aenter__(self) -> Any:
        return self.manager.__enter__()

    async def __aexit__(self, *error: Any) -> Any:
        return self.manager.__exit__(*error)


class _Event:
    """A thread's event with the face of a task's."""

    def __init__(self) -> None:
        self._event = threading.Event()

    async def wait(self) -> None:
        assert self._event.wait(LIMIT), "nobody set the event"

    def set(self) -> None:
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set()
