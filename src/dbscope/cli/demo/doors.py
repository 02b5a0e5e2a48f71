"""The doors to the database, as a service that uses dbscope sets them up."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from dbscope import AsyncDatabase, Database, Scope, scope
from dbscope.integrations.asgi import ScopeMiddleware as ASGIMiddleware
from dbscope.integrations.wsgi import ScopeMiddleware as WSGIMiddleware

__all__ = ["PATIENCE", "Doors", "open_doors"]

__dbscope_user_code__ = True  # errors name its lines, as they would those of a user's

SPARE = 10  # connections: for the job handler, the workers, and mistakes that need two
DRY = "the safe"  # the name of the database whose pool runs dry
IMPATIENCE = 0.2  # seconds to wait for a connection of the pool that runs dry
PATIENCE = 30.0  # seconds to wait for SQLite's write lock: one writer at a time, and the load does not let up


@dataclass(frozen=True)
class Doors:
    """What the endpoints use of dbscope; `unprotected` has the same, written by hand."""

    db: Database[Session]
    adb: AsyncDatabase[AsyncSession]
    narrow: Database[Session]  # with a pool of one connection
    dry: Database[Session]  # the same, and little patience
    scope: Callable[[str], Scope]
    wsgi: Callable[..., Any]  # the middleware: called with an application and what to commit
    asgi: Callable[..., Any]
    another: Callable[[], Database[Session]]  # what a handler does that makes an engine for each request

    @property
    def engines(self) -> dict[str, Engine]:
        """The engines, the async one's sync side."""
        of_one = {"of one": self.narrow.engine, "dry": self.dry.engine}
        return {"sync": self.db.engine, "async": self.adb.engine.sync_engine, **of_one}


def open_doors(
    urls: tuple[URL, URL], *, clients: int, uncommitted: Any = "raise", wsgi: Any = None, asgi: Any = None
) -> Doors:
    """The databases and the middlewares.

    Args:
        urls: the sync and the async driver's.
        clients: how many requests there may be at the same time.
        uncommitted: as for `Database`.
        wsgi: a middleware instead of dbscope's.
        asgi: the same.
    """
    sync_url, async_url = urls
    # One mistake asks for a second connection while it holds a lock. If all others were held by those who wait for
    # that lock, everybody would wait for ever; so there is one for each client, and some to spare.
    options: dict[str, Any] = {"uncommitted": uncommitted, "pool_size": SPARE, "max_overflow": clients}
    if sync_url.get_backend_name() == "sqlite":
        options["connect_args"] = {"timeout": PATIENCE}
    db = Database(sync_url, name="the bank", **options)
    return Doors(
        db=db,
        adb=AsyncDatabase(async_url, name="the bank (async)", **options),
        narrow=Database(create_engine(sync_url, pool_size=1, max_overflow=0), name="the vault"),
        dry=Database(create_engine(sync_url, pool_size=1, max_overflow=0, pool_timeout=IMPATIENCE), name=DRY),
        scope=scope,
        wsgi=wsgi or WSGIMiddleware,
        asgi=asgi or ASGIMiddleware,
        another=lambda: Database(sync_url),
    )
