"""The same bank without dbscope: thread-local sessions, written by hand as many applications have them.

One session for each thread, a context manager that commits or rolls back, and a middleware that removes the session
when the response is through. The endpoints are the same; what is lost is found by the same audit.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from types import TracebackType
from typing import Any, cast

from sqlalchemy import URL, create_engine
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from dbscope.cli.demo.doors import Doors

__all__ = ["open_doors"]

IMPATIENCE = 0.3  # seconds to wait for a lock or a connection: what waits here mostly waits in vain


class NoScope:
    """Stands for `dbscope.scope`: there is none."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> "NoScope":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass

    async def __aenter__(self) -> "NoScope":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        pass


class ThreadLocal:
    """Stands for `Database`."""

    def __init__(self, url: URL, **options: Any) -> None:
        self.engine = create_engine(url, pool_timeout=IMPATIENCE, **_limits(url), **options)
        self.maker = sessionmaker(self.engine)
        self.session = scoped_session(self.maker)

    @contextmanager
    def transaction(self, *, new: bool = False) -> Iterator[Session]:
        """Commit at the end, or roll back."""
        session = self.maker() if new else self.session()
        try:
            yield session
            session.commit()
        except BaseException:
            session.rollback()
            raise
        finally:
            if new:
                session.close()

    @contextmanager
    def reader(self) -> Iterator[Session]:
        """The same session, to read."""
        yield self.session()

    def on_commit(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Do it now: nobody knows when the commit will be."""
        function(*arguments)

    def fan_out(
        self, function: Callable[[Any], Any], items: Iterable[Any], *, name: str, limit: int | None = None
    ) -> list[Any]:
        """Threads, and with them sessions that nobody removes."""
        with ThreadPoolExecutor(limit, thread_name_prefix=name) as threads:
            return [*threads.map(function, items)]

    def dispose(self) -> None:
        """Close the pool, and this thread's session, which nobody has removed."""
        self.session.remove()
        self.engine.dispose()


class LoopLocal:
    """Stands for `AsyncDatabase`: the thread is the loop's, and so is the session; all requests share it."""

    def __init__(self, url: URL) -> None:
        self.engine = create_async_engine(url, pool_timeout=IMPATIENCE, **_limits(url))
        self.maker = async_sessionmaker(self.engine, expire_on_commit=False)
        self.session = async_scoped_session(self.maker, scopefunc=lambda: "the loop's thread")

    @asynccontextmanager
    async def transaction(self, *, new: bool = False) -> AsyncIterator[AsyncSession]:
        """Commit at the end, or roll back."""
        session = self.maker() if new else self.session()
        try:
            yield session
            await session.commit()
        except BaseException:
            await session.rollback()
            raise
        finally:
            if new:
                await session.close()

    @asynccontextmanager
    async def reader(self) -> AsyncIterator[AsyncSession]:
        """The same session, to read."""
        yield self.session()

    def on_commit(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Do it now: nobody knows when the commit will be."""
        function(*arguments)

    async def fan_out(
        self, function: Callable[[Any], Awaitable[Any]], items: Iterable[Any], *, name: str, limit: int | None = None
    ) -> list[Any]:
        """One after the other: side by side they would raise at once."""
        return [await function(item) for item in items]

    async def dispose(self) -> None:
        """Close the pool, and the session."""
        with suppress(Exception):  # it may be in the middle of something
            await self.session.remove()
        await self.engine.dispose()


def _limits(url: URL) -> dict[str, Any]:
    """Options that end a wait for a lock: a session that waits for its own request would wait for ever."""
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": IMPATIENCE}}
    if url.drivername == "postgresql+asyncpg":
        return {"connect_args": {"server_settings": {"lock_timeout": f"{IMPATIENCE * 1000:.0f}"}}}
    return {"connect_args": {"options": f"-c lock_timeout={IMPATIENCE * 1000:.0f}"}}


def open_doors(urls: tuple[URL, URL]) -> Doors:
    """The databases and the middlewares."""
    sync_url, async_url = urls
    db, adb = ThreadLocal(sync_url), LoopLocal(async_url)

    def wsgi(app: Any, commit: str | None) -> Any:
        def middleware(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
            try:
                yield from app(environ, start_response)
                if commit:
                    db.session.commit()
            finally:
                db.session.remove()

        return middleware

    def asgi(app: Any, commit: str | None) -> Any:
        async def middleware(message: dict[str, Any], receive: Any, send: Any) -> None:
            try:
                await app(message, receive, send)
                if commit:
                    await adb.session.commit()
            finally:
                with suppress(Exception):  # another request is using it
                    await adb.session.remove()

        return middleware

    return Doors(
        db=cast("Any", db),
        adb=cast("Any", adb),
        narrow=cast("Any", ThreadLocal(sync_url, pool_size=1, max_overflow=0)),
        dry=cast("Any", ThreadLocal(sync_url, pool_size=1, max_overflow=0)),
        scope=cast("Any", NoScope),
        wsgi=wsgi,
        asgi=asgi,
        another=cast("Any", lambda: ThreadLocal(sync_url)),
    )
