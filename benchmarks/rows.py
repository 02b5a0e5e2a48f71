"""The rows: what is compared, how each contender ends its work, and the target.

Contenders are at their best configuration and give the same guarantees as far as they can: each `ends` says what they
do with the transaction. Wherever one closes a session that is closed anyway, it would only be made to look slow.
"""

import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from benchmarks import peers
from benchmarks.measure import Contender, Missing, Row, needs
from benchmarks.peers import REQUEST, begin_by_recipe, begin_in_dialect, galaxy, sqlite_engine
from dbscope import Database, scope
from dbscope.guards import policy
from tests.support.postgres import Postgres, PostgresNotFound


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int]


BALANCE = select(Account.balance).where(Account.id == 1)

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
        names = sync_names(db, engine)
        yield {**names, "path": path, "peers": peers, "recipe": recipe, "writing": sessionmaker(immediate)}


@contextmanager
def without_guards() -> Iterator[dict[str, Any]]:
    """The same names, and every guard off."""
    before = dict(policy._levels)
    policy.set_levels(dict.fromkeys(before, "off"))
    try:
        with on_sqlite() as names:
            yield names
    finally:
        policy.set_levels(before)


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
        """Names for async rows on PostgreSQL."""
        needs("greenlet", "asyncpg", "psycopg")
        from sqlalchemy.ext.asyncio import create_async_engine

        from dbscope import AsyncDatabase

        url = self.url("asyncpg")
        engine = create_engine(url.replace("asyncpg", "psycopg"))
        sync_names(None, engine)
        engine.dispose()
        db, engine = AsyncDatabase(url), create_async_engine(url, pool_pre_ping=True)

        async def dispose() -> None:
            await db.dispose()
            await engine.dispose()

        yield async_names(db, engine) | {"dispose": dispose}


# -- the rows ----------------------------------------------------------------------------------------------------------

Place = Callable[[], Any]  # makes the names
UPDATE = " as session:\n    session.get(Account, 1).balance += 1"
IN_SCOPE = "scope().__enter__()\ndb.session()"
IN_REQUEST = "model.set_request_id('r')\nmodel.session()"
# Where the other libraries are found, once they were set up.
FLASK_SQLALCHEMY = "global app, flask\napp, flask = peers.flask_sqlalchemy(path)"
LITE = "global app, lite\napp, lite = peers.flask_sqlalchemy_lite(path)"
ALCHEMY = "global app, alchemy\napp, alchemy = peers.advanced_alchemy_flask(engine)"
OSLO = "global reader, context\nreader, context = peers.oslo_db(engine)"
IN_APP = "\napp.app_context().push()"


def look_ups(what: Callable[[str], str], dbscope: str, *others: Contender) -> list[Contender]:
    """The same on every registry that is called, thread-local `scoped_session` last."""
    return [
        Contender("dbscope", dbscope, setup=IN_SCOPE),
        *others,
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
            Row(
                "look-up in a scope, `db.session()`",
                look_ups("{}()".format, "db.session()", *finders()),
                0.55,
                steps=10,
            ),
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
                    Contender(
                        "Flask's context, bare",
                        "with app.app_context():\n    pass",
                        "nothing",
                        "global app\nfrom flask import Flask\napp = Flask('bank')",
                        needs=("flask",),
                    ),
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
                    Contender(
                        "Flask-SQLAlchemy",
                        "with app.app_context():\n    flask.session()",
                        "teardown of the context: close",
                        FLASK_SQLALCHEMY,
                        needs=("flask_sqlalchemy",),
                    ),
                    Contender(
                        "oslo.db",
                        "with reader.using(context):\n    pass",
                        "end of the reader: close",
                        OSLO,
                        needs=("oslo_db",),
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
            Row(
                "scope and SELECT, SQLite",
                selects(
                    Contender(
                        "with Session, BEGIN by the recipe",
                        "with Session(recipe) as session:\n    session.scalar(BALANCE)",
                        "close: rolls back",
                    ),
                    Contender(
                        "Flask-SQLAlchemy-Lite",
                        "with app.app_context():\n    lite.session.scalar(BALANCE)",
                        "teardown of the context, with an event loop for its async half: close: rolls back",
                        LITE,
                        needs=("flask_sqlalchemy_lite",),
                    ),
                    Contender(
                        "oslo.db",
                        "with reader.using(context) as session:\n    session.scalar(BALANCE)",
                        "end of the reader: close: rolls back",
                        OSLO,
                        needs=("oslo_db",),
                    ),
                ),
                1.10,
                sql=True,
                threads=True,
                note="BEGIN is explicit for all",
            ),
            on_sqlite,
        ),
        (
            Row("scope and SELECT, SQLite, guards off", selects(), 1.03, sql=True, note="BEGIN is explicit for all"),
            without_guards,
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


def finders() -> list[Contender]:
    """How other libraries find the session of a request; `async_scoped_session` finds that of a task."""
    return [
        Contender("Flask-SQLAlchemy", "flask.session()", setup=FLASK_SQLALCHEMY + IN_APP, needs=("flask_sqlalchemy",)),
        Contender(
            "Advanced Alchemy",
            "alchemy.get_session()",
            setup=ALCHEMY + IN_APP,
            needs=("flask", "advanced_alchemy"),
        ),
        Contender(
            "async_scoped_session",
            "ascoped()",
            setup="global ascoped\nascoped = peers.async_registry()",
            is_async=True,
            needs=("greenlet", "aiosqlite"),
        ),
    ]


def selects(*others: Contender) -> list[Contender]:
    """One SELECT of a column."""
    return [
        Contender("dbscope", "with scope():\n    db.session.scalar(BALANCE)", "end of the scope: rolls back"),
        Contender("scoped_session", "scoped.scalar(BALANCE)\nscoped.remove()", "close: rolls back"),
        *others,
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
