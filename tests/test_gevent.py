"""FAILURES 36: under gevent a greenlet is what a thread is elsewhere, and a time-out leaves nothing behind."""

import contextvars
import gc
import sys
import threading
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import TimeoutError as PoolTimeout

from dbscope import OverlapError, ScopeEndedError, current_scope, scope
from tests.support import needs
from tests.support.gevented import in_gevent, python
from tests.support.kits import LIMIT, Account, Payment

pytestmark = pytest.mark.programs


def gevent() -> Any:
    """gevent, which this process imports only where it runs under it."""
    return sys.modules["gevent"]


def spawn(*functions):
    """Run functions side by side, in greenlets; their results, or what was raised."""
    greenlets = []
    for function in functions:

        def run(function=function):
            try:
                return function()
            except BaseException as error:
                return error

        greenlets.append(gevent().spawn(run))
    gevent().joinall(greenlets, timeout=LIMIT)
    assert all(greenlet.dead for greenlet in greenlets)
    return [greenlet.value for greenlet in greenlets]


def backend(session):
    """The process of the server's that serves a session's connection."""
    return session.scalar(text("SELECT pg_backend_pid()"))


def busy(kit):
    """How many connections of the database's are in a statement or a transaction, this one aside."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state <> 'idle'"
    with kit.outside.connect() as connection:
        return connection.scalar(text(f"{query} AND pid <> pg_backend_pid()"))


def at_rest(kit):
    """Nothing is checked out, and the server runs nothing; what was cancelled may take it a moment."""
    with gevent().Timeout(LIMIT):
        while kit.checked_out() or busy(kit):
            gevent().sleep(0.01)


@in_gevent
def test_failures_36_each_greenlet_has_its_own_session(kit):
    """Outside of every scope, too: the implicit scope is the greenlet's, and waits in it are waits of it alone."""

    def work():
        session = kit.session()
        mine = backend(session)
        gevent().sleep(0)
        assert kit.session() is session
        return mine, session, backend(session) == mine

    found = spawn(work, work, work)
    assert len({mine for mine, _, _ in found}) == 3
    assert len({id(session) for _, session, _ in found}) == 3
    assert all(same for _, _, same in found)
    at_rest(kit)


@in_gevent
def test_failures_36_a_greenlet_inherits_no_scope(kit):
    """A greenlet that was spawned in a scope works outside of it, as a thread does."""
    with scope("request"):
        mine = kit.session()
        mine.add(Payment(amount=1))

        def child():
            return current_scope(), kit.session()

        [(inherited, session)] = spawn(child)
        assert inherited is None
        assert session is not mine
        mine.commit()
    assert kit.amounts() == [1]


@in_gevent
def test_failures_36_a_finished_greenlet_gives_its_connection_back(kit):
    """What a greenlet leaves in its implicit scope is released when it ends, in the hub, which must not wait."""
    kit.database(pool_size=1, max_overflow=0, pool_timeout=LIMIT)

    def work():
        return backend(kit.session())

    assert all(isinstance(mine, int) for mine in spawn(work, work, work))
    at_rest(kit)


@in_gevent
def test_failures_36_scopes_of_greenlets_that_take_turns(kit):
    """A hundred greenlets with a scope each, over a pool of two, are served in turn, and each commits its own."""
    kit.database(pool_size=2, max_overflow=0, pool_timeout=LIMIT)

    def work(amount):
        with scope(f"request {amount}", commit="on-success"):
            kit.session().add(Payment(amount=amount))
            kit.session().execute(text("SELECT pg_sleep(0.001)"))
            assert current_scope().name == f"request {amount}"

    assert spawn(*[lambda n=n: work(n) for n in range(100)]) == [None] * 100
    assert kit.amounts() == [*range(100)]
    at_rest(kit)


@in_gevent
def test_failures_36_the_pools_own_time_limit(kit):
    """A greenlet that waits for a connection lets others run, and gives up when the pool says so."""
    kit.database(pool_size=1, max_overflow=0, pool_timeout=0.1)
    ticks = []

    def ticking():
        while not over:
            ticks.append(1)
            gevent().sleep(0.001)

    def waits():
        with scope("waits"):
            return backend(kit.session())

    over = []
    ticker = gevent().spawn(ticking)
    with scope("holder"):
        backend(kit.session())
        [error] = spawn(waits)
    over.append(True)
    ticker.join()
    assert isinstance(error, PoolTimeout)
    assert len(ticks) > 10
    assert isinstance(spawn(waits)[0], int)
    at_rest(kit)


@in_gevent
def test_failures_36_a_session_that_greenlets_share_is_refused(kit):
    """Two greenlets on one session at the same moment: an error that says so, with a warm pool as well."""
    with scope("shared"):
        session = kit.session()
        backend(session)
        started = threading.Event()

        def slow():
            started.set()
            session.execute(text("SELECT pg_sleep(0.2)"))

        def second():
            started.wait(LIMIT)
            session.scalar(select(Payment.id))

        done, error = spawn(slow, second)
        assert done is None
        assert isinstance(error, OverlapError)


@in_gevent
def test_failures_36_a_greenlet_that_outlives_the_scope_it_was_given(kit):
    """A greenlet that was handed its spawner's context is told when that scope has ended."""
    go = threading.Event()

    def late():
        go.wait(LIMIT)
        kit.session()

    with scope("request"):
        context = contextvars.copy_context()
        greenlet = gevent().spawn(lambda: spawn_in(context, late))
    go.set()
    greenlet.join(LIMIT)
    assert isinstance(greenlet.value, ScopeEndedError)
    assert "'request'" in str(greenlet.value)


def spawn_in(context, function):
    """What a function raises in a context."""
    try:
        context.run(function)
    except Exception as error:
        return error


def strike_at(number, exception):
    """Let gevent's time-out strike in the wait of psycopg's with this number; gives what to undo, and the count."""
    import psycopg

    waits = [0]
    original = psycopg.Connection.wait

    def wait(self, *args, **options):
        waits[0] += 1
        if waits[0] != number or not work.running:
            return original(self, *args, **options)
        with gevent().Timeout(0, exception):
            return original(self, *args, **options)

    psycopg.Connection.wait = wait
    return waits, lambda: setattr(psycopg.Connection, "wait", original)


class work:
    """Whether the work of the test is running, which may be struck; not what looks at its result."""

    running = False


class Late(Exception):
    """A time-out of the user's own class, which is an `Exception`."""


def everywhere(kit, unit, exception):
    """Cut a unit of work short at each wait of its driver's; how often it was."""
    number = cut = 0
    while True:
        number += 1
        before = kit.count(Account)
        waits, undo = strike_at(number, exception)
        raised = []
        try:
            work.running = True
            unit(number)
        except BaseException as error:
            raised.append(error)
        finally:
            work.running = False
            undo()
        at_rest(kit)
        written = kit.count(Account) - before
        assert written in (0, 2), "half of it was written"
        if not raised:
            assert written == 2, "it is lost"
        with kit.db.transaction() as session:  # on what the pool has now
            assert session.scalar(text("SELECT 42")) == 42
        if waits[0] < number:
            return cut
        cut += bool(raised)


@in_gevent
def test_failures_36_a_time_out_at_every_wait_of_the_driver(kit):
    """gevent's time-out, which is no `Exception`, and one of the user's class, in connects, statements, commits and
    clean-up: nothing stays checked out, nothing is half-written, the server stops, and the next work is served."""
    kit.database(pool_size=1, max_overflow=0, pool_timeout=LIMIT)

    def unit(number):
        with scope("request", commit="on-success"):
            kit.session().add(Account(name=f"first {number} {len(names)}"))
            kit.session().flush()
            names.append(number)
            kit.session().execute(text("SELECT pg_sleep(0.001)"))
            kit.session().add(Account(name=f"second {number} {len(names)}"))

    for exception in (None, Late):
        names = []
        with kit.db.transaction() as session:
            session.execute(text("TRUNCATE accounts CASCADE"))
        for _ in range(2):
            assert everywhere(kit, unit, exception) >= 3
            kit.db.engine.dispose()  # the second time it has to connect


@in_gevent
def test_failures_36_a_killed_greenlet(kit):
    """`kill()` in the middle of a statement stops the statement on the server, and gives its connection back."""
    kit.database(pool_size=1, max_overflow=0)

    def work():
        with kit.db.transaction() as session:
            session.add(Payment(amount=1))
            session.flush()
            session.execute(text("SELECT pg_sleep(60)"))

    greenlet = gevent().spawn(work)
    with gevent().Timeout(LIMIT):
        while not busy(kit):
            gevent().sleep(0.01)
    gevent().sleep(0.05)
    greenlet.kill()
    at_rest(kit)
    assert kit.count() == 0


@in_gevent
def test_failures_36_sqlite_under_gevent(kit):
    """A driver that never gives way serves greenlets one after the other, whole blocks included."""
    import pathlib
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        db = kit.file(pathlib.Path(folder) / "other.db")

        def work(amount):
            with db.transaction() as session:
                session.add(Payment(amount=amount))
                session.flush()
                return id(session)

        assert len(spawn(*[lambda n=n: work(n) for n in range(10)])) == 10
        with db.reader() as session:
            assert sorted(session.scalars(select(Payment.amount))) == [*range(10)]
        kit.databases.remove(db)
        db.dispose()
        gc.collect()


@in_gevent
def test_failures_36_fan_out_in_greenlets(kit):
    """The parts of a fan-out are greenlets, each with a scope of its own, no more than the pool can serve."""
    kit.database(pool_size=2, max_overflow=0, pool_timeout=0.1)

    def part(amount):
        kit.session().add(Payment(amount=amount))
        kit.session().commit()
        return amount

    assert kit.db.fan_out(part, range(10)) == [*range(10)]
    assert kit.amounts() == [*range(10)]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from dbscope import Database", "Database('sqlite://')"),
        ("from dbscope import Database; db = Database('sqlite://')", "db.session()"),
        ("from dbscope import Database, scope; db = Database('sqlite://')", "with scope(): db.session()"),
    ],
    ids=["database", "implicit", "scope"],
)
def test_failures_36_patched_too_late(before, after):
    """Where gevent patches after dbscope was imported, the first database or session says so, and what to do."""
    needs.package("gevent")
    told = python(
        f"{before}\nfrom gevent import monkey; monkey.patch_all()\n"
        f"try:\n    {after}\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
        "if 'db' in vars():\n    db.dispose()"
    )
    assert told.startswith("ConfigurationError threads were turned into greenlets after dbscope was imported")
    assert "gunicorn.conf.py" in told
