"""Work that is cut short anywhere: nothing stays checked out, nothing goes back poisoned, the user's error comes out.

(FAILURES 6 and 12; DESIGN, Transactions 9.) The points are found by running the work again and again and striking one
point later each time, until it comes to its end unharmed; how many there were is told at the end of the run.
"""

import asyncio
import gc
import itertools

import pytest
from sqlalchemy import NullPool, create_engine, event, make_url, select, text

import dbscope
from dbscope import current_scope, scope
from tests.support import needs
from tests.support.kits import LIMIT, Account, Base, Payment
from tests.support.strikes import Awaits, Calls, Lines


class SoftTimeLimit(Exception):
    """As Celery's: a signal's handler raises it, and it is an ordinary exception."""


class TheWorksOwn(Exception):
    """What a piece of work fails with."""


# -- the work, in async and in sync ------------------------------------------------------------------------------------


async def block(db):
    """A managed block: a read, a write, a savepoint, a hook before the commit."""
    async with db.transaction() as session:
        account = await session.get(Account, 1)
        account.balance += 1
        await session.flush()
        async with db.transaction(nested=True):
            session.add(Payment())
        db.before_commit(session.flush)


async def plain(db):
    """A plain scope, whose user commits."""
    async with scope():
        session = db.session()
        account = await session.get(Account, 1)
        account.balance += 1
        session.add(Payment())
        await session.commit()
        await session.execute(select(Payment))


async def on_success(db):
    """A request: the scope commits."""
    async with scope(commit="on-success"):
        db.session().add(Payment())
        (await db.session().get(Account, 1)).balance += 1


async def failing(db):
    """A block whose work fails, and is rolled back."""
    async with db.transaction() as session:
        session.add(Payment())
        await session.flush()
        raise TheWorksOwn


async def reading(db):
    """A reader, and one inside of it that is independent."""
    async with db.reader() as session:
        await session.execute(select(Account))


async def hooked(db):
    """Hooks after the commit, which use the database."""

    async def hook():
        async with db.transaction() as session:
            session.add(Payment())

    async with db.transaction() as session:
        (await session.get(Account, 1)).balance += 1
        db.on_commit(hook)


WORK = [block, plain, on_success, failing, reading, hooked]


def sync_block(db):
    with db.transaction() as session:
        session.get(Account, 1).balance += 1
        session.flush()
        with db.transaction(nested=True):
            session.add(Payment())
        db.before_commit(session.flush)


def sync_plain(db):
    with scope():
        session = db.session()
        session.get(Account, 1).balance += 1
        session.add(Payment())
        session.commit()
        session.execute(select(Payment)).all()


def sync_on_success(db):
    with scope(commit="on-success"):
        db.session().add(Payment())
        db.session().get(Account, 1).balance += 1


def sync_failing(db):
    try:
        with db.transaction() as session:
            session.add(Payment())
            session.flush()
            raise TheWorksOwn
    except TheWorksOwn:
        pass


def sync_reading(db):
    with db.reader() as session:
        session.execute(select(Account)).all()


SYNC_WORK = [sync_block, sync_plain, sync_on_success, sync_failing, sync_reading]


# -- what must hold afterwards -----------------------------------------------------------------------------------------


class Check:
    """What must hold after a strike, whatever it hit."""

    def __init__(self, db, url):
        self.db = db
        self.outside = create_engine(url, poolclass=NullPool, connect_args=self.at_once(url))
        Base.metadata.create_all(self.outside)
        with self.outside.begin() as connection:
            connection.execute(Account.__table__.insert().values(id=1, name="a", balance=0))

    def at_once(self, url):
        # A connection that is closed in its own thread takes a lock for a moment.
        return {"timeout": 2.0} if make_url(url).get_backend_name() == "sqlite" else {}

    def nothing_is_held(self):
        """Nothing is checked out, no scope is left, and no lock on the server."""
        assert current_scope() is None
        for engine in (self.db._sync_engine, *self.db._engines.apart()):
            assert engine.pool.checkedout() == 0, engine.pool.status()
        self.nothing_is_locked()

    def nothing_is_locked(self):
        if self.outside.dialect.name == "sqlite":
            with self.outside.connect() as connection:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            return
        busy = text(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND backend_type = 'client backend' AND state <> 'idle'"
        )
        with self.outside.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for _ in range(5_000):  # the server reads a connection's end after us
                if connection.scalar(busy) == 0:
                    return
        raise AssertionError("a transaction is still open on the server")

    def rows(self):
        with self.outside.connect() as connection:
            payments = len(connection.execute(select(Payment)).all())
            return payments, connection.scalar(select(Account.balance))

    def reset(self):
        with self.outside.begin() as connection:
            connection.execute(Payment.__table__.delete())
            connection.execute(Account.__table__.update().values(balance=0))


def whole(check, work):
    """All of the work's rows are there, or none (of a hook's, after its transaction's)."""
    payments, balance = check.rows()
    if work.__name__.endswith(("failing", "reading")):
        assert (payments, balance) == (0, 0)
    elif work is hooked:
        assert (payments, balance) in ((0, 0), (0, 1), (1, 1))
    else:
        assert (payments, balance) in ((0, 0), (1, 1))


@pytest.fixture(params=["asyncpg", "psycopg", "aiosqlite"])
def async_url(request, tmp_path):
    """The async URL of an empty database, by each driver."""
    needs.module("greenlet", extra="async")
    if request.param == "aiosqlite":
        needs.module("aiosqlite", extra="aiosqlite")
        return f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
    if request.param == "asyncpg":
        needs.module("asyncpg", extra="asyncpg")
    name = request.getfixturevalue("postgres_database")
    return request.getfixturevalue("postgres").url(request.param, name)


def sync_of(url):
    """The same database by a sync driver."""
    made = make_url(url)
    return made.set(drivername="sqlite" if made.get_backend_name() == "sqlite" else "postgresql+psycopg")


def by_task(awaits, work):
    """`task.cancel()`."""

    async def run():
        task = asyncio.current_task()
        awaits.strike = task.cancel
        try:
            await awaits.over(work)
        except asyncio.CancelledError:
            task.uncancel()
            return True
        return False

    return run()


def by_timeout(awaits, work):
    """`asyncio.timeout()`."""

    async def run():
        try:
            async with asyncio.timeout(None) as timeout:
                awaits.strike = lambda: timeout.reschedule(asyncio.get_running_loop().time())
                await awaits.over(work)
        except TimeoutError:
            return True
        return False

    return run()


def by_anyio(awaits, work):
    """AnyIO's cancel scope, which cancels at every await until it is left."""
    anyio = needs.module("anyio", extra="async")

    async def run():
        with anyio.CancelScope() as cancel:
            awaits.strike = cancel.cancel
            await awaits.over(work)
        return cancel.cancelled_caught

    return run()


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("strike", [by_task, by_timeout, by_anyio])
def test_transactions_9_cancelled_at_every_await(async_url, strike, cold, record_property):
    """A cancel at any await, of the work's task or of dbscope's own."""

    async def main():
        db = dbscope.AsyncDatabase(async_url, pool_size=2, max_overflow=0, pool_timeout=LIMIT)
        check = Check(db, sync_of(async_url))
        points, problems = 0, []
        for work in WORK[:1] if cold else WORK:
            if work is not failing:
                await work(db)  # the first time SQLAlchemy asks the server what it is
            for at in itertools.count(1):
                check.reset()
                if cold:
                    await db.engine.dispose()
                awaits = Awaits(at, lambda: None)
                try:
                    came_out = await strike(awaits, work(db))
                except TheWorksOwn:
                    came_out = True
                where = f"{work.__name__}, await {at}"
                try:
                    assert came_out or not awaits.has_struck, "the cancel is lost"
                    check.nothing_is_held()
                    whole(check, work)
                    await reading(db)
                except BaseException as error:
                    problems.append(f"{where}: {type(error).__name__}: {error}")
                    await db.engine.dispose()
                if not awaits.has_struck:
                    break
                points += 1
        await db.dispose()
        assert not problems, "\n".join(problems)
        return points

    record_property("points", asyncio.run(main()))


@pytest.fixture(params=["psycopg", "sqlite3"])
def sync_url(request, tmp_path):
    """The sync URL of an empty database, by each driver; and the driver's package."""
    if request.param == "sqlite3":
        return f"sqlite:///{tmp_path / 'test.db'}"
    return request.getfixturevalue("postgres_url")


def package_of(url):
    """The name of the package of a URL's driver."""
    return "sqlite3" if make_url(url).get_backend_name() == "sqlite" else "psycopg"


# A connection that the driver has made, and not handed over, is the garbage collector's: psycopg mentions it.
@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("error", [SoftTimeLimit, KeyboardInterrupt, SystemExit])
def test_transactions_9_interrupted_at_every_call_of_the_driver(sync_url, error, cold, record_property):
    """An exception out of a signal's handler, just before or after any call of the driver's."""
    db = dbscope.Database(sync_url, pool_size=2, max_overflow=0, pool_timeout=LIMIT)
    check = Check(db, sync_url)
    points, problems = 0, []
    for work in SYNC_WORK[:1] if cold else SYNC_WORK:
        work(db)
        for at in itertools.count(1):
            check.reset()
            if cold:
                db.engine.dispose()
            raised = error("struck")
            came_out = None
            try:
                with Calls(at, raised, package_of(sync_url)) as calls:
                    work(db)
            except BaseException as caught:
                came_out = caught
            try:
                assert came_out is raised or not calls.has_struck, "the exception is lost"
                check.nothing_is_held()
                whole(check, work)
                sync_reading(db)
            except BaseException as problem:
                problems.append(f"{work.__name__}, call {at}: {type(problem).__name__}: {problem}")
                db.engine.dispose()
            if not calls.has_struck:
                break
            points += 1
    db.dispose()
    assert not problems, "\n".join(problems)
    record_property("points", points)
