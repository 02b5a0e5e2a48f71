"""Work that is cut short anywhere: nothing stays checked out, nothing goes back poisoned, the user's error comes out.

(FAILURES 6 and 12; DESIGN, Transactions 9.) The points are found by running the work again and again and striking one
point later each time, until it comes to its end unharmed; how many there were is told at the end of the run.
"""

import asyncio
import contextvars
import gc
import itertools
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import NullPool, create_engine, event, make_url, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import sessionmaker

import dbscope
from dbscope import connection, current_scope, interrupt, plan, scope
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
    """`block`, in sync."""
    with db.transaction() as session:
        session.get(Account, 1).balance += 1
        session.flush()
        with db.transaction(nested=True):
            session.add(Payment())
        db.before_commit(session.flush)


def sync_plain(db):
    """`plain`, in sync."""
    with scope():
        session = db.session()
        session.get(Account, 1).balance += 1
        session.add(Payment())
        session.commit()
        session.execute(select(Payment)).all()


def sync_on_success(db):
    """`on_success`, in sync."""
    with scope(commit="on-success"):
        db.session().add(Payment())
        db.session().get(Account, 1).balance += 1


def sync_failing(db):
    """`failing`, in sync."""
    try:
        with db.transaction() as session:
            session.add(Payment())
            session.flush()
            raise TheWorksOwn
    except TheWorksOwn:
        pass


def sync_reading(db):
    """`reading`, in sync."""
    with db.reader() as session:
        session.execute(select(Account)).all()


SYNC_WORK = [sync_block, sync_plain, sync_on_success, sync_failing, sync_reading]


# -- what must hold afterwards -----------------------------------------------------------------------------------------


class Check:
    """What must hold after a strike, whatever it hit; asked of the database on a connection of its own."""

    def __init__(self, db, url):
        self.db = db
        # A connection that is closed in its own thread takes SQLite's lock for a moment; a slow disk makes it longer.
        limit = {"timeout": 10.0} if make_url(url).get_backend_name() == "sqlite" else {}
        outside = create_engine(url, poolclass=NullPool, connect_args=limit)
        Base.metadata.create_all(outside)
        self.outside = outside.connect().execution_options(isolation_level="AUTOCOMMIT")
        if outside.dialect.name == "sqlite":  # thousands of commits, none of which has to outlive this machine

            @event.listens_for(db._sync_engine, "connect")
            def connect(raw, _):
                raw.cursor().execute("PRAGMA synchronous = OFF")

            self.outside.exec_driver_sql("PRAGMA synchronous = OFF")
        self.outside.execute(Account.__table__.insert().values(id=1, name="a", balance=0))

    def nothing_is_held(self):
        """Nothing is checked out, no scope is left, and no lock on the server."""
        assert current_scope() is None
        for engine in (self.db._sync_engine, *self.db._engines.apart()):
            assert engine.pool.checkedout() == 0, engine.pool.status()
        self.nothing_is_locked()

    def nothing_is_locked(self):
        """No transaction is open, and no statement runs: soon, for the server reads a connection's end after us."""
        if self.outside.dialect.name == "sqlite":
            self.outside.exec_driver_sql("BEGIN IMMEDIATE")
            self.outside.exec_driver_sql("ROLLBACK")
            return
        busy = text(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND backend_type = 'client backend' AND state <> 'idle'"
        )
        assert any(self.outside.scalar(busy) == 0 for _ in range(5_000)), "a transaction is open on the server"

    def rows(self):
        """How many payments there are, and the account's balance."""
        payments = len(self.outside.execute(select(Payment)).all())
        return payments, self.outside.scalar(select(Account.balance))

    def reset(self):
        """As before the work."""
        self.outside.execute(Payment.__table__.delete())
        self.outside.execute(Account.__table__.update().values(balance=0))

    def close(self):
        self.outside.close()


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
            return True
        finally:
            while task.cancelling():
                task.uncancel()
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


async def cancelled_everywhere(url, strike, works, *, cold=False):
    """Cancel the work at each of its awaits, one run for each; how many there are, and what was wrong afterwards."""
    db = dbscope.AsyncDatabase(url, pool_size=2, max_overflow=0, pool_timeout=LIMIT)
    check = Check(db, sync_of(url))
    points, problems = 0, []
    for work in works:
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
            try:
                assert came_out or not awaits.has_struck, "the cancel is lost"
                check.nothing_is_held()
                whole(check, work)
                await reading(db)
            except BaseException as error:
                problems.append(f"{work.__name__}, await {at}: {type(error).__name__}: {error}")
                await db.engine.dispose()
            if not awaits.has_struck:
                break
            points += 1
    check.close()
    await db.dispose()
    return points, problems


def interrupted_everywhere(url, errors, works, *, cold=False):
    """Interrupt the work at each call of the driver; how many there are, and what was wrong afterwards."""
    db = dbscope.Database(url, pool_size=2, max_overflow=0, pool_timeout=LIMIT)
    check = Check(db, url)
    points, problems = 0, []
    for work in works:
        work(db)
        for at in itertools.count(1):
            check.reset()
            if cold:
                db.engine.dispose()
            raised = errors[at % len(errors)]("struck")
            came_out = None
            try:
                with Calls(at, raised, package_of(url)) as calls:
                    work(db)
            except BaseException as caught:
                came_out = caught
            try:
                assert came_out is raised or not calls.has_struck, f"the exception is lost: {came_out!r}"
                check.nothing_is_held()
                whole(check, work)
                sync_reading(db)
            except BaseException as problem:
                problems.append(f"{work.__name__}, call {at}: {type(problem).__name__}: {problem}")
                db.engine.dispose()
            if not calls.has_struck:
                break
            points += 1
    check.close()
    db.dispose()
    return points, problems


# A connection that the driver has made, and not handed over, is the garbage collector's, and the drivers mention it.
collected = pytest.mark.filterwarnings(
    "ignore:.*was deleted while still open:ResourceWarning", "ignore:unclosed database:ResourceWarning"
)


@collected
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("strike", [by_task, by_timeout, by_anyio])
def test_transactions_9_cancelled_at_every_await(async_url, strike, cold, record_property):
    """A cancel at any await, of the work's task or of dbscope's own."""
    works = WORK[:1] if cold or strike is by_timeout else WORK
    points, problems = asyncio.run(cancelled_everywhere(async_url, strike, works, cold=cold))
    record_property("points", points)
    assert not problems, "\n".join(problems)


@collected
def test_transactions_9_a_rollback_that_takes_its_time(tmp_path, monkeypatch):
    """On a slow disk the rollback of a cancelled block outlasts all patience, and is not interrupted in its turn."""
    aiosqlite = needs.module("aiosqlite", extra="aiosqlite")

    def rollback(connection):
        def slowly():
            threading.Event().wait(0.02)  # the disk
            connection._conn.rollback()

        return connection._execute(slowly)

    monkeypatch.setattr(aiosqlite.Connection, "rollback", rollback)
    monkeypatch.setattr(interrupt, "PATIENCE", 0.0)
    url = f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
    _, problems = asyncio.run(cancelled_everywhere(url, by_task, [block]))
    assert not problems, "\n".join(problems)


@pytest.fixture(params=["psycopg", "sqlite3"])
def sync_url(request, tmp_path):
    """The sync URL of an empty database, by each driver."""
    if request.param == "sqlite3":
        return f"sqlite:///{tmp_path / 'test.db'}"
    return request.getfixturevalue("postgres_url")


def package_of(url):
    """The name of the package of a URL's driver."""
    return "sqlite3" if make_url(url).get_backend_name() == "sqlite" else "psycopg"


def chain_of(error):
    """An exception, and those that it was raised from, or while they were handled."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@collected
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("errors", [[SoftTimeLimit], [KeyboardInterrupt, SystemExit]], ids=["limit", "exit"])
def test_transactions_9_interrupted_at_every_call_of_the_driver(sync_url, errors, cold, record_property):
    """An exception out of a signal's handler, just before or after any call of the driver's."""
    works = SYNC_WORK[:1] if cold else SYNC_WORK
    points, problems = interrupted_everywhere(sync_url, errors, works, cold=cold)
    record_property("points", points)
    assert not problems, "\n".join(problems)


# What is left lying about is collected here, with what the drivers and Python say of it.
unprotected = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@unprotected
@pytest.mark.parametrize(
    "without",
    [
        (connection.OwnedConnection, "close"),
        (connection.OwnedConnection, "_safe_close_cursor"),
        (connection.OwnedConnection, "_handle_dbapi_exception"),
    ],
    ids=lambda pair: pair[1],
)
def test_transactions_9_a_missing_protection_is_found(postgres_url, without, monkeypatch):
    """The search above is worth something: it finds each protection that is taken away."""
    monkeypatch.delattr(*without)
    _, problems = interrupted_everywhere(postgres_url, [SoftTimeLimit], [sync_reading])
    gc.collect()
    assert problems


async def impatient(work, *, forward):
    """As `outlast` without its loop: one shield, as everybody writes it."""
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError as error:
        return error


@unprotected
def test_transactions_9_one_shield_is_found_to_be_not_enough(postgres, postgres_database, monkeypatch):
    """AnyIO cancels again and again: what waits only once leaves its work behind."""
    needs.module("asyncpg", extra="asyncpg")
    monkeypatch.setattr(plan, "outlast", impatient)
    url = postgres.url("asyncpg", postgres_database)
    with pytest.raises((asyncio.InvalidStateError, RuntimeError), match=r"not set|left behind"):
        _, problems = asyncio.run(cancelled_everywhere(url, by_anyio, [block]))
        if problems:
            raise RuntimeError("left behind")
    gc.collect()


async def test_transactions_9_a_cancel_during_the_clean_up_of_failed_work(async_kit):
    """The work's own error comes out, and the cancel at the next await, as from Python 3.13's TaskGroup on."""
    task, late = asyncio.current_task(), False
    for at in itertools.count(0):  # at 0 it only connects
        awaits = Awaits(at or 1_000_000, task.cancel)
        try:
            await awaits.over(failing(async_kit.db))
        except TheWorksOwn:
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                late = True
        except asyncio.CancelledError:
            pass
        while task.cancelling():
            task.uncancel()
        if at and not awaits.has_struck:
            break
    assert late is (sys.version_info >= (3, 13))


# -- a statement that runs ---------------------------------------------------------------------------------------------

SLEEP = text("SELECT pg_sleep(60)")
FOR_EVER = text("WITH RECURSIVE n(i) AS (SELECT started() UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n")


def runs(check, started):
    """Wait until the statement is running, on the server or in the driver's thread."""
    if check.outside.dialect.name == "sqlite":
        assert started.wait(LIMIT)
        return
    sleeps = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'")
    assert any(check.outside.scalar(sleeps) for _ in range(100_000)), "it does not run"


@pytest.mark.parametrize("strike", [by_task, by_timeout, by_anyio])
def test_transactions_9_the_running_statement_is_cancelled(async_url, strike):
    """The server stops it, and its transaction's locks are gone when the block is left."""
    started = threading.Event()

    async def main():
        db = dbscope.AsyncDatabase(async_url)
        check = Check(db, sync_of(async_url))
        if check.outside.dialect.name == "sqlite":

            @event.listens_for(db.engine.sync_engine, "connect")
            def connect(raw, _):
                raw.create_function("started", 0, lambda: started.set() or 1)

        async def work():
            async with db.transaction() as session:
                (await session.get(Account, 1)).balance += 1
                await session.flush()
                await session.execute(FOR_EVER if check.outside.dialect.name == "sqlite" else SLEEP)

        awaits = Awaits(1_000_000, lambda: None)

        async def when_it_runs():
            await asyncio.to_thread(runs, check, started)
            awaits.strike()

        watching = asyncio.create_task(when_it_runs())
        assert await strike(awaits, work())
        check.nothing_is_held()
        await watching
        check.close()
        await db.dispose()

    asyncio.run(main())


@pytest.mark.parametrize("error", [SoftTimeLimit, KeyboardInterrupt, SystemExit])
def test_transactions_9_a_signal_cancels_the_running_statement(postgres_url, error):
    """An exception out of a signal's handler, while the server is at work (FAILURES 12)."""
    db = dbscope.Database(postgres_url)
    check = Check(db, postgres_url)
    raised = error("struck")

    def strike():
        runs(check, None)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    def handler(*_):
        raise raised

    before = signal.signal(signal.SIGUSR1, handler)
    thread = threading.Thread(target=strike)
    try:
        with pytest.raises(error) as caught, db.transaction() as session:
            session.get(Account, 1).balance += 1
            session.flush()
            thread.start()
            session.execute(SLEEP)
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert caught.value is raised
    check.nothing_is_held()
    check.close()
    db.dispose()


# -- between two bytecodes ---------------------------------------------------------------------------------------------


@collected
def test_transactions_9_between_two_lines_the_garbage_collector_is_the_net(tmp_path, record_property, monkeypatch):
    """A signal between any two lines of ours or SQLAlchemy's: what nobody could give back goes with the exception."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # pytest's would keep what it is told of
    url = f"sqlite:///{tmp_path / 'test.db'}"
    db = dbscope.Database(url, pool_size=2, max_overflow=0, pool_timeout=LIMIT)
    check = Check(db, url)
    sync_block(db)
    points = 0
    for at in itertools.count(1, 31):
        check.reset()
        came_out = None
        try:
            with Lines(at, SoftTimeLimit("struck")) as lines:
                contextvars.copy_context().run(sync_block, db)
        except Exception as error:  # where SQLAlchemy's own clean-up was struck it may raise another
            came_out = [SoftTimeLimit in map(type, chain_of(error))]
        assert came_out == [True] or not lines.has_struck, at
        lines.error = None
        if lines.where.startswith(("sqlalchemy.pool", "sqlalchemy.util.queue")):
            # For some instructions a connection is out of the pool, and nobody's: its slot is lost, and only that.
            db.engine.dispose()
        try:
            check.nothing_is_held()
        except (AssertionError, OperationalError):
            gc.collect()
            check.nothing_is_held()
        whole(check, sync_block)
        sync_reading(db)
        if not lines.has_struck:
            break
        points += 1
    check.close()
    db.dispose()
    record_property("points", points)


# -- several connections in one session --------------------------------------------------------------------------------


def test_transactions_9_each_connection_of_a_session_is_given_back(sync_server_kit):
    """A session whose tables are of two databases holds two connections: one that is lost does not cost the other."""
    kit = sync_server_kit
    Base.metadata.create_all(kit.outside)
    engines = [create_engine(kit.url) for _ in range(2)]
    db = kit.database(sessionmaker(engines[0], binds={Account: engines[0], Payment: engines[1]}))
    with pytest.raises(OperationalError), scope():
        pids = [
            db.session.scalar(text("SELECT pg_backend_pid()"), bind_arguments={"bind": engine}) for engine in engines
        ]
        with kit.outside.connect() as connection:
            for pid in pids:
                connection.execute(text("SELECT pg_terminate_backend(:pid, 30000)"), {"pid": pid})
    assert [engine.pool.checkedout() for engine in engines] == [0, 0]
    for engine in engines:
        engine.dispose()


def test_transactions_9_what_has_come_out_by_itself_is_not_raised_again(sync_kit):
    """What SQLAlchemy swallowed is raised by the close that it happened in: by no other, in no other thread."""
    kept = interrupt.swallowed[:] = [SoftTimeLimit("old"), SoftTimeLimit("older")]

    def work():
        with sync_kit.db.transaction() as session:
            session.add(Payment())

    with ThreadPoolExecutor(1) as threads:
        threads.submit(work).result()
    assert interrupt.swallowed == kept
    work()
    assert interrupt.swallowed == []
    assert sync_kit.count() == 2
