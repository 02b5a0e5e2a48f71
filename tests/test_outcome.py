"""A connection that is lost during COMMIT: the outcome is said to be unknown, or found out (failure 13)."""

import asyncio
import os
import signal
import socket
from contextlib import contextmanager, nullcontext

import pytest
from sqlalchemy import event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

import dbscope
from dbscope import (
    CommitOutcomeUnknown,
    ConfigurationError,
    Database,
    NotCommittedError,
    PartialCommit,
    outcome,
    scope,
)
from dbscope.events import TransactionEnded, observe
from tests.support.kits import LIMIT, Base, Payment, twice
from tests.support.postgres import Postgres
from tests.support.proxy import Cut, Proxy

TIMES = 100
COMMAND_COMPLETE = 12  # bytes: the server's answer without the ReadyForQuery that ends it


@pytest.fixture
def proxy(postgres_url):
    """A proxy in front of the server."""
    with Proxy(make_url(postgres_url).port) as proxy:
        yield proxy


def through(kit, proxy, **options):
    """A database of the kit's behind the proxy."""
    Base.metadata.create_all(kit.outside)
    url = kit.url.set(port=proxy.port, drivername=kit.drivers["postgresql"])
    return kit.database(url, **options)


async def pay(kit, db, amount, **options):
    """Whether a payment was committed, as dbscope says; and which hooks were called."""
    called = []
    try:
        async with kit.transaction(db, **options) as session:
            session.add(Payment(amount=amount))
            db.on_commit(called.append, True)
            db.on_rollback(called.append, False)
    except NotCommittedError:
        return False, called
    return True, called


@pytest.mark.parametrize("where", Cut, ids=lambda where: where.name.lower())
@twice
async def test_the_reported_outcome_is_what_happened(server_kit, proxy, where):
    """However the connection is cut around the COMMIT, what dbscope reports is whether the row is there."""
    kit = server_kit
    db = through(kit, proxy)
    for number in range(TIMES):
        proxy.cut(where, delivered=(number % 2) * COMMAND_COMPLETE)
        said, called = await pay(kit, db, number, outcome="resolve")
        assert (number in kit.amounts()) is said
        assert called == [said]
        assert said is (where is Cut.ANSWERED) or where is Cut.BETWEEN
    assert (proxy.cuts, kit.checked_out(db)) == (TIMES, 0)


@pytest.mark.parametrize("where", Cut, ids=lambda where: where.name.lower())
@twice
async def test_without_asking_the_outcome_is_unknown(server_kit, proxy, where):
    """By default the error says that nobody knows, what to do, and which block it was; no hook of it is called."""
    kit = server_kit
    db = through(kit, proxy)
    called = []
    for _ in range(3):
        proxy.cut(where)
        with pytest.raises(CommitOutcomeUnknown) as caught:
            async with kit.transaction(db) as session:
                session.add(Payment())
                db.on_commit(called.append, "committed")
                db.on_rollback(called.append, "rolled back")
        said = str(caught.value)
        assert "was lost during the commit of the transaction (begun at tests/" in said
        assert "look for what it should have saved before you repeat it" in said
        assert "Neither its on_commit nor its on_rollback hooks are called." in said
        assert caught.value.xid is None
        assert "rolled back what was open" not in "".join(getattr(caught.value.__cause__, "__notes__", []))
    assert (called, kit.checked_out(db)) == ([], 0)
    async with kit.transaction(db) as session:  # the next one is clean
        session.add(Payment(amount=1))
    assert 1 in kit.amounts()


@pytest.mark.parametrize(("options", "told"), [({}, "unknown"), ({"outcome": "resolve"}, "commit")])
@twice
async def test_an_observer_is_told_what_is_known_of_the_outcome(server_kit, proxy, options, told):
    """A COMMIT whose answer was lost counts as neither a commit nor a rollback, unless the server was asked."""
    kit = server_kit
    db = through(kit, proxy)
    outcomes = []
    stop = observe(lambda fact: outcomes.append(fact.outcome), TransactionEnded)
    try:
        proxy.cut(Cut.ANSWERED)
        with pytest.raises(CommitOutcomeUnknown) if not options else nullcontext():
            async with kit.transaction(db, **options) as session:
                session.add(Payment())
    finally:
        stop()
    assert outcomes == [told]


@twice
async def test_the_users_own_commit_resolves_by_the_databases_default(server_kit, proxy):
    """`Database(outcome="resolve")` holds for `session.commit()` in a plain scope and for on-success scopes."""
    kit = server_kit
    db = through(kit, proxy, outcome="resolve")
    async with kit.scope():
        session = kit.session(db)
        session.add(Payment(amount=1))
        proxy.cut(Cut.ANSWERED)
        await kit.done(session.commit())
        session.add(Payment(amount=2))
        proxy.cut(Cut.BEFORE)
        with pytest.raises(NotCommittedError, match=r"during the commit at tests/.*\nThe whole piece of work may be"):
            await kit.done(session.commit())
        await kit.done(session.rollback())
        session.add(Payment(amount=3))
        await kit.done(session.commit())
    async with kit.scope(commit="on-success"):
        kit.session(db).add(Payment(amount=4))
        proxy.cut(Cut.ANSWERED)
    proxy.cut(Cut.ANSWERED)
    with pytest.raises(CommitOutcomeUnknown):
        await pay(kit, db, 5, outcome="raise")
    assert kit.amounts() == [1, 3, 4, 5]


@twice
async def test_the_decorator_resolves(server_kit, proxy):
    """`@db.transactional(outcome="resolve")`: the function returns if its work was committed."""
    kit = server_kit
    db = through(kit, proxy)
    if kit.colour == "sync":

        @db.transactional(outcome="resolve")
        def add():
            db.session.add(Payment())
            return "added"
    else:

        @db.transactional(outcome="resolve")
        async def add():
            db.session.add(Payment())
            return "added"

    proxy.cut(Cut.ANSWERED)
    assert await kit.done(add()) == "added"
    assert kit.count() == 1


@twice
async def test_what_joined_is_committed_by_the_outer_ones_rule(server_kit, proxy):
    """An inner block's `outcome` decides nothing: it does not commit."""
    kit = server_kit
    db = through(kit, proxy)
    proxy.cut(Cut.ANSWERED)
    with pytest.raises(CommitOutcomeUnknown):
        async with kit.transaction(db):
            await pay(kit, db, 1, outcome="resolve")


@twice
async def test_asking_needs_no_connection_of_the_pool(server_kit, proxy, monkeypatch):
    """Where somebody else took the pool's last connection meanwhile, the server is asked all the same."""
    kit = server_kit
    db = through(kit, proxy, pool_size=1, max_overflow=0, pool_timeout=0.1)
    find_out = outcome._find_out

    def after_another(engine, receipt):
        with engine.connect():
            return find_out(engine, receipt)

    monkeypatch.setattr(outcome, "_find_out", after_another)
    monkeypatch.setattr(outcome, "LIMIT", 2.0)
    proxy.cut(Cut.ANSWERED)
    assert await pay(kit, db, 1, outcome="resolve") == (True, [True])


@twice
async def test_a_transaction_without_an_id_stays_unknown(server_kit, proxy):
    """What has written nothing has no id to ask for; the error says so."""
    kit = server_kit
    db = through(kit, proxy)
    proxy.cut(Cut.ANSWERED)
    with pytest.raises(CommitOutcomeUnknown, match="it had no id, for it had not written anything"):
        async with kit.transaction(db, outcome="resolve") as session:
            await kit.done(session.execute(text("SELECT 1")))


@twice
async def test_a_server_that_does_not_come_back_leaves_it_unknown(server_kit, proxy, monkeypatch):
    """The server is asked for a bounded time; then the outcome is unknown, and the error tells the transaction's id."""
    kit = server_kit
    db = through(kit, proxy)
    monkeypatch.setattr(outcome, "LIMIT", 0.3)
    proxy.cut(Cut.ANSWERED)
    with pytest.raises(CommitOutcomeUnknown, match="The server could not tell: ") as caught:
        async with kit.transaction(db, outcome="resolve") as session:
            session.add(Payment())
            await kit.done(session.flush())
            xid = (await kit.done(session.execute(text("SELECT pg_current_xact_id()::text")))).scalar()
            proxy.away = True
    proxy.away = False
    assert caught.value.xid == int(xid)
    assert f"(transaction {xid})" in str(caught.value)


@twice
async def test_a_server_out_of_reach_is_not_waited_for_without_end(server_kit, proxy, monkeypatch):
    """Where a connection is accepted and never answered, no driver gives up in time; dbscope does."""
    kit = server_kit
    db = through(kit, proxy)
    monkeypatch.setattr(outcome, "LIMIT", 0.3)
    with silent_server() as port:
        proxy.cut(Cut.ANSWERED, then=port)
        with pytest.raises(CommitOutcomeUnknown, match="it did not answer in time"):
            await pay(kit, db, 1, outcome="resolve")


@twice
async def test_a_transaction_that_goes_on_is_asked_for_again(server_kit, proxy, monkeypatch):
    """While the server has it in progress the question is repeated, until the time is up."""
    kit = server_kit
    db = through(kit, proxy)
    monkeypatch.setattr(outcome, "LIMIT", 0.5)
    monkeypatch.setattr(outcome, "COMMITTED", "never")  # every answer but the last is "in progress" then
    asked = []
    ask = outcome.ask_anew

    def in_progress(*args):
        asked.append(ask(*args))
        return "in progress"

    monkeypatch.setattr(outcome, "ask_anew", in_progress)
    proxy.cut(Cut.ANSWERED)
    with pytest.raises(CommitOutcomeUnknown, match="it still had it in progress when the time was up"):
        await pay(kit, db, 1, outcome="resolve")
    assert set(asked) == {"committed"}
    assert 2 < len(asked) < 10


@twice
async def test_another_server_is_not_believed(server_kit, proxy):
    """After a failover the same id may be that of another transaction: the outcome stays unknown, and it is said."""
    kit = server_kit
    db = through(kit, proxy)
    with Postgres() as other:
        url = make_url(other.url(database=kit.url.database))
        other.create_database(kit.url.database)
        with Database(url) as there:
            Base.metadata.create_all(there.engine)
            proxy.cut(Cut.BEFORE, then=url.port)
            with pytest.raises(CommitOutcomeUnknown, match="it is another one, or was restarted since"):
                await pay(kit, db, 1, outcome="resolve")


def test_a_server_that_crashed_is_not_believed(sync_server_kit, monkeypatch):
    """After a crash the server gives an id again that it has lost: the outcome stays unknown, and it is said.

    Here one of its processes is killed in the very moment of the COMMIT; the server starts again by itself.
    """
    with Postgres() as server, Database(server.url(), outcome="resolve") as db:
        Base.metadata.create_all(db.engine)
        with pytest.raises(CommitOutcomeUnknown, match="it is another one, or was restarted since"):
            with db.transaction() as session:
                session.add(Payment(amount=1))
                session.flush()
                backend = session.scalar(text("SELECT pg_backend_pid()"))
                send = db.engine.dialect.do_commit

                def crash(connection):
                    os.kill(backend, signal.SIGKILL)
                    send(connection)

                monkeypatch.setattr(db.engine.dialect, "do_commit", crash)


@twice
async def test_a_transaction_that_was_ended_for_being_idle_is_known_to_be_gone(server_kit):
    """A server that ends an idle transaction has not seen its COMMIT: SQLAlchemy's error comes out, and no doubt."""
    kit = server_kit
    called = []
    with pytest.raises(DBAPIError) as caught:
        async with kit.transaction() as session:
            connection = await kit.done(session.connection())
            session.add(Payment())
            kit.db.on_rollback(called.append, "rolled back")
            # Some ms: where it is over while the server still answers, one time in a hundred it goes without a word.
            await kit.done(session.execute(text("SET LOCAL idle_in_transaction_session_timeout = 30")))
            await kit.done(session.flush())
            backend = (await kit.done(session.execute(text("SELECT pg_backend_pid()")))).scalar()
            gone(kit, backend)
            if kit.colour == "async":  # asyncpg hears of it while the work is idle, and then sends no COMMIT
                closed = asyncio.Event()
                driver = (await connection.get_raw_connection()).driver_connection
                driver.add_termination_listener(lambda _: closed.set())
                await asyncio.wait_for(closed.wait(), LIMIT)
    assert caught.value.connection_invalidated
    assert (kit.count(), called) == (0, ["rolled back"])


@twice
async def test_a_commit_that_the_server_refused_has_failed_as_ever(server_kit):
    """A constraint that is checked at the COMMIT raises SQLAlchemy's error; the connection was not lost."""
    kit = server_kit
    Base.metadata.create_all(kit.outside)
    with kit.outside.begin() as connection:
        connection.execute(text("ALTER TABLE payments ADD UNIQUE (amount) DEFERRABLE INITIALLY DEFERRED"))
    for options in ({}, {"outcome": "resolve"}):
        with pytest.raises(DBAPIError, match="payments_amount_key"):
            async with kit.transaction(**options) as session:
                session.add_all([Payment(amount=1), Payment(amount=1)])


@twice
async def test_hooks_of_a_savepoint_that_was_rolled_back_are_called(server_kit, proxy):
    """What a savepoint's rollback has undone is undone, whatever became of the rest."""
    kit = server_kit
    db = through(kit, proxy)
    called = []
    proxy.cut(Cut.ANSWERED)
    with pytest.raises(CommitOutcomeUnknown):
        async with kit.transaction(db) as session:
            session.add(Payment())
            db.on_rollback(called.append, "all")
            with pytest.raises(ZeroDivisionError):
                async with kit.transaction(db, nested=True):
                    db.on_rollback(called.append, "savepoint")
                    1 / 0  # noqa: B018
    assert called == ["savepoint"]


def test_a_partial_commit_says_which_outcome_is_unknown(sync_server_kit, sync_kit, proxy):
    """With several databases the error lists what is committed, what is rolled back, and what nobody knows of."""
    kit = sync_server_kit
    first, lost, third = sync_kit.database(name="first"), through(kit, proxy, name="lost"), kit.database(name="third")

    def work():
        with scope(commit="on-success"):
            for db in (first, lost, third):
                db.session.add(Payment())
                db.session.flush()
            proxy.cut(Cut.ANSWERED)

    with pytest.raises(PartialCommit, match="committed first, and then the outcome of the next one is unknown") as e:
        work()
    assert (e.value.committed, e.value.failed, e.value.unknown) == ((first,), (third,), (lost,))
    assert "What is committed stays; third did not come to it, and is rolled back." in str(e.value)
    lost.outcome = "resolve"
    work()
    assert kit.count() == 3  # of the first try the lost one's, now both


def test_the_first_of_several_commits_is_lost(sync_server_kit, sync_kit, proxy):
    """Where nothing is known to be committed, the error is the one of the lost connection, with a note on the rest."""
    lost, second = through(sync_server_kit, proxy, name="lost"), sync_kit.database(name="second")
    with pytest.raises(CommitOutcomeUnknown) as caught:
        with scope(commit="on-success"):
            for db in (lost, second):
                db.session.add(Payment())
            proxy.cut(Cut.ANSWERED)
    assert caught.value.__notes__ == ["second did not come to it, and is rolled back"]
    assert (sync_server_kit.count(), sync_kit.count()) == (1, 0)


@pytest.mark.parametrize("error", [ConnectionResetError, TimeoutError])
@twice
async def test_an_error_of_the_socket_is_a_lost_connection(server_kit, monkeypatch, error):
    """What a driver lets through as it is, a time limit of its own included, leaves the outcome open as well."""
    kit = server_kit
    db = kit.db
    send_and(db, monkeypatch, error)
    assert await pay(kit, db, 1, outcome="resolve") == (True, [True])
    send_and(db, monkeypatch, error)
    with pytest.raises(CommitOutcomeUnknown):
        await pay(kit, db, 2)
    assert (kit.amounts(), kit.checked_out()) == ([1, 2], 0)


@twice
async def test_an_interrupted_commit_calls_no_hooks(server_kit, monkeypatch):
    """The user's exception comes out, with a note that the outcome is unknown; a claim by a hook would be a guess."""
    kit = server_kit
    send_and(kit.db, monkeypatch, Stop)
    called = []
    with pytest.raises(Stop) as caught:
        async with kit.transaction() as session:
            session.add(Payment())
            kit.db.on_commit(called.append, "committed")
            kit.db.on_rollback(called.append, "rolled back")
    assert "was under way: whether it has happened is unknown" in "".join(caught.value.__notes__)
    assert (kit.count(), called, kit.checked_out()) == (1, [], 0)


@twice
async def test_an_interruption_while_asking_calls_no_hooks(server_kit, proxy, monkeypatch):
    """Whoever is stopped while the server is asked does not know either."""
    kit = server_kit
    db = through(kit, proxy)

    def stop(*_):
        raise Stop

    monkeypatch.setattr(outcome, "_find_out", stop)
    proxy.cut(Cut.ANSWERED)
    called = []
    with pytest.raises(Stop):
        async with kit.transaction(db, outcome="resolve") as session:
            session.add(Payment())
            db.on_rollback(called.append, "rolled back")
    assert called == []


@twice
async def test_a_listener_of_the_users_loses_no_connection(server_kit):
    """A network error of the user's own, raised before the COMMIT is sent, stays what it is, and rolls back."""
    kit = server_kit
    called = []

    def refuse(connection):
        raise ConnectionResetError("the message queue is gone")

    event.listen(getattr(kit.db.engine, "sync_engine", kit.db.engine), "commit", refuse)
    with pytest.raises(ConnectionResetError, match="the message queue"):
        async with kit.transaction() as session:
            session.add(Payment())
            kit.db.on_rollback(called.append, "rolled back")
    assert (kit.count(), called) == (0, ["rolled back"])


@twice
async def test_sqlite_has_no_connection_to_lose(kit):
    """The option is taken, so that the same code runs on SQLite, and asks for nothing."""
    async with kit.transaction(outcome="resolve") as session:
        session.add(Payment())
    assert kit.count() == 1


@pytest.mark.parametrize("where", ["database", "block", "decorator"])
def test_an_unknown_outcome_is_refused(sync_kit, where):
    """A misspelt option is told at once."""
    db = sync_kit.db
    with pytest.raises(ConfigurationError, match='outcome is "raise" or "resolve", not \'ask\''):
        if where == "database":
            dbscope.Database("sqlite://", outcome="ask")
        elif where == "block":
            db.transaction(outcome="ask")
        else:
            db.transactional(outcome="ask")(lambda: None)


class Stop(BaseException):
    """As a cancel, or the exception of a signal."""


def send_and(db, monkeypatch, error):
    """Let the next COMMIT be carried out, and raise where its answer should be."""
    dialect = db.engine.dialect
    send = type(dialect).do_commit

    def do_commit(connection):
        monkeypatch.undo()
        send(dialect, connection)
        raise error

    monkeypatch.setattr(dialect, "do_commit", do_commit)


@contextmanager
def silent_server():
    """The port of a server that lets clients connect, and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        yield server.getsockname()[1]


def gone(kit, backend):
    """Wait until the server has ended one of its processes."""
    alive = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :backend")
    with kit.outside.connect() as connection:
        while connection.scalar(alive, {"backend": backend}):
            connection.rollback()
