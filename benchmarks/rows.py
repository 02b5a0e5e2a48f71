"""The rows: what is compared, how each contender ends its work, and the target.

Contenders are at their best configuration and give the same guarantees as far as they can: each `ends` says what they
do with the transaction. Wherever one closes a session that is closed anyway, it would only be made to look slow.
"""

import importlib
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sqlalchemy import create_engine, event, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from benchmarks.measure import Contender, Missing, Row
from dbscope import Database, scope
from tests.support.postgres import Postgres, PostgresNotFound


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int]


BALANCE = select(Account.balance).where(Account.id == 1)

# -- what they are compared with ---------------------------------------------------------------------------------------

REQUEST: ContextVar[str | None] = ContextVar("request", default=None)


def galaxy(maker: "sessionmaker[Session]") -> SimpleNamespace:
    """Galaxy's model object: a registry keyed by the request's id, and by the thread outside of requests."""
    import threading

    registry = scoped_session(maker, scopefunc=lambda: REQUEST.get() or threading.get_ident())

    def set_request_id(id: str) -> Any:
        return REQUEST.set(id)

    def unset_request_id(id: str) -> None:
        if id in registry.registry.registry:
            registry.registry.registry[id].close()
            del registry.registry.registry[id]

    return SimpleNamespace(session=registry, set_request_id=set_request_id, unset_request_id=unset_request_id)


def sqlite_engine(path: Path) -> Any:
    """What the others use on SQLite: the settings and the explicit BEGIN of dbscope's, as cheap as it gets.

    The BEGIN goes into the dialect. SQLAlchemy's documented recipe, a listener on the engine's "begin", costs a
    quarter of a SELECT; it is a contender of its own.
    """
    engine = create_engine(f"sqlite:///{path}")

    @event.listens_for(engine, "connect")
    def connect(connection: Any, record: object) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA journal_mode = WAL")

    return engine


def begin_in_dialect(engine: Any, begin: str = "BEGIN") -> Any:
    """Let the engine begin explicitly."""
    engine.dialect.do_begin = lambda connection: connection.execute(begin)
    return engine


def begin_by_recipe(engine: Any) -> Any:
    """The same by SQLAlchemy's documented recipe."""
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


# -- the namespace that contenders run in ------------------------------------------------------------------------------


@contextmanager
def on_sqlite() -> Iterator[dict[str, Any]]:
    """Names for rows on SQLite."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder) / "bank.db"
        db = stack.enter_context(Database(f"sqlite:///{path}"))
        engine = begin_in_dialect(sqlite_engine(path))
        recipe = begin_by_recipe(sqlite_engine(path))
        immediate = begin_in_dialect(sqlite_engine(path), "BEGIN IMMEDIATE")
        stack.callback(engine.dispose)
        stack.callback(recipe.dispose)
        stack.callback(immediate.dispose)
        yield {**sync_names(db, engine), "recipe": recipe, "writing": sessionmaker(immediate)}


def sync_names(db: Any, engine: Any) -> dict[str, Any]:
    """dbscope's and the others' names, over two pools to the same database."""
    Base.metadata.create_all(engine)
    maker = sessionmaker(engine)
    with maker.begin() as session:
        session.merge(Account(id=1, balance=100))
    model = galaxy(maker)
    return {
        "Account": Account,
        "BALANCE": BALANCE,
        "Session": Session,
        "begin": maker.begin,
        "writing": maker,
        "db": db,
        "engine": engine,
        "ids": map(str, iter(uuid.uuid4, None)),
        "keyed": scoped_session(maker, scopefunc=lambda: REQUEST.get()),
        "maker": maker,
        "model": model,
        "scope": scope,
        "scoped": scoped_session(maker),
    }


def needs(*modules: str) -> None:
    """Raise `Missing` unless all of them can be imported."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise Missing(f"{module} is not installed") from error


@contextmanager
def on_async_sqlite() -> Iterator[dict[str, Any]]:
    """Names for async rows without SQL: the driver is never reached."""
    needs("greenlet", "aiosqlite")
    from sqlalchemy.ext.asyncio import create_async_engine

    from dbscope import AsyncDatabase

    db = AsyncDatabase("sqlite+aiosqlite://")
    try:
        yield async_names(db, create_async_engine("sqlite+aiosqlite://"))
    finally:
        db._memory.close()  # there is no connection, and no loop, to dispose of


def async_names(db: Any, engine: Any) -> dict[str, Any]:
    """dbscope's and the others' names, async."""
    import asyncio

    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker

    maker = async_sessionmaker(engine, expire_on_commit=False)
    return {
        "Account": Account,
        "AsyncSession": AsyncSession,
        "BALANCE": BALANCE,
        "asession": db.session,
        "adb": db,
        "aengine": engine,
        "amaker": maker,
        "ascoped": async_scoped_session(maker, scopefunc=asyncio.current_task),
        "scope": scope,
    }


class Server:
    """An embedded PostgreSQL, started for the first row that asks for it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._server: Postgres | None = None
        self._missing: str | None = None

    def url(self, driver: str) -> str:
        """The URL of an empty database; raise `Missing` where no server can be had."""
        if self._missing is not None:
            raise Missing(self._missing)
        if self._server is None:
            try:
                self._server = self._stack.enter_context(Postgres())
            except (PostgresNotFound, OSError, RuntimeError) as error:
                self._missing = f"no PostgreSQL: {error}".splitlines()[0]
                raise Missing(self._missing) from error
        return self._server.url(driver, self._server.create_database())

    @contextmanager
    def sync(self) -> Iterator[dict[str, Any]]:
        """Names for rows on PostgreSQL."""
        needs("psycopg")
        url = self.url("psycopg")
        engine = create_engine(url, pool_pre_ping=True)
        with Database(url) as db:
            yield sync_names(db, engine)
        engine.dispose()

    @contextmanager
    def asynchronous(self) -> Iterator[dict[str, Any]]:
        """Names for async rows on PostgreSQL. The pools are emptied by the contenders' loop."""
        needs("greenlet", "asyncpg", "psycopg")
        from sqlalchemy.ext.asyncio import create_async_engine

        from dbscope import AsyncDatabase

        url = self.url("asyncpg")
        engine = create_engine(url.replace("asyncpg", "psycopg"))
        sync_names(None, engine)
        engine.dispose()
        yield async_names(AsyncDatabase(url), create_async_engine(url, pool_pre_ping=True))


# -- the rows ----------------------------------------------------------------------------------------------------------

Place = Callable[[], Any]  # makes the names
UPDATE = " as session:\n    session.get(Account, 1).balance += 1"
IN_SCOPE = "scope().__enter__()\ndb.session()"
IN_REQUEST = "model.set_request_id('r')\nmodel.session()"


def look_ups(what: Callable[[str], str], dbscope: str) -> list[Contender]:
    """The same on every registry that is called, thread-local `scoped_session` last."""
    return [
        Contender("dbscope", dbscope, setup=IN_SCOPE),
        Contender("scoped_session, scopefunc", what("keyed"), setup="keyed()"),
        Contender("Galaxy's", what("model.session"), setup=IN_REQUEST),
        Contender("scoped_session", what("scoped"), setup="scoped()"),
    ]


def rows(server: Server) -> list[tuple[Row, Place]]:
    """All rows, each with what makes the names that its code uses."""
    return [
        (
            Row("look-up in a scope, `registry()`", look_ups("{}()".format, "db.session.registry()"), 0.35, steps=10),
            on_sqlite,
        ),
        (
            Row("look-up in a scope, `db.session()`", look_ups("{}()".format, "db.session()"), 0.55, steps=10),
            on_sqlite,
        ),
        (
            Row(
                "look-up outside of any scope",
                [
                    Contender("dbscope", "db.session()", setup="db.session()"),
                    Contender("Galaxy's", "model.session()", setup="model.session()"),
                    Contender("scoped_session", "scoped()", setup="scoped()"),
                ],
                0.85,
                steps=10,
            ),
            on_sqlite,
        ),
        (
            Row("an attribute through the registry", look_ups("{}.autoflush".format, "db.session.autoflush"), 0.60, 10),
            on_sqlite,
        ),
        (
            Row("a method through the registry", look_ups("{}.add_all(())".format, "db.session.add_all(())"), 0.45, 10),
            on_sqlite,
        ),
        (
            Row(
                "a scope in which no session is used",
                [
                    Contender("dbscope", "with scope():\n    pass", "nothing"),
                    Contender("with Session", "with Session(engine):\n    pass", "close"),
                ],
                0.13,
            ),
            on_sqlite,
        ),
        (
            Row(
                "an on-success scope in which nothing is done",
                [
                    Contender("dbscope", 'with scope(commit="on-success"):\n    pass', "nothing to commit"),
                    Contender("sessionmaker.begin()", "with begin():\n    pass", "commit of nothing, close"),
                ],
                0.04,
            ),
            on_sqlite,
        ),
        (
            Row(
                "scope and session, no SQL",
                [
                    Contender("dbscope", "with scope():\n    db.session()", "end of the scope: nothing is held"),
                    Contender("scoped_session", "scoped()\nscoped.remove()", "close"),
                    Contender("scoped_session, scopefunc", "keyed()\nkeyed.remove()", "close"),
                    Contender(
                        "Galaxy's",
                        "id = next(ids)\nmodel.set_request_id(id)\nmodel.session()\nmodel.unset_request_id(id)",
                        "close (making the id costs about 2 us of it)",
                    ),
                    Contender("with Session", "with Session(engine):\n    pass", "close"),
                ],
                1.12,
            ),
            on_sqlite,
        ),
        (
            Row(
                "scope and session, async, no SQL",
                [
                    Contender("dbscope", "async with scope():\n    asession()", "end of the scope", is_async=True),
                    Contender("async_scoped_session", "ascoped()\nawait ascoped.remove()", "close", is_async=True),
                    Contender(
                        "plain close", "await AsyncSession(aengine).close()", "close, not shielded", is_async=True
                    ),
                    Contender(
                        "async with AsyncSession",
                        "async with AsyncSession(aengine):\n    pass",
                        "close, shielded",
                        is_async=True,
                    ),
                ],
                0.30,
            ),
            on_async_sqlite,
        ),
        (
            Row("scope and SELECT, SQLite", selects(recipe=True), 1.10, sql=True, note="BEGIN is explicit for all"),
            on_sqlite,
        ),
        (Row("scope and SELECT, PostgreSQL", selects(), sql=True, waits=True), server.sync),
        (Row("`reader(autocommit=True)` and SELECT, PostgreSQL", readers(), 0.70, sql=True, waits=True), server.sync),
        (
            Row(
                "`reader(autocommit=True)` and SELECT, PostgreSQL, async",
                [
                    Contender(
                        "dbscope",
                        "async with adb.reader(autocommit=True) as session:\n    await session.scalar(BALANCE)",
                        "end of the reader: nothing was begun",
                        is_async=True,
                    ),
                    Contender(
                        "dbscope, reader()",
                        "async with adb.reader() as session:\n    await session.scalar(BALANCE)",
                        "end of the reader: rolls back",
                        is_async=True,
                    ),
                    Contender(
                        "async with AsyncSession",
                        "async with amaker() as session:\n    await session.scalar(BALANCE)",
                        "close, shielded: rolls back",
                        is_async=True,
                    ),
                ],
                0.63,
                sql=True,
                waits=True,
            ),
            server.asynchronous,
        ),
        (
            Row("block with an UPDATE, SQLite", updates(), sql=True, waits=True, note="BEGIN IMMEDIATE for all"),
            on_sqlite,
        ),
        (Row("block with an UPDATE, PostgreSQL", updates(), sql=True, waits=True), server.sync),
        (
            Row(
                'block with an UPDATE, `outcome="resolve"`, PostgreSQL',
                resolved(),
                sql=True,
                waits=True,
                note="the transaction's id, before the COMMIT, is a trip more",
            ),
            server.sync,
        ),
        (
            Row(
                "scope, ORM get and commit, PostgreSQL, async",
                [
                    Contender(
                        "dbscope",
                        "async with scope():\n    session = adb.session()\n    await session.get(Account, 1)\n"
                        "    await session.commit()",
                        "commit by the user; a cancelled end gives back all",
                        is_async=True,
                    ),
                    Contender(
                        "dbscope, transaction()",
                        "async with adb.transaction() as session:\n    await session.get(Account, 1)",
                        "commit; however often it is cancelled, the end gives back all",
                        is_async=True,
                    ),
                    Contender(
                        "async_scoped_session",
                        "await ascoped.get(Account, 1)\nawait ascoped.commit()\nawait ascoped.remove()",
                        "commit, close; lost if cancelled",
                        is_async=True,
                    ),
                    Contender(
                        "async with AsyncSession",
                        "async with amaker() as session:\n    await session.get(Account, 1)\n"
                        "    await session.commit()",
                        "commit, close shielded once",
                        is_async=True,
                    ),
                ],
                0.95,
                sql=True,
                waits=True,
            ),
            server.asynchronous,
        ),
    ]


def selects(*, recipe: bool = False) -> list[Contender]:
    """One SELECT of a column."""
    by_recipe = Contender(
        "with Session, BEGIN by the recipe",
        "with Session(recipe) as session:\n    session.scalar(BALANCE)",
        "close: rolls back",
    )
    return [
        Contender("dbscope", "with scope():\n    db.session.scalar(BALANCE)", "end of the scope: rolls back"),
        Contender("scoped_session", "scoped.scalar(BALANCE)\nscoped.remove()", "close: rolls back"),
        *([by_recipe] if recipe else []),
        Contender("with Session", "with Session(engine) as session:\n    session.scalar(BALANCE)", "close: rolls back"),
    ]


def readers() -> list[Contender]:
    """The same in readers."""
    return [
        Contender(
            "dbscope",
            "with db.reader(autocommit=True) as session:\n    session.scalar(BALANCE)",
            "end of the reader: nothing was begun",
        ),
        Contender(
            "dbscope, reader()",
            "with db.reader() as session:\n    session.scalar(BALANCE)",
            "end of the reader: rolls back",
        ),
        Contender("with Session", "with Session(engine) as session:\n    session.scalar(BALANCE)", "close: rolls back"),
    ]


def updates() -> list[Contender]:
    """A managed block that changes a row through the ORM."""
    return [
        Contender("dbscope", f"with db.transaction(){UPDATE}", "commit"),
        Contender("sessionmaker.begin()", f"with writing.begin(){UPDATE}", "commit"),
    ]


def resolved() -> list[Contender]:
    """What it costs to be able to ask what became of a commit, against the same block without."""
    return [
        Contender("dbscope, resolving", f'with db.transaction(outcome="resolve"){UPDATE}', "commit, its id known"),
        Contender("dbscope", f"with db.transaction(){UPDATE}", "commit"),
    ]
